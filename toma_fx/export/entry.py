"""`toma_fx.export.aoti`, `.onnx` and `.tensorrt`: an optimized denoiser becomes a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from toma_fx.export.artifact import Report, silent
from toma_fx.export.builder import build
from toma_fx.export.manifest import Manifest


def aoti(
    optimized: Any,
    example_inputs: Any,
    out: str | Path,
    *,
    max_autotune: bool = False,
    inductor: tuple[tuple[str, Any], ...] = (),
    overwrite: bool = False,
    licence: str = "",
    report: Report = silent,
) -> Manifest:
    """Compile an optimized denoiser with AOTInductor into the folder `out`.

    Args as for `toma_fx.export.build`, and as for `AOTITarget`.

    Raises:
        BuildError, DynamicError, ModelTypeError, SignatureError: see `toma_fx.export.build`.
    """
    from toma_fx.export.to_aoti.target import AOTITarget

    target = AOTITarget(max_autotune, inductor)
    how: dict[str, Any] = {"overwrite": overwrite, "licence": licence, "report": report}
    return build(optimized, example_inputs, out, target, **how)


def onnx(
    optimized: Any,
    example_inputs: Any,
    out: str | Path,
    *,
    form: Literal["cached", "stateless"] = "cached",
    opset: int | None = None,
    overwrite: bool = False,
    licence: str = "",
    report: Report = silent,
) -> Manifest:
    """Write an optimized denoiser as ONNX models into the folder `out`.

    Args as for `toma_fx.export.build`, and as for `ONNXTarget`; `opset` None is its default.

    Raises:
        MissingPackageError: the extra `[onnx]` is not installed. BuildError, DynamicError,
            ModelTypeError, SignatureError: see `toma_fx.export.build`.
    """
    from toma_fx.export.to_onnx.target import ONNXTarget

    target = ONNXTarget(form) if opset is None else ONNXTarget(form, opset)
    how: dict[str, Any] = {"overwrite": overwrite, "licence": licence, "report": report}
    return build(optimized, example_inputs, out, target, **how)


def tensorrt(
    optimized: Any,
    example_inputs: Any,
    out: str | Path,
    *,
    route: Literal["torch", "onnx"] = "torch",
    optimization_level: int | None = None,
    workspace: int = 0,
    overwrite: bool = False,
    licence: str = "",
    report: Report = silent,
) -> Manifest:
    """Build TensorRT engines of an optimized denoiser into the folder `out`.

    Args as for `toma_fx.export.build`, and as for `TensorRTTarget`. `tensorrt_coverage` says
    beforehand, on any machine, what is known to speak against it.

    Raises:
        MissingPackageError: TensorRT is not installed; names packages and versions. BuildError,
            DynamicError, ModelTypeError, SignatureError: see `toma_fx.export.build`.
    """
    from toma_fx.export.to_tensorrt.target import TensorRTTarget

    target = TensorRTTarget(route, optimization_level, workspace)
    how: dict[str, Any] = {"overwrite": overwrite, "licence": licence, "report": report}
    return build(optimized, example_inputs, out, target, **how)

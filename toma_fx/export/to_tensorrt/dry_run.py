"""What TensorRT takes of an optimized denoiser, before anything is built."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, get_args

from toma_fx.export.building import Build, ignore
from toma_fx.export.packages import import_onnx
from toma_fx.export.programs import export_programs
from toma_fx.export.to_onnx.names import file_of
from toma_fx.export.to_onnx.target import ONNXTarget
from toma_fx.export.to_tensorrt.aten import aten_coverage
from toma_fx.export.to_tensorrt.coverage import Coverage
from toma_fx.export.to_tensorrt.onnx_parser import onnx_coverage
from toma_fx.export.to_tensorrt.target import Route
from toma_fx.methods.checks import check_choice


def tensorrt_coverage(
    optimized: Any, example_inputs: Any, *, route: Route = "torch"
) -> dict[str, Coverage]:
    """What TensorRT takes of an optimized denoiser, by tables: neither it nor a GPU is needed.

    Args:
        optimized: what `toma_fx.optimize` returned. example_inputs: a call.
        route: "torch" or "onnx", as for `TensorRTTarget`.

    Returns:
        For each kind of step its coverage, which can be printed.

    Raises:
        UnknownNameError: no such route. MissingPackageError: the route "onnx" needs the extra
            `[onnx]`. As `export_programs`.
    """
    check_choice("route", route, get_args(Route))
    if route == "torch":
        programs = export_programs(optimized, example_inputs)
        return {c: aten_coverage(p.program, truncate_double=True) for c, p in programs.items()}
    target = ONNXTarget()
    target.check_installed()
    onnx = import_onnx("onnx")
    programs = export_programs(optimized, example_inputs)
    with tempfile.TemporaryDirectory() as folder:
        build = Build(Path(folder) / "onnx", "", ignore)
        build.start()
        target.lower([programs], build)
        models = {
            c: onnx.load(build.folder / file_of(c), load_external_data=False) for c in programs
        }
    return {kind: onnx_coverage(model) for kind, model in models.items()}

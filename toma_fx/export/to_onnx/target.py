"""ONNX: models that any runtime which reads ONNX can run, and ONNX Runtime to run them here.

    refresh.onnx, reuse.onnx, plain.onnx   one model for each kind of step, or refresh.onnx alone;
                                           of several calls 832x1216_refresh.onnx, ...
    weights.safetensors                    the weights of all of them, each once

    exported program -> ONNX -> casts before mixed joins -> constants folded -> weights moved out
                     -> transposed weights stored as they are used -> names -> checked by path

Weights are external data of the models: their bytes lie in one file, whose header is that of
safetensors, so that it can also be read without any of the models. ONNX has no state, and a write
into a buffer would be lost without a word: patterns are inputs and outputs.

Matrices that a model transposes first are stored transposed. A runtime would do it when it loads a
model, once for each model, and so hold every such weight several times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from toma_fx.errors import BuildError, ConfigError
from toma_fx.export.packages import import_onnx, missing_onnx
from toma_fx.export.targets import Lowered, Runtime, Target
from toma_fx.methods.checks import check_choice

if TYPE_CHECKING:
    import torch

    from toma_fx.export.building import Build
    from toma_fx.export.programs import Programs
    from toma_fx.export.reading import ArtifactFiles

Form = Literal["cached", "stateless"]
OPSETS = range(18, 26)
"""What `torch.onnx` writes and ONNX Runtime reads correctly."""
DEFAULT_OPSET = 23
"""The first with attention as one operator: it needs no tokens x tokens matrix on a GPU."""
BUILD_PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ONNXTarget(Target):
    """ONNX models.

    Attributes:
        form: "cached", where patterns are handed from step to step; or "stateless", one model that
            selects in every merged step and takes no patterns.
        opset: version of the ONNX operators, 18 to 25. From 23 on attention is one operator;
            runtimes that lack it need 22 or less.

    Raises:
        UnknownNameError: no such form. ConfigError: no such opset.
    """

    form: Form = "cached"
    opset: int = DEFAULT_OPSET

    def __post_init__(self) -> None:
        check_choice("form", self.form, get_args(Form))
        if type(self.opset) is not int or self.opset not in OPSETS:
            raise ConfigError(
                "unsupported ONNX opset",
                where="opset",
                expected=f"a whole number from {OPSETS[0]} to {OPSETS[-1]}",
                got=repr(self.opset),
                hint=f"leave it out for {DEFAULT_OPSET}",
            )

    def check_installed(self) -> None:
        """Raise `MissingPackageError`, which names the extra, if a package is missing."""
        for package in BUILD_PACKAGES:
            import_onnx(package)

    def check(self, programs: Programs) -> None:
        """Raise if ONNX models can't be made or compared here.

        Raises:
            MissingPackageError: on a GPU, ONNX Runtime without CUDA.
            BuildError: bfloat16 on a CPU, or another device; the stateless form with a cache.
        """
        if self.form == "stateless" and programs.plan.cache is not None:
            raise BuildError(
                "a model that keeps nothing can't use what earlier steps kept",
                where="form",
                expected='form="cached" for a model that is optimized with cache=',
                got='form="stateless"',
                hint="leave out form=, or cache=",
            )
        providers = import_onnx("onnxruntime").get_available_providers()
        device = programs.device.type
        if device not in ("cpu", "cuda"):
            raise BuildError(
                "ONNX artifacts are built on cpu or cuda",
                where="device",
                expected="a model on cpu or cuda",
                got=device,
            )
        if device == "cuda" and "CUDAExecutionProvider" not in providers:
            raise missing_onnx("onnxruntime-gpu", "onnx-gpu")
        tensors = [*programs.leaves, *programs.denoiser.denoiser.state_dict().values()]
        dtypes = {str(getattr(x, "dtype", "")) for x in tensors}
        if device == "cpu" and "torch.bfloat16" in dtypes:
            raise BuildError(
                "ONNX Runtime has no bfloat16 kernels for CPUs, so nothing could be compared",
                where="dtype",
                expected="float32 or float16 on cpu, or bfloat16 on cuda",
                got="bfloat16 on cpu",
                hint="model.half() or model.float(), or move the model to a GPU",
            )

    def lower(self, calls: Sequence[Programs], build: Build) -> Lowered:
        """Write one model for each program; `BuildError` if one can't be expressed in ONNX."""
        from toma_fx.export.to_onnx.lower import lower

        return lower(self.form, self.opset, calls, build)

    @staticmethod
    def open(artifact: ArtifactFiles, device: torch.device, options: Mapping[str, Any]) -> Runtime:
        """Open a verified artifact in ONNX Runtime.

        Args:
            artifact: its files. device: cpu or cuda.
            options: "providers": execution providers as ONNX Runtime takes them, first choice
                first; by default TensorRT and CUDA where they are installed, on a CUDA device.
                "threads": of one operator, on a CPU. "prepack": whether ONNX Runtime may rearrange
                weights for its CPU kernels, which costs memory: each model gets its own.

        Raises:
            MissingPackageError: ONNX Runtime is not installed. UnknownNameError: an unknown option
                or provider. ArtifactError: ONNX Runtime can't read the models, or not on `device`.
        """
        from toma_fx.export.to_onnx.runtime import ORTRuntime

        return ORTRuntime(artifact, device, options)

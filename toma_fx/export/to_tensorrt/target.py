"""TensorRT: engines for one kind of GPU, made in one of two ways and run by TensorRT alone.

    route "torch"   exported program -> Torch-TensorRT's converters -> refresh.engine, reuse.engine
    route "onnx"    the models of the ONNX target -> TensorRT's ONNX parser -> the same files

Both give plain engines with named tensors, so that the same runtime opens either, and so can
`trtexec` or a server. An engine holds its weights: programs don't share them,
neither those of one call nor those of several.

Nothing here has run with TensorRT yet. It is written against the interfaces of published wheels;
tests hold every call to them (`tests/data/signatures.json`). What is known beforehand of the
operators is in `coverage`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from toma_fx.errors import BuildError, ConfigError
from toma_fx.export.packages import import_tensorrt
from toma_fx.export.targets import Lowered, Runtime, Target, check_options
from toma_fx.export.to_onnx.target import ONNXTarget
from toma_fx.methods.checks import check_choice

if TYPE_CHECKING:
    import torch

    from toma_fx.export.building import Build
    from toma_fx.export.programs import Programs
    from toma_fx.export.reading import ArtifactFiles

Route = Literal["torch", "onnx"]
LEVELS = range(6)
"""TensorRT's optimization levels."""


@dataclass(frozen=True)
class TensorRTTarget(Target):
    """TensorRT engines, for this version of TensorRT and GPUs of this compute capability.

    Attributes:
        route: "torch", through Torch-TensorRT; or "onnx", through ONNX models and their parser.
        optimization_level: 0 to 5, how long TensorRT may look for kernels; None is its default.
        workspace: bytes of GPU memory that kernels may use; 0 is all there is.

    Raises:
        UnknownNameError: no such route. ConfigError: another value that can't be.
    """

    route: Route = "torch"
    optimization_level: int | None = None
    workspace: int = 0

    def __post_init__(self) -> None:
        check_choice("route", self.route, get_args(Route))
        if self.optimization_level is not None and self.optimization_level not in LEVELS:
            raise ConfigError(
                "unknown optimization level of TensorRT",
                where="optimization_level",
                expected=f"{LEVELS[0]} to {LEVELS[-1]}, or None",
                got=repr(self.optimization_level),
            )
        if type(self.workspace) is not int or self.workspace < 0:
            raise ConfigError(
                "not a size of memory",
                where="workspace",
                expected="a number of bytes, or 0 for no limit",
                got=repr(self.workspace),
            )

    def check_installed(self) -> None:
        """Raise `MissingPackageError`, with the versions that fit, if TensorRT is not here."""
        import_tensorrt("tensorrt")
        if self.route == "torch":
            import_tensorrt("torch_tensorrt")
        else:
            ONNXTarget().check_installed()

    def check(self, programs: Programs) -> None:
        """Raise if no engine can be built here.

        Raises:
            BuildError: the model is not on a GPU, or, on the route "torch", an operator is not
                taken, by the table of the installed version.
        """
        from toma_fx.export.to_tensorrt.aten import aten_coverage
        from toma_fx.export.to_tensorrt.coverage import load_table, require

        if programs.device.type != "cuda":
            raise BuildError(
                "TensorRT engines are built on the GPU that they are for",
                where="device",
                expected="a model on cuda",
                got=str(programs.device),
                hint="model.to('cuda')",
            )
        known: str = load_table("torch_tensorrt")["version"]
        if self.route == "torch" and import_tensorrt("torch_tensorrt").__version__ == known:
            for program in programs.values():
                require(aten_coverage(program.program, truncate_double=True))

    def lower(self, calls: Sequence[Programs], build: Build) -> Lowered:
        """Build one engine for each program; `BuildError` with what TensorRT says if it can't."""
        from toma_fx.export.to_tensorrt.lower import lower

        return lower(calls, build, **asdict(self))

    @staticmethod
    def open(artifact: ArtifactFiles, device: torch.device, options: Mapping[str, Any]) -> Runtime:
        """Open a verified artifact.

        Raises:
            MissingPackageError: TensorRT is not installed. ArtifactError: engines for another
                version of TensorRT, or another kind of GPU. UnknownNameError: any option.
        """
        from toma_fx.export.machine import check_machine, compute_capability
        from toma_fx.export.to_tensorrt.runtime import TensorRTRuntime

        check_options("load() of a tensorrt artifact", options)
        trt = import_tensorrt("tensorrt")
        version = str(trt.__version__)
        check_machine(artifact.manifest, device, "tensorrt", version, compute_capability)
        return TensorRTRuntime(trt, artifact, device)

"""TensorRT: engines for one kind of GPU, made in one of two ways and run by TensorRT alone.

    route "torch"   exported program -> Torch-TensorRT's converters -> refresh.engine, reuse.engine
    route "onnx"    the models of the ONNX target -> TensorRT's ONNX parser -> the same files

Both give plain engines with named tensors, so that the same runtime opens either, and so can
`trtexec` or a server. An engine holds its weights: programs don't share them.

None of this has met TensorRT yet. It is written against the interfaces of `tables/signatures.json`,
taken from the published wheels; tests hold every call to them. What is known beforehand of the
operators is in `coverage`.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from toma_fx.errors import (
    ArtifactError,
    BuildError,
    ConfigError,
    MissingPackageError,
    UnknownNameError,
    nearest,
)
from toma_fx.export.artifact import Build, silent
from toma_fx.export.manifest import Device, Manifest, ProgramSpec, TargetSpec
from toma_fx.export.packages import imported
from toma_fx.export.programs import Exported, Programs, export_programs
from toma_fx.export.targets import Lowered, Runtime, Target, check_options
from toma_fx.export.to_onnx.names import file_of
from toma_fx.export.to_onnx.target import ONNXTarget
from toma_fx.export.to_tensorrt.aten import aten_coverage
from toma_fx.export.to_tensorrt.coverage import Coverage, load_table, require
from toma_fx.export.to_tensorrt.onnx_parser import onnx_coverage
from toma_fx.export.to_tensorrt.runtime import _Engines

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

    name = "tensorrt"

    def __post_init__(self) -> None:
        _check_route(self.route)
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
        """Raise, before anything is exported, if TensorRT is not here.

        Raises:
            MissingPackageError: names the package and the versions that belong together.
        """
        _package("tensorrt")
        if self.route == "torch":
            _package("torch_tensorrt")
        else:
            ONNXTarget().check_installed()

    def check(self, programs: Programs) -> None:
        """Raise, before anything is made, if no engine can come of it.

        Raises:
            BuildError: the model is not on a GPU, or, on the route "torch", an operator is not
                taken, by the table of the installed version.
        """
        if programs.device.type != "cuda":
            raise BuildError(
                "TensorRT engines are built on the GPU that they are for",
                where="device",
                expected="a model on cuda",
                got=str(programs.device),
                hint="model.to('cuda')",
            )
        known: str = load_table("torch_tensorrt")["version"]
        if self.route == "torch" and _package("torch_tensorrt").__version__ == known:
            for made in programs.values():
                require(aten_coverage(made.program, truncate_double=True))

    def lower(self, programs: Programs, build: Build) -> Lowered:
        """Build one engine for each program.

        Raises:
            BuildError: TensorRT does not take a program, or finds no way to compute it.
        """
        trt = _package("tensorrt")
        arch, name = _architecture(programs.device), torch.cuda.get_device_name(programs.device)
        versions = {"tensorrt": str(trt.__version__), "cuda": str(torch.version.cuda)}
        if self.route == "torch":
            versions["torch_tensorrt"] = str(_package("torch_tensorrt").__version__)
        # another machine must not go on with engines of this one
        here = f"for {name}, {arch}, TensorRT {trt.__version__}"
        specs: dict[str, ProgramSpec] = {
            call: ProgramSpec(f"{call}.engine", "", made.pattern_inputs, made.pattern_outputs)
            for call, made in programs.items()
        }
        made_all = all(build.has(f"engine {c} {here}", s.file) for c, s in specs.items())
        if self.route == "onnx" and not made_all:
            versions.update(ONNXTarget().lower(programs, build).versions)
        for call, made in programs.items():

            def engine(folder: Path, call: str = call, made: Exported = made) -> None:
                data = self._engine(folder, call, made, programs.device)
                (folder / specs[call].file).write_bytes(data)

            build.stage(f"engine {call} {here}", engine, specs[call].file)
        for path in (*build.folder.glob("*.onnx"), *build.folder.glob("*.safetensors")):
            path.unlink()  # the weights are in the engines
        options = {k: str(v) for k, v in vars(self).items()}
        target = TargetSpec("tensorrt", options)
        return Lowered(target, Device("cuda", name, arch), specs, versions)

    @staticmethod
    def open(
        folder: Path, manifest: Manifest, device: torch.device, options: Mapping[str, Any]
    ) -> Runtime:
        """Open a verified artifact.

        Raises:
            MissingPackageError: TensorRT is not installed. ArtifactError: engines for another
                version of TensorRT, or another kind of GPU. UnknownNameError: any option.
        """
        check_options("tensorrt", options)
        trt = _package("tensorrt")
        _check_machine(manifest, device, str(trt.__version__))
        return _Engines(trt, folder, manifest, device)

    def _engine(self, folder: Path, call: str, made: Exported, device: torch.device) -> bytes:
        """A serialized engine.

        Raises:
            BuildError: with what TensorRT says.
        """
        if self.route == "onnx":
            return self._parsed(folder / file_of(call), call)
        settings: dict[str, Any] = {
            "arg_inputs": list(made.example),
            "device": device,
            "truncate_double": True,  # Flux's rotary tables; TensorRT has no float64
            "disable_tf32": True,  # float32 means float32, as in ONNX Runtime and torch
            "require_full_compilation": True,
            "attn_bias_is_causal": False,  # what it takes every mask for
            "optimization_level": self.optimization_level,
            "workspace_size": self.workspace,
        }
        try:
            dynamo = _package("torch_tensorrt").dynamo
            data = dynamo.convert_exported_program_to_serialized_trt_engine(
                made.program, **settings
            )
        except Exception as error:  # its converters raise whatever they like
            raise _unbuilt(call, f"{type(error).__name__}: {str(error)[:500]}") from error
        return bytes(data)

    def _parsed(self, path: Path, call: str) -> bytes:
        """An engine of an ONNX model.

        Raises:
            BuildError: with the parser's errors, or if the builder gives up.
        """
        trt = _package("tensorrt")
        logger = trt.Logger(trt.Logger.WARNING)
        builder = trt.Builder(logger)
        typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(typed)
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(path)):
            errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
            raise _unbuilt(call, "; ".join(errors)[:1000])
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        if self.workspace:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self.workspace)
        if self.optimization_level is not None:
            config.builder_optimization_level = self.optimization_level
        data = builder.build_serialized_network(network, config)
        if data is None:
            raise _unbuilt(call, "the builder found no engine; its log says why")
        return bytes(data)


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
    _check_route(route)
    if route == "torch":
        programs = export_programs(optimized, example_inputs)
        return {
            c: aten_coverage(made.program, truncate_double=True) for c, made in programs.items()
        }
    target = ONNXTarget()
    target.check_installed()
    onnx = imported("onnx")
    programs = export_programs(optimized, example_inputs)
    with tempfile.TemporaryDirectory() as folder:
        work = Build(Path(folder) / "onnx", "", silent)
        work.start()
        target.lower(programs, work)
        models = {
            c: onnx.load(work.folder / file_of(c), load_external_data=False) for c in programs
        }
    return {call: onnx_coverage(model) for call, model in models.items()}


def _check_route(route: Any) -> None:
    routes = get_args(Route)
    if route not in routes:
        raise UnknownNameError(
            "unknown way to TensorRT",
            where="route",
            expected=" or ".join(map(repr, routes)),
            got=repr(route),
            hint=nearest(str(route), routes),
        )


def _unbuilt(call: str, said: str) -> BuildError:
    return BuildError(
        "TensorRT could not build a program",
        where=call,
        got=said,
        hint="see tensorrt_coverage (toma-fx build --dry-run), try the other route, or another "
        "target",
    )


# -- the machine --------------------------------------------------------------------------------


def _package(name: str) -> Any:
    """TensorRT or Torch-TensorRT.

    Raises:
        MissingPackageError: names the versions that belong together.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        table = load_table("torch_tensorrt")
        wanted = [r for r in table["requires"] if r.startswith(("torch", "tensorrt"))]
        raise MissingPackageError(
            f"TensorRT artifacts need the package {name.replace('_', '-')}",
            where=name,
            expected=f"torch-tensorrt {table['version']} with {', '.join(sorted(wanted))}",
            got=f"torch {torch.__version__}; {type(error).__name__}: {error}",
            hint="on a machine with an NVIDIA GPU: pip install toma_fx[tensorrt] "
            "--extra-index-url https://pypi.nvidia.com",
        ) from error


def _architecture(device: torch.device) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _check_machine(manifest: Manifest, device: torch.device, version: str) -> None:
    """Refuse engines that were built for something else, before TensorRT reads them.

    Raises:
        ArtifactError: naming the first difference.
    """
    pairs = [("device", manifest.device.type, device.type)]
    if device.type == manifest.device.type:
        pairs.append(("device.arch", manifest.device.arch, _architecture(device)))
    pairs.append(("versions.tensorrt", manifest.versions.get("tensorrt", "unknown"), version))
    for where, expected, got in pairs:
        if expected != got:
            raise ArtifactError(
                "the engines were built for something else",
                where=where,
                expected=expected,
                got=got,
                hint="build the artifact anew on this machine",
            )

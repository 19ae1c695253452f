"""Building TensorRT engines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from toma_fx.errors import BuildError
from toma_fx.export.building import Build
from toma_fx.export.machine import compute_capability
from toma_fx.export.manifest import Device, ProgramSpec, TargetSpec
from toma_fx.export.packages import import_tensorrt
from toma_fx.export.programs import Exported, Programs
from toma_fx.export.targets import Lowered
from toma_fx.export.to_onnx.names import file_of
from toma_fx.export.to_onnx.target import ONNXTarget


def lower(
    calls: Sequence[Programs],
    build: Build,
    *,
    route: str,
    optimization_level: int | None,
    workspace: int,
) -> Lowered:
    """Build one engine for each program of each call; options as of `TensorRTTarget`.

    Raises:
        BuildError: TensorRT does not take a program, or finds no way to compute it.
    """
    trt = import_tensorrt("tensorrt")
    device = calls[0].device
    arch, name = compute_capability(device), torch.cuda.get_device_name(device)
    versions = {"tensorrt": str(trt.__version__), "cuda": str(torch.version.cuda)}
    if route == "torch":
        versions["torch_tensorrt"] = str(import_tensorrt("torch_tensorrt").__version__)
    # another machine must not go on with engines of this one
    machine = f"for {name}, {arch}, TensorRT {trt.__version__}"
    specs: list[dict[str, ProgramSpec]] = [
        {
            kind: ProgramSpec(engine_file(programs.label(kind)), "", p.takes, p.gives, p.instead)
            for kind, p in programs.items()
        }
        for programs in calls
    ]
    labeled = {programs.label(kind): p for programs in calls for kind, p in programs.items()}
    finished = all(build.has(f"engine {c} {machine}", engine_file(c)) for c in labeled)
    if route == "onnx" and not finished:
        versions.update(ONNXTarget().lower(calls, build).versions)
    for label, program in labeled.items():

        def write(folder: Path, label: str = label, program: Exported = program) -> None:
            if route == "onnx":
                path = folder / file_of(label)
                data = engine_of_model(label, path, optimization_level, workspace)
            else:
                data = engine_of_program(label, program, device, optimization_level, workspace)
            (folder / engine_file(label)).write_bytes(data)

        build.stage(f"engine {label} {machine}", write, engine_file(label))
    for path in (*build.folder.glob("*.onnx"), *build.folder.glob("*.safetensors")):
        path.unlink()  # the weights are in the engines
    options = {
        "route": route,
        "optimization_level": str(optimization_level),
        "workspace": str(workspace),
    }
    return Lowered(TargetSpec("tensorrt", options), Device("cuda", name, arch), specs, versions)


def engine_file(label: str) -> str:
    """Name of the engine of a program."""
    return f"{label}.engine"


def engine_of_program(
    label: str, program: Exported, device: torch.device, level: int | None, workspace: int
) -> bytes:
    """A serialized engine of an exported program, through Torch-TensorRT.

    Raises:
        BuildError: with what Torch-TensorRT says.
    """
    settings: dict[str, Any] = {
        "arg_inputs": list(program.example),
        "device": device,
        "truncate_double": True,  # Flux's rotary tables; TensorRT has no float64
        "disable_tf32": True,  # float32 means float32, as in ONNX Runtime and torch
        "require_full_compilation": True,
        "attn_bias_is_causal": False,  # what it takes every mask for
        "optimization_level": level,
        "workspace_size": workspace,
    }
    try:
        convert = import_tensorrt(
            "torch_tensorrt"
        ).dynamo.convert_exported_program_to_serialized_trt_engine
        return bytes(convert(program.program, **settings))
    except Exception as error:  # its converters raise whatever they like
        raise _build_error(label, f"{type(error).__name__}: {str(error)[:500]}") from error


def engine_of_model(label: str, path: Path, level: int | None, workspace: int) -> bytes:
    """A serialized engine of an ONNX model, through TensorRT's parser.

    Raises:
        BuildError: with the parser's errors, or if the builder gives up.
    """
    trt = import_tensorrt("tensorrt")
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise _build_error(label, "; ".join(errors)[:1000])
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if level is not None:
        config.builder_optimization_level = level
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise _build_error(label, "the builder found no engine; its log says why")
    return bytes(data)


def _build_error(label: str, got: str) -> BuildError:
    return BuildError(
        "TensorRT could not build a program",
        where=label,
        got=got,
        hint="see tensorrt_coverage (toma-fx build --dry-run), try the other route, or another "
        "target",
    )

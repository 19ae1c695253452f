"""Writing programs as ONNX models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from toma_fx.errors import BuildError
from toma_fx.export.building import Build
from toma_fx.export.manifest import Device, ProgramSpec, TargetSpec
from toma_fx.export.packages import quiet_exporter, version_of
from toma_fx.export.programs import Exported, Programs
from toma_fx.export.targets import Lowered
from toma_fx.export.to_onnx.check import check_model
from toma_fx.export.to_onnx.names import IONames, file_of
from toma_fx.export.to_onnx.passes import cast_mixed_joins, simplify
from toma_fx.export.to_onnx.weights import WEIGHTS, close_files, externalize_weights, save_model


def lower(form: str, opset: int, programs: Programs, build: Build) -> Lowered:
    """Write one model for each program, and the weights with the first of them.

    Raises:
        BuildError: a program can't be expressed in ONNX; the disk is full.
    """
    chosen = programs if form == "cached" else stateless_programs(programs)
    first = next(iter(chosen))
    specs = {}
    for kind, program in chosen.items():
        names = IONames.of(programs, program)

        def write(
            folder: Path, kind: str = kind, program: Exported = program, names: IONames = names
        ) -> None:
            model = convert(kind, program, names, opset)
            externalize_weights(model, folder, create=kind == first)
            save_model(model, folder / file_of(kind))
            check_model(folder / file_of(kind), opset, names, kind)
            close_files(model)

        files = (file_of(kind), WEIGHTS) if kind == first else (file_of(kind),)
        build.stage(f"onnx {kind}", write, *files)
        takes, gives, instead = program.takes, program.gives, program.instead
        specs[kind] = ProgramSpec(file_of(kind), "", takes, gives, instead)
    target = TargetSpec("onnx", {"form": form, "opset": str(opset)})
    device = Device(programs.device.type, "", "")
    versions = {p: version_of(p) for p in ("onnx", "onnxscript", "onnxruntime")}
    return Lowered(target, device, specs, versions)


def stateless_programs(programs: Programs) -> Mapping[Any, Exported]:
    """The programs that take no patterns, without the patterns that they give."""
    alone = {kind: program for kind, program in programs.items() if not program.takes}
    return {kind: replace(program, gives=()) for kind, program in alone.items()}


def convert(kind: str, program: Exported, names: IONames, opset: int) -> Any:
    """One program as an ONNX model, weights still those of the process.

    Raises:
        BuildError: it can't be expressed in ONNX.
    """
    with quiet_exporter():
        try:
            exported = torch.onnx.export(
                program.program,
                dynamo=True,
                opset_version=opset,
                optimize=False,  # its rewriting takes minutes on unrolled selections
                verbose=False,
            )
        except Exception as error:  # the exporter's translations raise whatever they like
            raise _inexpressible(kind, error) from error
        assert exported is not None
        model = exported.model
        names.keep_outputs(model)
        cast_mixed_joins(model)
        simplify(model)
    names.assign(model, kind)
    return model


def _inexpressible(kind: str, error: Exception) -> BuildError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return BuildError(
        "a program can't be expressed in ONNX",
        where=kind,
        got=f"{type(cause).__name__}: {str(cause)[:500]}",
        hint="report the model, or try another opset or method",
    )

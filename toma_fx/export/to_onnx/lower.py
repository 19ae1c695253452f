"""Writing programs as ONNX models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
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


def lower(form: str, opset: int, calls: Sequence[Programs], build: Build) -> Lowered:
    """Write one model for each program, and the weights with the first of them.

    Raises:
        BuildError: a program can't be expressed in ONNX; the disk is full.
    """
    specs: list[dict[str, ProgramSpec]] = []
    for programs in calls:
        chosen = programs if form == "cached" else stateless_programs(programs)
        specs.append({})
        for kind, program in chosen.items():
            label, takes, gives = programs.label(kind), program.takes, program.gives
            names, first = IONames.of(programs, program), specs == [{}]
            write = partial(write_model, label, program, names, opset, first)
            files = (file_of(label), WEIGHTS) if first else (file_of(label),)
            build.stage(f"onnx {label}", write, *files)
            specs[-1][kind] = ProgramSpec(file_of(label), "", takes, gives, program.instead)
    target = TargetSpec("onnx", {"form": form, "opset": str(opset)})
    device = Device(calls[0].device.type, "", "")
    versions = {p: version_of(p) for p in ("onnx", "onnxscript", "onnxruntime")}
    return Lowered(target, device, specs, versions)


def write_model(
    label: str, program: Exported, names: IONames, opset: int, first: bool, folder: Path
) -> None:
    """Write the model of one program; that of the first with the weights."""
    model = convert(label, program, names, opset)
    externalize_weights(model, folder, create=first)
    save_model(model, folder / file_of(label))
    check_model(folder / file_of(label), opset, names, label)
    close_files(model)


def stateless_programs(programs: Programs) -> Mapping[Any, Exported]:
    """The programs that take no patterns, without the patterns that they give."""
    alone = {kind: program for kind, program in programs.items() if not program.takes}
    return {kind: replace(program, gives=()) for kind, program in alone.items()}


def convert(label: str, program: Exported, names: IONames, opset: int) -> Any:
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
            raise _inexpressible(label, error) from error
        assert exported is not None
        model = exported.model
        names.keep_outputs(model)
        cast_mixed_joins(model)
        simplify(model)
    names.assign(model, label)
    return model


def _inexpressible(label: str, error: Exception) -> BuildError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return BuildError(
        "a program can't be expressed in ONNX",
        where=label,
        got=f"{type(cause).__name__}: {str(cause)[:500]}",
        hint="report the model, or try another opset or method",
    )

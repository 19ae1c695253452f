"""Compiling programs with AOTInductor."""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from toma_fx.compat.compilers import compile_ahead, inductor_modes
from toma_fx.errors import BuildError
from toma_fx.export.building import Build
from toma_fx.export.machine import architecture, processor
from toma_fx.export.manifest import Device, ProgramSpec, TargetSpec
from toma_fx.export.programs import Exported, Programs
from toma_fx.export.targets import Lowered
from toma_fx.export.to_aoti.files import (
    PARTS,
    WEIGHTS,
    join_parts,
    names_by_memory,
    part_files,
    save_constants,
    save_part,
    save_weights,
    weights_of,
)
from toma_fx.export.to_aoti.package import PACKAGE


def lower(options: Mapping[str, Any], programs: Programs, build: Build) -> Lowered:
    """Compile each program, then write the package and the weights.

    Args:
        options: of Inductor, and "max_autotune". programs: what to compile. build: for the stages.

    Raises:
        BuildError: Inductor could not compile a program.
    """
    arch = architecture(programs.device)
    # another machine must not go on with what this one compiled
    machine = f"for {platform.machine()} {hashlib.sha256(arch.encode()).hexdigest()[:8]}"
    package, weights = f"package {machine}", "weights"
    parts = {kind: part_files(kind) for kind in programs}
    if not (build.has(package, PACKAGE) and build.has(weights, WEIGHTS)):
        for i, (kind, program) in enumerate(programs.items(), 1):

            def compile_one(folder: Path, kind: str = kind, program: Exported = program) -> None:
                compile_program(folder, kind, program, options, programs)

            stage = f"compile {kind} ({i} of {len(programs)}) {machine}"
            build.stage(stage, compile_one, *parts[kind])
    compiled: dict[str, str] = {kind: names[0] for kind, names in parts.items()}
    tensors = {kind: programs.tensors_of(kind) for kind in programs}
    build.stage(package, lambda folder: join_parts(folder, compiled, tensors), PACKAGE)
    build.stage(weights, lambda folder: save_weights(folder, programs), WEIGHTS)
    shutil.rmtree(build.folder / PARTS, ignore_errors=True)
    specs: dict[str, ProgramSpec] = {
        kind: ProgramSpec(PACKAGE, kind, program.takes, program.gives, program.instead)
        for kind, program in programs.items()
    }
    target = TargetSpec("aoti", {name: str(value) for name, value in options.items()})
    device = Device(programs.device.type, processor(programs.device), arch)
    versions = {"cuda": str(torch.version.cuda)} if device.type == "cuda" else {}
    return Lowered(target, device, specs, versions)


def compile_program(
    folder: Path, kind: str, program: Exported, options: Mapping[str, Any], programs: Programs
) -> None:
    """Keep the files of one compiled program, without weights, and its constants.

    Raises:
        BuildError: Inductor could not compile it.
    """
    settings = _inductor_settings(options)
    try:
        files, values = compile_ahead(program.program.module(), program.example, settings)
    except OSError:
        raise
    except Exception as error:  # its passes and the compiler raise whatever they like
        raise BuildError(
            "Inductor could not compile a program",
            where=kind,
            got=f"{type(error).__name__}: {str(error)[:500]}",
            hint="try without max_autotune and options of Inductor, or report the model",
        ) from error
    code, constants = (folder / name for name in part_files(kind))
    save_part(code, [file for file in files if file])
    save_constants(constants, values, names_by_memory(weights_of(programs)), programs.device)


def _inductor_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of Inductor: weights come back as tensors, beside the compiled files."""
    settings = dict(options)
    tuned = inductor_modes()["max-autotune-no-cudagraphs"] if settings.pop("max_autotune") else {}
    return {
        **tuned,
        **settings,
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": "pickle_weights",
    }

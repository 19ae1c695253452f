"""Compiling programs with AOTInductor."""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
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


def lower(options: Mapping[str, Any], calls: Sequence[Programs], build: Build) -> Lowered:
    """Compile each program, then write the package and the weights.

    Args:
        options: of Inductor, and "max_autotune". calls: what to compile. build: for the stages.

    Raises:
        BuildError: Inductor could not compile a program.
    """
    place = calls[0].device
    arch = architecture(place)
    # another machine must not go on with what this one compiled
    machine = f"for {platform.machine()} {hashlib.sha256(arch.encode()).hexdigest()[:8]}"
    package, weights = f"package {machine}", "weights"
    labeled = {programs.label(kind): (programs, kind) for programs in calls for kind in programs}
    parts = {label: part_files(label) for label in labeled}
    if not (build.has(package, PACKAGE) and build.has(weights, WEIGHTS)):
        for i, (label, (programs, kind)) in enumerate(labeled.items(), 1):
            compile_one = partial(compile_program, label, programs[kind], options, programs)
            stage = f"compile {label} ({i} of {len(labeled)}) {machine}"
            build.stage(stage, compile_one, *parts[label])
    compiled: dict[str, str] = {label: names[0] for label, names in parts.items()}
    tensors = {label: programs.tensors_of(kind) for label, (programs, kind) in labeled.items()}
    build.stage(package, lambda folder: join_parts(folder, compiled, tensors), PACKAGE)
    build.stage(weights, lambda folder: save_weights(folder, calls), WEIGHTS)
    shutil.rmtree(build.folder / PARTS, ignore_errors=True)
    specs: list[dict[str, ProgramSpec]] = [
        {
            kind: ProgramSpec(PACKAGE, programs.label(kind), one.takes, one.gives, one.instead)
            for kind, one in programs.items()
        }
        for programs in calls
    ]
    target = TargetSpec("aoti", {name: str(value) for name, value in options.items()})
    device = Device(place.type, processor(place), arch)
    versions = {"cuda": str(torch.version.cuda)} if device.type == "cuda" else {}
    return Lowered(target, device, specs, versions)


def compile_program(
    label: str, program: Exported, options: Mapping[str, Any], programs: Programs, folder: Path
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
            where=label,
            got=f"{type(error).__name__}: {str(error)[:500]}",
            hint="try without max_autotune and options of Inductor, or report the model",
        ) from error
    code, constants = (folder / name for name in part_files(label))
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

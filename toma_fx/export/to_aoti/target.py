"""AOTInductor: compiled programs that need neither Python nor the model to run.

    programs.pt2          every program of the schedule, compiled, without weights
    weights.safetensors   the weights of all of them, each once, and constants

Weights lie outside the package because a package either repeats them for each program or holds
them as pickles that only Python reads. This file is mapped into memory, shared by the programs (and
by processes), holds no code, and is read from C++ in a page (`examples/cpp`).

Its metadata names what differs between the programs: `alias/PROGRAM/CONSTANT` is the tensor that a
program knows by another name than its own; `strided/NAME` gives shape and strides of a tensor that
is stored as its memory lies; `host/NAME` marks what GPU programs read from the host's memory.

A program reads whatever memory its constants point to: run without them it ends the process. So
only `_Programs` runs one, and it can't be made without all of them.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toma_fx.errors import BuildError, ConfigError, UnknownNameError, nearest
from toma_fx.export.artifact import Build
from toma_fx.export.machine import _check_machine, _processor, _versions, architecture
from toma_fx.export.manifest import Device, Manifest, ProgramSpec, TargetSpec
from toma_fx.export.programs import Exported, Programs
from toma_fx.export.targets import Lowered, Runtime, Target, check_options
from toma_fx.export.to_aoti.files import (
    PACKAGE,
    PARTS,
    WEIGHTS,
    _by_memory,
    _package,
    _part,
    _save_constants,
    _save_weights,
    _state,
)
from toma_fx.export.to_aoti.runtime import _Programs

_OWN = ("aot_inductor.package", "aot_inductor.output_path", "freezing", "cpp_wrapper")
"""Beginnings of Inductor's options that the target sets, or that would put weights elsewhere."""


@dataclass(frozen=True)
class AOTITarget(Target):
    """Compiled with AOTInductor, for this version of torch and this kind of processor or GPU.

    Attributes:
        max_autotune: whether Inductor times alternatives of kernels: a slower build, for GPUs.
        inductor: other options of `torch._inductor.config`, as pairs of name and value.
    """

    max_autotune: bool = False
    inductor: tuple[tuple[str, Any], ...] = ()

    name = "aoti"

    def check_installed(self) -> None:
        """Raise, before anything is exported, for a wrong option or without a C++ compiler.

        Raises:
            BuildError: no C++ compiler. UnknownNameError: no such option of Inductor.
            ConfigError: an option that is the target's own.
        """
        self._check_options()
        _check_compiler()

    def check(self, programs: Programs) -> None:
        """Raise, before anything is made, if the programs can't be compiled here.

        Raises:
            BuildError: a device that can't be compiled for, quantised weights kept as tensor
                subclasses.
        """
        device = programs.device
        if device.type not in ("cpu", "cuda"):
            raise BuildError(
                "AOTInductor artifacts are made for cpu and cuda only",
                where="device",
                expected="a model on cpu or cuda",
                got=str(device),
            )
        for name, x in programs.denoiser.denoiser.state_dict().items():
            if type(x.data) is not Tensor or x.is_mkldnn:
                raise BuildError(
                    "a weight is no plain tensor",
                    where=name,
                    expected="torch.Tensor",
                    got=type(x.data).__name__,
                    hint="build the artifact from the model before it was quantised",
                )

    def lower(self, programs: Programs, build: Build) -> Lowered:
        """Compile each program, then write the package and the weights."""
        arch = architecture(programs.device)
        # another machine must not go on with what this one compiled
        here = f"for {platform.machine()} {hashlib.sha256(arch.encode()).hexdigest()[:8]}"
        package, weights = f"package {here}", "weights"
        parts = {call: _part(call) for call in programs}
        if not (build.has(package, PACKAGE) and build.has(weights, WEIGHTS)):
            for i, (call, made) in enumerate(programs.items(), 1):

                def compiled(folder: Path, call: str = call, made: Exported = made) -> None:
                    self._compile(folder, call, made, programs)

                stage = f"compile {call} ({i} of {len(programs)}) {here}"
                build.stage(stage, compiled, *parts[call])
        files: dict[str, str] = {call: names[0] for call, names in parts.items()}
        build.stage(package, lambda folder: _package(folder, files), PACKAGE)
        build.stage(weights, lambda folder: _save_weights(folder, programs), WEIGHTS)
        shutil.rmtree(build.folder / PARTS, ignore_errors=True)
        specs: dict[str, ProgramSpec] = {
            call: ProgramSpec(PACKAGE, call, made.pattern_inputs, made.pattern_outputs)
            for call, made in programs.items()
        }
        options = {"max_autotune": self.max_autotune, **dict(self.inductor)}
        target = TargetSpec("aoti", {k: str(v) for k, v in options.items()})
        device = Device(programs.device.type, _processor(programs.device), arch)
        return Lowered(target, device, specs, _versions(programs.device))

    @staticmethod
    def open(
        folder: Path, manifest: Manifest, device: torch.device, options: Mapping[str, Any]
    ) -> Runtime:
        """Open a verified artifact; weights are mapped, and copied only to a GPU.

        Raises:
            ArtifactError: made with another version of torch, for another device or processor, or
                a package and weights that don't belong together. UnknownNameError: any option.
        """
        check_options("aoti", options)
        _check_machine(manifest, device)
        return _Programs(folder, manifest, device)

    # -- building -------------------------------------------------------------------------------

    def _check_options(self) -> None:
        from torch._inductor import list_options

        for name, _ in self.inductor:
            if name.startswith(_OWN):
                raise ConfigError(
                    "this option is the target's own",
                    where="inductor",
                    expected="options that change neither the package nor where weights are",
                    got=name,
                )
            if name not in (known := list_options()):
                raise UnknownNameError(
                    "Inductor has no such option",
                    where="inductor",
                    got=name,
                    hint=nearest(name, known),
                )

    def _patches(self) -> dict[str, Any]:
        """Options for Inductor: weights come back as tensors, beside the compiled files."""
        from torch._inductor import list_mode_options

        tuned = list_mode_options("max-autotune-no-cudagraphs") if self.max_autotune else {}
        return {
            **(tuned or {}),
            **dict(self.inductor),
            "aot_inductor.package": True,
            "aot_inductor.package_constants_in_so": False,
            "aot_inductor.package_constants_on_disk_format": "pickle_weights",
        }

    def _compile(self, folder: Path, call: str, made: Exported, programs: Programs) -> None:
        """Write a package of one program without weights, and its constants."""
        from torch._inductor import aot_compile
        from torch._inductor.package.package import package_aoti
        from torch.export.pt2_archive._package_weights import Weights

        try:
            files = aot_compile(made.program.module(), made.example, options=self._patches())
            assert isinstance(files, list)
        except OSError:
            raise
        except Exception as error:  # its passes and the compiler raise whatever they like
            raise BuildError(
                "Inductor could not compile a program",
                where=call,
                got=f"{type(error).__name__}: {str(error)[:500]}",
                hint="try without max_autotune and options of Inductor, or report the model",
            ) from error
        package, constants = (folder / name for name in _part(call))
        package.parent.mkdir(exist_ok=True)
        package_aoti(str(package), {call: [f for f in files if not isinstance(f, Weights)]})
        given = {k: x for f in files if isinstance(f, Weights) for k, (x, _) in f.items()}
        _save_constants(constants, given, _by_memory(_state(programs)), programs.device)


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise BuildError(
            "AOTInductor needs a C++ compiler",
            where="CXX",
            expected="g++ or clang++ on the path, or its name in CXX",
            hint="install g++",
        ) from error

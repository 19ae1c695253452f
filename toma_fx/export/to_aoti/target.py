"""AOTInductor: compiled programs that need neither Python nor the model to run.

    programs.pt2          every program of the schedule, compiled, without weights
    weights.safetensors   the weights of all of them, each once, and constants

Weights lie outside the package because a package either repeats them for each program or holds
them as pickles that only Python reads. This file is mapped into memory, shared by the programs (and
by processes), holds no code, and is read from C++ in a page (`examples/cpp`).

Its metadata names what differs between the programs, of several calls too:
`alias/PROGRAM/CONSTANT` is the tensor that a program knows by another name than its own;
`strided/NAME` gives shape and strides of a tensor that is stored as its memory lies; `host/NAME`
marks what GPU programs read from the host's memory.

A program reads whatever memory its constants point to: run without them it ends the process. So
only `AOTIRuntime` runs one, and it can't be made without all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toma_fx.compat.compilers import has_cpp_compiler, inductor_options
from toma_fx.errors import BuildError, ConfigError, UnknownNameError, nearest
from toma_fx.export.targets import Lowered, Runtime, Target, check_options

if TYPE_CHECKING:
    import torch

    from toma_fx.export.building import Build
    from toma_fx.export.programs import Programs
    from toma_fx.export.reading import ArtifactFiles

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

    def check_installed(self) -> None:
        """Raise for a wrong option, or without a C++ compiler.

        Raises:
            BuildError: no C++ compiler. UnknownNameError: no such option of Inductor.
            ConfigError: an option that is the target's own.
        """
        for name, _ in self.inductor:
            if name.startswith(_OWN):
                raise ConfigError(
                    "this option is the target's own",
                    where="inductor",
                    expected="options that change neither the package nor where weights are",
                    got=name,
                )
            if name not in (known := inductor_options()):
                raise UnknownNameError(
                    "Inductor has no such option",
                    where="inductor",
                    got=name,
                    hint=nearest(name, known),
                )
        if not has_cpp_compiler():
            raise BuildError(
                "AOTInductor needs a C++ compiler",
                where="CXX",
                expected="g++ or clang++ on the path, or its name in CXX",
                hint="install g++",
            )

    def check(self, programs: Programs) -> None:
        """Raise if the programs can't be compiled here.

        Raises:
            BuildError: a device that can't be compiled for, quantized weights kept as tensor
                subclasses.
        """
        from torch import Tensor

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
                    hint="build the artifact from the model before it was quantized",
                )

    def lower(self, calls: Sequence[Programs], build: Build) -> Lowered:
        """Compile each program, then write the package and the weights."""
        from toma_fx.export.to_aoti.lower import lower

        options = {"max_autotune": self.max_autotune, **dict(self.inductor)}
        return lower(options, calls, build)

    @staticmethod
    def open(artifact: ArtifactFiles, device: torch.device, options: Mapping[str, Any]) -> Runtime:
        """Open a verified artifact; weights are mapped, and copied only to a GPU.

        Raises:
            ArtifactError: made with another version of torch, for another device or processor, or
                a package and weights that don't belong together. UnknownNameError: any option.
        """
        from torch import __version__

        from toma_fx.export.machine import check_machine
        from toma_fx.export.to_aoti.runtime import AOTIRuntime

        check_options("load() of an aoti artifact", options)
        check_machine(artifact.manifest, device, "torch", __version__)
        return AOTIRuntime(artifact, device)

"""What a target must do: lower programs to files, and open the files to run them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from toma_fx.errors import ConfigError, UnknownNameError, nearest

if TYPE_CHECKING:  # `toma-fx --help` reads the options of targets without torch
    import torch
    from torch import Tensor

    from toma_fx.export.building import Build
    from toma_fx.export.manifest import Device, ProgramSpec, TargetSpec
    from toma_fx.export.programs import Programs
    from toma_fx.export.reading import ArtifactFiles


@dataclass(frozen=True)
class Lowered:
    """What a target made of the programs.

    Attributes:
        target, device: for the manifest. programs: of each call, by kind of step. versions: of what
            it used.
    """

    target: TargetSpec
    device: Device
    programs: Sequence[Mapping[str, ProgramSpec]]
    versions: Mapping[str, str]


class Runtime(ABC):
    """The programs of an artifact, ready to run."""

    @abstractmethod
    def run(
        self, call: int, kind: str, inputs: Sequence[Tensor], kept: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """One step.

        Args:
            call: place of the call in the manifest. kind: of program. inputs: the model's own, in
                the order of the call, with the shapes and dtypes it says, on the artifact's
                device. kept: tensors that the program takes besides, by name.

        Returns:
            The model's outputs, and the kept tensors that the program gives, by name. They may live
            in memory that the next run writes to.
        """


def separate_inputs(inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> list[Tensor]:
    """Inputs of a run, contiguous and aligned, and none in memory that the run writes to."""
    places = {x.data_ptr() for x in outputs}
    placed = map(aligned, inputs)
    # an output of the last step may be an input of this one
    return [x.clone() if x.data_ptr() in places else x for x in placed]


def aligned(x: Tensor) -> Tensor:
    """A tensor, contiguous, that begins where compiled code and TensorRT let tensors begin."""
    x = x.contiguous()
    return x.clone() if x.storage_offset() * x.element_size() % ALIGNMENT else x


ALIGNMENT = 256
"""Bytes: what TensorRT asks for; Inductor's code for GPUs asks for less."""


def check_options(owner: str, options: Mapping[str, Any], known: Sequence[str] = ()) -> None:
    """Passes if every option is known.

    Args:
        owner: whose options they are. options: by name. known: names of all there are.

    Raises:
        UnknownNameError: names the first that is not known, and the nearest.
    """
    for name in options:
        if name not in known:
            raise UnknownNameError(
                f"{owner} has " + ("no such option" if known else "no options"),
                where="options",
                expected=", ".join(known) or "none",
                got=name,
                hint=nearest(name, known) if known else "",
            )


@dataclass(frozen=True)
class Target(ABC):
    """A kind of artifact. Its fields are its options.

    They are options of `toma-fx build`, too, which describes them by the docstring of the class.
    The module of a target imports no torch at its top; what lowers and opens is imported when it
    is used.
    """

    @abstractmethod
    def check_installed(self) -> None:
        """Raise, before anything is exported, if this machine lacks what the target needs.

        Raises:
            MissingPackageError: a package is not installed. BuildError: something else is missing.
        """

    one_call: ClassVar[str] = ""
    """Why an artifact of the target is for one call alone; "" if it may be for several."""

    def check_calls(self, count: int) -> None:
        """Raise, before a model is loaded, if an artifact can't be for so many calls.

        Raises:
            ConfigError: it is for one alone.
        """
        if count > 1 and self.one_call:
            raise ConfigError(
                "the target takes one call",
                where="inputs",
                expected=f"one call, one --size: {self.one_call}",
                got=f"{count} calls",
                hint="build an artifact for each of them",
            )

    @abstractmethod
    def check(self, programs: Programs) -> None:
        """Raise, before anything is made, if the programs of a call can't be lowered here.

        Raises:
            BuildError: an option, device or program that the target can't have.
        """

    @abstractmethod
    def lower(self, calls: Sequence[Programs], build: Build) -> Lowered:
        """Write the files of the artifact, in stages of `build`.

        Args:
            calls: programs of each call, all of one model. Their labels tell all programs apart.
        """

    @staticmethod
    @abstractmethod
    def open(artifact: ArtifactFiles, device: torch.device, options: Mapping[str, Any]) -> Runtime:
        """Open a verified artifact.

        Args:
            artifact: its files, open until this returns, and its manifest. Nothing else of its
                folder may be looked at. device: to run on. options: of `toma_fx.load`, such as
                ONNX Runtime's `providers`.

        Raises:
            MissingPackageError: a package is not installed. ArtifactError: not for this machine.
        """

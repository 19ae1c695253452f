"""Running an AOTInductor artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from toma_fx.compat.compilers import load_programs
from toma_fx.errors import ArtifactError
from toma_fx.export.reading import ArtifactFiles, reading
from toma_fx.export.targets import Runtime, aligned
from toma_fx.export.to_aoti.files import WEIGHTS, load_weights
from toma_fx.export.to_aoti.package import PACKAGE, check_package, write_package
from toma_fx.run.program_set import split_outputs


class AOTIRuntime(Runtime):
    """Compiled programs with their weights."""

    def __init__(self, artifact: ArtifactFiles, device: torch.device) -> None:
        """Map the weights, load the programs, and give each all its constants.

        Raises:
            ArtifactError: a program or constant is missing, or can't be loaded; or the programs
                have other inputs and outputs than the manifest says.
        """
        specs = {(i, kind): call.programs[kind] for i, kind, call in artifact.manifest.each_program}
        self._specs = specs
        weights, package = artifact.file(WEIGHTS), artifact.file(PACKAGE)
        with reading(weights):
            self._weights, self._aliases = load_weights(weights.path, device)
        entries = artifact.read_package(PACKAGE)
        check_package(entries, artifact.manifest)
        index = -1 if device.index is None else device.index
        with reading(package), TemporaryDirectory() as folder:
            # of the entries that were checked: archives can be read in more than one way
            write_package(Path(folder, PACKAGE), entries)
            runners = load_programs(Path(folder, PACKAGE), index)
            self._runners = {
                key: self._complete(runners, spec.entry) for key, spec in specs.items()
            }

    def run(
        self, call: int, kind: str, inputs: Sequence[Tensor], kept: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """One step. Programs read memory as their examples lay: contiguous."""
        spec = self._specs[call, kind]
        tensors = (*inputs, *(kept[name] for name in spec.takes))
        results = self._runners[call, kind].run([aligned(x) for x in tensors])
        return split_outputs(results, spec.gives)

    def _complete(self, runners: Mapping[str, Any], entry: str) -> Any:
        """The loader of a program that has been given all its constants."""
        if entry not in runners:
            raise _mismatched(PACKAGE, f"a program {entry}", ", ".join(sorted(runners)))
        needed = runners[entry].get_constant_fqns()
        names = {name: self._aliases.get(f"{entry}/{name}", name) for name in needed}
        lacking = [name for name, stored in names.items() if stored not in self._weights]
        if lacking:
            raise _mismatched(WEIGHTS, f"constants of {entry}", f"none for {lacking[:3]}")
        # the programs keep pointers: this object owns the tensors
        constants = {name: self._weights[stored] for name, stored in names.items()}
        runners[entry].load_constants(constants, check_full_update=True, user_managed=True)
        return runners[entry].loader


def _mismatched(file: str, expected: str, got: str) -> ArtifactError:
    return ArtifactError(
        "the package and the weights don't belong together",
        where=file,
        expected=expected,
        got=got,
        hint="build the artifact anew",
    )

"""A target that runs the exported programs in this process: the frame without any compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toma_fx.export.building import Build
from toma_fx.export.denoiser import ArtifactDenoiser
from toma_fx.export.manifest import Device, ProgramSpec, TargetSpec
from toma_fx.export.programs import Programs
from toma_fx.export.reading import ArtifactFiles, open_artifact
from toma_fx.export.targets import Lowered, Runtime, Target


class InProcess(Target):
    """Writes a line for each program and runs the exported programs; `error` scales outputs."""

    def __init__(self, error: float = 0.0) -> None:
        self.error, self.made = error, list[str]()
        self.fail_at = ""

    def __repr__(self) -> str:
        return "InProcess"

    def check_installed(self) -> None:
        pass

    def check(self, programs: Programs) -> None:
        self.programs = programs

    def lower(self, programs: Programs, build: Build) -> Lowered:
        specs = {}
        for kind, program in programs.items():
            file = f"{kind}.txt"

            def write(folder: Path, file: str = file) -> None:
                if file == self.fail_at:
                    raise KeyboardInterrupt
                self.made.append(file)
                (folder / file).write_text(file)

            build.stage(kind, write, file)
            takes, gives, instead = program.takes, program.gives, program.instead
            specs[kind] = ProgramSpec(file, kind, takes, gives, instead)
        return Lowered(TargetSpec("in-process", {}), Device("cpu", "", ""), specs, {})

    def open(  # type: ignore[override]  # of an instance: it knows the programs
        self, artifact: ArtifactFiles, device: torch.device, options: Mapping[str, Any]
    ) -> Runtime:
        target = self

        class Run(Runtime):
            def run(self, kind: Any, inputs: Any, kept: Any) -> Any:
                return target.step(kind, inputs, kept)

        return Run()

    def step(self, kind: Any, inputs: Sequence[Tensor], kept: Mapping[str, Tensor]) -> Any:
        outputs, gives = self.programs.run(kind, inputs, kept)
        return [x * (1 + self.error) for x in outputs], gives


def opened(target: InProcess, folder: Path) -> ArtifactDenoiser:
    device = torch.device("cpu")
    with open_artifact(folder) as artifact:
        runtime = target.open(artifact, device, {})
    return ArtifactDenoiser(artifact.manifest, runtime, device)

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
        pass

    def lower(self, calls: Sequence[Programs], build: Build) -> Lowered:
        self.calls, self.programs = calls, calls[0]
        specs: list[dict[str, ProgramSpec]] = [{} for _ in calls]
        every = [(i, kind) for i, programs in enumerate(calls) for kind in programs]
        for i, kind in every:
            label, program = calls[i].label(kind), calls[i][kind]
            file = f"{label}.txt"

            def write(folder: Path, file: str = file) -> None:
                if file == self.fail_at:
                    raise KeyboardInterrupt
                self.made.append(file)
                (folder / file).write_text(file)

            build.stage(label, write, file)
            takes, gives, instead = program.takes, program.gives, program.instead
            specs[i][kind] = ProgramSpec(file, label, takes, gives, instead)
        return Lowered(TargetSpec("in-process", {}), Device("cpu", "", ""), specs, {})

    def open(  # type: ignore[override]  # of an instance: it knows the programs
        self, artifact: ArtifactFiles, device: torch.device, options: Mapping[str, Any]
    ) -> Runtime:
        target = self

        class Run(Runtime):
            def run(self, call: int, kind: Any, inputs: Any, kept: Any) -> Any:
                target.programs = target.calls[call]
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

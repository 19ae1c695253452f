"""Triton Inference Server: an artifact that is also the folder of a model in its repository.

    config.pbtxt     inputs and outputs of a step, and how steps are scheduled
    1/model.py       for Triton's Python back end: `toma_fx.serving.triton` runs the steps
    ...              the files of another target, which computes

A generation is a *sequence* of Triton: its client runs the scheduler and sends step after step with
one correlation ID, the first marked as start, the last as end. Triton sends all of a sequence to
one instance, which keeps its `State` between them. An instance has several sequences at a time.

The folder is an artifact like others: `toma_fx.load` opens it, `toma-fx verify` checks it, and the
instances load it so themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from toma_fx.errors import ArtifactError, BuildError
from toma_fx.export.manifest import TargetSpec, TensorSpec
from toma_fx.export.registry import make_target, target_class
from toma_fx.export.targets import Lowered, Runtime, Target
from toma_fx.export.to_triton.config import CONFIG, CONTROLS, DTYPES, STEPS, config_text
from toma_fx.methods.checks import check_choice, check_count

if TYPE_CHECKING:
    import torch

    from toma_fx.export.building import Build
    from toma_fx.export.programs import Programs
    from toma_fx.export.reading import ArtifactFiles

Engine = Literal["aoti", "onnx", "tensorrt"]
MODEL = "1/model.py"
CODE = '''"""Steps of the artifact in the folder above this one, in Triton's Python back end."""

from toma_fx.serving.triton import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True)
class TritonTarget(Target):
    """A model folder of Triton Inference Server, with the programs of another target.

    Attributes:
        engine: the target that makes the programs.
        sequences: generations that an instance has under way at a time; others wait.
        instances: processes, each with the model; of a GPU, on each one.
        idle_seconds: that a client may let pass between two steps before Triton gives its place
            away.
        options: of the engine, as pairs of name and value.

    Raises:
        UnknownNameError: no such engine, or option of it. ConfigError: a number out of range.
    """

    one_call: ClassVar[str] = "config.pbtxt has one shape for each tensor"

    engine: Engine = "aoti"
    sequences: int = 4
    instances: int = 1
    idle_seconds: int = 60
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, get_args(Engine))
        for name in ("sequences", "instances", "idle_seconds"):
            check_count(name, getattr(self, name))
        _ = self.inner

    @property
    def inner(self) -> Target:
        """The target that makes the programs."""
        return make_target(self.engine, dict(self.options))

    def check_installed(self) -> None:
        """Raise what the engine lacks here; Triton itself is not needed for a build."""
        self.inner.check_installed()

    def check(self, programs: Programs) -> None:
        """Raise if the engine can't lower the programs, or Triton can't name or hold a tensor.

        Raises:
            BuildError: as of the engine; an input with the name of a control of Triton's; a dtype
                that Triton does not have.
        """
        self.inner.check(programs)
        for name in (*CONTROLS, STEPS):
            if name in programs.inputs:
                raise BuildError(
                    "an input has the name of one that tells Triton about sequences",
                    where=name,
                    expected=f"inputs not named {', '.join((*CONTROLS, STEPS))}",
                    got=name,
                    hint="rename the argument of the model",
                )
        for name, x in {**programs.inputs, **programs.outputs}.items():
            if (dtype := TensorSpec.of(name, x).dtype) not in DTYPES:
                raise BuildError(
                    "Triton has no such dtype",
                    where=name,
                    expected=", ".join(DTYPES),
                    got=dtype,
                )

    def lower(self, calls: Sequence[Programs], build: Build) -> Lowered:
        """Write the files of the engine, then Triton's."""
        lowered = self.inner.lower(calls, build)
        (programs,) = calls
        text = config_text(
            [TensorSpec.of(name, x) for name, x in programs.inputs.items()],
            [TensorSpec.of(name, x) for name, x in programs.outputs.items()],
            device=lowered.device.type,
            sequences=self.sequences,
            instances=self.instances,
            idle_seconds=self.idle_seconds,
        )

        def write(folder: Path) -> None:
            (folder / MODEL).parent.mkdir(exist_ok=True)
            (folder / MODEL).write_text(CODE, encoding="utf-8")
            (folder / CONFIG).write_text(text, encoding="utf-8")

        build.stage("triton configuration", write, CONFIG, MODEL)
        options = {"engine": self.engine, **lowered.target.options}
        return replace(lowered, target=TargetSpec("triton", options))

    @staticmethod
    def open(artifact: ArtifactFiles, device: torch.device, options: Mapping[str, Any]) -> Runtime:
        """Open a verified artifact as its engine does.

        Raises:
            ArtifactError: it names no engine. As of the engine.
        """
        engine = artifact.manifest.target.options.get("engine", "")
        if engine not in get_args(Engine):
            raise ArtifactError(
                "the artifact has an unknown engine",
                where="target.options.engine",
                expected=", ".join(get_args(Engine)),
                got=repr(engine),
                hint="read it with the toma_fx that made it",
            )
        return target_class(engine).open(artifact, device, options)

"""`manifest.json`: what an artifact holds, what it was made for, and what must be true of it.

Plain data, checked when read (`reading`, `checks`): nothing else of an artifact is opened before
its manifest has the right version and form. `manifest.schema.json` beside this file is
the published schema, which tools/write_schema.py writes from the classes here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from toma_fx.methods.cached_steps import Length
from toma_fx.run.schedule import Schedule, kinds_of

if TYPE_CHECKING:  # `toma-fx info` reads manifests without torch
    from torch import Tensor

    from toma_fx.capture.grids import Raster

VERSION = 7
"""Version of the form of the manifest; readers refuse others."""
SCHEMA = f"urn:toma-fx:manifest:{VERSION}"
"""Identifier of the schema that `manifest.schema.json` beside this file holds."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a program takes or gives.

    Attributes:
        name: its name in the program. shape: static. dtype: as "float32".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, name: str, x: Tensor) -> Self:
        """That of a tensor, which may be a fake one."""
        return cls(name, tuple(x.shape), str(x.dtype).removeprefix("torch."))


RasterSpec = tuple[tuple[int, ...], int, int, int]


def raster_spec(raster: Raster | None) -> RasterSpec | None:
    """A raster as plain data: (heights, width, tokens after, tokens before)."""
    if raster is None:
        return None
    return raster.heights, raster.width, raster.rest, raster.before


@dataclass(frozen=True)
class ArtifactInput:
    """An input of the model.

    Attributes:
        path: keyword, and keys below it where arguments are nested. tensor: of the program; its
            name is the path joined by "_".
        raster: what position ids must enumerate: (heights of images, width, tokens after them,
            tokens before them); none for other inputs.
    """

    path: tuple[str, ...]
    tensor: TensorSpec
    raster: RasterSpec | None = None


@dataclass(frozen=True)
class Constant:
    """An argument whose value is part of the programs; calls with another are refused."""

    path: tuple[str, ...]
    value: bool | int | float | str | None


@dataclass(frozen=True)
class Structure:
    """What a call returns: "tensor", "tuple", "list" or an output class's name, and its fields."""

    kind: str
    fields: tuple[str, ...]


@dataclass(frozen=True)
class ProgramSpec:
    """One program.

    Attributes:
        file: the file that holds it. entry: its name inside, where a file holds several.
        takes, gives: names of the kept tensors that follow the model's own inputs and outputs, in
            this order. instead: the kind that runs while one that it takes is not kept.
    """

    file: str
    entry: str
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    instead: str


@dataclass(frozen=True)
class Parity:
    """One step of the comparison with the in-process programs.

    Attributes:
        kind: of the program. relative: largest difference over the largest value of the outputs.
        tolerance: what it may be.
        alike: share of the tokens that the patterns it made treat as the process's do; 1 if none.
    """

    kind: str
    relative: float
    tolerance: float
    alike: float


@dataclass(frozen=True)
class FileSpec:
    """A file of the artifact.

    Attributes:
        size: in bytes. sha256: of its content.
        entries: of a package (.pt2), which is a zip archive: sizes by name; none for other files.
    """

    size: int
    sha256: str
    entries: Mapping[str, int] | None = None


@dataclass(frozen=True)
class TargetSpec:
    """What runs the programs.

    Attributes:
        name: "aoti", "onnx", "tensorrt" or "triton". options: those of the target, as text.
    """

    name: str
    options: Mapping[str, str]


@dataclass(frozen=True)
class Device:
    """What the programs were built for.

    Attributes:
        type: "cpu" or "cuda". name: of the processor. arch: machine or compute capability that
            compiled code needs; "" if any will do.
    """

    type: str
    name: str
    arch: str


@dataclass(frozen=True)
class CallSpec:
    """A call that the artifact is for: its shapes, dtypes and constants, and its programs.

    Attributes:
        name: letters and digits, as "832x1216"; no other call of the artifact has it.
        plan: what merges, as `MergePlan.to_dict()` gives it. schedule: which program runs when.
        inputs, constants, outputs, structure: what a call takes and gives.
        timestep: path of the input that tells how far a generation is; empty if none does.
        kept: every tensor that is kept from step to step. older: by kept tensor, where its value
            goes when a program gives it anew. programs: by kind of step.
        parity: the check that the build ended with.
    """

    name: str
    plan: Mapping[str, Any]
    schedule: Schedule
    inputs: tuple[ArtifactInput, ...]
    timestep: tuple[str, ...]
    constants: tuple[Constant, ...]
    outputs: tuple[TensorSpec, ...]
    structure: Structure
    kept: tuple[TensorSpec, ...]
    older: Mapping[str, str]
    programs: Mapping[str, ProgramSpec]
    parity: tuple[Parity, ...]

    @property
    def signature(self) -> Hashable:
        """What calls are told apart by."""
        return frozenset(self.inputs), frozenset(self.constants)

    def kinds(self, steps: int, length: Length | None = None) -> list[str]:
        """Kinds of the programs of the first steps of a generation.

        Args:
            steps: how many. length: of the generation; these are all of it if not given.

        Raises:
            GenerationError: the schedule is for another length.
        """
        return kinds_of(self, self.schedule, Length(steps) if length is None else length, steps)

    def takes(self, kind: str) -> tuple[str, ...]:
        """Names of the kept tensors that a kind of program takes."""
        return self.programs[kind].takes

    def gives(self, kind: str) -> tuple[str, ...]:
        """Names of the kept tensors that a kind of program gives."""
        return self.programs[kind].gives

    def instead(self, kind: str) -> str:
        """The kind that runs while something that `kind` takes is not kept."""
        return self.programs[kind].instead

    def inputs_of(self, kind: str) -> list[TensorSpec]:
        """What a kind of program takes: the model's inputs, then kept tensors."""
        kept = {spec.name: spec for spec in self.kept}
        return [*(spec.tensor for spec in self.inputs), *(kept[name] for name in self.takes(kind))]

    def outputs_of(self, kind: str) -> list[TensorSpec]:
        """What a kind of program gives: the model's outputs, then kept tensors."""
        kept = {spec.name: spec for spec in self.kept}
        return [*self.outputs, *(kept[name] for name in self.gives(kind))]


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says; see the attributes' classes.

    Attributes:
        version: of this form. target, device: what runs the programs, and on what.
        model: class of the denoiser. model_config: its configuration. dtype: of its weights.
        license: note on the model's license, from whoever built the artifact.
        parameters: of a call, in order, for arguments without keywords.
        calls: those that the artifact is for, at least one, no two of them alike.
        versions: of toma_fx, torch, and what the target is made with.
        files: by path inside the folder.
    """

    version: int
    target: TargetSpec
    device: Device
    model: str
    model_config: Mapping[str, Any]
    dtype: str
    license: str
    parameters: tuple[str, ...]
    calls: tuple[CallSpec, ...]
    versions: Mapping[str, str]
    files: Mapping[str, FileSpec]

    @property
    def tensors(self) -> Iterator[TensorSpec]:
        """Inputs, outputs and kept tensors of every call."""
        for call in self.calls:
            yield from (spec.tensor for spec in call.inputs)
            yield from (*call.outputs, *call.kept)

    @property
    def each_program(self) -> Iterator[tuple[int, str, CallSpec]]:
        """Every program: (place of its call, its kind, its call)."""
        return ((i, kind, call) for i, call in enumerate(self.calls) for kind in call.programs)

    @property
    def digest(self) -> str:
        """SHA-256 of all it says, and so of the files."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """As JSON text: the only one that readers take."""
        content = {"$schema": SCHEMA, **dataclasses.asdict(self)}
        return json.dumps(content, indent=2, allow_nan=False) + "\n"


def describe_calls(calls: Sequence[CallSpec]) -> dict[str, str]:
    """What tells calls apart, by their names: shapes of as few inputs as do, else what else does.

    Of a single call nothing.
    """
    features = [_features(call) for call in calls]
    told: list[tuple[str, ...]] = [() for _ in calls]
    for key in sorted(dict.fromkeys(key for x in features for key in x), key=lambda key: key[0]):
        longer = [(*words, each.get(key, "")) for words, each in zip(told, features, strict=True)]
        if len({*longer}) > len({*told}):
            told = longer
    texts = (", ".join(filter(None, words)) for words in told)
    return {call.name: text for call, text in zip(calls, texts, strict=True)}


def _features(call: CallSpec) -> dict[tuple[int, tuple[str, ...]], str]:
    """What makes up the signature of a call in words, by kind and path: shapes come first."""
    found = {(0, x.path): f"{x.tensor.name} {list(x.tensor.shape)}" for x in call.inputs}
    found |= {(1, x.path): f"{x.tensor.name} of {_grid(x.raster)}" for x in call.inputs}
    found |= {(2, x.path): f"{x.tensor.name} {x.tensor.dtype}" for x in call.inputs}
    return found | {(3, x.path): f"{'_'.join(x.path)} {x.value!r}" for x in call.constants}


def _grid(raster: RasterSpec | None) -> str:
    """Rows and columns of the images whose tokens position ids enumerate."""
    return "any grid" if raster is None else " and ".join(f"{h}x{raster[1]}" for h in raster[0])

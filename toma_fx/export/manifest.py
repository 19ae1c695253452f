"""`manifest.json`: what an artifact holds, what it was made for, and what must be true of it.

Plain data, checked when read: nothing else of an artifact is opened before its manifest has the
right version and form and every file the right checksum. `manifest.schema.json` beside this file is
the published schema, which tools/write_schema.py writes from the classes here.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from toma_fx.axis import Raster
from toma_fx.config import MethodConfig
from toma_fx.errors import ArtifactError
from toma_fx.methods.base import Renewal
from toma_fx.state import Call, call_at

VERSION = 1
"""Version of the form of the manifest; readers refuse others."""
SCHEMA = f"urn:toma-fx:manifest:{VERSION}"
"""Identifier of the schema that `manifest.schema.json` beside this file holds."""
LONGEST = 1000
"""Steps of a generation that a schedule is written down for, and that are exported."""
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


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
class InputSpec:
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
        patterns_in, patterns_out: names of the patterns that follow the model's own inputs and
            outputs, in this order.
    """

    file: str
    entry: str
    patterns_in: tuple[str, ...]
    patterns_out: tuple[str, ...]


@dataclass(frozen=True)
class Schedule:
    """Which program runs when.

    Attributes:
        first_step, last_step: the steps that merge, from 0; others run "plain".
        patterned: whether there are patterns at all; if not, merged steps run "reuse".
        begin: programs of the first merged steps. cycle: what follows them, over and over. A step
            without a pattern refreshes in any case.
    """

    first_step: int
    last_step: int | None
    patterned: bool
    begin: tuple[Renewal, ...]
    cycle: tuple[Renewal, ...]

    @classmethod
    def of(cls, config: MethodConfig) -> Self:
        """The schedule of a configuration."""
        calls: list[Renewal] = ["reuse"]
        if config.patterned:
            calls = [config.renewal(i) for i in range(LONGEST)]
        begin, cycle = _periodic(calls)
        return cls(config.first_step, config.last_step, config.patterned, begin, cycle)

    @classmethod
    def plain(cls) -> Self:
        """That of a model of which nothing merges: every step comes after the last that would."""
        return cls(0, -1, False, (), ("reuse",))

    def call(self, step: int, has_pattern: bool) -> Call:
        """The program of a step (from 0): the same as `state.call_at` of the configuration."""
        return call_at(self, step, has_pattern)

    def renewal(self, since: int) -> Renewal:
        """What a step does with the pattern, `since` steps after the first that merges."""
        if since < len(self.begin):
            return self.begin[since]
        return self.cycle[(since - len(self.begin)) % len(self.cycle)]


def _periodic(calls: Sequence[Renewal]) -> tuple[tuple[Renewal, ...], tuple[Renewal, ...]]:
    """The shortest (begin, cycle) that continue to give `calls`."""
    for period in range(1, len(calls) // 2):
        start = len(calls)
        while start > period and calls[start - 1] == calls[start - 1 - period]:
            start -= 1
        start -= period
        if start + 2 * period <= len(calls) and start <= len(calls) // 2:
            return tuple(calls[:start]), tuple(calls[start : start + period])
    return tuple(calls[:-1]), (calls[-1],)


@dataclass(frozen=True)
class Parity:
    """One step of the comparison with the in-process programs.

    Attributes:
        call: which program. relative: largest difference over the largest value of the outputs.
        tolerance: what it may be.
        alike: share of the tokens that the patterns it made treat as the process's do; 1 if none.
    """

    call: str
    relative: float
    tolerance: float
    alike: float


@dataclass(frozen=True)
class FileSpec:
    """A file of the artifact: its size in bytes and SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TargetSpec:
    """What runs the programs.

    Attributes:
        name: "aoti", "onnx" or "tensorrt". form: of ONNX, "cached" or "stateless"; else "".
        opset: of ONNX; else None. options: others, as text.
    """

    name: str
    form: str
    opset: int | None
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
class Manifest:
    """What `manifest.json` says; see the attributes' classes.

    Attributes:
        version: of this form. target, device: what runs the programs, and on what.
        model: class of the denoiser. model_config: its configuration. dtype: of its weights.
        licence: note on the model's licence, from whoever built the artifact.
        plan: what merges, as `MergePlan.to_json()` gives it. schedule: which program runs when.
        parameters: of a call, in order, for arguments without keywords.
        inputs, constants, outputs, structure: what a call takes and gives.
        patterns: every pattern tensor. programs: by kind of step.
        versions: of toma_fx, torch, and what the target is made with.
        parity: the check that the build ended with. files: by path inside the folder.
    """

    version: int
    target: TargetSpec
    device: Device
    model: str
    model_config: Mapping[str, Any]
    dtype: str
    licence: str
    plan: Mapping[str, Any]
    schedule: Schedule
    parameters: tuple[str, ...]
    inputs: tuple[InputSpec, ...]
    constants: tuple[Constant, ...]
    outputs: tuple[TensorSpec, ...]
    structure: Structure
    patterns: tuple[TensorSpec, ...]
    programs: Mapping[str, ProgramSpec]
    versions: Mapping[str, str]
    parity: tuple[Parity, ...]
    files: Mapping[str, FileSpec]

    def calls(self, steps: int) -> list[Call]:
        """Programs of the first steps of a generation."""
        first, keeps = self.schedule.first_step, self.target.form != "stateless"
        return [self.schedule.call(step, keeps and step > first) for step in range(steps)]

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps({"$schema": SCHEMA, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def of(cls, text: str, where: str) -> Self:
        """From JSON text.

        Raises:
            ArtifactError: not JSON, another version, or not of this form.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise _broken(where, "JSON", str(error)) from error
        if not isinstance(data, dict):
            raise _broken(where, "a JSON object", type(data).__name__)
        if data.get("version") != VERSION:
            raise ArtifactError(
                "the artifact has another version",
                where=where,
                expected=f"manifest version {VERSION}",
                got=repr(data.get("version")),
                hint="build it anew, or read it with the toma_fx that made it",
            )
        data.pop("$schema", None)
        manifest: Self = _decoded(cls, data, where)
        for name in manifest.files:
            _check_name(name, where)
        for program in manifest.programs.values():
            if program.file not in manifest.files:
                raise _broken(where, "programs in files that are listed", program.file)
        return manifest


def _check_name(name: str, where: str) -> None:
    """Refuse names that lead out of the folder."""
    parts = PurePosixPath(name).parts
    if not parts or "/".join(parts) != name or not all(_FILE.fullmatch(part) for part in parts):
        raise ArtifactError(
            "a file of the manifest lies outside its folder",
            where=where,
            expected="plain names of letters, digits, '.', '_', '-', below the folder",
            got=repr(name),
            hint="this artifact was not made by toma_fx: don't load it",
        )


def _decoded(kind: Any, data: Any, where: str) -> Any:
    """JSON data as a value of the type `kind`, checked throughout."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if origin is Literal:
        if data in arguments:
            return data
        raise _broken(where, " or ".join(map(repr, arguments)), repr(data)[:80])
    if dataclasses.is_dataclass(kind):
        return _object(kind, data, where)
    if origin in (Union, UnionType):
        return _one_of(arguments, data, where)
    if origin is tuple and isinstance(data, (list, tuple)):
        if arguments[-1:] == (Ellipsis,):
            arguments = arguments[:1] * len(data)
        if len(arguments) == len(data):
            pairs = enumerate(zip(arguments, data, strict=True))
            return tuple(_decoded(a, x, f"{where}[{i}]") for i, (a, x) in pairs)
    elif origin is collections.abc.Mapping and isinstance(data, dict):
        return {k: _decoded(arguments[1], v, f"{where}.{k}") for k, v in data.items()}
    elif kind is float and type(data) in (int, float):
        return float(data)
    elif origin is None and type(data) is kind:
        return data
    raise _broken(where, str(kind), repr(data)[:80])


def _one_of(kinds: Sequence[Any], data: Any, where: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    for kind in kinds:
        if kind is not type(None):
            try:
                return _decoded(kind, data, where)
            except ArtifactError:
                continue
    raise _broken(where, " or ".join(map(str, kinds)), repr(data)[:80])


def _object(kind: Any, data: Any, where: str) -> Any:
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if not isinstance(data, dict) or set(data) != set(fields):
        got = sorted(data) if isinstance(data, dict) else repr(data)[:80]
        raise _broken(where, f"the fields {sorted(fields)}", str(got))
    return kind(**{name: _decoded(hints[name], data[name], f"{where}.{name}") for name in fields})


def _broken(where: str, expected: str, got: str) -> ArtifactError:
    return ArtifactError(
        "the manifest is not of the form that its version has",
        where=where,
        expected=expected,
        got=got,
        hint="the artifact is damaged or was edited: build it anew",
    )

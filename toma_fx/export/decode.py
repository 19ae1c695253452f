"""JSON values as dataclasses, checked."""

from __future__ import annotations

import collections.abc
import dataclasses
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from toma_fx.errors import ArtifactError

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_file_name(name: str, where: str) -> None:
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


def decode(kind: Any, data: Any, where: str) -> Any:
    """JSON data as a value of the type `kind`, checked throughout."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if origin is Literal:
        if data in arguments:
            return data
        raise malformed(where, " or ".join(map(repr, arguments)), repr(data)[:80])
    if dataclasses.is_dataclass(kind):
        return _object(kind, data, where)
    if origin in (Union, UnionType):
        return _one_of(arguments, data, where)
    if origin is tuple and isinstance(data, (list, tuple)):
        if arguments[-1:] == (Ellipsis,):
            arguments = arguments[:1] * len(data)
        if len(arguments) == len(data):
            pairs = enumerate(zip(arguments, data, strict=True))
            return tuple(decode(a, x, f"{where}[{i}]") for i, (a, x) in pairs)
    elif origin is collections.abc.Mapping and isinstance(data, dict):
        return {k: decode(arguments[1], v, f"{where}.{k}") for k, v in data.items()}
    elif kind is float and type(data) in (int, float):
        return float(data)
    elif origin is None and type(data) is kind:
        return data
    raise malformed(where, str(kind), repr(data)[:80])


def _one_of(kinds: Sequence[Any], data: Any, where: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    for kind in kinds:
        if kind is not type(None):
            try:
                return decode(kind, data, where)
            except ArtifactError:
                continue
    raise malformed(where, " or ".join(map(str, kinds)), repr(data)[:80])


def _object(kind: Any, data: Any, where: str) -> Any:
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if not isinstance(data, dict) or set(data) != set(fields):
        got = sorted(data) if isinstance(data, dict) else repr(data)[:80]
        raise malformed(where, f"the fields {sorted(fields)}", str(got))
    return kind(**{name: decode(hints[name], data[name], f"{where}.{name}") for name in fields})


def malformed(where: str, expected: str, got: str) -> ArtifactError:
    """The error for a manifest that is not of the form that its version has."""
    return ArtifactError(
        "the manifest is not of the form that its version has",
        where=where,
        expected=expected,
        got=got,
        hint="the artifact is damaged or was edited: build it anew",
    )

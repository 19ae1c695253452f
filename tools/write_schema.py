"""Writes toma_fx/export/manifest.schema.json from the classes of toma_fx/export/manifest.py.

    python tools/write_schema.py

Run it when the manifest changes; a change that old readers can't take also needs another VERSION.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import json
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from toma_fx.export import manifest

PATH = Path(manifest.__file__).with_name("manifest.schema.json")
PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of `manifest.json`."""
    defined: dict[str, Any] = {}
    top = _object(manifest.Manifest, defined)
    top["properties"] = {
        "$schema": {"const": manifest.SCHEMA},
        **top["properties"],
        "version": {"const": manifest.VERSION},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": manifest.SCHEMA,
        "title": "manifest.json of a toma_fx artifact",
        **top,
        "$defs": dict(sorted(defined.items())),
    }


def _object(kind: Any, defined: dict[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    return {
        "description": inspect.cleandoc(kind.__doc__),
        "type": "object",
        "properties": {name: _of(hints[name], defined) for name in names},
        "required": names,
        "additionalProperties": False,
    }


def _of(kind: Any, defined: dict[str, Any]) -> dict[str, Any]:
    """The schema of a type, as `manifest` decodes it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if kind in PLAIN:
        return {"type": PLAIN[kind]}
    if dataclasses.is_dataclass(kind):
        name = kind.__name__
        if name not in defined:
            defined[name] = {}  # classes may refer to themselves
            defined[name] = _object(kind, defined)
        return {"$ref": f"#/$defs/{name}"}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, UnionType):
        return {"anyOf": [_of(argument, defined) for argument in arguments]}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": _of(arguments[0], defined)}
    if origin is tuple:
        size = len(arguments)
        items = [_of(argument, defined) for argument in arguments]
        return {"type": "array", "prefixItems": items, "minItems": size, "maxItems": size}
    if origin is collections.abc.Mapping:
        return {"type": "object", "additionalProperties": _of(arguments[1], defined)}
    raise TypeError(f"no schema for {kind}")


def text() -> str:
    """The file's content."""
    return json.dumps(schema(), indent=2) + "\n"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")

"""`FIELD=VALUE` as the command line takes it. Nothing here imports torch."""

from __future__ import annotations

import ast
from typing import Any

from toma_fx.errors import ConfigError


def parse_field(text: str, where: str) -> tuple[str, Any]:
    """`ratio=0.5` as a name and a Python value (plain words are strings).

    Raises:
        ConfigError: there is no "=".
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError("not a setting", where=where, expected="FIELD=VALUE", got=text)
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def split_fields(text: str) -> list[str]:
    """`a=1,b=(2,3)` as its parts; commas in brackets and quotes part nothing."""
    parts, depth, quote, part = [], 0, "", ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        else:
            depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth and not quote:
            parts.append(part)
            part = ""
        else:
            part += char
    return [p for p in [*parts, part] if p]

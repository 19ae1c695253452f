"""Options of `toma-fx build` that the targets define, by their fields."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

from toma_fx.errors import ConfigError
from toma_fx.export.registry import TARGETS, target_class


def _fields() -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """(target, field, type) of every option."""
    for target in TARGETS:
        kind = target_class(target)
        types = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if "help" in field.metadata:
                yield target, field, types[field.name]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every target to a parser; those not given are None."""
    for target, field, kind in _fields():
        form: dict[str, Any] = {"type": next(iter(get_args(kind)), kind)}
        if kind is bool:
            form = {"action": "store_true"}
        elif get_origin(kind) is Literal:
            form = {"choices": get_args(kind)}
        text = f"of {target}: {field.metadata['help']} (default {field.default})"
        parser.add_argument(_flag(field.name), default=None, help=text, **form)


def target_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the chosen target that were given.

    Raises:
        ConfigError: one of another target.
    """
    options = {}
    for target, field, _ in _fields():
        value = getattr(args, field.name)
        if value is None:
            continue
        if target != args.target:
            raise ConfigError(
                "an option of another target",
                where=_flag(field.name),
                expected=f"--target {target}",
                got=f"--target {args.target}",
            )
        options[field.name] = value
    return options

"""Checks of options that several methods share."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from toma_fx.errors import ConfigError, UnknownNameError, nearest

LARGEST = 3.4028234663852886e38
"""The largest number in float32, in which patterns are computed."""
FROZEN = frozenset({"overrides", "phases"})
"""Fields that are checked where they are made tuples, after the others."""


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless the option `name` has one of its `choices`.

    Raises:
        UnknownNameError: with the nearest choices.
    """
    if value not in choices:
        raise UnknownNameError(
            f"unknown value {value!r} of {name}",
            where=name,
            expected=" or ".join(choices),
            got=repr(value),
            hint=nearest(str(value), choices),
        )


def with_tuples(value: Any) -> Any:
    """A JSON value with tuples instead of lists."""
    if isinstance(value, list):
        return tuple(map(with_tuples, value))
    if isinstance(value, dict):
        return {name: with_tuples(inner) for name, inner in value.items()}
    return value


def check_switch(name: str, value: Any, where: str) -> None:
    """Raise unless a value is True or False.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(value, bool):
        raise ConfigError(
            f"{name} is out of range", where=where, expected="True or False", got=repr(value)
        )


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is an int, no bool, of at least `least`."""
    return type(value) is int and value >= least


def check_count(name: str, value: Any, where: str = "") -> None:
    """Raise unless a value is an int, no bool, of at least 1.

    Raises:
        ConfigError: it is something else.
    """
    if not is_count(value):
        raise ConfigError(
            f"{name} is out of range",
            where=where or name,
            expected="a whole number of at least 1",
            got=repr(value),
        )


def is_size(value: Any) -> bool:
    """Whether a value is (height, width) or (frames, height, width) of at least 1 each."""
    return isinstance(value, tuple) and len(value) in (2, 3) and all(map(is_count, value))


# -- by annotation --------------------------------------------------------------------------------


def freeze_sequences(config: Any, *names: str) -> None:
    """Make tuples of fields that are lists, and of those in `names` that are a word or a set."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in names and isinstance(value, str):
            object.__setattr__(config, field.name, (value,))
        elif isinstance(value, (list, set, frozenset) if field.name in names else list):
            object.__setattr__(config, field.name, tuple(value))


def check_fields(config: Any, check: Callable[[], None], prefix: str = "") -> None:
    """Run a configuration's own `check`, and check every field against its annotation.

    What `check` says of a field comes first, since it knows more about it; where it stumbles over
    a value of another type, the annotation says what is wrong.

    Raises:
        ConfigError: a field of another type than annotated, a number that is not finite in float32
            or an int64. Others: as `check`.
    """
    misfit = _find_misfit(config, prefix)
    try:
        check()
    except Exception as error:
        if misfit is None or isinstance(error, ConfigError):
            raise
        raise misfit from error
    if misfit is not None:
        raise misfit


def _find_misfit(config: Any, prefix: str) -> ConfigError | None:
    hints = _annotations(config.__class__)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in FROZEN and not fits(value, hints.get(field.name, Any)):
            return ConfigError(
                f"{field.name} is of another kind, or out of range",
                where=f"{prefix}{field.name}",
                expected=f"{field.type}, numbers finite in float32 and whole ones in int64",
                got=shorten(value),
            )
    return None


@cache
def _annotations(cls: type) -> Mapping[str, Any]:
    """Annotations of a class and its bases; without those of a class that names what is not there
    at run time."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        try:
            found |= inspect.get_annotations(base, eval_str=True)
        except Exception:  # an annotation may be any text
            found |= dict.fromkeys(inspect.get_annotations(base), Any)
    return found


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says; a list counts as a tuple, an int as a float, and
    a bool is no number. What the annotations of options do not use is not checked."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint in (None, NoneType):
        return value is None
    if hint is float:
        return is_number(value) and abs(value) <= LARGEST
    if hint is int:
        return type(value) is int and -(2**63) <= value < 2**63
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in args)
    if origin in (Union, UnionType):
        return any(fits(value, choice) for choice in args)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        kinds = args[:1] * len(value) if args[-1] is ... else args
        return len(kinds) == len(value) and all(map(fits, value, kinds))
    if origin is Mapping:
        key, item = args
        return isinstance(value, Mapping) and all(
            fits(k, key) and fits(v, item) for k, v in value.items()
        )
    return not isinstance(hint, type) or isinstance(value, hint)


def shorten(value: Any) -> str:
    """A value as text; a number of hundreds of digits by its length."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print more than 4300 digits
        return type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."

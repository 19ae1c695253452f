"""Checks of options that several methods share."""

from __future__ import annotations

from typing import Any

from toma_fx.errors import UnknownNameError, nearest


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


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is an int, no bool, of at least `least`."""
    return type(value) is int and value >= least


def is_size(value: Any) -> bool:
    """Whether a value is (height, width) or (frames, height, width) of at least 1 each."""
    return isinstance(value, tuple) and len(value) in (2, 3) and all(map(is_count, value))

"""Checks of options that several methods share."""

from __future__ import annotations

from typing import Any

from toma_fx.errors import UnknownNameError, nearest


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`.

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


def whole_sides(sides: Any) -> bool:
    """Whether every side is a whole number of at least 1."""
    return all(type(side) is int and side >= 1 for side in sides)

"""Configurations that change over the steps of a generation."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

from toma_fx.errors import ConfigError, UnknownNameError, nearest
from toma_fx.methods.cached_steps import is_step_count
from toma_fx.methods.checks import fits, shorten
from toma_fx.methods.paths import Fields

Phases = tuple[tuple[int | float, Fields], ...]
"""((begin, {field: value}), ...), or the same as nested tuples."""
FIXED = frozenset({"first_step", "last_step", "grid", "cache", "phases"})
"""Fields that hold for a whole generation."""


def split_amount(config: Any, name: str) -> None:
    """Make phases of a field that is given as ((begin, value), ...), where it is.

    Raises:
        ConfigError: the pairs do not begin at step 0, or there are other phases beside them.
    """
    pairs = getattr(config, name, None)
    if not isinstance(pairs, (tuple, list)):
        return
    valid = bool(pairs) and all(isinstance(p, (tuple, list)) and len(p) == 2 for p in pairs)
    if not valid or pairs[0][0] != 0 or config.phases:
        raise ConfigError(
            f"{name} over the steps is not of its form",
            where=name,
            expected="((0, value), (begin, value), ...), and no phases= beside it",
            got=shorten(pairs) + (f", phases={shorten(config.phases)}" if config.phases else ""),
        )
    (_, first), *rest = pairs
    object.__setattr__(config, name, first)
    object.__setattr__(config, "phases", tuple((begin, {name: value}) for begin, value in rest))


def freeze_phases(config: Any, phases: Any) -> Phases:
    """Phases as nested tuples, each validated by building the configuration it leads to.

    Raises:
        ConfigError: not of their form, not in order, or a field out of its domain.
        UnknownNameError: no such field, or one that holds for a whole generation.
    """
    form = "((begin, {field: value}), ...)"
    valid = fits(phases, Phases) and all(is_step_count(begin) for begin, _ in phases)
    _require(valid, phases, form)
    begins = [begin for begin, _ in phases]
    kinds = {type(begin) for begin in begins}
    ordered = len(kinds) < 2 and all(a < b for a, b in pairwise([0, *begins]))
    _require(ordered, phases, "begins after 0 that rise, all steps or all shares of them")
    known = [f.name for f in dataclasses.fields(config) if f.name not in FIXED]
    frozen = []
    for begin, fields in phases:
        for name in dict(fields):
            if name not in known:
                raise UnknownNameError(
                    f"{name!r} can't change over the steps",
                    where=f"phases, from {begin}",
                    expected="a field of the method, other than " + ", ".join(sorted(FIXED)),
                    hint=nearest(name, known),
                )
        stage = dataclasses.replace(config, **{"phases": (), **dict(fields)})
        _require(not stage.phases, phases, "one value of a field in each phase")
        frozen.append((begin, tuple((name, getattr(stage, name)) for name in sorted(dict(fields)))))
    return tuple(frozen)


def _require(valid: bool, phases: Any, expected: str) -> None:
    if not valid:
        raise ConfigError(
            "phases is not of its form", where="phases", expected=expected, got=shorten(phases)
        )

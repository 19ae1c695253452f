"""Where and when tokens should merge: one level, one part of a generation at a time.

A *spot* is a level of the model (the blocks of one number of tokens) in a part of the generation.
What each spot costs in error and saves in FLOPs is measured by itself; errors of different spots
are independent, so that their squares add, as the savings do. The best amounts for every saving
then follow from the convex hull of each spot, steepest steps first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from toma_fx.methods.base import MethodConfig
from toma_fx.plan.plan import MergePlan

Spot = tuple[int, int]
"""(tokens of the level, part of the generation, from 0)"""
Amounts = tuple[tuple[Spot, float], ...]
"""Ratio of each spot that merges, in the order of the spots."""


@dataclass(frozen=True)
class Trial:
    """One spot that merges alone.

    Attributes:
        ratio: of its tokens. error: squared error of the pictures that it adds. saved: share of
            the FLOPs of a step that computes.
    """

    ratio: float
    error: float
    saved: float


def levels_of(plan: MergePlan) -> dict[int, tuple[str, ...]]:
    """Module path patterns of the places that merge, by their number of tokens, most first."""
    paths: dict[int, set[str]] = {}
    for segment in plan.segments:
        paths.setdefault(segment.image.length, set()).update(segment.modules)
    every = set().union(*paths.values())
    return {
        tokens: patterns_of(own, every - own) for tokens, own in sorted(paths.items(), reverse=True)
    }


def patterns_of(paths: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """The shortest module path patterns that match all of `paths` and none of `others`."""
    others = set(others)
    found = set()
    for path in paths:
        parts = path.split(".")
        starts = (".".join(parts[:n]) for n in range(1, len(parts)))
        free = (s for s in starts if not any(o == s or o.startswith(s + ".") for o in others))
        start = next(free, None)
        found.add(path if start is None else f"{start}.*")
    return tuple(sorted(found))


def config_of(
    base: MethodConfig, amounts: Amounts, levels: Mapping[int, tuple[str, ...]], parts: int
) -> MethodConfig:
    """The configuration that merges so much at each spot, and nothing elsewhere."""
    known = dict(amounts)
    stages = []
    for part in range(parts):
        ratios = {tokens: known.get((tokens, part), 0.0) for tokens in levels}
        stages.append(_stage(ratios, levels))
    phases = []
    for part, (before, stage) in enumerate(pairwise(stages), 1):
        if stage != before:
            phases.append((part / parts, stage))
    return dataclasses.replace(base, **stages[0], phases=tuple(phases))


def _stage(ratios: Mapping[int, float], levels: Mapping[int, tuple[str, ...]]) -> dict[str, Any]:
    """Fields of one part of the generation."""
    if len(set(ratios.values())) == 1:
        return {"ratio": next(iter(ratios.values())), "overrides": ()}
    overrides = tuple(
        (pattern, (("ratio", ratio),))
        for tokens, ratio in ratios.items()
        if ratio
        for pattern in levels[tokens]
    )
    return {"ratio": 0.0, "overrides": overrides}


def best_amounts(trials: Mapping[Spot, Sequence[Trial]]) -> list[tuple[Amounts, float]]:
    """(amounts, error) by rising saving, from nothing on: the least error for what they save."""
    steps = []
    for spot, own in trials.items():
        for before, after in pairwise(_hull(own)):
            steps.append((_slope(before, after), spot, after.ratio, after.error - before.error))
    chosen: dict[Spot, float] = {}
    error = 0.0
    found: list[tuple[Amounts, float]] = [((), 0.0)]
    for _, spot, ratio, more in sorted(steps):
        chosen[spot] = ratio
        error += more
        found.append((tuple(sorted(chosen.items())), error))
    return found


def saved_by_part(
    amounts: Amounts, trials: Mapping[Spot, Sequence[Trial]], parts: int
) -> tuple[float, ...]:
    """Share of the FLOPs of a step that computes which merging saves, in each part."""
    saved = [0.0] * parts
    for spot, ratio in amounts:
        saved[spot[1]] += next(t.saved for t in trials[spot] if t.ratio == ratio)
    return tuple(saved)


def _hull(trials: Sequence[Trial]) -> list[Trial]:
    """Nothing, and the trials on the lower convex hull of error over what is saved."""
    hull = [Trial(0.0, 0.0, 0.0)]
    for trial in sorted(trials, key=lambda t: (t.saved, t.error)):
        if trial.saved <= hull[-1].saved:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], trial):
            hull.pop()
        hull.append(trial)
    return hull


def _slope(a: Trial, b: Trial) -> float:
    return (b.error - a.error) / (b.saved - a.saved)

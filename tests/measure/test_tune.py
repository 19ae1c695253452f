"""The tuner: its prediction against brute force, and its recipe against pictures."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import toma_fx
from toma_fx.calibration import Recorded
from toma_fx.errors import ConfigError, TuneError
from toma_fx.measure.masks import MaskErrors, UpdateErrors, weights_of
from toma_fx.measure.subjects import EmbeddedSubject, Settings
from toma_fx.models import tiny
from toma_fx.passes.cache_updates import extrapolate, factors_of

STEPS = 7


def recorded(seed: int, passes: int = 2) -> Recorded:
    """Updates that wander, at uneven times."""
    random, out = torch.Generator().manual_seed(seed), Recorded()
    for p in range(passes):
        value, out.passes[p] = torch.randn(2, 3, generator=random), {}
        for step in range(STEPS):
            value = value + (step + 1) * 0.3 * torch.randn(2, 3, generator=random)
            out.passes[p][step] = (900.0 - 90 * step - 5 * step**2, [value, value[:1] * 2])
    return out


@pytest.mark.parametrize("known", [(2,), (0, 3), (0, 1, 3)])
def test_errors_of_updates(known: tuple[int, ...]) -> None:
    generations = [recorded(0), recorded(1)]
    expected = 0.0
    for generation in generations:
        for own in generation.passes.values():
            times = [torch.tensor([own[k][0]]) for k in (5, *known[::-1])]
            factors = factors_of(*times) if len(known) > 1 else ()
            for i, update in enumerate(own[5][1]):
                guess = extrapolate(factors, tuple(own[k][1][i] for k in known[::-1]))
                expected += float((guess - update).square().sum())
    assert UpdateErrors.of(generations).squared(5, known) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("order", [0, 1])
def test_the_best_mask_is_the_best_of_all(order: int) -> None:
    updates = UpdateErrors.of([recorded(0)])
    probed = {i: 0.1 + abs(i - 3) for i in range(1, STEPS)}
    errors = MaskErrors(updates, order, weights_of(updates, 1, probed))
    best = errors.best()
    masks = [(1, *rest) for rest in itertools.product((0, 1), repeat=STEPS - 1)]
    for count in range(order + 1, STEPS + 1):
        least = min(errors.predict(mask) for mask in masks if sum(mask) == count)
        assert best[count][0] == pytest.approx(least)
        assert errors.predict(best[count][1]) == pytest.approx(least)
        assert sum(best[count][1]) == count
    assert set(best) == set(range(order + 1, STEPS + 1))
    assert best[STEPS][0] == 0


def test_a_probed_step_is_predicted_as_it_was_measured() -> None:
    updates = UpdateErrors.of([recorded(2)])
    probed = {1: 0.5, 3: 2.0, 6: 0.25}
    weights = weights_of(updates, 1, probed)
    for step, error in probed.items():
        mask = tuple(int(i != step) for i in range(STEPS))
        assert MaskErrors(updates, 1, weights).predict(mask) == pytest.approx(error)
    between = np.exp(np.interp(2, [1, 3], np.log([weights[1], weights[3]])))
    assert weights[2] == pytest.approx(between)


def subject(steps: int = 6) -> EmbeddedSubject:
    return EmbeddedSubject(tiny.load("tiny-flux"), Settings(steps=steps, batch=2))


def test_a_recipe_for_a_speed() -> None:
    own, seen = subject(), []
    recipe = toma_fx.tune(
        own, ["cat", "coffee"], speedup=1.5, rounds=0, scopes=("stack",), probes=2,
        progress=lambda what, count: seen.append(what),
    )  # fmt: skip
    measured = recipe.measured
    assert measured["speedup_counted"] >= 1.5
    assert {"record", "stack: one step at a time", "draw what may be it"} <= set(seen)
    pictures = own.draw(cases := own_cases(), recipe)
    error = (pictures - own.reference(cases)).square().mean()
    mask = recipe.config.cache.steps_mask  # type: ignore[union-attr]
    # the same number of steps, cached where it hurts: right after the first two
    worst = (1, 1, *(0,) * (6 - sum(mask)), *(1,) * (sum(mask) - 2))
    cache = {"steps_mask": worst, "order": recipe.config.cache.order}  # type: ignore[union-attr]
    other = own.draw(cases, toma_fx.ToMAConfig(ratio=0.0, cache={**cache, "scope": "stack"}))
    assert error < (other - own.reference(cases)).square().mean()
    with pytest.raises(TuneError, match="no cache of this model is as fast"):
        toma_fx.tune(own, ["cat", "coffee"], speedup=50, scopes=("stack",), orders=(0,), probes=1)


def own_cases() -> list[Any]:
    from toma_fx.measure.prompts import read_cases

    return read_cases(["cat", "coffee"])


def test_a_recipe_for_a_quality() -> None:
    own = subject()
    search: dict[str, Any] = {"scopes": ("stack",), "orders": (1,), "probes": 4, "rounds": 0}
    recipe = toma_fx.tune(own, ["cat", "coffee"], psnr=30, **search)
    assert recipe.measured["psnr"] >= 30
    with pytest.raises(TuneError, match="at most"):
        toma_fx.tune(own, ["cat", "coffee"], psnr=99.5, **search)


@pytest.mark.parametrize(
    "options", [{}, {"speedup": 2, "psnr": 30}, {"speedup": 0.5}, {"psnr": -1}, {"speedup": "2"}]
)
def test_one_target(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        toma_fx.tune(subject(), ["cat", "coffee"], **options)

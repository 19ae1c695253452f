"""Predicted errors of masks: against plain vectors, against brute force, and fitted weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.reference_cache import newton
from toma_fx.calibration import Recorded
from toma_fx.measure.masks import MaskErrors, UpdateErrors, rows_of, weights_of

STEPS = 7
PASSES = 2


def recorded(seed: int, passes: int = PASSES) -> Recorded:
    """Updates that wander, at uneven times."""
    random, out = torch.Generator().manual_seed(seed), Recorded()
    for p in range(passes):
        value, out.passes[p] = torch.randn(2, 3, generator=random), {}
        for step in range(STEPS):
            value = value + (step + 1) * 0.3 * torch.randn(2, 3, generator=random)
            out.passes[p][step] = (900.0 - 90 * step - 5 * step**2, [value, value[:1] * 2])
    return out


def vectors(generations: Sequence[Recorded]) -> list[tuple[float, Tensor]]:
    """(timestep, all updates of all passes as one vector) of each step."""
    out = []
    for step in range(STEPS):
        samples = [own[step] for g in generations for own in g.passes.values()]
        flat = torch.cat([u.flatten() for _, updates in samples for u in updates])
        out.append((samples[0][0], flat.double()))
    return out


def model(generations: Sequence[Recorded], order: int = 1, coherence: float = 0.8) -> MaskErrors:
    """With weights that differ from step to step."""
    weights = {i: 0.1 + abs(i - 3) for i in range(1, STEPS)}
    return MaskErrors(UpdateErrors.of(generations), order, weights, coherence)


def total(errors: MaskErrors, differences: dict[int, Tensor]) -> float:
    """The formula, of the error vector of each step."""
    scaled = [errors.weights[i] ** 0.5 * e for i, e in differences.items()]
    together = float(torch.stack(scaled).sum(0).square().sum())
    apart = sum(float(e.square().sum()) for e in scaled)
    return errors.coherence * together + (1 - errors.coherence) * apart


@pytest.mark.parametrize("mask", [(1, 0, 0, 1, 0, 1, 0), (1, 1, 0, 0, 0, 0, 0), (1, *[0] * 6)])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_errors_are_those_of_the_vectors(mask: tuple[int, ...], order: int) -> None:
    generations = [recorded(0), recorded(1)]
    samples, errors = vectors(generations), model(generations, order)
    differences = {}
    for step in (i for i, flag in enumerate(mask) if not flag):
        known = [samples[k] for k in range(step) if mask[k]][::-1][: order + 1]
        time, actual = samples[step]
        differences[step] = actual - newton(known, time)
    assert errors.predict(mask) == pytest.approx(total(errors, differences), rel=1e-5)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_fitted_weights_are_the_best_there_are(order: int) -> None:
    mask, generations = (1, 1, 0, 1, 0, 0, 1), [recorded(3)]
    samples, errors = vectors(generations), model(generations, order)
    table, predicted = errors.fit(mask)
    steps = [i for i, flag in enumerate(mask) if not flag]
    assert [time for time, _ in table] == [samples[i][0] for i in steps]
    assert all(len(weights) == order + 1 for _, weights in table)

    def error(weights: dict[int, list[float]]) -> float:
        differences = {}
        for step, own in weights.items():
            known = [samples[k][1] for k in range(step) if mask[k]][::-1]
            told = torch.stack([w * u for w, u in zip(own, known, strict=False)]).sum(0)
            differences[step] = samples[step][1] - told
        return total(errors, differences)

    best = {step: list(own) for step, (_, own) in zip(steps, table, strict=True)}
    assert error(best) == pytest.approx(predicted, rel=1e-4)
    assert predicted <= errors.predict(mask)
    for step, k, change in itertools.product(steps, range(order + 1), (-0.05, 0.05)):
        if k < sum(mask[:step]):
            other = {**best, step: [w + change * (i == k) for i, w in enumerate(best[step])]}
            assert error(other) > predicted


def test_at_the_begin_weights_of_updates_that_are_not_known_are_zero() -> None:
    ((_, first), *_), _ = model([recorded(0)], order=2).fit((1, 0, 1, 1, 1, 1, 0))
    assert first[1:] == (0.0, 0.0)
    assert first[0] != 0


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("order", [0, 1])
def test_the_best_mask_is_the_best_of_all(order: int, seed: int) -> None:
    errors = model([recorded(seed)], order)
    best = errors.best()
    assert set(best) == set(range(order + 1, STEPS + 1))
    masks = [(1, *rest) for rest in itertools.product((0, 1), repeat=STEPS - 1)]
    for count, mask in best.items():
        assert sum(mask) == count
        least = min(errors.predict(m) for m in masks if sum(m) == count)
        assert errors.predict(mask) == pytest.approx(least)
    assert errors.predict((1,) * STEPS) == 0


def test_a_probed_step_is_predicted_as_it_was_measured() -> None:
    updates = UpdateErrors.of([recorded(2)])
    probed = {1: 0.5, 3: 2.0, 6: 0.25}
    weights = weights_of(updates, 1, probed)
    for step, error in probed.items():
        mask = tuple(int(i != step) for i in range(STEPS))
        assert MaskErrors(updates, 1, weights).predict(mask) == pytest.approx(error)
    between = np.exp(np.interp(2, [1, 3], np.log([weights[1], weights[3]])))
    assert weights[2] == pytest.approx(between)
    # weights of another scope with the same shape, from one probe
    half = {i: w / 2 for i, w in weights.items()}
    assert weights_of(updates, 1, {3: 2.0}, half) == pytest.approx(weights)


def test_what_was_recorded_survives_as_text() -> None:
    updates = UpdateErrors.of([recorded(0)])
    again = UpdateErrors.of_json(updates.to_dict())
    assert again.times == updates.times
    assert np.array_equal(again.products, updates.products)


def test_rows() -> None:
    rows: Any = rows_of((1, 0, 1, 1, 0, 0), 1)
    assert rows == [(1, (0,)), (4, (3, 2)), (5, (3, 2))]

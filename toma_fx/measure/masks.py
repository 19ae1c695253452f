"""Which steps should compute: predicted from generations in which all of them did.

A cached step that uses steps a < b for step i is off by e_i = |u(a, b) - u_i|^2, which the recorded
updates tell for every a, b and i: with the coefficients c of the extrapolation it is c' G c, where
G[i, j] = <u_i, u_j>. How much of that a picture shows, w_i, is measured by caching step i alone.
Errors of steps in a row point the same way, so that their roots add up; those of different rows are
independent, so that their squares do:

    error of the pictures = sum over rows of (sum over i in the row of sqrt(w_i e_i))^2

That splits at every row, and the best mask of so many steps follows by dynamic programming.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from toma_fx.calibration import Recorded
from toma_fx.passes.cache_updates import extrapolate, factors_of

Mask = tuple[int, ...]
"""1 for each step that computes, 0 for each that does not."""
LEAST = 1e-30
"""Squared error below which two are not told apart."""


@dataclass(frozen=True)
class UpdateErrors:
    """Squared errors of updates, of all recorded passes together.

    Attributes:
        times: of the steps, by pass. products: inner products of the updates of two steps, by pass.
    """

    times: tuple[tuple[float, ...], ...]
    products: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, recorded: Sequence[Recorded]) -> UpdateErrors:
        """From generations of which every step computed."""
        times, products = [], []
        for generation in recorded:
            for samples in generation.passes.values():
                steps = sorted(samples)
                flat = torch.stack(
                    [torch.cat([u.flatten() for u in samples[step][1]]) for step in steps]
                ).double()
                times.append(tuple(samples[step][0] for step in steps))
                products.append((flat @ flat.T).numpy())
        return cls(tuple(times), tuple(products))

    @property
    def steps(self) -> int:
        """Of a generation."""
        return len(self.times[0])

    def squared(self, step: int, known: Sequence[int]) -> float:
        """Of a step that uses those that computed last, the newest at the end."""
        newest = list(known[::-1])
        total = 0.0
        for times, product in zip(self.times, self.products, strict=True):
            at = torch.tensor([times[step]], dtype=torch.double)
            others = [torch.tensor([times[k]], dtype=torch.double) for k in newest]
            factors = factors_of(at, *others) if len(newest) > 1 else ()
            units = torch.eye(len(newest), dtype=torch.double).unbind()
            shares = extrapolate(factors, tuple(unit[None] for unit in units))[0].numpy()
            weights, index = np.append(shares, -1.0), [*newest, step]
            total += float(weights @ product[np.ix_(index, index)] @ weights)
        return max(total, LEAST)


@dataclass(frozen=True)
class MaskErrors:
    """Predicted errors of masks.

    Attributes:
        updates: errors of updates. order: of the extrapolation, 0 or 1.
        weights: by step, squared error of the pictures for each squared error of the updates.
    """

    updates: UpdateErrors
    order: int
    weights: Mapping[int, float]

    def predict(self, mask: Mask) -> float:
        """Mean squared error of the pictures."""
        computed = [i for i, flag in enumerate(mask) if flag]
        ends = [*computed[1:], len(mask)]
        return sum(
            self._row(tuple(computed[max(0, n - self.order) : n + 1]), end)
            for n, end in enumerate(ends)
        )

    def _row(self, known: tuple[int, ...], end: int) -> float:
        """Error of the cached steps from the last known one to `end`."""
        rows = range(known[-1] + 1, end)
        roots = (math.sqrt(self.weights[i] * self.updates.squared(i, known)) for i in rows)
        return float(sum(roots)) ** 2

    def best(self) -> dict[int, tuple[float, Mask]]:
        """By number of steps that compute, the least predicted error and its mask.

        Step 0 computes, and as many more as the order takes at least.
        """
        steps = self.updates.steps
        rows: dict[tuple[tuple[int, ...], int], float] = {}

        def row(known: tuple[int, ...], end: int) -> float:
            if (known, end) not in rows:
                rows[known, end] = self._row(known, end)
            return rows[known, end]

        states: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {(0,): (0.0, (0,))}
        found = {}
        for count in range(1, steps + 1):
            ends = [
                (error + row(known, steps), chosen) for known, (error, chosen) in states.items()
            ]
            error, chosen = min(ends)
            if count > self.order:
                found[count] = error, tuple(int(i in chosen) for i in range(steps))
            following: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
            for known, (error, chosen) in states.items():
                for step in range(known[-1] + 1, steps):
                    state = (*known, step)[-self.order - 1 :]
                    total = error + row(known, step)
                    if state not in following or total < following[state][0]:
                        following[state] = total, (*chosen, step)
            states = following
        return found


def weights_of(updates: UpdateErrors, order: int, probed: Mapping[int, float]) -> dict[int, float]:
    """Weights of all steps but the first from the error that single cached ones made.

    Args:
        probed: by step, squared error of the pictures when it alone is cached; the logarithm of a
            weight is interpolated between them.
    """
    known = {
        i: max(error, LEAST) / updates.squared(i, range(max(0, i - order - 1), i))
        for i, error in sorted(probed.items())
    }
    steps = range(1, updates.steps)
    logs = np.interp(list(steps), list(known), np.log(list(known.values())))
    return {i: float(np.exp(value)) for i, value in zip(steps, logs, strict=True)}

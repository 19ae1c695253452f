"""Which steps should compute, and what the others use: predicted from generations in which all did.

A cached step i uses sum_k c_ik u_k, updates of steps k that computed. It is off by the vector
e_i = u_i - sum_k c_ik u_k, and all that is needed of these are inner products, which follow from
G[i, j] = <u_i, u_j> of the recorded updates. How much of an error a picture shows, w_i, is measured
by caching step i alone. A solver adds up what the steps say, and so do their errors, with their
directions: that of one step makes up for that of another. How far that goes is the coherence r:

    error of the pictures = r |sum_i sqrt(w_i) e_i|^2 + (1 - r) sum_i w_i |e_i|^2

That is a quadratic form in the coefficients. They are those of an extrapolation in the timestep, or
*fitted*: the minimum, by one linear system for all steps together. Masks are improved by letting a
step compute instead of another, until nothing is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch

from toma_fx.calibration import Recorded
from toma_fx.methods.cache import Fitted
from toma_fx.methods.cached_steps import spread
from toma_fx.passes.cache_updates import extrapolate, factors_of

Mask = tuple[int, ...]
"""1 for each step that computes, 0 for each that does not."""
Row = tuple[int, tuple[int, ...]]
"""(step that does not compute, those whose updates it uses, the newest first)"""
LEAST = 1e-30
"""Squared error below which two are not told apart."""
COHERENCE = 0.8
"""See above; docs/tuning.md has what was compared."""
ROUNDING = 2.0**-18 / 3
"""Squared error of a kept update by its size in bfloat16. Fitted coefficients take it into account,
so that large ones that cancel each other are not worth it."""


@dataclass(frozen=True)
class UpdateErrors:
    """What recorded updates tell of others, all passes together.

    Attributes:
        times: of the steps. products: inner products of the updates of two steps, [steps, steps].
    """

    times: tuple[float, ...]
    products: np.ndarray

    @classmethod
    def of(cls, recorded: Sequence[Recorded]) -> Self:
        """From generations of which every step computed."""
        times, products = dict[int, float](), []
        for samples in (own for generation in recorded for own in generation.passes.values()):
            steps = sorted(samples)
            flat = [torch.cat([u.flatten() for u in samples[step][1]]) for step in steps]
            matrix = torch.stack(flat).double()
            products.append((matrix @ matrix.T).numpy())
            times |= {step: samples[step][0] for step in steps}
        return cls(tuple(times[step] for step in sorted(times)), np.sum(products, axis=0))

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {"times": self.times, "products": self.products.tolist()}

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Self:
        """From what `to_dict` gives."""
        return cls(tuple(data["times"]), np.array(data["products"]))

    @property
    def steps(self) -> int:
        """Of a generation."""
        return len(self.times)

    def extrapolated(self, row: Row) -> np.ndarray:
        """The error of a step as coefficients of all updates, [steps]."""
        step, newest = row
        at = torch.tensor([self.times[step]], dtype=torch.double)
        others = [torch.tensor([self.times[k]], dtype=torch.double) for k in newest]
        factors = factors_of(at, *others) if len(newest) > 1 else ()
        units = torch.eye(len(newest), dtype=torch.double).unbind()
        error = np.zeros(self.steps)
        error[step] = 1.0
        error[list(newest)] = -extrapolate(factors, tuple(unit[None] for unit in units))[0].numpy()
        return error

    def squared(self, error: np.ndarray) -> float:
        """|error|^2 of coefficients of all updates."""
        return max(float(error @ self.products @ error), LEAST)


def rows_of(mask: Mask, order: int) -> list[Row]:
    """What each cached step uses: the updates of the last order + 1 steps that computed."""
    computed = [i for i, flag in enumerate(mask) if flag]
    rows = []
    for step in (i for i, flag in enumerate(mask) if not flag):
        known = [k for k in computed if k < step]
        rows.append((step, tuple(known[::-1][: order + 1])))
    return rows


@dataclass(frozen=True)
class MaskErrors:
    """Predicted errors of masks.

    Attributes:
        updates: what was recorded. order: how many updates beside the newest are used.
        weights: by step, squared error of the pictures for each squared error of the updates.
        coherence: how far errors of different steps add up as vectors, from 0 to 1.
    """

    updates: UpdateErrors
    order: int
    weights: Mapping[int, float]
    coherence: float = COHERENCE
    _parts: dict[Row, tuple[np.ndarray, float]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def predict(self, mask: Mask) -> float:
        """Mean squared error of the pictures, with updates that are extrapolated."""
        total, alone = np.zeros(self.updates.steps), 0.0
        for row in rows_of(mask, self.order):
            part, square = self._part(row)
            total += part
            alone += square
        return self._error(total, alone)

    def _error(self, total: np.ndarray, alone: float) -> float:
        """Of the sum of weighted error vectors, and the sum of their squares."""
        return float(self.coherence * (total @ total) + (1 - self.coherence) * alone)

    def _part(self, row: Row) -> tuple[np.ndarray, float]:
        """Weighted error of a step in coordinates with the usual length, and its square."""
        if row not in self._parts:
            weighted = math.sqrt(self.weights[row[0]]) * self.updates.extrapolated(row)
            part = self._root @ weighted
            self._parts[row] = part, float(part @ part)
        return self._parts[row]

    @cached_property
    def _root(self) -> np.ndarray:
        """R with R' R = G."""
        values, vectors = np.linalg.eigh(self.updates.products)
        root: np.ndarray = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
        return root

    def fit(self, mask: Mask) -> tuple[Fitted, float]:
        """Coefficients for `CacheConfig.fitted`, and the error predicted with them."""
        rows, products, r = rows_of(mask, self.order), self.updates.products, self.coherence
        scales = [math.sqrt(self.weights[step]) for step, _ in rows]
        unknown = [(n, k) for n, (_, known) in enumerate(rows) for k in known]
        own, index = np.array([n for n, _ in unknown]), np.array([k for _, k in unknown])
        scale = np.array(scales)[own]
        steps = np.array([step for step, _ in rows])
        # in the products of weights and coefficients the error is a quadratic form
        same = own[:, None] == own[None, :]
        form = products[np.ix_(index, index)] * np.where(same, 1.0, r)
        form += np.diag(ROUNDING * products[index, index])
        towards = r * products[np.ix_(index, steps)] @ np.array(scales)
        towards += (1 - r) * products[index, steps[own]] * scale
        found = np.linalg.lstsq(form, towards, rcond=None)[0] / scale
        errors = np.zeros((len(rows), self.updates.steps))
        errors[np.arange(len(rows)), steps] = 1.0
        errors[own, index] -= found
        parts = errors * np.array(scales)[:, None] @ self._root.T
        return self._table(rows, own, found), self._error(parts.sum(0), np.square(parts).sum())

    def _table(self, rows: Sequence[Row], own: np.ndarray, found: np.ndarray) -> Fitted:
        table = []
        for n, (step, _) in enumerate(rows):
            # at the begin fewer updates are known than are kept: the others count nothing
            shares = [float(x) for x in found[own == n]]
            shares += [0.0] * (self.order + 1 - len(shares))
            table.append((self.updates.times[step], tuple(shares)))
        return tuple(table)

    # -- searching ------------------------------------------------------------------------------

    def best(self) -> dict[int, Mask]:
        """By number of steps that compute, the mask with the least predicted error.

        Step 0 computes, and as many more as the order takes at least. Each search starts from the
        mask of one step more without its least useful one, and from a few regular ones.
        """
        steps = self.updates.steps
        mask = (1,) * steps
        found = {steps: mask}
        for count in range(steps - 1, self.order, -1):
            fewer = [(*mask[:i], 0, *mask[i + 1 :]) for i in range(1, steps) if mask[i]]
            starts = [min(fewer, key=self.predict), *_regular(count, steps)]
            mask = min((self._improve(start) for start in starts), key=self.predict)
            found[count] = mask
        return found

    def _improve(self, mask: Mask) -> Mask:
        """Let a step compute instead of another, as long as that is better."""
        error = self.predict(mask)
        while True:
            moved = min(_moves(mask), key=self.predict, default=mask)
            predicted = self.predict(moved)
            if predicted >= error * (1 - 1e-6):
                return mask
            mask, error = moved, predicted


def _moves(mask: Mask) -> Iterable[Mask]:
    """Masks in which one step computes instead of another; step 0 always does."""
    steps = range(1, len(mask))
    for i in (i for i in steps if mask[i]):
        for j in (j for j in steps if not mask[j]):
            flags = list(mask)
            flags[i], flags[j] = 0, 1
            yield tuple(flags)


def _regular(count: int, steps: int) -> Iterable[Mask]:
    """Masks of so many steps: evenly spread, and as the presets spread them."""
    even = {round(i * (steps - 1) / max(1, count - 1)) for i in range(count)}
    yield tuple(int(i in even) for i in range(steps))
    mask = tuple(map(int, spread(count / steps, steps)))
    if sum(mask) == count:
        yield mask


def weights_of(
    updates: UpdateErrors,
    order: int,
    probed: Mapping[int, float],
    like: Mapping[int, float] | None = None,
) -> dict[int, float]:
    """Weights of all steps but the first from the error that single cached ones made.

    Args:
        probed: by step, squared error of the pictures when it alone is cached; the logarithm of a
            weight is interpolated between them.
        like: weights of another scope, which differ from these by a factor that changes little from
            step to step; it is what is interpolated then.
    """
    steps = updates.steps
    shape = like or dict.fromkeys(range(1, steps), 1.0)
    known = {}
    for step, error in sorted(probed.items()):
        mask = tuple(int(i != step) for i in range(steps))
        (row,) = rows_of(mask, order)
        known[step] = max(error, LEAST) / updates.squared(updates.extrapolated(row)) / shape[step]
    logs = np.interp(range(1, steps), list(known), np.log(list(known.values())))
    return {i: float(np.exp(value)) * shape[i] for i, value in enumerate(logs, 1)}

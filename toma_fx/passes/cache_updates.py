r"""Passes: keep what stretches of blocks add, and use it instead of computing them.

Kept, in a step that computes:          used, in one that does not:

    x_a -> blocks -> x_b                    x_a ------------> x_b = x_a + u
      \--- u = x_b - x_a ---> output        u: held, or extrapolated in the timestep

In a batch of requests that are due different things a mask tells the rows that use what is kept.
Timesteps are kept beside the updates, so that the graph itself knows how far apart steps are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor, fx

from toma_fx.graph.rewriter import Rewriter
from toma_fx.methods.cache import Fitted
from toma_fx.passes.job import Job
from toma_fx.passes.snippets import Span, span_at
from toma_fx.plan.plan import CachePlan, KeptUpdate

USED_ROWS = "update_used"
"""Input of a program that serves requests of both sorts: the rows that use what is kept."""


@dataclass(frozen=True)
class _Place:
    """Where an update is, and where the image lies in both its ends (none: they are alike).

    What is kept has the batch first, though in both ends the tokens may be `leading`.
    """

    update: KeptUpdate
    base: Span | None
    end: Span | None
    leading: bool = False

    @classmethod
    def of(cls, update: KeptUpdate, job: Job) -> Self:
        leading = job.flow.leads_with_tokens(update.node)
        same = update.base and job.flow.row_shape(update.base) == update.shape
        if not update.base or same or update.image is None:
            return cls(update, None, None, leading)
        base, end = (span_at(n, update.image, job.flow) for n in (update.base, update.node))
        return cls(update, base, end, leading)

    def nodes(self, rewriter: Rewriter) -> tuple[fx.Node, fx.Node | None]:
        """What now stands for x_b and x_a."""
        base = self.update.base
        return rewriter.current(self.update.node), rewriter.current(base) if base else None

    def rows(self, x: Tensor) -> Tensor:
        """The value of an end with the batch first, and back."""
        return x.transpose(0, 1) if self.leading else x

    def subtract(self, end: Tensor, base: Tensor) -> Tensor:
        """x_b - x_a, of the image alone where x_a lacks the rest; the batch first."""
        if self.base is None or self.end is None:
            return self.rows(end - base)
        change = self.end.image(end) - self.base.image(base)
        return self.rows(self.end.with_image(end, change))

    def add(self, update: Tensor, base: Tensor) -> Tensor:
        """x_a + u, of u with the batch first."""
        update = self.rows(update)
        if self.base is None or self.end is None:
            return base + update
        return self.end.with_image(update, self.base.image(base) + self.end.image(update))


def _places(cache: CachePlan, job: Job) -> tuple[_Place, ...]:
    return tuple(_Place.of(update, job) for update in cache.updates)


@dataclass(frozen=True)
class KeepUpdates:
    """Give every update of the plan, and the timestep that it is of.

    Attributes:
        cache: what is kept. places: of the updates. mixed: whether some rows use what is kept.
    """

    cache: CachePlan
    places: tuple[_Place, ...]
    mixed: bool
    name: ClassVar[str] = "keep_updates"

    @classmethod
    def of(cls, job: Job) -> Self | None:
        """The pass for a job; None where nothing is kept."""
        cache = job.plan.cache
        if cache is None:
            return None
        mixed = not set(job.plan.all_updates).isdisjoint(job.use.takes(job.plan))
        return cls(cache, _places(cache, job), mixed)

    def __str__(self) -> str:
        return f"KeepUpdates({len(self.places)} updates)"

    def apply(self, rewriter: Rewriter) -> None:
        """Rewrite the graph."""
        used = self._add_mask(rewriter) if self.mixed else None
        kept = _Kept(self.cache, self.places, rewriter, takes=self.mixed)
        outputs = []
        for place in self.places:
            node, base = place.nodes(rewriter)
            readers = list(node.users)
            outputs.append(_find_update(rewriter, place, node, base))
            if used is not None:
                with rewriter.after(node, *kept.inputs(place)):
                    new = _choose_rows(rewriter, place, used, kept.value(place, base), node)
                for reader in readers:
                    rewriter.replace_input(reader, node, new)
                rewriter.stand_in(place.update.node, new)
        if self.cache.clock:
            outputs.append(kept.now)
        rewriter.add_outputs(outputs)

    def _add_mask(self, rewriter: Rewriter) -> fx.Node:
        device = _device(self.cache, rewriter)
        batch = self.cache.batch
        return rewriter.add_input(
            USED_ROWS, lambda: torch.empty(batch, dtype=torch.bool, device=device)
        )


@dataclass(frozen=True)
class UseUpdates:
    """Put kept updates where the stretches were; `EraseDead` takes away what only they needed."""

    cache: CachePlan
    places: tuple[_Place, ...]
    name: ClassVar[str] = "use_updates"

    @classmethod
    def of(cls, job: Job) -> Self | None:
        """The pass for a job; None where nothing is kept."""
        cache = job.plan.cache
        if cache is None:
            return None
        return cls(cache, _places(cache, job))

    def __str__(self) -> str:
        return f"UseUpdates({len(self.places)} updates)"

    def apply(self, rewriter: Rewriter) -> None:
        """Rewrite the graph."""
        kept = _Kept(self.cache, self.places, rewriter, takes=True)
        for place in self.places:
            node, base = place.nodes(rewriter)
            with rewriter.after(*([] if base is None else [base]), *kept.inputs(place)):
                new = kept.value(place, base)
            rewriter.replace_uses(node, new)
            rewriter.stand_in(place.update.node, new)


class _Kept:
    """The kept tensors of a program as nodes, and what they say of the present step."""

    def __init__(
        self, cache: CachePlan, places: Sequence[_Place], rewriter: Rewriter, *, takes: bool
    ) -> None:
        self._cache, self._rewriter = cache, rewriter
        self._inputs: dict[str, fx.Node] = {}
        self._factors: dict[int, list[fx.Node]] = {}
        self._weights: list[fx.Node] = []
        device = _device(cache, rewriter)
        likes = {name: p for p in places for name in p.update.tensors} if takes else {}
        for name, place in likes.items():
            value = rewriter.current(place.update.node).meta["val"]
            like = partial(_empty_like, value, place.update.shape)
            self._inputs[name] = rewriter.add_input(name, like)
        time = partial(torch.empty, cache.batch, dtype=torch.float32, device=device)
        for name in cache.times if takes else ():
            self._inputs[name] = rewriter.add_input(name, time)
        if cache.clock:
            with rewriter.after(*rewriter.graph.find_nodes(op="placeholder")):
                (self.now,) = rewriter.splice(
                    ("clock", cache.batch),
                    lambda t: _clock(t, cache.batch, device),
                    [rewriter.current(cache.clock)],
                )

    def inputs(self, place: _Place) -> list[fx.Node]:
        """All that the kept value of a place is made of, but its base."""
        tensors = [self._inputs[name] for name in place.update.tensors]
        numbers = self.weights() if self._cache.fitted else self.factors(place.update.order)
        return [*numbers, *tensors]

    def weights(self) -> list[fx.Node]:
        """Fitted weights of the kept updates, one a row."""
        if not self._weights:
            table = self._cache.fitted
            with self._rewriter.after(self.now):
                self._weights = self._rewriter.splice(
                    ("weights", table), lambda now: weights_at(now, table), [self.now]
                )
        return self._weights

    def factors(self, order: int) -> list[fx.Node]:
        """Weights of the differences between kept updates, one a row."""
        if order not in self._factors:
            times = [self._inputs[name] for name in self._cache.times[: order + 1]]
            if order == 0:
                self._factors[order] = []
            else:
                with self._rewriter.after(self.now, *times):
                    self._factors[order] = self._rewriter.splice(
                        ("factors", order), factors_of, [self.now, *times]
                    )
        return self._factors[order]

    def value(self, place: _Place, base: fx.Node | None) -> fx.Node:
        """x_b by what is kept, at the cursor."""
        kept, fitted = len(place.update.tensors), bool(self._cache.fitted)
        numbers = kept if fitted else kept - 1

        def value(*nodes: Tensor) -> Tensor:
            tensors = nodes[numbers : numbers + kept]
            update = (combine if fitted else extrapolate)(nodes[:numbers], tensors)
            return place.add(update, nodes[-1]) if base is not None else place.rows(update)

        nodes = [*self.inputs(place), *([] if base is None else [base])]
        return self._rewriter.splice(("kept", place, base is None), value, nodes)[0]


def _device(cache: CachePlan, rewriter: Rewriter) -> torch.device:
    device: torch.device = rewriter.current(cache.updates[0].node).meta["val"].device
    return device


def _empty_like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def _find_update(rewriter: Rewriter, place: _Place, node: fx.Node, base: fx.Node | None) -> fx.Node:
    """u = x_b - x_a, or x_b itself; the batch first."""
    if base is None:
        if not place.leading:
            return node
        with rewriter.after(node):
            return rewriter.splice("rows", lambda x: x.transpose(0, 1).contiguous(), [node])[0]
    with rewriter.after(node, base):
        key = ("difference", place)
        return rewriter.splice(key, lambda x, y: place.subtract(x, y), [node, base])[0]


def _choose_rows(
    rewriter: Rewriter, place: _Place, used: fx.Node, kept: fx.Node, computed: fx.Node
) -> fx.Node:
    """What is kept in the rows of the mask, what was computed in the others."""

    def choose(used: Tensor, kept: Tensor, computed: Tensor) -> Tensor:
        rows = torch.where(
            _rows(used, place.rows(computed)), place.rows(kept), place.rows(computed)
        )
        return place.rows(rows)

    key = ("choose_rows", place.leading)
    return rewriter.splice(key, choose, [used, kept, computed])[0]


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """One value a row of the batch, in the rank of a tensor whose rows may be frames as well."""
    times = like.shape[0] // values.shape[0]
    if times > 1:
        values = values.unsqueeze(1).expand(-1, times).reshape(-1)
    return values.view(-1, *[1] * (like.dim() - 1))


def _clock(timestep: Tensor, batch: int, device: torch.device) -> Tensor:
    """The timestep of each row: the largest, where tokens or frames have their own."""
    value = timestep.to(device=device, dtype=torch.float32)
    if value.numel() % batch:
        return value.amax().expand(batch).clone()
    return value.reshape(batch, -1).amax(1)


def factors_of(now: Tensor, *times: Tensor) -> tuple[Tensor, ...]:
    """Weights a, b of u = u_0 + a (u_0 - u_1) + b (u_1 - u_2) by Newton's divided differences.

    The polynomial through u_0, u_1 (and u_2) at their timesteps, at the present one. Where two
    timesteps are equal (Heun's method asks twice) what they would tell is left out.
    """
    first = now - times[0]
    step = times[0] - times[1]
    slope = _divide(first, step)
    if len(times) == 2:
        return (slope,)
    before, whole = times[1] - times[2], times[0] - times[2]
    known = (step != 0) & (before != 0)
    bend = torch.where(known, _divide(first * (now - times[1]), whole), torch.zeros_like(first))
    return slope + _divide(bend, step), -_divide(bend, before)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is."""
    zero = b == 0
    return torch.where(zero, torch.zeros_like(a), a / torch.where(zero, torch.ones_like(b), b))


def weights_at(now: Tensor, table: Fitted) -> tuple[Tensor, ...]:
    """The weights of the entry whose timestep is nearest, one tensor for each kept update.

    Args:
        now: timestep of each row, [B] float32. table: entries by falling timesteps.
    """
    (_, last), above = table[-1], table[:-1]
    weights = [torch.full_like(now, weight) for weight in last]
    for (time, own), (below, _) in reversed(list(zip(above, table[1:], strict=True))):
        nearer = now > (time + below) / 2
        weights = [torch.where(nearer, w, x) for w, x in zip(own, weights, strict=True)]
    return tuple(weights)


def combine(weights: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> Tensor:
    """The weighted sum of kept updates, in float32 at least."""
    newest, values = tensors[0], _widened(tensors)
    parts = [_rows(w, newest) * x for w, x in zip(weights, values, strict=True)]
    return sum(parts[1:], parts[0]).to(newest.dtype)


def extrapolate(factors: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> Tensor:
    """The update at the present timestep, summed in float32 at least."""
    newest = tensors[0]
    if not factors:
        return newest
    values = _widened(tensors)
    total = values[0]
    for factor, newer, older in zip(factors, values, values[1:], strict=False):
        total = total + _rows(factor, newest) * (newer - older)
    return total.to(newest.dtype)


def _widened(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """In float32 at least."""
    dtype = tensors[0].dtype
    return [x.to(torch.float32 if dtype.itemsize < 4 else dtype) for x in tensors]

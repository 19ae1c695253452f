"""What a layout says about each element, by index arithmetic alone: which row, which token.

This is an oracle for the rules, so nothing here calls them, or the code that gathers tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from toma_fx.analysis.factors import Axis, Factor, Keys, Segment, Tokens
from toma_fx.analysis.facts import Positional
from toma_fx.analysis.labels import Label, Layout


@dataclass(frozen=True)
class World:
    """Sizes of a batch of images, or videos: each of batch x frames rows has its own tokens.

    Sizes often coincide, since nothing may be told by a size.

    Attributes:
        frame_axis: "frames", or "height" where they are windows of a picture, one below the other.
    """

    batch: int
    frames: int
    grid: tuple[int, int]
    text: int
    channels: int
    heads: int
    frame_axis: str = "frames"

    @property
    def count(self) -> int:
        """Tokens of an image."""
        return prod(self.grid)


def held_tokens(factor: Factor) -> Tokens | None:
    """The tokens, or keys, that a factor enumerates."""
    if isinstance(factor, Keys):
        return factor.tokens
    return factor if isinstance(factor, Tokens) else None


def has_segment(layout: Layout | None, name: str) -> bool:
    """Whether a layout has tokens of a segment."""
    factors = [f for label in layout or () for f in label.factors]
    return any(s.name == name for f in factors if (t := held_tokens(f)) for s in t.segments)


def reindex(
    x: Tensor, layout: Layout, target: Segment, table: Tensor, *, only: int | None = None
) -> Tensor:
    """`x` with token `table[b, f, j]` as token j of the target, in the row of batch b and frame f.

    Other tokens stay, and so do those of other dimensions if `only` names one. `table` is [batch,
    frames, any number of tokens], with sizes of 1 where all rows are alike.
    """
    places = [i for i, label in enumerate(layout) for _ in label.factors]
    factors = [f for label in layout for f in label.factors]
    counts = [n for i, label in enumerate(layout) for n in _factor_sizes(label, x.shape[i])]
    if x.dtype == torch.float8_e4m3fn:
        return reindex(x.view(torch.uint8), layout, target, table, only=only).view(x.dtype)
    x = x.reshape(counts)
    for d, factor in enumerate(factors):
        tokens = held_tokens(factor) if only in (None, places[d]) else None
        names = [s.name for s in tokens.segments] if tokens else []
        if tokens is None or target.name not in names:
            continue
        before = sum(s.length for s in tokens.segments[: names.index(target.name)])
        after = tokens.length - before - target.length
        rows = [
            row_numbers(factors, tokens.fixed, name, table.shape[i])
            for i, name in enumerate(("batch", "frames"))
        ]
        own = table[rows[0], rows[1]].movedim(-1, d).squeeze(d + 1) + before
        around = [1] * len(factors)
        head, tail = list(around), list(around)
        head[d], tail[d] = before, after
        first = torch.arange(before).view(head)
        last = (torch.arange(after) + before + target.length).view(tail)
        shape = list(own.shape)
        parts = [p.expand([*shape[:d], p.shape[d], *shape[d + 1 :]]) for p in (first, own, last)]
        index = torch.cat(parts, d)
        counts[d] = index.shape[d]
        x = x.gather(d, index.expand([*x.shape[:d], counts[d], *x.shape[d + 1 :]]))
    return x.reshape(merge_sizes(layout, counts))


def _factor_sizes(label: Label, size: int) -> list[int]:
    """Sizes of a dimension's factors; one that broadcasts has ones, and tokens may be fewer."""
    if len(label.factors) < 2:
        return [size] * len(label.factors)
    if size in (1, label.size):
        return [1 if size == 1 else f.size for f in label.factors]
    others = prod(f.size for f in label.factors if not held_tokens(f))
    return [size // others if held_tokens(f) else f.size for f in label.factors]


def merge_sizes(layout: Layout, counts: Sequence[int]) -> list[int]:
    """Sizes of the dimensions when the factors have sizes `counts`."""
    left = iter(counts)
    return [prod([next(left) for _ in label.factors]) for label in layout]


def row_numbers(factors: Sequence[Factor], fixed: Sequence[Axis], name: str, count: int) -> Tensor:
    """Index along an axis of every element, as a table that broadcasts to the factors.

    Raises:
        AssertionError: the layout doesn't tell the rows of its tokens.
    """
    numbers, covered = torch.zeros([1] * len(factors), dtype=torch.long), 1
    if count == 1:
        return numbers
    known = {f.name for f in (*factors, *fixed) if isinstance(f, Axis)}
    name = "height" if name == "frames" and name not in known else name  # windows
    for d, f in enumerate(factors):
        if isinstance(f, Axis) and f.name == name:
            shape = [-1 if i == d else 1 for i in range(len(factors))]
            numbers = numbers + (torch.arange(f.size) + f.start).view(shape) * f.stride
            covered *= f.base
    for f in fixed:
        if f.name == name:
            numbers, covered = numbers + f.start * f.stride, covered * f.base
    assert covered == count, f"tokens whose {name} is not known"
    return numbers


def gather_table(x: Tensor, positional: Positional, target: Segment, table: Tensor) -> Tensor:
    """A table at the tokens `table` of each row; it has all rows that its layout names."""
    layout, lead = positional.layout, len(positional.layout) - x.dim()
    sizes = [1] * lead + list(x.shape)
    full = [
        label.size if label.axes or (n == 1 and label.is_product) else n
        for label, n in zip(layout, sizes, strict=True)
    ]
    return reindex(x.expand(full), positional.layout, target, table, only=positional.dim)


def weigh_keys(x: Tensor, layout: Layout, target: Segment, times: float) -> Tensor:
    """Shares of the target's keys, `times` as large: those of a key that stands for several."""
    factors = [f for label in layout for f in label.factors]
    out = x.reshape([f.size for f in factors])
    for d, f in enumerate(factors):
        if not isinstance(f, Keys) or not f.normal:
            continue
        names = [s.name for s in f.tokens.segments for _ in range(s.length)]
        weights = torch.tensor([times if name == target.name else 1.0 for name in names])
        out = out * weights.to(x.dtype).view([-1 if i == d else 1 for i in range(len(factors))])
    return out.reshape(x.shape)

"""Facts of the token-axis analysis: what each dimension of a value enumerates.

A fact is a `Layout`, one label per dimension: a `Batch`, `FRAMES`, `HEIGHT`, `WIDTH`, `Tokens` (of
which `Keys`, `Flat` and `Row` are kinds), or None. Facts name graph nodes by string and hold no
graph objects, so they can be printed, compared and saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeGuard, cast

from toma_fx.methods.windows import Size, size_text

FRAMES, HEIGHT, WIDTH = "frames", "height", "width"
SPATIAL = (FRAMES, HEIGHT, WIDTH)


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one origin inside a token axis.

    Attributes:
        name: node that created it (a spatial fold, or an input).
        length: number of tokens.
        grid: (H, W) if the tokens are a raster of an image, or of several of one width; (T, H, W)
            if they are a video, or several images of one size.
        heights: rows of each of several images; windows never reach from one into the next.
        role: "image" (folded from a spatial grid), "sequence" (a packed or text input), "ids"
            (position ids), "other".
    """

    name: str
    length: int
    grid: Size | None = None
    role: Literal["image", "sequence", "ids", "other"] = "other"
    heights: tuple[int, ...] = ()

    def __str__(self) -> str:
        shape = f" ({size_text(self.grid)})" if self.grid else ""
        return f"{self.name} {self.length}{shape}"


@dataclass(frozen=True)
class Tokens:
    """Label of a dimension that enumerates tokens: segments, end to end."""

    segments: tuple[Segment, ...]

    @property
    def length(self) -> int:
        """Total number of tokens."""
        return sum(s.length for s in self.segments)

    def __str__(self) -> str:
        return "[" + " | ".join(str(s) for s in self.segments) + "]"


@dataclass(frozen=True)
class Keys(Tokens):
    """Label of the last dimension of attention scores: the tokens that are attended to.

    Attributes:
        normal: whether softmax has made the scores add up to 1 over them.
    """

    normal: bool = False


@dataclass(frozen=True)
class Flat(Tokens):
    """Label of batch and tokens folded into one dimension, as quantized linear layers do.

    Attributes:
        rows: size of the batch. outer: whether the tokens are the outer of the two.
    """

    rows: int = 1
    outer: bool = False


@dataclass(frozen=True)
class Row(Tokens):
    """Label of the tokens of one row of a batch, taken out of it.

    Attributes:
        row: which of the batch.
    """

    row: int = 0


@dataclass(frozen=True)
class Batch:
    """Label of a dimension that enumerates the batch, or a stretch of its rows.

    Perturbed-attention guidance cuts the batch and joins it again. Each element merges by its own
    pattern, so only pieces of the same rows may meet.

    Attributes:
        span: (start, stop, total) of the rows if they are a part of the batch.
        times: entries of each row (heads folded into the batch).
    """

    span: tuple[int, int, int] | None = None
    times: int = 1

    def rows(self, size: int) -> tuple[int, int, int]:
        """(start, stop, total) on a dimension of `size`."""
        return self.span or (0, size // self.times, size // self.times)

    def part(self, start: int, stop: int, total: int) -> Batch:
        """The label of some rows."""
        return Batch(None if (start, stop) == (0, total) else (start, stop, total), self.times)


BATCH = Batch()
Label = str | Batch | Tokens | None


def is_batch(label: Label) -> TypeGuard[Batch]:
    """Whether a dimension enumerates the batch, or rows of it."""
    return isinstance(label, Batch)


Layout = tuple[Label, ...]
Fact = Layout | tuple[Layout | None, ...] | None
"""Layout of a tensor, layouts of a tuple of tensors, or nothing known."""


def is_tuple_fact(fact: Fact) -> TypeGuard[tuple[Layout | None, ...]]:
    """Whether a fact describes a tuple of tensors and at least one of their layouts is known."""
    return bool(fact) and any(isinstance(f, tuple) for f in fact or ())


def layout_of(fact: Fact) -> Layout | None:
    """The layout of a tensor; None for a tuple of tensors."""
    return None if is_tuple_fact(fact) else cast("Layout | None", fact)


def layouts_of(fact: Fact) -> tuple[Layout | None, ...]:
    """The layouts of a tuple of tensors, or of one tensor."""
    return fact if is_tuple_fact(fact) else (layout_of(fact),)


def token_dim(layout: Layout | None) -> int | None:
    """The dimension that enumerates tokens, if there is one."""
    if layout is None:
        return None
    return next((d for d, label in enumerate(layout) if isinstance(label, Tokens)), None)


def tokens_of(layout: Layout | None) -> Tokens | None:
    """The token label of a layout, if there is one."""
    dim = token_dim(layout)
    if layout is None or dim is None:
        return None
    label = layout[dim]
    return label if isinstance(label, Tokens) else None

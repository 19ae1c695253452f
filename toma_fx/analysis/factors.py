"""Factors of labels: what an index along a dimension, or a digit of it, enumerates.

They are siblings: `Plain` (features, heads, copies), `Axis` (rows of the batch, frames, height,
width, or a part of one), `Tokens`, and `Keys` (tokens that attention sums over). Each can be split
in two and cut to a range, or says why not. They name graph nodes by string and hold no graph
objects; they can be printed and compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from toma_fx.methods.windows import Size, size_text

BATCH, FRAMES, HEIGHT, WIDTH = AXES = ("batch", "frames", "height", "width")


class Refused(Exception):
    """Raised by a rule, or what it calls: tokens can't be followed, or merged, across an operator.

    Attributes:
        reason: what is the matter. dim: what the dimension that is to blame enumerates.
    """

    def __init__(self, reason: str, dim: object = "") -> None:
        super().__init__(reason)
        self.reason, self.dim = reason, str(dim)


@dataclass(frozen=True)
class Plain:
    """Features, heads, copies: neither positions nor rows."""

    size: int

    def split(self, outer: int) -> tuple[Factors, Factors]:
        """Factors of the two dimensions that this one is split into, the first of size `outer`."""
        return (Plain(outer),), (Plain(self.size // outer),)

    def cut(self, start: int, stop: int) -> Plain:
        """The factor of a range."""
        return Plain(stop - start)

    def __str__(self) -> str:
        return str(self.size)


@dataclass(frozen=True)
class Axis:
    """An axis of the input, or a digit of its index, or a range of that.

    Index i of the dimension is (start + i) * stride in the axis, other digits apart. A batch of 8
    that is viewed as 2 x 4 has digits (stride 4, base 2) and (stride 1, base 4).

    Attributes:
        name: "batch", "frames", "height" or "width". size: of the dimension. base: values that
            the digit has; more than `size` for a range.
    """

    name: str
    size: int
    stride: int = 1
    start: int = 0
    base: int = 0

    @classmethod
    def whole(cls, name: str, size: int) -> Axis:
        """An axis in full."""
        return cls(name, size, 1, 0, size)

    @property
    def is_whole(self) -> bool:
        """Whether no index of the digit is missing."""
        return self.size == self.base

    def split(self, outer: int) -> tuple[Factors, Factors]:
        """Two digits, the first of size `outer`."""
        inner = self.size // outer
        if self.start % inner or self.base % inner:
            raise Refused(f"a range of the {self.name} is split")
        first = Axis(self.name, outer, self.stride * inner, self.start // inner, self.base // inner)
        return (first,), (Axis(self.name, inner, self.stride, 0, inner),)

    def cut(self, start: int, stop: int) -> Axis:
        """The factor of a range."""
        return replace(self, size=stop - start, start=self.start + start)

    def then(self, inner: Axis) -> Axis | None:
        """One digit made of two that lie side by side, if they are neighbors."""
        apart = self.name != inner.name or self.stride != inner.stride * inner.base
        if apart or not inner.is_whole:
            return None
        size, base = self.size * inner.size, self.base * inner.size
        return Axis(self.name, size, inner.stride, self.start * inner.size, base)

    def __str__(self) -> str:
        part = "" if self.is_whole else f" from {self.start} of {self.base}"
        digit = f" each {self.stride}" if self.stride > 1 else ""
        return f"{self.name} {self.size}{part}{digit}"


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
        strides: of each side of the grid, if its tokens don't lie side by side in the picture.
    """

    name: str
    length: int
    grid: Size | None = None
    role: Literal["image", "sequence", "ids", "other"] = "other"
    heights: tuple[int, ...] = ()
    strides: Size = ()

    def __str__(self) -> str:
        shape = f" ({size_text(self.grid)})" if self.grid else ""
        return f"{self.name} {self.length}{shape}"


@dataclass(frozen=True)
class Tokens:
    """Tokens: segments, end to end.

    Attributes:
        fixed: rows that they are of, where those were picked out of a dimension that is gone.
    """

    segments: tuple[Segment, ...]
    fixed: tuple[Axis, ...] = ()

    @property
    def length(self) -> int:
        """Total number of tokens."""
        return sum(s.length for s in self.segments)

    @property
    def size(self) -> int:
        """Size of the dimension."""
        return self.length

    @property
    def names(self) -> frozenset[str]:
        """Names of the segments that are pictures."""
        return frozenset(s.name for s in self.segments if s.grid)

    @property
    def rank(self) -> int:
        """Which of two a value is about: pictures, other content, then position ids."""
        content = any(s.role in ("image", "sequence") for s in self.segments)
        return content + (content and any(s.grid for s in self.segments))

    def split(self, outer: int) -> tuple[Factors, Factors]:
        """The picture that the tokens are a raster of."""
        segment = self.segments[0]
        grid = segment.grid if len(self.segments) == 1 and segment.grid else ()
        each = zip(AXES[-len(grid) :], grid, segment.strides or (1,) * len(grid), strict=False)
        sides = tuple(Axis(name, size, stride, 0, size) for name, size, stride in each)
        for i in range(1, len(sides)):
            if prod(side.size for side in sides[:i]) == outer and not self.fixed:
                return sides[:i], sides[i:]
        raise Refused("a reshape that cuts the token axis")

    def cut(self, start: int, stop: int) -> Tokens:
        """The tokens of a range; it cuts through text but never through a picture."""
        pieces, at = [], 0
        for segment in self.segments:
            low, high = max(start, at), min(stop, at + segment.length)
            if low < high:
                if high - low == segment.length:
                    pieces.append(segment)
                elif segment.grid is not None or segment.role == "image":
                    raise Refused("an image is cut in two")
                else:
                    name = f"{segment.name}[{low - at}:{high - at}]"
                    pieces.append(Segment(name, high - low, None, segment.role))
            at += segment.length
        return replace(self, segments=tuple(pieces))

    def __str__(self) -> str:
        return "[" + " | ".join(str(s) for s in self.segments) + "]"


@dataclass(frozen=True)
class Keys:
    """Tokens that attention sums over: the last dimension of its scores.

    Attributes:
        normal: whether softmax has made the scores add up to 1 over them.
    """

    tokens: Tokens
    normal: bool = False

    @property
    def size(self) -> int:
        """Size of the dimension."""
        return self.tokens.length

    def split(self, outer: int) -> tuple[Factors, Factors]:
        """Always refused."""
        raise Refused("a reshape that cuts the keys of attention")

    def cut(self, start: int, stop: int) -> Keys:
        """Always refused."""
        raise Refused("pieces of the keys of attention")

    def __str__(self) -> str:
        return f"keys {self.tokens}"


Factor = Plain | Axis | Tokens | Keys
Factors = tuple[Factor, ...]

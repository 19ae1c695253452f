"""Labels: what the dimensions of a value enumerate, and how they fold, split, join and meet.

A label is a product of factors, outermost first, so that nothing is lost where dimensions are
folded: in a video [B * F, H * W, C] the first is (batch, frames), the second image tokens, the
third plain.

Every row of a batch merges by its own pattern. An operator that mixes rows of tokens, or tokens,
is refused unless its rule says that it may, so a value that has tokens has all of their rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise
from math import prod

from toma_fx.analysis.factors import (
    AXES,
    FRAMES,
    HEIGHT,
    WIDTH,
    Axis,
    Factor,
    Factors,
    Keys,
    Plain,
    Refused,
    Segment,
    Tokens,
)
from toma_fx.methods.windows import Size


@dataclass(frozen=True)
class Label:
    """What one dimension enumerates: a product of factors, outermost first.

    A dimension of size 1 has none, unless it is one row of several.
    """

    factors: Factors = ()

    @cached_property
    def size(self) -> int:
        """Size of the dimension."""
        return prod(f.size for f in self.factors)

    @cached_property
    def tokens(self) -> Tokens | None:
        """The tokens among the factors; those that attention sums over don't count."""
        return next((f for f in self.factors if isinstance(f, Tokens)), None)

    @cached_property
    def keys(self) -> Keys | None:
        """The keys of attention among the factors."""
        return next((f for f in self.factors if isinstance(f, Keys)), None)

    @cached_property
    def positions(self) -> Tokens | None:
        """Tokens or keys."""
        return self.tokens or (self.keys.tokens if self.keys else None)

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """Axes of the input among the factors."""
        return tuple(f for f in self.factors if isinstance(f, Axis))

    @cached_property
    def is_plain(self) -> bool:
        """Whether the dimension enumerates neither positions nor rows."""
        return all(isinstance(f, Plain) for f in self.factors)

    @cached_property
    def is_product(self) -> bool:
        """Whether tokens, or keys, share the dimension with something else."""
        return self.positions is not None and len(self.factors) > 1

    def cut(self, start: int, stop: int) -> Label:
        """The label of a range."""
        if (start, stop) == (0, self.size) or self.is_plain:
            return self if stop - start == self.size else plain(stop - start)
        first, inner = self.factors[0], prod(f.size for f in self.factors[1:])
        if start % inner or stop % inner:
            raise Refused("a range that ends within a row or a token")
        return Label((first.cut(start // inner, stop // inner), *self.factors[1:]))

    def without_shares(self) -> Label:
        """The label with keys of any weights, not of shares."""
        if not (self.keys and self.keys.normal):
            return self
        return Label(tuple(Keys(f.tokens) if isinstance(f, Keys) else f for f in self.factors))

    def times(self, factor: Plain, *, outer: bool) -> Label:
        """The label of a dimension that repeats."""
        return fold([Label((factor,)), self] if outer else [self, Label((factor,))])

    def __str__(self) -> str:
        return " * ".join(map(str, self.factors)) or "1"


Layout = tuple[Label, ...]
Fact = Layout | tuple[Layout | None, ...] | None
"""Layout of a tensor, layouts of a tuple of tensors, or nothing known."""
ONE = Label()


@cache
def plain(size: int) -> Label:
    """The label of a dimension of features."""
    return Label((Plain(size),)) if size != 1 else ONE


@cache
def axis(name: str, size: int) -> Label:
    """The label of a dimension that enumerates an axis of the input."""
    return Label((Axis.whole(name, size),)) if size != 1 else ONE


def tokens(*segments: Segment) -> Label:
    """The label of a dimension that enumerates tokens."""
    return Label((Tokens(segments),))


def fold(labels: Sequence[Label], name: str = "") -> Label:
    """The label of one dimension made of several.

    Height and width, with or without frames before them, become the image tokens `name`, and so do
    frames and the tokens of each frame.

    Raises:
        Refused: two of them have tokens, or keys.
    """
    shape = [x for x in labels if x.factors]
    if name and len(shape) > 1 and (grid := find_grid(shape)):
        return tokens(Segment(name, prod(grid), grid, "image"))
    out: list[Factor] = []
    for factor in (f for label in shape for f in label.factors):
        last = out[-1] if out else None
        joined: Factor | None = None
        if isinstance(last, Plain) and isinstance(factor, Plain):
            joined = Plain(last.size * factor.size)
        elif isinstance(last, Axis) and isinstance(factor, Axis):
            joined = last.then(factor)
        if joined is not None:
            out[-1] = joined
        else:
            out.append(factor)
    if sum(isinstance(f, (Tokens, Keys)) for f in out) > 1:
        raise Refused("two token axes are folded into one dimension")
    return Label(tuple(out))


def find_grid(labels: Sequence[Label]) -> Size | None:
    """The token grid that dimensions span, one side each; patches may lie within a side."""
    if not all(label.factors for label in labels) or not labels:
        return None
    *frames, last = labels
    image = last.tokens.segments if last.tokens and len(last.factors) == 1 else ()
    if len(image) == 1 and image[0].role == "image" and len(image[0].grid or ()) == 2:
        if len(frames) == 1 and _side(frames[0]) == FRAMES:
            return (frames[0].size, *(image[0].grid or ()))
        return None
    names = tuple(_side(label) for label in labels)
    return tuple(x.size for x in labels) if names in (AXES[1:], AXES[2:]) else None


def _side(label: Label) -> str:
    """The side that a dimension enumerates, but for features within it; "" if none."""
    first, *rest = label.factors
    if not isinstance(first, Axis) or not all(isinstance(f, Plain) for f in rest):
        return ""
    if first.is_whole or first.name in (HEIGHT, WIDTH):  # a part of a picture is one
        return first.name
    return ""


def split(label: Label, sizes: Sequence[int], name: str = "") -> list[Label]:
    """The labels of several dimensions made of one, the first of them the outermost.

    Raises:
        Refused: a boundary lies where the label can't be split.
    """
    rest, out = list(label.factors), []
    for size in sizes:
        parts: list[Factor] = []
        while size > 1:
            factor = rest.pop(0)
            if size % factor.size == 0:
                size //= factor.size
                parts.append(factor)
            elif factor.size % size == 0:
                outer, inner = factor.split(size)
                parts += outer
                rest, size = [*inner, *rest], 1
            elif label.is_plain:
                return [plain(s) for s in sizes]
            else:
                raise Refused("a reshape that cuts across rows or tokens")
        out.append(fold([Label((f,)) for f in parts], name))
    if rest and out:
        out[-1] = fold([out[-1], Label(tuple(rest))])
    return out


def use_up(label: Label, names: Sequence[str]) -> Label:
    """The label without axes of these names: tokens stand for them, and the rest is features."""
    if not any(a.name in names for a in label.axes):
        return label
    used = (isinstance(f, Axis) and f.name in names for f in label.factors)
    pairs = zip(label.factors, used, strict=True)
    return fold([Label((Plain(f.size) if gone else f,)) for f, gone in pairs])


def join(labels: Sequence[Label]) -> Label | None:
    """The label of dimensions end to end, if they are ranges of one axis in order."""
    rests = {x.factors[1:] for x in labels}
    first = [x.factors[0] for x in labels if x.factors]
    if len(first) < len(labels) or len(rests) > 1:
        return None
    axes = [f for f in first if isinstance(f, Axis)]
    same = len({(a.name, a.stride, a.base) for a in axes}) == 1 and len(axes) == len(first)
    if not same or any(a.start + a.size != b.start for a, b in pairwise(axes)):
        return None
    size = sum(a.size for a in axes)
    return Label((replace(axes[0], size=size), *rests.pop()))


def meet(a: Label, b: Label) -> Label:
    """The label of a dimension of two operands that line up.

    Features, and tables that have no label, take that of the other.

    Raises:
        Refused: they enumerate different rows, or tokens meet rows.
    """
    if a == b or b.is_plain:
        return a
    if a.is_plain:
        return b
    left, right, out = list(a.factors), list(b.factors), list[Factor]()
    while left and right:
        x, y = left.pop(0), right.pop(0)
        size = min(x.size, y.size)
        x, more = _split_off(x, size)
        left = [*more, *left]
        y, more = _split_off(y, size)
        right = [*more, *right]
        out.append(_meet_factors(x, y))
    return fold([Label((f,)) for f in (*out, *left, *right)])


def _split_off(factor: Factor, size: int) -> tuple[Factor, Factors]:
    """A digit of this size of a factor, and what is left of it."""
    if factor.size == size:
        return factor, ()
    if not isinstance(factor, (Plain, Axis)) or not size or factor.size % size:
        raise Refused("axes of other sizes meet")
    (outer,), inner = factor.split(size)
    return outer, inner


def _meet_factors(x: Factor, y: Factor) -> Factor:
    if x == y or isinstance(y, Plain):
        return x
    if isinstance(x, Plain):
        return y
    if isinstance(x, Axis) and isinstance(y, Axis):
        raise Refused("different rows of the batch meet" if x.name == y.name else "two axes meet")
    if isinstance(x, Axis) or isinstance(y, Axis):
        raise Refused("a token axis meets a batch axis")
    if isinstance(x, Keys) and isinstance(y, Keys):
        return Keys(x.tokens, x.normal and y.normal)
    if isinstance(x, Keys) or isinstance(y, Keys):
        return x if isinstance(x, Keys) else y
    return y if y.rank > x.rank else x


# -- layouts --------------------------------------------------------------------------------------


def drop(layout: Layout, dims: Iterable[int]) -> Layout:
    """The layout without dimensions of one index; tokens remember which rows they are of."""
    gone = {d % len(layout) for d in dims}
    fixed = sort_axes(a for d in gone for a in layout[d].axes if a.size == 1)
    rest = tuple(label for d, label in enumerate(layout) if d not in gone)
    return tuple(_fix(label, fixed) for label in rest) if fixed else rest


def _fix(label: Label, axes: tuple[Axis, ...]) -> Label:
    def fix(tokens: Tokens) -> Tokens:
        return replace(tokens, fixed=sort_axes((*tokens.fixed, *axes)))

    factors: list[Factor] = []
    for factor in label.factors:
        if isinstance(factor, Keys):
            factor = replace(factor, tokens=fix(factor.tokens))
        factors.append(fix(factor) if isinstance(factor, Tokens) else factor)
    return Label(tuple(factors))


def is_tuple_fact(fact: Fact) -> bool:
    """Whether a fact describes a tuple of tensors and at least one of their layouts is known."""
    return bool(fact) and next((isinstance(f, tuple) for f in fact or () if f is not None), False)


def layout_of(fact: Fact) -> Layout | None:
    """The layout of a tensor; None for a tuple of tensors."""
    return None if is_tuple_fact(fact) else fact  # type: ignore[return-value]


def layouts_of(fact: Fact) -> tuple[Layout | None, ...]:
    """The layouts of a tuple of tensors, or of one tensor."""
    return fact if is_tuple_fact(fact) else (layout_of(fact),)  # type: ignore[return-value]


def token_dim(layout: Sequence[Label] | None) -> int | None:
    """The dimension that enumerates tokens, if there is one."""
    return next((d for d, label in enumerate(layout or ()) if label.tokens), None)


def tokens_of(layout: Sequence[Label] | None) -> Tokens | None:
    """The tokens of a layout, if there are any."""
    return next((label.tokens for label in layout or () if label.tokens), None)


def rows_of(layout: Layout | None) -> tuple[Axis, ...]:
    """Axes that number the rows of a value's tokens, in order, outermost digit first."""
    return sort_axes(a for label in layout or () for a in label.axes)


def sort_axes(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """Axes in the order in which they number the rows of tokens."""
    return tuple(sorted(axes, key=lambda a: (AXES.index(a.name), -a.stride)))


def names_axis(layout: Layout | None, name: str) -> bool:
    """Whether a value has an axis of the input, or a part of it."""
    return any(a.name == name for label in layout or () for a in label.axes)

"""Rules of operators that join or cut dimensions: cat, slice, split, stack, pad."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from toma_fx.analysis.factors import Axis, Refused, Segment, Tokens
from toma_fx.analysis.facts import Patch, Transfer
from toma_fx.analysis.labels import (
    Label,
    Layout,
    axis,
    join,
    plain,
    rows_of,
    tokens,
)
from toma_fx.analysis.rules.base import Call, carries_positions, rule
from toma_fx.analysis.rules.compute import broadcast, meet_all
from toma_fx.graph.nodes import JOINS, int_size, shape_of


def _cut(call: Call, what: str, layout: Layout, dim: int, start: int, stop: int) -> Layout:
    """The layout of a range of a dimension."""
    label = layout[dim]
    if (start, stop) == (0, label.size):
        return layout
    try:
        piece = label.cut(start, stop)
    except Refused:
        call.mix(what, layout, [dim])
        piece = plain(stop - start)
    return (*layout[:dim], piece, *layout[dim + 1 :])


@rule("chunk", "split", linear=True)
def chunk(call: Call) -> Transfer:
    """Equal pieces along another dimension."""
    layout = call.layout(call.arg(0))
    dim = call.arg(2, "dim", 0) % len(layout)
    if layout[dim].positions:
        raise Refused("equal pieces of the token axis")
    sizes = [int(v.shape[dim]) for v in call.node.meta["val"]]
    return Transfer(_split(call, layout, dim, sizes))


def _split(call: Call, layout: Layout, dim: int, sizes: Sequence[int]) -> tuple[Layout, ...]:
    """Layouts of pieces end to end."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    pairs = zip(sizes, ends, strict=True)
    return tuple(_cut(call, "pieces of", layout, dim, end - size, end) for size, end in pairs)


@rule("split_with_sizes", linear=True)
def split_with_sizes(call: Call) -> Transfer:
    """Pieces of literal sizes: along the token axis this separates text from image."""
    layout, literals = call.layout(call.arg(0)), call.arg(1)
    dim, sizes = call.arg(2, "dim", 0) % len(layout), [int_size(size) for size in literals]
    label = layout[dim]
    if not label.positions:
        return Transfer(_split(call, layout, dim, sizes))
    if label.tokens is None or label.is_product:
        raise Refused("pieces of a token axis")
    facts: list[Layout] = []
    patches, at = [], 0
    for i, size in enumerate(sizes):
        piece = label.tokens.cut(at, at + size)
        facts.append((*layout[:dim], Label((piece,)), *layout[dim + 1 :]))
        if isinstance(literals[i], int):
            patches.append(Patch((1, i), piece.segments))
        at += size
    return Transfer(tuple(facts), tuple(patches))


@rule("slice", "narrow", linear=True)
def slice_(call: Call) -> Layout | Transfer:
    """A range of one dimension."""
    layout = call.layout(call.arg(0))
    dim = call.arg(1, "dim", 0) % len(layout)
    label, size, step = layout[dim], shape_of(call.arg(0))[dim], call.arg(4, "step", 1)
    first, last = call.arg(2, "start") or 0, call.arg(3, "end")
    if isinstance(first, fx.Node) or isinstance(last, fx.Node):
        return _cut_by_data(call, layout, dim)
    if call.op == "aten.narrow":
        last = first + call.arg(3, "length")
    start = max(first + size, 0) if first < 0 else min(first, size)
    stop = size if last is None else max(last + size if last < 0 else min(last, size), start)
    if step != 1:
        call.mix("a stride over", layout, [dim])
        return (*layout[:dim], _resize_side(label, call.shape[dim]), *layout[dim + 1 :])
    if not label.positions:
        return _cut(call, "a range of", layout, dim, start, stop)
    if label.tokens is None or label.is_product or call.op == "aten.narrow":
        raise Refused("a range of a folded or narrowed token axis")
    piece = label.tokens.cut(start, stop)
    patches = tuple(
        _patch_bound(path, label.tokens, at, size, literal)
        for path, at, literal in ((2, start, first), (3, stop, last))
        if 0 < at < size
    )
    return Transfer((*layout[:dim], Label((piece,)), *layout[dim + 1 :]), patches)


def _patch_bound(path: int, label: Tokens, at: int, size: int, literal: int) -> Patch:
    """The bound of a range: the tokens before it, or if it is negative those behind it."""
    if literal >= 0:
        return Patch((path,), label.cut(0, at).segments)
    return Patch((path,), label.cut(at, size).segments, -1)


def _cut_by_data(call: Call, layout: Layout, dim: int) -> Layout:
    """A range that depends on the data: text without its padding is new text."""
    label, size = layout[dim], call.shape[dim]
    if label.positions and (label.tokens is None or label.is_product or label.tokens.names):
        raise Refused("a range of the token axis that depends on the data")
    if label.tokens:
        piece = tokens(Segment(call.name, size))
    else:
        call.mix("a range of", layout, [dim])
        piece = plain(size)
    return (*layout[:dim], piece, *layout[dim + 1 :])


@rule("slice_scatter")
def slice_scatter(call: Call) -> Transfer:
    """A write into a range of another dimension (rotary tables write even and odd features)."""
    operands, dim = call.tensors, call.arg(2, "dim", 0) % len(call.shape)
    for operand in operands:
        call.mix("a write into a range of", call.layout(operand), [dim])
    layouts = [call.layout(n) for n in operands]
    flat = [(*x[:dim], plain(call.shape[dim]), *x[dim + 1 :]) for x in layouts]
    return broadcast(call, operands, layouts=flat)


@rule(*JOINS)
def cat(call: Call) -> Layout | Transfer:
    """Concatenation joins segments along the token axis, and features along another."""
    operands = [n for n in call.arg(0) if shape_of(n) != (0,)]
    dim = call.arg(1, "dim", 0) % len(call.shape)
    layouts = [call.layout(n) for n in operands]
    if any(x[dim].positions for x in layouts):
        return _join_tokens(call, operands, layouts, dim)
    held = any(carries_positions(x) for x in layouts)
    labels = [x[dim] for x in layouts if x[dim].size]
    joined = join(labels)
    if joined is not None and held:
        return _join_rows(call, layouts, dim, joined)
    if held and any(label.axes for label in labels):
        raise Refused("batches of tokens are joined, or their rows in another order")
    size = call.shape[dim]
    label = joined if joined is not None and joined.size == size else plain(size)
    full = [(*x[:dim], label, *x[dim + 1 :]) for x in layouts]
    return broadcast(call, operands, layouts=full)


def _join_rows(call: Call, layouts: Sequence[Layout], dim: int, joined: Label) -> Layout:
    """Pieces of one batch, in order, are rows of that batch again."""
    out: list[Label] = []
    for d, column in enumerate(zip(*layouts, strict=True)):
        label = joined if d == dim else column[0]
        if d != dim and len(set(column)) > 1:
            label = _common_tokens(call, column, d)
        out.append(label)
    return tuple(out)


def _common_tokens(call: Call, labels: Sequence[Label], dim: int) -> Label:
    """The tokens of a batch whose rows have these; what differs between them is other tokens.

    Images of one size, one in each row, become one image with a batch.

    Raises:
        Refused: they are no tokens, or of more pictures than fit.
    """
    found = [label.tokens for label in labels if label.tokens and not label.is_product]
    if len(found) < len(labels):
        raise Refused("rows with different axes are joined")
    size, segments = call.shape[dim], list[Segment]()
    for column in zip(*(x.segments for x in found), strict=False):
        first = column[0]
        if len(set(column)) > 1:
            if first.grid is None or len({(s.grid, s.length, s.heights) for s in column}) > 1:
                break
            first = replace(first, name=call.name)
        segments.append(first)
    rest = size - sum(s.length for s in segments)
    if rest < 0:
        raise Refused("rows with different tokens are joined")
    if rest:
        segments.append(Segment(f"{call.name}/rest", rest))
    return tokens(*segments)


def _join_tokens(
    call: Call, operands: Sequence[fx.Node], layouts: Sequence[Layout], dim: int
) -> Layout:
    segments: list[Segment] = []
    fixed: set[tuple[Axis, ...]] = set()
    for operand, layout in zip(operands, layouts, strict=True):
        label = layout[dim]
        if not label.size:
            continue
        if label.keys or label.is_product or label.axes:
            raise Refused("scores or folded tokens are joined")
        if label.tokens:
            fixed.add(label.tokens.fixed)
            segments.extend(label.tokens.segments)
        else:
            segments.append(Segment(operand.name, label.size))
    if len({s.name for s in segments}) < len(segments):
        raise Refused("the same tokens occur twice in one sequence")
    if len(fixed) > 1:
        raise Refused("rows of the batch are joined end to end")
    others = [(*x[:dim], *x[dim + 1 :]) for x in layouts]
    shape = [*call.shape[:dim], *call.shape[dim + 1 :]]
    rows = meet_all(others, shape)
    for operand, layout in zip(operands, layouts, strict=True):
        found = layout[dim].tokens
        content = found and any(s.role != "other" for s in found.segments)
        if content and rows_of(layout) != rows_of(rows):
            raise Refused(f"the batch elements of {operand.name} may have been mixed")
    label = Label((Tokens(tuple(segments), *fixed),))
    return (*rows[:dim], label, *rows[dim:])


@rule("pad_sequence")
def pad_sequence(call: Call) -> Transfer:
    """Rows of different length become a batch."""
    if not call.arg(1, "batch_first", False) or call.arg(3, "padding_side", "right") != "right":
        raise Refused("sequences padded in another way")
    return _stack_rows(call, [call.layout(x) for x in call.arg(0)])


def _stack_rows(call: Call, layouts: Sequence[Layout]) -> Transfer:
    """Rows (tokens first) along a new batch dimension, in the order of the batch."""
    label = _common_tokens(call, [x[0] for x in layouts], 1)
    fixed = [x[0].tokens.fixed if x[0].tokens else () for x in layouts]
    if not any(fixed):  # pictures that were made one by one are a new batch
        rows: Label | None = Label((Axis.whole("batch", len(layouts)),))
    elif all(len(axes) == 1 for axes in fixed):
        rows = join([Label(axes) for axes in fixed])
    else:
        rows = None
    if rows is None:
        raise Refused("rows of the batch are joined in another order")
    rest = tuple(plain(size) for size in call.shape[2:])
    return Transfer((rows, label, *rest), needs_all_tokens="rows are made a batch")


@rule("stack")
def stack(call: Call) -> Layout | Transfer:
    """Stacking along a new dimension."""
    layouts = [call.layout(x) for x in call.arg(0)]
    dim = call.arg(1, "dim", 0) % len(call.shape)
    first = layouts[0][0].tokens if layouts[0] else None
    if first and first.fixed and dim == 0:
        return _stack_rows(call, layouts)
    known = layouts[0]
    if any(x != known for x in layouts):
        if any(carries_positions(x) for x in layouts):
            raise Refused("values with different axes are stacked")
        known = meet_all(layouts, [label.size for label in known])
    return (*known[:dim], plain(len(layouts)), *known[dim:])


@rule("constant_pad_nd", "pad")
def pad(call: Call) -> Layout:
    """Padding (pairs of widths count from the last dimension); of tokens it is other tokens."""
    layout, widths = call.layout(call.arg(0)), call.arg(1)
    labels = list(layout)
    for i in range(len(widths) // 2):
        d = len(layout) - 1 - i
        before, after = (int_size(w) for w in widths[2 * i : 2 * i + 2])
        if not before and not after:
            continue
        label, copied = layout[d], call.arg(2, "mode", "constant") != "constant"
        alone = label.tokens if not label.is_product else None
        if alone is None or before < 0 or after < 0 or copied or alone.fixed:
            call.mix("padding of", layout, [d])
            labels[d] = _resize_side(label, call.shape[d])
            continue
        around = [Segment(f"{call.name}/{n}", w) for n, w in (("a", before), ("b", after)) if w]
        front = around[:1] if before else []
        labels[d] = tokens(*front, *alone.segments, *around[len(front) :])
    return tuple(labels)


def _resize_side(label: Label, size: int) -> Label:
    """A picture with a margin, without one, or every other of its rows, is a picture."""
    (only,) = label.factors if len(label.factors) == 1 else (None,)
    return axis(only.name, size) if isinstance(only, Axis) and only.is_whole else plain(size)


@rule("outer")
def outer(call: Call) -> Layout:
    """Outer product of two vectors."""
    return (*call.layout(call.arg(0)), *call.layout(call.arg(1)))

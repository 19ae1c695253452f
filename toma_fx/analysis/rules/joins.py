"""Transfer rules of operators that join or cut dimensions: cat, slice, split, stack, einsum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import fx

from toma_fx.analysis.facts import Patch, Transfer
from toma_fx.analysis.labels import (
    BATCH,
    Flat,
    Keys,
    Label,
    Layout,
    Row,
    Segment,
    Tokens,
    is_batch,
    tokens_of,
)
from toma_fx.analysis.rules.base import NOTHING, Call, Outcome, rule
from toma_fx.analysis.rules.compute import broadcast
from toma_fx.graph.nodes import JOINS, int_size, shape_of


@rule("chunk", "split")
def chunk(call: Call) -> Outcome:
    """Equal pieces along another dimension."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    dim = call.arg(2, "dim", 0) % len(layout)
    pieces = [int(v.shape[dim]) for v in call.node.meta["val"]]
    if _cuts_rows(layout[dim], pieces):
        return Transfer(_split_rows(layout, dim, shape_of(call.node.args[0])[dim], pieces))
    refused = call.reject_mixing("equal pieces of", layout, [dim])
    return refused or Transfer((_drop_label(layout, dim),) * len(pieces))


def _cuts_rows(label: Label, pieces: Sequence[int]) -> bool:
    """Whether pieces of these sizes are full rows of a batch."""
    return is_batch(label) and all(piece % label.times == 0 for piece in pieces)


def _split_rows(layout: Layout, dim: int, size: int, pieces: Sequence[int]) -> tuple[Layout, ...]:
    """Layouts of pieces of a batch, end to end from its first row."""
    label = layout[dim]
    assert is_batch(label)
    start, _, total = label.rows(size)
    out = []
    for piece in pieces:
        stop = start + piece // label.times
        out.append((*layout[:dim], label.part(start, stop, total), *layout[dim + 1 :]))
        start = stop
    return tuple(out)


def _drop_label(layout: Layout, dim: int) -> Layout:
    """The layout after cutting `dim`, whose label no longer describes all of it."""
    return tuple(None if d == dim else label for d, label in enumerate(layout))


def _cut(tokens: Tokens, start: int, end: int) -> tuple[Segment, ...] | None:
    """Segments of [start, end), cutting through text but never through an image."""
    pieces, at = [], 0
    for segment in tokens.segments:
        low, high = max(start, at), min(end, at + segment.length)
        if low < high:
            if high - low == segment.length:
                pieces.append(segment)
            elif segment.grid is not None or segment.role == "image":
                return None
            else:
                name = f"{segment.name}[{low - at}:{high - at}]"
                pieces.append(Segment(name, high - low, None, segment.role))
        at += segment.length
    return tuple(pieces)


def _cut_before(tokens: Tokens, position: int) -> tuple[Segment, ...]:
    """Segments left of `position`, the last one shortened to end there."""
    return _cut(tokens, 0, position) or ()


@rule("split_with_sizes")
def split_with_sizes(call: Call) -> Outcome:
    """Pieces of literal sizes: along the token axis this separates text from image."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    literals: Any = call.node.args[1]
    dim = call.arg(2, "dim", 0) % len(layout)
    tokens, sizes = layout[dim], [int_size(size) for size in literals]
    if _cuts_rows(tokens, sizes):
        return Transfer(_split_rows(layout, dim, shape_of(call.node.args[0])[dim], sizes))
    if isinstance(tokens, (Keys, Flat)):
        return call.reject("pieces of a token axis")
    if not isinstance(tokens, Tokens):
        refused = call.reject_mixing("pieces of", layout, [dim])
        return refused or Transfer((_drop_label(layout, dim),) * len(sizes))
    facts: list[Layout] = []
    patches, at = [], 0
    for i, size in enumerate(sizes):
        piece = _cut(tokens, at, at + size)
        if piece is None:
            return call.reject("an image is cut in two")
        facts.append((*layout[:dim], Tokens(piece), *layout[dim + 1 :]))
        if isinstance(literals[i], int):
            patches.append(Patch((1, i), piece))
        at += size
    return Transfer(tuple(facts), tuple(patches))


def _cut_by_data(call: Call, layout: Layout, dim: int) -> Outcome:
    """A range that depends on the data: text without its padding is new text."""
    label = layout[dim]
    if isinstance(label, Tokens):
        if type(label) is not Tokens or any(s.grid for s in label.segments):
            return call.reject("a range of the token axis that depends on the data")
        label = Tokens((Segment(call.name, shape_of(call.node)[dim]),))
    elif refused := call.reject_mixing("a range of", layout, [dim]):
        return refused
    else:
        label = None
    return Transfer((*layout[:dim], label, *layout[dim + 1 :]))


@rule("slice", "narrow")
def slice_(call: Call) -> Outcome:
    """A range of one dimension."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    dim = call.arg(1, "dim", 0) % len(layout)
    tokens = layout[dim]
    size = shape_of(call.node.args[0])[dim]
    start, end = call.arg(2, "start") or 0, call.arg(3, "end")
    if isinstance(start, fx.Node) or isinstance(end, fx.Node):
        return _cut_by_data(call, layout, dim)
    if call.op == "aten.narrow":
        end = start + call.arg(3, "length")
    bounds = start, end
    start = start + size if start < 0 else min(start, size)
    end = size if end is None else (end + size if end < 0 else min(end, size))
    if not isinstance(tokens, Tokens):
        if end - start == size and call.arg(4, "step", 1) == 1:
            return Transfer(layout)
        if _cuts_rows(tokens, (start, end - start)) and call.arg(4, "step", 1) == 1:
            return Transfer(_split_rows(layout, dim, size, (start, end - start))[1])
        return call.reject_mixing("a range of", layout, [dim]) or Transfer(_drop_label(layout, dim))
    plain = type(tokens) in (Tokens, Row) and call.op != "aten.narrow"
    if call.arg(4, "step", 1) != 1 or not plain:
        return call.reject("a strided or narrowed token axis")
    piece = _cut(tokens, start, end)
    if piece is None:
        return call.reject("an image is cut in two")
    patches = [
        _patch_bound(path, tokens, at, size, literal)
        for path, at, literal in ((2, start, bounds[0]), (3, end, bounds[1]))
        if 0 < at < size
    ]
    label = replace(tokens, segments=piece)
    return Transfer((*layout[:dim], label, *layout[dim + 1 :]), tuple(patches))


def _patch_bound(path: int, tokens: Tokens, at: int, size: int, literal: int) -> Patch:
    """The bound of a range: the tokens before it, or if it is negative those behind it."""
    if literal >= 0:
        return Patch((path,), _cut_before(tokens, at))
    return Patch((path,), _cut(tokens, at, size) or (), -1)


@rule("slice_scatter")
def slice_scatter(call: Call) -> Outcome:
    """A write into a range of another dimension (rotary tables write even and odd features)."""
    operands = call.node.all_input_nodes
    dim = call.arg(2, "dim", 0) % len(shape_of(call.node))
    for operand in operands:
        layout = call.layout(operand)
        refused = layout and call.reject_mixing("a write into a range of", layout, [dim])
        if refused:
            return refused
    return broadcast(call, operands)


@rule(*JOINS)
def cat(call: Call) -> Outcome:
    """Concatenation joins segments along the token axis, and features along another."""
    operands: Any = call.node.args[0]
    layouts = [call.layout(x) for x in operands]
    known = [x for x in layouts if x is not None]
    if not known:
        return NOTHING
    dim = call.arg(1, "dim", 0) % len(shape_of(call.node))
    if any(isinstance(x[dim], Tokens) for x in known):
        return _join(call, operands, layouts, dim)
    if all(tokens_of(x) is None for x in known):
        return Transfer(_drop_label(known[0], dim))
    if any(is_batch(x[dim]) and tokens_of(x) is not None for x in known):
        return _join_rows(call, layouts, dim)
    return broadcast(call, operands)


def _join_rows(call: Call, layouts: list[Layout | None], dim: int) -> Outcome:
    """Pieces of one batch, in order, are rows of that batch again."""
    spans, labels = [], []
    for layout in layouts:
        label = layout[dim] if layout is not None else None
        if not is_batch(label) or label.span is None:
            return call.reject("batches of tokens are joined")
        labels.append(label)
        spans.append(label.span)
    if any(a[1] != b[0] or a[2] != b[2] for a, b in pairwise(spans)):
        return call.reject("rows of the batch are joined in another order")
    if len({label.times for label in labels}) > 1:
        return call.reject("batches of tokens are joined")
    joined: list[Label] = []
    for d, column in enumerate(zip(*(x for x in layouts if x is not None), strict=True)):
        if d == dim:
            joined.append(labels[0].part(spans[0][0], spans[-1][1], spans[0][2]))
        elif len(set(column)) == 1:
            joined.append(column[0])
        elif not (tokens := _common_tokens(call, column, d)):
            return call.reject("rows with different axes are joined")
        else:
            joined.append(tokens)
    return Transfer(tuple(joined))


def _common_tokens(call: Call, labels: Sequence[Label], dim: int) -> Tokens | None:
    """The tokens of a batch whose rows have these; what differs between them is other tokens.

    Images of one size, one in each row, become one image with a batch.
    """
    size, segments = shape_of(call.node)[dim], list[Segment]()
    if not all(isinstance(label, Tokens) for label in labels):
        return None
    sequences = (label.segments for label in labels if isinstance(label, Tokens))
    for column in zip(*sequences, strict=False):
        first = column[0]
        if len(set(column)) > 1:
            if first.grid is None or len({(s.grid, s.length, s.heights) for s in column}) > 1:
                break
            first = replace(first, name=call.name)
        segments.append(first)
    rest = size - sum(s.length for s in segments)
    if rest:
        segments.append(Segment(f"{call.name}/rest", rest))
    return Tokens(tuple(segments)) if rest >= 0 else None


def _join(call: Call, operands: Any, layouts: list[Layout | None], dim: int) -> Outcome:
    segments: list[Segment] = []
    rows: set[int] = set()
    labels: list[Label] = [None] * len(shape_of(call.node))
    for operand, layout in zip(operands, layouts, strict=True):
        label = layout[dim] if layout is not None else None
        if not shape_of(operand)[dim]:
            continue
        if isinstance(label, (Keys, Flat)):
            return call.reject("scores or flattened tokens are joined")
        if isinstance(label, Row):
            rows.add(label.row)
        if isinstance(label, Tokens):
            segments.extend(label.segments)
        else:
            segments.append(Segment(operand.name, shape_of(operand)[dim]))
        for d, other in enumerate(layout or ()):
            labels[d] = other if labels[d] is None else labels[d]
    if len({s.name for s in segments}) < len(segments):
        return call.reject("the same tokens occur twice in one sequence")
    if len(rows) > 1:
        return call.reject("rows of the batch are joined end to end")
    labels[dim] = Row(tuple(segments), *rows) if rows else Tokens(tuple(segments))
    for operand, layout in zip(operands, layouts, strict=True):
        if layout is None or not isinstance(layout[dim], Tokens) or BATCH not in labels:
            continue
        if layout[labels.index(BATCH)] != BATCH:
            return call.reject(f"the batch elements of {operand.name} may have been mixed")
    return Transfer(tuple(labels))


@rule("pad_sequence")
def pad_sequence(call: Call) -> Outcome:
    """Rows of different length become a batch."""
    operands: Any = call.node.args[0]
    layouts = [call.layout(x) for x in operands]
    if all(tokens_of(x) is None for x in layouts):
        return NOTHING
    if not call.arg(1, "batch_first", False) or call.arg(3, "padding_side", "right") != "right":
        return call.reject("sequences padded in another way")
    return _stack_rows(call, layouts)


def _stack_rows(call: Call, layouts: Sequence[Layout | None]) -> Outcome:
    """Rows (tokens first) along a new batch dimension, in the order of the batch."""
    first = [x[0] if x else None for x in layouts]
    rows = [label.row for label in first if isinstance(label, Row)]
    tokens = _common_tokens(call, first, 1)
    if tokens is None or (rows and rows != list(range(len(first)))):
        return call.reject("rows of the batch are joined in another order")
    rest = (None,) * (len(shape_of(call.node)) - 2)
    return Transfer((BATCH, tokens, *rest), needs_all_tokens="rows are made a batch")


@rule("stack")
def stack(call: Call) -> Outcome:
    """Stacking along a new dimension."""
    operands: Any = call.node.args[0]
    layouts = [call.layout(x) for x in operands]
    known = next((x for x in layouts if x is not None), None)
    if known is None:
        return NOTHING
    if isinstance(known[0], Row) and call.arg(1, "dim", 0) == 0:
        return _stack_rows(call, layouts)
    if any(x != known for x in layouts):
        return call.reject("values with different axes are stacked")
    labels = list(known)
    labels.insert(call.arg(1, "dim", 0) % (len(known) + 1), None)
    return Transfer(tuple(labels))


@rule("constant_pad_nd", "pad")
def pad(call: Call) -> Outcome:
    """Padding (pairs of widths count from the last dimension); of tokens it is other tokens."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    widths: Any = call.node.args[1]
    labels = list(layout)
    for i in range(len(widths) // 2):
        label, (before, after) = layout[-1 - i], (int_size(w) for w in widths[2 * i : 2 * i + 2])
        if not before and not after:
            continue
        copied = call.arg(2, "mode", "constant") in ("reflect", "replicate", "circular")
        if (
            is_batch(label)
            or isinstance(label, (Keys, Flat))
            or before < 0
            or after < 0
            or (copied and isinstance(label, Tokens))
        ):
            return call.reject("padding of the token axis or its batch")
        if isinstance(label, Tokens):
            around = [Segment(f"{call.name}/{n}", w) for n, w in (("a", before), ("b", after)) if w]
            front = around[:1] if before else []
            joined = (*front, *label.segments, *around[len(front) :])
            labels[len(layout) - 1 - i] = Tokens(joined)
    return Transfer(tuple(labels))


@rule("outer")
def outer(call: Call) -> Outcome:
    """Outer product of two vectors."""
    a, b = (call.layout(x) for x in call.node.args[:2])
    if a is None and b is None:
        return NOTHING
    return Transfer(((a or (None,))[0], (b or (None,))[0]))


@rule("einsum")
def einsum(call: Call) -> Outcome:
    """A sum of products by letters: each keeps its axis; tokens and their batch stay unsummed."""
    equation, operands = str(call.node.args[0]).replace(" ", ""), call.node.all_input_nodes
    inputs, arrow, output = equation.partition("->")
    letters = inputs.split(",")
    layouts = [call.layout(x) for x in operands]
    if all(layout is None for layout in layouts):
        return NOTHING
    repeated = any(len(set(word)) < len(word) for word in (*letters, output))
    if not arrow or "." in equation or repeated or len(operands) != len(letters):
        return call.reject("an einsum of this form")
    labels: dict[str, Label] = {}
    shares: set[str] = set()
    for word, layout in zip(letters, layouts, strict=True):
        for letter, label in zip(word, layout or [None] * len(word), strict=True):
            known = labels.setdefault(letter, label)
            if isinstance(known, Keys) and known.normal and label == Tokens(known.segments):
                shares.add(letter)  # softmax has made the sum over keys an average
            elif known != label:
                return call.reject(f"different axes meet in {letter!r}")
    for letter, label in labels.items():
        if letter in output or letter in shares:
            continue
        if isinstance(label, Tokens) or is_batch(label):
            return call.reject("a sum over the token axis or its batch")
    output_labels = [labels[letter] for letter in output]
    token_axes = sum(isinstance(label, Tokens) for label in output_labels)
    last = output_labels[-1] if output_labels else None
    if token_axes == 2 and isinstance(last, Tokens) and output[-1] in letters[-1]:
        output_labels[-1] = Keys(last.segments)
    elif token_axes > 1:
        return call.reject("two token axes in one value")
    return Transfer(tuple(output_labels))

"""Rules of ops that move dimensions around: reshapes, cuts, joins, padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from toma_fx.analysis.facts import Patch, Rejected, Transfer
from toma_fx.analysis.labels import (
    BATCH,
    FRAMES,
    HEIGHT,
    SPATIAL,
    WIDTH,
    Batch,
    Flat,
    Label,
    Layout,
    Row,
    Segment,
    Tokens,
    is_batch,
    tokens_of,
)
from toma_fx.analysis.rules.base import NOTHING, Call, Outcome, rule
from toma_fx.graph.nodes import RESHAPES, shape_of
from toma_fx.methods.windows import Size

FOLDS = (
    [HEIGHT, WIDTH],
    [FRAMES, HEIGHT, WIDTH],
    # channels last: the input was read as [batch, frames, frames, height, width]
    [FRAMES, FRAMES, HEIGHT],
    [FRAMES, HEIGHT],
)
"""Dimensions that together enumerate the tokens of a picture or video."""
ROWS_SEPARATED = "rows of the batch are taken apart"
Groups = list[tuple[tuple[int, ...], tuple[int, ...]]]
"""Dimensions (before, after) of a reshape that depend on each other alone."""


def regroup(source: Sequence[int], target: Sequence[int]) -> Groups:
    """Finest independent groups of dimensions of a row-major reshape, as (in dims, out dims).

    [2, 256, 64] -> [2, 256, 4, 16] gives ((0,),(0,)), ((1,),(1,)), ((2,),(2,3)). Sizes of 1 pair up
    where both sides have one and stand alone otherwise. Sizes that depend on the data match their
    like; what can't be matched is one group.
    """
    groups: Groups = []
    i = j = 0
    while i < len(source) or j < len(target):
        if i == len(source) or (j < len(target) and target[j] == 1 != source[i]):
            groups.append(((), (j,)))
            j += 1
            continue
        if j == len(target) or (source[i] == 1 != target[j]):
            groups.append(((i,), ()))
            i += 1
            continue
        a, b, left, right = i + 1, j + 1, source[i], target[j]
        while left != right:
            if a == len(source) if left < right else b == len(target):
                a, b = len(source), len(target)
                break
            if left < right:
                left *= source[a]
                a += 1
            else:
                right *= target[b]
                b += 1
        groups.append((tuple(range(i, a)), tuple(range(j, b))))
        i, j = a, b
    return groups


def _reshape(call: Call, layout: Layout, sizes_at: int | None) -> Outcome:
    """Layout after a row-major reshape; `sizes_at`: argument that holds the literal sizes."""
    source, target = shape_of(call.node.args[0]), shape_of(call.node)
    labels: list[Label] = [None] * len(target)
    sizes, needs_all = call.node.args[sizes_at] if sizes_at is not None else None, ""
    for ins, outs in regroup(source, target):
        group = _regroup_labels(call, layout, ins, [target[d] for d in outs])
        if isinstance(group, Rejected):
            return group
        for d, label in zip(outs, group, strict=True):
            labels[d] = label
        if len(outs) > 1 and isinstance(layout[ins[0]], Tokens) and tokens_of(tuple(group)) is None:
            needs_all = "tokens are laid out as a spatial grid"
    _keep_batch_of_one(layout, regroup(source, target), labels)
    patches = []
    for d, label in enumerate(labels):
        literal = sizes[d] if isinstance(sizes, (list, tuple)) else -1
        if isinstance(label, Tokens) and literal != -1 and isinstance(literal, int):
            assert sizes_at is not None
            patches.append(_make_patch((sizes_at, d), label))
    return Transfer(tuple(labels), tuple(patches), needs_all_tokens=needs_all)


def _keep_batch_of_one(layout: Layout, groups: Groups, labels: list[Label]) -> None:
    """[1, N, C] -> [N, C] folds a batch of 1 with the tokens, and -> [1, N, C] takes it out."""
    removed = any(not outs and layout[ins[0]] == BATCH for ins, outs in groups)
    for d, label in enumerate(labels):
        if removed and BATCH not in labels and type(label) is Tokens:
            labels[d] = Flat(label.segments, 1)
    for ins, outs in groups:
        label = labels[outs[0] + 1] if not ins and outs[0] + 1 < len(labels) else None
        if isinstance(label, Flat) and label.rows == 1:
            labels[outs[0]], labels[outs[0] + 1] = BATCH, Tokens(label.segments)


def _make_patch(path: tuple[int, ...], label: Tokens) -> Patch:
    return Patch(path, label.segments, label.rows if isinstance(label, Flat) else 1)


def _regroup_labels(
    call: Call, layout: Layout, ins: Sequence[int], target: Sequence[int]
) -> Sequence[Label] | Rejected:
    """The labels of the dimensions of sizes `target` that are made of the dimensions `ins`."""
    inside, source = [layout[d] for d in ins], shape_of(call.node.args[0])
    if not target:
        return []
    if len(target) == 1:
        label = _fold(call, layout, ins)
        return label if isinstance(label, Rejected) else [label]
    if len(inside) == 1:
        return _unfold(call, inside[0], source[ins[0]], target)
    if any(isinstance(label, Tokens) for label in inside):
        return call.reject("a reshape that folds the token axis with others")
    first, rows = inside[0], source[ins[0]]
    if is_batch(first) and first.times == 1 and not any(inside[1:]) and not target[0] % rows:
        # heads out of the features and into the batch at once
        return [Batch(first.span, target[0] // rows), *[None] * (len(target) - 1)]
    return [None] * len(target)


def _fold(call: Call, layout: Layout, ins: Sequence[int]) -> Label | Rejected:
    """The label of one dimension made of several."""
    inside, sizes = [layout[d] for d in ins], [shape_of(call.node.args[0])[d] for d in ins]
    if len(inside) <= 1:
        return inside[0] if inside else None
    if inside in FOLDS:
        return _image_tokens(call, sizes)
    first, last, plain = inside[0], inside[-1], not any(inside[1:])
    if len(inside) == 2 and type(last) is Tokens:
        if first == FRAMES and (grid := _image_grid(last)) is not None:
            return _image_tokens(call, (sizes[0], *grid))
        if first == BATCH:
            return Flat(last.segments, sizes[0])
    if len(inside) == 2 and type(first) is Tokens and last == BATCH:
        return Flat(first.segments, sizes[1], outer=True)
    if any(isinstance(label, Tokens) for label in inside):
        return call.reject("a reshape that folds the token axis with others")
    if inside == [BATCH, FRAMES]:
        return BATCH
    if is_batch(first) and first.times == 1 and plain:
        return Batch(first.span, math.prod(sizes[1:]))
    if is_batch(first) and tokens_of(layout) is not None:
        return call.reject("the batch of tokens is folded with another axis")
    return first if first in SPATIAL and plain else None


def _image_tokens(call: Call, grid: Sequence[int]) -> Tokens:
    return Tokens((Segment(call.name, math.prod(grid), tuple(grid), "image"),))


def _image_grid(tokens: Tokens) -> Size | None:
    """(H, W) if the tokens are one image folded from a spatial grid."""
    (only, *others) = tokens.segments
    single = not others and only.role == "image" and only.grid is not None and len(only.grid) == 2
    return only.grid if single else None


def _unfold(
    call: Call, label: Label, size: int, sizes: Sequence[int]
) -> Sequence[Label] | Rejected:
    """The labels of several dimensions made of one of `size`; the first is the outermost."""
    rest = [None] * (len(sizes) - 1)
    if isinstance(label, Flat):
        tokens = Tokens(label.segments)
        if not label.outer and list(sizes) == [label.rows, size // label.rows]:
            return [BATCH, tokens]
        if label.outer and list(sizes) == [size // label.rows, label.rows]:
            return [tokens, BATCH]
    if isinstance(label, Tokens):
        if len(label.segments) == 1 and label.segments[0].grid == tuple(sizes):
            return SPATIAL[-len(sizes) :]
        return call.reject("a reshape that cuts the token axis")
    if is_batch(label) and sizes[0] * label.times == size:
        return [Batch(label.span), *rest]
    if label == BATCH:
        return [BATCH, FRAMES, *rest[1:]]
    return [label if label in SPATIAL else None, *rest]


@rule(*RESHAPES)
def view(call: Call) -> Outcome:
    """Reshapes: labels follow the groups of dimensions that stay together."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    return _reshape(call, layout, 1)


@rule("flatten", "unflatten")
def flatten(call: Call) -> Outcome:
    """Reshapes that name dimensions, not all sizes; their literals never hold a token axis."""
    layout = call.layout(call.node.args[0])
    return NOTHING if layout is None else _reshape(call, layout, None)


@rule("expand")
def expand(call: Call) -> Outcome:
    """Broadcast to literal sizes."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    sizes: Any = call.node.args[1]
    source, shift = shape_of(call.node.args[0]), len(sizes) - len(layout)
    labels: list[Label] = [None] * shift + list(layout)
    patches = []
    for d, label in enumerate(layout):
        literal = sizes[d + shift]
        if isinstance(label, Tokens) and source[d] != 1 and isinstance(literal, int):
            if literal == -1:
                continue
            patches.append(_make_patch((1, d + shift), label))
    return Transfer(tuple(labels), tuple(patches))


@rule("repeat")
def repeat(call: Call) -> Outcome:
    """Tiling of other dimensions."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    times: Any = call.node.args[1]
    labels: list[Label] = [None] * (len(times) - len(layout)) + list(layout)
    for d, label in enumerate(labels):
        if times[d] != 1 and (isinstance(label, Tokens) or is_batch(label)):
            return call.reject("repetition of the token axis or its batch")
    return Transfer(tuple(labels))


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Outcome:
    """Repetition of elements along another dimension; each row of a batch may become several."""
    layout, dim = call.layout(call.node.args[0]), call.arg(2, "dim")
    if layout is None:
        return NOTHING
    if dim is None:
        return call.reject("repetition of the token axis")
    label, times = layout[dim], call.arg(1, "repeats")
    if is_batch(label) and isinstance(times, int):
        rows = Batch(label.span, label.times * times)
        return Transfer((*layout[:dim], rows, *layout[dim + 1 :]))
    return call.reject_mixing("repetition of", layout, [dim]) or Transfer(layout)


@rule("permute")
def permute(call: Call) -> Outcome:
    """Reordering of dimensions."""
    layout = call.layout(call.node.args[0])
    dims: Any = call.node.args[1]
    return NOTHING if layout is None else Transfer(tuple(layout[d] for d in dims))


@rule("transpose", "swapaxes", "swapdims", "t", "mT")
def transpose(call: Call) -> Outcome:
    """Swap of two dimensions."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    args: Any = call.node.args
    dims = {"aten.t": (0, 1), "aten.mT": (-2, -1)}.get(call.op)
    a, b = dims if dims is not None else (args[1], args[2])
    labels = list(layout)
    if len(labels) > 1:
        labels[a], labels[b] = labels[b], labels[a]
    return Transfer(tuple(labels))


@rule("unsqueeze")
def unsqueeze(call: Call) -> Outcome:
    """A new dimension of size 1."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    dim: Any = call.node.args[1]
    labels = list(layout)
    labels.insert(dim % (len(layout) + 1), None)
    return Transfer(tuple(labels))


@rule("squeeze")
def squeeze(call: Call) -> Outcome:
    """Removal of dimensions of size 1."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    shape = shape_of(call.node.args[0])
    dims = call.arg(1, "dim", list(range(len(shape))))
    dims = [dims] if isinstance(dims, int) else dims
    removed = {d % len(shape) for d in dims if shape[d] == 1}
    if any(isinstance(layout[d], Tokens) for d in removed):
        return call.reject("a token axis of one token is dropped")
    return Transfer(tuple(label for d, label in enumerate(layout) if d not in removed))


@rule("select")
def select(call: Call) -> Outcome:
    """One index of another dimension."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    dim, index = call.arg(1, "dim", 0) % len(layout), call.arg(2, "index")
    if layout[dim] == BATCH and tokens_of(layout) is not None and isinstance(index, int):
        return Transfer(_take_row(layout, dim, index), needs_all_tokens=ROWS_SEPARATED)
    return call.reject_mixing("selection of one index of", layout, [dim]) or Transfer(
        layout[:dim] + layout[dim + 1 :]
    )


def _take_row(layout: Layout, dim: int, row: int) -> Layout:
    """The layout of one row of a batch; the batch dimension goes."""
    labels = [Row(x.segments, row) if type(x) is Tokens else x for x in layout]
    return (*labels[:dim], *labels[dim + 1 :])


@rule("unbind")
def unbind(call: Call) -> Outcome:
    """All indices of another dimension."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    dim = call.arg(1, "dim", 0) % len(layout)
    size = shape_of(call.node.args[0])[dim]
    if layout[dim] == BATCH and tokens_of(layout) is not None:
        rows = tuple(_take_row(layout, dim, i) for i in range(size))
        return Transfer(rows, needs_all_tokens=ROWS_SEPARATED)
    refused = call.reject_mixing("unbinding of", layout, [dim])
    return refused or Transfer((layout[:dim] + layout[dim + 1 :],) * size)


@rule("view_as_complex")
def view_as_complex(call: Call) -> Outcome:
    """Pairs along the last dimension become one complex number."""
    layout = call.layout(call.node.args[0])
    return NOTHING if layout is None else Transfer(layout[:-1])


@rule("view_as_real")
def view_as_real(call: Call) -> Outcome:
    """One complex number becomes a pair along a new last dimension."""
    layout = call.layout(call.node.args[0])
    return NOTHING if layout is None else Transfer((*layout, None))

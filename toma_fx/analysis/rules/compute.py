"""Rules of ops that compute: element-wise, linear maps, norms, reductions, copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from toma_fx.analysis.factors import FRAMES, HEIGHT, WIDTH, Refused
from toma_fx.analysis.facts import Positional, Transfer
from toma_fx.analysis.labels import (
    ONE,
    Label,
    Layout,
    axis,
    drop,
    meet,
    plain,
    rows_of,
    use_up,
)
from toma_fx.analysis.rules.base import Call, carries_positions, carries_tokens, rule
from toma_fx.graph.nodes import CASTS, CONVOLUTIONS, COPIES, REDUCTIONS, UNKNOWN, op_name, shape_of

# -- element-wise ---------------------------------------------------------------------------------


@rule("clip", "expand_as", "full_like", "zeros_like", "ones_like", "empty_like", "copy", "fill")
@rule("zero", "hardswish", "rsub", "polar", "floor_divide", "__and__")
def pointwise(call: Call) -> Transfer:
    """Element-wise ops keep every axis; operands broadcast from the right."""
    operands = call.tensors
    transfer = broadcast(call, operands, additive=call.op in ("aten.add", "aten.sub"))
    layout: Layout = transfer.fact  # type: ignore[assignment]
    if any(x.keys and x.keys.normal for x in layout) and not _stays_average(call):
        return replace(transfer, fact=tuple(label.without_shares() for label in layout))
    return transfer


def _stays_average(call: Call) -> bool:
    """Whether shares of the keys stay shares: (1 - p) @ v counts the keys, (g * p) @ v does not."""
    operands = [n for n in call.node.args if isinstance(n, fx.Node)]  # one may be used twice
    shares = [n for n in operands if any(label.keys for label in call.layout(n))]
    if call.op in ("aten.add", "aten.sub"):  # differential attention
        return len(shares) == 2
    if call.op in ("aten.where", "aten.masked_fill"):  # some are dropped
        parts = call.node.args[1:3] if call.op == "aten.where" else call.node.args[0::2]
        return all(x in shares or _is_zero(x) for x in parts)
    if len(shares) != 1 or call.node.kwargs.get("rounding_mode"):
        return False
    return call.op == "aten.mul" or (call.op == "aten.div" and operands[0] in shares)


def _is_zero(value: object) -> bool:
    """Whether an argument is zero, or a node that makes zeros."""
    if not isinstance(value, fx.Node):
        return isinstance(value, (int, float)) and value == 0
    op, first = op_name(value.target), value.args[0] if value.args else None
    return op in ("aten.zeros", "aten.zeros_like") or (
        op == "aten.scalar_tensor" and _is_zero(first)
    )


def broadcast(
    call: Call,
    operands: Sequence[fx.Node],
    *,
    additive: bool = False,
    layouts: Sequence[Layout] | None = None,
) -> Transfer:
    """Labels of a broadcast result, with the operands that are positional to its token axis.

    `layouts` are what the operands have in the result, if an op changes that before.
    """
    labels = meet_all(layouts or [call.layout(n) for n in operands], call.shape)
    scores = any(label.keys for label in labels)
    positionals, needs_all = find_positionals(call, operands, labels, additive and not scores)
    return Transfer(labels, positionals=positionals, needs_all_tokens=needs_all)


def meet_all(layouts: Sequence[Layout], shape: Sequence[int], *, strict: bool = False) -> Layout:
    """The layout of a value of `shape` that operands broadcast to.

    It is about the tokens of the operand with a picture, if there is one. Those that hold the same
    tokens, or if it is `strict` all, must agree on what each dimension is; what the others are
    tells where theirs is plain.

    Raises:
        Refused: different tokens, or rows of tokens, meet.
    """
    ranks = [max((x.positions.rank for x in each if x.positions), default=-1) for each in layouts]
    held = max(ranks, default=-1)
    names = names_of(layouts[ranks.index(held)]) if held >= 0 else set[str]()
    own = [not names.isdisjoint(names_of(each)) for each in layouts]
    labels = [plain(size) for size in shape]
    for holds, layout in sorted(zip(own, layouts, strict=True), key=lambda x: not x[0]):
        if held >= 0 and not holds:  # of a picture whose tokens are others
            layout = tuple(use_up(label, (HEIGHT, WIDTH)) for label in layout)
        for d, label in enumerate(layout, len(shape) - len(layout)):
            if label.size == 1 != shape[d]:
                continue
            try:
                labels[d] = meet(labels[d], label)
            except Refused:
                if strict or holds:
                    raise
    if held >= 0:
        check_rows([x for x, holds in zip(layouts, own, strict=True) if holds], labels)
    return tuple(labels)


def names_of(layout: Layout) -> set[str]:
    """Names of the segments that a layout has."""
    return {s.name for x in layout if x.positions for s in x.positions.segments}


def pictures_of(layout: Layout) -> frozenset[str]:
    """Names of the pictures that a layout has tokens, or keys, of."""
    return frozenset(name for x in layout if x.positions for name in x.positions.names)


def check_rows(layouts: Sequence[Layout], labels: Sequence[Label]) -> None:
    """Each row of the batch has one place, the same in all that hold these tokens."""
    if sum(bool(x.tokens) for x in labels) > 1 or sum(bool(x.keys) for x in labels) > 1:
        raise Refused("two token axes in one value")
    axes = rows_of(tuple(labels))
    if len({(a.name, a.stride) for a in axes}) < len(axes):
        raise Refused("different rows of the batch meet")
    for layout in layouts:
        rows = rows_of(layout)
        if rows and rows != axes:
            raise Refused("tokens whose batch elements may have been mixed")


def find_positionals(
    call: Call, operands: Sequence[fx.Node], labels: Layout, additive: bool = False
) -> tuple[tuple[Positional, ...], str]:
    """Operands that line up with a token axis of `labels` without carrying it themselves.

    Returns:
        The operands, and why the op must see all tokens, if it must.
    """
    positionals, needs_all = [], ""
    for operand in operands:
        own, shift = call.layout(operand), len(labels) - len(shape_of(operand))
        for dim, label in enumerate(labels):
            tokens = label.positions
            if tokens is None or dim < shift or own[dim - shift].size == 1 != label.size:
                continue
            mine = own[dim - shift].positions
            if mine is not None and mine.segments == tokens.segments:
                if mine.fixed != tokens.fixed:
                    raise Refused("different rows of the batch meet")
                continue
            names = pictures_of(own) & tokens.names
            lost = mine.names & pictures_of(labels) if mine else None
            if names or lost:
                raise Refused("the same tokens meet in another order")
            if tokens.length >= UNKNOWN:
                needs_all = "a table over as many tokens as the data says"
            else:
                positionals.append(Positional(operand.name, labels, dim, additive))
    return tuple(positionals), needs_all


# -- linear maps ----------------------------------------------------------------------------------


@rule("linear")
def linear(call: Call) -> Layout:
    """A linear map over the last dimension treats every token alike."""
    x, *weights = call.node.all_input_nodes
    if any(carries_tokens(call.fact(weight)) for weight in weights):
        raise Refused("a matrix product over token axes")
    layout = call.layout(x)
    call.mix("a linear map over", layout, [-1])
    return (*layout[:-1], plain(call.shape[-1]))


@rule(*CONVOLUTIONS, "conv_transpose2d", seeds=True)
def convolution(call: Call) -> Layout:
    """Convolutions work on a spatial grid; their output may be folded into tokens."""
    if carries_positions(call.layout(call.arg(0))):
        raise Refused("a convolution over the token axis")
    return _label_picture(call)


@rule(
    "upsample_nearest3d",
    "upsample_trilinear3d",
    "avg_pool3d",
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "_upsample_bicubic2d_aa",
    "_upsample_nearest_exact2d",
    "max_pool2d",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "pixel_shuffle",
    "pixel_unshuffle",
    seeds=True,
)
def spatial(call: Call) -> Layout:
    """Resampling of a spatial grid yields a spatial grid."""
    if carries_positions(call.layout(call.arg(0))):
        raise Refused("spatial resampling of a token axis")
    return _label_picture(call)


def _label_picture(call: Call) -> Layout:
    """[batch, channels, (frames,) height, width]; what is known of the batch stays."""
    shape = call.shape
    names = {4: (HEIGHT, WIDTH), 5: (FRAMES, HEIGHT, WIDTH)}.get(len(shape))
    if names is None:
        return tuple(plain(size) for size in shape)
    rows = call.layout(call.arg(0))[0]
    batch = axis("batch", shape[0]) if rows.is_plain else rows
    sides = (axis(*side) for side in zip(names, shape[2:], strict=True))
    return (batch, plain(shape[1]), *sides)


# -- norms and reductions -------------------------------------------------------------------------


@rule("layer_norm", "rms_norm")
def norm(call: Call) -> Layout:
    """Normalization over the last dimensions keeps the token axis."""
    layout, count = call.layout(call.arg(0)), len(call.arg(1))
    call.mix("normalization over", layout, range(-count, 0))
    return (*layout[:-count], *map(plain, call.shape[-count:]))


@rule("_native_batch_norm_legit_no_training")
def frozen_norm(call: Call) -> Transfer:
    """Normalization by kept statistics, which are its other results."""
    layout = call.layout(call.arg(0))
    if any(label.positions for label in layout[1:2]):
        raise Refused("tokens lie along the channels of a normalization")
    return Transfer((layout, None, None))


@rule("group_norm", "batch_norm", "instance_norm")
def spatial_norm(call: Call) -> Layout | Transfer:
    """Statistics over positions: fine on a spatial grid, mixing on tokens."""
    layout = call.layout(call.arg(0))
    if not carries_positions(layout):
        return layout
    if any(label.positions for label in layout[1:2]):
        raise Refused("tokens lie along the channels of a normalization")
    if call.op == "aten.batch_norm" and not call.arg(5):
        return layout
    if layout[0].positions or call.op == "aten.batch_norm":
        raise Refused("normalization statistics over the token axis")
    return Transfer(layout, needs_all_tokens="normalization statistics over the token axis")


@rule("log_softmax", "cumsum", "flip", "roll")
def scan(call: Call) -> Layout:
    """Ops along some dimensions that keep the shape."""
    layout = call.layout(call.arg(0))
    dims = call.arg(2, "dims", []) if call.op == "aten.roll" else call.arg(1, "dim")
    dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    call.mix("an op along", layout, dims or range(len(layout)))
    return layout


@rule("sum", "mean", linear=True)
@rule(*REDUCTIONS - {"aten.sum", "aten.mean"})
def reduction(call: Call) -> Transfer:
    """Reductions over other dimensions keep the token axis; a sum over tokens counts them."""
    layout = call.layout(call.arg(0))
    dims = call.arg(2 if call.op == "aten.linalg_vector_norm" else 1, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    every = not isinstance(dims, (list, tuple)) or not dims
    reduced = set(range(len(layout))) if every else {d % len(layout) for d in dims}
    counted = [count_tokens(call.arg(0), layout, d) for d in reduced if call.op == "aten.sum"]
    counted = [c for c in counted if c]
    call.mix("a reduction over", layout, reduced - {c.dim for c in counted if c})
    kept = [x if x.size == 1 and not x.positions else ONE for x in layout]
    result = tuple(kept[d] if d in reduced else label for d, label in enumerate(layout))
    if len(call.shape) < len(layout):
        result = drop(result, reduced)
    return Transfer(result, counted=tuple(c for c in counted if c))


def count_tokens(operand: fx.Node, layout: Layout, dim: int) -> Positional | None:
    """How often each token of an operand counts in a sum over them; None if there are none."""
    label = layout[dim]
    if label.tokens is None or label.is_product or label.tokens.length >= UNKNOWN:
        return None
    if not operand.meta["val"].is_floating_point():  # a merged token may count 1.5 times
        return None
    return Positional(operand.name, layout, dim)


# -- ops that keep the shape ----------------------------------------------------------------------


@rule(*COPIES, *CASTS, linear=True)
def copy(call: Call) -> Layout:
    """Copies and casts."""
    return call.layout(call.arg(0))


@rule("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def dropout(call: Call) -> Layout:
    """Dropout in training mode: other tokens draw other numbers. (A capture has no other.)"""
    layout = call.layout(call.arg(0))
    if carries_positions(layout):
        raise Refused("active dropout")
    return layout

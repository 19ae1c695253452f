"""Rules of ops that compute: element-wise, linear maps, norms, reductions, copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from toma_fx.analysis.facts import Positional, Transfer
from toma_fx.analysis.labels import (
    BATCH,
    FRAMES,
    HEIGHT,
    SPATIAL,
    WIDTH,
    Flat,
    Keys,
    Label,
    Layout,
    Tokens,
    is_batch,
    layout_of,
    token_dim,
    tokens_of,
)
from toma_fx.analysis.rules.base import NOTHING, Call, Outcome, carries_tokens, rule
from toma_fx.graph.nodes import CASTS, CONVOLUTIONS, COPIES, REDUCTIONS, UNKNOWN, shape_of

# -- element-wise ---------------------------------------------------------------------------------


@rule("clip", "expand_as", "full_like", "zeros_like", "ones_like", "empty_like", "copy")
def pointwise(call: Call) -> Outcome:
    """Element-wise ops keep every axis; operands broadcast from the right."""
    operands = [n for n in call.node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    outcome = broadcast(call, operands, additive=call.op in ("aten.add", "aten.sub"))
    layout = layout_of(outcome.fact) if isinstance(outcome, Transfer) else None
    last = layout[-1] if layout else None
    if isinstance(last, Keys) and last.normal and not _stays_average(call, operands):
        assert isinstance(outcome, Transfer)
        return replace(outcome, fact=(*(layout or ())[:-1], Keys(last.segments)))
    return outcome


def _stays_average(call: Call, operands: Sequence[fx.Node]) -> bool:
    """Whether shares of the keys stay shares: (1 - p) @ v counts the keys, (g * p) @ v does not."""
    shares = [n for n in operands if isinstance((call.layout(n) or (None,))[-1], Keys)]
    if call.op in ("aten.add", "aten.sub"):  # differential attention
        return len(shares) == 2
    scaled = call.op == "aten.mul" or (call.op == "aten.div" and operands[0] in shares)
    return call.op in ("aten.where", "aten.masked_fill") or (scaled and len(shares) == 1)


def broadcast(call: Call, operands: Sequence[fx.Node], *, additive: bool = False) -> Outcome:
    """Labels of a broadcast result, with the operands that are positional to its token axis."""
    out_shape = shape_of(call.node)
    rank = len(out_shape)
    labels: list[Label] = [None] * rank
    rows_differ = False
    for operand in operands:
        layout, shape = call.layout(operand), shape_of(operand)
        if layout is None:
            continue
        shift = rank - len(shape)
        for d, label in enumerate(layout):
            if label is None or (shape[d] == 1 and out_shape[d + shift] != 1):
                continue
            current = labels[d + shift]
            if current is None or _has_priority(label, current):
                labels[d + shift] = label
            elif isinstance(label, Tokens) != isinstance(current, Tokens) and (
                is_batch(label) or is_batch(current)
            ):
                return call.reject("a token axis meets a batch axis")
            elif is_batch(label) and is_batch(current) and label != current:
                rows_differ = True
            elif isinstance(label, Tokens) and current in SPATIAL:
                labels[d + shift] = label
    scores = isinstance(labels[-1], Keys) if labels else False
    if sum(isinstance(label, Tokens) for label in labels) > 1 + scores:
        return call.reject("two token axes in one value")
    if rows_differ and token_dim(tuple(labels)) is not None:
        return call.reject("different rows of the batch meet")
    if _loses_batch(call, operands, labels):
        return call.reject("tokens whose batch elements may have been mixed")
    positionals, needs_all = [], ""
    for operand in operands:
        for dim, label in enumerate(labels):
            if not isinstance(label, Tokens):
                continue
            positional = _match_positional(
                call, operand, tuple(labels), dim, additive and not scores
            )
            if positional is None:
                continue
            if _holds_tokens(call, operand, label):
                return call.reject("the same tokens meet in another order")
            if isinstance(label, Flat):
                needs_all = "a table over positions in the batch"
            elif label.length >= UNKNOWN:
                needs_all = "a table over as many tokens as the data says"
            elif positional.batch or FRAMES in labels:
                needs_all = "a table whose batch is not its first dimension"
            elif BATCH not in labels and _is_content(positional.tokens):
                needs_all = "a table over tokens whose batch is folded into another axis"
            else:
                positionals.append(positional)
    return Transfer(tuple(labels), positionals=tuple(positionals), needs_all_tokens=needs_all)


def _holds_tokens(call: Call, operand: fx.Node, tokens: Tokens) -> bool:
    """Whether an operand holds some of these tokens itself, laid out otherwise."""
    names = {s.name for s in tokens.segments if s.grid}
    labels = (x for x in call.layout(operand) or () if isinstance(x, Tokens))
    return any(s.name in names for x in labels for s in x.segments)


def _is_content(tokens: Tokens) -> bool:
    return any(s.role in ("image", "sequence") for s in tokens.segments)


def _loses_batch(call: Call, operands: Sequence[fx.Node], labels: Sequence[Label]) -> bool:
    """Whether an operand carries the result's tokens but no longer its batch."""
    at = next((d for d, label in enumerate(labels) if label == BATCH), None)
    dim = token_dim(tuple(labels))
    if at is None or dim is None or shape_of(call.node)[at] == 1:
        return False
    for operand in operands:
        layout, shift = call.layout(operand), len(labels) - len(shape_of(operand))
        if layout is None or dim < shift or layout[dim - shift] != labels[dim]:
            continue
        content = isinstance(label := labels[dim], Tokens) and _is_content(label)
        label_there = layout[at - shift] if at >= shift else None
        if content and label_there != BATCH:
            return True
    return False


def _is_same(label: Label, tokens: Tokens) -> bool:
    """Whether a label is about these tokens; scores before and after softmax are."""
    if isinstance(label, Keys) and isinstance(tokens, Keys):
        return label.segments == tokens.segments
    return label == tokens


def _has_priority(label: Label, other: Label) -> bool:
    """Token content outranks position ids: the result of q * cos(ids) is about q's tokens."""

    def rank(value: Label) -> int:
        if not isinstance(value, Tokens):
            return 0
        return 1 + any(s.role in ("image", "sequence") for s in value.segments)

    return rank(label) > rank(other) > 0


def _match_positional(
    call: Call, operand: fx.Node, labels: Layout, dim: int, additive: bool
) -> Positional | None:
    """How `operand` lines up with the token axis `dim` of `labels` without carrying it itself."""
    tokens, shape = labels[dim], shape_of(operand)
    assert isinstance(tokens, Tokens)
    shift = len(labels) - len(shape)
    operand_dim = dim - shift
    if operand_dim < 0 or shape[operand_dim] == 1:
        return None
    layout = call.layout(operand)
    if layout is not None and _is_same(layout[operand_dim], tokens):
        return None
    at = next((d for d, label in enumerate(labels) if label == BATCH), None)
    batch = at - shift if at is not None and at >= shift else None
    lead = 0 if at is None else max(0, shift - at)
    return Positional(operand.name, operand_dim, tokens, batch, lead, additive)


# -- linear maps ----------------------------------------------------------------------------------


@rule("linear")
def linear(call: Call) -> Outcome:
    """A linear map over the last dimension treats every token alike."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    if isinstance(layout[-1], Tokens):
        return call.reject("a linear map over the token axis")
    return Transfer((*layout[:-1], None))


@rule(*CONVOLUTIONS, "conv_transpose2d")
def convolution(call: Call) -> Outcome:
    """Convolutions work on a spatial grid; their output may be folded into tokens."""
    if tokens_of(call.layout(call.node.args[0])) is not None:
        return call.reject("a convolution over the token axis")
    return _spatial(call)


@rule(
    "upsample_nearest3d",
    "upsample_trilinear3d",
    "avg_pool3d",
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "_upsample_nearest_exact2d",
    "max_pool2d",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "pixel_shuffle",
    "pixel_unshuffle",
)
def spatial(call: Call) -> Outcome:
    """Resampling of a spatial grid yields a spatial grid."""
    if tokens_of(call.layout(call.node.args[0])) is not None:
        return call.reject("spatial resampling of a token axis")
    return _spatial(call)


def _spatial(call: Call) -> Transfer:
    rank = len(shape_of(call.node))
    spatial_dims = {4: (HEIGHT, WIDTH), 5: (FRAMES, HEIGHT, WIDTH)}.get(rank)
    return Transfer((BATCH, None, *spatial_dims)) if spatial_dims else NOTHING


# -- norms and reductions -------------------------------------------------------------------------


@rule("layer_norm", "rms_norm")
def norm(call: Call) -> Outcome:
    """Normalization over the last dimensions keeps the token axis."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    sizes: Any = call.node.args[1]
    count = len(sizes)
    if any(isinstance(label, Tokens) for label in layout[len(layout) - count :]):
        return call.reject("normalization over the token axis")
    # what it mixes is no batch (or frames) of tokens any more
    return Transfer((*layout[: len(layout) - count], *(None,) * count))


@rule("group_norm", "batch_norm", "instance_norm")
def spatial_norm(call: Call) -> Outcome:
    """Statistics over positions: fine on a spatial grid, mixing on tokens."""
    layout = call.layout(call.node.args[0])
    if tokens_of(layout) is None:
        return Transfer(layout)
    if layout is not None and is_batch(layout[0]) and not isinstance(layout[1], Tokens):
        return Transfer(layout, needs_all_tokens="normalization statistics over the token axis")
    return call.reject("normalization statistics over the token axis")


@rule("log_softmax", "cumsum", "flip")
def scan(call: Call) -> Outcome:
    """Ops along some dimensions that keep the shape."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    dims = call.arg(1, "dim")
    if not isinstance(dims, (list, tuple)):
        dims = [dims]
    return call.reject_mixing("a reduction over", layout, dims) or Transfer(layout)


@rule(*REDUCTIONS)
def reduction(call: Call) -> Outcome:
    """Reductions over other dimensions keep the token axis."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    at = 2 if call.op == "aten.linalg_vector_norm" else 1
    dims = call.arg(at, "dim")
    every = range(len(layout))
    if isinstance(dims, int):
        dims = [dims]
    reduced = (
        set(every)
        if not isinstance(dims, (list, tuple)) or not dims
        else {d % len(layout) for d in dims}
    )
    refused = call.reject_mixing("a reduction over", layout, reduced)
    if refused:
        return refused
    if len(shape_of(call.node)) == len(layout):
        return Transfer(tuple(None if d in reduced else layout[d] for d in every))
    return Transfer(tuple(layout[d] for d in every if d not in reduced))


# -- ops that keep the shape ----------------------------------------------------------------------


@rule(*COPIES, *CASTS)
def copy(call: Call) -> Outcome:
    """Copies and casts."""
    return Transfer(call.fact(call.node.args[0]))


@rule("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def dropout(call: Call) -> Outcome:
    """Dropout in training mode: other tokens draw other numbers. (A capture has no other.)"""
    if carries_tokens(call.fact(call.node.args[0])):
        return call.reject("active dropout")
    return Transfer(call.fact(call.node.args[0]))

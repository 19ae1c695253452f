"""Rules of linear layers that compute in integers or in float8, as torchao writes them.

    scale = choose_qparams(x) -> quantize(x, scale) -> product with the packed weight -> * scale

Layers that only keep their weights in fewer bits need none of these. A scale for each token is
fine; one found over all tokens changes with the tokens that are merged, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from toma_fx.analysis.facts import Rejected, Transfer
from toma_fx.analysis.labels import Label, Layout, Tokens, is_batch, tokens_of
from toma_fx.analysis.rules.attention import matmul
from toma_fx.analysis.rules.base import (
    NOTHING,
    RULES,
    Call,
    Outcome,
    carries_tokens,
    rule,
    tokenwise_rule,
)
from toma_fx.graph.nodes import PACKED, shape_of


@rule("_int_mm")
def integer_product(call: Call) -> Outcome:
    """A product of integers, x [N, C] @ weight."""
    return matmul(call)


@rule("_scaled_mm")
def scaled_product(call: Call) -> Outcome:
    """(x * scale) @ (weight * scale) in float8: each row of x has a scale, or all share one."""
    x, _, scale = call.node.args[:3]
    layout = call.layout(x)
    others = [n for n in call.node.all_input_nodes if n not in (x, scale)]
    if any(carries_tokens(call.fact(n)) for n in others):
        return call.reject("a matrix product over token axes")
    if layout is None:
        return call.reject("scales of tokens") if tokens_of(call.layout(scale)) else NOTHING
    if isinstance(layout[-1], Tokens):
        return call.reject("a matrix product over the token axis")
    return _check_scale(call, layout, scale) or Transfer((*layout[:-1], None))


def choose_scales(call: Call) -> Outcome:
    """Scales and zero points, one for each block of the input: [B, N, C] -> [B, N, 1] twice."""
    layout, blocks = call.layout(call.node.args[0]), call.arg(2, "block_size")
    if layout is None:
        return NOTHING
    labels = _label_scales(call, layout, blocks, bool(call.arg(9, "keepdim", False)))
    return labels if isinstance(labels, Rejected) else Transfer((labels, labels))


def choose_scale(call: Call) -> Outcome:
    """One scale for each block of the input, of as many dimensions: [B, N, C] -> [B, N, 1]."""
    layout, blocks = call.layout(call.node.args[0]), call.arg(1, "block_size")
    if layout is None:
        return NOTHING
    refused = _check_blocks(call, layout, blocks)
    labels = tuple(x if b == 1 else None for x, b in zip(layout, blocks, strict=True))
    return refused or Transfer(labels)


def quantize(call: Call) -> Outcome:
    """Rounding to integers, or back, by the scale of each block."""
    arguments: Any = call.node.args
    x, blocks, *scales = arguments[:4]
    layout = call.layout(x)
    if layout is None:
        lost = any(carries_tokens(call.fact(scale)) for scale in scales)
        return call.reject("scales of tokens") if lost else NOTHING
    refused = _check_blocks(call, layout, blocks)
    for scale in scales:
        refused = refused or _check_scale(call, layout, scale)
    return refused or Transfer(layout)


def _check_blocks(call: Call, layout: Layout, blocks: Sequence[Any]) -> Rejected | None:
    return call.reject_mixing("one scale over", layout, [d for d, b in enumerate(blocks) if b != 1])


def _label_scales(
    call: Call, layout: Layout, blocks: Sequence[Any], keepdim: bool
) -> Layout | Rejected:
    """One entry for each block; without `keepdim` a dimension that is one block is gone."""
    labels: list[Label] = []
    for size, label, block in zip(shape_of(call.node.args[0]), layout, blocks, strict=True):
        if block == 1 or block != size or keepdim:
            labels.append(label if block == 1 else None)
    refused = _check_blocks(call, layout, blocks)
    if refused is None and len(labels) != call.node.meta["val"][0].dim():
        refused = call.reject("scales of an unknown shape")
    return refused or tuple(labels)


def _check_scale(call: Call, layout: Layout, scale: object) -> Rejected | None:
    """Refusal unless the scales are those of these very tokens, or one number."""
    if not isinstance(scale, torch.fx.Node) or not shape_of(scale) or set(shape_of(scale)) == {1}:
        return None
    axes, scale_axes = (
        [x for x in labels or () if isinstance(x, Tokens) or is_batch(x)]
        for labels in (layout, call.layout(scale))
    )
    if axes == scale_axes or not any(isinstance(x, Tokens) for x in (*axes, *scale_axes)):
        return None
    return call.reject("scales that are not of these tokens")


RULES.update(
    {
        **dict.fromkeys(PACKED, tokenwise_rule),
        "torchao.choose_qparams_affine": choose_scales,
        "torchao.choose_scale_float8": choose_scale,
        "torchao.quantize_affine": quantize,
        "torchao.dequantize_affine": quantize,
    }
)

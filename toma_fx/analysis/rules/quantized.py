"""Rules of linear layers that compute in integers or in float8, as torchao writes them.

    scale = choose_qparams(x) -> quantize(x, scale) -> product with the packed weight -> * scale

Layers that only keep their weights in fewer bits need none of these. A scale for each token is
fine; one found over all tokens changes with the tokens that are merged, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from toma_fx.analysis.factors import Refused
from toma_fx.analysis.facts import Transfer
from toma_fx.analysis.labels import ONE, Layout, plain
from toma_fx.analysis.rules.attention import matmul
from toma_fx.analysis.rules.base import (
    RULES,
    Call,
    carries_positions,
    carries_tokens,
    rule,
    tokenwise_rule,
)
from toma_fx.graph.nodes import LINEAR_LAYERS, PACKED, shape_of


@rule("_int_mm")
def integer_product(call: Call) -> Transfer:
    """A product of integers, x [N, C] @ weight."""
    return matmul(call)


@rule("_scaled_mm")
def scaled_product(call: Call) -> Layout:
    """(x * scale) @ (weight * scale) in float8: each row of x has a scale, or all share one."""
    x, _, scale = call.node.args[:3]
    layout = call.layout(x)
    others = [n for n in call.node.all_input_nodes if n not in (x, scale)]
    if any(carries_tokens(call.fact(n)) for n in others):
        raise Refused("a matrix product over token axes")
    call.mix("a matrix product over", layout, [-1])
    _check_scale(call, layout, scale)
    return (*layout[:-1], plain(call.shape[-1]))


def choose_scales(call: Call) -> Transfer:
    """Scales and zero points, one for each block of the input: [B, N, C] -> [B, N, 1] twice."""
    layout, blocks = call.layout(call.arg(0)), call.arg(2, "block_size")
    keepdim = bool(call.arg(9, "keepdim", False))
    sizes = shape_of(call.arg(0))
    _check_blocks(call, layout, blocks)
    # without `keepdim` a dimension that is one block is gone
    labels = tuple(
        label if block == 1 else plain(size // block)
        for size, label, block in zip(sizes, layout, blocks, strict=True)
        if block == 1 or block != size or keepdim
    )
    if len(labels) != call.node.meta["val"][0].dim():
        raise Refused("scales of an unknown shape")
    return Transfer((labels, labels))


def choose_scale(call: Call) -> Layout:
    """One scale for each block of the input, of as many dimensions: [B, N, C] -> [B, N, 1]."""
    layout, blocks = call.layout(call.arg(0)), call.arg(1, "block_size")
    _check_blocks(call, layout, blocks)
    full = [b if b > 0 else label.size for b, label in zip(blocks, layout, strict=True)]
    return tuple(
        label if b == 1 else (ONE if b == label.size else plain(label.size // b))
        for label, b in zip(layout, full, strict=True)
    )


def quantize(call: Call) -> Layout:
    """Rounding to integers, or back, by the scale of each block."""
    arguments: Any = call.node.args
    x, blocks, *scales = arguments[:4]
    layout = call.layout(x)
    _check_blocks(call, layout, blocks)
    for scale in scales:
        _check_scale(call, layout, scale)
    return layout


def _check_blocks(call: Call, layout: Layout, blocks: Sequence[Any]) -> None:
    call.mix("one scale over", layout, [d for d, b in enumerate(blocks) if b != 1])


def _check_scale(call: Call, layout: Layout, scale: object) -> None:
    """The scales are those of these very tokens, or one number."""
    if not isinstance(scale, torch.fx.Node) or not shape_of(scale) or set(shape_of(scale)) == {1}:
        return
    ours, theirs = ([x for x in each if not x.is_plain] for each in (layout, call.layout(scale)))
    if ours != theirs and (carries_positions(layout) or carries_positions(tuple(theirs))):
        raise Refused("scales that are not of these tokens")


RULES.update(
    {
        **dict.fromkeys((*PACKED, *LINEAR_LAYERS), tokenwise_rule),
        "torchao.choose_qparams_affine": choose_scales,
        "torchao.choose_scale_float8": choose_scale,
        "torchao.quantize_affine": quantize,
        "torchao.dequantize_affine": quantize,
    }
)

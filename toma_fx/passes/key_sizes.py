"""Snippet: attention that weighs merged keys by the number of tokens they stand for.

    softmax(q k^T / sqrt(d) + log s) v      ToMe, arXiv 2210.09461: proportional attention

s is the size of each merged key, and 1 for keys that did not merge, such as those of text: a merged
key then draws as much attention as all tokens of its group would, were they alike.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from toma_fx.graph.nodes import argument
from toma_fx.graph.rewriter import Rewriter
from toma_fx.methods.sharded import Sharded
from toma_fx.passes.snippets import PatternNodes, Span

Biases = dict[tuple[object, ...], fx.Node]
"""What is added to the scores, by what it depends on."""


def weigh_keys(
    rewriter: Rewriter, site: fx.Node, span: Span, pattern: PatternNodes, known: Biases
) -> None:
    """Add the logarithms of key sizes to the scores of one attention, and to a mask that it has.

    Args:
        site: the fused attention, its keys merged already.
        span: where the image lies among the keys.
        known: added to; sites of one pattern share what is added to their scores.
    """
    query, key = site.args[:2]
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    bias = _bias(rewriter, query, key, span, pattern, known)
    mask = argument(site, 3, "attn_mask", None)
    if isinstance(mask, fx.Node):
        with rewriter.after(mask, bias):
            (bias,) = rewriter.splice("add_key_sizes", _add_to_mask, [mask, bias])
    rewriter.set_operand(site, 3, "attn_mask", bias)


def _bias(
    rewriter: Rewriter,
    query: fx.Node,
    key: fx.Node,
    span: Span,
    pattern: PatternNodes,
    known: Biases,
) -> fx.Node:
    """log(size) of every key, 0 outside the image: [B, 1, ..., 1, keys]."""
    like: Tensor = query.meta["val"]
    setting, dtype, device, rank = pattern.setting, like.dtype, like.device, like.dim()
    # a method without a pattern makes its sizes anew at each attention
    anchors = list(pattern.nodes) or [key]
    identity = (setting, span, dtype, device, rank, tuple(n.name for n in anchors))

    def bias(*parts: Tensor) -> Tensor:
        named = pattern.named(parts) if pattern.nodes else {}
        sizes = (setting.key_sizes if isinstance(setting, Sharded) else setting.sizes)(named)
        added = (sizes if sizes.device == device else sizes.to(device)).log()
        if span != Span(0, 0):
            added = F.pad(added, (span.before, span.after))
        added = added if added.dtype == dtype else added.to(dtype)
        return added.view(added.shape[0], *[1] * (rank - 2), added.shape[1])

    if identity not in known:
        with rewriter.after(*anchors):
            key_of_trace = ("key_sizes", *identity[:-1])
            (known[identity],) = rewriter.splice(
                key_of_trace, bias, anchors, as_call=setting.dynamic
            )
    return known[identity]


def _add_to_mask(mask: Tensor, bias: Tensor) -> Tensor:
    """A mask that adds: of truth values, what they exclude stays excluded."""
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, bias.new_full((), float("-inf")))
    return mask + bias

"""Rules of attention: fused, or as a product, a softmax and a product."""

from __future__ import annotations

from typing import Any

from torch import fx

from toma_fx.analysis.facts import Positional, Transfer
from toma_fx.analysis.labels import (
    BATCH,
    FRAMES,
    Flat,
    Keys,
    Label,
    Layout,
    Tokens,
    is_batch,
    token_dim,
    tokens_of,
)
from toma_fx.analysis.rules.base import NOTHING, Call, Outcome, rule
from toma_fx.graph.nodes import SOFTMAX, UNKNOWN, shape_of


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Outcome:
    """Attention mixes tokens but returns the query's axis. [..., heads, tokens, width]."""
    query, key, value = call.node.args[:3]
    q, k, v = call.layout(query), call.layout(key), call.layout(value)
    mask, causal = call.arg(3, "attn_mask"), call.arg(5, "is_causal", False)
    for name, layout in (("query", q), ("key", k), ("value", v)):
        if layout is not None and isinstance(layout[-1], Tokens):
            return call.reject(f"tokens lie along the width of the {name}")
    if k is not None and v is not None and not _same_tokens(k[-2], v[-2]):
        return call.reject("keys and values come from different tokens")
    for layout in (k, v):
        if q is not None and layout is not None and q[0] != layout[0] and _share_tokens(q, layout):
            return call.reject("queries and keys are batched differently")
    outer = token_dim(q)
    if outer is None and any(
        x is not None and token_dim(x) not in (None, len(x) - 2) for x in (k, v)
    ):
        return call.reject("keys are batched over tokens, queries are not")
    if q is not None and outer is not None and q[-2] == FRAMES:
        return Transfer((*q[:-1], None), needs_all_tokens="each frame merges by its own pattern")
    if q is not None and outer is not None and outer < len(shape_of(query)) - 2:
        if k is None or k[outer] != q[outer]:
            return call.reject("queries are batched over tokens, keys are not")
        return Transfer((*q[:-1], None)) if mask is None else call.reject("mask on batched tokens")
    involved = [x[-2] for x in (q, k) if x is not None and isinstance(x[-2], Tokens)]
    if causal and involved:
        return call.reject("causal attention depends on the order of the tokens")
    positionals: list[Positional] = []
    if mask is not None:
        if q is not None and is_batch(q[0]) and q[0] != BATCH:
            return call.reject("a mask on rows of the batch")
        for dim, layout in ((-2, q), (-1, k)):
            label = layout[-2] if layout is not None else None
            shape = shape_of(mask)
            if isinstance(label, Tokens) and label.length >= UNKNOWN:
                return call.reject("a mask over as many tokens as the data says")
            if isinstance(label, Tokens) and len(shape) >= -dim and shape[dim] != 1:
                at = (layout or ()).index(BATCH) if BATCH in (layout or ()) else 0
                lead = len(layout or ()) - len(shape)
                batch, lead = (at - lead, 0) if at >= lead else (None, lead - at)
                mask_label = (call.layout(mask) or (None,) * len(shape))[dim]
                if isinstance(mask_label, Tokens) and mask_label.segments == label.segments:
                    continue
                labels = (x for x in call.layout(mask) or () if isinstance(x, Tokens))
                mask_images = [s.name for x in labels for s in x.segments if s.grid]
                if batch or any(s.name in mask_images for s in label.segments):
                    return call.reject("a mask that is laid out otherwise")
                positionals.append(Positional(mask.name, len(shape) + dim, label, batch, lead))
    return Transfer((*q[:-1], None) if q is not None else None, positionals=tuple(positionals))


def _share_tokens(a: Layout, b: Layout) -> bool:
    """Whether two values hold tokens of one segment."""
    names = [{s.name for s in tokens.segments} for x in (a, b) if (tokens := tokens_of(x))]
    return len(names) == 2 and not names[0].isdisjoint(names[1])


def _same_tokens(key: Label, value: Label) -> bool:
    """Whether keys and values are of the same tokens; unknown ones joined to them have no name."""
    if not isinstance(key, Tokens) or not isinstance(value, Tokens):
        return key == value
    pairs = zip(key.segments, value.segments, strict=False)
    return len(key.segments) == len(value.segments) and all(
        a == b or (a.role == b.role == "other" and a.length == b.length) for a, b in pairs
    )


@rule("matmul", "mm", "bmm")
def matmul(call: Call) -> Outcome:
    """Products: x @ weight treats every token alike, q @ k makes scores, scores @ v uses them."""
    return _product(call, *call.node.args[:2])


@rule("baddbmm")
def baddbmm(call: Call) -> Outcome:
    """beta * input + alpha * (a @ b), as the older attention processors write it (beta is 0)."""
    if call.arg(3, "beta", 1) != 0:
        return call.reject("a sum with a product over token axes")
    return _product(call, *call.node.args[1:3])


def _product(call: Call, a: Any, b: Any) -> Outcome:
    left, right = call.layout(a), call.layout(b)
    if left is None and right is None:
        return NOTHING
    if tokens_of(right) is None:
        return _times_weight(call, a, b, left)
    if left is None or right is None or left[:-2] != right[:-2]:
        return call.reject("a matrix product over token axes")
    rows, inner, columns = left[-2], (left[-1], right[-2]), right[-1]
    if isinstance(left[-1], Keys) and isinstance(right[-2], Tokens):
        if left[-1].segments != right[-2].segments or not left[-1].normal:
            return call.reject("a sum over tokens without softmax")
        return Transfer((*left[:-1], None))
    if any(isinstance(label, Tokens) for label in inner):
        return call.reject("a sum over tokens (linear attention)")
    if not isinstance(columns, Tokens) or isinstance(columns, (Keys, Flat)):
        return call.reject("a matrix product over token axes")
    if isinstance(rows, (Keys, Flat)):
        return call.reject("a matrix product over token axes")
    return Transfer((*left[:-1], Keys(columns.segments)))


def _times_weight(call: Call, a: fx.Node, b: fx.Node, left: Layout | None) -> Outcome:
    """x @ w: w is no token and may have a batch of its own."""
    if left is None:
        return NOTHING
    if isinstance(left[-1], Tokens):
        return call.reject("a matrix product over the token axis")
    rank, shape = len(left), shape_of(b)
    if len(shape) == 1:
        return Transfer(left[:-1])
    for d, label in enumerate(left[:-2]):
        dim = d - rank + len(shape)
        if isinstance(label, Tokens) and dim >= 0 and shape[dim] != 1:
            return call.reject("every token has a matrix of its own")
    if len(shape) > rank:
        return call.reject("a batched matrix product across tokens")
    return Transfer((*left[:-1], None))


@rule(*SOFTMAX)
def softmax(call: Call) -> Outcome:
    """Over attention scores it makes shares of the keys; over features it keeps every axis."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    dim = call.arg(1, "dim") % len(layout)
    label = layout[dim]
    if isinstance(label, Keys):
        return Transfer((*layout[:dim], Keys(label.segments, True), *layout[dim + 1 :]))
    return call.reject_mixing("a reduction over", layout, [dim]) or Transfer(layout)

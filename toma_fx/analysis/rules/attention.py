"""Rules of attention: fused, or as a product, a softmax and a product."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from toma_fx.analysis.factors import Keys, Refused
from toma_fx.analysis.facts import Positional, Transfer
from toma_fx.analysis.labels import ONE, Label, Layout, plain
from toma_fx.analysis.rules.base import Call, carries_positions, rule
from toma_fx.analysis.rules.compute import (
    check_rows,
    count_tokens,
    find_positionals,
    meet_all,
    names_of,
    pictures_of,
)
from toma_fx.graph.nodes import SOFTMAX, UNKNOWN, shape_of

COUNTED = ("aten.matmul", "aten.mm", "aten.bmm")
"""Products (a, b) whose operand b can be weighed."""


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Transfer:
    """Attention mixes tokens but returns the query's axis. [..., heads, tokens, width]."""
    q, k, v = (call.layout(call.arg(i)) for i in range(3))
    mask, causal = call.arg(3, "attn_mask"), call.arg(5, "is_causal", False)
    for name, layout in (("query", q), ("key", k), ("value", v)):
        if layout[-1].positions:
            raise Refused(f"tokens lie along the width of the {name}")
        if layout[-2].is_product or layout[-2].keys:
            raise Refused(f"tokens of the {name} share a dimension with something else")
        call.mix("attention along", layout, [-1])
    if not _same_tokens(k[-2], v[-2]):
        raise Refused("keys and values come from different tokens")
    lead = _meet_leads([q, k, v], call.shape[:-2])
    check_rows([x for x in (q, k, v) if pictures_of(x) & pictures_of(q)], (*lead, q[-2]))
    outer = next((d for d, label in enumerate(lead) if label.positions), None)
    if outer is not None and any(not x[outer - len(lead) - 2].positions for x in (q, k, v)):
        raise Refused("queries, keys and values are batched over different tokens")
    keys = k[-2].tokens
    rows = (*lead, *((q[-2], Label((Keys(keys),))) if keys else (q[-2], plain(k[-2].size))))
    if causal and (q[-2].tokens or keys):
        raise Refused("causal attention depends on the order of the tokens")
    if any(x[-2].axes and carries_positions(x) for x in (q, k)):
        return Transfer((*lead, q[-2], v[-1]), needs_all_tokens="it mixes rows of the batch")
    if mask is None:
        return Transfer((*lead, q[-2], v[-1]))
    meet_all([rows, call.layout(mask)], [label.size for label in rows])
    if any(x and x.length >= UNKNOWN for x in (q[-2].tokens, keys)):
        raise Refused("a mask over as many tokens as the data says")
    positionals, needs_all = find_positionals(call, [mask], rows)
    return Transfer((*lead, q[-2], v[-1]), positionals=positionals, needs_all_tokens=needs_all)


def _meet_leads(layouts: Sequence[Layout], shape: Sequence[int]) -> Layout:
    """What the dimensions before the last two are; queries tell, if the tokens are not theirs."""
    q, *rest = layouts
    names = [names_of(each) for each in layouts]
    labels = meet_all([x[:-2] for x in layouts], shape)
    for layout, own in zip(rest, names[1:], strict=True):
        padded = (*(ONE,) * (len(q) - len(layout)), *layout)
        pairs = zip(q[:-2], padded[:-2], strict=False)
        if names[0] & own and any(a.axes and b.axes and a != b for a, b in pairs):
            raise Refused("queries and keys are batched differently")
    return labels


def _same_tokens(key: Label, value: Label) -> bool:
    """Whether keys and values are of the same tokens; unknown ones joined to them have no name."""
    if key.tokens is None or value.tokens is None:
        return key == value
    a, b = key.tokens.segments, value.tokens.segments
    return len(a) == len(b) and all(
        x == y or (x.role == y.role == "other" and x.length == y.length)
        for x, y in zip(a, b, strict=True)
    )


@rule("matmul", "mm", "bmm", linear=True)
def matmul(call: Call) -> Transfer:
    """Products: x @ weight treats every token alike, q @ k makes scores, scores @ v uses them."""
    return _multiply(call, call.arg(0), call.arg(1))


@rule("baddbmm", linear=True)
def baddbmm(call: Call) -> Transfer:
    """beta * input + alpha * (a @ b), as the older attention processors write it (beta is 0)."""
    if call.arg(3, "beta", 1) != 0:
        raise Refused("a sum with a product over token axes")
    transfer = _multiply(call, call.arg(1), call.arg(2))
    unread = reversed(shape_of(call.arg(0)))
    result: Layout = transfer.fact  # type: ignore[assignment]
    if any(x.positions and size != 1 for x, size in zip(result[::-1], unread, strict=False)):
        raise Refused("an operand that is not read has the size of the tokens")
    return transfer


def _multiply(call: Call, a: fx.Node, b: fx.Node) -> Transfer:
    left, right = call.layout(a), call.layout(b)
    vector = len(left) == 1 or len(right) == 1
    inner, other = left[-1], right[-1] if len(right) == 1 else right[-2]
    rows, columns = left[-2:-1], right[-1:] if len(right) > 1 else ()
    counted = _check_sum(call, left, inner, right, other)
    if vector and carries_positions(right):
        raise Refused("a matrix product over token axes")
    if any(label.tokens for label in rows):
        columns = _label_keys(rows, columns)
    outer = len(call.shape) - len(rows) - len(columns)
    held = [x for x in (left, right) if pictures_of(x)]
    lead = meet_all([left[:-2], right[:-2]], call.shape[:outer], strict=bool(held))
    labels = (*lead, *rows, *columns)
    check_rows(held, labels)
    if sum(bool(x.tokens) for x in labels) > 1:
        raise Refused("two token axes in one value")
    # a matrix for each token, or row, of the other operand
    more = ((a, (*lead, *left[-2:])), (b, (*lead, *right[-2:])))
    found = [
        find_positionals(call, [node], (*full[: len(lead)], *map(_plain, full[len(lead) :])))
        for node, full in more
        if len(full) > 2 and len(shape_of(node)) > 2
    ]
    positionals = tuple(p for group, _ in found for p in group)
    needs_all = "".join(x for _, x in found)
    return Transfer(labels, positionals=positionals, counted=counted, needs_all_tokens=needs_all)


def _plain(label: Label) -> Label:
    return plain(label.size)


def _check_sum(
    call: Call, left: Layout, a: Label, right: Layout, b: Label
) -> tuple[Positional, ...]:
    """A product may sum over features, and over keys whose shares add up to 1.

    Without softmax a merged token counts as often as the tokens it stands for: linear attention.
    """
    if a.keys and b.tokens and not (a.is_product or b.is_product):
        if a.keys.tokens.segments != b.tokens.segments or not a.keys.normal:
            raise Refused("a sum over tokens without softmax")
        return ()
    if a.tokens and b.tokens:
        same = a.tokens.segments == b.tokens.segments and a.tokens.fixed == b.tokens.fixed
        counted = count_tokens(call.arg(1), right, len(right) - 2) if len(right) > 1 else None
        if call.op not in COUNTED or not same or a.is_product or counted is None:
            raise Refused("a sum over tokens of a kind that can't be weighed")
        return (counted,)
    if a.positions and b.is_plain and right and not carries_positions(right):
        raise Refused("a matrix product over the token axis")
    if a.positions or b.positions:
        raise Refused("a matrix product over token axes")
    held = carries_positions(left) or carries_positions(right)
    if held and (a.axes or b.axes):
        raise Refused("a matrix product over the batch of tokens")
    return ()


def _label_keys(rows: Layout, columns: Layout) -> Layout:
    """What the columns of a product are: the keys of scores, if the right operand has tokens."""
    both = (*rows, *columns)
    if any(label.keys for label in both) or any(label.is_product for label in columns):
        raise Refused("a matrix product over token axes")
    if any(label.is_product for label in rows) and any(label.tokens for label in columns):
        raise Refused("a matrix product over token axes")
    return tuple(Label((Keys(x.tokens),)) if x.tokens else x for x in columns)


@rule(*SOFTMAX)
def softmax(call: Call) -> Layout:
    """Over attention scores it makes shares of the keys; over features it keeps every axis."""
    layout = call.layout(call.arg(0))
    dim = call.arg(1, "dim") % len(layout)
    keys = layout[dim].keys
    if keys and not layout[dim].is_product:
        return (*layout[:dim], Label((Keys(keys.tokens, True),)), *layout[dim + 1 :])
    call.mix("a reduction over", layout, [dim])
    return tuple(label.without_shares() for label in layout)

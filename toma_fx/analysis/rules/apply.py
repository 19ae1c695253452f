"""Finding and running the rule of a node."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx

# importing a module of rules registers them
import toma_fx.analysis.rules.attention
import toma_fx.analysis.rules.joins
import toma_fx.analysis.rules.quantized
import toma_fx.analysis.rules.sums
import toma_fx.analysis.rules.views  # noqa: F401
from toma_fx.analysis.factors import HEIGHT, Refused
from toma_fx.analysis.facts import Transfer
from toma_fx.analysis.labels import Fact, Layout, is_tuple_fact, layouts_of, names_axis, rows_of
from toma_fx.analysis.rules.attention import softmax
from toma_fx.analysis.rules.base import (
    LINEAR,
    RULES,
    SEEDS,
    Call,
    Outcome,
    Rule,
    carries_tokens,
    reject,
)
from toma_fx.analysis.rules.compute import pictures_of, pointwise
from toma_fx.graph.nodes import JOINS, UNKNOWN, int_size

NOTHING = Transfer(None)
DECIDES_SHARES = {pointwise, softmax}
"""Rules that know whether shares of keys are shares in their result."""


def apply_rule(node: fx.Node, facts: dict[str, Fact]) -> Outcome:
    """Run the rule of `node`; a refusal of kind "no_rule" if there is none."""
    call = Call(node, facts)
    if node.target is operator.getitem:
        return _take_item(call)
    rule, operands = _find_rule(call), [facts.get(n.name) for n in node.all_input_nodes]
    if not any(operands) and rule not in SEEDS:
        return NOTHING
    if rule is None:
        lost = any(_may_hold_tokens(fact) for fact in operands)
        return reject(node, "no transfer rule", "no_rule") if lost else NOTHING
    try:
        result = rule(call)
        transfer = result if isinstance(result, Transfer) else Transfer(result)
        if rule not in DECIDES_SHARES and not _keeps_shares(call):
            transfer = replace(transfer, fact=_forget_shares(transfer.fact))
        return _check(call, transfer)
    except Refused as refusal:
        return reject(node, refusal.reason, dim=refusal.dim)


def _find_rule(call: Call) -> Rule | None:
    single = isinstance(call.node.meta.get("val"), torch.Tensor)
    alike = single and torch.Tag.pointwise in getattr(call.node.target, "tags", ())
    return RULES.get(call.op, pointwise if alike else None)


def _check(call: Call, transfer: Transfer) -> Transfer:
    """The transfer, without layouts that say nothing; each must fit the value it is about."""
    values = call.node.meta["val"]
    fact = transfer.fact
    if is_tuple_fact(fact):
        known = tuple(_check_layout(x, v) for x, v in zip(layouts_of(fact), values, strict=True))
        fact = known if any(known) else None
    elif fact is not None:
        fact = _check_layout(fact, values)  # type: ignore[arg-type]
    for layout in layouts_of(fact):
        _check_rows(call, layout or ())
    return replace(transfer, fact=fact)


def _check_rows(call: Call, layout: Layout) -> None:
    """Tokens of a picture are of as many rows as before: no rule may lose one of a few, or a digit.

    Raises:
        Refused: it isn't known which rows they are of, or rows of two operands lie in two places.
    """
    for name in pictures_of(layout):
        after = _count_rows(layout, name)
        for operand in call.tensors:
            before = _count_rows(call.layout(operand), name)
            if before and before != after:
                raise Refused("rows of the batch of tokens are not told apart")


def _count_rows(layout: Layout, picture: str) -> dict[str, int]:
    """How many rows there are of a picture's tokens, along each axis that numbers them."""
    held = [x.positions for x in layout if x.positions and picture in x.positions.names]
    counts: dict[str, int] = {}
    for a in (*rows_of(layout), *held[0].fixed) if held else ():
        counts[a.name] = counts.get(a.name, 1) * a.base
    return counts


def _check_layout(layout: Layout | None, value: torch.Tensor) -> Layout | None:
    sizes = [int_size(s) for s in value.shape]
    if layout is None or all(label.is_plain for label in layout):
        return None
    pairs = [p for p in zip((x.size for x in layout), sizes, strict=False) if max(p) < UNKNOWN]
    if len(layout) != len(sizes) or any(a != b for a, b in pairs):
        raise Refused(f"its rule gives {', '.join(map(str, layout))} for a value of {sizes}")
    if sum(bool(x.tokens) for x in layout) > 1:
        raise Refused("two token axes in one value")
    return layout


def _keeps_shares(call: Call) -> bool:
    """Whether the result has shares of keys as its operands have."""
    operands: list[fx.Node] = []
    fx.map_arg(call.node.args, lambda n: operands.append(n))  # one may be used twice
    layouts = [call.layout(n) for n in operands if n in call.tensors]
    shares = [any(label.keys and label.keys.normal for label in x) for x in layouts]
    if call.op in JOINS or call.op == "aten.stack":
        return all(shares)
    return call.op in LINEAR and sum(any(label.keys for label in x) for x in layouts) < 2


def _forget_shares(fact: Fact) -> Fact:
    """The fact with keys whose weights are any numbers."""
    several = tuple(x and tuple(y.without_shares() for y in x) for x in layouts_of(fact))
    return several if is_tuple_fact(fact) else several[0]


def _may_hold_tokens(fact: Fact) -> bool:
    """Whether a value has a token axis, or a height that could become one."""
    return carries_tokens(fact) or any(names_axis(x, HEIGHT) for x in layouts_of(fact))


def _take_item(call: Call) -> Outcome:
    fact, index = call.fact(call.node.args[0]), call.node.args[1]
    known = is_tuple_fact(fact) and isinstance(index, int)
    return Transfer(layouts_of(fact)[index]) if known else NOTHING  # type: ignore[index]

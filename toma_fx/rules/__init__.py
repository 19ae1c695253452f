"""Transfer rules: how each op family moves the token axis. One small function per family.

A rule gets a `Call` (the node's arguments, shapes and the layouts of its operands) and returns a
`Transfer` or `Rejected`. Which dimension is which is decided by dimension bookkeeping alone, never
by comparing sizes with a token count, so that a head width equal to the token count can't mislead.

Importing this package registers every rule: those of `attention`, `compute`, `shape`, `quantised`.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

import toma_fx.rules.attention
import toma_fx.rules.quantised  # noqa: F401 - registers its rules
from toma_fx.axis import HEIGHT, Fact, Transfer, is_tuple_fact, layouts_of
from toma_fx.rules.base import (
    NOTHING,
    RULES,
    Call,
    Outcome,
    Rule,
    carries_tokens,
    op_name,
    rule,
    shape_of,
    tokenwise,
)
from toma_fx.rules.compute import broadcast, pointwise
from toma_fx.rules.shape import regroup

__all__ = [
    "NOTHING",
    "RULES",
    "Call",
    "Outcome",
    "Rule",
    "apply_rule",
    "broadcast",
    "op_name",
    "pointwise",
    "regroup",
    "rule",
    "shape_of",
    "tokenwise",
]


def apply_rule(node: fx.Node, facts: dict[str, Fact]) -> Outcome:
    """Run the rule of `node`, or say that there is none."""
    call = Call(node, facts)
    if node.target is operator.getitem:
        return _getitem(call)
    found = RULES.get(call.op)
    single = isinstance(node.meta.get("val"), torch.Tensor)
    if found is None and single and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        found = pointwise
    if found is not None:
        return found(call)
    touched = [n for n in node.all_input_nodes if _concerns(facts.get(n.name))]
    return call.no(f"no transfer rule for {call.op}") if touched else NOTHING


def _concerns(fact: Fact) -> bool:
    """Whether a value has a token axis, or a height that could become one."""
    return carries_tokens(fact) or any(HEIGHT in (layout or ()) for layout in layouts_of(fact))


def _getitem(call: Call) -> Outcome:
    fact = call.fact(call.node.args[0])
    index = call.node.args[1]
    if not is_tuple_fact(fact) or not isinstance(index, int):
        return NOTHING
    return Transfer(fact[index])

"""Finding and running the rule of a node."""

from __future__ import annotations

import operator

import torch
from torch import fx

# importing a module of rules registers them
import toma_fx.analysis.rules.attention
import toma_fx.analysis.rules.joins
import toma_fx.analysis.rules.quantized
import toma_fx.analysis.rules.views  # noqa: F401
from toma_fx.analysis.facts import Transfer
from toma_fx.analysis.labels import HEIGHT, Fact, is_tuple_fact, layouts_of
from toma_fx.analysis.rules.base import NOTHING, RULES, Call, Outcome, carries_tokens
from toma_fx.analysis.rules.compute import pointwise


def apply_rule(node: fx.Node, facts: dict[str, Fact]) -> Outcome:
    """Run the rule of `node`; a refusal of kind "no_rule" if there is none."""
    call = Call(node, facts)
    if node.target is operator.getitem:
        return _getitem(call)
    rule = RULES.get(call.op)
    single = isinstance(node.meta.get("val"), torch.Tensor)
    if rule is None and single and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = pointwise
    if rule is not None:
        return rule(call)
    operands = [n for n in node.all_input_nodes if _may_hold_tokens(facts.get(n.name))]
    return call.reject(f"no transfer rule for {call.op}", "no_rule") if operands else NOTHING


def _may_hold_tokens(fact: Fact) -> bool:
    """Whether a value has a token axis, or a height that could become one."""
    return carries_tokens(fact) or any(HEIGHT in (layout or ()) for layout in layouts_of(fact))


def _getitem(call: Call) -> Outcome:
    fact = call.fact(call.node.args[0])
    index = call.node.args[1]
    if not is_tuple_fact(fact) or not isinstance(index, int):
        return NOTHING
    return Transfer(fact[index])

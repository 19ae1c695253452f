"""What a transfer rule takes and returns, `Call` and `Outcome`, and the register of rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from toma_fx.analysis.facts import Rejected, Transfer
from toma_fx.analysis.labels import (
    FRAMES,
    Fact,
    Layout,
    Tokens,
    is_batch,
    layout_of,
    layouts_of,
    tokens_of,
)
from toma_fx.errors import ConfigError, UnknownNameError
from toma_fx.graph.nodes import op_name, shape_of

Outcome = Transfer | Rejected
NOTHING = Transfer(None)


@dataclass(frozen=True)
class Call:
    """One node as a rule sees it."""

    node: fx.Node
    facts: dict[str, Fact]

    @property
    def name(self) -> str:
        """Node name."""
        return self.node.name

    @property
    def op(self) -> str:
        """Op name without overload, e.g. "aten.view"."""
        return op_name(self.node.target)

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """Positional or keyword argument."""
        if len(self.node.args) > index:
            return self.node.args[index]
        return self.node.kwargs.get(name, default)

    def fact(self, operand: Any) -> Fact:
        """Fact of an operand (None for literals)."""
        return self.facts.get(operand.name) if isinstance(operand, fx.Node) else None

    def layout(self, operand: Any) -> Layout | None:
        """Layout of a tensor operand."""
        return layout_of(self.fact(operand))

    def reject_mixing(self, what: str, layout: Layout, dims: Iterable[int]) -> Rejected | None:
        """Refusal if `what`, which mixes or cuts along `dims`, would touch tokens, or their batch.

        Each batch element merges by its own pattern, so token i of one no longer matches token i of
        another.
        """
        shape = shape_of(self.node.args[0])
        for dim in dims:
            if isinstance(layout[dim], Tokens):
                return self.reject(f"{what} the token axis")
            batched = is_batch(layout[dim]) or layout[dim] == FRAMES
            if batched and shape[dim] != 1 and tokens_of(layout) is not None:
                return self.reject(f"{what} the batch of tokens")
        return None

    def reject(self, reason: str, kind: Literal["rule", "no_rule"] = "rule") -> Rejected:
        """Refusal that blames this node."""
        return Rejected(self.name, f"{reason} ({self.node.target})", kind, self.op)


Rule = Callable[[Call], Outcome]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a transfer rule for ops; a name without a namespace is one of aten."""

    def add(function: Rule) -> Rule:
        RULES.update({name if "." in name else f"aten.{name}": function for name in names})
        return function

    return add


def tokenwise(op: str | Callable[..., Any]) -> None:
    """Declare that a custom operator treats every token alike, as a linear layer does.

    Its first argument is a tensor [..., C] and so are its results, of the same shape but for the
    last dimension; its other arguments (weights, scales) hold no tokens. Merging then reaches
    across it. Models captured before are not analyzed again.

    Args:
        op: the operator, or its name such as "bitsandbytes::gemm_4bit".

    Raises:
        UnknownNameError: no operator of that name is registered with torch.
        ConfigError: the package has a rule of its own for it.
    """
    name = op if isinstance(op, str) else str(getattr(op, "overloadpacket", op)).replace(".", "::")
    space, _, leaf = name.partition("::")
    if not leaf or not hasattr(getattr(torch.ops, space), leaf):
        raise UnknownNameError(
            "no such operator",
            where="tokenwise",
            expected='"namespace::name" of an operator that is registered with torch',
            got=repr(op),
            hint="import the library that defines it first",
        )
    if RULES.get(f"{space}.{leaf}", tokenwise_rule) is not tokenwise_rule:
        raise ConfigError("the operator has a rule already", where="tokenwise", got=name)
    RULES[f"{space}.{leaf}"] = tokenwise_rule


def tokenwise_rule(call: Call) -> Outcome:
    """Rule of ops on [..., C] that treat every token alike."""
    first, *others = call.node.all_input_nodes
    layout = call.layout(first)
    if any(carries_tokens(call.fact(other)) for other in others):
        return call.reject("an argument of a token-wise op, besides the first, holds tokens")
    if layout is None:
        return NOTHING
    if isinstance(layout[-1], Tokens):
        return call.reject("a token-wise op over the token axis")
    values = call.node.meta["val"]
    several = isinstance(values, (tuple, list))
    shape = shape_of(first)
    if any(tuple(v.shape[:-1]) != shape[:-1] for v in (values if several else [values])):
        return call.reject("declared token-wise, but its result has another shape")
    fact = (*layout[:-1], None)
    return Transfer((fact,) * len(values) if several else fact)


def carries_tokens(fact: Fact) -> bool:
    """Whether a value, or one of a tuple of values, has a token axis."""
    return any(tokens_of(layout) is not None for layout in layouts_of(fact))

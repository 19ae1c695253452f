"""What a transfer rule takes and returns, `Call` and `Outcome`, and the register of rules.

A rule gets a `Call` and returns the layout of the result, or a `Transfer` that says more, or raises
`Refused`. It runs only where an operand has a label; an operand without one has a plain layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from torch import fx

from toma_fx.analysis.factors import Refused
from toma_fx.analysis.facts import Kind, Rejected, Transfer
from toma_fx.analysis.labels import Fact, Layout, layout_of, layouts_of, plain
from toma_fx.errors import ConfigError, UnknownNameError
from toma_fx.graph.nodes import argument, module_path, op_name, shape_of, source_line

Outcome = Transfer | Rejected


@dataclass(frozen=True)
class Call:
    """One node as a rule sees it."""

    node: fx.Node
    facts: dict[str, Fact]

    @property
    def name(self) -> str:
        """Node name."""
        return self.node.name

    @cached_property
    def op(self) -> str:
        """Op name without overload, e.g. "aten.view"."""
        return op_name(self.node.target)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return shape_of(self.node)

    @cached_property
    def tensors(self) -> list[fx.Node]:
        """Operands that are tensors, in order."""
        return [n for n in self.node.all_input_nodes if hasattr(n.meta.get("val"), "shape")]

    def arg(self, index: int, name: str = "", default: Any = None) -> Any:
        """Positional or keyword argument."""
        return argument(self.node, index, name, default)

    def fact(self, operand: Any) -> Fact:
        """Fact of an operand; None if nothing is known."""
        return self.facts.get(operand.name) if isinstance(operand, fx.Node) else None

    def layout(self, operand: Any) -> Layout:
        """Layout of a tensor operand."""
        known = layout_of(self.fact(operand))
        return known if known is not None else tuple(plain(s) for s in shape_of(operand))

    def mix(self, what: str, layout: Layout, dims: Iterable[int]) -> None:
        """Check that the op may mix, or cut, along `dims`.

        Each row of a batch merges by its own pattern, so token i of one no longer matches token i
        of another.

        Raises:
            Refused: they hold tokens, or rows of tokens.
        """
        held = carries_positions(layout)
        for label in (layout[d] for d in dims):
            if label.positions:
                raise Refused(f"{what} the token axis", label)
            if held and label.axes and label.size > 1:
                raise Refused(f"{what} the batch of tokens", label)


def reject(node: fx.Node, reason: str, kind: Kind = "rule", dim: str = "") -> Rejected:
    """Refusal that blames a node."""
    op, module = op_name(node.target), module_path(node)
    return Rejected(node.name, reason, kind, op, dim, module, source_line(node))


Rule = Callable[[Call], Layout | Transfer]
RULES: dict[str, Rule] = {}
SEEDS: set[Rule] = set()
"""Rules that label results of operands without labels: a convolution knows where a picture is."""


R = TypeVar("R", bound=Rule)


LINEAR: set[str] = set()
"""Ops of which a share of the keys is a share in the result: they move it, or sum it up."""


def rule(*names: str, seeds: bool = False, linear: bool = False) -> Callable[[R], R]:
    """Register a transfer rule for ops; a name without a namespace is one of aten.

    Args:
        seeds: whether the rule runs although no operand has a label.
        linear: whether shares of the keys stay shares: the op moves values, or sums them up.
    """

    def add(function: R) -> R:
        ops = [name if "." in name else f"aten.{name}" for name in names]
        RULES.update(dict.fromkeys(ops, function))
        LINEAR.update(ops if linear else ())
        SEEDS.update({function} if seeds else ())
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
    import torch

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


def tokenwise_rule(call: Call) -> Transfer:
    """Rule of ops on [..., C] that treat every token alike."""
    first, *others = call.node.all_input_nodes
    layout, shape = call.layout(first), shape_of(first)
    if any(carries_tokens(call.fact(other)) for other in others):
        raise Refused("an argument of a token-wise op, besides the first, holds tokens")
    call.mix("a token-wise op over", layout, [-1])
    values = call.node.meta["val"]
    several = isinstance(values, (tuple, list))
    shapes = [tuple(v.shape) for v in (values if several else [values])]
    if any(s[:-1] != shape[:-1] for s in shapes):
        raise Refused("declared token-wise, but its result has another shape")
    facts = tuple((*layout[:-1], plain(s[-1])) for s in shapes)
    return Transfer(facts if several else facts[0])


def carries_positions(layout: Layout) -> bool:
    """Whether a layout has tokens, or keys of attention."""
    return any(label.positions for label in layout)


def carries_tokens(fact: Fact) -> bool:
    """Whether a value, or one of a tuple of values, has a token axis."""
    return any(carries_positions(layout) for layout in layouts_of(fact) if layout)

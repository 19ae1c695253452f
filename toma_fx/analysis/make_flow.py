"""Making the plain-data view of an analyzed graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.facts import Rejected, Transfer
from toma_fx.analysis.labels import Fact, layout_of
from toma_fx.analysis.rules.base import RULES, carries_tokens, tokenwise_rule
from toma_fx.graph.nodes import (
    ATTENTION,
    CASTS,
    COPIES,
    JOINS,
    PRODUCTS,
    SCALES,
    SOFTMAX,
    WEIGHTED,
    module_path,
    op_name,
    shape_of,
    source_line,
)


def make_flow(
    nodes: list[fx.Node],
    facts: Mapping[str, Fact],
    transfers: Mapping[str, Transfer],
    refusals: Mapping[str, Rejected],
    needs_all_tokens: Mapping[str, Rejected],
) -> Flow:
    """The plain-data view of analyzed nodes."""
    summed = frozenset(name for name, transfer in transfers.items() if transfer.counted)
    images = {name for name in summed if any(c.tokens.names for c in transfers[name].counted)}
    products = {n.name for n in nodes if n.name in images and op_name(n.target) in PRODUCTS}
    tensors = [n for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    flow = Flow(
        order=tuple(n.name for n in nodes),
        operands={n.name: tuple(i.name for i in n.all_input_nodes) for n in nodes},
        ops={n.name: op_name(n.target) if n.op == "call_function" else n.op for n in nodes},
        shapes={n.name: shape_of(n) for n in tensors},
        modules={n.name: module_path(n) for n in nodes},
        lines={n.name: source_line(n) for n in nodes},
        facts=facts,
        refusals=refusals,
        aliases={},
        scaled={},
        pointwise=frozenset(
            n.name for n in nodes if torch.Tag.pointwise in getattr(n.target, "tags", ())
        ),
        sums=frozenset(n.name for n in nodes if _is_sum(n)),
        attention=frozenset(n.name for n in nodes if _is_attention(n, facts)) | products,
        sums_of_tokens=summed,
        linears=frozenset(n.name for n in nodes if _is_linear(n, facts)),
        needs_all_tokens=needs_all_tokens,
    )
    aliases = {n.name: source for n in nodes if (source := _alias_source(n, flow)) is not None}
    scaled = {n.name: source for n in nodes if (source := _scaled_source(n, flow)) is not None}
    return replace(flow, aliases=aliases, scaled=scaled)


def _is_attention(node: fx.Node, facts: Mapping[str, Fact]) -> bool:
    op = op_name(node.target) if node.op == "call_function" else ""
    layout = layout_of(facts.get(node.name)) or ()
    if op not in SOFTMAX or len(layout) < 3:
        return op == ATTENTION
    return bool(layout[-1].keys) or (bool(layout[-2].tokens) and _is_product(node))


def _is_product(node: fx.Node) -> bool:
    """Whether a softmax is over x @ y, y with a batch: keys that hold no tokens known here."""
    source = node.args[0]
    while isinstance(source, fx.Node) and op_name(source.target) in SCALES:
        source = source.args[0]
    if not isinstance(source, fx.Node) or op_name(source.target) not in PRODUCTS:
        return False
    return len(shape_of(source.all_input_nodes[-1])) > 2


def _is_linear(node: fx.Node, facts: Mapping[str, Fact]) -> bool:
    """Whether a node is a linear map of every token: a product with a weight, or declared so."""
    if node.op != "call_function":
        return False
    op = op_name(node.target)
    if op in WEIGHTED or RULES.get(op) is tokenwise_rule:
        return True
    operands: Any = node.args[:2]
    return op in ("aten.mm", "aten.matmul") and not carries_tokens(facts.get(operands[1].name))


def _is_sum(node: fx.Node) -> bool:
    """Whether a node is a + b of two tensors, neither scaled."""
    if node.op != "call_function" or op_name(node.target) != "aten.add":
        return False
    return len(node.all_input_nodes) == 2 and node.kwargs.get("alpha") in (None, 1)


def _alias_source(node: fx.Node, flow: Flow) -> str | None:
    """The operand whose image tokens the node returns unchanged, as [batch, tokens, channels]."""
    op, name = flow.ops[node.name], node.name
    images = {s.name for s in flow.segments(name) if s.grid}
    if not images or not flow.is_embedding(name):
        return None
    if op == "getitem":
        split = node.args[0]
        assert isinstance(split, fx.Node)
        source = str(split.args[0])
        return source if flow.ops[split.name] == "aten.split_with_sizes" else None
    carrying = [
        o for o in flow.operands[name] if not images.isdisjoint(s.name for s in flow.segments(o))
    ]
    if len(carrying) != 1 or not flow.is_embedding(carrying[0]):
        return None
    same_channels = flow.shapes[name][2] == flow.shapes[carrying[0]][2]
    if op in COPIES or (op in {"aten.slice", *JOINS} and same_channels):
        return carrying[0]
    if op in ("aten.clip", "aten.clamp"):
        return carrying[0] if _only_clips_infinities(node) else None
    # a stream may be added to in another precision than its branches compute in
    return carrying[0] if op in CASTS and node.meta["val"].is_floating_point() else None


def _scaled_source(node: fx.Node, flow: Flow) -> str | None:
    """The tokens that a node scales, by a number or by what has no tokens itself."""
    name = node.name
    if flow.ops[name] not in ("aten.mul", "aten.div") or not flow.is_embedding(name):
        return None
    source, *others = sorted(flow.operands[name], key=lambda o: not flow.segments(o))
    held = any(flow.segments(o) for o in others)
    divides = flow.ops[name] == "aten.div" and str(node.args[0]) != source
    same = flow.is_embedding(source) and flow.shapes[source] == flow.shapes[name]
    # a table over tokens turns them rather than scales them
    dim = 0 if flow.leads_with_tokens(name) else 1
    wide = (flow.shapes[o] for o in others if len(flow.shapes[o]) >= 3 - dim)
    tables = any(shape[dim - 3] != 1 for shape in wide)
    return source if same and not (held or divides or tables) else None


def _only_clips_infinities(node: fx.Node) -> bool:
    """clip(x, -65504, 65504) in half precision (Flux): the identity on finite values."""
    limit = torch.finfo(node.meta["val"].dtype).max
    low, high = (*node.args[1:3], None, None)[:2]
    return (
        isinstance(low, (int, float))
        and isinstance(high, (int, float))
        and (low <= -limit and high >= limit)
    )

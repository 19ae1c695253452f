"""Outlining: blocks that repeat become one subgraph that is called many times.

Inductor compiles a subgraph once (torch's nested compile regions, `invoke_subgraph`), so that the
time to compile does not grow with the depth of a stack.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from toma_fx.compat.pytorch import make_graph_module, write_code
from toma_fx.events import emit
from toma_fx.graph.repeats import Repeat, base_of, find_repeats, operand_value, operands_of

_log = logging.getLogger("toma_fx.graph")


def outline(graph_module: fx.GraphModule) -> None:
    """Make each of the repeated stretches of a graph one subgraph, in place.

    It computes the same, and shares every parameter. Only compilers gain by it: exporters of AOT
    packages (torch 2.13: no `invoke_subgraph` in C++) and of ONNX take the flat graph.
    """
    before = len(graph_module.graph.nodes)
    repeats = find_repeats(graph_module.graph)
    if not repeats:
        return
    for i, repeat in enumerate(repeats):
        _outline(graph_module, f"repeated_{i}", repeat)
    graph_module.graph.lint()
    calls, after = sum(len(r.stretches) for r in repeats), len(graph_module.graph.nodes)
    emit(
        _log, logging.INFO, "outline", "%d blocks are calls of %d subgraphs: %d nodes become %d",
        calls, len(repeats), before, after, blocks=calls, subgraphs=len(repeats), nodes=after,
    )  # fmt: skip


def replace_subgraphs(graph_module: fx.GraphModule, compiled: Callable[[Any], nn.Module]) -> int:
    """Make every subgraph a module that `compiled` makes of it, in place; returns how many."""
    graph, modules = graph_module.graph, dict[str, nn.Module]()
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph):
        read, name, *operands = node.args
        if name not in modules:
            modules[name] = compiled(graph_module.get_submodule(name))
            graph_module.set_submodule(name, modules[name])
        with graph.inserting_before(node):
            call = graph.call_module(name, tuple(operands))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        if not read.users:
            graph.erase_node(read)
    return len(modules)


def _outline(graph_module: fx.GraphModule, name: str, repeat: Repeat) -> None:
    """Call one subgraph in the place of every stretch."""
    graph_module.add_submodule(name, _subgraph(repeat.stretches[0], repeat.outputs, name))
    for nodes in repeat.stretches:
        _call(graph_module.graph, name, nodes, repeat.outputs)


def _subgraph(nodes: Sequence[fx.Node], outputs: Sequence[int], name: str) -> fx.GraphModule:
    """A stretch as a graph of its own, which takes its operands."""
    graph, inside = fx.Graph(), dict[fx.Node, fx.Node]()
    for i, operand in enumerate(operands_of(nodes)):
        inside[operand] = graph.placeholder(f"operand_{i}")
        inside[operand].meta["val"] = operand_value(operand)
    for node in nodes:
        inside[node] = graph.node_copy(node, inside.__getitem__)
    graph.output(tuple(inside[nodes[i]] for i in outputs))
    subgraph = make_graph_module(nn.Module(), graph, name)
    write_code(subgraph)
    return subgraph


def _call(graph: fx.Graph, name: str, nodes: Sequence[fx.Node], outputs: Sequence[int]) -> None:
    """Replace a stretch by a call. Views of what it gives, or takes, are made anew outside: a
    subgraph may return neither what it was given nor two tensors of one memory."""
    inside, operands = set(nodes), operands_of(nodes)
    outer = {n: [u for u in n.users if u not in inside] for n in nodes}
    new: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(nodes[-1].next):
        call = graph.call_function(
            torch.ops.higher_order.invoke_subgraph, (graph.get_attr(name), name, *operands)
        )
        call.meta["val"] = tuple(nodes[i].meta["val"] for i in outputs)
        for place, i in enumerate(outputs):
            new[nodes[i]] = graph.call_function(operator.getitem, (call, place))
            new[nodes[i]].meta = dict(nodes[i].meta)
        for node, users in outer.items():
            for user in users:
                user.replace_input_with(node, _outside(graph, node, inside, new))
    for node in reversed(nodes):
        graph.erase_node(node)


def _outside(
    graph: fx.Graph, node: fx.Node, inside: set[fx.Node], new: dict[fx.Node, fx.Node]
) -> fx.Node:
    """What stands for a node of a stretch outside of it: an output of the call, or a view."""
    if node not in inside:
        return node
    if node not in new:
        assert base_of(node) is not node, "only views are made anew"
        new[node] = graph.node_copy(node, lambda x: _outside(graph, x, inside, new))
    return new[node]

"""Lifting: what a graph reads of its module becomes inputs, as compilers want it."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from torch import Tensor, fx

from toma_fx.compat.pytorch import make_graph_module
from toma_fx.graph.repeats import operand_value


@dataclass(frozen=True)
class Lifted:
    """A graph that reads nothing of its module but subgraphs.

    Attributes:
        graph_module: the graph.
        constants: names of parameters and buffers, which are its first inputs.
        kept: of the inputs that follow, their places among those that the graph had.
    """

    graph_module: fx.GraphModule
    constants: tuple[str, ...]
    kept: tuple[int, ...]


def lift_constants(graph_module: fx.GraphModule) -> Lifted:
    """Make inputs of the parameters and buffers that a graph reads; the graph module is used up.

    Inputs that are no tensors go: the graph is specialized to them, and nothing reads them.
    """
    graph = graph_module.graph
    inputs: list[fx.Node] = graph.find_nodes(op="placeholder")
    reads: dict[str, list[fx.Node]] = {}
    for node in graph.find_nodes(op="get_attr"):
        if isinstance(attrgetter(str(node.target))(graph_module), Tensor):
            reads.setdefault(str(node.target), []).append(node)
    with graph.inserting_before(next(iter(graph.nodes))):
        constants = [graph.placeholder(f"constant_{i}") for i in range(len(reads))]
    for constant, nodes in zip(constants, reads.values(), strict=True):
        constant.meta["val"] = operand_value(nodes[0])
        for node in nodes:
            node.replace_all_uses_with(constant)
            graph.erase_node(node)
    kept = tuple(i for i, node in enumerate(inputs) if isinstance(node.meta["val"], Tensor))
    for i in set(range(len(inputs))).difference(kept):
        graph.erase_node(inputs[i])
    lifted = make_graph_module(graph_module, graph, graph_module.__class__.__name__)
    return Lifted(lifted, tuple(reads), kept)


def has_subgraphs(graph_module: fx.GraphModule) -> bool:
    """Whether an operator of the graph takes graphs, such as a region with autocast on."""
    reads = graph_module.graph.find_nodes(op="get_attr")
    return any(isinstance(attrgetter(str(n.target))(graph_module), fx.GraphModule) for n in reads)

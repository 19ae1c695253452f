"""Floating-point operations of graph nodes, counted from static shapes (a multiply-add is two)."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import fx

from toma_fx.graph.nodes import op_name, shape_of


def node_flops(node: fx.Node) -> int:
    """FLOPs of linear maps, matrix products, convolutions and attention; 0 for everything else."""
    if node.op != "call_function":
        return 0
    op, args = op_name(node.target), node.args
    if op == "aten.linear":
        return 2 * prod(shape_of(node)) * shape_of(args[0])[-1]
    if op in ("aten.matmul", "aten.mm", "aten.bmm"):
        return 2 * prod(shape_of(node)) * shape_of(args[0])[-1]
    if op == "aten.addmm":
        return 2 * prod(shape_of(node)) * shape_of(args[1])[-1]
    if op in ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution"):
        return 2 * prod(shape_of(node)) * prod(shape_of(args[1])[1:])
    if op == "aten.scaled_dot_product_attention":
        query, keys = shape_of(args[0]), shape_of(args[1])[-2]
        return 2 * prod(query) * keys + 2 * prod(shape_of(node)) * keys
    return 0


def graph_flops(graph: fx.Graph, names: Any = None) -> int:
    """FLOPs of a graph, or of its nodes in the collection `names`."""
    return sum(node_flops(n) for n in graph.nodes if names is None or n.name in names)

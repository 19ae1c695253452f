"""Graphs as text, one line per node.

    x: float32[1, 16, 8] = input
    # blocks.0.norm
    layer_norm: float32[1, 16, 8] = aten.layer_norm(x, [8], p_norm_weight, p_norm_bias)
    return (layer_norm)

Text and tests compare well, and a dump of graphs between passes is read with `diff`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from toma_fx.compat.pytorch import is_operator
from toma_fx.graph.nodes import module_path, op_name


def print_graph(graph: fx.Graph) -> str:
    """The graph as text, in graph order, with a comment where the module path changes."""
    return "\n".join(_lines(graph)) + "\n"


def print_node(node: fx.Node) -> str:
    """One node: name, dtype and shape, and what computes it."""
    if node.op == "output":
        return f"return {_text(node.args[0])}"
    return f"{node.name}{_type(node.meta.get('val'))} = {_call(node)}"


def _lines(graph: fx.Graph) -> Iterator[str]:
    path = ""
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output") and module_path(node) != path:
            path = module_path(node)
            yield f"# {path or 'the model itself'}"
        yield print_node(node)


def _type(value: Any) -> str:
    """The type of a value as an annotation; "" where there is none."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(map(str, value.shape))
        return f": {str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, (tuple, list)):
        return f": ({', '.join(_type(v).removeprefix(': ') for v in value)})"
    return "" if value is None else f": {type(value).__name__}"


def _call(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return f"attribute {node.target}"
    target: Any = node.target
    name = str(target) if is_operator(target) else op_name(target)
    arguments = [_text(a) for a in node.args]
    arguments += [f"{key}={_text(value)}" for key, value in node.kwargs.items()]
    return f"{name.removesuffix('.default')}({', '.join(arguments)})"


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        inside = ", ".join(map(_text, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return str(value)

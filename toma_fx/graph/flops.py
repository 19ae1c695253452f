"""Floating-point operations of graph nodes, counted from shapes (a multiply-add is two).

A size that depends on the data counts as the largest that it may be: a text of which a mask cuts
the padding off, as its length with padding.
"""

from __future__ import annotations

import re
from math import prod
from typing import Any

from torch import fx

from toma_fx.graph.nodes import ATTENTION, CONVOLUTIONS, LINEAR_LAYERS, PACKED, WEIGHTED, op_name

_SUMMED = {
    **dict.fromkeys((*WEIGHTED, *PACKED, *LINEAR_LAYERS), 0),
    "aten.matmul": 0, "aten.mm": 0, "aten.bmm": 0, "aten.mv": 0, "aten.dot": 0,
    "aten.addmm": 1, "aten.baddbmm": 1, "aten.addmv": 1,
}  # fmt: skip
"""Products that sum over the last dimension of one of their arguments, and which one."""
_TRANSPOSED = {f"aten.conv_transpose{n}d" for n in (1, 2, 3)}
_COUNTED = {*_SUMMED, *CONVOLUTIONS, *_TRANSPOSED, "aten.einsum", ATTENTION}
_MULTIPLIES = re.compile(
    r"(^|[._])(\w*mm|\w*mv|matmul|linear|bilinear|conv(_transpose)?\dd|\w*convolution|\w*attention\w*)(_|$)"
)
_ELLIPSIS = "01234567"
"""What stands for the dimensions of "..." in an einsum, the last of them last."""


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of a node's value, data-dependent sizes at their upper bounds."""
    return tuple(map(_largest, node.meta["val"].shape))


def _largest(size: Any) -> int:
    if isinstance(size, int):
        return size
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    return int(bounds.upper if bounds.upper.is_finite else bounds.lower)


def node_flops(node: fx.Node) -> int:
    """FLOPs of linear maps, matrix products, convolutions and attention; 0 for everything else."""
    if node.op != "call_function":
        return 0
    op, args = op_name(node.target), node.args
    if op in _SUMMED:
        return 2 * prod(shape_of(node)) * shape_of(args[_SUMMED[op]])[-1]
    if op == "aten.einsum":
        return _einsum_flops(node)
    if op in CONVOLUTIONS or op in _TRANSPOSED:
        backward = op in _TRANSPOSED or (op == "aten.convolution" and args[6])
        return 2 * prod(shape_of(args[0] if backward else node)) * prod(shape_of(args[1])[1:])
    if op == ATTENTION:
        query, keys = shape_of(args[0]), shape_of(args[1])[-2]
        return 2 * prod(query) * keys + 2 * prod(shape_of(node)) * keys
    return 0


def _einsum_flops(node: fx.Node) -> int:
    """FLOPs of an einsum, whose operands are multiplied from left to right.

    "bid,bjd->bij" sums over d for each b, i and j; "bid,kd->bi" sums k away before it multiplies.
    """
    inputs, arrow, output = str(node.args[0]).replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    words = []
    for word, operand in zip(inputs.split(","), node.all_input_nodes, strict=True):
        shape = shape_of(operand)
        rest = len(shape) - len(word.replace("...", ""))
        words.append(word.replace("...", _ELLIPSIS[len(_ELLIPSIS) - rest :]))
        for letter, size in zip(words[-1], shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    if not arrow:
        once = (x for x in inputs if x.isalpha() and inputs.count(x) == 1)
        output = f"...{''.join(once)}"
    needed = set(output.replace("...", _ELLIPSIS))
    total, left = 0, set(words[0])
    for i, word in enumerate(words[1:], 1):
        later = needed.union(*words[i + 1 :])
        used = {x for x in left | set(word) if x in later or (x in left and x in word)}
        total += 2 * prod(sizes[x] for x in used)
        left = used & later
    return total


def find_uncounted(graph: fx.Graph) -> tuple[str, ...]:
    """Operators of a graph that multiply matrices by their name, but whose FLOPs aren't counted.

    An operator of torch's own count, or named after a product, a convolution or attention.
    """
    names = dict.fromkeys(op_name(n.target) for n in graph.nodes if n.op == "call_function")
    return tuple(name for name in names if _MULTIPLIES.search(name) and name not in _COUNTED)


def graph_flops(graph: fx.Graph, names: Any = None) -> int:
    """FLOPs of a graph, or of its nodes in the collection `names`."""
    return sum(node_flops(n) for n in graph.nodes if names is None or n.name in names)

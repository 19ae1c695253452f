"""The canonical form of a captured graph: flat, functional, and free of what hides data flow.

In-place writes become functional. The clean-ups are bit-exact: metadata assertions (which would pin
token counts) are dropped; writes into a slice, and padding of a length the data says, become `cat`;
the unused operand of `baddbmm(beta=0)`, as large as the scores, becomes a scalar; `type_as` becomes
`to`; equal shape and cast ops become one; `cat` of all slices of a value becomes the value.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from toma_fx.graph.nodes import op_name


def flat_graph(program: ExportedProgram, name: str) -> fx.GraphModule:
    """The program as a canonical graph module: flat inputs -> flat tuple of outputs."""
    if _mutates(program.graph):
        # writes through views would pass unseen by data flow
        program = program.run_decompositions({})
    exported: Any = program.module(check_guards=False)
    graph: fx.Graph = exported.graph
    graph.set_codegen(fx.graph.CodeGen())
    _flatten_output(graph)
    graph_module = fx.GraphModule(exported, graph, name)
    _canonicalise(graph_module)
    return graph_module


def _mutates(graph: fx.Graph) -> bool:
    """Whether an op of the graph writes in place."""
    return any(
        isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable
        for n in graph.nodes
    )


def _flatten_output(graph: fx.Graph) -> None:
    """Make the output node return a flat tuple of nodes and constants."""
    output = graph.output_node()
    output.args = (tuple(pytree.tree_leaves(output.args[0])),)


_SHARED = {
    "aten.unsqueeze", "aten.to", "aten.view", "aten.reshape", "aten.permute", "aten.transpose",
    "aten.slice", "aten.expand",
}  # fmt: skip


def _canonicalise(graph_module: fx.GraphModule) -> None:
    """Drop assertions and dead code, make writes joins, share equal shape ops. Bit-exact."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node.target) == "wrap_with_autocast":
            _inline_off(graph_module, node)
    pieces: _Pieces = {}
    for node in list(graph.nodes):
        op = op_name(node.target) if node.op == "call_function" else ""
        if op == "aten._assert_tensor_metadata":
            graph.erase_node(node)
        elif op == "aten.copy":
            _skip_copy(node)
        elif op == "aten.type_as":
            _name_dtype(graph, node)
        elif op in ("aten.pad", "aten.constant_pad_nd"):
            _join_padding(graph, node)
        elif op == "aten.slice_scatter":
            _join_written(graph, node, pieces)
        elif op == "aten.baddbmm" and node.kwargs.get("beta") == 0:
            _drop_addend(graph, node)
    if pieces:
        _let_strides_differ(graph)
    graph.eliminate_dead_code()
    _share_shape_ops(graph)
    _fold_slices(graph)
    graph.eliminate_dead_code()
    graph.lint()
    graph_module.recompile()


_Pieces = dict[tuple[fx.Node, int], list[tuple[fx.Node, int]]]
"""What values that were written into consist of along a dimension: (node, length) end to end."""


def _insert(graph: fx.Graph, before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node with its fake value and the module stack of `before`."""
    mode = before.meta["val"].fake_mode
    with graph.inserting_before(before):
        node = graph.call_function(target, args, kwargs)
    values = fx.map_arg(args, lambda n: n.meta["val"])
    with mode, torch.no_grad():
        node.meta["val"] = target(*values, **kwargs)
    node.meta["nn_module_stack"] = before.meta.get("nn_module_stack")
    return node


def _skip_copy(node: fx.Node) -> None:
    """copy(x, y) of equal shape and dtype is y."""
    source: Any = node.args[1]
    old, new = node.meta["val"], source.meta["val"]
    if (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device):
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)


def _inline_off(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """A region with autocast off is its ops: the graph runs without autocast anyway."""
    given: tuple[Any, ...] = node.args
    device, _, enabled, _, body, *operands = given
    kinds = {n.meta["val"].device.type for n in node.all_input_nodes if "val" in n.meta}
    if enabled and device in kinds:
        return
    module: Any = graph_module.get_submodule(body.target)
    for nested in list(module.graph.nodes):
        if nested.op == "call_function" and op_name(nested.target) == "wrap_with_autocast":
            _inline_off(module, nested)
    inner: Any = module.graph
    mapping = dict(zip(inner.find_nodes(op="placeholder"), operands, strict=True))
    with graph_module.graph.inserting_before(node):
        results = graph_module.graph.graph_copy(inner, mapping)
    flat: Any = results if isinstance(results, (tuple, list)) else (results,)
    for user in list(node.users):
        user.replace_all_uses_with(flat[user.args[1]])
        graph_module.graph.erase_node(user)
    graph_module.graph.erase_node(node)


def _name_dtype(graph: fx.Graph, node: fx.Node) -> None:
    """type_as(x, y) reads nothing of y but its dtype: to(x, dtype)."""
    x, dtype = node.args[0], node.meta["val"].dtype
    node.replace_all_uses_with(_insert(graph, node, torch.ops.aten.to.dtype, x, dtype))
    graph.erase_node(node)


def _join_padding(graph: fx.Graph, node: fx.Node) -> None:
    """Zeros behind one dimension, as many as the data says, are a join; others stay padding."""
    x, widths, *rest = cast("tuple[Any, ...]", node.args)
    by_data = [i for i, width in enumerate(widths) if isinstance(width, fx.Node)]
    others = any(width for i, width in enumerate(widths) if i not in by_data)
    if len(by_data) != 1 or by_data[0] % 2 == 0 or others or rest not in ([], ["constant"]):
        return
    value = x.meta["val"]
    sizes = list(value.shape)
    dim = value.dim() - 1 - by_data[0] // 2
    sizes[dim] = widths[by_data[0]]
    zeros = _insert(graph, node, torch.ops.aten.full.default, sizes, 0.0, dtype=value.dtype)
    joined = _insert(graph, node, torch.ops.aten.cat.default, [x, zeros], dim)
    node.replace_all_uses_with(joined)
    graph.erase_node(node)


def _join_written(graph: fx.Graph, node: fx.Node, pieces: _Pieces) -> None:
    """slice_scatter(x, y, dim, a, b) is cat([x[:a], y, x[b:]], dim)."""
    given: tuple[Any, ...] = (*node.args, *(0, None, None, 1)[len(node.args) - 2 :])
    base, written, dim, start, end, step = given
    size = base.meta["val"].shape[dim]
    dim, start, end = dim % base.meta["val"].dim(), start or 0, size if end is None else end
    if step != 1 or not 0 <= start < end:
        return
    end = min(end, size)
    known = pieces.get((base, dim), [(base, size)])
    parts = _between(graph, node, known, dim, 0, start)
    parts += [(written, end - start), *_between(graph, node, known, dim, end, size)]
    joined = written
    if len(parts) > 1:
        joined = _insert(graph, node, torch.ops.aten.cat.default, [n for n, _ in parts], dim)
    pieces[(joined, dim)] = parts
    node.replace_all_uses_with(joined)
    graph.erase_node(node)


def _let_strides_differ(graph: fx.Graph) -> None:
    """A join is contiguous where a written value had the strides of its base: view -> reshape."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default


def _between(
    graph: fx.Graph,
    before: fx.Node,
    pieces: list[tuple[fx.Node, int]],
    dim: int,
    start: int,
    end: int,
) -> list[tuple[fx.Node, int]]:
    """The pieces of [start, end); one that is cut becomes a slice."""
    out, at = [], 0
    for node, length in pieces:
        low, high = max(start, at), min(end, at + length)
        if high - low == length:
            out.append((node, length))
        elif low < high:
            cut = (node, dim, low - at, high - at)
            out.append((_insert(graph, before, torch.ops.aten.slice.Tensor, *cut), high - low))
        at += length
    return out


def _drop_addend(graph: fx.Graph, node: fx.Node) -> None:
    """baddbmm(x, a, b, beta=0) ignores x, which need not have the size of the result."""
    old: Any = node.args[0]
    value = old.meta["val"]
    empty = torch.ops.aten.empty.memory_format
    scalar = _insert(graph, node, empty, [1, 1, 1], dtype=value.dtype, device=value.device)
    node.args = (scalar, *node.args[1:])


def _share_shape_ops(graph: fx.Graph) -> None:
    """Equal shape and cast ops on one value become one node (40 rotary casts in Flux, say)."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node.target) not in _SHARED:
            continue
        key = repr((node.target, _resolved(node), sorted(node.kwargs.items())))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _resolved(node: fx.Node) -> Any:
    """The arguments, with the sizes of a reshape written out (no -1)."""
    if op_name(node.target) in ("aten.view", "aten.reshape") and isinstance(
        node.args[1], (list, tuple)
    ):
        return node.args[0], tuple(node.meta["val"].shape)
    return node.args


def _fold_slices(graph: fx.Graph) -> None:
    """cat([x[:a], x[a:]]) along the same dimension is x."""
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node.target) not in ("aten.cat", "aten.concat"):
            continue
        parts: Any = node.args[0]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if not all(op_name(p.target) == "aten.slice" for p in parts):
            continue
        source, at = parts[0].args[0], 0
        rank = source.meta["val"].dim()
        for part in parts:
            args = part.args
            aligned = args[0] is source and len(args) == 4 and args[1] % rank == dim % rank
            if not aligned or args[2] != at:
                break
            at = args[3]
        else:
            if at >= source.meta["val"].shape[dim]:
                node.replace_all_uses_with(source)

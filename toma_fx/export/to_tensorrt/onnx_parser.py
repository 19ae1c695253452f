"""What TensorRT's ONNX parser takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from toma_fx.export.to_tensorrt.aten import ATEN_TRAPS, LARGEST_RANK, LARGEST_TOP_K
from toma_fx.export.to_tensorrt.coverage import (
    Coverage,
    Location,
    Trap,
    Verdict,
    load_table,
    op_rows,
)

if TYPE_CHECKING:
    import onnx


# -- ONNX models ----------------------------------------------------------------------------------

SINCE: Mapping[str, tuple[int, int]] = {
    "Attention": (10, 14),
    "RMSNormalization": (10, 15),
    "RotaryEmbedding": (10, 15),
    "TensorScatter": (10, 15),
}
"""Operators that the parser of TensorRT 10 got late, by release notes: from which version."""


_TYPES = {
    "FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16", "INT64": "INT64", "INT32": "INT32",
    "INT8": "INT8", "UINT8": "UINT8", "BOOL": "BOOL", "FLOAT8E4M3FN": "FP8", "INT4": "INT4",
    "FLOAT4E2M1": "FP4", "DOUBLE": "FP32",
}  # fmt: skip


_DECIDING = {"Where": 1, "OneHot": 2, "If": -1, "Loop": -1, "Constant": -1, "ConstantOfShape": -1}
"""Which input decides on the element type, where it is not the first; -1: the first output."""


@dataclass(frozen=True)
class _Scope:
    """What is known of the values in a graph of an ONNX model.

    Attributes:
        constants: values known at build time, as arrays if they are small. types: element types.
        ranks: numbers of dimensions.
    """

    constants: Mapping[str, Any]
    types: Mapping[str, str]
    ranks: Mapping[str, int]


def onnx_coverage(model: onnx.ModelProto, tensorrt: str | None = None) -> Coverage:
    """What the ONNX parser of TensorRT takes of a model.

    Looks up every node, those of subgraphs and of the model's own functions included: its type,
    the element type of its data and the restrictions of the table that concern such programs.

    Args:
        model: with or without its external data. tensorrt: version to build with, as "10.13" (the
            table's own, if None).

    Raises:
        ImportError: the package onnx is missing.
    """
    table = load_table("onnx_tensorrt")
    version = _version(tensorrt or table["version"])
    own = {(f.domain, f.name) for f in model.functions}
    found: defaultdict[tuple[str, Verdict, str], list[Location]] = defaultdict(list)
    for node, scope in _onnx_nodes(model):
        if (node.domain, node.op_type) in own:
            continue
        name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
        verdict, note = _onnx_verdict(node, name, scope, table["operators"], version)
        found[name, verdict, note].append(_onnx_location(node))
    traps = (
        *ONNX_TRAPS,
        Trap("opset", "newer than the parser", partial(_opset, table["opsets"])),
    )
    findings = tuple(f for trap in traps for f in trap.findings(model))
    source = table["source"]
    text = f"{source['repository']} {source['path']}, {source['commit']}"
    return Coverage("onnx-tensorrt", table["version"], text, op_rows(found), findings)


def _version(text: str) -> tuple[int, int]:
    major, minor = (*text.split("."), "0")[:2]
    return int(major), int(minor)


def _onnx_location(node: onnx.NodeProto) -> Location:
    """A node's name and, if the exporter wrote it down, its module."""
    notes = {p.key: p.value for p in node.metadata_props}
    scopes = notes.get("pkg.torch.onnx.name_scopes", "")
    path = ""
    if scopes:
        # a list of names, outermost first; the last is the node's own
        parts = [p.strip(" '\"") for p in scopes.strip("[]").split(",")]
        path = parts[-2] if len(parts) > 1 else ""
    return Location(node.name or node.output[0], path)


def _onnx_nodes(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, _Scope]]:
    """Every node with what is known of the values around it."""
    empty = _Scope({}, {}, {})
    yield from _graph_nodes(model.graph, empty)
    for function in model.functions:
        for node in function.node:
            yield node, empty


def _graph_nodes(graph: Any, outer: _Scope) -> Iterator[tuple[onnx.NodeProto, _Scope]]:
    scope = _scope(graph, outer)
    for node in graph.node:
        yield node, scope
        for attribute in node.attribute:
            graphs = (
                [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs
            )
            for inner in graphs:
                yield from _graph_nodes(inner, scope)


def _scope(graph: Any, outer: _Scope) -> _Scope:
    from onnx import TensorProto

    constants, types, ranks = dict(outer.constants), dict(outer.types), dict(outer.ranks)

    def note(name: str, tensor: Any) -> None:
        constants[name] = _array(tensor)
        types[name] = TensorProto.DataType.Name(tensor.data_type)
        ranks[name] = len(tensor.dims)

    for tensor in graph.initializer:
        note(tensor.name, tensor)
    for info in (*graph.input, *graph.output, *graph.value_info):
        if info.type.HasField("tensor_type"):
            types[info.name] = TensorProto.DataType.Name(info.type.tensor_type.elem_type)
            if info.type.tensor_type.HasField("shape"):
                ranks[info.name] = len(info.type.tensor_type.shape.dim)
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = None
            for attribute in node.attribute:
                if attribute.name == "value":
                    note(node.output[0], attribute.t)
                elif attribute.name in ("value_int", "value_ints"):
                    constants[node.output[0]] = _attribute_value(attribute)
    return _Scope(constants, types, ranks)


def _array(tensor: Any) -> Any:
    """A small tensor's values; None for large ones and those in other files."""
    from onnx import TensorProto, numpy_helper

    size = 1
    for n in tensor.dims:
        size *= n
    if size > 64 or tensor.data_location == TensorProto.EXTERNAL:
        return None
    return numpy_helper.to_array(tensor)


def _attribute_value(attribute: Any) -> Any:
    from onnx import helper

    value = helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def _onnx_verdict(
    node: onnx.NodeProto,
    name: str,
    scope: _Scope,
    operators: Mapping[str, Any],
    version: tuple[int, int],
) -> tuple[Verdict, str]:
    entry = operators.get(name)
    if entry is None or not entry["supported"]:
        return "missing", "the parser does not know it" if entry is None else "not supported"
    since = SINCE.get(name, (0, 0))
    if since > version:
        return "refused", f"only from TensorRT {since[0]}.{since[1]}"
    decides = _DECIDING.get(name, 0)
    values = [node.output[0]] if decides < 0 else list(node.input)[decides : decides + 1]
    kind = scope.types.get(values[0], "UNDEFINED") if values else "UNDEFINED"
    if kind != "UNDEFINED" and _TYPES.get(kind, kind) not in entry["types"]:
        return "refused", f"of {kind}, but it takes {', '.join(entry['types'])}"
    if not entry["restricted"]:
        return "taken", "imported"
    rule = RESTRICTIONS.get("Reduce" if name.startswith("Reduce") else name)
    if rule is None:
        return "conditional", f"restricted: {', '.join(entry['mentions']) or 'see the source'}"
    attributes = {a.name: _attribute_value(a) for a in node.attribute}
    refusal = rule(node, attributes, scope)
    return ("refused", refusal) if refusal else ("taken", "imported; its use was checked")


def _input(node: onnx.NodeProto, index: int) -> str:
    """Name of an input, "" if it is left out."""
    return node.input[index] if len(node.input) > index else ""


def _constant_input(
    index: int, words: str, node: onnx.NodeProto, attributes: Mapping[str, Any], scope: _Scope
) -> str:
    name = _input(node, index)
    return "" if not name or name in scope.constants else f"{words} must be known at build time"


def _top_k(node: onnx.NodeProto, attributes: Mapping[str, Any], scope: _Scope) -> str:
    if not attributes.get("sorted", 1):
        return "values must be sorted"
    k = scope.constants.get(_input(node, 1))
    if k is None:
        return "K must be known at build time"
    number = int(k.reshape(-1)[0]) if hasattr(k, "reshape") else int(k)
    return "" if number < LARGEST_TOP_K else f"K is {number}, it must be under {LARGEST_TOP_K}"


def _scatter_nd(node: onnx.NodeProto, attributes: Mapping[str, Any], scope: _Scope) -> str:
    reduction = attributes.get("reduction", "none")
    return "" if reduction == "none" else f"reduction {reduction}"


def _one_output(node: onnx.NodeProto, attributes: Mapping[str, Any], scope: _Scope) -> str:
    return "more than the first output is used" if any(node.output[1:]) else ""


def _onnx_attention(node: onnx.NodeProto, attributes: Mapping[str, Any], scope: _Scope) -> str:
    if any(node.input[4:]) or any(node.output[1:]):
        return "inputs or outputs for a cache"
    if attributes.get("softcap", 0.0) or attributes.get("qk_matmul_output_mode", 0):
        return "softcap or qk_matmul_output_mode"
    ranks = {scope.ranks.get(name, 4) for name in node.input[:4] if name}
    return "" if ranks <= {4} else "inputs and mask need 4 dimensions"


def _pool(node: onnx.NodeProto, attributes: Mapping[str, Any], scope: _Scope) -> str:
    if any(d != 1 for d in attributes.get("dilations", ())):
        return "dilations"
    return _one_output(node, attributes, scope) or (
        "" if len(attributes.get("kernel_shape", (1, 1))) in (2, 3) else "not of 2 or 3 dimensions"
    )


def _resize(node: onnx.NodeProto, attributes: Mapping[str, Any], scope: _Scope) -> str:
    allowed = {
        "mode": ("nearest", "linear"),
        "coordinate_transformation_mode": (
            "half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric",
            "align_corners",
        ),
        "nearest_mode": ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"),
        "keep_aspect_ratio_policy": ("stretch",),
        "antialias": (0,),
    }  # fmt: skip
    wrong = [
        f"{k} {attributes[k]}"
        for k, values in allowed.items()
        if k in attributes and attributes[k] not in values
    ]
    return ", ".join(wrong)


def _constant(node: onnx.NodeProto, attributes: Mapping[str, Any], scope: _Scope) -> str:
    wrong = {"sparse_value", "value_string", "value_strings"} & set(attributes)
    return ", ".join(sorted(wrong))


Restriction = Callable[["onnx.NodeProto", Mapping[str, Any], _Scope], str]


RESTRICTIONS: Mapping[str, Restriction] = {
    "TopK": _top_k,
    "ScatterND": _scatter_nd,
    "Reduce": partial(_constant_input, 1, "axes"),
    "Squeeze": partial(_constant_input, 1, "axes"),
    "Unsqueeze": partial(_constant_input, 1, "axes"),
    "CumSum": partial(_constant_input, 1, "axis"),
    "OneHot": partial(_constant_input, 1, "depth"),
    "LayerNormalization": _one_output,
    "Attention": _onnx_attention,
    "AveragePool": _pool,
    "MaxPool": _pool,
    "Resize": _resize,
    "Constant": _constant,
}
"""Restrictions of the parser, by operator ("Reduce" for all reductions): what stands against it."""


def _opset(opsets: Sequence[int], model: onnx.ModelProto) -> Iterator[tuple[Location, str]]:
    for used in model.opset_import:
        if used.domain in ("", "ai.onnx") and not opsets[0] <= used.version <= opsets[1]:
            text = f"opset {used.version}, the parser knows {opsets[0]} to {opsets[1]}"
            yield Location(model.graph.name, ""), text


def _onnx_dynamic(model: onnx.ModelProto) -> Iterator[tuple[Location, str]]:
    initializers = {t.name for t in model.graph.initializer}
    for value in model.graph.input:
        shape = value.type.tensor_type.shape
        if value.name not in initializers and not all(d.HasField("dim_value") for d in shape.dim):
            sizes = tuple(d.dim_param or "?" if not d.HasField("dim_value") else d.dim_value
                          for d in shape.dim)  # fmt: skip
            yield Location(value.name, ""), f"has the shape {sizes}"


def _onnx_control_flow(model: onnx.ModelProto) -> Iterator[tuple[Location, str]]:
    for node, scope in _onnx_nodes(model):
        if node.op_type != "If" or node.domain not in ("", "ai.onnx"):
            continue
        branches = [a.g for a in node.attribute if a.name in ("then_branch", "else_branch")]
        known = [_scope(branch, scope).ranks for branch in branches]
        for outputs in zip(*(b.output for b in branches), strict=True):
            ranks = {r.get(o.name) for r, o in zip(known, outputs, strict=True)}
            if len(ranks) > 1:
                yield _onnx_location(node), "branches give different numbers of dimensions"


def _onnx_ranks(model: onnx.ModelProto) -> Iterator[tuple[Location, str]]:
    for info in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        rank = len(info.type.tensor_type.shape.dim)
        if rank > LARGEST_RANK:
            text = f"has {rank} dimensions, at most {LARGEST_RANK} are possible"
            yield Location(info.name, ""), text


ONNX_TRAPS: tuple[Trap[Any], ...] = (
    Trap("dynamic shapes", "engines here have static ones", _onnx_dynamic),
    Trap("branches", "those of an If must give equal ranks", _onnx_control_flow),
    Trap("rank", "tensors of too many dimensions", _onnx_ranks),
)


TRAPS: tuple[Trap[Any], ...] = (*ATEN_TRAPS, *ONNX_TRAPS)
"""Every check, for programs of torch.export and for ONNX models."""

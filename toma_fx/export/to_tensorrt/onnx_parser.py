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
_DECIDING = {"Where": 1, "OneHot": 2, "Constant": -1, "ConstantOfShape": -1}
"""Which input decides on the element type, where it is not the first; -1: the first output."""


@dataclass(frozen=True)
class _Values:
    """What is known of the values of an ONNX model.

    Attributes:
        constants: values known at build time, as arrays if they are small. types: element types.
        ranks: numbers of dimensions.
    """

    constants: Mapping[str, Any]
    types: Mapping[str, str]
    ranks: Mapping[str, int]


def onnx_coverage(model: onnx.ModelProto, tensorrt: str | None = None) -> Coverage:
    """What the ONNX parser of TensorRT takes of a model.

    Looks up every node: its type, the element type of its data and the restrictions of the table
    that concern our programs. These have no subgraphs, which are not looked into.

    Args:
        model: with or without its external data. tensorrt: version to build with, as "10.13" (the
            table's own, if None).

    Raises:
        ImportError: the package onnx is missing.
    """
    table = load_table("onnx_tensorrt")
    version = _version(tensorrt or table["version"])
    values = _known_values(model.graph)
    locations: defaultdict[tuple[str, Verdict, str], list[Location]] = defaultdict(list)
    for node in model.graph.node:
        name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
        verdict, note = _onnx_verdict(node, name, values, table["operators"], version)
        locations[name, verdict, note].append(_onnx_location(node))
    traps = (
        *ONNX_TRAPS,
        Trap("opset", "newer than the parser", partial(_opset, table["opsets"])),
    )
    findings = tuple(f for trap in traps for f in trap.findings(model))
    source = table["source"]
    text = f"{source['repository']} {source['path']}, {source['commit']}"
    return Coverage("onnx-tensorrt", table["version"], text, op_rows(locations), findings)


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


def _known_values(graph: Any) -> _Values:
    from onnx import TensorProto

    constants: dict[str, Any] = {}
    types: dict[str, str] = {}
    ranks: dict[str, int] = {}

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
    return _Values(constants, types, ranks)


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
    values: _Values,
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
    names = [node.output[0]] if decides < 0 else list(node.input)[decides : decides + 1]
    kind = values.types.get(names[0], "UNDEFINED") if names else "UNDEFINED"
    if kind != "UNDEFINED" and _TYPES.get(kind, kind) not in entry["types"]:
        return "refused", f"of {kind}, but it takes {', '.join(entry['types'])}"
    if any(a.HasField("g") or a.graphs for a in node.attribute):
        return "conditional", "its subgraph was not looked into"
    if not entry["restricted"]:
        return "taken", "imported"
    rule = RESTRICTIONS.get("Reduce" if name.startswith("Reduce") else name)
    if rule is None:
        return "conditional", f"restricted: {', '.join(entry['mentions']) or 'see the source'}"
    attributes = {a.name: _attribute_value(a) for a in node.attribute}
    refusal = rule(node, attributes, values)
    return ("refused", refusal) if refusal else ("taken", "imported; its use was checked")


def _input(node: onnx.NodeProto, index: int) -> str:
    """Name of an input, "" if it is left out."""
    return node.input[index] if len(node.input) > index else ""


def _constant_input(
    index: int, words: str, node: onnx.NodeProto, attributes: Mapping[str, Any], values: _Values
) -> str:
    name = _input(node, index)
    return "" if not name or name in values.constants else f"{words} must be known at build time"


def _top_k(node: onnx.NodeProto, attributes: Mapping[str, Any], values: _Values) -> str:
    if not attributes.get("sorted", 1):
        return "values must be sorted"
    k = values.constants.get(_input(node, 1))
    if k is None:
        return "K must be known at build time"
    number = int(k.reshape(-1)[0]) if hasattr(k, "reshape") else int(k)
    return "" if number < LARGEST_TOP_K else f"K is {number}, it must be under {LARGEST_TOP_K}"


def _scatter_nd(node: onnx.NodeProto, attributes: Mapping[str, Any], values: _Values) -> str:
    reduction = attributes.get("reduction", "none")
    return "" if reduction == "none" else f"reduction {reduction}"


def _one_output(node: onnx.NodeProto, attributes: Mapping[str, Any], values: _Values) -> str:
    return "more than the first output is used" if any(node.output[1:]) else ""


def _onnx_attention(node: onnx.NodeProto, attributes: Mapping[str, Any], values: _Values) -> str:
    if any(node.input[4:]) or any(node.output[1:]):
        return "inputs or outputs for a cache"
    if attributes.get("softcap", 0.0) or attributes.get("qk_matmul_output_mode", 0):
        return "softcap or qk_matmul_output_mode"
    ranks = {values.ranks.get(name, 4) for name in node.input[:4] if name}
    return "" if ranks <= {4} else "inputs and mask need 4 dimensions"


def _pool(node: onnx.NodeProto, attributes: Mapping[str, Any], values: _Values) -> str:
    if any(d != 1 for d in attributes.get("dilations", ())):
        return "dilations"
    return _one_output(node, attributes, values) or (
        "" if len(attributes.get("kernel_shape", (1, 1))) in (2, 3) else "not of 2 or 3 dimensions"
    )


def _resize(node: onnx.NodeProto, attributes: Mapping[str, Any], values: _Values) -> str:
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


def _constant(node: onnx.NodeProto, attributes: Mapping[str, Any], values: _Values) -> str:
    wrong = {"sparse_value", "value_string", "value_strings"} & set(attributes)
    return ", ".join(sorted(wrong))


Restriction = Callable[["onnx.NodeProto", Mapping[str, Any], _Values], str]
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


def _onnx_ranks(model: onnx.ModelProto) -> Iterator[tuple[Location, str]]:
    for info in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        rank = len(info.type.tensor_type.shape.dim)
        if rank > LARGEST_RANK:
            text = f"has {rank} dimensions, at most {LARGEST_RANK} are possible"
            yield Location(info.name, ""), text


ONNX_TRAPS: tuple[Trap[Any], ...] = (
    Trap("dynamic shapes", "engines here have static ones", _onnx_dynamic),
    Trap("rank", "tensors of too many dimensions", _onnx_ranks),
)
TRAPS: tuple[Trap[Any], ...] = (*ATEN_TRAPS, *ONNX_TRAPS)
"""Every check, for programs of torch.export and for ONNX models."""

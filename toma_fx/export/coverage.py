"""What TensorRT can take of a program, read from tables: nothing of TensorRT is imported.

Two ways lead to an engine, and each has a table of what it takes, made by tools/renew_tables.py:

    torch.export program -> Torch-TensorRT's converters    tables/torch_tensorrt.json
    ONNX file -> the ONNX parser of TensorRT               tables/onnx_tensorrt.json

A table says which operators are known. Converters and the parser also look at how an operator is
used: the rules here repeat what they look at, where our programs meet it. What a table can't say at
all (control flow, shapes, ranks, versions) is asked by named checks, `TRAPS`.

A coverage is a prediction. Only a build shows that TensorRT finds a kernel for everything.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text
from torch import Tensor, fx
from torch.export import ExportedProgram

from toma_fx.errors import BuildError
from toma_fx.printed import Printed

if TYPE_CHECKING:
    import onnx

Verdict = Literal["taken", "folded", "conditional", "refused", "missing"]
"""taken: converted, decomposed or removed by name. folded: computed at build time. conditional: it
depends on what no rule here looks at. refused: known, but not as it is used. missing: unknown."""
LARGEST_TOP_K = 3840
LARGEST_RANK = 8
DOUBLE = "float64"
"""Name of the check that an option of the build answers."""
TABLES = Path(__file__).parent / "tables"


# -- what is found --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A node: its name in the graph, and the path of the module that it came from ("" if none)."""

    node: str
    module: str

    def __str__(self) -> str:
        return f"{self.module}: {self.node}" if self.module else self.node


@dataclass(frozen=True)
class OpRow:
    """One operator of a program and one thing to say about it.

    Attributes:
        name: as "aten.add.Tensor", or the ONNX operator type, with its domain unless ONNX's own.
        count: nodes that this holds for. verdict: whether TensorRT takes them.
        note: how, or why not. places: the nodes, if they are not taken.
    """

    name: str
    count: int
    verdict: Verdict
    note: str
    places: tuple[Place, ...] = ()


@dataclass(frozen=True)
class Finding:
    """Something that a check of `TRAPS` found.

    Attributes:
        trap: name of the check. place: where. detail: what is there.
        fatal: whether no engine can be made of it; otherwise it makes a worse one.
    """

    trap: str
    place: Place
    detail: str
    fatal: bool = True


@dataclass(frozen=True)
class Coverage(Printed):
    """What TensorRT takes of a program; prints as a table, converts to JSON.

    Attributes:
        target: "torch-tensorrt" or "onnx-tensorrt". version: of the table that was asked.
        source: what the table was made from.
        ops: what is not taken first. findings: of the checks.
    """

    target: Literal["torch-tensorrt", "onnx-tensorrt"]
    version: str
    source: str
    ops: tuple[OpRow, ...]
    findings: tuple[Finding, ...]

    @property
    def uncovered(self) -> tuple[OpRow, ...]:
        """Operators that TensorRT does not take."""
        return tuple(row for row in self.ops if row.verdict in ("missing", "refused"))

    @property
    def complete(self) -> bool:
        """Whether nothing known speaks against one engine for the whole program."""
        return not self.uncovered and not any(f.fatal for f in self.findings)

    def to_json(self) -> str:
        """The coverage as JSON text."""
        return json.dumps({**asdict(self), "complete": self.complete}, indent=2)

    def _parts(self) -> list[Any]:
        table = Table(title=f"operators for {self.target}", title_justify="left", box=SIMPLE)
        table.add_column("operator", no_wrap=True)
        table.add_column("nodes", justify="right")
        table.add_column("verdict", no_wrap=True)
        for name in ("note", "where"):
            table.add_column(name, overflow="fold")
        for row in self.ops:
            where = _listed(row.places, 3)
            table.add_row(row.name, str(row.count), row.verdict, row.note, where)
        nodes = sum(row.count for row in self.ops)
        left = sum(row.count for row in self.uncovered)
        words = "every operator is taken" if not left else f"{left} of {nodes} nodes are not taken"
        parts: list[Any] = [table, Text(f"{words}, by the table of {self.version} ({self.source})")]
        if self.findings:
            found = Table(title="checks", title_justify="left", box=SIMPLE)
            for name in ("check", "where", "what"):
                found.add_column(name, overflow="fold")
            for f in self.findings:
                kind = f.trap if f.fatal else f"{f.trap} (no obstacle)"
                found.add_row(kind, str(f.place), f.detail)
            parts.append(found)
        return parts


def require(coverage: Coverage) -> None:
    """Passes if nothing known speaks against one engine for the whole program.

    Raises:
        BuildError: names every operator that is not taken and every check that failed, each with
            its nodes and their modules.
    """
    if coverage.complete:
        return
    lines = [f"{r.name} ({r.note}) at {_listed(r.places, 5)}" for r in coverage.uncovered]
    lines += [f"{f.trap} ({f.detail}) at {f.place}" for f in coverage.findings if f.fatal]
    raise BuildError(
        "TensorRT does not take the whole program",
        where="; ".join(lines),
        expected=f"only what {coverage.target} {coverage.version} takes",
        got=f"{sum(r.count for r in coverage.uncovered)} nodes that it does not take"
        if coverage.uncovered
        else "operators that it takes, used as it can't",
        hint="another method or other options of it, or another target, for instance aoti",
    )


def _listed(places: Sequence[Place], most: int) -> str:
    shown = ", ".join(str(p) for p in places[:most])
    return f"{shown} and {len(places) - most} more" if len(places) > most else shown


def _rows(found: Mapping[tuple[str, Verdict, str], Sequence[Place]]) -> tuple[OpRow, ...]:
    """Rows of operators, the worst verdicts first."""
    order = ("missing", "refused", "conditional", "taken", "folded")
    rows = [
        OpRow(name, len(at), verdict, note, () if verdict in ("taken", "folded") else tuple(at))
        for (name, verdict, note), at in found.items()
    ]
    return tuple(sorted(rows, key=lambda row: (order.index(row.verdict), row.name, row.note)))


def load_table(name: str) -> dict[str, Any]:
    """A table of this package: "torch_tensorrt", "onnx_tensorrt" or "signatures"."""
    loaded = json.loads((TABLES / f"{name}.json").read_text())
    assert isinstance(loaded, dict)
    return loaded


P = TypeVar("P")


@dataclass(frozen=True)
class Trap(Generic[P]):
    """A named check over a whole program: what it is about, and what finds it."""

    name: str
    about: str
    find: Callable[[P], Iterator[tuple[Place, str]]]
    fatal: bool = True

    def findings(self, program: P) -> Iterator[Finding]:
        """What it finds in a program."""
        for place, detail in self.find(program):
            yield Finding(self.name, place, detail, self.fatal)


# -- programs of torch.export ---------------------------------------------------------------------


def aten_coverage(program: ExportedProgram, truncate_double: bool = False) -> Coverage:
    """What Torch-TensorRT takes of a program, with its default settings otherwise.

    Like its `compile`, this first decomposes the program (`decompositions`), leaves out what
    constant folding computes from parameters alone and what its lowering passes remove, and then
    looks every remaining node up. An operator that Torch-TensorRT has a decomposition of its own
    for counts as taken; that decomposition is not run here.

    Args:
        program: not changed. truncate_double: whether the build may compute in float32 what the
            program computes in float64; otherwise there must be no float64.

    Cost: decomposing the program, seconds for a few thousand nodes.
    """
    made_of = load_table("torch_tensorrt")
    lowered = program.run_decompositions(decompositions())
    live = _live(lowered)
    found: defaultdict[tuple[str, Verdict, str], list[Place]] = defaultdict(list)
    for node in lowered.graph.nodes:
        if node.op == "call_function":
            name = op_name(node)
            verdict, note = _aten_verdict(node, name, made_of, node in live)
            found[name, verdict, note].append(place_of(node))
    answered = {DOUBLE} if truncate_double else set()
    traps = (replace(t, fatal=t.fatal and t.name not in answered) for t in ATEN_TRAPS)
    findings = tuple(f for trap in traps for f in trap.findings(lowered))
    source = f"{made_of['source']['file']}"
    return Coverage("torch-tensorrt", made_of["version"], source, _rows(found), findings)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The decompositions of torch that Torch-TensorRT applies before it converts.

    Those of its list, and composite operators of ATen, except what it has converters or its own
    decompositions for. Names that this version of torch does not have are left out.
    """
    from torch._decomp import get_decompositions
    from torch._export.utils import (
        _collect_all_valid_cia_ops_for_aten_namespace,
        _get_decomp_for_cia,
    )

    names = load_table("torch_tensorrt")["decomposed"]
    chosen = dict(get_decompositions([op for n in names["by_torch"] for op in _overloads(n)]))
    kept = {op for key in ("kept", "attention", "own") for n in names[key] for op in _overloads(n)}
    for op in _collect_all_valid_cia_ops_for_aten_namespace():
        chosen[op] = _get_decomp_for_cia(op)
    return {op: function for op, function in chosen.items() if op not in kept}


def _overloads(name: str) -> list[Any]:
    """Operators of torch by a name of the table, which may stand for all overloads."""
    space, _, rest = name.partition(".")
    packet_name, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, space), packet_name, None)
    if packet is None:
        return []
    wanted = [overload] if overload else packet.overloads()
    return [getattr(packet, o) for o in wanted if o in packet.overloads()]


def op_name(node: fx.Node) -> str:
    """Name of a node's operator, as the table has it."""
    target: Any = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target.name()}"
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = getattr(target, "__module__", "").removeprefix("_")
    return f"{module}.{getattr(target, '__name__', target)}"


def place_of(node: fx.Node) -> Place:
    """A node's name and the path of its module."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return Place(node.name, path)


def _live(program: ExportedProgram) -> set[fx.Node]:
    """Nodes that need an input of the call: what is not among them is folded at build time."""
    inputs = set(program.graph_signature.user_inputs)
    live: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            needed = node.name in inputs
        else:
            tags = getattr(node.target, "tags", ())
            needed = any(other in live for other in node.all_input_nodes)
            needed |= torch.Tag.nondeterministic_seeded in tags
            needed |= isinstance(node.target, torch._ops.HigherOrderOperator)
        if needed:
            live.add(node)
    return live


def _aten_verdict(
    node: fx.Node, name: str, made_of: Mapping[str, Any], live: bool
) -> tuple[Verdict, str]:
    if name in made_of["lowered"]:
        return "taken", f"by the pass {made_of['lowered'][name]}"
    if not live:
        return "folded", "needs no input of the call"
    packet = name.rpartition(".")[0]
    if {name, packet} & set(made_of["decomposed"]["own"]):
        return "taken", "decomposed by Torch-TensorRT"
    entry = made_of["converters"].get(name)
    if entry is None:
        return "missing", "no converter"
    if not entry["validated"]:
        return "taken", "converted"
    known = [name for name in entry["validators"] if name in VALIDATORS]
    refusals = [text for name in known if (text := VALIDATORS[name](node))]
    if refusals:
        return "refused", "; ".join(refusals)
    unknown = sorted(set(entry["validators"]) - set(known))
    if unknown:
        return "conditional", f"subject to {', '.join(unknown)}"
    return "taken", "converted; its use was checked"


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument by position or keyword."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def _value(argument: Any) -> Any:
    """What a node gives, as a fake tensor; other arguments as they are."""
    return argument.meta.get("val") if isinstance(argument, fx.Node) else argument


def _first_result_only(node: fx.Node) -> str:
    users = list(node.users)
    if len(users) == 1 and op_name(users[0]) == "operator.getitem" and users[0].args[1] == 0:
        return ""
    return "only its first result may be used, once"


def _few_enough(k: Any) -> str:
    if isinstance(k, int) and k <= LARGEST_TOP_K:
        return ""
    return f"picks {k} values, at most {LARGEST_TOP_K} are possible"


def _sort(node: fx.Node) -> str:
    if len(node.args) < 2:
        # the validator of 2.13 reads the second argument without looking whether there is one
        return "sorts the last dimension by default: Torch-TensorRT needs it as an argument"
    size = _value(node.args[0]).shape[node.args[1]]
    return _few_enough(size)


def _attention(node: fx.Node) -> str:
    query, key, value = (tuple(_value(a).shape) for a in node.args[:3])
    if key != value:
        return "keys and values differ in shape"
    grouped = bool(_argument(node, 7, "enable_gqa", False))
    same = [i for i in range(len(query)) if i != len(query) - 2 and not (grouped and i == 1)]
    if len(query) != len(key) or any(query[i] != key[i] for i in same):
        return "queries and keys differ in more than their number"
    return ""


def _cat(node: fx.Node) -> str:
    ranks = {_value(a).dim() for a in _argument(node, 0, "tensors")}
    return "joins tensors of different ranks" if len(ranks) > 1 else ""


def _index(node: fx.Node) -> str:
    chosen = [_value(i).dtype for i in _argument(node, 1, "indices") if i is not None]
    if torch.bool in chosen:
        return "a boolean index gives shapes that follow the data"
    return "" if {*chosen} <= {torch.int32, torch.int64} else "indices are no integers"


def _between_input_and_output(node: fx.Node) -> str:
    given = any(a.op == "placeholder" for a in node.all_input_nodes)
    taken = any(user.op == "output" for user in node.users)
    return "copies an input to an output" if given and taken else ""


def _cast(node: fx.Node) -> str:
    floats = {torch.float32, torch.float16, torch.bfloat16}
    dtype = node.kwargs.get("dtype")
    if dtype in floats | {torch.int32, torch.int64, torch.int8, torch.bool}:
        return ""
    return f"a cast to {dtype}" if dtype is not None else "a copy without a cast"


def _logical(node: fx.Node) -> str:
    values = [_value(a) for a in node.args]
    plain = all(isinstance(v, bool) or getattr(v, "dtype", None) == torch.bool for v in values)
    return "" if plain else "bits of integers, not truth values"


def _nothing(node: fx.Node) -> str:
    return ""


VALIDATORS: Mapping[str, Callable[[fx.Node], str]] = {
    "one_user_validator": _first_result_only,
    "topk_validator": lambda node: _few_enough(_argument(node, 1, "k")),
    "sort_validator": _sort,
    "scaled_dot_product_attention_validator": _attention,
    "cat_validator": _cat,
    "index_dtype_validator": _index,
    "index_has_bool_indices": _nothing,
    "index_nonbool_validator": _nothing,
    "is_only_operator_on_placeholder": _between_input_and_output,
    "to_copy_dtype_validator": _cast,
    "bitwise_type_validator": _logical,
    "bitwise_not_type_validator": _logical,
    "has_static_shapes_in_args": _nothing,
    "convolution_capability_validator": _nothing,
    "cumsum_validator": _nothing,
    "getitem_validator": _nothing,
}
"""What Torch-TensorRT's validators look at, by their names: the reason for a refusal or "".

Those that say nothing are about TensorRT-RTX, about dynamic shapes, or said by another."""


def _control_flow(program: ExportedProgram) -> Iterator[tuple[Place, str]]:
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            yield place_of(node), f"{node.target.name()} has no converter"


def _named(*names: str) -> Callable[[ExportedProgram], Iterator[tuple[Place, str]]]:
    def find(program: ExportedProgram) -> Iterator[tuple[Place, str]]:
        for node in program.graph.nodes:
            if node.op == "call_function" and op_name(node).rpartition(".")[0] in names:
                yield place_of(node), f"{op_name(node)} has no converter"

    return find


def _scatter_reduce(program: ExportedProgram) -> Iterator[tuple[Place, str]]:
    for node in program.graph.nodes:
        reduces = node.op == "call_function" and op_name(node).startswith("aten.scatter_reduce")
        if reduces and not _argument(node, 5, "include_self", True):
            yield place_of(node), "scatter_reduce without the initial values raises"


def _scatter_add(program: ExportedProgram) -> Iterator[tuple[Place, str]]:
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if op_name(node).startswith(("aten.scatter_add", "aten.scatter_reduce")):
            steps = _value(node.args[3]).shape[node.args[1]]
            yield place_of(node), f"is written out as {steps} scatters one after the other"


def _dynamic(program: ExportedProgram) -> Iterator[tuple[Place, str]]:
    for node in program.graph.nodes:
        value = node.meta.get("val")
        shape = value.shape if node.op == "placeholder" and isinstance(value, Tensor) else ()
        if not all(isinstance(size, int) for size in shape):
            yield place_of(node), f"has the shape {tuple(map(str, shape))}"


def _values(program: ExportedProgram) -> Iterator[tuple[fx.Node, Tensor]]:
    """Tensors that the engine would hold."""
    live = _live(program)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node in live and isinstance(value, Tensor):
            yield node, value


def _ranks(program: ExportedProgram) -> Iterator[tuple[Place, str]]:
    for node, value in _values(program):
        if value.dim() > LARGEST_RANK:
            yield (
                place_of(node),
                f"has {value.dim()} dimensions, at most {LARGEST_RANK} are possible",
            )


def _of_type(
    wanted: Callable[[torch.dtype], bool],
) -> Callable[[ExportedProgram], Iterator[tuple[Place, str]]]:
    """Finds tensors by their element type, once a module."""

    def find(program: ExportedProgram) -> Iterator[tuple[Place, str]]:
        found: defaultdict[tuple[str, torch.dtype], list[Place]] = defaultdict(list)
        for node, value in _values(program):
            if wanted(value.dtype):
                place = place_of(node)
                found[place.module, value.dtype].append(place)
        for (_, dtype), places in found.items():
            more = f", like {len(places) - 1} more here" if len(places) > 1 else ""
            yield places[0], f"is {dtype}{more}"

    return find


ATEN_TRAPS: tuple[Trap[ExportedProgram], ...] = (
    Trap("control flow", "cond, while_loop, scan", _control_flow),
    Trap(
        "no converter", "operators known to have none", _named("aten.one_hot", "aten.searchsorted")
    ),
    Trap("scatter_reduce", "include_self=False", _scatter_reduce),
    Trap("scatter_add", "no single layer does it", _scatter_add, fatal=False),
    Trap("dynamic shapes", "engines here have static ones", _dynamic),
    Trap("rank", "tensors of too many dimensions", _ranks),
    Trap(
        DOUBLE,
        "only with the option truncate_double",
        _of_type(lambda dtype: dtype == torch.float64),
    ),
    Trap("complex", "no such element type", _of_type(lambda dtype: dtype.is_complex)),
)


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
    made_of = load_table("onnx_tensorrt")
    version = _version(tensorrt or made_of["version"])
    own = {(f.domain, f.name) for f in model.functions}
    found: defaultdict[tuple[str, Verdict, str], list[Place]] = defaultdict(list)
    for node, scope in _onnx_nodes(model):
        if (node.domain, node.op_type) in own:
            continue
        name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
        verdict, note = _onnx_verdict(node, name, scope, made_of["operators"], version)
        found[name, verdict, note].append(_onnx_place(node))
    traps = (
        *ONNX_TRAPS,
        Trap("opset", "newer than the parser", partial(_opset, made_of["opsets"])),
    )
    findings = tuple(f for trap in traps for f in trap.findings(model))
    source = made_of["source"]
    text = f"{source['repository']} {source['path']}, {source['commit']}"
    return Coverage("onnx-tensorrt", made_of["version"], text, _rows(found), findings)


def _version(text: str) -> tuple[int, int]:
    major, minor = (*text.split("."), "0")[:2]
    return int(major), int(minor)


def _onnx_place(node: onnx.NodeProto) -> Place:
    """A node's name and, if the exporter wrote it down, its module."""
    notes = {p.key: p.value for p in node.metadata_props}
    scopes = notes.get("pkg.torch.onnx.name_scopes", "")
    path = ""
    if scopes:
        # a list of names, outermost first; the last is the node's own
        parts = [p.strip(" '\"") for p in scopes.strip("[]").split(",")]
        path = parts[-2] if len(parts) > 1 else ""
    return Place(node.name or node.output[0], path)


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
                    constants[node.output[0]] = _attribute(attribute)
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


def _attribute(attribute: Any) -> Any:
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
    rule = RULES.get("Reduce" if name.startswith("Reduce") else name)
    if rule is None:
        return "conditional", f"restricted: {', '.join(entry['mentions']) or 'see the source'}"
    given = {a.name: _attribute(a) for a in node.attribute}
    refusal = rule(node, given, scope)
    return ("refused", refusal) if refusal else ("taken", "imported; its use was checked")


def _input(node: onnx.NodeProto, index: int) -> str:
    """Name of an input, "" if it is left out."""
    return node.input[index] if len(node.input) > index else ""


def _constant_input(
    index: int, words: str, node: onnx.NodeProto, given: Mapping[str, Any], scope: _Scope
) -> str:
    name = _input(node, index)
    return "" if not name or name in scope.constants else f"{words} must be known at build time"


def _top_k(node: onnx.NodeProto, given: Mapping[str, Any], scope: _Scope) -> str:
    if not given.get("sorted", 1):
        return "values must be sorted"
    k = scope.constants.get(_input(node, 1))
    if k is None:
        return "K must be known at build time"
    number = int(k.reshape(-1)[0]) if hasattr(k, "reshape") else int(k)
    return "" if number < LARGEST_TOP_K else f"K is {number}, it must be under {LARGEST_TOP_K}"


def _scatter_nd(node: onnx.NodeProto, given: Mapping[str, Any], scope: _Scope) -> str:
    how = given.get("reduction", "none")
    return "" if how == "none" else f"reduction {how}"


def _one_output(node: onnx.NodeProto, given: Mapping[str, Any], scope: _Scope) -> str:
    return "more than the first output is used" if any(node.output[1:]) else ""


def _onnx_attention(node: onnx.NodeProto, given: Mapping[str, Any], scope: _Scope) -> str:
    if any(node.input[4:]) or any(node.output[1:]):
        return "inputs or outputs for a cache"
    if given.get("softcap", 0.0) or given.get("qk_matmul_output_mode", 0):
        return "softcap or qk_matmul_output_mode"
    ranks = {scope.ranks.get(name, 4) for name in node.input[:4] if name}
    return "" if ranks <= {4} else "inputs and mask need 4 dimensions"


def _pool(node: onnx.NodeProto, given: Mapping[str, Any], scope: _Scope) -> str:
    if any(d != 1 for d in given.get("dilations", ())):
        return "dilations"
    return _one_output(node, given, scope) or (
        "" if len(given.get("kernel_shape", (1, 1))) in (2, 3) else "not of 2 or 3 dimensions"
    )


def _resize(node: onnx.NodeProto, given: Mapping[str, Any], scope: _Scope) -> str:
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
        f"{k} {given[k]}" for k, values in allowed.items() if k in given and given[k] not in values
    ]
    return ", ".join(wrong)


def _constant(node: onnx.NodeProto, given: Mapping[str, Any], scope: _Scope) -> str:
    wrong = {"sparse_value", "value_string", "value_strings"} & set(given)
    return ", ".join(sorted(wrong))


Rule = Callable[["onnx.NodeProto", Mapping[str, Any], _Scope], str]
RULES: Mapping[str, Rule] = {
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


def _opset(opsets: Sequence[int], model: onnx.ModelProto) -> Iterator[tuple[Place, str]]:
    for used in model.opset_import:
        if used.domain in ("", "ai.onnx") and not opsets[0] <= used.version <= opsets[1]:
            text = f"opset {used.version}, the parser knows {opsets[0]} to {opsets[1]}"
            yield Place(model.graph.name, ""), text


def _onnx_dynamic(model: onnx.ModelProto) -> Iterator[tuple[Place, str]]:
    held = {t.name for t in model.graph.initializer}
    for given in model.graph.input:
        shape = given.type.tensor_type.shape
        if given.name not in held and not all(d.HasField("dim_value") for d in shape.dim):
            sizes = tuple(d.dim_param or "?" if not d.HasField("dim_value") else d.dim_value
                          for d in shape.dim)  # fmt: skip
            yield Place(given.name, ""), f"has the shape {sizes}"


def _onnx_control_flow(model: onnx.ModelProto) -> Iterator[tuple[Place, str]]:
    for node, scope in _onnx_nodes(model):
        if node.op_type != "If" or node.domain not in ("", "ai.onnx"):
            continue
        branches = [a.g for a in node.attribute if a.name in ("then_branch", "else_branch")]
        known = [_scope(branch, scope).ranks for branch in branches]
        for outputs in zip(*(b.output for b in branches), strict=True):
            ranks = {r.get(o.name) for r, o in zip(known, outputs, strict=True)}
            if len(ranks) > 1:
                yield _onnx_place(node), "branches give different numbers of dimensions"


def _onnx_ranks(model: onnx.ModelProto) -> Iterator[tuple[Place, str]]:
    for info in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        rank = len(info.type.tensor_type.shape.dim)
        if rank > LARGEST_RANK:
            yield (
                Place(info.name, ""),
                f"has {rank} dimensions, at most {LARGEST_RANK} are possible",
            )


ONNX_TRAPS: tuple[Trap[Any], ...] = (
    Trap("dynamic shapes", "engines here have static ones", _onnx_dynamic),
    Trap("branches", "those of an If must give equal ranks", _onnx_control_flow),
    Trap("rank", "tensors of too many dimensions", _onnx_ranks),
)

TRAPS: tuple[Trap[Any], ...] = (*ATEN_TRAPS, *ONNX_TRAPS)
"""Every check, for programs of torch.export and for ONNX models."""

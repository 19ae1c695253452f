"""What Torch-TensorRT takes, by ATen operator."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from toma_fx.compat import pytorch
from toma_fx.export.to_tensorrt.coverage import (
    Coverage,
    Location,
    Trap,
    Verdict,
    load_table,
    op_rows,
)
from toma_fx.graph.nodes import argument, module_path

Find = Callable[[ExportedProgram], Iterator[tuple[Location, str]]]
"""A check of a whole program: where something stands against an engine, and what."""
LARGEST_TOP_K = 3840
LARGEST_RANK = 8
UNCONVERTED = ("aten.one_hot.", "aten.searchsorted.")
DOUBLE = "float64"
"""Name of the check that an option of the build answers."""


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
    table = load_table("torch_tensorrt")
    lowered = program.run_decompositions(decompositions())
    live = _live(lowered)
    locations: defaultdict[tuple[str, Verdict, str], list[Location]] = defaultdict(list)
    for node in lowered.graph.nodes:
        if node.op == "call_function":
            name = table_name(node)
            verdict, note = _aten_verdict(node, name, table, node in live)
            locations[name, verdict, note].append(location_of(node))
    answered = {DOUBLE} if truncate_double else set()
    traps = (replace(t, fatal=t.fatal and t.name not in answered) for t in ATEN_TRAPS)
    findings = tuple(f for trap in traps for f in trap.findings(lowered))
    source = f"{table['source']['file']}"
    return Coverage("torch-tensorrt", table["version"], source, op_rows(locations), findings)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The decompositions of torch that Torch-TensorRT applies before it converts.

    Those of its list, and composite operators of ATen, except what it has converters or its own
    decompositions for. Names that this version of torch does not have are left out.
    """
    names = load_table("torch_tensorrt")["decomposed"]
    chosen = pytorch.decompositions([op for n in names["by_torch"] for op in _overloads(n)])
    kept = {op for key in ("kept", "attention", "own") for n in names[key] for op in _overloads(n)}
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


def table_name(node: fx.Node) -> str:
    """Name of a node's operator, as the table has it; "" if it has none."""
    target: Any = node.target
    if node.op != "call_function":
        return ""
    if pytorch.is_operator(target):
        return str(target)
    if pytorch.is_higher_order(target):
        return f"higher_order.{target.name()}"
    return f"{target.__module__.removeprefix('_')}.{target.__name__}"


def location_of(node: fx.Node) -> Location:
    """A node's name and the path of its module."""
    return Location(node.name, module_path(node))


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
            needed |= pytorch.is_higher_order(node.target)
        if needed:
            live.add(node)
    return live


def _aten_verdict(
    node: fx.Node, name: str, table: Mapping[str, Any], live: bool
) -> tuple[Verdict, str]:
    if name in table["lowered"]:
        return "taken", f"by the pass {table['lowered'][name]}"
    if not live:
        return "folded", "needs no input of the call"
    packet = name.rpartition(".")[0]
    if {name, packet} & set(table["decomposed"]["own"]):
        return "taken", "decomposed by Torch-TensorRT"
    entry = table["converters"].get(name)
    if entry is None:
        return "missing", "no converter"
    if not entry["validated"]:
        return "taken", "converted"
    validators = set(entry["validators"]) - IRRELEVANT
    known = sorted(validators & set(VALIDATORS))
    if refusals := [text for name in known if (text := VALIDATORS[name](node))]:
        return "refused", "; ".join(refusals)
    unknown = sorted(validators - set(VALIDATORS))
    if unknown:
        return "conditional", f"subject to {', '.join(unknown)}"
    return "taken", "converted; its use was checked"


def _value(argument: Any) -> Any:
    """What a node gives, as a fake tensor; other arguments as they are."""
    return argument.meta.get("val") if isinstance(argument, fx.Node) else argument


def _first_result_only(node: fx.Node) -> str:
    users = list(node.users)
    if len(users) == 1 and table_name(users[0]) == "operator.getitem" and users[0].args[1] == 0:
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
    grouped = bool(argument(node, 7, "enable_gqa", False))
    same = [i for i in range(len(query)) if i != len(query) - 2 and not (grouped and i == 1)]
    if len(query) != len(key) or any(query[i] != key[i] for i in same):
        return "queries and keys differ in more than their number"
    return ""


def _cat(node: fx.Node) -> str:
    ranks = {_value(a).dim() for a in argument(node, 0, "tensors")}
    return "joins tensors of different ranks" if len(ranks) > 1 else ""


def _index(node: fx.Node) -> str:
    chosen = [_value(i).dtype for i in argument(node, 1, "indices") if i is not None]
    if torch.bool in chosen:
        return "a boolean index gives shapes that follow the data"
    return "" if {*chosen} <= {torch.int32, torch.int64} else "indices are no integers"


def _between_input_and_output(node: fx.Node) -> str:
    from_input = any(a.op == "placeholder" for a in node.all_input_nodes)
    to_output = any(user.op == "output" for user in node.users)
    return "copies an input to an output" if from_input and to_output else ""


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


VALIDATORS: Mapping[str, Callable[[fx.Node], str]] = {
    "one_user_validator": _first_result_only,
    "topk_validator": lambda node: _few_enough(argument(node, 1, "k")),
    "sort_validator": _sort,
    "scaled_dot_product_attention_validator": _attention,
    "cat_validator": _cat,
    "index_dtype_validator": _index,
    "is_only_operator_on_placeholder": _between_input_and_output,
    "to_copy_dtype_validator": _cast,
    "bitwise_type_validator": _logical,
    "bitwise_not_type_validator": _logical,
}
"""What Torch-TensorRT's validators look at, by their names: the reason for a refusal or ""."""
IRRELEVANT = {
    "index_has_bool_indices", "index_nonbool_validator", "has_static_shapes_in_args",
    "convolution_capability_validator", "cumsum_validator", "getitem_validator",
}  # fmt: skip
"""Validators about TensorRT-RTX or dynamic shapes, or that repeat another one."""


def _each_node(describe: Callable[[fx.Node], str]) -> Find:
    """A check that says something about single nodes, or ""."""

    def find(program: ExportedProgram) -> Iterator[tuple[Location, str]]:
        for node in program.graph.nodes:
            if text := describe(node):
                yield location_of(node), text

    return find


def _control_flow(node: fx.Node) -> str:
    target: Any = node.target
    return f"{target.name()} has no converter" if pytorch.is_higher_order(target) else ""


def _unconverted(node: fx.Node) -> str:
    name = table_name(node)
    return f"{name} has no converter" if name.startswith(UNCONVERTED) else ""


def _scatter_reduce(node: fx.Node) -> str:
    reduces = table_name(node).startswith("aten.scatter_reduce.")
    if reduces and not argument(node, 5, "include_self", True):
        return "scatter_reduce without the initial values raises"
    return ""


def _scatter_add(node: fx.Node) -> str:
    if not table_name(node).startswith(("aten.scatter_add.", "aten.scatter_reduce.")):
        return ""
    steps = _value(node.args[3]).shape[node.args[1]]
    return f"is written out as {steps} scatters one after the other"


def _dynamic(node: fx.Node) -> str:
    value = node.meta.get("val")
    shape = value.shape if node.op == "placeholder" and isinstance(value, Tensor) else ()
    if all(isinstance(size, int) for size in shape):
        return ""
    return f"has the shape {tuple(map(str, shape))}"


def _values(program: ExportedProgram) -> Iterator[tuple[fx.Node, Tensor]]:
    """Tensors that the engine would hold."""
    live = _live(program)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node in live and isinstance(value, Tensor):
            yield node, value


def _ranks(program: ExportedProgram) -> Iterator[tuple[Location, str]]:
    for node, value in _values(program):
        if value.dim() > LARGEST_RANK:
            text = f"has {value.dim()} dimensions, at most {LARGEST_RANK} are possible"
            yield location_of(node), text


def _of_type(wanted: Callable[[torch.dtype], bool]) -> Find:
    """Finds tensors by their element type, once a module."""

    def find(program: ExportedProgram) -> Iterator[tuple[Location, str]]:
        groups: defaultdict[tuple[str, torch.dtype], list[Location]] = defaultdict(list)
        for node, value in _values(program):
            if wanted(value.dtype):
                location = location_of(node)
                groups[location.module, value.dtype].append(location)
        for (_, dtype), locations in groups.items():
            more = f", like {len(locations) - 1} more here" if len(locations) > 1 else ""
            yield locations[0], f"is {dtype}{more}"

    return find


ATEN_TRAPS: tuple[Trap[ExportedProgram], ...] = (
    Trap("control flow", "cond, while_loop, scan", _each_node(_control_flow)),
    Trap("no converter", "operators known to have none", _each_node(_unconverted)),
    Trap("scatter_reduce", "include_self=False", _each_node(_scatter_reduce)),
    Trap("scatter_add", "no single layer does it", _each_node(_scatter_add), fatal=False),
    Trap("dynamic shapes", "engines here have static ones", _each_node(_dynamic)),
    Trap("rank", "tensors of too many dimensions", _ranks),
    Trap(DOUBLE, "only with the option truncate_double", _of_type(lambda d: d == torch.float64)),
    Trap("complex", "no such element type", _of_type(lambda d: d.is_complex)),
)

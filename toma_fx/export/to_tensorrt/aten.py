"""What Torch-TensorRT takes, by ATen operator."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from toma_fx import compat
from toma_fx.export.to_tensorrt.coverage import (
    Coverage,
    Location,
    Trap,
    Verdict,
    load_table,
    op_rows,
)
from toma_fx.graph.nodes import argument, module_path

LARGEST_TOP_K = 3840


LARGEST_RANK = 8


DOUBLE = "float64"
"""Name of the check that an option of the build answers."""


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
    found: defaultdict[tuple[str, Verdict, str], list[Location]] = defaultdict(list)
    for node in lowered.graph.nodes:
        if node.op == "call_function":
            name = op_name(node)
            verdict, note = _aten_verdict(node, name, made_of, node in live)
            found[name, verdict, note].append(location_of(node))
    answered = {DOUBLE} if truncate_double else set()
    traps = (replace(t, fatal=t.fatal and t.name not in answered) for t in ATEN_TRAPS)
    findings = tuple(f for trap in traps for f in trap.findings(lowered))
    source = f"{made_of['source']['file']}"
    return Coverage("torch-tensorrt", made_of["version"], source, op_rows(found), findings)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The decompositions of torch that Torch-TensorRT applies before it converts.

    Those of its list, and composite operators of ATen, except what it has converters or its own
    decompositions for. Names that this version of torch does not have are left out.
    """
    names = load_table("torch_tensorrt")["decomposed"]
    chosen = compat.decompositions([op for n in names["by_torch"] for op in _overloads(n)])
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


def op_name(node: fx.Node) -> str:
    """Name of a node's operator, as the table has it."""
    target: Any = node.target
    if compat.is_higher_order(target):
        return f"higher_order.{target.name()}"
    if compat.is_operator(target):
        return str(target)
    module = getattr(target, "__module__", "").removeprefix("_")
    return f"{module}.{getattr(target, '__name__', target)}"


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
            needed |= compat.is_higher_order(node.target)
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
    "topk_validator": lambda node: _few_enough(argument(node, 1, "k")),
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


def _control_flow(program: ExportedProgram) -> Iterator[tuple[Location, str]]:
    for node in program.graph.nodes:
        if compat.is_higher_order(node.target):
            yield location_of(node), f"{node.target.name()} has no converter"


def _named(*names: str) -> Callable[[ExportedProgram], Iterator[tuple[Location, str]]]:
    def find(program: ExportedProgram) -> Iterator[tuple[Location, str]]:
        for node in program.graph.nodes:
            if node.op == "call_function" and op_name(node).rpartition(".")[0] in names:
                yield location_of(node), f"{op_name(node)} has no converter"

    return find


def _scatter_reduce(program: ExportedProgram) -> Iterator[tuple[Location, str]]:
    for node in program.graph.nodes:
        reduces = node.op == "call_function" and op_name(node).startswith("aten.scatter_reduce")
        if reduces and not argument(node, 5, "include_self", True):
            yield location_of(node), "scatter_reduce without the initial values raises"


def _scatter_add(program: ExportedProgram) -> Iterator[tuple[Location, str]]:
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if op_name(node).startswith(("aten.scatter_add", "aten.scatter_reduce")):
            steps = _value(node.args[3]).shape[node.args[1]]
            yield location_of(node), f"is written out as {steps} scatters one after the other"


def _dynamic(program: ExportedProgram) -> Iterator[tuple[Location, str]]:
    for node in program.graph.nodes:
        value = node.meta.get("val")
        shape = value.shape if node.op == "placeholder" and isinstance(value, Tensor) else ()
        if not all(isinstance(size, int) for size in shape):
            yield location_of(node), f"has the shape {tuple(map(str, shape))}"


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
            yield (
                location_of(node),
                f"has {value.dim()} dimensions, at most {LARGEST_RANK} are possible",
            )


def _of_type(
    wanted: Callable[[torch.dtype], bool],
) -> Callable[[ExportedProgram], Iterator[tuple[Location, str]]]:
    """Finds tensors by their element type, once a module."""

    def find(program: ExportedProgram) -> Iterator[tuple[Location, str]]:
        found: defaultdict[tuple[str, torch.dtype], list[Location]] = defaultdict(list)
        for node, value in _values(program):
            if wanted(value.dtype):
                place = location_of(node)
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

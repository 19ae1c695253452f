"""Capture from Dynamo: the graph that `torch.compile` hands to a back end becomes the package's IR.

    Dynamo graph --replayed under torch.export--> pre-dispatch ATen --canonical--> Captured

Three things differ from a captured model. Parameters and buffers are inputs, as Dynamo lifts them;
they are never taken for tokens. Module paths come from Dynamo's nodes and are made the model's own
(`transformer_blocks.0.attn`). Sizes and other Python numbers may be symbolic: a capture holds for
their values in one call, but for numbers that only become a tensor (a timestep): these stay inputs.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from toma_fx.capture.canonical import flat_graph
from toma_fx.capture.grids import find_raster
from toma_fx.capture.model import Captured, InputSpec, resolve_lazy
from toma_fx.capture.references import without_weak_references
from toma_fx.compat.compilers import (
    compiled_scope,
    example_of,
    input_source,
    is_module_source,
    is_wrapped_number,
    without_tracing_context,
)
from toma_fx.compat.pytorch import CONTENTS, gradient_switch, tensor_constructors
from toma_fx.errors import CaptureError, TomaError
from toma_fx.graph.rewriter import ModuleStack, Rewriter

Kind = Literal["tensor", "owned", "number", "constant"]


@dataclass(frozen=True)
class Argument:
    """One input of a Dynamo graph.

    Attributes:
        kind: "tensor"; "owned", a tensor that belongs to a module; "number", a Python number that
            becomes a tensor and nothing else; "constant", any other Python number.
        source: Dynamo's name of its origin, such as "L['timestep']".
        placeholder: name of the graph's input.
    """

    kind: Kind
    source: str
    placeholder: str

    @property
    def name(self) -> str:
        """Last part of the source: the name of the argument in the model's forward."""
        return (_split_source(self.source) or [""])[-1]

    @property
    def is_captured(self) -> bool:
        """Whether the captured graph takes it too."""
        return self.kind != "constant"

    def to_input(self, value: Any) -> Any:
        """The value as the captured graph takes it: numbers are tensors of no dimension."""
        if self.kind == "number" and not isinstance(value, Tensor):
            return torch.tensor(value)
        return resolve_lazy(value) if self.kind == "tensor" else value

    def key(self, value: Any) -> Hashable:
        """What a capture depends on; None for what Dynamo guards itself."""
        if self.kind in ("owned", "number"):
            return None
        if self.kind == "constant":
            return _to_number(value)
        return (tuple(value.shape), value.stride(), value.dtype, value.device)


def arguments_of(gm: fx.GraphModule) -> tuple[Argument, ...]:
    """The inputs of a Dynamo graph, in order. Call it while Dynamo compiles: it deletes sources."""
    nodes: list[Any] = gm.graph.find_nodes(op="placeholder")
    return tuple(Argument(_classify(n), input_source(n).name, n.name) for n in nodes)


def example_values(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    """The tensors and numbers of the call that is being compiled, not their fakes."""
    nodes: list[Any] = gm.graph.find_nodes(op="placeholder")
    return [example_of(n, fake) for n, fake in zip(nodes, example_inputs, strict=True)]


def models_being_compiled(arguments: Sequence[Argument]) -> list[nn.Module]:
    """The models whose call Dynamo is compiling in this thread, by the tensors that they own.

    Dynamo names a tensor by an expression over the variables of the compiled function, such as
    `L['self']._modules['block']._parameters['weight']`: what stands before the first table of a
    module is the model. After a graph break it is the same, wherever the graph begins.
    """
    scope = compiled_scope()
    if scope is None:
        return []
    names = dict.fromkeys(_TABLE.split(a.source)[0] for a in arguments if a.kind == "owned")
    owners = [eval(name, scope) for name in names]
    return [owner for owner in owners if isinstance(owner, nn.Module)]


_TABLE = re.compile(r"\._(?:modules|parameters|buffers)\b")


def capture_dynamo(
    gm: fx.GraphModule, arguments: Sequence[Argument], values: Sequence[Any]
) -> Captured:
    """Bring a Dynamo graph to the IR, for the shapes and numbers of one call.

    Args:
        gm: the graph; it is not changed.
        arguments: its inputs, from `arguments_of` while Dynamo was compiling it.
        values: one tensor or Python number per input of the graph.

    Returns:
        A captured graph without parameters of its own. Its inputs are those of `gm` in the same
        order, less the constants; the specs of owned tensors hold no value.

    Raises:
        CaptureError: the graph can't be exported.
    """
    captured = [(a, a.to_input(v)) for a, v in zip(arguments, values, strict=True) if a.is_captured]
    replay = _Replay(gm, arguments, values)
    try:
        # Dynamo's own tracing context, if one is open, must not pass on its symbolic shapes
        with (
            torch.no_grad(),
            without_tracing_context(),
            fx.traceback.preserve_node_meta(),
            without_weak_references() as graphs,
        ):
            program = torch.export.export(replay, tuple(v for _, v in captured), strict=False)
            graphs.append(program.graph)
            graph_module = flat_graph(program, "DynamoGraph")
    except TomaError:
        raise
    except Exception as error:
        raise CaptureError(
            "torch.export could not trace the graph that Dynamo captured",
            where=_first_line(gm),
            expected="a graph of tensor operations with static shapes",
            got=f"{type(error).__name__}: {error}",
            hint="torch.compile(model, dynamic=False); toma_fx.optimize(model) captures without "
            "Dynamo",
        ) from error
    graph = graph_module.graph
    specs = []
    for node, (argument, value) in zip(graph.find_nodes(op="placeholder"), captured, strict=True):
        fake = node.meta["val"] if argument.kind == "tensor" else None
        raster = find_raster(value) if fake is not None else None
        owned = argument.kind == "owned"
        specs.append(InputSpec(node.name, fake, raster, argument.name, owned))
    Rewriter(graph_module).set_module_stacks(_relative_stacks(graph))
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    return Captured(graph_module, tuple(specs), out_spec)


# -- inputs ---------------------------------------------------------------------------------------


def _classify(node: Any) -> Kind:
    wrapped = is_wrapped_number(node)
    if isinstance(node.meta["example_value"], Tensor):
        if not wrapped or any(u.target != "item" for u in node.users):
            return "owned" if _is_owned(node) else "tensor"
        uses = [(item, user) for item in node.users for user in item.users]
    else:
        uses = [(node, user) for user in node.users]
    constructors = tensor_constructors()
    becomes_tensor = [
        user.target in constructors and user.args[0] in (number, [number]) for number, user in uses
    ]
    return "number" if uses and all(becomes_tensor) else "constant"


def _is_owned(node: Any) -> bool:
    in_module = is_module_source(input_source(node))
    return in_module or isinstance(node.meta["example_value"], nn.Parameter)


def _to_number(value: Any) -> float:
    number: float = value.item() if isinstance(value, Tensor) else value
    return number


class _Replay(nn.Module):
    """Runs a Dynamo graph on tensors, its constants filled in."""

    def __init__(
        self, gm: fx.GraphModule, arguments: Sequence[Argument], values: Sequence[Any]
    ) -> None:
        super().__init__()
        self.graphs = (gm,)  # in a tuple: not a submodule
        self.numbers = frozenset(a.placeholder for a in arguments if a.kind == "number")
        self.constants = {
            i: _to_number(value) for i, value in enumerate(values) if not arguments[i].is_captured
        }

    def forward(self, *tensors: Tensor) -> Any:
        """The graph's outputs."""
        values: list[Any] = list(tensors)
        for i, value in self.constants.items():
            values.insert(i, value)
        return _Interpreter(self.graphs[0], self.numbers).run(*values)


class _Interpreter(fx.Interpreter):
    """Keeps numbers tensors, knows constants, leaves the gradient mode alone."""

    def __init__(self, gm: fx.GraphModule, numbers: frozenset[str]) -> None:
        super().__init__(gm)
        self._numbers = numbers

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node."""
        if n.target is gradient_switch():
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "call_method" and n.target == "item":
            source = n.args[0]
            assert isinstance(source, fx.Node)
            if source.name in self._numbers or not isinstance(args[0], Tensor):
                return args[0]
        if n.target in tensor_constructors():
            listed = isinstance(args[0], (list, tuple)) and len(args[0]) == 1
            number = args[0][0] if listed else args[0]
            if isinstance(number, Tensor):
                return _to_tensor(number, listed, **kwargs)
        return super().run_node(n)


def _to_tensor(
    number: Tensor, listed: bool, dtype: Any = None, device: Any = None, **unused: Any
) -> Tensor:
    """`torch.tensor(x)` or `torch.tensor([x])` of a number that is a tensor already."""
    if dtype is None:
        dtype = torch.get_default_dtype() if number.is_floating_point() else number.dtype
    number = number.to(dtype=dtype, device=device if device is not None else number.device)
    return number.reshape(1) if listed else number


# -- module paths ---------------------------------------------------------------------------------

_PART = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.(\w+)")
_STORAGE = ("__dict__", *CONTENTS)


def _split_source(source: str) -> list[str]:
    """Names in a Dynamo source: L['self']._modules['blocks'].0 gives self, blocks, 0."""
    names = [next(filter(None, match.groups()), "") for match in _PART.finditer(source)]
    return [name for name in names if name not in _STORAGE]


def _relative_stacks(graph: fx.Graph) -> dict[fx.Node, ModuleStack]:
    """Module stacks whose paths start at the model."""
    stacks: dict[fx.Node, list[tuple[str, list[str], Any]]] = {}
    for node in graph.nodes:
        entries = (node.meta.get("nn_module_stack") or {}).items()
        known = [
            (key, _split_source(p), kind) for key, (p, kind) in entries if p[:2] in ("L[", "G[")
        ]
        stacks[node] = known
    outermost = [known[0][1] for known in stacks.values() if known]
    root = _root(outermost)
    return {
        node: {key: (".".join(parts[root:]), kind) for key, parts, kind in known}
        for node, known in stacks.items()
    }


def _root(paths: Sequence[Sequence[str]]) -> int:
    """How many leading parts lead to the model: a variable, or what a closure or tuple holds."""
    levels = zip(*paths, strict=False)
    common = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    if common[:1] == ["self"]:
        return 1
    ends = [i for i, p in enumerate(common) if i == 0 or p == "cell_contents" or p.isdigit()]
    return ends[-1] + 1 if ends else 0


def _first_line(gm: fx.GraphModule) -> str:
    """The last source line of the first operation."""
    traces = (n.meta.get("stack_trace") for n in gm.graph.nodes if n.op != "placeholder")
    lines = next((trace for trace in traces if trace), "").strip().splitlines()
    files = [line.strip() for line in lines if line.strip().startswith("File ")]
    return f"the graph that starts at {files[-1]}" if files else "the Dynamo graph"

"""Specs: what a graph may contain at a stage of the pipeline, as data that is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from toma_fx.compat.pytorch import is_higher_order, is_operator, writes_in_place
from toma_fx.errors import VerifyError
from toma_fx.graph.nodes import is_dead, is_inactive_dropout, op_name
from toma_fx.graph.templates import Opaque

FUNCTIONS = ("_operator", "operator", "math", "torch", "torch.fx.experimental.symbolic_shapes")
"""Modules of functions on sizes and tuples: `getitem`, `add`, `torch.sym_max`."""


@dataclass(frozen=True)
class Spec:
    """What a graph must not contain at a stage.

    Attributes:
        name: the stage, as "captured". refused: (why, test of a node), the first that holds counts.
    """

    name: str
    refused: tuple[tuple[str, Callable[[fx.Node], bool]], ...]

    def check(self, graph: fx.Graph, stage: str) -> None:
        """Check every node of a graph; `stage` says where, for the error.

        Raises:
            VerifyError: naming the node, the stage, and why it must not be there.
        """
        for node in graph.nodes:
            for why, test in self.refused:
                if test(node):
                    raise VerifyError(
                        f"a {self.name} graph must not hold this node: {why}",
                        where=f"{stage}: {node.format_node()}",
                        got=str(node.target),
                        hint="please report this model",
                    )


def _is_op(*names: str) -> Callable[[fx.Node], bool]:
    return lambda node: node.op == "call_function" and op_name(node.target) in names


def _calls_modules(node: fx.Node) -> bool:
    return node.op in ("call_module", "call_method")


def _calls_python(node: fx.Node) -> bool:
    target = node.target
    if is_operator(target) or is_higher_order(target) or isinstance(target, Opaque):
        return False
    return node.op == "call_function" and getattr(target, "__module__", "") not in FUNCTIONS


def _is_opaque(node: fx.Node) -> bool:
    return isinstance(node.target, Opaque)


def _writes(node: fx.Node) -> bool:
    return writes_in_place(node.target)


def _nests(node: fx.Node) -> bool:
    """Whether the output is anything but one flat tuple."""
    results = node.args[0] if node.op == "output" else ()
    return not isinstance(results, tuple) or any(isinstance(r, (tuple, list)) for r in results)


REWRITTEN = Spec(
    "rewritten",
    (
        ("modules and methods are inlined", _calls_modules),
        ("only operators and arithmetic on sizes are called", _calls_python),
        ("a write in place is invisible to data flow", _writes),
        ("outputs are one flat tuple", _nests),
        ("it pins token counts", _is_op("aten._assert_tensor_metadata")),
        ("nothing reads it", is_dead),
    ),
)
"""After the passes that carry out a plan. Functions called as one node (`Opaque`) may occur."""
CAPTURED = Spec(
    "captured",
    (
        *REWRITTEN.refused,
        ("only a rewrite inserts whole functions", _is_opaque),
        ("dropout in evaluation mode is the identity", is_inactive_dropout),
        ("it hides a dtype behind a tensor", _is_op("aten.type_as")),
    ),
)
"""After canonicalization. Regions under autocast and flex attention stay higher-order operators."""
EXPORTABLE = Spec(
    "exportable",
    (
        *REWRITTEN.refused,
        ("runtimes can't call Python functions", _is_opaque),
        ("only this package registers it", lambda n: op_name(n.target).startswith("toma_fx.")),
    ),
)
"""What deployment targets are given: operators of torch alone."""

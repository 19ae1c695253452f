"""Verification of a rewritten graph: lint, signature, fake-tensor re-execution of every node."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import fx

from toma_fx.compat.pytorch import tree_leaves
from toma_fx.errors import VerifyError


def fake_mode_of(graph: fx.Graph) -> Any:
    """The mode that the fake values of a graph are of; None if it has none."""
    values = (node.meta.get("val") for node in graph.nodes)
    return next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)


@contextmanager
def faking(mode: Any) -> Iterator[None]:
    """Run calls on fake values of a mode, or of None.

    Running a node again gives a size that depends on the data a new name. Nothing may wait for it:
    torch's tracer would miss it in the outputs of the graph that is traced next.
    """
    if mode is None:
        yield
        return
    with mode:
        if mode.shape_env is None:
            yield
        else:
            with mode.shape_env.ignore_fresh_unbacked_symbols():
                yield


def fake_result(node: fx.Node) -> Any:
    """Run one node on the fake values of its inputs."""
    target: Any = node.target
    args, kwargs = fx.map_arg((node.args, node.kwargs), _value)
    with torch.no_grad():
        return target(*args, **kwargs)


def _value(node: fx.Node) -> Any:
    """The fake value of a node; the graph itself where a higher-order operator takes one."""
    if node.op == "get_attr" and "val" not in node.meta:
        return attrgetter(str(node.target))(node.graph.owning_module)
    return node.meta["val"]


def output_values(graph: fx.Graph) -> list[Any]:
    """Fake tensors (or constants) that a flat graph returns, in order."""
    results = tree_leaves(graph.output_node().args[0])
    return [r.meta["val"] if isinstance(r, fx.Node) else r for r in results]


def strides_of(value: Any) -> tuple[tuple[int, ...] | None, ...]:
    """Strides of the tensors of a value; None for a tensor whose shape depends on the data."""
    tensors = [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]
    static = [all(isinstance(s, int) for s in (*x.shape, *x.stride())) for x in tensors]
    return tuple(x.stride() if known else None for x, known in zip(tensors, static, strict=True))


def describe(value: Any) -> str:
    """Shapes, dtypes and devices of a value as text, equal for equal ones."""
    leaves = tree_leaves(value)
    return ", ".join(
        f"({_sizes(x)}) {x.dtype} {x.device}" if isinstance(x, torch.Tensor) else _size(x)
        for x in leaves
    )


def _sizes(x: torch.Tensor) -> str:
    return ", ".join(map(_size, x.shape))


def _size(value: Any) -> str:
    """A size as text; one that depends on the data has another name each time it is worked out."""
    if isinstance(value, torch.SymInt):  # which torch may have found to be a number since
        number = value.node.maybe_as_int()
        return "?" if number is None else str(number)
    return str(value)


def verify(
    graph_module: fx.GraphModule,
    inputs: Sequence[str],
    outputs: Sequence[Any],
    stage: str,
    changed: Set[fx.Node] | None = None,
) -> None:
    """Check a graph after a pass.

    Args:
        graph_module: the graph; every value carries a fake tensor in `meta["val"]`.
        inputs: expected placeholder names, in order.
        outputs: fake tensors (or constants) the graph must return, in order.
        stage: name of the pass, for the error.
        changed: nodes whose arguments changed since the graph was last verified; they and their
            users are executed again. None executes every node.

    Raises:
        VerifyError: naming the node, what was expected and what was found.
    """
    graph = graph_module.graph
    try:
        graph.lint()
    except RuntimeError as error:
        raise VerifyError("graph lint failed", where=stage, got=str(error)) from error
    found = [n.name for n in graph.nodes if n.op == "placeholder"]
    if found != list(inputs):
        raise VerifyError(
            "the inputs of the graph changed",
            where=stage,
            expected=str(list(inputs)),
            got=str(found),
        )
    _reexecute(graph, stage, changed)
    values = output_values(graph)
    if describe(values) != describe(list(outputs)):
        raise VerifyError(
            "the outputs of the graph changed",
            where=stage,
            expected=describe(list(outputs)),
            got=describe(values),
        )


def agree(one: str, other: str) -> bool:
    """Whether two descriptions are the same, but for sizes that only one of them knows.

    Torch learns some from assertions, which name the size that was first worked out.
    """
    words, others = (re.findall(r"[^ ,()]+|[()]", text) for text in (one, other))
    pairs = zip(words, others, strict=False)
    return len(words) == len(others) and all(a == b or "?" in (a, b) for a, b in pairs)


def _reexecute(graph: fx.Graph, stage: str, changed: Set[fx.Node] | None) -> None:
    mode = fake_mode_of(graph)
    if mode is None:
        return
    with faking(mode):
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            concerned = (node, *node.all_input_nodes)
            if changed is not None and changed.isdisjoint(concerned):
                continue
            try:
                value = fake_result(node)
            except Exception as error:
                raise VerifyError(
                    "a node does not run on the shapes of its inputs",
                    where=f"{stage}: {node.format_node()}",
                    got=f"{type(error).__name__}: {error}",
                ) from error
            recorded = node.meta.get("val")  # checks of sizes that depend on the data have none
            if not agree(describe(value), describe(recorded)):
                raise VerifyError(
                    "a node's recorded value is stale",
                    where=f"{stage}: {node.format_node()}",
                    expected=describe(recorded),
                    got=describe(value),
                )
            pairs = zip(strides_of(value), strides_of(recorded), strict=True)
            if any(a != b and None not in (a, b) for a, b in pairs):
                raise VerifyError(
                    "a node's recorded strides are stale",
                    where=f"{stage}: {node.format_node()}",
                    expected=str(strides_of(recorded)),
                    got=str(strides_of(value)),
                )

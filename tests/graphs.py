"""Small graphs for tests of passes, and what tests of passes ask of a graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from toma_fx.capture.canonical import FlattenSignature, functional
from toma_fx.graph.passes import Pass, run_passes
from toma_fx.graph.printing import print_graph
from toma_fx.graph.rewriter import Rewriter
from toma_fx.graph.verify import verify


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: Tensor) -> Any:
        return self.function(*x)


def graph_of(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """What `torch.export` makes of a function, functional and flat, before canonicalization."""
    with torch.no_grad():
        program = torch.export.export(Function(function).eval(), inputs, strict=False)
    exported: Any = functional(program).module(check_guards=False)
    graph_module = fx.GraphModule(exported, exported.graph, "Function")
    run_passes(Rewriter(graph_module), [FlattenSignature()], "test")
    return graph_module


def apply(graph_module: fx.GraphModule, passes: Sequence[Pass]) -> tuple[fx.GraphModule, Rewriter]:
    """A copy of a graph after passes, whole and verified, and the rewriter that changed it."""
    after = copy.deepcopy(graph_module)
    for new, old in zip(after.graph.nodes, graph_module.graph.nodes, strict=True):
        new.meta = dict(old.meta)
    rewriter = Rewriter(after)
    run_passes(rewriter, passes, "test")
    verify(after, rewriter.inputs, rewriter.outputs, "test")
    return after, rewriter


def text(graph_module: fx.GraphModule) -> str:
    """The calls of a graph and what it returns, without inputs, attributes and module paths."""
    lines = print_graph(graph_module.graph).splitlines()
    skipped = (" = input", " = attribute ")
    return "\n".join(x for x in lines if x[0] != "#" and not any(s in x for s in skipped))

"""The rewrite: captured graph and plan to a program, verified after every pass."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import fx

from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.facts import Analysis
from toma_fx.analysis.labels import tokens_of
from toma_fx.capture.model import Captured
from toma_fx.errors import RewriteError
from toma_fx.graph.rewriter import Rewriter, Templates
from toma_fx.graph.verify import output_values, verify
from toma_fx.passes.merge_segments import MergeSegments
from toma_fx.passes.provide_patterns import ProvidePatterns, Use, pattern_inputs, pattern_outputs
from toma_fx.passes.snippets import Span, span_of
from toma_fx.plan.plan import MergePlan, PatternGroup


@dataclass(frozen=True)
class Program:
    """One use of a rewritten graph.

    Attributes:
        use: "refresh" (selects and weighs), "reweigh" (weighs for given destinations), "reuse"
            (patterns are inputs), "mixed" (each row of the batch does one of these).
        graph_module: (model inputs, pattern inputs) -> (model outputs, pattern outputs), flat.
        pattern_inputs, pattern_outputs: their names, in order.
        log: (pass, action, node) of every change.
    """

    use: Use
    graph_module: fx.GraphModule
    pattern_inputs: tuple[str, ...]
    pattern_outputs: tuple[str, ...]
    log: tuple[tuple[str, str, str], ...]


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy with its own graph that shares every parameter; node names stay the same."""
    graph = copy.deepcopy(graph_module.graph)
    names = [n.name for n in graph_module.graph.nodes]
    if [n.name for n in graph.nodes] != names:
        raise RewriteError("node names changed in a copy", where="copy_graph")
    for new, old in zip(graph.nodes, graph_module.graph.nodes, strict=True):
        new.meta = dict(old.meta)
    return fx.GraphModule(graph_module, graph, graph_module.__class__.__name__)


def _feature_span(flow: Flow, group: PatternGroup) -> Span:
    label = tokens_of(flow.layout(group.feature))
    if label is None:
        raise RewriteError("no token axis", where=group.name, got=group.feature)
    return span_of(label, group.image)


def rewrite(
    captured: Captured,
    analysis: Analysis,
    flow: Flow,
    plan: MergePlan,
    use: Use,
    templates: Templates | None = None,
) -> Program:
    """Build the program for one use; the captured graph is not changed.

    `templates` may be shared by the rewrites of one captured graph: it saves tracing again.

    Raises:
        RewriteError, VerifyError: the graph can't be merged as planned.
    """
    graph_module = copy_graph(captured.graph_module)
    rewriter = Rewriter(graph_module, templates)
    inputs = [i.name for i in captured.inputs]
    outputs = output_values(captured.graph_module.graph)

    def check(stage: str) -> None:
        expected = [*outputs, *output_values(graph_module.graph)[len(outputs) :]]
        verify(graph_module, inputs, expected, stage, rewriter.settle())

    spans = {g.name: _feature_span(flow, g) for g in plan.groups}
    provide = ProvidePatterns(plan, use, spans)
    with rewriter.running("provide_patterns"):
        patterns = provide.apply(rewriter)
    inputs.extend(pattern_inputs(plan, use))
    check("provide_patterns")
    with rewriter.running("merge_segments"):
        MergeSegments(plan, analysis, flow, patterns).apply(rewriter)
    check("merge_segments")
    with rewriter.running("erase_dead"):
        rewriter.erase_dead()
    check("erase_dead")
    graph_module.recompile()
    return Program(
        use,
        graph_module,
        pattern_inputs(plan, use),
        pattern_outputs(plan, use),
        tuple(rewriter.log),
    )

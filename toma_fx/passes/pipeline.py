"""The rewrite: captured graph and plan to a program, verified after every pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import fx

from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.facts import Analysis
from toma_fx.capture.model import Captured
from toma_fx.errors import RewriteError
from toma_fx.graph.collection import no_collection
from toma_fx.graph.flops import graph_flops
from toma_fx.graph.passes import run_passes
from toma_fx.graph.rewriter import Rewriter, copy_graph
from toma_fx.graph.specs import CAPTURED, REWRITTEN
from toma_fx.graph.templates import Templates
from toma_fx.graph.verify import output_values
from toma_fx.passes.job import Job
from toma_fx.passes.uses import Use
from toma_fx.plan.plan import MergePlan


@dataclass(frozen=True)
class Program:
    """One kind of program of a captured graph.

    Attributes:
        use: its kind.
        graph_module: (model inputs, masks, kept tensors) -> (model outputs, kept tensors), flat.
        takes, gives: names of the further inputs and outputs, in order.
        log: (pass, action, node) of every change.
    """

    use: Use
    graph_module: fx.GraphModule
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    log: tuple[tuple[str, str, str], ...]

    @cached_property
    def flops(self) -> int:
        """FLOPs of one step; comparisons of a selection are not counted."""
        return graph_flops(self.graph_module.graph)


@no_collection()
def rewrite(
    captured: Captured,
    analysis: Analysis,
    flow: Flow,
    plan: MergePlan,
    use: Use,
    templates: Templates | None = None,
) -> Program:
    """Make one kind of program; the captured graph is not changed.

    `templates` may be shared by the rewrites of one captured graph: it saves tracing again.

    Raises:
        RewriteError, VerifyError: the graph can't be rewritten as planned.
    """
    plan = plan.phases[use.phase]
    job = Job(captured, analysis, flow, plan.computed if use.cached else plan, use)
    steps = [step for make_pass in use.passes if (step := make_pass(job)) is not None]
    if not steps:
        return Program(use, captured.graph_module, (), (), ())
    rewriter = Rewriter(copy_graph(captured.graph_module), templates)
    run_passes(rewriter, steps, use.name, before=CAPTURED, after=REWRITTEN)
    takes, gives = use.inputs(plan), use.gives(plan)
    wanted = [*(i.name for i in captured.inputs), *takes]
    own = len(output_values(captured.graph_module.graph))
    if rewriter.inputs != wanted or len(rewriter.outputs) != own + len(gives):
        raise RewriteError(
            "a program does not take and give what its kind says",
            where=f"kind {use.name!r}",
            expected=f"inputs {wanted}, {own + len(gives)} outputs",
            got=f"inputs {rewriter.inputs}, {len(rewriter.outputs)} outputs",
        )
    return Program(use, rewriter.graph_module, takes, gives, tuple(rewriter.log))

"""Passes and how they run: in the order of a tuple, verified one by one, dumped on demand.

    spec before -> pass -> verify -> pass -> verify -> ... -> spec after

A spec says what a graph may hold; verification runs the changed nodes on fake tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import ClassVar, Protocol

from toma_fx.compat.pytorch import write_code
from toma_fx.errors import RewriteError, TomaError, VerifyError
from toma_fx.graph.dump import Dump
from toma_fx.graph.rewriter import Rewriter
from toma_fx.graph.specs import Spec
from toma_fx.graph.verify import verify


class Pass(Protocol):
    """A frozen dataclass whose fields are its options.

    Attributes:
        name: what the log, errors and dumps call it.
    """

    name: ClassVar[str]

    def apply(self, rewriter: Rewriter) -> None:
        """Change the graph through the rewriter."""


@dataclass(frozen=True)
class EraseDead:
    """Nodes that nothing reads go, but not side effects."""

    name: ClassVar[str] = "erase_dead"

    def apply(self, rewriter: Rewriter) -> None:
        """Erase them."""
        rewriter.erase_dead()


@dataclass(frozen=True)
class EraseInputs:
    """Inputs of these names go: constants, which a graph has inside, so that nothing reads them."""

    name: ClassVar[str] = "erase_inputs"
    names: frozenset[str]

    def apply(self, rewriter: Rewriter) -> None:
        """Erase them."""
        for node in rewriter.graph.find_nodes(op="placeholder"):
            if node.name in self.names:
                rewriter.erase(node)


def run_passes(
    rewriter: Rewriter,
    passes: Sequence[Pass],
    title: str,
    *,
    before: Spec | None = None,
    after: Spec | None = None,
) -> None:
    """Run passes in order.

    After each, the graph is verified where the pass changed it; a pass that changed nothing is
    noted as ("changed nothing") in the rewriter's log. At the end the graph is compiled to Python.

    Args:
        rewriter: of the graph to change.
        passes: what to run.
        title: what the graph will be, for errors and dumps: "capture", "refresh".
        before: what the graph may hold at entry. after: at exit.

    Raises:
        RewriteError, VerifyError: a pass failed, or left an invalid graph. The error says which
            passes ran before it.
    """
    graph_module = rewriter.graph_module
    dump = Dump.of(f"{type(graph_module).__name__}_{title}")
    dump.graph(0, "input", rewriter.graph)
    if before is not None:
        before.check(rewriter.graph, f"{title}, before its passes")
    done: list[str] = []
    for number, step in enumerate(passes, 1):
        start, seen = perf_counter(), len(rewriter.log)
        try:
            _run(rewriter, step, f"{title}, {step.name}")
        except Exception as error:
            dump.graph(number, f"{step.name}_failed", rewriter.graph)
            dump.line(f"{number:02d} {step}: {error}")
            if isinstance(error, TomaError) and not isinstance(error, (RewriteError, VerifyError)):
                raise  # a method's, about its options
            raise _with_history(error, step.name, done) from error
        changes = len(rewriter.log) - seen
        if changes:
            dump.graph(number, step.name, rewriter.graph)
        else:
            rewriter.log.append((step.name, "changed nothing", ""))
        dump.line(f"{number:02d} {step}: changes {changes}, {perf_counter() - start:.3f} s")
        done.append(step.name)
    if after is not None:
        after.check(rewriter.graph, f"{title}, after its passes")
    write_code(graph_module)


def _run(rewriter: Rewriter, step: Pass, stage: str) -> None:
    """One pass, and verification of what it changed."""
    seen = len(rewriter.log)
    with rewriter.running(step.name):
        step.apply(rewriter)
        changed = rewriter.settle()
    if len(rewriter.log) > seen:
        verify(rewriter.graph_module, rewriter.inputs, rewriter.outputs, stage, changed)


def _with_history(error: Exception, name: str, done: Sequence[str]) -> TomaError:
    """The error of a pass, with the passes that ran before it."""
    history = f"after the passes {', '.join(done)}" if done else "no pass ran before"
    if isinstance(error, (RewriteError, VerifyError)):
        return type(error)(
            error.what,
            where=f"{error.where} ({history})",
            expected=error.expected,
            got=error.got,
            hint=error.hint,
        )
    got = f"{type(error).__name__}: {error}"
    return RewriteError("a pass failed", where=f"{name} ({history})", got=got)

"""What passes work on: a captured graph, what is known of it, and the kind of program to make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.facts import Analysis
from toma_fx.capture.model import Captured
from toma_fx.plan.plan import MergePlan


class Keeps(Protocol):
    """What a kind of program takes and gives (`uses.Use`)."""

    @property
    def serves(self) -> tuple[str, ...]:
        """Kinds that rows of one batch may be due; none where all rows are alike."""

    def takes(self, plan: MergePlan) -> tuple[str, ...]:
        """Names of the kept tensors that are inputs, in order."""

    def gives(self, plan: MergePlan) -> tuple[str, ...]:
        """Names of the kept tensors that are outputs, in order."""


@dataclass(frozen=True)
class Job:
    """One program to make.

    Attributes:
        captured: the graph, which is not changed. analysis, flow, plan: of it.
        use: the kind of program.
    """

    captured: Captured
    analysis: Analysis
    flow: Flow
    plan: MergePlan
    use: Keeps

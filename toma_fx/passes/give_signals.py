"""Pass: give what segments made of all tokens, for the selection in the next step.

x_a -> merge -> blocks -> x_b' -> unmerge -> x_b ---> ...
                                              \\--> signal (output of the program)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from toma_fx.graph.rewriter import Rewriter
from toma_fx.passes.job import Job
from toma_fx.passes.snippets import Span, span_at, splice_image


@dataclass(frozen=True)
class GiveSignals:
    """Add the image tokens of some values as outputs.

    Attributes:
        outputs: names of the values in order, and where the image lies in each.
    """

    outputs: tuple[tuple[str, Span], ...]
    name: ClassVar[str] = "give_signals"

    @classmethod
    def of(cls, job: Job) -> Self | None:
        """The pass for a job; None where no selection asks for what went out."""
        groups = (g for g in job.plan.groups if g.output)
        outputs = tuple((g.output, span_at(g.output, g.image, job.flow)) for g in groups)
        return cls(outputs) if outputs else None

    def __str__(self) -> str:
        return f"GiveSignals({len(self.outputs)} values)"

    def apply(self, rewriter: Rewriter) -> None:
        """Rewrite the graph."""
        signals = []
        for name, span in self.outputs:
            node = rewriter.current(name)
            with rewriter.after(node):
                signals.append(splice_image(rewriter, node, span))
        rewriter.add_outputs(signals)

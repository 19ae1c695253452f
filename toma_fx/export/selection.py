"""Pass: operators of torch in place of the selection operator that only this package registers.

In a process ToMA's selection is one node, `toma_fx::facility_location`, because compilers would
take long over its loop (see `methods.ops`). Runtimes don't know that operator, so an exported
program holds its body instead, the loop unrolled. Both compute the same, bit by bit.

    similarity -> facility_location(keep)      becomes
    similarity -> round -> sum -> argmax -> ... (keep times) -> cat
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from toma_fx.graph.rewriter import Rewriter
from toma_fx.methods.facility import facility_location


@dataclass(frozen=True)
class ExpandSelection:
    """Splice the body of every `toma_fx::facility_location` node in its place."""

    name: ClassVar[str] = "expand_selection"

    def apply(self, rewriter: Rewriter) -> None:
        """Expand the nodes of a graph; one without them stays as it is."""
        operator = torch.ops.toma_fx.facility_location.default
        nodes = rewriter.graph.find_nodes(op="call_function", target=operator)
        for node in nodes:
            self._expand(rewriter, node)
        if nodes:
            rewriter.erase_dead()

    def _expand(self, rewriter: Rewriter, node: fx.Node) -> None:
        similarity: Any = node.args[0]
        keep: Any = node.args[1]

        def select(similarity: Tensor) -> Tensor:
            return facility_location(similarity, keep)

        with rewriter.after(node):
            (chosen,) = rewriter.splice((self.name, keep), select, [similarity])
        rewriter.replace_uses(node, chosen, keep=())

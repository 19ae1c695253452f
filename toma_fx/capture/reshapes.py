"""Reshapes that do two things at once, taken apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from toma_fx.graph.nodes import RESHAPES
from toma_fx.graph.regroup import regroup
from toma_fx.graph.rewriter import Rewriter

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitReshapes:
    """A reshape that joins some dimensions and splits others  becomes  two: first it joins.

    [B, tokens, heads, width] to a picture [B, height, width, channels] has [B, tokens, channels] in
    between, where tokens can merge.
    """

    name: ClassVar[str] = "split_reshapes"

    def apply(self, rewriter: Rewriter) -> None:
        """Split them; those of sizes that depend on the data stay."""
        for node in rewriter.calls(*RESHAPES):
            x: Any = node.args[0]
            source, target = list(x.meta["val"].shape), list(node.meta["val"].shape)
            if any(not isinstance(size, int) for size in source + target):
                continue
            groups = regroup(source, target)
            split = [ins for ins, outs in groups if len(ins) == 1 < len(outs)]
            if not split or all(len(ins) < 2 or len(outs) != 1 for ins, outs in groups):
                continue
            between = [
                size
                for ins, outs in groups
                for size in ([source[ins[0]]] if ins in split else [target[d] for d in outs])
            ]
            with rewriter.before(node):
                joined = rewriter.insert(aten.reshape.default, x, between)
                view = rewriter.insert(aten.view.default, joined, target)
            rewriter.replace(node, view)

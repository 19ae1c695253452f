"""Pass: give the graph one pattern per group.

refresh:  feature -> select -> weights -> (idx, merge, unmerge), all three also outputs
reweigh:  idx input;  feature -> weights -> (merge, unmerge), both also outputs
reuse:    idx, merge, unmerge are inputs
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from toma_fx.methods import toma
from toma_fx.passes.rewriter import Rewriter
from toma_fx.passes.tokens import Span, image_part
from toma_fx.plan import MergePlan, PatternGroup

UNROLL = 4
"""Destinations a window up to which the greedy loop is unrolled into the graph."""
Use = Literal["refresh", "reweigh", "reuse"]
PARTS = ("idx", "merge", "unmerge")


@dataclass(frozen=True)
class PatternNodes:
    """Graph nodes of one pattern."""

    idx: fx.Node
    merge: fx.Node
    unmerge: fx.Node


@dataclass(frozen=True)
class ProvidePatterns:
    """Insert pattern nodes or inputs for every group of `plan`, according to `use`.

    `spans` tells where the image lies in each group's feature.
    """

    plan: MergePlan
    use: Use
    spans: Mapping[str, Span]

    def apply(self, rewriter: Rewriter) -> dict[str, PatternNodes]:
        """Returns the pattern nodes of each group."""
        nodes = rewriter.index()
        return {g.name: self._provide(rewriter, g, nodes[g.feature]) for g in self.plan.groups}

    def _provide(self, rewriter: Rewriter, group: PatternGroup, feature: fx.Node) -> PatternNodes:
        setting = group.setting
        grid, tile = setting.grid, setting.tile
        count, tokens = setting.windows, tile[0] * tile[1]
        opaque = setting.keep > UNROLL
        value: Tensor = feature.meta["val"]
        dtype, device = value.dtype, value.device
        shapes = {
            "idx": (group.batch, count, setting.keep),
            "merge": (group.batch, count, setting.keep, tokens),
            "unmerge": (group.batch, count, tokens, setting.keep),
        }

        def given(part: str) -> fx.Node:
            kind = torch.int64 if part == "idx" else dtype
            name = f"pattern_{group.name}_{part}"
            return rewriter.placeholder(
                name, lambda: torch.empty(shapes[part], dtype=kind, device=device)
            )

        if self.use == "reuse":
            return PatternNodes(given("idx"), given("merge"), given("unmerge"))

        def weigh(x: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
            pattern = toma.weights(x, idx, grid, tile, setting.scale, unmerge=setting.unmerge)
            return pattern.merge, pattern.unmerge

        idx = given("idx") if self.use == "reweigh" else None
        with rewriter.after(feature):
            tokens_node = image_part(rewriter, feature, self.spans[group.name])
            if idx is None:
                (idx,) = rewriter.splice(
                    ("select", setting),
                    lambda x: toma.select(x, grid, tile, setting.keep, opaque=opaque),
                    [tokens_node],
                )
                rewriter.add_outputs([idx])
            merge, unmerge = rewriter.splice(("weigh", setting), weigh, [tokens_node, idx])
        rewriter.add_outputs([merge, unmerge])
        return PatternNodes(idx, merge, unmerge)


def pattern_inputs(plan: MergePlan, use: Use) -> tuple[str, ...]:
    """Names of the pattern inputs of a program, in order."""
    parts = {"refresh": (), "reweigh": ("idx",), "reuse": PARTS}[use]
    return tuple(f"pattern_{g.name}_{part}" for g in plan.groups for part in parts)


def pattern_outputs(plan: MergePlan, use: Use) -> tuple[str, ...]:
    """Names of the pattern outputs of a program, after the model's own, in order."""
    parts = {"refresh": PARTS, "reweigh": ("merge", "unmerge"), "reuse": ()}[use]
    return tuple(f"pattern_{g.name}_{part}" for g in plan.groups for part in parts)

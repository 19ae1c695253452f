"""Pass: give the graph one pattern per group.

refresh:  feature -> select -> weights -> (idx, merge, unmerge), all three also outputs
reweigh:  idx input;  feature -> weights -> (merge, unmerge), both also outputs
reuse:    idx, merge, unmerge are inputs
mixed:    all three are inputs, and two masks [B]; rows to select anew take
          idx = where(select, fresh, given), rows to weigh anew likewise; all three also outputs
"""

from __future__ import annotations

import math
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
Use = Literal["refresh", "reweigh", "reuse", "mixed"]
PARTS = ("idx", "merge", "unmerge")
MASKS = ("pattern_select", "pattern_weigh")


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
        masks = self._masks(rewriter, nodes) if self.use == "mixed" else ()
        patterns = {
            g.name: self._provide(rewriter, g, nodes[g.feature], masks) for g in self.plan.groups
        }
        outputs = [getattr(p, part) for p in patterns.values() for part in OUTPUTS[self.use]]
        if outputs:
            rewriter.add_outputs(outputs)
        return patterns

    def _masks(self, rewriter: Rewriter, nodes: Mapping[str, fx.Node]) -> tuple[fx.Node, ...]:
        first = self.plan.groups[0]
        device = nodes[first.feature].meta["val"].device

        def mask() -> Tensor:
            return torch.empty(first.batch, dtype=torch.bool, device=device)

        return tuple(rewriter.placeholder(name, mask) for name in MASKS)

    def _given(self, rewriter: Rewriter, group: PatternGroup, value: Tensor) -> list[fx.Node]:
        """Inputs of a group's parts, those that the program takes."""
        setting = group.setting
        count, tokens = setting.windows, math.prod(setting.tile)
        shapes = {
            "idx": (group.batch, count, setting.keep),
            "merge": (group.batch, count, setting.keep, tokens),
            "unmerge": (group.batch, count, tokens, setting.keep),
        }

        def like(part: str) -> Tensor:
            dtype = torch.int64 if part == "idx" else value.dtype
            return torch.empty(shapes[part], dtype=dtype, device=value.device)

        return [
            rewriter.placeholder(f"pattern_{group.name}_{part}", lambda part=part: like(part))  # type: ignore[misc]
            for part in INPUTS[self.use]
        ]

    def _provide(
        self,
        rewriter: Rewriter,
        group: PatternGroup,
        feature: fx.Node,
        masks: tuple[fx.Node, ...],
    ) -> PatternNodes:
        setting = group.setting
        grid, tile = setting.grid, setting.tile
        opaque = setting.keep > UNROLL
        given = self._given(rewriter, group, feature.meta["val"])
        if self.use == "reuse":
            return PatternNodes(*given)

        def weigh(x: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
            pattern = toma.weights(x, idx, grid, tile, setting.scale, unmerge=setting.unmerge)
            return pattern.merge, pattern.unmerge

        def chosen(mask: Tensor, fresh: Tensor, kept: Tensor) -> Tensor:
            return torch.where(mask.view(-1, *[1] * (fresh.dim() - 1)), fresh, kept)

        with rewriter.after(feature):
            image = image_part(rewriter, feature, self.spans[group.name])
            if self.use == "reweigh":
                (idx,) = given
            else:
                (idx,) = rewriter.splice(
                    ("select", setting),
                    lambda x: toma.select(x, grid, tile, setting.keep, opaque=opaque),
                    [image],
                )
            if self.use == "mixed":
                (idx,) = rewriter.splice("chosen", chosen, [masks[0], idx, given[0]])
            weights = rewriter.splice(("weigh", setting), weigh, [image, idx])
            if self.use == "mixed":
                weights = [
                    rewriter.splice("chosen", chosen, [masks[1], fresh, kept])[0]
                    for fresh, kept in zip(weights, given[1:], strict=True)
                ]
        return PatternNodes(idx, *weights)


INPUTS: Mapping[Use, tuple[str, ...]] = {
    "refresh": (), "reweigh": ("idx",), "reuse": PARTS, "mixed": PARTS
}  # fmt: skip
"""Parts of a pattern that a program takes."""
OUTPUTS: Mapping[Use, tuple[str, ...]] = {
    "refresh": PARTS, "reweigh": ("merge", "unmerge"), "reuse": (), "mixed": PARTS
}  # fmt: skip
"""Parts of a pattern that a program gives."""


def pattern_inputs(plan: MergePlan, use: Use) -> tuple[str, ...]:
    """Names of the pattern inputs of a program, in order."""
    parts = tuple(f"pattern_{g.name}_{part}" for g in plan.groups for part in INPUTS[use])
    return (*MASKS, *parts) if use == "mixed" else parts


def pattern_outputs(plan: MergePlan, use: Use) -> tuple[str, ...]:
    """Names of the pattern outputs of a program, after the model's own, in order."""
    return tuple(f"pattern_{g.name}_{part}" for g in plan.groups for part in OUTPUTS[use])

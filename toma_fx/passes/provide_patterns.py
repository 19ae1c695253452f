"""Pass: give the graph one pattern per group.

refresh:  feature -> select -> chosen parts -> weights -> weighed parts; all are also outputs
reweigh:  chosen parts are inputs;  feature -> weights -> weighed parts, also outputs
reuse:    all parts are inputs
mixed:    all parts are inputs, and two masks [B]; rows to select anew take
          chosen = where(select, fresh, given), rows to weigh anew likewise; all are also outputs

ToMA chooses idx and weighs merge and unmerge; which parts there are is the method's affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from toma_fx.graph.rewriter import Rewriter
from toma_fx.methods.setting import Setting
from toma_fx.passes.snippets import PatternNodes, Span, image_part
from toma_fx.plan.plan import MergePlan, PatternGroup

Use = Literal["refresh", "reweigh", "reuse", "mixed"]


MASKS = ("pattern_select", "pattern_weigh")


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
        outputs = [
            node
            for p in patterns.values()
            for part, node in zip(p.setting.parts, p.nodes, strict=True)
            if part in parts_given(p.setting, self.use)
        ]
        if outputs:
            rewriter.add_outputs(outputs)
        return patterns

    def _masks(self, rewriter: Rewriter, nodes: Mapping[str, fx.Node]) -> tuple[fx.Node, ...]:
        first = self.plan.groups[0]
        device = nodes[first.feature].meta["val"].device

        def mask() -> Tensor:
            return torch.empty(first.batch, dtype=torch.bool, device=device)

        return tuple(rewriter.placeholder(name, mask) for name in MASKS)

    def _given(self, rewriter: Rewriter, group: PatternGroup, image: Tensor) -> list[fx.Node]:
        """Inputs of a group's parts, those that the program takes."""
        names = parts_taken(group.setting, self.use)
        likes = rewriter.fake(("parts", group.setting), lambda x: parts_of(group.setting, x), image)
        return [
            rewriter.placeholder(group.tensor(name), like.clone)
            for name, like in zip(group.setting.parts, likes, strict=True)
            if name in names
        ]

    def _provide(
        self,
        rewriter: Rewriter,
        group: PatternGroup,
        feature: fx.Node,
        masks: tuple[fx.Node, ...],
    ) -> PatternNodes:
        setting, span = group.setting, self.spans[group.name]
        if not setting.parts:
            return PatternNodes(setting, ())
        given = self._given(rewriter, group, span.image(feature.meta["val"]))
        if self.use == "reuse":
            return PatternNodes(setting, tuple(given))
        number = len(setting.chosen)

        def select(x: Tensor) -> tuple[Tensor, ...]:
            return setting.select(x)

        def weigh(x: Tensor, *chosen: Tensor) -> tuple[Tensor, ...]:
            return setting.weights(x, dict(zip(setting.chosen, chosen, strict=True)))

        with rewriter.after(feature):
            image = image_part(rewriter, feature, span)
            chosen = given
            if self.use != "reweigh":
                chosen = rewriter.splice(
                    ("select", setting), select, [image], whole=setting.dynamic
                )
            if self.use == "mixed":
                chosen = _where(rewriter, masks[0], chosen, given[:number])
            weights: list[fx.Node] = []
            if setting.weighed:
                weights = rewriter.splice(("weigh", setting), weigh, [image, *chosen])
            if self.use == "mixed":
                weights = _where(rewriter, masks[1], weights, given[number:])
        return PatternNodes(setting, (*chosen, *weights))


def _where(
    rewriter: Rewriter, mask: fx.Node, fresh: Iterable[fx.Node], kept: Iterable[fx.Node]
) -> list[fx.Node]:
    """Rows of `fresh` where the mask says so, of `kept` elsewhere."""

    def chosen(mask: Tensor, fresh: Tensor, kept: Tensor) -> Tensor:
        return torch.where(mask.view(-1, *[1] * (fresh.dim() - 1)), fresh, kept)

    pairs = zip(fresh, kept, strict=True)
    return [rewriter.splice("chosen", chosen, [mask, new, old])[0] for new, old in pairs]


def parts_of(setting: Setting, x: Tensor) -> tuple[Tensor, ...]:
    """The whole pattern of tokens [B, N, C]."""
    chosen = setting.select(x)
    return (*chosen, *setting.weights(x, dict(zip(setting.chosen, chosen, strict=True))))


def parts_taken(setting: Setting, use: Use) -> tuple[str, ...]:
    """Parts of a pattern that a program takes."""
    taken = {"refresh": (), "reweigh": setting.chosen}
    return taken.get(use, setting.parts)


def parts_given(setting: Setting, use: Use) -> tuple[str, ...]:
    """Parts of a pattern that a program gives."""
    given = {"reuse": (), "reweigh": setting.weighed}
    return given.get(use, setting.parts)


def pattern_inputs(plan: MergePlan, use: Use) -> tuple[str, ...]:
    """Names of the pattern inputs of a program, in order."""
    parts = tuple(g.tensor(part) for g in plan.groups for part in parts_taken(g.setting, use))
    return (*MASKS, *parts) if use == "mixed" else parts


def pattern_outputs(plan: MergePlan, use: Use) -> tuple[str, ...]:
    """Names of the pattern outputs of a program, after the model's own, in order."""
    return tuple(g.tensor(part) for g in plan.groups for part in parts_given(g.setting, use))

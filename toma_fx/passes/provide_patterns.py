"""Pass: give the graph the parts of one pattern per group.

What a program takes and gives decides, part by part, where a part comes from:

    given alone        computed    feature -> select -> chosen parts -> weights -> weighed parts
    taken alone        kept        an input
    taken and given    by row      where(mask, computed, kept): rows of a batch differ
                       computed    where all rows are alike; the former value is recalled
    neither            computed

Where a group's signal is taken, it stands for the feature. Parts that are given are also outputs.
Two masks [B] tell the rows to select anew and the rows to weigh anew; `chosen` parts follow the
first, `weighed` parts the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, fx

from toma_fx.graph.rewriter import Rewriter
from toma_fx.methods.setting import Setting
from toma_fx.passes.job import Job
from toma_fx.passes.snippets import Span, span_at, splice_image
from toma_fx.plan.plan import MergePlan, PatternGroup

PATTERN_MASKS = {"pattern_select": ("refresh",), "pattern_weigh": ("refresh", "reweigh")}
"""Inputs of a program that chooses by row, before its kept tensors: the kinds of the rows that they
hold true for."""


@dataclass(frozen=True)
class ProvidePatterns:
    """Insert nodes or inputs for the parts of every group of `plan`.

    The nodes of a group's parts are handed on as `rewriter.named[group.name]`.

    Attributes:
        takes, gives: names of the kept tensors that the program takes and gives.
        spans: where the image lies in features and outputs of groups.
        by_row: whether rows of a batch are due different kinds.
    """

    plan: MergePlan
    takes: frozenset[str]
    gives: frozenset[str]
    spans: Mapping[str, Span]
    by_row: bool
    name: ClassVar[str] = "provide_patterns"

    @classmethod
    def of(cls, job: Job) -> Self:
        """The pass for a job."""
        plan = job.plan
        takes, gives = (
            frozenset(names).difference(plan.all_updates)
            for names in (job.use.takes(plan), job.use.gives(plan))
        )
        values = {(name, g.image) for g in plan.groups for name in (g.feature, g.output) if name}
        spans = {
            name: span_at(name, image, job.flow, plan.text_lengths(name)) for name, image in values
        }
        return cls(plan, takes, gives, spans, bool(job.use.serves))

    def __str__(self) -> str:
        return f"ProvidePatterns({len(self.plan.groups)} groups)"

    def apply(self, rewriter: Rewriter) -> None:
        """Rewrite the graph."""
        nodes = rewriter.index()
        by_row = self.by_row and self.takes & self.gives
        masks = self._add_masks(rewriter, nodes) if by_row else ()
        outputs: list[fx.Node] = []
        for group in self.plan.groups:
            names = [group.tensor(part) for part in group.setting.parts]
            if group.signal in self.takes:
                parts = self._match(rewriter, group, nodes)
            else:
                parts = self._provide(rewriter, group, nodes[group.feature], masks)
            rewriter.named[group.name] = tuple(parts)
            pairs = zip(names, parts, strict=True)
            outputs += [node for name, node in pairs if name in self.gives]
        if outputs:
            rewriter.add_outputs(outputs)

    def _add_masks(self, rewriter: Rewriter, nodes: Mapping[str, fx.Node]) -> tuple[fx.Node, ...]:
        first = self.plan.groups[0]
        device = nodes[first.feature].meta["val"].device

        def mask() -> Tensor:
            return torch.empty(first.batch, dtype=torch.bool, device=device)

        return tuple(rewriter.add_input(name, mask) for name in PATTERN_MASKS)

    def _add_inputs(self, rewriter: Rewriter, group: PatternGroup, image: Tensor) -> list[fx.Node]:
        """Inputs for the parts of a group that the program takes."""
        setting = group.setting
        likes = rewriter.fake(("parts", setting), lambda x: parts_of(setting, x), image)
        return [
            rewriter.add_input(group.tensor(part), like.clone)
            for part, like in zip(setting.parts, likes, strict=True)
            if group.tensor(part) in self.takes
        ]

    def _match(
        self, rewriter: Rewriter, group: PatternGroup, nodes: Mapping[str, fx.Node]
    ) -> Sequence[fx.Node]:
        """The nodes of all parts of a group, selected on its signal."""
        setting, output = group.setting, nodes[group.output].meta["val"]
        span = self.spans[group.output]
        signal = rewriter.add_input(group.signal, lambda: span.image(output).contiguous())
        recalled = self._add_inputs(rewriter, group, signal.meta["val"])
        names = [part for part in setting.parts if group.tensor(part) in self.takes]

        def match(x: Tensor, *before: Tensor) -> tuple[Tensor, ...]:
            chosen = setting.select_again(x, dict(zip(names, before, strict=True)))
            return (*chosen, *setting.weights(x, dict(zip(setting.chosen, chosen, strict=True))))

        with rewriter.after(nodes[group.feature]):
            key = ("match", setting)
            return rewriter.splice(key, match, [signal, *recalled], as_call=setting.dynamic)

    def _provide(
        self,
        rewriter: Rewriter,
        group: PatternGroup,
        feature: fx.Node,
        masks: tuple[fx.Node, ...],
    ) -> Sequence[fx.Node]:
        """The nodes of all parts of a group, in order."""
        setting, span = group.setting, self.spans[group.feature]
        if not setting.parts:
            return ()
        inputs = self._add_inputs(rewriter, group, span.image(feature.meta["val"]))
        names = [group.tensor(part) for part in setting.parts]
        if self.takes.issuperset(names) and self.gives.isdisjoint(names):
            return inputs
        number = len(setting.chosen)
        select_kept = self.takes.issuperset(names[:number])

        def select(x: Tensor) -> tuple[Tensor, ...]:
            return setting.select(x)

        def weigh(x: Tensor, *chosen: Tensor) -> tuple[Tensor, ...]:
            return setting.weights(x, dict(zip(setting.chosen, chosen, strict=True)))

        with rewriter.after(feature):
            image = splice_image(rewriter, feature, span)
            chosen = inputs[:number]
            if masks or not select_kept:
                key = ("select", setting)
                computed = rewriter.splice(key, select, [image], as_call=setting.dynamic)
                chosen = _where(rewriter, masks[0], computed, chosen) if masks else computed
            weights: list[fx.Node] = []
            if setting.weighed:
                weights = rewriter.splice(("weigh", setting), weigh, [image, *chosen])
            if masks:
                weights = _where(rewriter, masks[1], weights, inputs[number:])
        return (*chosen, *weights)


def _where(
    rewriter: Rewriter, mask: fx.Node, computed: Iterable[fx.Node], kept: Iterable[fx.Node]
) -> list[fx.Node]:
    """Rows of `computed` where the mask is true, of `kept` elsewhere."""

    def choose(mask: Tensor, computed: Tensor, kept: Tensor) -> Tensor:
        return torch.where(mask.view(-1, *[1] * (computed.dim() - 1)), computed, kept)

    pairs = zip(computed, kept, strict=True)
    return [rewriter.splice("choose", choose, [mask, new, old])[0] for new, old in pairs]


def parts_of(setting: Setting, x: Tensor) -> tuple[Tensor, ...]:
    """All parts of the pattern of tokens [B, N, C]."""
    chosen = setting.select(x)
    return (*chosen, *setting.weights(x, dict(zip(setting.chosen, chosen, strict=True))))

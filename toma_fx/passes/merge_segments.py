r"""Pass: run the segments of a plan on merged tokens.

Sublayer (tokens merge behind the norm, the update is unmerged):

    x -> norm -> attention -> add          x -> norm -> merge -> attention -> unmerge -> add
    \------------------------/             \--------------------------------------------/

Block and stack (only the update is unmerged, every token keeps its own detail):

    x_a -> block -> ... -> x_b             x_a -> merge -> block -> ... -> x_b'
                                           x_b = x_a + unmerge(x_b' - merge(x_a))

Keys (queries are not merged, and nothing is unmerged):

    norm --> q ----------> attention       norm --> q -------------------> attention
       \--> k, v --------/                    \--> merge --> k, v --------/

With `proportional=True` attention adds log(tokens that a key stands for) to the scores of its keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import ClassVar, Self

from torch import Tensor, fx

from toma_fx.analysis.dataflow import Flow, is_embedding
from toma_fx.analysis.facts import Analysis, Patch, Positional, Transfer
from toma_fx.analysis.labels import token_dim, tokens_of
from toma_fx.graph.rewriter import Rewriter
from toma_fx.methods.sharded import Sharded
from toma_fx.passes.gather_keys import gather_keys, key_runs
from toma_fx.passes.job import Job
from toma_fx.passes.key_sizes import Biases, weigh_keys
from toma_fx.passes.share_text import keys_name, operand_name, own_name
from toma_fx.passes.snippets import (
    PatternNodes,
    Span,
    span_at,
    span_of,
    splice_counts,
    splice_gather,
    splice_merge,
    splice_unmerge,
    splice_update,
)
from toma_fx.plan.key_sizes import IMAGE_KEYS
from toma_fx.plan.plan import MergePlan, MergeSegment


@dataclass(frozen=True)
class MergeSegments:
    """Rewrite every segment of `plan`; patterns are those that `ProvidePatterns` handed on."""

    plan: MergePlan
    analysis: Analysis
    flow: Flow
    name: ClassVar[str] = "merge_segments"

    @classmethod
    def of(cls, job: Job) -> Self:
        """The pass for a job."""
        return cls(job.plan, job.analysis, job.flow)

    def apply(self, rewriter: Rewriter) -> None:
        """Rewrite the graph."""
        patterns = {
            g.name: PatternNodes(g.setting, rewriter.named[g.name]) for g in self.plan.groups
        }
        work = _Work(self, rewriter, patterns, rewriter.index())
        for segment in self.plan.segments:
            work.rewrite(segment)

    def __str__(self) -> str:
        return f"MergeSegments({len(self.plan.segments)} segments)"


@dataclass
class _Work:
    """State of one application: nodes by name, and merged or gathered values to use again.

    What enters a segment is looked up as `rewriter.current`: an earlier segment, or a kept update,
    may have taken its place.

    `cache` is by the name of the unmerged value first, so that forgetting one takes no search.
    """

    task: MergeSegments
    rewriter: Rewriter
    patterns: Mapping[str, PatternNodes]
    nodes: dict[str, fx.Node]
    cache: dict[str, dict[tuple[str, ...], fx.Node]] = field(default_factory=dict)
    biases: Biases = field(default_factory=dict)

    def rewrite(self, segment: MergeSegment) -> None:
        inner, keys = [self.nodes[n] for n in segment.inner], segment.scope == "keys"
        inside = set(segment.inner)
        sites = [self.nodes[n] for n in segment.sites] if keys else []
        addends = {name: self.addend(name, inside) for name in segment.additions}
        for name in segment.entries:
            merged, old = self.merge_entry(name, segment), self.inner_form(name)
            readers = [n for n in inner if old in n.all_input_nodes]
            for node in (*readers, *(n for n in sites if old in n.args[1:3])):
                self.rewriter.replace_input(node, old, merged)
        for node in self.affected(segment):
            self.patch_node(node, segment)
            self.gather_keys(node, segment)
            self.rewriter.retype(node)
        if self.task.plan.config.proportional:
            self.weigh_keys(segment)
        gathered = self.rewriter.named.get(own_name(segment.exit))
        if keys or (segment.exit in self.rewriter.stand_ins and gathered is None):
            return  # nothing reads the exit
        additions = [
            (unmerged, self.addend(name, inside), self.span(name, segment))
            for name, unmerged in addends.items()
        ]
        self.unmerge_exit(segment, additions)

    def addend(self, name: str, inside: Set[str]) -> fx.Node:
        """The operand of an addition that is not `inside` the segment."""
        inputs = self.nodes[name].all_input_nodes
        return next(n for n in inputs if n.name not in inside)

    def span(self, name: str, segment: MergeSegment) -> Span:
        """Where the segment's image lies in the sequence of a node."""
        return span_at(name, segment.image, self.task.flow, self.lengths(name))

    def lengths(self, name: str) -> Mapping[str, int]:
        """Tokens of each text in what a segment sees of a value, where they are not all."""
        text = self.task.plan.text
        if text is not None and own_name(name) in self.rewriter.named:
            return text.lengths
        return self.task.plan.text_lengths(name)

    def inner_form(self, name: str) -> fx.Node:
        """What segments see of a value: the own part of the text, if processes share that."""
        own = self.rewriter.named.get(own_name(name))
        return own[0] if own else self.rewriter.current(name)

    def merge_entry(self, name: str, segment: MergeSegment) -> fx.Node:
        """The merged form of an entry, one for all segments of a group."""
        key, known = ("merge", segment.group), self.cache.setdefault(name, {})
        if key not in known:
            node, pattern = self.inner_form(name), self.patterns[segment.group]
            layout, span = self.task.flow.layout(name) or (), self.span(name, segment)
            dim = token_dim(layout) or 0
            with self.rewriter.after(node, *pattern.nodes):
                if node.meta["val"].is_floating_point():
                    known[key] = splice_merge(self.rewriter, node, span, pattern, dim=dim)
                else:  # there is nothing between yes and no
                    table = Positional(name, layout, dim)
                    known[key] = splice_gather(self.rewriter, node, table, span, pattern)
        return known[key]

    def affected(self, segment: MergeSegment) -> list[fx.Node]:
        """Inner nodes, and nodes that read them without carrying the image, in graph order."""
        flow, inner = self.task.flow, set(segment.inner)
        readers = {u for n in inner - {segment.exit} for u in flow.users[n]}
        if segment.scope == "keys":
            readers.difference_update(segment.sites)
        names = sorted(inner | readers, key=flow.position.__getitem__)
        return [self.nodes[n] for n in names]

    def patch_node(self, node: fx.Node, segment: MergeSegment) -> None:
        """Literals and positional operands of one node."""
        transfer = self.task.analysis.transfers.get(node.name)
        if transfer is None:
            return
        for patch in transfer.patches:
            if any(s.name == segment.image.name for s in patch.segments):
                length = self.merged_length(patch, segment, node.name)
                self.rewriter.set_literal(node, patch.path, length)
        current: dict[str, fx.Node] = {}
        for positional in transfer.positionals:
            if all(s.name != segment.image.name for s in positional.tokens.segments):
                continue
            operand = positional.operand
            own = self.rewriter.named.get(operand_name(node.name, operand))
            old = current.get(operand) or (own[0] if own else self.rewriter.current(operand))
            new = self.merge_operand(old, positional, segment, self.lengths(node.name))
            self.rewriter.replace_input(node, old, new)
            current[operand] = new
        self.count_merged(node, transfer, segment)

    def gather_keys(self, node: fx.Node, segment: MergeSegment) -> None:
        """Let attention see the keys of all processes, where each has some of the tokens."""
        setting, sites = segment.setting, self.task.analysis.sites
        site = next((s for s in sites if s.node == node.name and s.operands), None)
        if not isinstance(setting, Sharded) or site is None:
            return
        layout = self.task.flow.layout(site.operands[1])
        keys = None if layout is None else layout[-2].tokens
        if keys is None or segment.image not in keys.segments:
            return
        text = self.task.plan.text
        if text is not None and node.name not in text.sites:
            text = None
        gathered = self.rewriter.named.pop(keys_name(node.name), ())
        if gathered:  # of the text alone
            key, value, *gathering = gathered
            self.rewriter.set_operand(node, 1, "key", key)
            self.rewriter.set_operand(node, 2, "value", value)
            for each in reversed(gathering):
                self.rewriter.erase(each)
        runs = key_runs(keys, text, {segment.image.name: setting.merged_count})
        ordered = site.masked or self.task.plan.config.proportional
        gather_keys(self.rewriter, node, runs, setting.rank, ordered=ordered)

    def count_merged(self, node: fx.Node, transfer: Transfer, segment: MergeSegment) -> None:
        """Let each merged token count as often as the tokens it stands for in a sum over them."""
        pattern = self.patterns[segment.group]
        for counted in transfer.counted:
            if all(s.name != segment.image.name for s in counted.tokens.segments):
                continue
            old, span = (
                self.rewriter.current(counted.operand),
                span_of(counted.tokens, segment.image),
            )
            with self.rewriter.after(old, *pattern.nodes):
                new = splice_counts(self.rewriter, old, counted, span, pattern)
            self.rewriter.replace_input(node, old, new)

    def weigh_keys(self, segment: MergeSegment) -> None:
        """Let attention weigh the segment's keys by the number of tokens they stand for."""
        pattern, flow = self.patterns[segment.group], self.task.flow
        for site in self.task.analysis.sites:
            if site.node not in segment.sites or site.kind not in IMAGE_KEYS:
                continue
            keys = tokens_of(flow.layout(site.operands[1]))
            if keys is None or segment.image not in keys.segments:
                continue
            span = span_of(keys, segment.image)
            weigh_keys(self.rewriter, self.nodes[site.node], span, pattern, self.biases)

    def merged_length(self, patch: Patch, segment: MergeSegment, name: str) -> int | fx.Node:
        """What a literal becomes: a number, or a node where it depends on the data."""
        image, pattern = segment.image.name, self.patterns[segment.group]
        text = self.lengths(name)
        value = patch.value({**text, image: segment.setting.merged_count})
        if not segment.setting.dynamic:
            return value
        rest = patch.value({**text, image: 0})
        key, known = (str(rest), str(value)), self.cache.setdefault(segment.group, {})
        if key not in known:
            times = patch.times * sum(s.name == image for s in patch.segments)

            def count(*parts: Tensor) -> int:
                return rest + times * segment.setting.count_merged(pattern.named(parts))

            with self.rewriter.after(self.rewriter.current(segment.entries[0]), *pattern.nodes):
                (known[key],) = self.rewriter.splice(key, count, pattern.nodes, as_call=True)
        return known[key]

    def merge_operand(
        self,
        operand: fx.Node,
        positional: Positional,
        segment: MergeSegment,
        lengths: Mapping[str, int],
    ) -> fx.Node:
        """A positional operand on merged tokens, one for all segments of a group.

        What is added to the stream merges as the stream does (merging is linear); tables that
        multiply, and masks, are gathered at the destinations.
        """
        pattern = self.patterns[segment.group]
        is_keys = positional.layout[positional.dim].keys is not None
        span = span_of(positional.tokens, segment.image, {} if is_keys else lengths)
        value = operand.meta["val"]
        content = positional.additive and value.is_floating_point() and pattern.setting.linear
        content = content and is_embedding(positional.layout)
        lead = len(positional.layout) - value.dim()
        rows = repr(positional.layout)
        key = ("content" if content else "gather", rows, str(positional.dim), segment.group)
        known = self.cache.setdefault(operand.name, {})
        if key not in known:
            located = self.key_positions(segment) if is_keys else None
            with self.rewriter.after(operand, *(pattern.nodes if located is None else [located])):
                if content:
                    new = splice_merge(
                        self.rewriter, operand, span, pattern, dim=positional.dim, lead=lead > 0
                    )
                else:
                    new = splice_gather(self.rewriter, operand, positional, span, pattern, located)
            known[key] = new
        return known[key]

    def key_positions(self, segment: MergeSegment) -> fx.Node | None:
        """Where the merged tokens of all processes are; None if this one has them all."""
        setting, pattern = segment.setting, self.patterns[segment.group]
        if not isinstance(setting, Sharded):
            return None
        key, known = ("key positions",), self.cache.setdefault(segment.group, {})
        if key not in known:

            def locate(*parts: Tensor) -> Tensor:
                return setting.key_positions(pattern.named(parts))

            with self.rewriter.after(self.rewriter.current(segment.entries[0]), *pattern.nodes):
                (known[key],) = self.rewriter.splice((*key, setting), locate, pattern.nodes)
        return known[key]

    def unmerge_exit(
        self,
        segment: MergeSegment,
        additions: list[tuple[fx.Node, fx.Node, Span]],
    ) -> None:
        """Unmerge at the exit and hand the result to everyone outside."""
        end, span = self.nodes[segment.exit], self.span(segment.exit, segment)
        pattern = self.patterns[segment.group]
        with self.rewriter.after(end):
            if segment.base:
                base = (self.inner_form(segment.base), self.span(segment.base, segment))
                merged_base = self.merge_entry(segment.base, segment)
                result = splice_update(
                    self.rewriter, base, merged_base, (end, span), pattern, additions
                )
            else:
                result = splice_unmerge(self.rewriter, end, span, pattern)
        readers = {n for n in self.affected(segment) if n is not end}
        self.rewriter.replace_uses(end, result, keep=readers.union(self.rewriter.spliced))
        self.cache.pop(end.name, None)
        if own_name(segment.exit) not in self.rewriter.named:  # of which all text is gathered
            # later segments that name this value mean the unmerged one
            self.rewriter.stand_in(segment.exit, result)

r"""Pass: run text on the part that one of several processes has.

    text --------> linear -> ...      text --> own part --> linear -> ... --> x --> gather --> y
                                                                           \-- own part of y --> ...

What others read of such a value, and what is kept over steps, is gathered (`whole` of the plan);
behind it the own part goes on, so that a kept update can take the place of the gathered value.
Attention whose image merges gathers its text there, in one exchange (`MergeSegments`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, fx

from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.facts import Analysis
from toma_fx.analysis.labels import Layout
from toma_fx.graph.rewriter import Rewriter
from toma_fx.passes.gather_keys import gather_keys, key_runs
from toma_fx.passes.job import Job
from toma_fx.passes.snippets import close_factors, open_factors
from toma_fx.plan.plan import SharedText


@dataclass(frozen=True)
class ShareText:
    """Rewrite every node that holds the text of `text`.

    For the passes after it: `rewriter.named[own_name(value)]` is the own part of a value that
    elsewhere is whole, `rewriter.named[operand_name(node, operand)]` what a node reads instead, and
    `rewriter.named[keys_name(site)]` its own keys and values, and the nodes that gather them. So
    does masked attention, whose mask has all keys, until `MergeSegments` gathers the image as well.

    Attributes:
        merging: attention whose image merges, which gathers its text itself.
    """

    text: SharedText
    merging: frozenset[str]
    analysis: Analysis
    flow: Flow
    name: ClassVar[str] = "share_text"

    @classmethod
    def of(cls, job: Job) -> Self | None:
        """The pass for a job; None where every process computes all of the text."""
        text = job.plan.text
        if text is None or not job.plan.segments:
            return None
        return cls(text, _merging_sites(job), job.analysis, job.flow)

    def __str__(self) -> str:
        return f"ShareText({', '.join(map(str, self.text.segments))})"

    def apply(self, rewriter: Rewriter) -> None:
        """Rewrite the graph."""
        work = _Work(self, rewriter, rewriter.index())
        for name in self.flow.order:
            if name in work.readers:
                work.rewrite(name)
            if name in work.whole:
                work.gather(name)


def own_name(value: str) -> str:
    """What the own part of a value is called among the named nodes of a rewriter."""
    return f"own {value}"


def operand_name(node: str, operand: str) -> str:
    """What a node reads instead of an operand, among the named nodes of a rewriter."""
    return f"{operand} of {node}"


def keys_name(site: str) -> str:
    """What own keys and values, and what gathers them, are called among the named nodes."""
    return f"keys of {site}"


def _merging_sites(job: Job) -> frozenset[str]:
    """Attention that `MergeSegments` gathers the keys of."""
    found = set[str]()
    for segment in job.plan.segments:
        inner = set(segment.inner)
        touched = inner | {u for n in inner - {segment.exit} for u in job.flow.users[n]}
        for site in job.analysis.sites:
            keys = job.flow.layout(site.operands[1]) if site.operands else None
            tokens = None if keys is None else keys[-2].tokens
            if site.node in touched and tokens is not None and segment.image in tokens.segments:
                found.add(site.node)
    return frozenset(found)


class _Work:
    """State of one application."""

    def __init__(self, task: ShareText, rewriter: Rewriter, nodes: Mapping[str, fx.Node]) -> None:
        self.task, self.rewriter, self.nodes = task, rewriter, nodes
        text = task.text
        self.readers, self.inner = frozenset(text.readers), frozenset(text.inner)
        self.whole = frozenset(text.whole)
        self.sites = {s.node: s for s in task.analysis.sites if s.node in task.text.sites}
        self.entries = frozenset(task.text.entries)
        self.tables: dict[tuple[str, str, int], fx.Node] = {}

    def rewrite(self, name: str) -> None:
        """What one node reads, and its literals that count tokens."""
        node, flow, text = self.nodes[name], self.task.flow, self.task.text
        for operand in dict.fromkeys(flow.operands[name]):
            if operand in self.entries:
                self.take_entry(operand)
            own = self.rewriter.named.get(own_name(operand))
            if own is not None:
                self.rewriter.replace_input(node, self.nodes[operand], own[0])
        transfer = self.task.analysis.transfers.get(name)
        for patch in transfer.patches if transfer else ():
            if any(s.name in text.lengths for s in patch.segments):
                self.rewriter.set_literal(node, patch.path, patch.value(text.lengths))
        for positional in transfer.positionals if transfer else ():
            if positional.layout[positional.dim].keys is None:
                self.take_operand(node, positional.operand, positional.layout, positional.dim)
        if name in self.sites and (name not in self.task.merging or self.sites[name].masked):
            self.gather_keys(name)
        self.rewriter.retype(node)
        if name not in self.inner:  # the image of a joint sequence
            self.rewriter.restride(node)

    def take_entry(self, name: str) -> None:
        """The own part of a value that all processes have whole."""
        key = own_name(name)
        if key not in self.rewriter.named:
            layout = self.task.flow.layout(name) or ()
            with self.rewriter.after(self.rewriter.current(name)):
                self.rewriter.named[key] = (self.take(self.rewriter.current(name), layout),)

    def take(self, node: fx.Node, layout: Layout, dims: Sequence[int] | None = None) -> fx.Node:
        """The own part of the text of a value, along all or some dimensions."""
        text = self.task.text
        if dims is None:
            dims = [d for d, label in enumerate(layout) if label.tokens]
        key = ("own_text", layout, tuple(dims), text.segments, text.rank)
        return self.rewriter.splice(key, _take_own(layout, dims, text), [node])[0]

    def take_operand(self, node: fx.Node, operand: str, layout: Layout, dim: int) -> None:
        """The own part of an operand that lines up with text: a rotary table, a mask."""
        tokens = layout[dim].tokens
        if tokens is None or not any(s.name in self.task.text.lengths for s in tokens.segments):
            return
        place = operand_name(node.name, operand)
        (old,) = self.rewriter.named.get(place) or (self.rewriter.current(operand),)
        known = (old.name, repr(layout), dim)
        if known not in self.tables:
            with self.rewriter.after(old):
                self.tables[known] = self.take(old, layout, [dim])
        self.rewriter.replace_input(node, old, self.tables[known])
        self.rewriter.named[place] = (self.tables[known],)

    def gather_keys(self, name: str) -> None:
        """Let an attention see all of the text, where nothing else of its keys is shared yet."""
        site, text, node = self.sites[name], self.task.text, self.nodes[name]
        keys = (self.task.flow.layout(site.operands[1]) or ())[-2].tokens
        assert keys is not None
        before = [x for x in node.args[1:3] if isinstance(x, fx.Node)]
        gather_keys(self.rewriter, node, key_runs(keys, text, {}), text.rank, ordered=True)
        if name in self.task.merging:
            self.rewriter.named[keys_name(name)] = (*before, *self.rewriter.spliced)

    def gather(self, name: str) -> None:
        """All of the text of a value for those that hold it whole."""
        node, text, layout = self.nodes[name], self.task.text, self.task.flow.layout(name) or ()
        dims = [d for d, label in enumerate(layout) if label.tokens]
        outside = [u for u in node.users if u.name not in self.readers]
        key = ("all_text", layout, text.segments, text.rank)
        with self.rewriter.after(node):
            (whole,) = self.rewriter.splice(key, _gather_all(layout, dims, text), [node])
            self.rewriter.named[own_name(name)] = (self.take(whole, layout),)
        for user in outside:
            self.rewriter.replace_input(user, node, whole)
        self.rewriter.stand_in(name, whole)


Change = Callable[[Tensor, int, int], list[Tensor]]
"""A text to what stands in its place: (x, dimension, tokens of it in all) -> pieces."""


def _take_own(layout: Layout, dims: Sequence[int], text: SharedText) -> Callable[[Tensor], Tensor]:
    """From all of the text in a value to what this process has of it."""
    index, count = text.rank.index, text.rank.count

    def own(x: Tensor, dim: int, length: int) -> list[Tensor]:
        part, rest = divmod(length, count)
        first = x.narrow(dim, index * part, part)
        return [first, x.narrow(dim, count * part, rest)] if rest else [first]

    return _change(layout, dims, own, dict.fromkeys(text.lengths))


def _gather_all(
    layout: Layout, dims: Sequence[int], text: SharedText
) -> Callable[[Tensor], Tensor]:
    """From what this process has of the text in a value to all of it."""

    def every(x: Tensor, dim: int, length: int) -> list[Tensor]:
        part, rest = divmod(length, text.rank.count)
        first = text.rank.gather(x.narrow(dim, 0, part), dim)
        return [first, x.narrow(dim, part, rest)] if rest else [first]

    return _change(layout, dims, every, text.lengths)


def _change(
    layout: Layout, dims: Sequence[int], change: Change, lengths: Mapping[str, int | None]
) -> Callable[[Tensor], Tensor]:
    """A function that changes the text in a value along dimensions of tokens.

    Args:
        lengths: by the name of a text, how much of it is there; None is all.
    """

    def apply(x: Tensor) -> Tensor:
        lead = len(layout) - x.dim()
        for _ in range(lead):
            x = x.unsqueeze(0)
        for d in dims:
            tokens = layout[d].tokens
            assert tokens is not None
            x, at = open_factors(x, layout, d)
            pieces, start = list[Tensor](), 0
            for segment in tokens.segments:
                length = lengths.get(segment.name) or segment.length
                piece, start = x.narrow(at, start, length), start + length
                shared = segment.name in lengths
                pieces += change(piece, at, segment.length) if shared else [piece]
            x = close_factors(pieces[0] if len(pieces) == 1 else torch.cat(pieces, at), layout)
        return x.reshape(x.shape[lead:]) if lead else x

    return apply

"""A plan: what merges, what does not, and why. Frozen, JSON-able, free of graph objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from toma_fx.analysis.factors import Segment
from toma_fx.analysis.facts import Rejected
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.cache import Fitted
from toma_fx.methods.setting import Setting
from toma_fx.methods.sharded import Rank


@dataclass(frozen=True)
class MergeSegment:
    """A part of a residual stream that runs on merged tokens.

    Attributes:
        name: unique name. stream, image: where it belongs. scope: residual adds it spans.
        branches: indices of its branches in the stream; modules: their paths; kinds: their kinds.
        sites: attention nodes inside.
        entries: values merged on the way in. inner: nodes that run on merged tokens.
        exit: value unmerged on the way out; "" in scope "keys", where nothing is.
        base: stream value x_a of `x_b = x_a + unmerge(x_b' - merge(x_a))`; "" unmerges the update
            of one branch itself.
        additions: adds inside of what comes from outside; it leaves the segment unmerged.
        group: pattern group.
    """

    name: str
    stream: str
    image: Segment
    scope: str
    branches: tuple[int, ...]
    modules: tuple[str, ...]
    kinds: tuple[str, ...]
    sites: tuple[str, ...]
    entries: tuple[str, ...]
    inner: tuple[str, ...]
    exit: str
    base: str
    additions: tuple[str, ...]
    setting: Setting
    group: str


@dataclass(frozen=True)
class PatternGroup:
    """Segments that share one pattern, selected on the node `feature`.

    Attributes:
        output: node behind the last segment that the next selection sees; "" if it sees none.
    """

    name: str
    leader: str
    feature: str
    image: Segment
    batch: int
    setting: Setting
    output: str = ""

    @property
    def signal(self) -> str:
        """Name of the kept tensor that holds `output`."""
        return f"signal_{self.name}"

    def tensor(self, part: str) -> str:
        """Name of a part of the pattern among the inputs and outputs of programs."""
        return f"pattern_{self.name}_{part}"


@dataclass(frozen=True)
class KeptUpdate:
    """What a cached step uses instead of a stretch of blocks.

    Attributes:
        name: unique name. node: the value x_b that the stretch computes.
        base: the value x_a that it updates; "" keeps x_b itself.
        image: whose tokens are updated, where x_a lacks tokens of x_b (text joined later); of
            those, x_b itself is kept.
        modules: paths of the stretch. shape: of x_b, the batch first. order: of the extrapolation.
    """

    name: str
    node: str
    base: str
    image: Segment | None
    modules: tuple[str, ...]
    shape: tuple[int, ...]
    order: int

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the kept tensors, the newest first."""
        return tuple(f"update_{self.name}_{age}" for age in range(self.order + 1))


@dataclass(frozen=True)
class CachePlan:
    """What is kept over steps.

    Attributes:
        updates: in graph order. clock: the input that is the timestep; "" if nothing extrapolates.
        batch: rows of the batch. segments: names of the merged segments that a cached step has.
        fitted: weights of the kept tensors by timestep; () extrapolates.
    """

    updates: tuple[KeptUpdate, ...]
    clock: str
    batch: int
    segments: tuple[str, ...]
    fitted: Fitted = ()

    @property
    def times(self) -> tuple[str, ...]:
        """Names of the timesteps that are kept, the newest first."""
        most = max(update.order for update in self.updates)
        return tuple(f"update_time_{age}" for age in range(most + 1)) if self.clock else ()

    @property
    def series(self) -> tuple[tuple[str, ...], ...]:
        """All kept tensors: of each value its newest form and the older ones."""
        return (*(u.tensors for u in self.updates), *([self.times] if self.times else []))


@dataclass(frozen=True)
class SharedText:
    """Text of which each of several processes computes a part (`plan.texts`).

    A process has a part as long as every other's, and behind it the rest that all have: with 3
    processes and 8 tokens the second has tokens 2, 3, 6 and 7.

    Attributes:
        segments: the texts. rank: this process.
        inner: nodes whose value holds the own part alone. readers: these, and what takes an image
            or keys out of their values. entries: values with all of the text that readers read.
        whole: values of `inner` that others read, with all of the text.
        sites: attention whose keys hold parts of it.
    """

    segments: tuple[Segment, ...]
    rank: Rank
    inner: tuple[str, ...]
    readers: tuple[str, ...]
    entries: tuple[str, ...]
    whole: tuple[str, ...]
    sites: tuple[str, ...]

    @cached_property
    def lengths(self) -> Mapping[str, int]:
        """Tokens of each text that a process has."""
        count = self.rank.count
        return {s.name: s.length // count + s.length % count for s in self.segments}

    @cached_property
    def _readers(self) -> frozenset[str]:
        return frozenset(self.readers)

    def lengths_at(self, name: str) -> Mapping[str, int]:
        """Tokens of each text that a node works on where they are not all."""
        return self.lengths if name in self._readers else {}


@dataclass(frozen=True)
class Rejection:
    """An attention or branch left alone, and why.

    Attributes:
        node: attention, or output of the branch. module: module path. kind: of the attention or
            the branch. reason: for people. refusal: of the node that is to blame, if one is.
    """

    node: str
    module: str
    kind: str
    reason: str
    refusal: Rejected | None = None

    @property
    def cause(self) -> str:
        """The node that is to blame; "" if none is."""
        return self.refusal.node if self.refusal else ""


@dataclass(frozen=True)
class MergePlan:
    """What the rewrite will do. Plain data: printable, comparable, JSON-able.

    Attributes:
        segments, groups: what merges. rejections: what does not. config: what was asked for.
        cache: what is kept over steps; the same in all phases.
        later: plans of the phases after the first.
        text: of which this process computes a part, if processes share the tokens.
    """

    segments: tuple[MergeSegment, ...]
    groups: tuple[PatternGroup, ...]
    rejections: tuple[Rejection, ...]
    config: MethodConfig
    cache: CachePlan | None = None
    later: tuple[MergePlan, ...] = ()
    text: SharedText | None = None

    def text_lengths(self, name: str) -> Mapping[str, int]:
        """Tokens of each text in the value of a node, where this process has not all."""
        return self.text.lengths_at(name) if self.text and self.segments else {}

    @property
    def phases(self) -> tuple[MergePlan, ...]:
        """The plans of all phases, this one first."""
        return (self, *self.later)

    @property
    def merges(self) -> bool:
        """Whether anything merges in any phase."""
        return any(plan.segments for plan in self.phases)

    @property
    def all_groups(self) -> tuple[PatternGroup, ...]:
        """Pattern groups of all phases."""
        return tuple(group for plan in self.phases for group in plan.groups)

    @property
    def computed(self) -> MergePlan:
        """What still merges where kept updates are used."""
        if self.cache is None:
            return self
        segments = tuple(s for s in self.segments if s.name in self.cache.segments)
        used = {s.group for s in segments}
        groups = tuple(g for g in self.groups if g.name in used)
        return dataclasses.replace(self, segments=segments, groups=groups)

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the kept tensors that every step which computes gives for the next selection."""
        return tuple(group.signal for group in self.groups if group.output)

    @property
    def new_updates(self) -> tuple[str, ...]:
        """Names of the kept tensors that a step which computes gives anew, patterns apart."""
        return tuple(series[0] for series in self.cache.series) if self.cache else ()

    @property
    def all_updates(self) -> tuple[str, ...]:
        """Names of the kept tensors that a step which does not compute uses, patterns apart."""
        return tuple(name for series in self.cache.series for name in series) if self.cache else ()

    @property
    def older(self) -> dict[str, str]:
        """By kept tensor, where its value goes when it is given anew."""
        series = self.cache.series if self.cache else ()
        return {a: b for names in series for a, b in pairwise(names)}

    def group(self, name: str) -> PatternGroup:
        """Pattern group by name, of any phase."""
        return next(g for g in self.all_groups if g.name == name)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values."""
        out = {
            name: [dataclasses.asdict(x) for x in getattr(self, name)]
            for name in ("segments", "groups", "rejections")
        }
        for name in ("segments", "groups"):
            for shown, item in zip(out[name], getattr(self, name), strict=True):
                shown["setting"] = {"method": type(item.setting).__name__, **shown["setting"]}
        cache = None if self.cache is None else dataclasses.asdict(self.cache)
        later = [plan.to_dict() for plan in self.later]
        return {**out, "cache": cache, "config": self.config.to_dict(), "later": later}

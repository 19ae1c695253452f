"""A plan: what merges, what does not, and why. Frozen, JSON-able, free of graph objects."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from toma_fx.analysis.labels import Segment
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.setting import Setting


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
    """Segments that share one pattern, selected on the node `feature`."""

    name: str
    leader: str
    feature: str
    image: Segment
    batch: int
    setting: Setting

    def tensor(self, part: str) -> str:
        """Name of a part of the pattern among the inputs and outputs of programs."""
        return f"pattern_{self.name}_{part}"


@dataclass(frozen=True)
class Rejection:
    """An attention or branch left alone, and why.

    Attributes:
        node: attention, or output of the branch. module: module path. kind: of the attention or
            the branch. reason: for people. cause: node whose refusal it is, if an op is to blame.
    """

    node: str
    module: str
    kind: str
    reason: str
    cause: str = ""


@dataclass(frozen=True)
class MergePlan:
    """What the rewrite will do. Plain data: printable, comparable, JSON-able."""

    segments: tuple[MergeSegment, ...]
    groups: tuple[PatternGroup, ...]
    rejections: tuple[Rejection, ...]
    config: MethodConfig

    def group(self, name: str) -> PatternGroup:
        """Pattern group by name."""
        return next(g for g in self.groups if g.name == name)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-able values."""
        out = {
            name: [dataclasses.asdict(x) for x in getattr(self, name)]
            for name in ("segments", "groups", "rejections")
        }
        for name in ("segments", "groups"):
            for shown, item in zip(out[name], getattr(self, name), strict=True):
                shown["setting"] = {"method": type(item.setting).__name__, **shown["setting"]}
        return {**out, "config": self.config.to_json()}

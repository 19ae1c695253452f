"""Which text each of several processes computes a part of.

    text --> own part --> blocks --> own part --> gathered, where something else reads it
                            |
                  attention: keys and values gathered

Text that attention joins to the image runs through the blocks as the image does, but unmerged. Each
process has one part of it, and the few tokens that can't be dealt out evenly. Unlike the image it
needs no window, so that it is shared from where it enters the model, in whatever scope.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import cached_property

from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.factors import Segment
from toma_fx.analysis.facts import Analysis, Site
from toma_fx.analysis.labels import layouts_of
from toma_fx.graph.nodes import UNKNOWN
from toma_fx.methods.sharded import Rank
from toma_fx.plan.plan import MergePlan, SharedText

_log = logging.getLogger("toma_fx.plan")
_PIECES = {"aten.slice", "getitem"}


def share_text(plan: MergePlan, analysis: Analysis, flow: Flow, rank: Rank) -> SharedText | None:
    """What a process computes of the text; None where it computes all, which is logged.

    Args:
        plan: of one phase, for this process.
    """
    if not plan.segments:
        return None
    texts = list(_joint_texts(analysis, flow, rank.count))
    while texts:
        finder = _Finder(plan, analysis, flow, rank, tuple(texts))
        refused = finder.find_refusal()
        if refused is None:
            return finder.shared()
        text, reason = refused
        _log.info("every process computes all of %s: %s", text, reason)
        texts.remove(text)
    return None


def _joint_texts(analysis: Analysis, flow: Flow, count: int) -> Iterator[Segment]:
    """Text that fused attention joins to an image, a token or more for each process."""
    seen = set[Segment]()
    for site in analysis.sites:
        segments = _key_segments(site, flow)
        if any(s.grid for s in segments):
            for s in segments:
                if not s.grid and s.role != "ids" and count <= s.length < UNKNOWN and s not in seen:
                    seen.add(s)
                    yield s


def _key_segments(site: Site, flow: Flow) -> tuple[Segment, ...]:
    """What the keys of an attention are; nothing where they aren't known to line up."""
    layouts = [flow.layout(name) for name in site.operands[1:3]]
    if len(layouts) < 2 or any(layout is None or len(layout) < 2 for layout in layouts):
        return ()
    keys, values = (layout[-2].tokens for layout in layouts if layout is not None)
    return keys.segments if keys is not None and keys == values else ()


@dataclass(frozen=True)
class _Finder:
    """What holds a part of some texts, on trial."""

    plan: MergePlan
    analysis: Analysis
    flow: Flow
    rank: Rank
    texts: tuple[Segment, ...]

    @cached_property
    def names(self) -> Set[str]:
        """Names of the texts."""
        return {s.name for s in self.texts}

    @cached_property
    def inner(self) -> Set[str]:
        """Nodes whose value holds a part."""
        return frozenset(filter(self._is_inner, self.flow.order))

    def carried(self, name: str) -> set[str]:
        """The texts that a value holds."""
        return {s.name for s in self.flow.segments(name) if s.name in self.names}

    def _is_inner(self, name: str) -> bool:
        """Whether a node makes of a part of the text the same part of what it makes."""
        own, flow = self.carried(name), self.flow
        if not own or name in flow.needs_all_tokens:
            return False
        return own <= {t for o in flow.operands[name] for t in self.carried(o)}

    def shared(self) -> SharedText:
        """The result."""
        flow = self.flow
        readers = [n for n in flow.order if n in self.inner or self._adapts(n)]
        entries = {o for n in readers for o in flow.operands[n] if o not in self.inner}
        return SharedText(
            segments=self.texts,
            rank=self.rank,
            inner=flow.in_order(self.inner),
            readers=tuple(readers),
            entries=flow.in_order(o for o in entries if self.carried(o)),
            whole=flow.in_order(self._whole()),
            sites=tuple(s.node for s in self.analysis.sites if self._gathers(s)),
        )

    def _gathers(self, site: Site) -> bool:
        """Whether the keys of an attention are parts of text, once its inputs are."""
        keys = any(s.name in self.names for s in _key_segments(site, self.flow))
        return keys and (site.node in self.inner or site.operands[1] in self.inner)

    def _adapts(self, name: str) -> bool:
        """Whether a node that holds no text takes what it reads of values with a part of it: the
        image of a joint sequence, or keys."""
        flow, own = self.flow, self.flow.segments(name)
        if any(s.node == name and self._gathers(s) for s in self.analysis.sites):
            return True
        pieces = [o for o in flow.operands[name] if o in self.inner]
        if name in self.inner or flow.ops[name] not in _PIECES or not own or not pieces:
            return False
        return all(s in flow.segments(o) for o in pieces for s in own)

    def _whole(self) -> set[str]:
        """Values that are read with all of the text, by others or by what is kept over steps."""
        flow, cache = self.flow, self.plan.cache
        ends = {n for u in (cache.updates if cache else ()) for n in (u.node, u.base)}
        ends |= {group.output for group in self.plan.groups}
        read = {
            n
            for n in self.inner
            if any(u not in self.inner and not self._adapts(u) for u in flow.users[n])
        }
        return read | (ends & self.inner)

    # -- why not --------------------------------------------------------------------------------

    def find_refusal(self) -> tuple[Segment, str] | None:
        """A text that can't be shared, and the reason."""
        found = next(self._refusals(), None)
        if found is None:
            return None
        names, reason = found
        return next(s for s in self.texts if s.name in names), reason

    def _refusals(self) -> Iterator[tuple[set[str], str]]:
        flow, inner = self.flow, self.inner
        shared = self.shared()
        for name in (*inner, *shared.entries):
            layouts = [layout for layout in layouts_of(flow.facts.get(name)) if layout]
            keys = (label.keys.tokens for layout in layouts for label in layout if label.keys)
            summed = {s.name for tokens in keys for s in tokens.segments} & self.names
            if summed or name in flow.sums_of_tokens:
                yield summed or self.carried(name), f"{name} sums over it"
        for site in self.analysis.sites:
            fused = {s.name for s in _key_segments(site, flow)}
            read = {t for o in site.operands[1:] if o in inner for t in self.carried(o)}
            if not read <= fused:
                yield read, f"{site.node} has its keys laid out in another way"
        for name in (*shared.whole, *shared.entries):
            if flow.layout(name) is None:
                yield self.carried(name), f"{name} is no tensor of known layout"
        for segment in self.plan.segments:
            merged = set(segment.inner) - {segment.exit}
            outside = {n for n in merged if self.carried(n)} - inner
            for name in (*outside, *merged.intersection(shared.whole)):
                yield self.carried(name), f"{name} needs all of it beside merged tokens"

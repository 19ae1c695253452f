"""Plan: from analysis and configuration to a frozen value that says what will be merged where.

A *segment* spans one or more residual adds: tokens merge where they enter it and unmerge where they
leave. A *pattern group* is the set of segments that share one pattern; its leader's entry is what
destinations are selected on. Everything left alone appears among the rejections with its reason.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any, TypeVar

from toma_fx.axis import BATCH, Analysis, Branch, Rejected, Segment, Site, Stream, Tokens
from toma_fx.config import MethodConfig, Place, Setting
from toma_fx.errors import NoMergeSites, UnknownNameError, nearest
from toma_fx.flow import Flow
from toma_fx.methods.windows import size_text
from toma_fx.places import places_of

Merged = TypeVar("Merged", "MergeSegment", "PatternGroup")
NO_RULE = "no transfer rule for"
_SMALLER = {"stack": "block", "block": "sublayer"}


@dataclass(frozen=True)
class MergeSegment:
    """A stretch of a residual stream that runs on merged tokens.

    Attributes:
        name: unique name. stream, image: where it belongs. scope: residual adds it spans.
        branches: indices of its branches in the stream; modules: their paths; kinds: their kinds.
        sites: attention nodes inside.
        entries: values merged on the way in. inner: nodes that run on merged tokens.
        exit: value unmerged on the way out; "" in scope "keys", where nothing is.
        base: stream value x_a of `x_b = x_a + unmerge(x_b' - merge(x_a))`; "" unmerges the update
            of one branch itself.
        additions: adds inside of what comes from outside; it leaves the segment whole.
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
    """An attention or branch left alone, and why."""

    node: str
    module: str
    kind: str
    reason: str


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

    def portable(self) -> MergePlan:
        """The same plan with settings that every exporter knows."""
        return dataclasses.replace(
            self,
            segments=tuple(map(_portable, self.segments)),
            groups=tuple(map(_portable, self.groups)),
        )

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


def _portable(item: Merged) -> Merged:
    return dataclasses.replace(item, setting=item.setting.portable())


def make_plan(analysis: Analysis, flow: Flow, config: MethodConfig) -> MergePlan:
    """Choose segments and pattern groups.

    A ratio of 0 everywhere gives an empty plan: the model runs as captured.

    Raises:
        NoMergeSites: nothing can be merged, with every reason.
        UnknownNameError: a path pattern that matches no module.
        TileError: a window larger than a grid.
    """
    _check_patterns(analysis, config)
    segments: list[MergeSegment] = []
    rejections: list[Rejection] = []
    places = places_of(analysis, flow)
    for stream in analysis.streams:
        for run, setting in _runs(stream, config, places, rejections):
            if config.keys_only:
                segments += _keys_segments(stream, run, setting, analysis, flow, rejections)
            else:
                segments += _segments(stream, run, setting, config.scope, config, flow, rejections)
    segments = _disjoint(segments, rejections)
    groups = _groups(segments, analysis, flow)
    merged_sites = {site for s in segments for site in s.sites}
    rejections.extend(_left_alone(analysis, flow, merged_sites, rejections))
    plan = MergePlan(tuple(segments), groups, tuple(rejections), config)
    if not segments and config.merges:
        raise NoMergeSites(
            "no attention or MLP of this model can be merged with this configuration",
            [f"{r.module or r.node} ({r.kind}): {r.reason}" for r in rejections],
            hint=_no_sites_hint(analysis, config),
        )
    return plan


def _disjoint(segments: list[MergeSegment], rejections: list[Rejection]) -> list[MergeSegment]:
    """The segments that share no node with another of a larger image, or before them."""
    taken: dict[str, MergeSegment] = {}
    dropped: set[str] = set()
    for s in sorted(segments, key=lambda s: -s.image.length):
        other = next((taken[n] for n in s.inner if n in taken), None)
        if other is None:
            taken.update(dict.fromkeys(s.inner, s))
            continue
        dropped.add(s.name)
        if other.image == s.image:
            reason = f"overlaps with {other.modules[0]}"
        else:
            reason = f"two images in one sequence; {other.image} merges"
        rejections.append(Rejection(s.exit or s.sites[0], s.modules[0], "+".join(s.kinds), reason))
    return [s for s in segments if s.name not in dropped]


def _no_sites_hint(analysis: Analysis, config: MethodConfig) -> str:
    tokens = [s.segment.length for s in analysis.streams]
    unruled = [r.reason for r in analysis.refusals.values() if r.reason.startswith(NO_RULE)]
    named = (r for r in unruled if "." in r.removeprefix(NO_RULE).split("(")[0])
    custom = next((r for r in named if not r.startswith(f"{NO_RULE} aten.")), None)
    packed = ", ".join(f"{name} {length}" for name, length in analysis.packed.items())
    if tokens and max(tokens) < config.min_tokens:
        return f"lower min_tokens= (the model has at most {max(tokens)} image tokens here)"
    if custom is not None:
        return f"{custom}; toma_fx.tokenwise(...) declares that it treats every token alike"
    if config.grid is not None and not analysis.rasters:
        grid = f"{size_text(config.grid)} = {math.prod(config.grid)} tokens"
        return f"grid= ({grid}) must fit exactly one packed input ({packed or 'there is none'})"
    if not tokens and packed and not analysis.rasters:
        return f"give grid=(H, W) or (T, H, W) if one of these holds packed image tokens: {packed}"
    return "toma_fx.explain(model, example_inputs) lists every site"


def _check_patterns(analysis: Analysis, config: MethodConfig) -> None:
    paths = {b.module for s in analysis.streams for b in s.branches}
    paths |= {s.module for s in analysis.sites}
    for pattern in config.path_patterns():
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise UnknownNameError(
                f"the module path pattern {pattern!r} matches nothing",
                where="include, exclude or overrides",
                expected="a pattern that matches an attention or MLP of the model",
                got=pattern,
                hint=nearest(pattern, paths),
            )


def _rejection(branch: Branch, reason: str) -> Rejection:
    return Rejection((*branch.sites, branch.out)[0], branch.module, "+".join(branch.kinds), reason)


def _runs(
    stream: Stream,
    config: MethodConfig,
    places: Mapping[tuple[str, int], Place],
    rejections: list[Rejection],
) -> Iterator[tuple[list[int], Setting]]:
    """Consecutive branches with equal settings that the configuration lets merge."""
    run: list[int] = []
    current: Setting | None = None
    for i, branch in enumerate(stream.branches):
        found = _setting(branch, places[stream.name, i], stream.segment.length, config)
        if isinstance(found, str):
            rejections.append(_rejection(branch, found))
        setting = None if isinstance(found, str) else found
        if setting != current and run and current:
            yield run, current
            run = []
        current = setting
        if setting is not None:
            run.append(i)
    if run and current:
        yield run, current


def _setting(branch: Branch, place: Place, tokens: int, config: MethodConfig) -> Setting | str:
    """How a branch merges, or the reason why it does not."""
    own = config.at(branch.module)
    if branch.rejected is not None:
        return f"{branch.rejected.node}: {branch.rejected.reason}"
    if not config.selects(branch.module):
        return "left out by include= or exclude="
    if config.keys_only and "attention" not in branch.kinds:
        return "only keys of self-attention are down-sampled"
    unwanted = [k for k in branch.kinds if k not in config.branches]
    if unwanted and not config.keys_only:
        return f"{' and '.join(unwanted)} not among branches="
    if tokens < own.min_tokens:
        return f"{tokens} tokens, fewer than min_tokens={own.min_tokens}"
    return own.setting(place)


def _segments(
    stream: Stream,
    run: Sequence[int],
    setting: Setting,
    scope: str,
    config: MethodConfig,
    flow: Flow,
    rejections: list[Rejection],
) -> list[MergeSegment]:
    """Cut a run into segments of the scope; one that leaks falls apart, or to a smaller scope."""
    out = []
    if any(not stream.branches[i].add for i in run):
        scope = "sublayer"
    for part in _parts(stream, run, scope):
        form = "block" if scope == "sublayer" and len(part) > 1 else scope
        built = _segment(stream, part, setting, form, config, flow)
        if isinstance(built, MergeSegment):
            out.append(built)
            continue
        around = [list(g) for _, g in groupby(part, lambda i: stream.branches[i].leak is None)]
        smaller = _SMALLER.get(scope, scope)
        if scope == "stack" and len(around) > 1:
            smaller, pieces = scope, around
        elif scope != "sublayer":
            pieces = [part]
        elif len(part) > 1:
            pieces = [[i] for i in part]
        else:
            reason = f"{built.node}: {built.reason}"
            rejections.append(_rejection(stream.branches[part[0]], reason))
            continue
        for piece in pieces:
            out += _segments(stream, piece, setting, smaller, config, flow, rejections)
    return out


def _parts(stream: Stream, run: Sequence[int], scope: str) -> list[list[int]]:
    if scope == "stack":
        return [list(run)]
    if scope == "sublayer":
        return _sublayers(stream, run)
    parts: dict[int, list[int]] = {}
    for i in run:
        parts.setdefault(stream.branches[i].block, []).append(i)
    return list(parts.values())


def _sublayers(stream: Stream, run: Sequence[int]) -> list[list[int]]:
    """Each branch by itself, or with one that uses its values (an IP-Adapter its queries)."""
    parts: list[list[int]] = []
    last = -1
    for i in run:
        leak = stream.branches[i].leak
        users = [j for j in run if j > i and leak and leak.node in stream.branches[j].nodes]
        if i <= last:
            parts[-1].append(i)
        else:
            parts.append([i])
        last = max(last, *users, -1)
    return parts


def _segment(
    stream: Stream,
    part: Sequence[int],
    setting: Setting,
    scope: str,
    config: MethodConfig,
    flow: Flow,
) -> MergeSegment | Rejected:
    branches = [stream.branches[i] for i in part]
    image = stream.segment
    if scope == "sublayer":
        if branches[0].leak is not None:
            return branches[0].leak
        base, exit_, inner = "", branches[0].out, branches[0].nodes
        entries = branches[0].entries
    else:
        # the base is where the segment before it would end, so that neighbours meet in one node
        base = _sink(flow, image.name, stream.values[part[0]])
        exit_ = _sink(flow, image.name, branches[-1].add)
        inner = flow.region(image.name, base, exit_)
        inner = flow.with_readers(image.name, _without_copies(flow, inner, base, exit_), exit_)
        entries = flow.entries(image.name, inner)
        leak = flow.leak(image.name, inner, exit_)
        if leak is not None:
            return leak
        base = next((e for e in entries if flow.root(e) == flow.root(base)), base)
        odd = next((e for e in entries if not flow.is_embedding(e)), None)
        if odd is not None:
            return Rejected(odd, "is not laid out [batch, tokens, channels]")
        if base not in entries or not flow.is_embedding(base) or not flow.is_embedding(exit_):
            return Rejected(
                base, "the stream does not enter the segment as [batch, tokens, channels]"
            )
    key = {"stream": stream.name, "block": f"{stream.name}/block{branches[0].block}"}
    group = key.get(config.share, f"{stream.name}/{branches[0].out}")
    return MergeSegment(
        name=f"{stream.name}/{scope}{part[0]}",
        stream=stream.name,
        image=image,
        scope=scope,
        branches=tuple(part),
        modules=tuple(b.module for b in branches),
        kinds=tuple(sorted({k for b in branches for k in b.kinds})),
        sites=tuple(site for b in branches for site in b.sites),
        entries=entries,
        inner=inner,
        exit=exit_,
        base=base,
        additions=tuple(n for i, n in stream.additions if part[0] < i <= part[-1]),
        setting=setting,
        group=group,
    )


def _keys_segments(
    stream: Stream,
    run: Sequence[int],
    setting: Setting,
    analysis: Analysis,
    flow: Flow,
    rejections: list[Rejection],
) -> list[MergeSegment]:
    """Segments of the keys and values alone; queries and what follows stay whole."""
    sites = {s.node: s for s in analysis.sites}
    out = []
    for i in run:
        for name in stream.branches[i].sites:
            site = sites[name]
            built = _keys_segment(stream, i, site, setting, flow)
            if isinstance(built, MergeSegment):
                out.append(built)
            else:
                reason = f"{built.node}: {built.reason}"
                rejections.append(Rejection(name, site.module, site.kind, reason))
    return out


def _keys_segment(
    stream: Stream, index: int, site: Site, setting: Setting, flow: Flow
) -> MergeSegment | Rejected:
    """From where keys and values part from the queries to the attention.

    x --> q -----------------> attention        x --> q ------------------------> attention
     \-> k, v linear, norm --/                   \-> merge -> k, v linear, norm --/
    """
    image, branch = stream.segment.name, stream.branches[index]
    if site.kind not in ("self", "joint"):
        return Rejected(site.node, f"its keys are no image tokens ({site.kind} attention)")
    if not site.operands:
        return Rejected(site.node, "attention is written out, not one fused operator")
    if site.masked:
        return Rejected(site.node, "its mask is laid out for all keys")
    query, *keys = site.operands
    inner = flow.side(image, keys, site.node, branch.nodes)
    direct = {k for k in keys if k not in inner}
    entries = tuple(sorted({*flow.entries(image, inner), *direct}, key=flow.position.__getitem__))
    if query in direct:
        return Rejected(site.node, "its keys are its queries")
    whole = next((n for n in inner if n in flow.whole), None)
    if whole is not None:
        return Rejected(whole, flow.whole[whole])
    odd = next((e for e in entries if not flow.has_rows(e)), None)
    if odd is not None:
        return Rejected(odd, "is not laid out with the batch first and one axis of tokens")
    return MergeSegment(
        name=f"{stream.name}/keys/{site.node}",
        stream=stream.name,
        image=stream.segment,
        scope="keys",
        branches=(index,),
        modules=(branch.module,),
        kinds=branch.kinds,
        sites=(site.node,),
        entries=entries,
        inner=inner,
        exit="",
        base="",
        additions=(),
        setting=setting,
        group=stream.name,
    )


def _without_copies(flow: Flow, inner: tuple[str, ...], base: str, end: str) -> tuple[str, ...]:
    """The region without casts of its base that others use too; they merge as the base does."""
    root, inside = flow.root(base), set(inner)
    shared = {
        n
        for n in inner
        if n != end and flow.root(n) == root and not inside.issuperset(flow.users[n])
    }
    return tuple(n for n in inner if n not in shared)


def _sink(flow: Flow, segment: str, exit_: str) -> str:
    """Move the exit of a joint sequence past the slice that keeps only the image."""
    while len(flow.segments(exit_)) > 1:
        onward = [u for u in flow.users[exit_] if flow.carries(u, segment)]
        other = [u for u in flow.users[exit_] if u not in onward]
        blocked = any(u in flow.refusals or flow.ops[u] == "output" for u in other)
        if len(onward) != 1 or flow.passes.get(onward[0]) != exit_ or blocked:
            break
        exit_ = onward[0]
    return exit_


def _groups(
    segments: list[MergeSegment], analysis: Analysis, flow: Flow
) -> tuple[PatternGroup, ...]:
    """Pattern groups; segments whose settings differ never share one. Names them p0, p1, ..."""
    streams = {s.name: s for s in analysis.streams}
    members: dict[tuple[str, Setting], list[int]] = {}
    for i, segment in enumerate(segments):
        members.setdefault((segment.group, segment.setting), []).append(i)
    groups = []
    for n, ((_, setting), indices) in enumerate(members.items()):
        name = f"p{n}"
        leader = min((segments[i] for i in indices), key=lambda s: flow.position[s.entries[0]])
        feature = leader.entries[0]
        if setting.feature == "stream":
            feature = _stream_value(leader, streams[leader.stream], flow) or feature
        batch = flow.shapes[feature][0]
        groups.append(PatternGroup(name, leader.name, feature, leader.image, batch, setting))
        for i in indices:
            segments[i] = dataclasses.replace(segments[i], group=name)
    return tuple(groups)


def _stream_value(leader: MergeSegment, stream: Stream, flow: Flow) -> str | None:
    """The value of the stream where the block of a segment begins."""
    block = stream.branches[leader.branches[0]].block
    first = next(i for i, b in enumerate(stream.branches) if b.block == block)
    value = stream.values[first]
    before = flow.position[value] <= flow.position[leader.entries[0]]
    return value if before and flow.is_embedding(value) else None


_SITE_REASONS = {
    "text": "its queries carry no image tokens",
    "temporal": "tokens are its batch; it works on each token alone",
    "unknown": "no image tokens reach it",
}


def _left_alone(
    analysis: Analysis, flow: Flow, merged: set[str], rejections: list[Rejection]
) -> list[Rejection]:
    """Attention that is in no segment and has no reason yet."""
    known = merged | {r.node for r in rejections}
    branches = {site: b for s in analysis.streams for b in s.branches for site in b.sites}
    out = []
    for site in analysis.sites:
        if site.node in known:
            continue
        if site.node in branches:
            reason = f"left alone with {branches[site.node].sites[0]} of the same branch"
        else:
            reason = _SITE_REASONS.get(site.kind, "not part of a residual branch")
            if site.segment and _tokens_first(flow, site.segment):
                reason += " laid out [batch, tokens, channels]: the tokens come first"
            refusal = _nearest_refusal(flow, site.node, back=site.kind == "unknown")
            reason += f"; {refusal.node}: {refusal.reason}" if refusal else ""
        out.append(Rejection(site.node, site.module, site.kind, reason))
    told = [r.reason for r in (*rejections, *out)]
    lost = ((r, r.reason.partition(" ")[0]) for r in _lost_updates(flow))
    return out + [r for r, node in lost if not any(node in reason for reason in told)]


def _tokens_first(flow: Flow, segment: str) -> bool:
    """Whether what is added up is laid out [tokens, batch, channels]."""
    layouts = (flow.layout(n) for n in flow.carriers(segment) if n in flow.sums)
    return any(x is not None and x[1:2] == (BATCH,) and isinstance(x[0], Tokens) for x in layouts)


def _lost_updates(flow: Flow) -> list[Rejection]:
    """Updates of image tokens that an op without a rule is part of."""
    lost: dict[str, Rejected] = {}
    out = []
    for name in flow.order:
        operands = flow.operands[name]
        if name in flow.refusals:
            if any(s.grid for o in operands for s in flow.segments(o)):
                lost[name] = flow.refusals[name]
        elif not flow.segments(name):
            if found := next((lost[o] for o in operands if o in lost), None):
                lost[name] = found
        elif name in flow.sums and flow.is_embedding(name):
            for update in (o for o in operands if o in lost):
                reason = f"{lost[update].node}: {lost[update].reason}"
                out.append(Rejection(update, flow.modules[update], "other", reason))
    return out


def _nearest_refusal(flow: Flow, node: str, *, back: bool) -> Rejected | None:
    """The refusal that ended the flow of tokens at, before (`back`) or after an attention."""
    seen, front = {node}, [node]
    while front:
        for name in front:
            if name in flow.refusals:
                return flow.refusals[name]
            if name in flow.whole:
                return Rejected(name, flow.whole[name])
        edges = flow.operands if back else flow.users
        front = [n for f in front for n in edges[f] if n not in seen]
        seen.update(front)
    return None

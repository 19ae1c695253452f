"""Segments of residual streams that run on merged tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.facts import Analysis, Rejected, Site, Stream
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.setting import Setting
from toma_fx.plan.plan import MergeSegment, Rejection
from toma_fx.plan.reasons import _rejection

_SMALLER = {"stack": "block", "block": "sublayer"}


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
        # the base is where the segment before it would end, so that neighbors meet in one node
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

"""Segments of residual streams that run on merged tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.facts import Branch, Rejected, Site, Stream
from toma_fx.methods.setting import Setting
from toma_fx.plan.plan import MergeSegment, Rejection
from toma_fx.plan.reasons import reject_branch, reject_site

_SMALLER = {"stack": "block", "block": "sublayer"}
Found = tuple[list[MergeSegment], list[Rejection]]
"""Segments, and what can't be one with its reason."""


@dataclass(frozen=True)
class Run:
    """Consecutive branches of a stream that merge alike.

    Attributes:
        branches: their indices. share: which segments share a pattern ("stream", "block", or none).
    """

    stream: Stream
    branches: Sequence[int]
    setting: Setting
    share: str


def split_run(run: Run, scope: str, flow: Flow) -> Found:
    """Cut a run into segments of the scope; one that leaks is cut again, or to a smaller scope."""
    branches, segments, rejections = run.stream.branches, list[MergeSegment](), list[Rejection]()
    if any(not branches[i].add for i in run.branches):
        scope = "sublayer"
    for part in _split_indices(run.stream, run.branches, scope):
        form = "block" if scope == "sublayer" and len(part) > 1 else scope
        segment = _make_segment(run, part, form, flow)
        if isinstance(segment, MergeSegment):
            segments.append(segment)
            continue
        around = [list(g) for _, g in groupby(part, lambda i: _is_free(branches[i]))]
        smaller = _SMALLER.get(scope, scope)
        if scope == "stack" and len(around) > 1:
            smaller, pieces = scope, around
        elif scope != "sublayer":
            pieces = [part]
        elif len(part) > 1:
            pieces = [[i] for i in part]
        else:
            rejections.append(reject_branch(branches[part[0]], segment))
            continue
        for piece in pieces:
            more, refused = split_run(replace(run, branches=piece), smaller, flow)
            segments += more
            rejections += refused
    return segments, rejections


def _is_free(branch: Branch) -> bool:
    """Whether a branch can merge with others in one segment."""
    return branch.leak is None and branch.alone is None


def _split_indices(stream: Stream, run: Sequence[int], scope: str) -> list[list[int]]:
    if scope == "stack":
        return [list(run)]
    if scope == "sublayer":
        return _split_sublayers(stream, run)
    parts: dict[int, list[int]] = {}
    for i in run:
        parts.setdefault(stream.branches[i].block, []).append(i)
    return list(parts.values())


def _split_sublayers(stream: Stream, run: Sequence[int]) -> list[list[int]]:
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


def _make_segment(run: Run, part: Sequence[int], scope: str, flow: Flow) -> MergeSegment | Rejected:
    stream, image = run.stream, run.stream.segment
    branches = [stream.branches[i] for i in part]
    if scope == "sublayer":
        if branches[0].leak is not None:
            return branches[0].leak
        base, exit_, inner = "", branches[0].out, branches[0].nodes
        entries = branches[0].entries
    elif alone := next((b.alone for b in branches if b.alone), None):
        return alone
    else:
        # the base is where the segment before it would end, so that neighbors share one node
        base = move_past_slice(flow, image.name, stream.values[part[0]])
        exit_ = move_past_slice(flow, image.name, branches[-1].add)
        inner = flow.region(image.name, base, exit_)
        inner = _drop_shared_casts(flow, inner, base, exit_)
        outside = next((n for b in branches for n in b.nodes if n not in inner), None)
        if outside is not None:
            return flow.reject(outside, "the branch starts before the segment does", "use")
        inner = flow.include_readers(image.name, inner, exit_)
        entries = flow.entries(image.name, inner)
        leak = flow.find_leak(image.name, inner, exit_)
        if leak is not None:
            return leak
        base = next((e for e in entries if flow.root(e) == flow.root(base)), base)
        odd = next((e for e in entries if not flow.is_embedding(e)), None)
        if odd is not None:
            return flow.reject(odd, "is not laid out [batch, tokens, channels]", "layout")
        if base not in entries or not flow.is_embedding(base) or not flow.is_embedding(exit_):
            reason = "the stream does not enter the segment as [batch, tokens, channels]"
            return flow.reject(base, reason, "layout")
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
        additions=tuple(
            n
            for i, n in stream.additions
            if part[0] < i <= part[-1] and not set(inner).issuperset(flow.operands[n])
        ),
        setting=run.setting,
        group=_group_of(run, part[0]),
    )


def _group_of(run: Run, index: int) -> str:
    """The segments that share a pattern with the one that begins at a branch have this name."""
    stream, branch = run.stream.name, run.stream.branches[index]
    key = {"stream": stream, "block": f"{stream}/block{branch.block}"}
    return key.get(run.share, f"{stream}/{branch.out}")


def split_keys(run: Run, sites: Mapping[str, Site], flow: Flow) -> Found:
    """Segments of the keys and values alone; queries and what follows stay unmerged."""
    segments, rejections = list[MergeSegment](), list[Rejection]()
    for i in run.branches:
        for name in run.stream.branches[i].sites:
            segment = _make_keys_segment(run, i, sites[name], flow)
            if isinstance(segment, MergeSegment):
                segments.append(segment)
            else:
                rejections.append(reject_site(sites[name], segment))
    return segments, rejections


def _make_keys_segment(run: Run, index: int, site: Site, flow: Flow) -> MergeSegment | Rejected:
    r"""From where keys and values part from the queries to the attention.

    x --> q -----------------> attention        x --> q ------------------------> attention
     \-> k, v linear, norm --/                   \-> merge -> k, v linear, norm --/
    """
    stream = run.stream
    image, branch = stream.segment.name, stream.branches[index]
    if site.kind not in ("self", "joint"):
        reason = f"its keys are no image tokens under a softmax ({site.kind} attention)"
        return flow.reject(site.node, reason, "content")
    if not site.operands:
        return flow.reject(site.node, "attention is written out, not one fused operator", "content")
    if site.masked:
        return flow.reject(site.node, "its mask is laid out for all keys", "content")
    query, *keys = site.operands
    inner = flow.find_exclusive_inputs(image, keys, site.node, branch.nodes)
    direct = {k for k in keys if k not in inner}
    entries = flow.in_order({*flow.entries(image, inner), *direct})
    if query in direct:
        return flow.reject(site.node, "its keys are its queries", "content")
    partial = next((n for n in inner if n in flow.needs_all_tokens), None)
    if partial is not None:
        return flow.needs_all_tokens[partial]
    odd = next((e for e in entries if not flow.is_batch_of_tokens(e)), None)
    if odd is not None:
        reason = "is not laid out with the batch first and one axis of tokens whose number is known"
        return flow.reject(odd, reason, "layout")
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
        setting=run.setting,
        group=_group_of(run, index),
    )


def _drop_shared_casts(flow: Flow, inner: tuple[str, ...], base: str, end: str) -> tuple[str, ...]:
    """The region without casts of its base that others use too; they merge as the base does."""
    root, inside = flow.root(base), set(inner)
    shared = {
        n
        for n in inner
        if n != end and flow.root(n) == root and not inside.issuperset(flow.users[n])
    }
    return tuple(n for n in inner if n not in shared)


def move_past_slice(flow: Flow, segment: str, exit_: str) -> str:
    """Move the exit of a joint sequence past the slice that keeps only the image."""
    while len(flow.segments(exit_)) > 1:
        onward = [u for u in flow.users[exit_] if flow.carries(u, segment)]
        other = [u for u in flow.users[exit_] if u not in onward]
        blocked = any(u in flow.refusals or flow.ops[u] == "output" for u in other)
        if len(onward) != 1 or flow.aliases.get(onward[0]) != exit_ or blocked:
            break
        exit_ = onward[0]
    return exit_

"""From a plan for one process to that of a process which shares the tokens with others.

Inside of a merged segment each process works on the merged tokens of its own windows, and of text
that attention joins to them on a part (`plan.texts`). All else every process computes in full.
Attention gathers keys and values; nothing else that merges may look from token to token, so nothing
else has to be exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.facts import Analysis, Site
from toma_fx.errors import ParallelError
from toma_fx.graph.nodes import UNKNOWN
from toma_fx.methods.setting import Setting
from toma_fx.methods.sharded import Rank, Sharded
from toma_fx.plan.plan import MergePlan, MergeSegment
from toma_fx.plan.texts import share_text

_WHERE_NEXT = "docs/parallel.md lists what can be shared"


def shard_plan(plan: MergePlan, analysis: Analysis, flow: Flow, rank: Rank) -> MergePlan:
    """The plan of one of several processes; the same in all of them but for whose windows it is.

    Raises:
        ParallelError: something that merges can't be shared, or nothing merges at all.
    """
    if not plan.merges:
        raise ParallelError(
            "there is nothing to share between processes",
            where="parallel",
            expected="tokens that merge, which each process has some windows of",
            got=f"method {plan.config.name!r} merges nothing here",
            hint="a ratio above 0; parallel=None to run without",
        )
    sites = {site.node: site for site in analysis.sites}
    sharded = [_shard_phase(phase, sites, flow, rank) for phase in plan.phases]
    sharded = [replace(p, text=share_text(p, analysis, flow, rank)) for p in sharded]
    return replace(sharded[0], later=tuple(sharded[1:]))


def _shard_phase(plan: MergePlan, sites: Mapping[str, Site], flow: Flow, rank: Rank) -> MergePlan:
    settings = {s.setting: _shard_setting(s, rank) for s in plan.segments}
    for segment in plan.segments:
        _check_attention(segment, sites, flow)
    segments = tuple(replace(s, setting=settings[s.setting]) for s in plan.segments)
    groups = tuple(replace(g, setting=settings[g.setting]) for g in plan.groups)
    return replace(plan, segments=segments, groups=groups)


def _shard_setting(segment: MergeSegment, rank: Rank) -> Setting:
    whole = segment.setting
    if segment.scope == "keys":
        reason = "queries and all else stay whole, so that there is nothing to share"
        raise _refusal(segment, 'scope="keys"', reason, 'scope="stack", "block" or "sublayer"')
    _check_declared(segment, type(whole))
    shared = whole.share(rank.count)
    if isinstance(shared, str):
        hint = (
            f"windows, by tile= or window=, whose number is a multiple of {rank.count}; a method "
            "that works in windows (toma, retom); exclude= or min_tokens= leaves the part whole"
        )
        got = f"{type(whole).__name__} of {whole.describe()}"
        raise _refusal(segment, got, shared, hint)
    return Sharded(whole.grid, whole, *shared, rank)


def _check_declared(segment: MergeSegment, method: type[Setting]) -> None:
    """Raise where a method only inherits how it is shared: what it changes may look at the grid."""
    source = next(base for base in method.__mro__ if "share" in vars(base))
    if source in (method, Setting):
        return
    name = method.__name__
    raise _refusal(
        segment,
        f"{name}, with the share of {source.__name__}",
        f"{name} does not say itself how",
        f"share = {source.__name__}.share in class {name}, if what it makes of a window does not "
        "depend on where that lies in the grid; otherwise a share that returns why not",
    )


def _check_attention(segment: MergeSegment, sites: Mapping[str, Site], flow: Flow) -> None:
    """Raise unless what looks from token to token in a segment is attention whose keys can be
    gathered."""
    for name in _touched(segment, flow):
        operands = sites[name].operands if name in sites else ()
        if any(size >= UNKNOWN for key in operands[1:] for size in flow.shapes[key]):
            reason = "the number of its keys depends on the data"
            hint = "a padded text with a mask"
        elif _has_scores(segment, name, flow) or name in flow.sums_of_tokens:
            reason = "it sums over tokens other than by one fused attention operator"
            hint = "F.scaled_dot_product_attention (AttnProcessor2_0)"
        else:
            continue
        got = f"{name} in {flow.modules[name]}"
        raise _refusal(segment, got, reason, f"{hint}; exclude= leaves the part whole")


def _has_scores(segment: MergeSegment, name: str, flow: Flow) -> bool:
    """Whether a value holds scores of attention for keys of the image."""
    keys = (label.keys.tokens for label in flow.layout(name) or () if label.keys)
    return any(s.name == segment.image.name for tokens in keys for s in tokens.segments)


def _touched(segment: MergeSegment, flow: Flow) -> Iterator[str]:
    """What runs on a segment's merged tokens."""
    inner = dict.fromkeys(segment.inner)
    yield from inner
    readers = (u for n in inner if n != segment.exit for u in flow.users[n])
    yield from (u for u in dict.fromkeys(readers) if u not in inner)


def _refusal(segment: MergeSegment, got: str, reason: str, hint: str) -> ParallelError:
    return ParallelError(
        f"tokens can't be shared between processes: {reason}",
        where=segment.modules[0],
        expected="windows that each process has as many of",
        got=got,
        hint=f"{hint}; {_WHERE_NEXT}",
    )

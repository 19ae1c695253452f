"""Which updates are kept over steps, and what a step that uses them still computes.

    x_a --> blocks --> x_b --> ...        x_a ---------------> x_b' = x_a + u --> ...
                                          u kept: x_b - x_a of the last step that computed

Everything that then has no reader is gone from a cached step. What may be cut is read off the
residual streams, or (`scope="deep"`) off the joins of a UNet's finest level.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.factors import Segment
from toma_fx.analysis.facts import Analysis, Stream
from toma_fx.analysis.streams import find_text_streams
from toma_fx.errors import ConfigError, NoCacheSites
from toma_fx.graph.nodes import CONVOLUTIONS, JOINS
from toma_fx.methods.cache import CacheConfig
from toma_fx.plan.plan import CachePlan, KeptUpdate, MergeSegment, Rejection
from toma_fx.plan.segments import move_past_slice

Runs = Mapping[tuple[str, int], int]
"""Number of the stretch that a branch (stream, index) is cached in."""


def cached_runs(analysis: Analysis, flow: Flow, config: CacheConfig | None) -> Runs:
    """The stretches of branches that are cached as one.

    Merged segments may not reach from one into the next: tokens are unmerged where updates end.
    """
    runs: dict[tuple[str, int], int] = {}
    if config is None or _find_deep(flow, config) is not None:
        return runs
    number = 0
    for stream in analysis.streams:
        for run in _split(stream, config):
            number += 1
            runs.update({(stream.name, i): number for i in run})
    return runs


def plan_cache(
    analysis: Analysis,
    flow: Flow,
    config: CacheConfig,
    segments: Sequence[MergeSegment],
    timestep: str,
) -> tuple[CachePlan, list[Rejection]]:
    """What is kept, and what was left to compute.

    Args:
        segments: that merge. timestep: the input that tells it; "" if none does.

    Raises:
        NoCacheSites: nothing can be cached, with every reason.
        ConfigError: updates are to be extrapolated in a timestep, and there is none.
    """
    deep, rejections = _find_deep(flow, config), list[Rejection]()
    if deep is not None:
        cuts = [deep]
    elif config.scope in ("deep", "shallow"):
        reason = "no skip connection joins what comes up from a coarser grid to the finest one"
        cuts, rejections = [], [Rejection("", "the model", "cache", reason)]
    else:
        cuts, rejections = _cut_streams(analysis, flow, config, segments)
    if not cuts:
        raise NoCacheSites(
            "no block of this model can be cached with this configuration",
            [f"{r.module or r.node}: {r.reason}" for r in rejections],
            hint="toma_fx.explain(model, inputs, toma=False) lists the residual streams; "
            "leave out cache= to go without",
        )
    timed = bool(config.fitted) or any(cut.order for cut in cuts)
    if not timestep and timed:
        raise ConfigError(
            "an update can't be extrapolated without a timestep",
            where="cache.fitted" if config.fitted else "cache.order",
            expected="a model with a timestep among its arguments",
            got=f"order={config.most_order}",
            hint="order=0 holds the updates",
        )
    computed = _find_live(flow, cuts) - {cut.node for cut in cuts}
    updates = tuple(replace(cut, name=f"u{i}") for i, cut in enumerate(cuts))
    kept = tuple(s.name for s in segments if not computed.isdisjoint(s.inner))
    batch = min(u.shape[0] for u in updates)
    plan = CachePlan(updates, timestep if timed else "", batch, kept, config.fitted)
    return plan, rejections


# -- residual streams -----------------------------------------------------------------------------


def _split(stream: Stream, config: CacheConfig) -> Iterable[list[int]]:
    """Indices of consecutive branches that are cached as one."""

    def key(i: int) -> tuple[int, int] | None:
        branch = stream.branches[i]
        if not config.admits(branch.module):
            return None
        options = config.at(branch.module)
        alone = options.scope == "block" or not branch.add
        return options.order, branch.block if alone else -1

    for found, indices in groupby(range(len(stream.branches)), key):
        if found is not None:
            yield list(indices)


@dataclass(frozen=True)
class _Cut:
    """A stretch of a stream with its update, and the nodes inside."""

    update: KeptUpdate
    inner: tuple[str, ...]


def _cut_streams(
    analysis: Analysis, flow: Flow, config: CacheConfig, segments: Sequence[MergeSegment]
) -> tuple[list[KeptUpdate], list[Rejection]]:
    rejections = [
        Rejection(b.out, b.module, "+".join(b.kinds), "left out by cache include= or exclude=")
        for stream in analysis.streams
        for b in stream.branches
        if not config.admits(b.module)
    ]
    cuts = [
        _make_cut(stream, run, flow, config)
        for stream in analysis.streams
        for run in _split(stream, config)
    ]
    # blocks that compute behind cached ones, and some models at their end, read the text that these
    # leave to them
    if rejections or _find_leaking(flow, cuts):
        whole = replace(config, scope="stack", overrides=())
        texts = find_text_streams(flow, analysis.sites)
        cuts += [_make_cut(t, run, flow, config) for t in texts for run in _split(t, whole)]
    # where text and image end in one value, that of the image reaches further back
    by_node = {c.update.node: c for c in reversed(cuts)}
    cuts = sorted(by_node.values(), key=lambda c: _place(flow, c))
    merged = {n: s for s in segments for n in s.inner if n != s.exit}
    refused = {
        c.update.node: Rejection(
            c.update.node, c.update.modules[-1], "cache",
            f"lies inside of {merged[name].modules[0]}, which merges as one",
        )
        for c in cuts
        for name in (c.update.node, c.update.base)
        if name in merged
    }  # fmt: skip
    cuts = [cut for cut in cuts if cut.update.node not in refused]
    refused |= _find_leaking(flow, cuts)
    cuts = [cut for cut in cuts if cut.update.node not in refused]
    live = _find_live(flow, [cut.update for cut in cuts])
    needed = [cut.update for cut in cuts if cut.update.node in live]
    return needed, [*rejections, *refused.values()]


def _place(flow: Flow, cut: _Cut) -> int:
    return flow.position[cut.update.node]


def _make_cut(stream: Stream, run: Sequence[int], flow: Flow, config: CacheConfig) -> _Cut:
    branches, image = [stream.branches[i] for i in run], stream.segment
    order = config.at(branches[0].module).order
    modules = tuple(b.module for b in branches)
    if not branches[-1].add:
        out = branches[-1].out
        update = KeptUpdate("", out, "", image, modules, flow.row_shape(out), order)
        return _Cut(update, branches[-1].nodes)
    base = move_past_slice(flow, image.name, stream.values[run[0]])
    node = move_past_slice(flow, image.name, branches[-1].add)
    inner = flow.region(image.name, base, node)
    if not _may_subtract(flow, base, node, image):
        base = ""
    return _Cut(KeptUpdate("", node, base, image, modules, flow.row_shape(node), order), inner)


def _may_subtract(flow: Flow, base: str, node: str, image: Segment) -> bool:
    """Whether both are [batch, tokens, channels] with all of an image, so that their difference
    tells what was added to it."""
    a, b = flow.row_shape(base), flow.row_shape(node)
    if flow.leads_with_tokens(base) != flow.leads_with_tokens(node):
        return False
    return a == b or (
        flow.is_embedding(base)
        and flow.is_embedding(node)
        and (a[0], a[-1]) == (b[0], b[-1])
        and flow.carries(base, image.name)
        and flow.carries(node, image.name)
    )


def _find_leaking(flow: Flow, cuts: Sequence[_Cut]) -> dict[str, Rejection]:
    """Stretches of which nothing is saved, because others use what is computed inside."""
    live = _find_live(flow, [cut.update for cut in cuts])
    refused = {}
    for cut in cuts:
        heavy = [n for n in cut.inner if _is_heavy(flow, n)]
        if cut.update.node not in live or not heavy or not live.issuperset(heavy):
            continue
        inside = set(cut.inner)
        pairs = ((n, u) for n in cut.inner for u in flow.users[n] if u in live and u not in inside)
        name, user = next((p for p in pairs if p[0] != cut.update.node), (heavy[0], heavy[0]))
        reason = f"{user} uses {name}, so that everything before it has to be computed"
        refused[cut.update.node] = Rejection(
            cut.update.node,
            cut.update.modules[-1],
            "cache",
            reason,
            flow.reject(user, reason, "use"),
        )
    return refused


def _is_heavy(flow: Flow, name: str) -> bool:
    return name in flow.linears or name in flow.attention or flow.ops[name] in CONVOLUTIONS


def _find_live(flow: Flow, cuts: Sequence[KeptUpdate]) -> set[str]:
    """What a cached step computes, the cut values and the inputs included."""
    bases = {cut.node: [cut.base] if cut.base else [] for cut in cuts}
    pending = [name for name in flow.order if flow.ops[name] == "output"]
    live = set(pending)
    while pending:
        name = pending.pop()
        for operand in bases.get(name, flow.operands[name]):
            if operand not in live:
                live.add(operand)
                pending.append(operand)
    return live


# -- the deep part of a UNet ----------------------------------------------------------------------


def _find_deep(flow: Flow, config: CacheConfig) -> KeptUpdate | None:
    """The value that comes up to the finest level, where the first skip connection joins it, or the
    last one; None where there is none, or streams are to be cut."""
    named = config.include or config.exclude or config.overrides
    if config.scope not in ("deep", "shallow", "auto") or named:
        return None
    results = flow.operands[flow.order[-1]]
    shape = flow.shapes.get(results[0], ()) if results else ()
    if len(shape) < 4:
        return None
    finest = {n for n, own in flow.shapes.items() if len(own) >= 4 and own[-2:] == shape[-2:]}
    below = set[str]()  # what comes from a coarser grid
    for name in flow.order:
        own = flow.shapes.get(name, ())
        coarse = flow.ops[name] in CONVOLUTIONS and len(own) >= 4 and own[-2:] < shape[-2:]
        if coarse or not below.isdisjoint(flow.operands[name]):
            below.add(name)
    found: str | None = None
    for name in flow.order:
        operands = [o for o in flow.operands[name] if o in finest]
        deep = [o for o in operands if o in below]
        joins = flow.ops[name] in JOINS or name in flow.sums
        if joins and len(deep) == 1 and len(operands) > 1 and name in finest:
            found = deep[0] if found is None or config.scope == "shallow" else found
    if found is None:
        return None
    modules = (flow.modules[found],)
    return KeptUpdate("", found, "", None, modules, flow.shapes[found], config.order)

"""Plan: from analysis and configuration to a frozen value that says what will be merged where.

A *segment* spans one or more residual adds: tokens merge where they enter it and unmerge where they
leave. A *pattern group* is the set of segments that share one pattern; its leader's entry is what
destinations are selected on. Everything left alone appears among the rejections with its reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import groupby

from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.facts import Analysis, Branch, Rejected, Site, Stream
from toma_fx.errors import ConfigError, NoMergeSites, UnknownNameError, nearest
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.cache import CacheConfig
from toma_fx.methods.setting import Place, Setting
from toma_fx.plan.cached import Runs, cached_runs, plan_cache
from toma_fx.plan.grouping import group_rejections
from toma_fx.plan.key_sizes import refuse_key_sizes, refuse_sums
from toma_fx.plan.places import places_of
from toma_fx.plan.plan import KeptUpdate, MergePlan, MergeSegment, PatternGroup, Rejection
from toma_fx.plan.reasons import hint_no_sites, reject_branch, reject_rest
from toma_fx.plan.segments import Found, Run, split_keys, split_run


def make_plan(
    analysis: Analysis, flow: Flow, config: MethodConfig, timestep: str = ""
) -> MergePlan:
    """Choose segments, pattern groups, and what is kept over steps, for each phase.

    A ratio of 0 everywhere gives no segments: the model runs as captured.

    Args:
        timestep: the input that is the timestep; "" if none is.

    Raises:
        NoMergeSites: nothing can be merged, with every reason; `NoCacheSites`: nothing be cached.
        UnknownNameError: a path pattern that matches no module.
        TileError: a window larger than a grid.
        ConfigError: what phases merge can't be cached alike.
    """
    first, *later = (
        _plan_phase(analysis, flow, stage, timestep, f"phase{i}_p" if i else "p")
        for i, stage in enumerate(config.stages)
    )
    odd = next((plan for plan in later if _updates(plan) != _updates(first)), None)
    if odd is not None:
        raise ConfigError(
            "kept updates would not fit from one phase to the next",
            where="phases",
            expected="phases that merge inside of what is cached: " + _updates_text(first),
            got=_updates_text(odd),
            hint="a smaller scope=, or another cache scope",
        )
    return dataclasses.replace(first, config=config, later=tuple(later))


def _updates(plan: MergePlan) -> tuple[KeptUpdate, ...]:
    return plan.cache.updates if plan.cache else ()


def _updates_text(plan: MergePlan) -> str:
    return ", ".join(f"{u.modules[0]} to {u.modules[-1]}" for u in _updates(plan)) or "nothing"


def _plan_phase(
    analysis: Analysis, flow: Flow, config: MethodConfig, timestep: str, prefix: str
) -> MergePlan:
    """The plan of one phase; `prefix` is that of the names of its pattern groups."""
    _check_patterns(analysis, config)
    segments, rejections = _find_segments(analysis, flow, config)
    segments, overlapping = _drop_overlaps(segments)
    rejections += overlapping
    segments, groups = _group_segments(segments, analysis, flow, prefix)
    merged_sites = {site for s in segments for site in s.sites}
    rejections += reject_rest(analysis, flow, merged_sites, rejections)
    cache, caching = CacheConfig.of(config.cache), None
    if cache is not None:
        caching, left = plan_cache(analysis, flow, cache, segments, timestep)
        rejections += left
    plan = MergePlan(tuple(segments), groups, tuple(rejections), config, caching)
    if not segments and config.merges:
        raise NoMergeSites(
            "no attention or MLP of this model can be merged with this configuration",
            [str(group) for group in group_rejections(rejections)],
            hint=hint_no_sites(analysis, config),
        )
    return plan


def _find_segments(analysis: Analysis, flow: Flow, config: MethodConfig) -> Found:
    places, sites = places_of(analysis, flow), {s.node: s for s in analysis.sites}
    cached = cached_runs(analysis, flow, CacheConfig.of(config.cache))
    segments, rejections = list[MergeSegment](), list[Rejection]()
    for stream in analysis.streams:
        settings, refused = _choose_settings(stream, config, places, sites, flow)
        runs = _split_stream(stream, config, settings, cached)
        rejections += refused
        for run in runs:
            if config.scope == "keys":
                more, refused = split_keys(run, sites, flow)
            else:
                more, refused = split_run(run, config.scope, flow)
            segments += more
            rejections += refused
    return segments, rejections


def _drop_overlaps(segments: list[MergeSegment]) -> Found:
    """The segments that share no node with another of a larger image, or before them."""
    taken: dict[str, MergeSegment] = {}
    dropped: set[str] = set()
    rejections: list[Rejection] = []
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
    return [s for s in segments if s.name not in dropped], rejections


REGULAR = "\\^$+()|"
"""Characters of regular expressions that no module path has."""
_WILDCARDS = "patterns are shell wildcards (blocks.*.attn), no regular expressions"


def _check_patterns(analysis: Analysis, config: MethodConfig) -> None:
    paths = {b.module for s in analysis.streams for b in s.branches}
    paths |= {s.module for s in analysis.sites}
    cache = CacheConfig.of(config.cache)
    for pattern in (*config.path_patterns(), *(cache.path_patterns() if cache else ())):
        if not any(fnmatchcase(path, pattern) for path in paths):
            wildcards = "" if set(pattern).isdisjoint(REGULAR) else "; " + _WILDCARDS
            raise UnknownNameError(
                f"the module path pattern {pattern!r} matches nothing",
                where="include, exclude or overrides",
                expected="a pattern that matches an attention or MLP of the model",
                got=pattern,
                hint=nearest(pattern, paths) + wildcards,
            )


def _choose_settings(
    stream: Stream,
    config: MethodConfig,
    places: Mapping[tuple[str, int], Place],
    sites: Mapping[str, Site],
    flow: Flow,
) -> tuple[list[Setting | None], list[Rejection]]:
    """How each branch merges, and the branches that are left out."""
    settings: list[Setting | None] = []
    rejections: list[Rejection] = []
    for i, branch in enumerate(stream.branches):
        setting = _choose_setting(branch, places[stream.name, i], stream.segment.length, config)
        if isinstance(setting, Setting):
            setting = refuse_sums(branch, setting, flow) or setting
        if config.proportional and isinstance(setting, Setting):
            setting = refuse_key_sizes(branch, setting, sites, flow) or setting
        if not isinstance(setting, Setting):
            rejections.append(reject_branch(branch, setting))
        settings.append(setting if isinstance(setting, Setting) else None)
    return settings, rejections


def _split_stream(
    stream: Stream, config: MethodConfig, settings: Sequence[Setting | None], cached: Runs
) -> list[Run]:
    """Runs of branches with equal settings that are cached together, if at all."""
    runs = []

    def key(i: int) -> tuple[Setting | None, int | None]:
        return settings[i], cached.get((stream.name, i))

    for (common, _), indices in groupby(range(len(settings)), key):
        if common is not None:
            runs.append(Run(stream, tuple(indices), common, config.share))
    return runs


def _choose_setting(
    branch: Branch, place: Place, tokens: int, config: MethodConfig
) -> Setting | str | Rejected:
    """How a branch merges, or the reason why it does not."""
    options = config.at(branch.module)
    if branch.rejected is not None:
        return branch.rejected
    if not config.admits(branch.module):
        return "left out by include= or exclude="
    keys = config.scope == "keys"
    if keys and "attention" not in branch.kinds:
        return "only keys of self-attention merge"
    unwanted = [k for k in branch.kinds if k not in config.branches]
    if unwanted and not keys:
        return f"{' and '.join(unwanted)} not among branches="
    if tokens < options.min_tokens:
        return f"{tokens} tokens, fewer than min_tokens={options.min_tokens}"
    return options.setting(place)


def _group_segments(
    segments: list[MergeSegment], analysis: Analysis, flow: Flow, prefix: str
) -> tuple[list[MergeSegment], tuple[PatternGroup, ...]]:
    """The segments with the names of their pattern groups, and the groups.

    Segments whose settings differ never share one.
    """
    streams = {s.name: s for s in analysis.streams}
    members: dict[tuple[str, Setting], list[int]] = {}
    for i, segment in enumerate(segments):
        members.setdefault((segment.group, segment.setting), []).append(i)
    groups, renamed = [], list(segments)
    for n, ((_, setting), indices) in enumerate(members.items()):
        name = f"{prefix}{n}"
        leader = min((segments[i] for i in indices), key=lambda s: flow.position[s.entries[0]])
        feature = leader.entries[0]
        if setting.feature == "stream":
            feature = _find_stream_value(leader, streams[leader.stream], flow) or feature
        output = ""
        if setting.feature == "output":
            last = max((segments[i] for i in indices), key=lambda s: flow.position[s.inner[-1]])
            output = _find_output(last, streams[last.stream])
        batch, image = flow.row_shape(feature)[0], leader.image
        groups.append(PatternGroup(name, leader.name, feature, image, batch, setting, output))
        for i in indices:
            renamed[i] = dataclasses.replace(segments[i], group=name)
    return renamed, tuple(groups)


def _find_output(segment: MergeSegment, stream: Stream) -> str:
    """The value of the stream behind a segment, all its tokens unmerged."""
    if segment.base:
        return segment.exit
    last = stream.branches[segment.branches[-1]]
    return last.add or last.out


def _find_stream_value(leader: MergeSegment, stream: Stream, flow: Flow) -> str | None:
    """The value of the stream where the block of a segment begins."""
    block = stream.branches[leader.branches[0]].block
    first = next(i for i, b in enumerate(stream.branches) if b.block == block)
    value = stream.values[first]
    before = flow.position[value] <= flow.position[leader.entries[0]]
    return value if before and flow.is_embedding(value) else None

"""`explain` and `summary`: what will merge where, and what ran; values that print as tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from torch import nn

from toma_fx.compat.collectives import is_gather
from toma_fx.graph.flops import find_uncounted, graph_flops
from toma_fx.methods.cached_steps import Length, count_steps
from toma_fx.methods.kinds import REFRESH, kind_in
from toma_fx.methods.sharded import Sharded
from toma_fx.run import report_tables as tables
from toma_fx.run.denoiser import OptimizedDenoiser
from toma_fx.run.findings import CachedRow, Findings, Row
from toma_fx.run.printable import Printable
from toma_fx.run.programs import Specialization
from toma_fx.run.report_page import page_of
from toma_fx.run.report_tables import Tables

STEPS = 30
"""Of a generation that is looked at, where phases differ and a cache does not say how many."""


@dataclass(frozen=True, repr=False)
class Report(Findings, Printable):
    """What `explain` returns; prints as tables of what is alike, converts to JSON."""

    def full(self) -> Printable:
        """Every branch in a line of its own, with its window, pattern and reason; to be printed."""
        return Tables([*tables.all_rows(self), *tables.other_parts(self, every=True)])

    def tree(self) -> Printable:
        """Modules that merge or are left alone, as a tree; to be printed."""
        return Tables([tables.tree_of(self)])

    def to_html(self, title: str = "toma_fx") -> str:
        """A page with a picture of where it merges and what that saves."""
        return page_of(self, title)

    def _renderables(self) -> list[Any]:
        return [*tables.grouped_rows(self), *tables.other_parts(self, every=False)]

    def __repr__(self) -> str:
        return f"<Report: {len(self.rows)} merged branches, {tables.total_text(self)}>"


def make_report(specialization: Specialization) -> Report:
    """Report on a captured and planned model; counts FLOPs of the graphs that would run."""
    plan, schedule = specialization.plan, specialization.schedule
    steps = STEPS if schedule.caching is None else schedule.caching.horizon
    after, cached = _count_steps(specialization, steps)
    selecting = next((kind_in(REFRESH, i) for i, p in enumerate(plan.phases) if p.segments), "")
    patterned = bool(selecting) and plan.config.patterned
    processes, sent = _find_exchanges(specialization)
    return Report(
        rows=tuple(row for i in range(len(plan.phases)) for row in _rows(specialization, i)),
        rejections=plan.rejections,
        flops_before=specialization.flops,
        flops_after=after,
        flops_refresh=specialization.program(selecting).flops if patterned else after,
        cached=_cached_rows(specialization),
        flops_cached=cached,
        steps=0 if schedule.caching is None else steps,
        computed=0 if schedule.caching is None else sum(schedule.caching.flags(steps)),
        phases=tuple(count_steps(p.begin, steps, "phases") for p in schedule.phases),
        uncounted=find_uncounted(specialization.captured.graph_module.graph),
        processes=processes,
        exchanges=len(sent),
        sent_bytes=sum(sent),
    )


def _find_exchanges(specialization: Specialization) -> tuple[int, list[int]]:
    """Processes that share the tokens, and the bytes that one sends in each exchange of a step."""
    settings = (group.setting for group in specialization.plan.all_groups)
    count = next((s.rank.count for s in settings if isinstance(s, Sharded)), 1)
    if count == 1:
        return 1, []
    phase, _ = specialization.schedule.phase_at(0, Length(STEPS))
    kind = phase.renewal(1)
    graph = specialization.program(kind).graph_module.graph
    values = [n.args[0].meta["val"] for n in graph.nodes if is_gather(n.target)]
    return count, [x.numel() * x.element_size() for x in values]


def _count_steps(specialization: Specialization, steps: int) -> tuple[int, int | None]:
    """Mean FLOPs of the steps that compute, selections apart, and of those that don't."""
    schedule = specialization.schedule
    kinds: tuple[list[str], list[str]] = [], []
    for step in range(steps):
        phase, _ = schedule.phase_at(step, Length(steps))
        if schedule.caching is None or schedule.caching.computes(step, Length(steps)):
            kinds[0].append(phase.renewal(1))
        else:
            kinds[1].append(phase.cached)
    counts = {kind: specialization.program(kind).flops for kind in {*kinds[0], *kinds[1]}}
    after, cached = (round(fmean(counts[k] for k in ran)) if ran else None for ran in kinds)
    return after or 0, cached


def _rows(specialization: Specialization, number: int) -> Iterator[Row]:
    """The merged branches of a phase."""
    plan = specialization.plan.phases[number]
    if not plan.segments:
        return
    before = specialization.captured.graph_module.graph
    kind = kind_in(plan.config.stages[0].renewal(1), number)
    after = specialization.program(kind).graph_module.graph
    streams = {s.name: s for s in specialization.analysis.streams}
    for segment in plan.segments:
        for index in segment.branches:
            branch = streams[segment.stream].branches[index]
            names = set(branch.nodes)
            yield Row(
                number,
                (*branch.sites, branch.out)[0],
                branch.module,
                "+".join(branch.kinds),
                segment.scope,
                segment.image.length,
                segment.setting.merged_count,
                segment.setting.grid,
                segment.setting.describe(),
                segment.group,
                graph_flops(before, names),
                graph_flops(after, names),
            )


def _cached_rows(specialization: Specialization) -> tuple[CachedRow, ...]:
    """What is kept over steps."""
    cache = specialization.plan.cache
    nodes = {n.name: n for n in specialization.captured.graph_module.graph.nodes}
    rows = []
    for update in cache.updates if cache else ():
        value = nodes[update.node].meta["val"]
        size = value.numel() * value.element_size() * len(update.tensors)
        kept = "update" if update.base else "value"
        ends = update.modules[0], update.modules[-1]
        rows.append(CachedRow(*ends, kept, update.shape, update.order, size))
    return tuple(rows)


@dataclass(frozen=True)
class LiveGraph:
    """One graph that is kept.

    Attributes:
        inputs: input names with their shapes. segments: merged stretches.
        tokens: (before, after) of each grid that merges. steps: run, by kind of program.
    """

    inputs: dict[str, tuple[int, ...]]
    segments: int
    tokens: tuple[tuple[int, int], ...]
    steps: dict[str, int]


@dataclass(frozen=True, repr=False)
class Summary(Printable):
    """What `summary` returns; prints as a table, converts to JSON.

    Attributes:
        denoiser: class of the model. active: whether it is optimized. compiled: whether its
            programs are compiled by `.compile()`. config: its configuration.
        captures: graphs made so far. live: those kept.
        steps: run since `optimize`, by kind: "refresh", "reweigh", "reuse", "plain" (unmerged),
            "cached" and "cached_plain" (with kept updates), "mixed" and "mixed_plain" (several
            requests in one batch).
        unsure: steps that selected anew because it was not clear which generation, step or pass
            they belong to; `denoiser.generation()` tells it.
    """

    denoiser: str
    active: bool
    compiled: bool
    config: dict[str, Any]
    captures: int
    live: tuple[LiveGraph, ...]
    steps: dict[str, int]
    unsure: int = 0

    def to_json(self) -> str:
        """The summary as JSON text."""
        return json.dumps(asdict(self), indent=2)

    def __repr__(self) -> str:
        state = "optimized" if self.active else "not optimized"
        return f"<Summary: {self.denoiser}, {state}, {sum(self.steps.values())} steps>"

    def _renderables(self) -> list[Any]:
        from rich.box import SIMPLE
        from rich.table import Table
        from rich.text import Text

        if not self.active:
            return [Text(f"{self.denoiser}: not optimized, no token merging and no cache")]
        ran = ", ".join(f"{n} {call}" for call, n in self.steps.items()) or "none yet"
        named = (k for k in ("method", "ratio", "scope", "window") if k in self.config)
        brief = ", ".join(f"{k}={self.config[k]}" for k in named)
        fields = self.config.get("cache")
        cache = ""
        if fields:
            steps = fields["steps_mask"] or f"1 step in {fields['every']} computes"
            cache = f"; cache, {steps}, order={fields['order']}, scope={fields['scope']}"
        unsure = f" ({self.unsure} unsure, selected anew)" if self.unsure else ""
        mode = "compiled" if self.compiled else "eager"
        table = Table(box=SIMPLE)
        for name in ("inputs", "merged segments", "tokens", "steps"):
            table.add_column(name, overflow="fold")
        for live in self.live:
            table.add_row(
                "\n".join(f"{k} {'x'.join(map(str, v))}" for k, v in live.inputs.items()),
                str(live.segments),
                "\n".join(f"{n} -> {m}" for n, m in live.tokens),
                "\n".join(f"{n} {call}" for call, n in live.steps.items()),
            )
        return [
            Text(f"{self.denoiser}: token merging, {brief}{cache}, {mode}"),
            Text(f"steps: {ran}{unsure}; graphs captured: {self.captures}, kept: {len(self.live)}"),
            *([table] if self.live else []),
        ]


def make_summary(model: nn.Module, optimized: OptimizedDenoiser | None) -> Summary:
    """Summary of an optimized denoiser, or of a model that is not optimized."""
    name = model.__class__.__name__
    if optimized is None:
        return Summary(name, False, False, {}, 0, (), {})
    return Summary(
        type(optimized.denoiser).__name__,
        True,
        optimized.compiled,
        optimized.config_toma.to_dict(),
        optimized.cache.captures,
        tuple(_describe_graph(s) for s in optimized.specializations),
        optimized.totals,
        optimized.unsure,
    )


def _describe_graph(specialization: Specialization) -> LiveGraph:
    inputs = {
        i.name: tuple(i.tensor.shape)
        for i in specialization.captured.inputs
        if i.tensor is not None and i.tensor.dim() > 1
    }
    segments = [s for plan in specialization.plan.phases for s in plan.segments]
    tokens = {(s.image.length, s.setting.merged_count) for s in segments}
    return LiveGraph(
        inputs, len(segments), tuple(sorted(tokens, reverse=True)), dict(specialization.counts)
    )

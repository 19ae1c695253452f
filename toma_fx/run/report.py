"""`explain` and `summary`: what will merge where, and what ran; values that print as tables."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from toma_fx.graph.flops import graph_flops
from toma_fx.methods.windows import Size, size_text
from toma_fx.passes.uses import CACHED, CACHED_PLAIN, REFRESH
from toma_fx.plan.plan import Rejection
from toma_fx.run.denoiser import OptimizedDenoiser
from toma_fx.run.printable import Printable
from toma_fx.run.programs import Specialization


@dataclass(frozen=True)
class Row:
    """One merged branch.

    Attributes:
        site: attention node, or the branch's output node. module: module path. kind: what it is.
        scope: residual adds its segment spans. tokens, merged: image tokens before and after.
        grid: in tokens. window: the method's window, cell or factor. group: pattern group.
        flops_before, flops_after: of its nodes.
    """

    site: str
    module: str
    kind: str
    scope: str
    tokens: int
    merged: int
    grid: Size
    window: str
    group: str
    flops_before: int
    flops_after: int


@dataclass(frozen=True)
class CachedRow:
    """One stretch of blocks that a cached step does not compute.

    Attributes:
        first, last: module paths of its first and last part. value: "update" that is added to what
            enters the stretch, or "value" that is kept itself. shape: of that. order: of the
            extrapolation. bytes: of all tensors that are kept for it.
    """

    first: str
    last: str
    value: str
    shape: tuple[int, ...]
    order: int
    bytes: int


@dataclass(frozen=True)
class Report(Printable):
    """What `explain` returns; prints as a table, converts to JSON.

    Attributes:
        rows: merged branches. rejections: attention and branches left alone, with reasons.
        flops_before, flops_after: of the whole model, merging included, in the step after the
            first: one that reuses the pattern, unless the method selects at every step.
        flops_refresh: of a step that selects destinations anew (comparisons not counted).
        cached: what a cached step does not compute. flops_cached: of a cached step; None without
            a cache. steps: of a generation that is looked at. computed: of these, those that
            compute.
    """

    rows: tuple[Row, ...]
    rejections: tuple[Rejection, ...]
    flops_before: int
    flops_after: int
    flops_refresh: int
    cached: tuple[CachedRow, ...] = ()
    flops_cached: int | None = None
    steps: int = 0
    computed: int = 0

    @property
    def ideal_speedup(self) -> float:
        """FLOPs of the model over FLOPs of the step after the first that merges, or, where steps
        are cached, over the mean of all steps."""
        if self.flops_cached is None:
            return self.flops_before / self.flops_after
        left = self.steps - self.computed
        spent = self.computed * self.flops_after + left * self.flops_cached
        return self.steps * self.flops_before / spent

    @property
    def kept_bytes(self) -> int:
        """Memory of the kept updates of one pass."""
        return sum(row.bytes for row in self.cached)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps({**asdict(self), "ideal_speedup": self.ideal_speedup}, indent=2)

    def _renderables(self) -> list[Any]:
        from rich.box import SIMPLE
        from rich.table import Table
        from rich.text import Text

        table = Table(title="merged", title_justify="left", box=SIMPLE)
        table.add_column("module, kind, scope", overflow="fold")
        for name in ("tokens", "grid", "window", "pattern", "MFLOP"):
            table.add_column(name, no_wrap=True)
        for row in self.rows:
            table.add_row(
                f"{row.module}\n  {row.kind}, {row.scope}",
                f"{row.tokens} -> {row.merged}",
                size_text(row.grid),
                row.window,
                row.group,
                f"{row.flops_before / 1e6:.1f} -> {row.flops_after / 1e6:.1f}",
            )
        total = (
            f"whole model {self.flops_before / 1e9:.3f} -> {self.flops_after / 1e9:.3f} GFLOP "
            f"a step, ideal speed-up {self.ideal_speedup:.2f}x"
        )
        parts: list[Any] = [table, Text(total)] if self.rows else [Text(total)]
        if self.flops_cached is not None:
            parts += self._cached_parts()
        if self.rejections:
            reasons = Table(title="left alone", title_justify="left", box=SIMPLE)
            for name in ("module", "kind", "reason"):
                reasons.add_column(name, overflow="fold")
            for r in self.rejections:
                reasons.add_row(r.module or r.node, r.kind, r.reason)
            parts.append(reasons)
        return parts

    def _cached_parts(self) -> list[Any]:
        from rich.box import SIMPLE
        from rich.table import Table
        from rich.text import Text

        table = Table(title="kept over steps", title_justify="left", box=SIMPLE)
        table.add_column("from, to", overflow="fold")
        for name in ("kept", "shape", "order", "MB"):
            table.add_column(name, no_wrap=True)
        for row in self.cached:
            table.add_row(
                row.first if row.first == row.last else f"{row.first}\n  {row.last}",
                row.value,
                "x".join(map(str, row.shape)),
                str(row.order),
                f"{row.bytes / 1e6:.1f}",
            )
        share = (self.flops_cached or 0) / self.flops_before
        text = (
            f"a cached step computes {share:.0%} of the model; {self.computed} of {self.steps} "
            f"steps compute; {self.kept_bytes / 1e6:.1f} MB are kept for each pass"
        )
        return [table, Text(text)]


def make_report(specialization: Specialization) -> Report:
    """Report on a captured and planned model; counts FLOPs of the graphs that would run."""
    before = specialization.captured.graph_module.graph
    plan = specialization.plan
    if not plan.segments:
        total = graph_flops(before)
        report = Report((), plan.rejections, total, total, total)
        return _with_cache(report, specialization)
    after = specialization.program(plan.config.renewal(1)).graph_module.graph
    streams = {s.name: s for s in specialization.analysis.streams}
    rows = []
    for segment in plan.segments:
        for index in segment.branches:
            branch = streams[segment.stream].branches[index]
            names = set(branch.nodes)
            rows.append(
                Row(
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
            )
    refresh = after
    if plan.config.patterned:
        refresh = specialization.program(REFRESH.name).graph_module.graph
    report = Report(
        tuple(rows), plan.rejections, graph_flops(before), graph_flops(after), graph_flops(refresh)
    )
    return _with_cache(report, specialization)


def _with_cache(report: Report, specialization: Specialization) -> Report:
    """The report with what is kept over steps."""
    plan, caching = specialization.plan, specialization.plan.config.caching
    if plan.cache is None or caching is None:
        return report
    nodes = {n.name: n for n in specialization.captured.graph_module.graph.nodes}
    rows = []
    for update in plan.cache.updates:
        value = nodes[update.node].meta["val"]
        size = value.numel() * value.element_size() * len(update.tensors)
        kept = "update" if update.base else "value"
        ends = update.modules[0], update.modules[-1]
        rows.append(CachedRow(*ends, kept, update.shape, update.order, size))
    use = CACHED if plan.segments else CACHED_PLAIN
    flops = graph_flops(specialization.program(use.name).graph_module.graph)
    steps = caching.horizon
    return replace(
        report,
        cached=tuple(rows),
        flops_cached=flops,
        steps=steps,
        computed=sum(caching.flags(steps)),
    )


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


@dataclass(frozen=True)
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
        optimized.config_toma.to_json(),
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
    segments = specialization.plan.segments
    tokens = {(s.image.length, s.setting.merged_count) for s in segments}
    return LiveGraph(
        inputs, len(segments), tuple(sorted(tokens, reverse=True)), dict(specialization.counts)
    )

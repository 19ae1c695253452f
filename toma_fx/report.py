"""`explain`: what will merge where, as a value that prints as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from toma_fx.flops import graph_flops
from toma_fx.plan import Rejection
from toma_fx.runtime import Specialization


@dataclass(frozen=True)
class Row:
    """One merged branch.

    Attributes:
        site: attention node, or the branch's output node. module: module path. kind: what it is.
        scope: residual adds its segment spans. tokens, merged: image tokens before and after.
        grid, tile: in tokens. group: pattern group. flops_before, flops_after: of its nodes.
    """

    site: str
    module: str
    kind: str
    scope: str
    tokens: int
    merged: int
    grid: tuple[int, int]
    tile: tuple[int, int]
    group: str
    flops_before: int
    flops_after: int


@dataclass(frozen=True)
class Report:
    """What `explain` returns; prints as a table, converts to JSON.

    Attributes:
        rows: merged branches. rejections: attention and branches left alone, with reasons.
        flops_before, flops_after: of the whole model, a reuse step, merging included.
        flops_refresh: of a step that selects destinations anew (comparisons not counted).
    """

    rows: tuple[Row, ...]
    rejections: tuple[Rejection, ...]
    flops_before: int
    flops_after: int
    flops_refresh: int

    @property
    def ideal_speedup(self) -> float:
        """FLOPs of the model over FLOPs of a reuse step."""
        return self.flops_before / self.flops_after

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps({**asdict(self), "ideal_speedup": self.ideal_speedup}, indent=2)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(*self._parts())

    def __str__(self) -> str:
        out = StringIO()
        Console(file=out, width=140, color_system=None).print(self)
        return out.getvalue()

    def _parts(self) -> list[Any]:
        table = Table(title="merged", title_justify="left", box=SIMPLE)
        table.add_column("module, kind, scope", overflow="fold")
        for name in ("tokens", "grid", "tile", "pattern", "MFLOP"):
            table.add_column(name, no_wrap=True)
        for row in self.rows:
            table.add_row(
                f"{row.module}\n  {row.kind}, {row.scope}",
                f"{row.tokens} -> {row.merged}",
                f"{row.grid[0]}x{row.grid[1]}",
                f"{row.tile[0]}x{row.tile[1]}",
                row.group,
                f"{row.flops_before / 1e6:.1f} -> {row.flops_after / 1e6:.1f}",
            )
        total = (
            f"whole model {self.flops_before / 1e9:.3f} -> {self.flops_after / 1e9:.3f} GFLOP "
            f"a step, ideal speed-up {self.ideal_speedup:.2f}x"
        )
        parts: list[Any] = [table, Text(total)]
        if self.rejections:
            left = Table(title="left alone", title_justify="left", box=SIMPLE)
            for name in ("module", "kind", "reason"):
                left.add_column(name, overflow="fold")
            for rejection in self.rejections:
                left.add_row(rejection.module or rejection.node, rejection.kind, rejection.reason)
            parts.append(left)
        return parts


def make_report(specialization: Specialization) -> Report:
    """Report on a captured and planned model; counts FLOPs of the graphs that would run."""
    before = specialization.captured.graph_module.graph
    plan = specialization.plan
    if not plan.segments:
        total = graph_flops(before)
        return Report((), plan.rejections, total, total, total)
    after = specialization.graph_module("reuse").graph
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
                    segment.setting.merged,
                    segment.setting.grid,
                    segment.setting.tile,
                    segment.group,
                    graph_flops(before, names),
                    graph_flops(after, names),
                )
            )
    refresh = specialization.graph_module("refresh").graph
    return Report(
        tuple(rows), plan.rejections, graph_flops(before), graph_flops(after), graph_flops(refresh)
    )

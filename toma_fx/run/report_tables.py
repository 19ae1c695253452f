"""The tables of a report: equal branches in one line, every branch in its own, or as a tree.

transformer_blocks.*.attn   19x   64x64: 4096 -> 2048   ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toma_fx.methods.windows import size_text
from toma_fx.plan.grouping import group_rejections, leaf_of, pattern_of
from toma_fx.plan.plan import Rejection
from toma_fx.run.findings import Findings, Row
from toma_fx.run.printable import Printable


@dataclass(frozen=True, repr=False)
class Tables(Printable):
    """What prints as tables below each other."""

    parts: Sequence[Any]

    def _renderables(self) -> list[Any]:
        return list(self.parts)


# -- what merges ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merged:
    """Merged branches that are alike.

    Attributes:
        rows: they. cells: what a table shows: where, how many, tokens, GFLOP, share of the saving.
    """

    rows: Sequence[Row]
    cells: tuple[str, ...]


def group_rows(report: Findings) -> list[Merged]:
    """Merged branches, those that are alike together."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in report.rows:
        alike = (row.phase, leaf_of(row.module), row.kind, row.scope)
        groups.setdefault((*alike, row.tokens, row.merged, row.grid, row.window), []).append(row)
    saved = sum(row.flops_before - row.flops_after for row in report.rows) or 1
    merged = []
    for rows in groups.values():
        first = rows[0]
        before, after = sum(r.flops_before for r in rows), sum(r.flops_after for r in rows)
        cells = (
            pattern_of([row.module for row in rows]) + _since(report, first),
            f"{len(rows)}x",
            f"{size_text(first.grid)}: {first.tokens} -> {first.merged}",
            f"{shown(before / 1e9)} -> {shown(after / 1e9)}",
            f"{(before - after) / saved:.0%}",
        )
        merged.append(Merged(rows, cells))
    return merged


def shown(number: float) -> str:
    """A number, three digits of it."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def grouped_rows(report: Findings) -> list[Any]:
    """Merged branches that are alike, a line each."""
    from rich.table import Table

    table = Table(title=f"merged: {_common(report.rows)}", title_justify="left", box=None)
    table.add_column("where", overflow="fold")
    for name in ("", "tokens", "GFLOP", "saves"):
        table.add_column(name, no_wrap=True, justify="right")
    for group in group_rows(report):
        table.add_row(*group.cells)
    return [table] if report.rows else []


def _common(rows: Sequence[Row]) -> str:
    """What all rows share, for a title."""
    named = {
        "scope": {row.scope for row in rows},
        "window": {row.window for row in rows},
    }
    shown = [f"{name} {' or '.join(sorted(values))}" for name, values in named.items()]
    groups = len({(row.phase, row.group) for row in rows})
    return ", ".join([*shown, f"{groups} pattern{'s' if groups > 1 else ''}"])


def _since(report: Findings, row: Row) -> str:
    return f", from step {report.phases[row.phase]}" if row.phase else ""


def all_rows(report: Findings) -> list[Any]:
    """Every merged branch, with its window and pattern."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(title="merged", title_justify="left", box=SIMPLE)
    table.add_column("module, kind, scope", overflow="fold")
    for name in ("tokens", "grid", "window", "pattern", "MFLOP"):
        table.add_column(name, no_wrap=True)
    for row in report.rows:
        table.add_row(
            f"{row.module}\n  {row.kind}, {row.scope}{_since(report, row)}",
            f"{row.tokens} -> {row.merged}",
            size_text(row.grid),
            row.window,
            row.group,
            f"{row.flops_before / 1e6:.1f} -> {row.flops_after / 1e6:.1f}",
        )
    return [table] if report.rows else []


def tree_of(report: Findings) -> Any:
    """The modules that merge or are left alone, as a tree."""
    from rich.text import Text
    from rich.tree import Tree

    root: dict[str, Any] = {}
    for row in report.rows:
        cost = f"{shown(row.flops_before / 1e9)} -> {shown(row.flops_after / 1e9)} GFLOP"
        note = f"{row.kind}{_since(report, row)}: {row.tokens} -> {row.merged} tokens, {cost}"
        _place(root, row.module).append(Text(note, "green"))
    for rejection in report.rejections:
        note = f"{rejection.kind}: left alone, {rejection.reason}"
        _place(root, rejection.module or rejection.node).append(Text(note, "dim"))
    tree = Tree(total_text(report))
    _grow(tree, root)
    return tree


def _place(root: dict[str, Any], path: str) -> list[Any]:
    """The notes of a module path in nested dictionaries."""
    for part in path.split("."):
        root = root.setdefault(part, {})
    notes: list[Any] = root.setdefault("", [])
    return notes


def _grow(tree: Any, children: Mapping[str, Any]) -> None:
    for name, inner in children.items():
        if not name:
            for note in inner:
                tree.add(note)
            continue
        while len(inner) == 1 and "" not in inner:  # nothing but one child
            below, inner = next(iter(inner.items()))
            name = f"{name}.{below}"
        _grow(tree.add(name), inner)


# -- the rest -------------------------------------------------------------------------------------


def total_text(report: Findings) -> str:
    """What the whole model costs before and after."""
    before, after = shown(report.flops_before / 1e9), shown(report.flops_after / 1e9)
    speedup = f"ideal speed-up {report.ideal_speedup:.2f}x"
    text = f"whole model {before} -> {after} GFLOP a step, {speedup}"
    if report.uncounted:
        text += f"; the FLOPs of {', '.join(report.uncounted)} are not counted"
    return text


def other_parts(report: Findings, *, every: bool) -> list[Any]:
    """Totals, what processes send, what is kept, and what is left alone.

    Args:
        every: list each branch that is left alone, with the line of Python that is to blame.
    """
    from rich.text import Text

    parts: list[Any] = [Text(total_text(report))]
    if report.processes > 1:
        shared = (
            f"1 of {report.processes} processes: tokens and FLOPs are its own; in a step it "
            f"sends {report.sent_bytes / 1e6:.2f} MB to each other one, "
            f"in {report.exchanges} exchanges"
        )
        parts.append(Text(shared))
    if report.flops_cached is not None:
        parts += _cached_parts(report)
    if report.rejections:
        rejected = _every_rejection if every else _grouped_rejections
        parts.append(rejected(report.rejections))
        advice = dict.fromkeys(r.refusal.advice for r in report.rejections if r.refusal)
        parts += [Text(f"  {line}") for line in advice]
    return parts


def _grouped_rejections(rejections: Sequence[Rejection]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="left alone", title_justify="left", box=None)
    table.add_column("where", overflow="fold", ratio=2)
    table.add_column("", no_wrap=True, justify="right")
    table.add_column("kind", no_wrap=True)
    table.add_column("reason", overflow="fold", ratio=3)
    for group in group_rejections(rejections):
        table.add_row(group.where, f"{group.count}x", group.kind, Text(group.reason))
    return table


def _every_rejection(rejections: Sequence[Rejection]) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table(title="left alone", title_justify="left", box=SIMPLE)
    for name in ("module", "kind", "reason"):
        table.add_column(name, overflow="fold")
    for r in rejections:
        where = f" [{r.refusal.line}]" if r.refusal and r.refusal.line else ""
        table.add_row(r.module or r.node, r.kind, Text(f"{r.reason}{where}"))
    return table


def _cached_parts(report: Findings) -> list[Any]:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table(title="kept over steps", title_justify="left", box=SIMPLE)
    table.add_column("from, to", overflow="fold")
    for name in ("kept", "shape", "order", "MB"):
        table.add_column(name, no_wrap=True)
    for row in report.cached:
        table.add_row(
            row.first if row.first == row.last else f"{row.first}\n  {row.last}",
            row.value,
            "x".join(map(str, row.shape)),
            str(row.order),
            f"{row.bytes / 1e6:.1f}",
        )
    share = (report.flops_cached or 0) / report.flops_before
    text = (
        f"a cached step computes {share:.0%} of the model; {report.computed} of {report.steps} "
        f"steps compute; {report.kept_bytes / 1e6:.1f} MB are kept for each pass"
    )
    return [table, Text(text)]

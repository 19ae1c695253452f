"""A report as one HTML file: a picture of where it merges and what that saves, and its tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from toma_fx.plan.grouping import LeftAlone, group_rejections
from toma_fx.run.findings import Findings, Row
from toma_fx.run.report_tables import group_rows, shown, total_text

WIDTH, HEIGHT, LEAST = 960, 220, 2
"""Of the picture, and of the narrowest bar, in pixels."""
COLORS = {"attention": "#2a6fbb", "cross": "#2a9d8f", "mlp": "#d98324"}
OTHER = "#7a6fb0"
STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fbfbf9; margin: 0 }
main { max-width: 1000px; margin: 0 auto; padding: 28px 20px 56px }
h1 { font-size: 24px; margin: 0 } h2 { font-size: 18px; margin: 32px 0 8px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: 4px 10px 4px 0; text-align: right; border-bottom: 1px solid #e6e6e2;
  vertical-align: top } th { font-size: 13px; color: #555 }
th:first-child, td:first-child, .words td, .words th { text-align: left }
svg { width: 100%; height: auto; background: #fff; border: 1px solid #e6e6e2 }
text { font: 12px system-ui, sans-serif; fill: #555 } .dim { color: #666 }
"""


def page_of(report: Findings, title: str) -> str:
    """The whole page."""
    return page_around(title, [f"<h1>{escape(title)}</h1>", *body_of(report)])


def body_of(report: Findings) -> list[str]:
    """What a page says of a report."""
    parts = [f'<p class="dim">{escape(total_text(report))}</p>']
    if report.rows:
        parts += ["<h2>Where it merges, and what that costs</h2>", _picture(report.rows)]
        parts += ["<h2>Merged</h2>", _merged(report)]
    if report.rejections:
        parts += ["<h2>Left alone</h2>", _rejected(group_rejections(report.rejections))]
    return parts


def page_around(title: str, parts: Iterable[str]) -> str:
    """A page of parts below each other."""
    name = escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _picture(rows: Sequence[Row]) -> str:
    """Branches in order: height is the cost, pale before and full after; a group has one shade."""
    most = max(row.flops_before for row in rows)
    gap = 1 if len(rows) * (LEAST + 1) <= WIDTH else 0
    bar = max((WIDTH - gap * len(rows)) / len(rows), LEAST)
    wide = round(len(rows) * (bar + gap))
    out = []
    for i, row in enumerate(rows):
        x, color = i * (bar + gap), COLORS.get(row.kind, OTHER)
        note = escape(
            f"{row.module}: {row.kind}, {row.tokens} -> {row.merged} tokens, "
            f"{shown(row.flops_before / 1e9)} -> {shown(row.flops_after / 1e9)} GFLOP"
        )
        for flops, opacity in ((row.flops_before, 0.25), (row.flops_after, 1)):
            high = HEIGHT * flops / most
            out.append(
                f'<rect x="{x:.1f}" y="{HEIGHT - high:.1f}" width="{bar:.1f}" height="{high:.1f}" '
                f'fill="{color}" fill-opacity="{opacity}"><title>{note}</title></rect>'
            )
    out += _legend(rows)
    label = "cost of each merged branch before and after, in order of execution"
    size = f"0 0 {wide} {HEIGHT + 28}"
    return f'<svg viewBox="{size}" role="img" aria-label="{label}">{"".join(out)}</svg>'


def _legend(rows: Sequence[Row]) -> Iterator[str]:
    x, y = 0, HEIGHT + 8
    for kind in dict.fromkeys(row.kind for row in rows):
        color = COLORS.get(kind, OTHER)
        yield f'<rect x="{x}" y="{y}" width="12" height="12" fill="{color}"/>'
        yield f'<text x="{x + 17}" y="{y + 11}">{escape(kind)}</text>'
        x += 40 + 8 * len(kind)
    yield f'<text x="{x}" y="{y + 11}">pale: before, full: after; in order of execution</text>'


def _merged(report: Findings) -> str:
    head = ("where", "", "tokens", "GFLOP", "saves", "scope", "window")
    rows = [
        (*group.cells, group.rows[0].scope, group.rows[0].window) for group in group_rows(report)
    ]
    return table(head, rows)


def _rejected(groups: Sequence[LeftAlone]) -> str:
    rows = [(g.where, f"{g.count}x", g.kind, g.reason) for g in groups]
    return table(("where", "", "kind", "reason"), rows, "words")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> str:
    """A table; the first column to the left, or, in style "words", all."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table class="{style}"><tr>{cells}</tr>{body}</table>'

"""Error against speed as an inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLORS = ("#2f6db3", "#c4562a", "#2f8f5b", "#8a5bb0", "#b08a1e", "#4aa3b5", "#b5476f", "#6b6b6b")
WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 18, 50


@dataclass(frozen=True)
class Point:
    """A configuration.

    Attributes:
        name: of it. x: speed-up. y, low, high: mean score, 10th and 90th percentile.
        color: of it.
    """

    name: str
    x: float
    y: float
    low: float
    high: float
    color: str


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    raw = (high - low) / count or 1.0
    scale = 10 ** math.floor(math.log10(raw))
    step = next(s * scale for s in (1, 2, 2.5, 5, 10) if s * scale >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def scatter(points: Sequence[Point], x_title: str, y_title: str) -> str:
    """Points with bars from the 10th to the 90th percentile."""
    xs = ticks(min(1.0, *(p.x for p in points)), max(1.0, *(p.x for p in points)))
    ys = ticks(min(p.low for p in points), max(p.high for p in points))

    def at_x(x: float) -> float:
        return LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM)

    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_title)} against '
        f'{escape(x_title)}" font-family="system-ui, sans-serif" font-size="12">'
    ]
    for y in ys:
        parts.append(
            f'<line x1="{LEFT}" x2="{right}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}" '
            f'stroke="#e4e4e0"/><text x="{LEFT - 8}" y="{at_y(y) + 4:.1f}" text-anchor="end" '
            f'fill="#666">{y:g}</text>'
        )
    for x in xs:
        parts.append(
            f'<line x1="{at_x(x):.1f}" x2="{at_x(x):.1f}" y1="{TOP}" y2="{bottom}" '
            f'stroke="#e4e4e0"/><text x="{at_x(x):.1f}" y="{bottom + 18}" text-anchor="middle" '
            f'fill="#666">{x:g}&times;</text>'
        )
    parts.append(
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 10}" text-anchor="middle" fill="#333">'
        f'{escape(x_title)}</text><text transform="translate(16 {(TOP + bottom) / 2}) rotate(-90)" '
        f'text-anchor="middle" fill="#333">{escape(y_title)}</text>'
    )
    for p in points:
        x, left = at_x(p.x), at_x(p.x) > (LEFT + right) / 2
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{at_y(p.low):.1f}" y2="{at_y(p.high):.1f}" '
            f'stroke="{p.color}" stroke-width="2" opacity="0.45"/>'
            f'<circle cx="{x:.1f}" cy="{at_y(p.y):.1f}" r="5" fill="{p.color}"/>'
            f'<text x="{x + (-10 if left else 10):.1f}" y="{at_y(p.y) + 4:.1f}" '
            f'text-anchor="{"end" if left else "start"}" fill="{p.color}" font-weight="600">'
            f"{escape(p.name)}</text>"
        )
    return "".join([*parts, "</svg>"])

"""PNG plots of a quality run, by matplotlib where it is installed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toma_fx.measure.chart import COLORS
from toma_fx.measure.results import Quality
from toma_fx.measure.scores import METRICS

_log = logging.getLogger("toma_fx.measure")


def write_plots(
    result: Quality, scores: Mapping[str, Mapping[str, Mapping[int, float]]], folder: Path
) -> list[str]:
    """Write `speed-<metric>.png` and `spread-<metric>.png` for every metric; returns their names.

    Without matplotlib nothing is written, and the log says so.
    """
    try:
        import matplotlib

        matplotlib.use("agg", force=False)
        from matplotlib import pyplot
    except ImportError as error:
        _log.warning("PNG plots are left out (%s): pip install 'toma-fx[metrics]'", error)
        return []
    names = []
    for metric in result.metrics:
        for kind, draw in (("speed", _draw_speed), ("spread", _draw_spread)):
            figure, axis = pyplot.subplots(figsize=(7, 4))
            if draw(axis, result, scores, metric):
                axis.grid(True, alpha=0.25)
                axis.spines[["top", "right"]].set_visible(False)
                figure.tight_layout()
                names.append(f"{kind}-{metric}.png")
                figure.savefig(folder / names[-1], dpi=130)
            pyplot.close(figure)
    return names


def _draw_speed(axis: Any, result: Quality, scores: Any, metric: str) -> bool:
    """Mean score over measured speed-up; bars from the 10th to the 90th percentile."""
    for i, own in enumerate(result.configs):
        if own.speed is None or metric not in own.scores:
            return False
        spread, color = own.scores[metric], COLORS[i % len(COLORS)]
        bars = [[spread.mean - spread.low], [spread.high - spread.mean]]
        bars = [[max(0.0, value) for value in bar] for bar in bars]  # the mean may lie outside
        axis.errorbar(own.speed.speedup, spread.mean, bars, fmt="o", color=color, capsize=3)
        axis.annotate(
            own.name, (own.speed.speedup, spread.mean), (8, 4), textcoords="offset points",
            color=color, fontsize=9,
        )  # fmt: skip
    axis.set_xlabel("measured speed-up of a whole generation")
    axis.set_ylabel(f"{METRICS[metric].title}, mean and 10th to 90th percentile")
    return True


def _draw_spread(axis: Any, result: Quality, scores: Any, metric: str) -> bool:
    """Scores of all pictures, sorted, a line for each configuration."""
    for i, own in enumerate(result.configs):
        if metric not in own.scores:
            return False
        values = [scores[own.name][metric][j] for j in own.scores[metric].order]
        axis.plot(
            range(1, len(values) + 1), values, marker="o", ms=3, label=own.name,
            color=COLORS[i % len(COLORS)],
        )  # fmt: skip
    axis.set_xlabel("pictures, worst first")
    axis.set_ylabel(METRICS[metric].title)
    axis.legend(frameon=False)
    return True

"""What a quality run found: values that print as tables and convert to JSON."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from toma_fx.measure.gates import Gate
from toma_fx.measure.intervals import Interval, paired_interval
from toma_fx.measure.scores import METRICS, metric_of
from toma_fx.measure.work import Times, Work
from toma_fx.run.printable import Printable


@dataclass(frozen=True)
class Spread:
    """Scores of all pictures by one metric.

    Attributes:
        mean, median, deviation: of them; the deviation is that of a sample. low, high: the 10th and
            90th percentile. worst: the worst score. order: indices of the pictures, worst first.
    """

    mean: float
    median: float
    deviation: float
    low: float
    high: float
    worst: float
    order: tuple[int, ...]

    @classmethod
    def of(cls, metric: str, scores: Mapping[int, float]) -> Spread:
        """Of scores by the index of their pictures, at least two."""
        sign = metric_of(metric).sign
        order = sorted(scores, key=lambda i: (sign * scores[i], i))
        values = list(scores.values())
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        return cls(
            statistics.fmean(values),
            statistics.median(values),
            statistics.stdev(values),
            tenths[0],
            tenths[-1],
            scores[order[0]],
            tuple(order),
        )


@dataclass(frozen=True)
class Speed:
    """Whole generations of one batch, measured in turn with the original.

    Attributes:
        original_s, seconds: medians, of the original and of the configuration. speedup: their
            quotient. spread: interquartile range over the median, of the noisier. noisy: whether
            that is too much. compile_s: what the first generation took longer (capture, rewrite,
            compilation; less if a cache of the compiler held it). ideal_speedup: from FLOPs of the
            denoisers. kept_bytes: most that is kept between steps. steps: calls by kind.
    """

    original_s: float
    seconds: float
    speedup: float
    spread: float
    noisy: bool
    compile_s: float
    ideal_speedup: float
    kept_bytes: int
    steps: Mapping[str, int]

    @classmethod
    def of(cls, original: Times, own: Times, work: Work) -> Speed:
        """From times taken in turn."""
        return cls(
            original.median_s,
            own.median_s,
            original.median_s / own.median_s,
            max(original.spread, own.spread),
            original.noisy or own.noisy,
            own.compile_s,
            work.ideal_speedup,
            work.kept_bytes,
            dict(work.steps),
        )

    @property
    def quotient(self) -> float:
        """Share of the ideal speed-up that is measured."""
        return self.speedup / self.ideal_speedup


@dataclass(frozen=True)
class ConfigResult:
    """One configuration.

    Attributes:
        name, config: and its fields. scores: by metric. gains: of metrics that rate pictures by
            themselves, what it has more than the original. speed: None if not measured.
    """

    name: str
    config: Any
    scores: Mapping[str, Spread]
    gains: Mapping[str, Interval]
    speed: Speed | None


@dataclass(frozen=True)
class Comparison:
    """Two configurations by one metric; the interval is of first - second."""

    metric: str
    first: str
    second: str
    interval: Interval

    @property
    def verdict(self) -> str:
        """Which is better, in words."""
        if not self.interval.differs:
            return "no difference can be claimed"
        better = metric_of(self.metric).sign * self.interval.mean > 0
        return f"{self.first if better else self.second} is better"


@dataclass(frozen=True)
class Check:
    """A threshold and whether a configuration meets it; `value` is None if it was not measured."""

    config: str
    condition: str
    value: float | None
    passes: bool


@dataclass(frozen=True)
class Quality(Printable):
    """What `toma_fx.quality` returns; prints as tables, converts to JSON.

    Attributes:
        model: name. pictures: drawn with each configuration. settings: of the run. configs: in the
            order given. original: scores of the original's pictures, by metrics that rate pictures
            by themselves. comparisons: of configurations with each other. checks: thresholds.
            skipped: metrics that were not measured, and why. environment: versions and device.
        folder: of records, pictures and page; "" if none was asked for.
    """

    model: str
    pictures: int
    settings: Mapping[str, Any]
    configs: tuple[ConfigResult, ...]
    original: Mapping[str, Spread]
    comparisons: tuple[Comparison, ...]
    checks: tuple[Check, ...]
    skipped: Mapping[str, str]
    environment: Mapping[str, str]
    folder: str = ""

    @property
    def passes(self) -> bool:
        """Whether every configuration meets every threshold."""
        return all(check.passes for check in self.checks)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What was measured."""
        found = {name for result in self.configs for name in result.scores}
        return tuple(name for name in METRICS if name in found)

    def to_json(self) -> str:
        """All of it as JSON text."""
        return json.dumps({**asdict(self), "passes": self.passes}, indent=2, ensure_ascii=False)

    def _renderables(self) -> list[Any]:
        from rich.box import SIMPLE
        from rich.table import Table
        from rich.text import Text

        title = f"{self.model}: {self.pictures} pictures with each configuration"
        speeds = Table(title=title, title_justify="left", box=SIMPLE)
        speeds.add_column("configuration", overflow="fold")
        for name in ("speed-up", "by FLOPs", "kept", "compile"):
            speeds.add_column(name, justify="right", no_wrap=True)
        table = Table(box=SIMPLE)
        table.add_column("configuration", overflow="fold")
        table.add_column("metric", no_wrap=True)
        for name in ("mean", "deviation", "worst", "gain over the original"):
            table.add_column(name, justify="right")
        for result in self.configs:
            speeds.add_row(result.name, *speed_cells(result.speed))
            for metric, own in result.scores.items():
                gain = result.gains.get(metric)
                numbers = (f"{x:.4g}" for x in (own.mean, own.deviation, own.worst))
                text = interval_text(gain) if gain else ""
                table.add_row(result.name, metric, *numbers, text)
        parts: list[Any] = [speeds, table]
        parts += [Text(f"skipped {name}: {why}") for name, why in self.skipped.items()]
        parts += [
            Text(f"{c.metric}: {c.verdict}, {c.first} - {c.second} = {interval_text(c.interval)}")
            for c in self.comparisons
        ]
        for check in self.checks:
            value = "not measured" if check.value is None else f"{check.value:.4g}"
            word = "pass" if check.passes else "FAIL"
            parts.append(Text(f"{word} {check.config}: {check.condition}, is {value}"))
        return parts


def speed_cells(speed: Speed | None) -> list[str]:
    """Speed-up, ideal, kept memory and compilation as text."""
    if speed is None:
        return ["-"] * 4
    mark = " (noisy)" if speed.noisy else ""
    kept = f"{speed.kept_bytes / 1e6:.1f} MB"
    cells = [f"{speed.speedup:.2f}x{mark}", f"{speed.ideal_speedup:.2f}x", kept]
    return [*cells, f"{speed.compile_s:.1f} s"]


def interval_text(interval: Interval) -> str:
    """An interval as text."""
    return f"{interval.mean:+.4g} [{interval.low:+.4g}, {interval.high:+.4g}]"


Scores = Mapping[str, Mapping[int, float]]
"""By metric and picture."""


def summarize_config(
    name: str, config: Any, scores: Scores, original: Scores, speed: Speed | None
) -> ConfigResult:
    """One configuration from the scores of its pictures."""
    gains = {}
    for metric, own in scores.items():
        if not METRICS[metric].paired and metric in original:
            base = original[metric]
            gains[metric] = paired_interval(list(own.values()), [base[i] for i in own])
    spreads = {metric: Spread.of(metric, own) for metric, own in scores.items()}
    return ConfigResult(name, config, spreads, gains, speed)


def compare_configs(scores: Mapping[str, Scores]) -> tuple[Comparison, ...]:
    """Every two configurations by every metric that both have."""
    found = []
    for a, b in itertools.combinations(scores, 2):
        for metric in (m for m in METRICS if m in scores[a] and m in scores[b]):
            own, other = scores[a][metric], scores[b][metric]
            interval = paired_interval(list(own.values()), [other[i] for i in own])
            found.append(Comparison(metric, a, b, interval))
    return tuple(found)


def check_gates(gates: Sequence[Gate], scores: Mapping[str, Scores]) -> tuple[Check, ...]:
    """Every threshold for every configuration. What was not measured does not pass."""
    checks = []
    for name, own in scores.items():
        for gate in gates:
            values = list(own.get(gate.metric, {}).values())
            value = gate.value(values) if values else None
            passes = value is not None and gate.passes(value)
            checks.append(Check(name, gate.text, value, passes))
    return tuple(checks)

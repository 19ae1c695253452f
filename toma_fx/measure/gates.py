"""Thresholds that decide whether a configuration may be used: `psnr=28`, `ssim:worst=0.9`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from toma_fx.errors import ConfigError, UnknownNameError, nearest
from toma_fx.measure.scores import Metric, metric_of

STATISTICS = ("mean", "median", "worst")
"""Of a metric over all pictures; `worst` is the picture with the worst score."""


@dataclass(frozen=True)
class Gate:
    """A threshold.

    Attributes:
        metric: name. statistic: one of `STATISTICS`. threshold: the least that passes, or the most
            where lower is better.
    """

    metric: str
    threshold: float
    statistic: str = "mean"

    @property
    def text(self) -> str:
        """It as a condition."""
        sign = ">=" if metric_of(self.metric).better == "higher" else "<="
        return f"{self.statistic} {self.metric} {sign} {self.threshold:g}"

    def value(self, scores: Sequence[float]) -> float:
        """What is compared with the threshold."""
        worst = min if metric_of(self.metric).better == "higher" else max
        kinds: Mapping[str, Callable[[Sequence[float]], float]] = {
            "mean": statistics.fmean, "median": statistics.median, "worst": worst
        }  # fmt: skip
        return kinds[self.statistic](scores)

    def passes(self, value: float) -> bool:
        """Whether a value is good enough."""
        metric: Metric = metric_of(self.metric)
        return metric.sign * value >= metric.sign * self.threshold


def parse_gate(text: str) -> Gate:
    """`METRIC=VALUE` (of the mean over the pictures) or `METRIC:STATISTIC=VALUE`.

    Raises:
        UnknownNameError: no such metric or statistic. ConfigError: the value is no number.
    """
    left, _, right = text.partition("=")
    name, _, statistic = left.partition(":")
    metric_of(name)
    if statistic and statistic not in STATISTICS:
        raise UnknownNameError(
            f"unknown statistic {statistic!r}",
            where=f"--require {text}",
            expected=" or ".join(STATISTICS),
            hint=nearest(statistic, STATISTICS),
        )
    try:
        return Gate(name, float(right), statistic or "mean")
    except ValueError as error:
        raise ConfigError(
            "a threshold is no number",
            where=f"--require {text}",
            expected="METRIC=VALUE, as psnr=28",
            got=repr(right),
        ) from error

"""What may be claimed of two configurations that drew the same pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toma_fx.errors import ConfigError

LEAST_PICTURES = 36
"""Below it, no difference is called one."""


@dataclass(frozen=True)
class Interval:
    """Mean of paired differences, and where it lies with the confidence asked for.

    Attributes:
        mean, low, high: of a - b. count: pairs. level: confidence.
    """

    mean: float
    low: float
    high: float
    count: int
    level: float

    @property
    def differs(self) -> bool:
        """Whether the difference may be claimed: the interval excludes 0, over enough pictures."""
        return self.count >= LEAST_PICTURES and not self.low <= 0 <= self.high


def paired_interval(
    a: Sequence[float],
    b: Sequence[float],
    *,
    level: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of the mean of a - b, scores of the same pictures in the same order.

    Pairs are drawn with replacement, `samples` times; the percentiles are widened by
    sqrt(n / (n - 1)), since the bootstrap takes the spread of n values for that of all (Efron and
    Tibshirani, 1993). The same scores give the same interval.

    Raises:
        ConfigError: fewer than two pairs, or not the same number of both.
    """
    import numpy as np

    if len(a) != len(b) or len(a) < 2:
        raise ConfigError(
            "no pairs to compare",
            where="paired_interval",
            expected="two lists of one length, at least 2",
            got=f"{len(a)} and {len(b)} scores",
        )
    if not 0 < level < 1:
        raise ConfigError(
            "level is out of range", where="level", expected="between 0 and 1", got=repr(level)
        )
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    count, mean = len(differences), float(differences.mean())
    random = np.random.default_rng(seed)
    means = np.empty(samples)
    rows = max(1, 1_000_000 // count)  # at a time, for the sake of memory
    for start in range(0, samples, rows):
        size = min(rows, samples - start), count
        means[start : start + size[0]] = differences[random.integers(0, count, size)].mean(1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    widened = (count / (count - 1)) ** 0.5
    return Interval(
        mean, mean + widened * float(low - mean), mean + widened * float(high - mean), count, level
    )

"""What the demo measures: values, and the timer that takes them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PASS = {"psnr": 28.0, "ssim": 0.95}
"""Least PSNR (dB) and SSIM of every picture shown, as serving projects ask in their tests."""
NOISY = 0.25
"""Interquartile range over the median above which times say little."""


@dataclass(frozen=True)
class Cached:
    """Measured result of the preset for one model.

    Attributes:
        preset: name. original_s, cached_s: median time of a whole generation, the host included.
        speedup: original_s / cached_s. cpu_speedup: of processor time. counted: of FLOPs.
        psnr, ssim: of each picture.
        steps: run, by kind. kept_mb: of the tensors that are kept over steps.
    """

    preset: str
    original_s: float
    cached_s: float
    speedup: float
    cpu_speedup: float
    counted: float
    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    steps: dict[str, int]
    kept_mb: float

    @property
    def passes(self) -> bool:
        """Whether every picture is as near as `PASS` asks."""
        return min(self.psnr) >= PASS["psnr"] and min(self.ssim) >= PASS["ssim"]


@dataclass(frozen=True)
class Outcome:
    """Measured result for one model.

    Attributes:
        model: name. original_ms, merged_ms: median time of a step (merged: reuse step).
        refresh_ms: median time of a step that selects destinations. quartiles: of both, in ms.
        cpu_ms: median processor time of a step, by kind. speedup: original_ms / merged_ms.
        cpu_speedup: the same of processor time. ideal: speed-up from FLOPs.
        mse: mean squared error of the pictures in [-1, 1]. psnr: in dB, peak 2.
        psnrs, ssims: of each picture. compiled: whether steps are compiled.
        compile_s: seconds to compile original and merged programs. cached: result of the preset.
    """

    model: str
    original_ms: float
    merged_ms: float
    refresh_ms: float
    quartiles: dict[str, tuple[float, float]]
    cpu_ms: dict[str, float]
    speedup: float
    cpu_speedup: float
    ideal: float
    mse: float
    psnr: float
    psnrs: tuple[float, ...]
    ssims: tuple[float, ...]
    compiled: bool
    compile_s: float
    cached: Cached

    @property
    def is_noisy(self) -> bool:
        """Whether the times of single steps vary so much that their quotient says little."""
        medians = {"original": self.original_ms, "reuse": self.merged_ms}
        ranges = {key: high - low for key, (low, high) in self.quartiles.items()}
        return any(ranges[key] > NOISY * median for key, median in medians.items())


@dataclass
class Timer:
    """Wall-clock and processor times of what runs in turn, in seconds, by name."""

    wall: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)

    def run(self, name: str, function: Callable[[], Any]) -> None:
        """Run and time."""
        start, cpu = time.perf_counter(), time.process_time()
        function()
        self.cpu.setdefault(name, []).append(time.process_time() - cpu)
        self.wall.setdefault(name, []).append(time.perf_counter() - start)

    def medians(self) -> tuple[dict[str, float], dict[str, float]]:
        """(wall-clock, processor)"""
        wall, cpu = (
            {name: statistics.median(values) for name, values in times.items()}
            for times in (self.wall, self.cpu)
        )
        return wall, cpu

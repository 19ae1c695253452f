"""What a generation costs: FLOPs and kept memory counted, seconds measured in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from toma_fx.measure.cases import Case
from toma_fx.measure.subjects import Subject
from toma_fx.run.denoiser import OptimizedDenoiser

NOISY = 0.1
"""Interquartile range over the median above which times are called noisy."""


@dataclass(frozen=True)
class Work:
    """What one generation of a batch is made of, with a configuration.

    Attributes:
        flops_before, flops_after: of all calls of the denoisers, by the original and by the
            configuration; comparisons of a selection are not counted, and where the number of
            merged tokens depends on the data, none counts as merged. steps: calls by kind of
            program. kept_bytes: most that was kept between two steps, of all passes.
    """

    flops_before: int
    flops_after: int
    steps: Mapping[str, int]
    kept_bytes: int

    @property
    def ideal_speedup(self) -> float:
        """Speed-up of the denoisers' part if time went by FLOPs."""
        return self.flops_before / self.flops_after if self.flops_after else 1.0


def count_work(subject: Subject, cases: Sequence[Case], config: Any) -> Work:
    """Draw the cases, which are of one batch, and count."""
    denoisers = list(subject.optimized(config).values())
    before = [(s, dict(s.counts)) for d in denoisers for s in d.specializations]
    with _kept(denoisers) as kept:
        subject.draw(cases, config)
    counts: dict[str, int] = {}
    flops_before = flops_after = 0
    for specialization in (s for d in denoisers for s in d.specializations):
        earlier = next((c for s, c in before if s is specialization), {})
        for kind, count in specialization.counts.items():
            new = count - earlier.get(kind, 0)
            if new:
                counts[kind] = counts.get(kind, 0) + new
                flops_before += new * specialization.flops
                flops_after += new * specialization.program(kind).flops
    return Work(flops_before, flops_after, counts, max(kept))


@contextmanager
def _kept(denoisers: Sequence[OptimizedDenoiser]) -> Iterator[list[int]]:
    """Bytes that are kept after each call inside."""
    sizes = [0]

    def note(*_: Any) -> None:
        tensors = (x for d in denoisers for s in d.states for x in s.buffers.values())
        sizes.append(sum(x.numel() * x.element_size() for x in tensors))

    with ExitStack() as stack:
        for denoiser in denoisers:
            stack.callback(denoiser.register_forward_hook(note).remove)
        yield sizes


@dataclass(frozen=True)
class Times:
    """Seconds of a generation, measured several times.

    Attributes:
        first_s: of the first one, which captures and compiles. seconds: of those that count.
    """

    first_s: float
    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third; of one round twice the same."""
        if len(self.seconds) < 2:
            return self.median_s, self.median_s
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, high = self.quartiles
        return (high - low) / self.median_s

    @property
    def compile_s(self) -> float:
        """What the first one took longer: capturing, rewriting, compiling."""
        return max(0.0, self.first_s - self.median_s)

    @property
    def noisy(self) -> bool:
        """Whether the times scatter so much that small differences mean nothing."""
        return self.spread > NOISY


def time_in_turn(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int = 5,
    device: torch.device | None = None,
    on_run: Callable[[str], None] | None = None,
) -> dict[str, Times]:
    """Time what is run, one after the other, round after round.

    Slow changes of the machine so meet all alike. Every run goes twice beforehand: the first time
    captures and compiles, the second fills caches. The order turns with every round.

    Args:
        runs: by name. rounds: that count. device: waited for, if it is a GPU. on_run: called with a
            name after each run.
    """

    def clocked(name: str) -> float:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        runs[name]()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        if on_run is not None:
            on_run(name)
        return seconds

    names = list(runs)
    first = {name: clocked(name) for name in names}
    for name in names:
        clocked(name)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            seconds[name].append(clocked(name))
    return {name: Times(first[name], tuple(seconds[name])) for name in names}


def time_generations(
    subject: Subject,
    cases: Sequence[Case],
    configs: Mapping[str, Any],
    rounds: int = 5,
    on_run: Callable[[str], None] | None = None,
) -> dict[str, Times]:
    """Time generations of the cases by name of their configuration; None is the original."""
    runs = {name: drawing(subject, cases, config) for name, config in configs.items()}
    return time_in_turn(runs, rounds, subject.device, on_run)


def drawing(subject: Subject, cases: Sequence[Case], config: Any) -> Callable[[], Any]:
    """A generation, to be timed."""
    return lambda: subject.draw(cases, config)

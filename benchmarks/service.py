"""A service of many workers, on paper: what merging, caching and two processes for guidance buy.

    OMP_NUM_THREADS=1 python benchmarks/service.py --out benchmarks/results/service-cpu.json

Measured here: processor time of a generation of an embedded model by rows of its batch, original,
merged, cached and both. Simulated with these times: requests with guidance (two rows) arrive at
random (Poisson); each goes to the worker with the fewest; a worker steps all that it has, up to
`ROOM`, and takes new ones between two steps. "two processes" are pairs of workers that compute one
side of guidance each. Found for each is the highest load at which 99 of 100 pictures are done
within `PATIENCE` times what one original picture takes alone.

Not in it: networks, text encoders and autoencoders, requests of different sizes, loading of models.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import time
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from common import command_line, device_name, publish, versions

import toma_fx
from toma_fx.models import tiny

STEPS, ROWS, ROOM, SIDES = 20, (1, 2, 4, 8), 4, 2
PATIENCE = 2.0
WORKERS = (1, 8, 64, 1024)
LEVERS: dict[str, dict[str, Any] | None] = {
    "original": None,
    "merged": {"ratio": 0.25},
    "cached": {"toma": False, "cache": "balanced"},
    "both": {"ratio": 0.25, "cache": "balanced"},
}
Times = dict[int, float]
"""Seconds of a step, by rows of the batch."""


def measure(name: str, rounds: int) -> dict[str, Times]:
    """Mean step of a generation, of each lever; all take turns."""
    model, table = tiny.load(name), {}
    spent: dict[tuple[str, int], list[float]] = {}
    denoisers = {
        lever: model.denoiser if options is None else toma_fx.optimize(model.denoiser, **options)
        for lever, options in LEVERS.items()
    }
    for _ in range(rounds + 1):  # the first captures
        for lever, denoiser in denoisers.items():
            for rows in ROWS:
                start = time.process_time()
                with told(denoiser):
                    model.generate([0] * rows, steps=STEPS, denoiser=denoiser)
                seconds = (time.process_time() - start) / STEPS
                spent.setdefault((lever, rows), []).append(seconds)
    for lever in LEVERS:
        table[lever] = {rows: statistics.median(spent[lever, rows][1:]) for rows in ROWS}
    return table


def told(denoiser: Any) -> AbstractContextManager[Any]:
    """For calls that are one generation."""
    optimized = hasattr(denoiser, "generation")
    return denoiser.generation(STEPS) if optimized else nullcontext()


def step_seconds(times: Times, rows: int) -> float:
    """Between two measured numbers of rows, what lies between their times."""
    above = min(n for n in times if n >= rows)
    below = max((n for n in times if n <= rows), default=above)
    if above == below:
        return times[above]
    share = (rows - below) / (above - below)
    return times[below] + share * (times[above] - times[below])


def simulate(
    times: Times, workers: int, sides: int, rate: float, pictures: int, seed: int
) -> list[float]:
    """Seconds from arrival to picture.

    Args:
        times: of a step. workers: processes. sides: of guidance in a process: 2, or 1 in pairs.
        rate: pictures that arrive in a second. pictures: how many. seed: of the arrivals.
    """
    draw = random.Random(seed)
    groups = workers * sides // SIDES
    waiting: list[deque[float]] = [deque() for _ in range(groups)]
    running: list[list[tuple[float, int]]] = [[] for _ in range(groups)]
    least = [(0, i) for i in range(groups)]
    load = [0] * groups
    events: list[tuple[float, int]] = [(draw.expovariate(rate), -1)]
    arrived, latencies = 0, []

    def begin(group: int, now: float) -> None:
        """Take what waits, and start a step."""
        while waiting[group] and len(running[group]) < ROOM:
            running[group].append((waiting[group].popleft(), STEPS))
        if running[group]:
            seconds = step_seconds(times, sides * len(running[group]))
            heapq.heappush(events, (now + seconds, group))

    while len(latencies) < pictures:
        now, group = heapq.heappop(events)
        if group >= 0:  # a step is done
            left = [(born, steps - 1) for born, steps in running[group]]
            done = [born for born, steps in left if not steps]
            latencies += [now - born for born in done]
            running[group] = [each for each in left if each[1]]
            load[group] -= len(done)
            if done:
                heapq.heappush(least, (load[group], group))
            begin(group, now)
            continue
        while least[0][0] != load[least[0][1]]:  # out of date
            heapq.heappop(least)
        group = least[0][1]
        waiting[group].append(now)
        load[group] += 1
        heapq.heappush(least, (load[group], group))
        if not running[group]:
            begin(group, now)
        arrived += 1
        heapq.heappush(events, (now + draw.expovariate(rate), -1))
    return latencies[pictures // 5 :]  # when it has settled


def capacity(times: Times, workers: int, sides: int, patience: float) -> dict[str, float]:
    """The highest rate at which 99 of 100 pictures are in time, and what that means."""
    full = workers * sides / SIDES * ROOM / (STEPS * step_seconds(times, sides * ROOM))
    pictures = 2000 + 40 * workers
    low, high, p99 = 0.0, full, 0.0
    for _ in range(9):
        rate = (low + high) / 2
        found = statistics.quantiles(
            simulate(times, workers, sides, rate, pictures, seed=0), n=100
        )[98]
        if found <= patience:
            low, p99 = rate, found
        else:
            high = rate
    seconds = 1000 * workers / low if low else float("inf")
    return {"pictures_per_s": low, "p99_s": p99, "worker_s_per_1000": seconds, "load": low / full}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tiny.NAMES, default="tiny-sdxl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=list(WORKERS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    times = measure(args.model, args.rounds)
    alone = STEPS * step_seconds(times["original"], SIDES)
    rows = []
    for workers in args.workers:
        for lever in LEVERS:
            for sides in (SIDES, 1) if workers > 1 else (SIDES,):
                found = capacity(times[lever], workers, sides, PATIENCE * alone)
                how = "two processes" if sides == 1 else "one process"
                rows.append({"workers": workers, "lever": lever, "guidance": how, **found})
                print(f"{workers} workers, {lever}, {how}: {found}", flush=True)
    about = {"command": command_line(), "device": device_name(), "versions": versions()}
    settings = {"model": args.model, "steps": STEPS, "room": ROOM, "patience": PATIENCE}
    publish({**about, **settings, "step_s": times, "alone_s": alone, "rows": rows}, args.out)


if __name__ == "__main__":
    main()

"""Pictures of many requests on one core: one by one, in static batches, batched continuously.

    OMP_NUM_THREADS=1 python benchmarks/serving.py --out benchmarks/results/serving-cpu.json

Requests come at random times and ask for 10 to 30 steps; all ways of serving get the same ones:

- one by one: a request begins when the one before has ended;
- static: up to four that wait begin together, and the next ones when all of these have ended;
- continuous: up to four, and a waiting one takes the place of one that has ended, as
  `toma_fx.serving.StepBatcher` and `examples/serve` do.

The clock is the processor time of the steps, so that others who use the machine delay nothing:
between steps nothing passes, and where nobody waits it goes on to the next arrival. A latency is
the time from the arrival to the last step, a wait that to the first one. Programs are warmed up
before. The largest difference of a picture (in -1 to 1) to that of the first way is reported too.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import command_line, device_name, publish, versions
from torch import Tensor

from toma_fx.models import tiny

sys.path.append(str(Path(__file__).parents[1] / "examples" / "serve"))
from engine import Engine

METHODS: dict[str, dict[str, Any]] = {
    "neither": {"toma": False},
    "merged": {"toma": True},
    "cached": {"toma": False, "cache": "balanced"},
}
WAYS = ("one by one", "static", "continuous")
BUCKETS = (1, 2, 4)


@dataclass(frozen=True)
class Request:
    """A picture that is asked for at a time, in seconds."""

    arrival: float
    prompt: str
    seed: int
    steps: int


def requests(count: int, gap: float) -> list[Request]:
    """Requests at random times, `gap` seconds apart on average."""
    source, arrival, load = random.Random(0), 0.0, []
    for i in range(count):
        prompt = tiny.CLASSES[i % len(tiny.CLASSES)]
        load.append(Request(arrival, prompt, i, source.randint(10, 30)))
        arrival += source.expovariate(1 / gap)
    return load


def room(way: str, engine: Engine) -> int:
    """Requests that may begin before the next step."""
    if way == "continuous":
        return BUCKETS[-1] - len(engine.pictures)
    return 0 if engine.busy else {"one by one": 1, "static": BUCKETS[-1]}[way]


def serve(engine: Engine, way: str, load: list[Request]) -> tuple[dict[str, Any], list[Tensor]]:
    """Serve the requests; figures, and the pictures in their order."""
    now = busy = 0.0
    waiting, sizes = list(enumerate(load)), []
    waits: list[float] = []
    ends: dict[int, float] = {}
    pictures: dict[int, Tensor] = {}
    while waiting or engine.busy:
        if not engine.busy:
            now = max(now, waiting[0][1].arrival)
        for _ in range(room(way, engine)):
            if waiting and waiting[0][1].arrival <= now:
                i, request = waiting.pop(0)
                waits.append(now - request.arrival)
                engine.add(i, request.prompt, seed=request.seed, steps=request.steps)
        sizes.append(len(engine.pictures))
        start = time.process_time()
        events = engine.step()
        spent = time.process_time() - start
        now, busy = now + spent, busy + spent
        for event in events:
            if event.kind != "done":
                raise RuntimeError("a picture failed") from event.error
            ends[event.picture], pictures[event.picture] = now, event.image
    latencies = [ends[i] - request.arrival for i, request in enumerate(load)]
    figures = {
        "processor_ms_per_request_step": 1000 * busy / sum(r.steps for r in load),
        "median_wait_s": statistics.median(waits),
        "median_latency_s": statistics.median(latencies),
        "worst_latency_s": max(latencies),
        "end_s": now,
        "pictures_of_a_step": statistics.mean(sizes),
        "latencies_s": latencies,
    }
    return figures, [pictures[i] for i in range(len(load))]


def measure(model: str, load: list[Request]) -> dict[str, Any]:
    """All ways of serving, with all methods."""
    results: dict[str, Any] = {}
    for method, options in METHODS.items():
        engine = Engine(model, BUCKETS, **options)
        engine.warmup()
        first: list[Tensor] = []
        results[method] = {}
        for way in WAYS:
            figures, pictures = serve(engine, way, load)
            first = first or pictures
            figures["difference"] = max(
                (a - b).abs().max().item() for a, b in zip(first, pictures, strict=True)
            )
            results[method][way] = figures
            print(f"{method}, {way}: {figures}", file=sys.stderr)
    return results


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Ways of serving many requests.")
    parser.add_argument("--model", choices=tiny.NAMES, default=tiny.NAMES[0])
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--gap", type=float, default=0.5, help="mean seconds between them (0.5)")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    load = requests(arguments.requests, arguments.gap)
    results = {
        "command": command_line(),
        "device": device_name(),
        "versions": versions(),
        "model": arguments.model,
        "buckets": BUCKETS,
        "requests": [vars(request) for request in load],
        "results": measure(arguments.model, load),
    }
    publish(results, arguments.out)


if __name__ == "__main__":
    main()

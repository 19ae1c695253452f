"""Whole generations by a preset against the original, compiled, in AOTInductor and ONNX Runtime.

    OMP_NUM_THREADS=1 python benchmarks/generations.py --out benchmarks/results/generations-cpu.json

20 Euler steps of one picture of an embedded model, all host work included; original and cached in
turn, medians of processor time (and of wall time). *quotient* is the measured speed-up over that of
counted FLOPs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import command_line, device_name, publish, versions

import toma_fx
from toma_fx.methods.cache import CacheConfig
from toma_fx.models import tiny

STEPS = 20
RUNTIMES = ("compile", "onnx", "aoti")


def inputs_of(model: tiny.TinyModel) -> dict[str, Any]:
    """The call that an artifact is built for."""
    tokens, pooled = model.conditioning(torch.tensor([0]))
    images = torch.randn(1, 3, tiny.SIZE, tiny.SIZE)
    return tiny.FLOW.denoiser_inputs(model.name, images, torch.ones(1), tokens, pooled)


def opened(model: tiny.TinyModel, runtime: str, preset: str | None, folder: Path) -> Any:
    """A denoiser in a runtime, by a preset or as it is."""
    if runtime == "compile" and preset is None:
        return torch.compile(model.denoiser, dynamic=False)
    options: dict[str, Any] = {"toma": preset} if preset else {"toma": False}
    denoiser: Any = toma_fx.optimize(model.denoiser, **options)
    if runtime == "compile":
        return denoiser.compile()
    toma_fx.export.export(denoiser, inputs_of(model), folder / f"{runtime}-{preset}", runtime)
    return toma_fx.load(
        folder / f"{runtime}-{preset}", **({"threads": 1} if runtime == "onnx" else {})
    )


def drawing(model: tiny.TinyModel, denoiser: Any) -> Callable[[], Any]:
    """A whole generation; told, where that can be."""

    def draw() -> Any:
        if not hasattr(denoiser, "generation"):
            return model.generate([0], steps=STEPS, denoiser=denoiser)
        with denoiser.generation(steps=STEPS):
            return model.generate([0], steps=STEPS, denoiser=denoiser)

    return draw


@torch.no_grad()
def measure(name: str, runtime: str, preset: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds of a generation, and what FLOPs let expect."""
    model = tiny.load(name)
    ways = {
        "original": drawing(model, opened(model, runtime, None, folder)),
        "cached": drawing(model, opened(model, runtime, preset, folder)),
    }
    config: Any = toma_fx.PRESETS[preset]
    told = replace(config, cache=replace(CacheConfig.of(config.cache), steps=STEPS))
    counted = toma_fx.explain(model.denoiser, inputs_of(model), told).ideal_speedup
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(rounds + 1):
        for way, draw in ways.items():
            start = time.process_time(), time.perf_counter()
            draw()
            times[way].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    result: dict[str, Any] = {"counted": round(counted, 3)}
    for i, clock in enumerate(("processor", "wall")):
        medians = {w: statistics.median(t[i] for t in each[1:]) for w, each in times.items()}
        speedup = medians["original"] / medians["cached"]
        result[clock] = {
            **{f"{way}_s": round(value, 4) for way, value in medians.items()},
            "speedup": round(speedup, 3),
            "quotient": round(speedup / counted, 3),
        }
    return result


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=tiny.NAMES, default=list(tiny.NAMES))
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {
        "command": command_line(), "device": device_name(), "versions": versions(),
        "preset": args.preset, "steps": STEPS, "models": {},
    }  # fmt: skip
    for name in args.models:
        for runtime in args.runtimes:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(name, runtime, args.preset, args.rounds, Path(folder))
            results["models"].setdefault(name, {})[runtime] = found
            print(name, runtime, found, flush=True)
    publish(results, args.out)


if __name__ == "__main__":
    main()

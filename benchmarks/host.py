"""What the check of the model costs at each step: the guard on models of full depth and tiny width.

    python benchmarks/host.py --out benchmarks/results/host-cpu.json

At every step the optimized denoiser asks whether the model is still the one that was captured,
and where it runs (dtype, device, autocast, attention backends). That costs time on the host only,
by the number of modules: SDXL's UNet has 70 transformer layers, Flux has 57 blocks; widths don't
matter. LoRA is on every attention projection. `whole step` is all that a step of the compiled
denoiser costs on the host, and `plain step` the same of `torch.compile(model)`: programs return at
once what they computed before. All models take turns, round after round; reported are medians of
the time that the thread had the processor, in microseconds:

- `cold`: after 64 MiB of other memory were written, as a step on the processor does;
- `warm`: two calls later, with everything in the caches of the processor.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import CLASSES, CONFIGS, NARROW, command_line, device_name, publish, versions
from peft import LoraConfig

import toma_fx
from toma_fx.capture.companions import check_wrapping
from toma_fx.capture.guard import ModelGuard
from toma_fx.models.named import example_inputs

PROJECTIONS = [
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
]
LIMITS = {"sdxl": 300, "sdxl lora": 1000}
"""Microseconds that a check may cost, warm."""
CACHE = 64 * 2**20


def make_model(name: str, lora: bool) -> Any:
    """A denoiser of full depth with random weights."""
    torch.manual_seed(0)
    model = CLASSES[name](**{**CONFIGS[name], **NARROW[name]})
    if lora:
        model.add_adapter(LoraConfig(r=2, target_modules=PROJECTIONS), "a")
    return model.eval().requires_grad_(False)


def whole_steps(name: str, model: Any) -> dict[str, Callable[[], Any]]:
    """A step of the optimized denoiser, and of the plain model, both compiled to nothing."""
    size = {"sdxl": 64, "flux": 128}[name]
    call = example_inputs(model, size, size, 2 if name == "sdxl" else 1, text=8)
    options = {"min_tokens": 1, "destinations_every": 10_000, "weights_every": 10_000}
    optimized = toma_fx.optimize(model, **options).compile(outline=False)
    plain = torch.compile(copy.deepcopy(model), backend=returning_at_once, dynamic=False)
    steps = itertools.count()

    def advance() -> dict[str, Any]:
        return {**call, "timestep": call["timestep"] * (1 - next(steps) * 1e-6)}

    with mock.patch("toma_fx.run.compiled.compile_graph", returning_at_once):
        for _ in range(2):  # refresh, reuse
            optimized(**advance())
    plain(**advance())
    return {"whole step": lambda: optimized(**advance()), "plain step": lambda: plain(**advance())}


def returning_at_once(graph_module: Any, *_: Any) -> Callable[..., Any]:
    """Compile a graph to what it returned at its first run."""
    results: list[Any] = []

    def run(*args: Any) -> Any:
        if not results:
            results.append(graph_module.forward(*args))
        return results[0]

    return run


def step_parts(model: Any) -> dict[str, Callable[[], Any]]:
    """Everything that a step asks of the guard, by part and together."""
    optimized = toma_fx.optimize(model)
    guard = ModelGuard(model)

    def environment() -> Any:
        with guard.companions.kernel():
            return guard.companions.environment

    def step() -> None:
        check_wrapping(optimized)
        assert guard.holds()
        environment()

    return {"holds": guard.holds, "environment": environment, "step": step}


def spent(run: Callable[[], Any]) -> float:
    """Microseconds of processor time of one call."""
    start = time.thread_time_ns()
    run()
    return (time.thread_time_ns() - start) / 1e3


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    models = {
        name + " lora" * lora: make_model(name, lora) for name in NARROW for lora in (False, True)
    }
    parts = {
        name: {**whole_steps(name.split()[0], model), **step_parts(model)}
        for name, model in models.items()
    }
    other = torch.empty(CACHE, dtype=torch.uint8)
    times: dict[tuple[str, str, str], list[float]] = {}
    for _ in range(args.rounds):
        for name, part in parts.items():
            for key, run in part.items():
                other.fill_(1)
                for way in ("cold", "", "warm"):
                    times.setdefault((name, way, key), []).append(spent(run))
    rows: dict[str, Any] = {}
    for name, model in models.items():
        rows[name] = {"modules": sum(1 for _ in model.modules())}
        for way in ("cold", "warm"):
            rows[name][f"{way}_us"] = {
                key: statistics.median(times[name, way, key]) for key in parts[name]
            }
        rows[name]["limit_us"] = LIMITS.get(name)
        guards = [spent(partial(ModelGuard, model)) / 1e3 for _ in range(5)]
        rows[name]["new_guard_ms"] = statistics.median(guards)
    results = {
        "command": command_line(),
        "device": device_name(),
        "versions": versions(),
        "load": os.getloadavg()[0],
        "rounds": args.rounds,
        "models": rows,
    }
    publish(results, args.out)


if __name__ == "__main__":
    main()

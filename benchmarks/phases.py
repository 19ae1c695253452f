"""Requests at different steps with a cache: one masked batch, or batches of one kind of step.

    OMP_NUM_THREADS=1 python benchmarks/phases.py --out benchmarks/results/phases-cpu.json

A Flux transformer of random weights, eager; one step in three computes. Two requests, of which one
is due to compute: both in one batch (the masked program), and one after the other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import command_line, device_name, publish, versions
from diffusers import FluxTransformer2DModel

import toma_fx
from toma_fx import CacheConfig, State
from toma_fx.models.tiny import FLOW

SIDE, TEXT = 32, 16
"""Tokens a side, and of the text."""


def call(batch: int, timestep: float) -> dict[str, Any]:
    """A call of the model."""
    noise = torch.Generator().manual_seed(batch)
    return {
        "hidden_states": torch.randn(batch, SIDE * SIDE, 16, generator=noise),
        "encoder_hidden_states": torch.randn(batch, TEXT, 64, generator=noise),
        "pooled_projections": torch.randn(batch, 64, generator=noise),
        "timestep": torch.full((batch,), timestep),
        "img_ids": FLOW.image_ids(2 * SIDE, 2 * SIDE),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


@torch.no_grad()
def measure(rounds: int) -> dict[str, Any]:
    """Milliseconds of processor time, medians of rounds in turn."""
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=4, num_single_layers=8, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=64, pooled_projection_dim=64,
        axes_dims_rope=(8, 12, 12),
    ).eval()  # fmt: skip
    denoiser: Any = toma_fx.optimize(model, toma=False, cache=CacheConfig(every=3))

    def after(steps: int) -> State:
        state = State()
        for i in range(steps):
            _, state = denoiser.step(call(1, 1.0 - 0.03 * i), state)
        return state

    computes, cached = after(3), after(4)
    assert (denoiser.due(computes), denoiser.due(cached)) == ("plain", "cached_plain")
    ways: dict[str, Callable[[], Any]] = {
        "both in one batch": lambda: denoiser.step(call(2, 0.8), [computes, cached]),
        "one that computes": lambda: denoiser.step(call(1, 0.8), computes),
        "one that is cached": lambda: denoiser.step(call(1, 0.8), cached),
        "two that compute": lambda: denoiser.step(call(2, 0.8), [computes, computes]),
        "two that are cached": lambda: denoiser.step(call(2, 0.8), [cached, cached]),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            start = time.process_time()
            run()
            times[name].append(1000 * (time.process_time() - start))
    return {name: round(statistics.median(each[1:]), 1) for name, each in times.items()}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = {"command": command_line(), "device": device_name(), "versions": versions()}
    publish({**results, "ms": measure(args.rounds)}, args.out)


if __name__ == "__main__":
    main()

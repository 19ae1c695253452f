"""Ten thousand steps over changing shapes, contexts and adapters: memory and compilations.

    python benchmarks/soak.py --out benchmarks/results/soak-cpu.json

A small Flux through Inductor: every generation draws a size, an adapter and whether it has true
CFG (two cache contexts). Every combination of size and adapter needs one graph, compiled once a
use; afterwards nothing may be captured or compiled, and memory must stay where it is. A second
phase (`--churn`) gives every generation its own adapter scale, so that each needs a new graph and
old ones are dropped.
"""

from __future__ import annotations

import argparse
import gc
import platform
import random
import sys
from pathlib import Path
from typing import Any

import torch
from common import publish, resident
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch._dynamo.utils import counters

import toma_fx

SIZES = ((8, 8), (8, 12), (12, 12))
ADAPTERS: tuple[str | None, ...] = (None, "a", "b")


def small_flux() -> FluxTransformer2DModel:
    """Flux with one double and one single block, two adapters."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    for name in ("a", "b"):
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"]), name)
    return model.eval().requires_grad_(False)


def inputs(size: tuple[int, int], timestep: float) -> dict[str, Any]:
    """One call with fresh tensors."""
    height, width = size
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None, :]
    return {
        "hidden_states": torch.randn(1, height * width, 4),
        "encoder_hidden_states": torch.randn(1, 5, 24),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.full((1,), timestep),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }


def switch(model: FluxTransformer2DModel, adapter: str | None, scale: float = 1.0) -> None:
    """Make one adapter act, or none."""
    if adapter is None:
        model.disable_lora()
        return
    model.enable_lora()
    model.set_adapters([adapter], [scale])


def generation(optimized: Any, size: tuple[int, int], steps: int, guided: bool) -> int:
    """Run one generation; calls made."""
    for i in range(steps):
        for context in ("cond", "uncond") if guided else ("cond",):
            with optimized.cache_context(context):
                optimized(**inputs(size, 1 - i / steps))
    optimized._reset_stateful_cache()
    return steps * (1 + guided)


def held() -> float:
    """Resident memory of this process in MiB, without garbage."""
    gc.collect()
    return resident()


def mixed(total: int) -> dict[str, Any]:
    """Phase one: kinds that repeat."""
    draw = random.Random(0)
    model = small_flux()
    kinds = [(size, adapter) for size in SIZES for adapter in ADAPTERS]
    optimized = toma_fx.optimize(model, min_tokens=60, tile=4, max_signatures=len(kinds)).compile()
    torch._dynamo.reset()
    counters.clear()
    done = 0
    for size, adapter in kinds:
        switch(model, adapter)
        done += generation(optimized, size, 6, True)
    first = {"captures": optimized.cache.captures, "compiled": counters["stats"]["unique_graphs"]}
    curve = [(done, held())]
    while done < total:
        for _ in range(20):
            switch(model, draw.choice(ADAPTERS), 1.0)
            done += generation(
                optimized, draw.choice(SIZES), draw.randint(3, 12), draw.random() < 0.5
            )
        curve.append((done, held()))
        print(f"{done} steps, {curve[-1][1]:.0f} MiB", flush=True)
    after = {"captures": optimized.cache.captures, "compiled": counters["stats"]["unique_graphs"]}
    return {
        "steps": done,
        "kinds": len(kinds),
        "after_first_of_each_kind": first,
        "at_the_end": after,
        "steps_by_program": optimized.totals,
        "resident_mib": curve,
    }


def churn(generations: int, compiled: bool) -> dict[str, Any]:
    """Phase two: every generation needs a new graph."""
    model = small_flux()
    optimized = toma_fx.optimize(model, min_tokens=60, tile=4, max_signatures=2)
    if compiled:
        optimized.compile()
    curve = []
    for i in range(generations):
        switch(model, "a", 1 + i / generations)
        generation(optimized, SIZES[0], 3, False)
        if i % max(1, generations // 10) == 0:
            curve.append((i, held()))
            print(f"{i} graphs, {curve[-1][1]:.0f} MiB", flush=True)
    return {"captures": optimized.cache.captures, "resident_mib": curve}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--churn", type=int, default=100, help="generations with a new graph each")
    parser.add_argument("--churn-compiled", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    results = {
        "command": "python " + " ".join(sys.argv),
        "device": platform.machine(),
        "torch": torch.__version__,
        "toma_fx": toma_fx.__version__,
        "mixed": mixed(args.steps) if args.steps else None,
        "churn": churn(args.churn, False) if args.churn else None,
        "churn_compiled": churn(args.churn_compiled, True) if args.churn_compiled else None,
    }
    publish(results, args.out)


if __name__ == "__main__":
    main()

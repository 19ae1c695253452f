"""Processor time until a model is compiled, against its depth: blocks that repeat, compiled once.

    OMP_NUM_THREADS=1 python benchmarks/cold_start.py --out benchmarks/results/cold-start-cpu.json

Every figure is of a fresh process with empty caches, children (the C++ compiler) included:

    compile       the original, torch.compile
    repeated      the original, compile_repeated_blocks() of diffusers: one program
    flat          token merging, both programs of a generation (refresh, reuse), each compiled whole
    outlined      the same, blocks that repeat as one subgraph

Capture, analysis and rewrite are in the figures of the last two. `step_ms` is of the last program,
median of 9 steps. SDXL has its real layout and Flux its own, at a quarter of their width.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import CLASSES, CONFIGS, command_line, device_name, save, versions

from toma_fx.models.named import example_inputs

WAYS = ("compile", "repeated", "flat", "outlined")
NARROW: dict[str, dict[str, Any]] = {
    "sdxl": {"block_out_channels": (96, 160, 320), "attention_head_dim": (3, 5, 10),
             "cross_attention_dim": 512},
    "flux": {"num_attention_heads": 6, "joint_attention_dim": 512},
}  # fmt: skip
SIZE = {"sdxl": 256, "flux": 512}
DEPTHS = {"sdxl": (0.2, 0.5, 1.0), "flux": (0.1, 0.25, 0.5)}
"""Shares of the real depth."""
STEPS = 9


def model_of(name: str, depth: float) -> torch.nn.Module:
    """A narrow model with random weights, and a share of the real layers."""
    config = {**CONFIGS[name], **NARROW[name]}
    if name == "sdxl":
        layers = config["transformer_layers_per_block"]
        config["transformer_layers_per_block"] = [max(1, round(n * depth)) for n in layers]
    else:
        for key in ("num_layers", "num_single_layers"):
            config[key] = max(1, round(config[key] * depth))
    torch.manual_seed(0)
    return CLASSES[name](**config).eval().requires_grad_(False)


def point(name: str, depth: float, way: str) -> dict[str, Any]:
    """Compile in this process."""
    model: Any = model_of(name, depth)
    inputs = example_inputs(model, SIZE[name], SIZE[name], 1, text=64)
    blocks = sum(type(m).__name__.endswith("TransformerBlock") for m in model.modules())
    before, clock = os.times(), time.perf_counter()
    with torch.no_grad():
        if way == "compile":
            model = torch.compile(model, dynamic=False)
            model(**inputs)
        elif way == "repeated":
            model.compile_repeated_blocks(dynamic=False)
            model(**inputs)
        else:
            options = {"scope": "stack", "min_tokens": 16, "outline": way == "outlined"}
            model = torch.compile(model, backend="toma_fx", options=options, dynamic=False)
            for _ in range(2):
                model(**inputs)
        wall, after = time.perf_counter() - clock, os.times()
        seconds = []
        for _ in range(STEPS):
            start = time.process_time()
            model(**inputs)
            seconds.append(time.process_time() - start)
    python = after.user + after.system - before.user - before.system
    compiler = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    return {"model": name, "depth": depth, "blocks": blocks, "way": way, "wall_s": wall,
            "python_s": python, "compiler_s": compiler, "processor_s": python + compiler,
            "step_ms": 1000 * statistics.median(seconds)}  # fmt: skip


def fresh(name: str, depth: float, way: str) -> dict[str, Any]:
    """`point` in a fresh process, with nothing cached."""
    command = [sys.executable, __file__, "--point", name, str(depth), way]
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure every point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CLASSES, default=list(CLASSES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--depths", nargs="+", type=float, help="shares of the real depth")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        name, depth, way = args.point
        print(json.dumps(point(name, float(depth), way)))
        return
    about = {"command": command_line(), "device": device_name(), "versions": versions()}
    results: dict[str, Any] = {**about, "points": []}
    for name in args.models:
        for depth in args.depths or DEPTHS[name]:
            for way in args.ways:
                row = fresh(name, depth, way)
                results["points"].append(row)
                total, step = f"{row['processor_s']:.1f} s", f"{row['step_ms']:.1f} ms"
                print(f"{name}, {row['blocks']} blocks, {way}: {total}, step {step}", flush=True)
                save(results, args.out)


if __name__ == "__main__":
    main()

"""Processor time until a model is compiled, against its depth: blocks that repeat, compiled once.

    OMP_NUM_THREADS=1 python benchmarks/cold_start.py --out benchmarks/results/cold-start-cpu.json

Every figure is of a fresh process, children (the C++ compiler) included, with empty caches unless
otherwise said:

    eager         the original, not compiled
    compile       the original, torch.compile
    repeated      the original, compile_repeated_blocks() of diffusers
    flat          token merging, both programs of a generation (refresh, reuse), each compiled whole
    outlined      the same as `.compile()` does it: blocks that repeat, once
    blocks        the same by our compile_repeated_blocks(): nothing but those blocks
    warm          `outlined` in a process that finds the caches of another one
    artifact      token merging from an AOTInductor artifact: `toma_fx.load`

`wall_s` and `processor_s` are until the first two steps are done, so that everything has been
compiled; capture, analysis and rewrite are in those of token merging. `step_ms` is of the last
program, median of 9 steps. SDXL has its real layout and Flux its own, at a quarter of their width
(`--wide`: at all of it). At less than the most depth, only what compiles is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import CLASSES, CONFIGS, command_line, device_name, save, versions

import toma_fx
from toma_fx.models.named import example, example_inputs

WAYS = ("eager", "compile", "repeated", "flat", "outlined", "blocks", "warm", "artifact")
COMPILING = ("compile", "repeated", "flat", "outlined", "blocks")
PREPARED = ("warm", "artifact")
MERGING: dict[str, Any] = {"scope": "stack", "min_tokens": 16}
NARROW: dict[str, dict[str, Any]] = {
    "sdxl": {"block_out_channels": (96, 160, 320), "attention_head_dim": (3, 5, 10),
             "cross_attention_dim": 512},
    "flux": {"num_attention_heads": 6, "joint_attention_dim": 512},
}  # fmt: skip
SIZE = {"sdxl": 256, "flux": 512, "tiny-sdxl": 64, "tiny-flux": 64}
DEPTHS = {"tiny-sdxl": (1.0,), "tiny-flux": (1.0,), "sdxl": (0.2, 1.0), "flux": (0.1, 0.5)}
"""Shares of the real depth."""
STEPS = 9


def model_of(name: str, depth: float, wide: bool) -> torch.nn.Module:
    """A model with random weights and a share of the real layers, or an embedded one."""
    if name not in CLASSES:
        return example(name)[0]
    config = {**CONFIGS[name], **({} if wide else NARROW[name])}
    if name == "sdxl":
        layers = config["transformer_layers_per_block"]
        config["transformer_layers_per_block"] = [max(1, round(n * depth)) for n in layers]
    else:
        for key in ("num_layers", "num_single_layers"):
            config[key] = max(1, round(config[key] * depth))
    torch.manual_seed(0)
    return CLASSES[name](**config).eval().requires_grad_(False)


def prepare(name: str, depth: float, wide: bool, way: str, folder: Path) -> None:
    """What another process has left behind for a way."""
    if way == "warm":
        point(name, depth, wide, "outlined", folder)
    elif way == "artifact":
        model: Any = model_of(name, depth, wide)
        optimized = toma_fx.optimize(model, **MERGING)
        toma_fx.export.aoti(optimized, inputs_of(name, model), folder / "artifact")


def inputs_of(name: str, model: torch.nn.Module) -> dict[str, Any]:
    """Keyword inputs of a step."""
    if name not in CLASSES:
        return example(name, SIZE[name], SIZE[name], 1)[1]
    return example_inputs(model, SIZE[name], SIZE[name], 1, text=64)


def ready(name: str, model: Any, way: str, folder: Path) -> Any:
    """The model, as a way has it."""
    if way == "eager":
        return model
    if way == "compile":
        return torch.compile(model, dynamic=False)
    if way == "repeated":
        model.compile_repeated_blocks(dynamic=False)
        return model
    if way == "artifact":
        return toma_fx.load(folder / "artifact")
    optimized = toma_fx.optimize(model, **MERGING)
    if way == "blocks":
        optimized.compile_repeated_blocks()
        return optimized
    return optimized.compile(outline=way != "flat")


def point(name: str, depth: float, wide: bool, way: str, folder: Path) -> dict[str, Any]:
    """Compile in this process."""
    model: Any = model_of(name, depth, wide)
    inputs = inputs_of(name, model)
    blocks = sum(type(m).__name__.endswith("TransformerBlock") for m in model.modules())
    before, clock = os.times(), time.perf_counter()
    with torch.no_grad():
        model = ready(name, model, way, folder)
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
    return {"model": name, "depth": depth, "wide": wide, "blocks": blocks, "way": way,
            "wall_s": wall, "python_s": python, "compiler_s": compiler,
            "processor_s": python + compiler,
            "step_ms": 1000 * statistics.median(seconds)}  # fmt: skip


def fresh(name: str, depth: float, wide: bool, way: str) -> dict[str, Any]:
    """`point` in a fresh process; its caches are empty, or what `prepare` left there."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--folder", folder, "--point", name, str(depth), way]
        command += ["--wide"] * wide
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/caches"}
        if way in PREPARED:
            subprocess.run([*command, "--prepare"], check=True, env=environment)
        out = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env=environment
        )
    found: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure every point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=DEPTHS, default=list(DEPTHS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--depths", nargs="+", type=float, help="shares of the real depth")
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--out", type=Path)
    for hidden in ("--point", "--folder", "--prepare"):
        kind: dict[str, Any] = {"action": "store_true"} if hidden == "--prepare" else {}
        kind |= {"nargs": 3} if hidden == "--point" else {}
        parser.add_argument(hidden, help=argparse.SUPPRESS, **kind)
    args = parser.parse_args()
    if args.point:
        name, depth, way = args.point
        run = prepare if args.prepare else point
        print(json.dumps(run(name, float(depth), args.wide, way, Path(args.folder))))
        return
    about = {"command": command_line(), "device": device_name(), "versions": versions()}
    results: dict[str, Any] = {**about, "points": []}
    for name in args.models:
        for depth in args.depths or DEPTHS[name]:
            whole = args.depths is not None or depth == DEPTHS[name][-1]
            for way in (w for w in args.ways if whole or w in COMPILING):
                row = fresh(name, depth, args.wide, way)
                results["points"].append(row)
                total, step = f"{row['processor_s']:.1f} s", f"{row['step_ms']:.1f} ms"
                clock = f"{row['wall_s']:.1f} s of the clock"
                shown = f"{name}, {row['blocks']} blocks, {way}: {total}, {clock}, step {step}"
                print(shown, flush=True)
                save(results, args.out)


if __name__ == "__main__":
    main()

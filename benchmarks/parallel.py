"""What a process computes that shares the tokens of a step with others, by processor time.

    python benchmarks/parallel.py --out benchmarks/results/parallel-cpu.json

A Flux of two double and four single blocks at a width of 512, random weights, 1,024 image tokens
in 4x4 windows at a ratio of 0.5, `scope="stack"`, compiled by Inductor with one thread a process.
Processes on one machine share its processors, so that times by the clock say nothing: reported are
medians, over steps that reuse the pattern, of the processor time of each process, exchanges
through gloo included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from common import command_line, device_name, publish, versions
from diffusers import FluxTransformer2DModel
from torch import distributed, multiprocessing

import toma_fx
from toma_fx.models.named import example_inputs

MODEL: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 8,
    "joint_attention_dim": 512,
    "pooled_projection_dim": 64,
    "axes_dims_rope": (16, 24, 24),
}
STEPS = 12


def measure(rank: int, count: int, text: int, folder: str) -> None:
    """The median step of one process, written to a file in the folder."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = distributed.FileStore(f"{folder}/store", count)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=count, timeout=timedelta(minutes=10)
    )
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**MODEL).eval().requires_grad_(False)
    parallel = distributed.group.WORLD if count > 1 else None
    optimized = toma_fx.optimize(model, parallel=parallel, destinations_every=100).compile()
    call = example_inputs(model, 512, 512, 1, text=text)
    state, times = toma_fx.State(), []
    with torch.no_grad():
        for _ in range(STEPS):
            start = time.process_time()
            _, state = optimized.step(call, state)
            times.append(time.process_time() - start)
    Path(folder, f"{rank}.txt").write_text(str(statistics.median(times[3:])))
    distributed.barrier()
    distributed.destroy_process_group()


def main() -> None:
    """Measure one, two and four processes, with much text and with little."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--texts", type=int, nargs="+", default=[64, 512], help="text tokens")
    options = parser.parse_args()
    rows = []
    for text in options.texts:
        for count in (1, 2, 4):
            with tempfile.TemporaryDirectory() as folder:
                multiprocessing.spawn(measure, (count, text, folder), nprocs=count)
                files = [Path(folder, f"{rank}.txt") for rank in range(count)]
                seconds = [float(file.read_text()) for file in files]
            rows.append({"text": text, "processes": count, "seconds": seconds})
            shown = ", ".join(f"{1e3 * s:.0f}" for s in seconds)
            print(f"{text:4d} text tokens, {count} processes: {shown} ms", flush=True)
    about = {"device": device_name("cpu"), "versions": versions(), "command": command_line()}
    publish({**about, "rows": rows}, options.out)


if __name__ == "__main__":
    main()

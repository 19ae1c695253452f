"""Classifier-free guidance in two processes, each of which computes one side of every step.

    torchrun --nproc_per_node 2 examples/cfg_parallel.py --out cfg-parallel.png

Both have the whole denoiser, merged tokens and cached steps; what they draw is the same. On one
machine without GPUs gloo carries the halves (`GLOO_SOCKET_IFNAME=lo`); with two GPUs give
`--backend nccl`. The first process also draws alone, to compare.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, distributed

import toma_fx
from toma_fx.files import write_file
from toma_fx.measure.records import png
from toma_fx.models import tiny


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw in both processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tiny.NAMES, default="tiny-sdxl")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    parser.add_argument("--out", type=Path, default=Path("cfg-parallel.png"))
    args = parser.parse_args(arguments)
    distributed.init_process_group(args.backend)
    torch.set_num_threads(1)
    first = distributed.get_rank() == 0
    model = tiny.load(args.model)
    denoiser = toma_fx.optimize(model.denoiser, ratio=0.25, cache="balanced")
    prompts = [0, 1, 2, 3]

    def draw() -> tuple[Tensor, float]:
        """Four pictures, and the processor time of this process."""
        start = time.process_time()
        with denoiser.generation(args.steps):
            pictures = model.generate(
                prompts, steps=args.steps, guidance=args.guidance, denoiser=denoiser
            )
        return pictures, time.process_time() - start

    draw()  # captures the graph of a whole batch
    alone, before = draw()
    denoiser.enable_guidance_parallel(distributed.group.WORLD)
    draw()  # and that of a half
    together, after = draw()
    difference = float((together - alone).abs().max())
    if first:
        write_file(args.out, png(torch.cat(list(together), -1) / 2 + 0.5))
        print(f"{args.out}: {len(prompts)} pictures of {args.model}, {args.steps} steps")
        print(f"processor time of a process: alone {before:.2f} s, one side {after:.2f} s")
        print(f"largest difference of a pixel, in [-1, 1]: {difference:.1e}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

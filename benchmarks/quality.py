"""Error against the unmerged run for several configurations, on the two embedded models.

    python benchmarks/quality.py --out benchmarks/results/quality-cpu.json

Every configuration draws the same pictures (all twelve prompts, `--seeds` noise seeds) as the
original model, eagerly, with the same steps. Reported per configuration: squared error of the final
picture in [-1, 1] (mean, median over pictures, spread over seeds) and the FLOPs of a reuse step
against the original's. Speed is measured elsewhere (benchmarks/stage.py, `make demo`).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

import toma_fx
from toma_fx.models import tiny
from toma_fx.run.report import make_report

BASE: dict[str, Any] = {
    "scope": "sublayer",
    "tile": 8,
    "destinations_every": 10,
    "weights_every": 10,
}
"""What a configuration does not say."""
CONFIGS: dict[str, dict[str, Any]] = {
    "sublayer": {},
    "block": {"scope": "block"},
    "stack": {"scope": "stack"},
    "sublayer, pattern per block": {"scope": "sublayer", "share": "block"},
    "attention": {"branches": "attention"},
    "attention, cross": {"branches": ("attention", "cross")},
    "mlp": {"branches": "mlp"},
    "stack, large grids only": {"scope": "stack", "min_tokens": 1024},
    "stack, pinv": {"scope": "stack", "inverse": "pinv"},
    "stack, refresh every 5": {"scope": "stack", "destinations_every": 5, "weights_every": 5},
    "stack, weights every 5": {"scope": "stack", "weights_every": 5},
    "stack, refresh every 2": {"scope": "stack", "destinations_every": 2, "weights_every": 2},
    "stack, second half": {"scope": "stack", "first_step": 10},
    "stack, from step 5, refresh every 5": {
        "scope": "stack",
        "first_step": 5,
        "destinations_every": 5,
        "weights_every": 5,
    },
    "stack, ratio 0.25": {"scope": "stack", "ratio": 0.25},
    "stack, ratio 0.75": {"scope": "stack", "ratio": 0.75},
    "stack, scale 100": {"scope": "stack", "scale": 100.0},
    "stack, tile 4": {"scope": "stack", "tile": 4},
    "stack, tile 2": {"scope": "stack", "tile": 2},
    "stack, tile 4, refresh every 5": {
        "scope": "stack",
        "tile": 4,
        "destinations_every": 5,
        "weights_every": 5,
    },
    "sublayer, tile 4, refresh every 5": {
        "tile": 4,
        "destinations_every": 5,
        "weights_every": 5,
    },
    "stack, tile 2, refresh every 5": {
        "scope": "stack",
        "tile": 2,
        "destinations_every": 5,
        "weights_every": 5,
    },
}


def measure(
    model: tiny.TinyModel, options: dict[str, Any], plain: list[torch.Tensor], steps: int
) -> dict[str, Any]:
    """Errors and FLOPs of one configuration."""
    optimized = toma_fx.optimize(model.denoiser, **options)
    labels = list(range(len(tiny.CLASSES)))
    errors: list[list[float]] = []
    for seed, want in enumerate(plain):
        optimized.reset()
        got = model.generate(labels, seed=seed, steps=steps, denoiser=optimized)
        errors.append((got - want).square().mean((1, 2, 3)).tolist())
    specialization = optimized.specializations[0]
    report = make_report(specialization)
    pictures = [e for row in errors for e in row]
    return {
        "mean": statistics.mean(pictures),
        "median": statistics.median(pictures),
        "mean_per_seed": [statistics.mean(row) for row in errors],
        "ideal_speedup": report.ideal_speedup,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="", help="configurations whose name holds this")
    parser.add_argument("--models", nargs="+", default=list(tiny.NAMES))
    args = parser.parse_args()
    results: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "torch": torch.__version__,
        "device": platform.processor() or platform.machine(),
        "seeds": args.seeds,
        "steps": args.steps,
        "models": {},
    }
    labels = list(range(len(tiny.CLASSES)))
    for name in args.models:
        model = tiny.load(name)
        plain = [model.generate(labels, seed=s, steps=args.steps) for s in range(args.seeds)]
        rows = results["models"].setdefault(name, {})
        for title, options in CONFIGS.items():
            if args.only not in title:
                continue
            try:
                rows[title] = measure(model, {**BASE, **options}, plain, args.steps)
            except toma_fx.NoMergeSites as error:
                rows[title] = {"refused": error.what}
            print(name, title, json.dumps(rows[title]), flush=True)
            args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

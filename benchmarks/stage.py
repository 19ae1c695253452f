"""One SDXL transformer stage at real width: compiled original against compiled merged, each scope.

    python benchmarks/stage.py --out benchmarks/results/stage-cpu.json

All variants run in one process, in turn, round after round; reported are medians and quartiles of
the rounds and the ratio of medians. `select` is the time of selection and weights alone on the
stage's own features. Peak memory is measured in fresh processes, one a variant.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from common import publish, resident
from diffusers import Transformer2DModel

import toma_fx
from toma_fx.methods.toma import ToMA
from toma_fx.run.report import make_report

SIZES = {"640x4096": (640, 64, 2), "1280x1024": (1280, 32, 2)}
"""Channels, tokens a side, layers."""
SCOPES = ("sublayer", "block", "stack")


def stage(channels: int, side: int, layers: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A stage of SDXL's UNet with random weights, and inputs of batch 1."""
    torch.manual_seed(0)
    model = Transformer2DModel(
        num_attention_heads=channels // 64,
        attention_head_dim=64,
        in_channels=channels,
        num_layers=layers,
        cross_attention_dim=2048,
        use_linear_projection=True,
    )
    inputs = {
        "hidden_states": torch.randn(1, channels, side, side),
        "encoder_hidden_states": torch.randn(1, 77, 2048),
        "return_dict": False,
    }
    return model.eval().requires_grad_(False), inputs


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {"median_ms": middle * 1e3, "low_ms": low * 1e3, "high_ms": high * 1e3}


def selection(model: torch.nn.Module, inputs: dict[str, Any], setting: ToMA) -> Callable[[], Any]:
    """Selection and weights alone, compiled, on the features of the stage's first norm."""
    seen: list[torch.Tensor] = []
    hook = model.transformer_blocks[0].norm1.register_forward_hook(
        lambda module, args, out: seen.append(out)
    )
    model(**inputs)
    hook.remove()

    def both(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return setting.weights(x, dict(zip(setting.chosen, setting.select(x), strict=True)))

    compiled = torch.compile(both, dynamic=False)
    compiled(seen[0])
    return lambda: compiled(seen[0])


def measure(size: str, ratio: float, rounds: int) -> dict[str, Any]:
    """Times of every variant of one size."""
    model, inputs = stage(*SIZES[size])
    original = torch.compile(model, dynamic=False)
    timed(lambda: original(**inputs))
    variants: dict[str, Any] = {}
    ideal = {}
    for scope in SCOPES:
        optimized = toma_fx.optimize(
            model, scope=scope, ratio=ratio, destinations_every=10**6, weights_every=10**6
        )
        optimized.compile()
        for _ in range(2):
            optimized(**inputs)
        ideal[scope] = make_report(optimized.specializations[0]).ideal_speedup
        variants[scope] = optimized
    setting = variants["sublayer"].specializations[0].plan.groups[0].setting
    select = selection(model, inputs, setting)
    times: dict[str, list[float]] = {}
    for i in range(rounds):
        times.setdefault("original", []).append(timed(lambda: original(**inputs)))
        for scope, optimized in variants.items():
            run = lambda o=optimized: o(**inputs)  # noqa: E731
            optimized.reset()
            times.setdefault(f"{scope} refresh", []).append(timed(run))
            times.setdefault(scope, []).append(timed(run))
        times.setdefault("select", []).append(timed(select))
        print(size, f"round {i + 1} of {rounds}", flush=True)
    rows = {name: summary(values) for name, values in times.items()}
    base = rows["original"]["median_ms"]
    for scope in SCOPES:
        speedup = base / rows[scope]["median_ms"]
        quotient = speedup / ideal[scope]
        rows[scope] |= {"speedup": speedup, "ideal": ideal[scope], "quotient": quotient}
        refresh = rows[f"{scope} refresh"]["median_ms"]
        rows[scope]["select_share_of_refresh"] = rows["select"]["median_ms"] / refresh
    return rows


def peak(size: str, variant: str, ratio: float) -> None:
    """Print the peak resident memory in MiB of a few eager steps of one variant."""
    model, inputs = stage(*SIZES[size])
    if variant != "original":
        model = toma_fx.optimize(model, scope=variant, ratio=ratio)
    for _ in range(3):
        model(**inputs)
    print(resident(peak=True))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peak", nargs=2, metavar=("SIZE", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.peak:
        peak(*args.peak, args.ratio)
        return
    results: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "toma_fx": toma_fx.__version__,
        "ratio": args.ratio,
        "rounds": args.rounds,
        "sizes": {},
    }
    for size in args.sizes:
        rows = results["sizes"][size] = measure(size, args.ratio, args.rounds)
        for variant in ("original", *SCOPES):
            command = [
                sys.executable,
                __file__,
                "--ratio",
                str(args.ratio),
                "--peak",
                size,
                variant,
            ]
            out = subprocess.run(command, capture_output=True, text=True, check=True)
            rows[variant]["peak_mib"] = float(out.stdout.split()[-1])
    publish(results, args.out)


if __name__ == "__main__":
    main()

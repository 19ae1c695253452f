"""Whole denoisers, original against merged, both compiled: SDXL's UNet and Flux's transformer.

    python benchmarks/denoiser.py --model sdxl --size 1024 --device cuda --dtype bfloat16 \
        --out benchmarks/results/denoiser-sdxl-h200.json

One process per file. The compiled original and every merged variant take turns, round after round;
reported are medians and quartiles. A merged step is reported as the mean over its schedule (one
refresh and `destinations_every` - 1 reuse steps) and as the reuse step alone. On SDXL the `tomesd`
package runs as well. Weights are random unless `--weights` is given: neither shapes nor times
depend on them. Without `--layers` the model has its real depth. Every variant compiles with empty
caches, so that its compile time is what a user waits the first time; `--warm-cache` uses those of
the machine where compiling takes longer than measuring, and compile times then mean nothing.

`ideal` is the ratio of counted FLOPs, original over reuse step; `quotient` is speed-up over ideal.
`_processor` values are of the processor time of this process instead of the clock: on a CPU that
others use as well, and with one thread, they are the steadier ones; on a GPU they say nothing.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from common import (
    CLASSES,
    CONFIGS,
    command_line,
    device_name,
    publish,
    random_model,
    resident,
    save,
    versions,
)
from profiles import profile
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch._inductor.exc import InductorError
from torch._inductor.utils import fresh_cache

import toma_fx
from toma_fx.errors import NoMergeSites
from toma_fx.models.named import example_inputs
from toma_fx.run.report import make_report

SCOPES = ("sublayer", "block", "stack")
RATIOS = (0.25, 0.5, 0.75)
SUBFOLDERS = {"sdxl": "unet", "flux": "transformer"}
TIMESTEPS = {"sdxl": (900, 800), "flux": (0.9, 0.8)}
"""Of the original and refresh steps, and of reuse steps."""
WARMUP = {"cpu": 0, "cuda": 2}
"""Rounds before the first that counts."""
TOMESD_DOWNSAMPLE = 2
"""tomesd's own default, 1, reaches no attention of SDXL; 2 reaches those of 640 channels."""


# -- models ---------------------------------------------------------------------------------------


def configuration(name: str, layers: list[int] | None) -> dict[str, Any]:
    """The real configuration, or that with fewer layers."""
    config = dict(CONFIGS[name])
    if layers and name == "sdxl":
        depths = config["transformer_layers_per_block"]
        config["transformer_layers_per_block"] = tuple(min(d, layers[0]) for d in depths)
    elif layers:
        config["num_layers"], config["num_single_layers"] = layers[0], layers[-1]
    return config


def load_model(args: argparse.Namespace) -> Any:
    """The denoiser in evaluation mode, weights random or from a pipeline or denoiser checkpoint."""
    dtype = getattr(torch, args.dtype)
    if args.weights is None:
        config = configuration(args.model, args.layers)
        model = random_model(args.model, config, dtype, args.device)
    else:
        subfolder: str | None = SUBFOLDERS[args.model]
        if Path(args.weights).is_dir() and not (Path(args.weights) / subfolder).is_dir():
            subfolder = None
        model = CLASSES[args.model].from_pretrained(
            args.weights, subfolder=subfolder, torch_dtype=dtype
        )
        model = model.to(args.device)
    return model.eval().requires_grad_(False)


def step_inputs(args: argparse.Namespace, model: Any, size: int) -> tuple[Any, Any]:
    """Inputs of an earlier and of a later step of one generation."""
    torch.manual_seed(1)
    inputs = example_inputs(model, size, size, args.batch)
    early, late = (torch.full_like(inputs["timestep"], t) for t in TIMESTEPS[args.model])
    return {**inputs, "timestep": early}, {**inputs, "timestep": late}


# -- timing ---------------------------------------------------------------------------------------


@dataclass
class Variant:
    """Something that is timed.

    Attributes:
        row: what is known and reported of it.
        steps: kind of step -> a call of it; timed in this order, each once a round.
        before: called before each round, not timed.
        seconds: measured, per kind of step: of the clock, and of processor time.
    """

    row: dict[str, Any]
    steps: dict[str, Callable[[], Any]]
    before: Callable[[], Any] = lambda: None
    seconds: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def summaries(self) -> dict[str, dict[str, float]]:
        """Median and quartiles of every kind of step."""
        return {kind: summary(values) for kind, values in self.seconds.items()}


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    return clocked(run)[0]


def clocked(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of one call, and of processor time of this process in it."""
    synchronize()
    start, busy = time.perf_counter(), time.process_time()
    run()
    synchronize()
    return time.perf_counter() - start, time.process_time() - busy


def summary(seconds: list[tuple[float, float]]) -> dict[str, float]:
    """Median and quartiles in milliseconds, of the clock and of processor time."""
    found: dict[str, float] = {"rounds": len(seconds)}
    for prefix, values in zip(("", "processor_"), zip(*seconds, strict=True), strict=True):
        spread = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
        for name, value in zip(("low_ms", "median_ms", "high_ms"), spread, strict=True):
            found[prefix + name] = value * 1e3
    return found


def time_in_turn(
    variants: list[Variant], rounds: int, warmup: int, after_round: Callable[[], None]
) -> None:
    """Time every step of every variant, in turn, `rounds` times."""
    for i in range(-warmup, rounds):
        for variant in variants:
            variant.before()
            for kind, run in variant.steps.items():
                seconds = clocked(run)
                if i >= 0:
                    variant.seconds.setdefault(kind, []).append(seconds)
        if i >= 0:
            print(f"  round {i + 1} of {rounds}", flush=True)
            after_round()


def cuda_peak(variant: Variant) -> float:
    """Peak MiB allocated while the steps of one variant run, weights included."""
    variant.before()
    torch.cuda.reset_peak_memory_stats()
    for run in variant.steps.values():
        run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


Cache = Callable[[], AbstractContextManager[Any]]
"""Gives the context in which a variant compiles: with empty caches, or with those of the run."""


# -- original and merged --------------------------------------------------------------------------


def original_variant(model: Any, inputs: Any, cache: Cache) -> Variant:
    """The compiled original."""
    compiled = torch.compile(model, dynamic=False)
    with cache():
        seconds = timed(lambda: compiled(**inputs))
    print(f"  original compiled in {seconds:.0f} s", flush=True)
    return Variant({"compile_s": seconds}, {"step": lambda: compiled(**inputs)})


def merged_variant(
    model: Any, early: Any, late: Any, scope: str, ratio: float, cache: Cache
) -> Variant:
    """A merged variant, both of its programs compiled; capture and rewriting count as compiling."""
    row: dict[str, Any] = {
        "method": "toma_fx",
        "mode": "compiled",
        "scope": scope,
        "ratio": ratio,
    }
    optimized = toma_fx.optimize(model, scope=scope, ratio=ratio).compile()
    steps = {"refresh": lambda: optimized(**early), "reuse": lambda: optimized(**late)}
    try:
        with cache():
            seconds = {kind: timed(run) for kind, run in steps.items()}
    except NoMergeSites as error:
        row["error"] = str(error).splitlines()[0]
        return Variant(row, {})
    if optimized.totals != {"refresh": 1, "reuse": 1}:
        raise RuntimeError(f"a refresh and a reuse step expected, {optimized.totals} ran")
    report = make_report(optimized.specializations[0])
    row["compile_s"] = {**seconds, "total": sum(seconds.values())}
    row["reuse_steps"] = optimized.config_toma.destinations_every - 1
    row["flops"] = {
        "original": report.flops_before,
        "reuse": report.flops_after,
        "refresh": report.flops_refresh,
    }
    row["ideal"] = report.ideal_speedup
    groups = optimized.specializations[0].plan.groups
    row["tokens"] = sorted(
        {(prod(g.setting.grid), g.setting.merged_count) for g in groups}, reverse=True
    )
    print(f"  {scope} {ratio} compiled in {sum(seconds.values()):.0f} s", flush=True)
    return Variant(row, steps, before=optimized.reset)


def finish(variant: Variant, original: Variant) -> dict[str, Any]:
    """The row of a variant with what follows from the times so far."""
    if not variant.seconds:
        return variant.row
    times = variant.summaries()
    base = original.summaries()["step"]
    row = {**variant.row, "original": base, **times}
    step = times.get("reuse") or times["step"]
    row["merged_ms"] = scheduled(row, times, "median_ms")
    row["speedup"] = base["median_ms"] / row["merged_ms"]
    row["speedup_reuse"] = base["median_ms"] / step["median_ms"]
    row["speedup_processor"] = base["processor_median_ms"] / scheduled(
        row, times, "processor_median_ms"
    )
    if "ideal" in row:
        for kind in ("", "_reuse", "_processor"):
            row[f"quotient{kind}"] = row[f"speedup{kind}"] / row["ideal"]
    return row


def scheduled(row: dict[str, Any], times: dict[str, dict[str, float]], key: str) -> float:
    """Mean over a schedule of one refresh and `reuse_steps` reuse steps; or of the only kind."""
    if "reuse" not in times:
        return times["step"][key]
    count = row["reuse_steps"]
    return (times["refresh"][key] + count * times["reuse"][key]) / (count + 1)


# -- tomesd ---------------------------------------------------------------------------------------


def import_tomesd() -> Any:
    """The tomesd package, or exit with what to install."""
    try:
        import tomesd
    except ModuleNotFoundError:
        raise SystemExit(
            "benchmarks/denoiser.py compares with tomesd on SDXL, which is not installed.\n"
            'Install it with: pip install "toma-fx[bench]"   or leave it out with: --no-tomesd'
        ) from None
    return tomesd


def patched_copy(model: Any, ratio: float, max_downsample: int) -> Any:
    """A copy that shares all parameters, patched by tomesd; the model itself stays as it is."""
    shared = {id(p): p for p in model.parameters()}
    return import_tomesd().apply_patch(
        copy.deepcopy(model, shared), ratio=ratio, max_downsample=max_downsample
    )


def positional(run: Callable[..., Any], inputs: Any) -> Callable[[], Any]:
    """A call with `sample` as positional argument: tomesd's hook reads it there."""
    rest = {k: v for k, v in inputs.items() if k != "sample"}
    return lambda: run(inputs["sample"], **rest)


def tomesd_variant(
    model: Any, inputs: Any, mode: str, ratio: float, max_downsample: int, cache: Cache
) -> Variant:
    """tomesd at one ratio. `output_unchanged`: whether it does anything at all."""
    row: dict[str, Any] = {
        "method": "tomesd",
        "mode": mode,
        "max_downsample": max_downsample,
        "ratio": ratio,
    }
    patched = patched_copy(model, ratio, max_downsample)
    run = positional(patched, inputs)
    output = run()[0]  # in eager mode first: makes its random generator
    if mode == "eager":
        row["output_unchanged"] = bool(torch.equal(output, model(**inputs)[0]))
        return Variant(row, {"step": run})
    counters.clear()
    compiled = positional(torch.compile(patched, dynamic=False), inputs)
    try:
        with cache():
            row["compile_s"] = timed(compiled)
    except (TorchDynamoException, InductorError) as error:
        row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return Variant(row, {})
    row["graphs"] = counters["stats"]["unique_graphs"]
    row["graph_breaks"] = sum(counters["graph_break"].values())
    row["graph_break_reasons"] = [r.splitlines()[0] for r in counters["graph_break"]]
    print(f"  tomesd {ratio} compiled in {row['compile_s']:.0f} s", flush=True)
    return Variant(row, {"step": compiled})


# -- where the time goes --------------------------------------------------------------------------


def add_profile(variant: Variant, device: str, batch: int) -> None:
    """Profile every kind of step of a variant into its row."""
    variant.before()
    variant.row["profile"] = {
        kind: profile(run, device, batch) for kind, run in variant.steps.items()
    }


# -- peak memory on the CPU -----------------------------------------------------------------------


def cpu_peak(args: argparse.Namespace, size: int, name: str) -> float:
    """Peak resident MiB of a fresh process that runs one variant for three eager steps."""
    command = [sys.executable, __file__, *sys.argv[1:], "--size", str(size), "--peak-of", name]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1])


def print_peak(args: argparse.Namespace) -> None:
    """Run the variant `--peak-of` in eager mode and print this process's peak."""
    model = load_model(args)
    early, late = step_inputs(args, model, args.size[0])
    if args.peak_of != "original":
        scope, ratio = split(args.peak_of)
        model = toma_fx.optimize(model, scope=scope, ratio=ratio)
    for inputs in (early, late, late):
        model(**inputs)
    print(resident(peak=True))


def split(name: str) -> tuple[str, float]:
    """Scope and ratio of a variant's name."""
    scope, _, ratio = name.partition(":")
    return scope, float(ratio)


# -- a run ----------------------------------------------------------------------------------------


@dataclass
class Run:
    """One benchmark run: its arguments, model and results, saved again and again.

    Attributes:
        args: command line. model: the original. results: what is written to `--out`.
    """

    args: argparse.Namespace
    model: Any
    results: dict[str, Any]

    @property
    def cache(self) -> Cache:
        """Where a variant compiles."""
        return nullcontext if self.args.warm_cache else fresh_cache

    def save(self) -> None:
        """Write the results so far, all or nothing."""
        save(self.results, self.args.out)

    def size(self, size: int) -> None:
        """Every variant at one picture size."""
        print(f"{self.args.model} {size}x{size}", flush=True)
        torch._dynamo.reset()
        early, late = step_inputs(self.args, self.model, size)
        original = original_variant(self.model, early, self.cache)
        entry = self.results["sizes"][str(size)] = {"original": original.row, "rows": []}
        self.save()
        names = self.args.variants
        for some in [[n] for n in names] if self.args.one_at_a_time else [names]:
            merged = []
            for name in some:
                scope, ratio = split(name)
                merged.append(merged_variant(self.model, early, late, scope, ratio, self.cache))
                self.save()
            self.turn(entry, original, merged)
            del merged
            gc.collect()
        if self.args.tomesd:
            self.tomesd(entry, original, early)
        if self.args.peak_memory and self.args.device == "cpu":
            self.peaks(entry, size)
        self.save()

    def turn(self, entry: dict[str, Any], original: Variant, variants: list[Variant]) -> None:
        """Time variants in turn with an original and add their rows to `entry`."""
        args = self.args
        original.seconds.clear()
        done = list(entry["rows"])

        def write() -> None:
            entry["rows"] = done + [finish(v, original) for v in variants]
            self.save()

        everyone = [original, *variants]
        if args.device == "cuda":
            for variant in everyone:
                variant.row["peak_mib"] = cuda_peak(variant) if variant.steps else None
        if args.profile:
            for variant in everyone:
                if variant.steps and "profile" not in variant.row:
                    add_profile(variant, args.device, args.batch)
        time_in_turn(everyone, args.rounds, WARMUP[args.device], write)
        if "step" not in entry["original"] and "compile_s" in original.row:
            entry["original"]["step"] = original.summaries()["step"]
        write()

    def tomesd(self, entry: dict[str, Any], original: Variant, inputs: Any) -> None:
        """tomesd against the original of the same mode, and with its default settings."""
        unchanged = tomesd_variant(self.model, inputs, "eager", 0.5, 1, self.cache).row
        entry["rows"].append({**unchanged, "note": "tomesd's defaults; not timed"})
        eager = Variant({}, {"step": lambda: self.model(**inputs)})
        for base, mode in ((eager, "eager"), (original, "compiled")):
            if mode not in self.args.tomesd_modes:
                continue
            for ratio in self.args.ratios:
                variant = tomesd_variant(
                    self.model, inputs, mode, ratio, TOMESD_DOWNSAMPLE, self.cache
                )
                self.turn(entry, base, [variant])
                del variant
                gc.collect()

    def peaks(self, entry: dict[str, Any], size: int) -> None:
        """Peak memory of the original and of every merged variant, eager, in fresh processes."""
        entry["original"]["peak_mib_eager"] = cpu_peak(self.args, size, "original")
        for row in entry["rows"]:
            if row["method"] == "toma_fx" and "error" not in row:
                name = f"{row['scope']}:{row['ratio']}"
                row["peak_mib_eager"] = cpu_peak(self.args, size, name)
                self.save()


def facts(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """What the results are of."""
    return {
        "command": command_line(),
        "date": datetime.date.today().isoformat(),
        "device": device_name(args.device),
        "device_kind": args.device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "model": args.model,
        "full_depth": full_depth(args, model),
        "layers": depth(args, model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": "random" if args.weights is None else Path(args.weights).name,
        "dtype": args.dtype,
        "batch": args.batch,
        "rounds": args.rounds,
        "compile_caches": "warm" if args.warm_cache else "empty",
        "in_turn": "the original with each variant" if args.one_at_a_time else "all variants",
        "complete": False,
        "sizes": {},
    }


DEPTH = {
    "sdxl": ("transformer_layers_per_block",),
    "flux": ("num_layers", "num_single_layers"),
}
"""Fields of the configuration that tell how deep a model is."""


def plain(value: Any) -> Any:
    """Lists of checkpoints and tuples of configurations, made comparable."""
    return list(value) if isinstance(value, (tuple, list)) else value


def full_depth(args: argparse.Namespace, model: Any) -> bool:
    """Whether the model is as deep as the real one."""
    real = CONFIGS[args.model]
    return all(plain(model.config[name]) == plain(real[name]) for name in DEPTH[args.model])


def depth(args: argparse.Namespace, model: Any) -> str:
    """Depth of the model in words."""
    if args.model == "sdxl":
        blocks = (b for b in model.modules() if type(b).__name__ == "BasicTransformerBlock")
        text = f"{sum(1 for _ in blocks)} transformer layers"
    else:
        config = model.config
        text = f"{config.num_layers} double and {config.num_single_layers} single blocks"
    return text + (" (the full model)" if full_depth(args, model) else " (not the full model)")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=CLASSES, required=True)
    add("--size", type=int, nargs="+", default=[1024], help="pixels a side")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    add("--batch", type=int, default=1)
    add("--scopes", nargs="*", choices=SCOPES, default=list(SCOPES))
    add("--ratios", nargs="*", type=float, default=list(RATIOS))
    add(
        "--variants",
        nargs="+",
        metavar="SCOPE:RATIO",
        help="merged variants, instead of every scope at every ratio",
    )
    add("--rounds", type=int, default=9)
    add("--weights", metavar="PATH_OR_HUB_ID", help="a pipeline or denoiser; else random weights")
    add(
        "--layers",
        type=int,
        nargs="+",
        metavar="N",
        help="fewer layers than the real model: SDXL: at most N transformer layers a block; "
        "Flux: N double blocks and the second number (or N) of single blocks",
    )
    add(
        "--one-at-a-time",
        action="store_true",
        help="keep the compiled code of one variant at a time",
    )
    add("--warm-cache", action="store_true", help="compile with the caches of the machine")
    add("--no-tomesd", dest="tomesd", action="store_false", help="leave out tomesd (SDXL only)")
    add(
        "--tomesd-modes",
        nargs="+",
        choices=("eager", "compiled"),
        default=["eager", "compiled"],
    )
    add("--peak-memory", action="store_true", help="on the CPU: fresh processes, slow")
    add("--profile", action="store_true", help="add where the time of each step goes")
    add("--out", type=Path)
    add("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.layers and args.weights:
        parser.error("--layers and --weights exclude each other")
    if args.variants is None:
        args.variants = [f"{scope}:{ratio}" for ratio in args.ratios for scope in args.scopes]
    args.tomesd = args.tomesd and args.model == "sdxl"
    return args


def main() -> None:
    """Measure and write."""
    args = parse()
    torch.set_grad_enabled(False)
    if args.peak_of:
        print_peak(args)
        return
    if args.tomesd:
        import_tomesd()
    if args.profile:
        torch._inductor.config.cpp.enable_kernel_profile = True
    model = load_model(args)
    run = Run(args, model, facts(args, model))
    for size in args.size:
        run.size(size)
    run.results["complete"] = True
    run.save()
    if args.out is None:
        publish(run.results, None)


if __name__ == "__main__":
    main()

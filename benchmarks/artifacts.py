"""What merging gains in every runtime: eager, compiled, AOTInductor, ONNX Runtime, merged and not.

    OMP_NUM_THREADS=2 python benchmarks/artifacts.py --model tiny-flux --rounds 15 \
        --out benchmarks/results/artifacts-tiny-flux-cpu.json

Every artifact is built, and every runtime loaded once more for its memory, in a process of its own;
then all of them take turns in one process, round after round. Reported are medians. A merged step
is the mean over its schedule: one refresh and `destinations_every` - 1 reuse steps.

`ideal` is the ratio of counted FLOPs, original over schedule; `quotient` is speed-up over ideal.
Peaks are of resident memory (VmHWM), which counts weights that are mapped from a file as well.
`--profile` adds where ONNX Runtime's time goes, by operator.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import command_line, device_name, publish, resident, save, versions
from denoiser import Variant, random_model, step_inputs, summary, time_in_turn

import toma_fx
from toma_fx.cli.run import arguments_for
from toma_fx.export.building import Stage
from toma_fx.models import tiny
from toma_fx.models.named import example
from toma_fx.run.report import make_report

ARTIFACTS = ("aoti", "onnx")
RUNTIMES = ("eager", "compiled", *ARTIFACTS)
MERGES = ("original", "merged")
KINDS = ("original", "refresh", "reuse")


def load_model(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The denoiser, and inputs of an earlier and a later step of one generation."""
    if args.model in tiny.NAMES:
        torch.manual_seed(0)
        model, early = example(args.model, batch=args.batch)
        return model, early, {**early, "timestep": early["timestep"] * 0.9}
    model = random_model(args.model, args.layers, getattr(torch, args.dtype), "cpu")
    early, late = step_inputs(args, model, args.size)
    return model.eval().requires_grad_(False), early, late


def merging(args: argparse.Namespace, merges: str) -> dict[str, Any]:
    """Options of `optimize`."""
    options = {"ratio": args.ratio, "scope": args.scope, "min_tokens": args.min_tokens}
    return options if merges == "merged" else {"ratio": 0.0}


# -- processes of their own -----------------------------------------------------------------------


def child(*words: str) -> dict[str, Any]:
    """What a new process of this script prints last."""
    command = [sys.executable, __file__, *sys.argv[1:], *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def build(args: argparse.Namespace) -> dict[str, Any]:
    """Build one artifact; what it took."""
    target, merges, out = args.build
    model, early, _ = load_model(args)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    stages: dict[str, float] = {}

    def note(stage: Stage) -> None:
        if stage.state == "done":
            stages[stage.name] = stage.seconds

    before, start = resident(), time.perf_counter()
    optimized = toma_fx.optimize(model, **merging(args, merges))
    made = getattr(toma_fx.export, target)(optimized, early, out, report=note)
    return {
        "build_s": time.perf_counter() - start,
        "stages_s": stages,
        "size_mib": sum(f.size for f in made.files.values()) / 2**20,
        "weights_mib": weights / 2**20,
        "build_before_mib": before,
        "build_peak_mib": resident(peak=True),
        "parity": max(p.relative for call in made.calls for p in call.parity),
    }


def probe(args: argparse.Namespace) -> dict[str, Any]:
    """Load one runtime and run a schedule's kinds of steps; time to load, and memory."""
    runtime, merges, folder = args.probe
    start = time.perf_counter()
    if runtime in ARTIFACTS:
        run = toma_fx.load(folder, **load_options(runtime))
        inputs = arguments_for(run.manifest.calls[0], {})
        seconds, early, late = time.perf_counter() - start, inputs, inputs
    else:
        model, early, late = load_model(args)
        run = toma_fx.optimize(model, **merging(args, merges)) if merges == "merged" else model
        if runtime == "compiled":
            run = run.compile() if merges == "merged" else torch.compile(model)
        seconds = time.perf_counter() - start
    loaded = resident()
    for call in (early, late):
        run(**call)
    return {"load_s": seconds, "loaded_mib": loaded, "peak_mib": resident(peak=True)}


def load_options(runtime: str) -> dict[str, Any]:
    """As many threads as torch has."""
    return {"threads": torch.get_num_threads()} if runtime == "onnx" else {}


# -- all in turn ----------------------------------------------------------------------------------


def runner(runtime: str, merges: str, model: Any, folder: Path, args: argparse.Namespace) -> Any:
    """Something to call, ready to run at its speed."""
    if runtime in ARTIFACTS:
        return toma_fx.load(folder, **load_options(runtime))
    if merges == "original":
        return torch.compile(model, dynamic=False) if runtime == "compiled" else model
    optimized = toma_fx.optimize(model, **merging(args, merges))
    return optimized.compile() if runtime == "compiled" else optimized


def variant(run: Any, merges: str, early: Any, late: Any, row: dict[str, Any]) -> Variant:
    """Its steps, run once."""
    steps: dict[str, Callable[[], Any]] = {"step": lambda: run(**early)}
    if merges == "merged":
        steps = {"refresh": lambda: run(**early), "reuse": lambda: run(**late)}
    start = time.perf_counter()
    for step in steps.values():
        step()
    row["first_s"] = time.perf_counter() - start
    reset = run.reset if hasattr(run, "reset") and merges == "merged" else (lambda: None)
    return Variant(row, steps, before=reset)


def figures(rows: dict[str, Variant], ideal: float, reuse_steps: int) -> dict[str, Any]:
    """What follows from the times so far."""
    found: dict[str, Any] = {}
    for runtime in RUNTIMES:
        if f"{runtime} merged" not in rows:
            continue
        plain, merged = (rows[f"{runtime} {m}"] for m in MERGES)
        base = summary(plain.seconds["step"])
        times = {kind: summary(seconds) for kind, seconds in merged.seconds.items()}
        result: dict[str, Any] = {"original": base, **times}
        for key in ("", "processor_"):
            median = f"{key}median_ms"
            total = times["refresh"][median] + reuse_steps * times["reuse"][median]
            speedup = base[median] / (total / (1 + reuse_steps))
            result[f"{key}speedup"] = speedup
            result[f"{key}quotient"] = speedup / ideal
        found[runtime] = result
    return found


def ort_profile(folder: Path, inputs: Any) -> dict[str, dict[str, float]]:
    """Milliseconds of each operator in one run of each model, the longest first."""
    import onnxruntime

    found, flat = {}, dict(flattened(inputs))
    for path in sorted(folder.glob("*.onnx")):
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.intra_op_num_threads = torch.get_num_threads()
        options.profile_file_prefix = str(folder.parent / f"profile-{path.stem}")
        session = onnxruntime.InferenceSession(str(path), options)
        given = {
            x.name: flat[x.name].numpy() if x.name in flat else zeros(x)
            for x in session.get_inputs()
        }
        for _ in range(3):
            session.run(None, given)
        events = json.loads(Path(session.end_profiling()).read_text())
        times: Counter[str] = Counter()
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                times[event["args"]["op_name"]] += event["dur"] / 1e3 / 3
        found[path.stem] = dict(times.most_common(12))
    return found


def zeros(x: Any) -> Any:
    """A pattern that is valid, though nothing that selection would give."""
    import numpy as np

    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    return np.zeros(x.shape, kinds[x.type])


def flattened(value: Any, name: str = "") -> Any:
    """(name in the program, tensor) of nested arguments."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flattened(inner, f"{name}_{key}" if name else key)
    elif isinstance(value, torch.Tensor):
        yield name, value


# -- a run ----------------------------------------------------------------------------------------


def facts(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """What the results are of."""
    found = versions()
    for package in ("onnx", "onnxscript", "onnxruntime"):
        found[package] = importlib.metadata.version(package)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "command": command_line(),
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": found,
        "model": args.model,
        "layers": args.layers,
        "size": args.size,
        "batch": args.batch,
        "dtype": args.dtype,
        "weights_mib": weights / 2**20,
        "merging": merging(args, "merged"),
        "rounds": args.rounds,
        "complete": False,
    }


def measure(args: argparse.Namespace, work: Path) -> None:
    """Build, probe and time everything."""
    model, early, late = load_model(args)
    results = facts(args, model)
    rows: dict[str, Variant] = {}
    results["runtimes"] = {}

    def write() -> None:
        save(results, args.out)

    for runtime in args.runtimes:
        for merges in MERGES:
            name, folder = f"{runtime} {merges}", work / f"{runtime}-{merges}"
            row: dict[str, Any] = {}
            if runtime in ARTIFACTS:
                row.update(child("--build", runtime, merges, str(folder)))
            row.update(child("--probe", runtime, merges, str(folder)))
            results["runtimes"][name] = row
            print(f"  {name}: {row}", flush=True)
            write()
    for runtime in args.runtimes:
        for merges in MERGES:
            name = f"{runtime} {merges}"
            run = runner(runtime, merges, model, work / f"{runtime}-{merges}", args)
            rows[name] = variant(run, merges, early, late, results["runtimes"][name])
            print(f"  {name}: ready after {rows[name].row['first_s']:.1f} s", flush=True)
    optimized = toma_fx.optimize(model, **merging(args, "merged"))
    report = make_report(optimized.specialized((), early)[0])
    count = optimized.config_toma.destinations_every - 1
    mean = (report.flops_refresh + count * report.flops_after) / (count + 1)
    results["ideal"] = report.flops_before / mean

    def after_round() -> None:
        results["times"] = figures(rows, results["ideal"], count)
        write()

    time_in_turn(list(rows.values()), args.rounds, 1, after_round)
    if args.profile and "onnx" in args.runtimes:
        results["onnx_profile_ms"] = {
            merges: ort_profile(work / f"onnx-{merges}", early) for merges in MERGES
        }
    results["complete"] = True
    write()
    if args.out is None:
        publish(results, None)


def print_table(paths: list[Path]) -> None:
    """Results as tables of Markdown; times are of the processor."""
    for path in paths:
        found = json.loads(path.read_text())
        print(f"\n{found['model']}, ideal {found['ideal']:.2f}x (`{path.name}`)\n")
        print(
            "| runtime | original | refresh | reuse | speed-up | quotient "
            "| build | size | load | peak |"
        )
        print("|---" * 10 + "|")
        for runtime, times in found["times"].items():
            cells = [f"{times[k]['processor_median_ms']:,.0f} ms" for k in KINDS]
            cells += [f"{times['processor_speedup']:.2f}x", f"{times['processor_quotient']:.2f}"]
            row = found["runtimes"][f"{runtime} merged"]
            build, size = row.get("build_s"), row.get("size_mib")
            cells += [f"{build:.0f} s" if build else "", f"{size:,.1f} MiB" if size else ""]
            cells += [f"{row['load_s']:.1f} s", f"{row['peak_mib']:,.0f} MiB"]
            print(f"| {runtime} | {' | '.join(cells)} |")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--table", type=Path, nargs="+", metavar="RESULTS", help="print results, measure nothing")
    add("--model", choices=(*tiny.NAMES, "sdxl", "flux"), default="tiny-flux")
    add("--layers", type=int, nargs="+", help="fewer than the real model, as in denoiser.py")
    add("--size", type=int, default=512, help="pixels a side (tiny models: 64)")
    add("--batch", type=int, default=1)
    add("--dtype", default="float32", choices=("float32",))
    add("--ratio", type=float, default=0.5)
    add("--scope", default="stack")
    add("--min-tokens", type=int, default=256)
    add("--rounds", type=int, default=9)
    add("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    add("--profile", action="store_true", help="where ONNX Runtime's time goes")
    add("--work", type=Path, help="folder for the artifacts, kept; else a temporary one")
    add("--out", type=Path)
    for hidden in ("--build", "--probe"):
        add(hidden, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = "cpu"
    torch.set_grad_enabled(False)
    if args.table:
        print_table(args.table)
    elif args.build or args.probe:
        print(json.dumps(build(args) if args.build else probe(args)))
    elif args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
        measure(args, args.work)
    else:
        with tempfile.TemporaryDirectory() as work:
            measure(args, Path(work))


if __name__ == "__main__":
    main()

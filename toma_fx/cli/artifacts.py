"""Commands on artifacts: `toma-fx build`, `info`, `verify` and `run`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from toma_fx import export
from toma_fx.api import optimize
from toma_fx.cli.run import _run
from toma_fx.cli.text import size_text
from toma_fx.errors import BuildError, ConfigError
from toma_fx.export.artifact import Report, Stage, check_place, read_manifest, reported
from toma_fx.export.artifact import verify as verified
from toma_fx.export.manifest import Manifest
from toma_fx.methods.config import method_names
from toma_fx.models.named import example, licence_of
from toma_fx.run.schedule import Schedule

DTYPES = ("float32", "float16", "bfloat16")


OPTIONS = {
    "aoti": ("max_autotune",),
    "onnx": ("form", "opset"),
    "tensorrt": ("route", "optimization_level"),
}
"""Options of each target; they keep its default where they are not given."""


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the commands to a parser; returns those that also take options of merging."""
    build = commands.add_parser("build", help="make an artifact: a folder that runs by itself")
    build.add_argument("--model", required=True, help="tiny-sdxl, tiny-flux, a folder or a hub id")
    build.add_argument("--subfolder", default=None, help="unet or transformer, inside a pipeline")
    build.add_argument("--target", required=True, choices=tuple(OPTIONS))
    build.add_argument("--height", type=int, help="pixels (default 1024, tiny models 64)")
    build.add_argument("--width", type=int, help="pixels (default: as height)")
    build.add_argument("--batch", type=int, default=2, help="rows of a call (default 2: with CFG)")
    build.add_argument("--text", type=int, help="text tokens (default 77, Flux 512)")
    build.add_argument("--dtype", default="float32", choices=DTYPES)
    build.add_argument("--device", help="default: cuda if there is one, else cpu")
    build.add_argument("--method", help=f"{', '.join(method_names())} (default toma)")
    build.add_argument("--out", type=Path, help="folder to make")
    build.add_argument("--overwrite", action="store_true", help="replace an artifact there")
    build.add_argument("--licence", help="note on the model's licence (default: its model card's)")
    build.add_argument("--max-autotune", action="store_true", default=None, help="of aoti")
    build.add_argument("--form", choices=("cached", "stateless"), help="of onnx")
    build.add_argument("--opset", type=int, help="of onnx")
    build.add_argument("--route", choices=("torch", "onnx"), help="of tensorrt")
    build.add_argument("--optimization-level", type=int, help="of tensorrt")
    build.add_argument(
        "--dry-run", action="store_true", help="of tensorrt: print what it takes, build nothing"
    )
    info = commands.add_parser("info", help="what an artifact says of itself")
    info.add_argument("--json", action="store_true", help="print the manifest")
    verify = commands.add_parser("verify", help="check that the files of an artifact are unchanged")
    run = commands.add_parser("run", help="time the steps of an artifact")
    run.add_argument("--steps", type=int, default=20, help="of a generation (default 20)")
    run.add_argument("--inputs", type=Path, help=".npz or .safetensors with inputs by name")
    run.add_argument(
        "--outputs", type=Path, help=".npz or .safetensors for the last step's outputs"
    )
    run.add_argument("--device", help="default: what it was built for")
    run.add_argument("--providers", help="of ONNX Runtime, separated by commas")
    run.add_argument("--threads", type=int, help="of ONNX Runtime, on a CPU")
    for command in (info, verify, run):
        command.add_argument("path", type=Path, help="folder of the artifact")
    for command, function in ((build, _build), (info, _info), (verify, _verify), (run, _run)):
        command.set_defaults(function=function)
    return [build]


# -- build ----------------------------------------------------------------------------------------


class ShownStages:
    """Shows the stages of a build: a clock while one runs, a line when it has ended."""

    def __init__(self, console: Console) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True)
        self._task: TaskID | None = None

    def __enter__(self) -> ShownStages:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, stage: Stage) -> None:
        """Show what happened."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        if stage.state == "begun":
            self._task = self._progress.add_task(stage.name, total=None)
            return
        took = "done before" if stage.state == "kept" else f"{stage.seconds:.1f} s"
        size = size_text(stage.size) if stage.size else ""
        line = f"{stage.name:<48} {took:>12} {size:>12}"
        self._progress.console.print(line.rstrip(), highlight=False, soft_wrap=True)


def _build(args: argparse.Namespace, options: dict[str, Any], console: Console) -> None:
    chosen = _target_options(args)
    if args.out is None and not args.dry_run:
        raise ConfigError("where to?", where="--out", expected="a folder to make", got="nothing")
    if args.out is not None:
        check_place(args.out, args.overwrite)
    start = time.perf_counter()
    with ShownStages(console) as show:
        with reported("load the model", show):
            model, inputs = example(
                args.model,
                args.height,
                args.width,
                args.batch,
                subfolder=args.subfolder,
                text=args.text,
                dtype=getattr(torch, args.dtype),
                device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            )
        optimized = optimize(model, method=args.method, **options)
        if args.dry_run:
            _print_coverage(optimized, inputs, chosen.get("route", "torch"), show, console)
            return
        licence = licence_of(args.model) if args.licence is None else args.licence
        make = getattr(export, args.target)
        how = {"overwrite": args.overwrite, "licence": licence, "report": show}
        manifest: Manifest = make(optimized, inputs, args.out, **chosen, **how)
    took, size = time.perf_counter() - start, sum(f.size for f in manifest.files.values())
    worst = max((p.relative for p in manifest.parity), default=0.0)
    console.print(
        f"{args.out}: {size_text(size)} in {took:.0f} s, largest difference from the process "
        f"{worst:.1e} of the largest value",
        highlight=False,
        soft_wrap=True,
    )


def _target_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the target that were given.

    Raises:
        ConfigError: one of another target.
    """
    if args.dry_run and args.target != "tensorrt":
        raise ConfigError(
            "only TensorRT has a dry run",
            where="--dry-run",
            expected="--target tensorrt",
            got=f"--target {args.target}",
            hint="toma-fx explain says what would merge",
        )
    given = {}
    for target, names in OPTIONS.items():
        for name in names:
            if (value := getattr(args, name)) is None:
                continue
            if target != args.target:
                raise ConfigError(
                    "an option of another target",
                    where=f"--{name.replace('_', '-')}",
                    expected=f"--target {target}",
                    got=f"--target {args.target}",
                )
            given[name] = value
    return given


def _print_coverage(
    optimized: Any, inputs: Any, route: Any, report: Report, console: Console
) -> None:
    """Print what TensorRT takes of every program.

    Raises:
        BuildError: it does not take all.
    """
    with reported("export and look up", report):
        found = export.tensorrt_coverage(optimized, inputs, route=route)
    for call, coverage in found.items():
        console.rule(f"program {call}", align="left")
        console.print(coverage)
    if lacking := [call for call, coverage in found.items() if not coverage.complete]:
        raise BuildError(
            "TensorRT does not take the whole program",
            where=", ".join(lacking),
            hint="see the tables above; another method or route, or another target",
        )


# -- info and verify ------------------------------------------------------------------------------


def _info(args: argparse.Namespace, options: dict[str, Any], console: Console) -> None:
    manifest = read_manifest(args.path)
    if args.json:
        sys.stdout.write(manifest.to_json())
        return
    table = Table(box=SIMPLE, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _described(manifest):
        table.add_row(name, text)
    console.print(table, highlight=False)


def _described(manifest: Manifest) -> list[tuple[str, str]]:
    """What to show of a manifest."""
    target, device = manifest.target, manifest.device
    words = [target.name, *(f"{k} {v}" for k, v in target.options.items())]
    patterns = sum(_bytes(p.shape, p.dtype) for p in manifest.patterns)
    rows = [
        ("target", ", ".join(words)),
        ("built for", " ".join(w for w in (device.type, device.name, device.arch) if w)),
        ("model", f"{manifest.model}, {manifest.dtype}"),
        ("licence", manifest.licence or "not stated"),
        ("method", _method(manifest.plan)),
        ("merges", _merged_steps(manifest.schedule)),
        ("patterns", f"{len(manifest.patterns)} tensors, {size_text(patterns)}"),
    ]
    rows += [
        (f"program {call}", program.file + (f": {program.entry}" if program.entry else ""))
        for call, program in manifest.programs.items()
    ]
    rows += [
        (f"input {s.tensor.name}", f"{list(s.tensor.shape)} {s.tensor.dtype}")
        for s in manifest.inputs
    ]
    rows += [(f"constant {'_'.join(c.path)}", repr(c.value)) for c in manifest.constants]
    rows += [(f"output {s.name}", f"{list(s.shape)} {s.dtype}") for s in manifest.outputs]
    rows += [(f"file {name}", size_text(spec.size)) for name, spec in manifest.files.items()]
    rows += [(f"made with {name}", text) for name, text in manifest.versions.items()]
    worst = {p.call: p for p in sorted(manifest.parity, key=lambda p: p.relative)}
    rows += [
        (f"difference, {call}", f"{p.relative:.1e} (at most {p.tolerance:.0e})")
        for call, p in worst.items()
    ]
    return rows


def _merged_steps(schedule: Schedule) -> str:
    """Which steps merge, and how their patterns come and go."""
    first, last = schedule.first_step, schedule.last_step
    if last is not None and last < first:
        return "nothing"
    order = " ".join((*schedule.begin, f"({' '.join(schedule.cycle)}) ..."))
    steps = f"steps {first} to {'the last' if last is None else last}"
    return f"{steps}: {order}" if schedule.patterned else f"{steps}, without patterns"


def _method(plan: Mapping[str, Any]) -> str:
    """The configuration of a plan in words."""
    config = plan.get("config")
    if not isinstance(config, dict):
        return "none"
    said = {name: value for name, value in config.items() if value not in (None, [], {})}
    return ", ".join(f"{name} {value}" for name, value in said.items())


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return torch.Size(shape).numel() * torch.empty((), dtype=getattr(torch, dtype)).element_size()


def _verify(args: argparse.Namespace, options: dict[str, Any], console: Console) -> None:
    manifest = verified(args.path)
    size = size_text(sum(f.size for f in manifest.files.values()))
    text = f"{args.path}: {len(manifest.files)} files, {size}, unchanged"
    console.print(text, highlight=False, soft_wrap=True)

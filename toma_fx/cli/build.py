"""`toma-fx build`: make an artifact of a model, and show the stages."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from toma_fx.api import optimize
from toma_fx.cli.text import bytes_text
from toma_fx.devices import usable_device
from toma_fx.errors import BuildError, ConfigError
from toma_fx.export.builder import call_names, export
from toma_fx.export.building import OnStage, Stage, report_stage
from toma_fx.export.destination import check_output
from toma_fx.export.registry import make_target
from toma_fx.export.to_tensorrt.dry_run import tensorrt_coverage
from toma_fx.inputs import load_examples
from toma_fx.models.named import license_of


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
        size = bytes_text(stage.size) if stage.size else ""
        line = f"{stage.name:<48} {took:>12} {size:>12}"
        self._progress.console.print(line.rstrip(), highlight=False, soft_wrap=True)


def build_artifact(args: argparse.Namespace, options: dict[str, Any], console: Console) -> None:
    """Build what the arguments say, or print what TensorRT would take of it.

    Raises:
        ConfigError: no output folder, or an option of another target. As `export`.
    """
    chosen: dict[str, Any] = args.target_fields
    sizes, names = _checked_sizes(args)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = usable_device(args.device or default)
    start = time.perf_counter()
    with ShownStages(console) as show:
        with report_stage("load the model", show):
            model, inputs = load_examples(
                args.model,
                sizes,
                args.batch,
                subfolder=args.subfolder,
                text=args.text,
                dtype=getattr(torch, args.dtype),
                device=device,
            )
        optimized = optimize(model, **options)
        if args.dry_run:
            _print_coverage(optimized, inputs[0], chosen.get("route", "torch"), show, console)
            return
        manifest = export(
            optimized,
            inputs,
            args.out,
            args.target,
            names=names,
            overwrite=args.overwrite,
            license=license_of(args.model) if args.license is None else args.license,
            report=show,
            **chosen,
        )
    seconds, size = time.perf_counter() - start, sum(f.size for f in manifest.files.values())
    worst = max((p.relative for call in manifest.calls for p in call.parity), default=0.0)
    console.print(
        f"{args.out}: {bytes_text(size)} in {seconds:.0f} s, largest difference from the process "
        f"{worst:.1e} of the largest value",
        highlight=False,
        soft_wrap=True,
    )


Size = tuple[int | None, int | None]
"""Height and width of a call."""


def _checked_sizes(args: argparse.Namespace) -> tuple[list[Size], list[str]]:
    """As `_sizes`, once everything is checked that can be before a model is loaded.

    Raises:
        ConfigError: as `build_artifact`. BuildError: no artifact can be there.
        MissingPackageError: the target needs a package.
    """
    if args.dry_run and args.target != "tensorrt":
        raise ConfigError(
            "only TensorRT has a dry run",
            where="--dry-run",
            expected="--target tensorrt",
            got=f"--target {args.target}",
            hint="toma-fx explain says what would merge",
        )
    if args.out is None and not args.dry_run:
        raise ConfigError(
            "no output folder", where="--out", expected="a folder to make", got="nothing"
        )
    if args.out is not None:
        check_output(args.out, args.overwrite)
    sizes, names = _sizes(args)
    if not args.dry_run:
        target = make_target(args.target, args.target_fields)
        target.check_calls(len(sizes))
        target.check_installed()
    return sizes, names


def _sizes(args: argparse.Namespace) -> tuple[list[Size], list[str]]:
    """Heights and widths, and the names of their calls.

    Raises:
        ConfigError: sizes in two ways, one of them twice, or several for a dry run.
    """
    if not args.size:
        names = [f"{args.width}x{args.height}"] if args.height and args.width else []
        return [(args.height, args.width)], names
    if args.height is not None or args.width is not None:
        raise ConfigError(
            "sizes in two ways", where="--size", expected="--size, or --height and --width",
            got="both",
        )  # fmt: skip
    if args.dry_run and len(args.size) > 1:
        raise ConfigError(
            "a dry run is of one size", where="--size", expected="one", got=str(len(args.size))
        )
    names = [f"{width}x{height}" for width, height in args.size]
    return [(height, width) for width, height in args.size], list(call_names(names, len(names)))


def _print_coverage(
    optimized: Any, inputs: Any, route: Any, report: OnStage, console: Console
) -> None:
    """Print what TensorRT takes of every program.

    Raises:
        BuildError: it does not take all.
    """
    with report_stage("export and look up", report):
        coverages = tensorrt_coverage(optimized, inputs, route=route)
    for call, coverage in coverages.items():
        console.rule(f"program {call}", align="left")
        console.print(coverage)
    if lacking := [call for call, coverage in coverages.items() if not coverage.complete]:
        raise BuildError(
            "TensorRT does not take the whole program",
            where=", ".join(lacking),
            hint="see the tables above; another method or route, or another target",
        )

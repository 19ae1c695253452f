"""`toma-fx quality` and `bench`: pictures and speed of a model, accelerated."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from toma_fx.cli.status import BELOW, DONE
from toma_fx.cli.terminal import Terminal
from toma_fx.files import write_file
from toma_fx.measure.bench import bench
from toma_fx.measure.processes import rank_and_count
from toma_fx.measure.quality import quality
from toma_fx.measure.scores import METRICS, PLAIN, metric_of
from toma_fx.models.named import load_embedded, load_pipeline

SUBJECT = ("steps", "guidance", "height", "width", "batch")
"""Options that are settings of the subject by the same names."""
DRAWING = ("out", "rounds", "seed", "seeds", "limit", "compile", *SUBJECT)
"""Options of what draws pictures of many prompts, by the names of its arguments."""


class ShownProgress:
    """A bar for each thing that is done; the first process alone shows it."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
        hidden = rank_and_count()[0] > 0
        self._bars = Progress(*columns, console=console, disable=hidden)
        self._task: TaskID | None = None

    def __enter__(self) -> ShownProgress:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def __call__(self, what: str, count: int) -> None:
        """Begin something of `count` units, or, without a name, advance it."""
        if what:
            self._task = self._bars.add_task(what, total=count)
        elif self._task is not None:
            self._bars.advance(self._task, count)


def measure_quality(args: argparse.Namespace, options: dict[str, Any], console: Console) -> int:
    """Compare pictures; the exit status says whether the thresholds are met."""
    metrics = _metrics(args.metric)
    with ShownProgress(console) as progress:
        result = quality(
            load_model(args),
            args.prompts,
            args.config,
            metrics=metrics,
            require=args.require,
            shown=args.shown,
            progress=progress,
            **{name: getattr(args, name) for name in DRAWING},
        )
    if rank_and_count()[0] == 0:
        console.print(result)
        console.print(f"page: {args.out / 'index.html'}", highlight=False, soft_wrap=True)
    return DONE if result.passes else BELOW


def measure_speed(args: argparse.Namespace, options: dict[str, Any], console: Console) -> None:
    """Time generations and print a table, or JSON."""
    with ShownProgress(Terminal(stderr=True)) as progress:
        begun: list[int] = []

        def advance(total: int) -> None:
            if not begun:
                progress("generations", total)
                begun.append(total)
            progress("", 1)

        result = bench(
            load_model(args),
            args.config,
            prompt=args.prompt,
            modes=args.modes,
            rounds=args.rounds,
            on_run=advance,
            **{name: getattr(args, name) for name in SUBJECT},
        )
    if str(args.json) == "-":
        sys.stdout.write(result.to_json() + "\n")
        return
    console.print(result)
    if args.json is not None:
        write_file(args.json, result.to_json() + "\n")


def _metrics(texts: list[str]) -> dict[str, str | None]:
    """Metrics and weights that replace the default ones; those without weights always."""
    found: dict[str, str | None] = dict.fromkeys(PLAIN)
    for text in texts:
        name, _, weights = text.partition("=")
        if name == "all":
            found |= {metric: found.get(metric) for metric in METRICS}
        else:
            found[metric_of(name).name] = weights or None
    return found


def load_model(args: argparse.Namespace) -> Any:
    """The pipeline or the embedded model that the arguments name.

    Raises:
        ModelTypeError: it can't be loaded. UnknownNameError: no such embedded model. ConfigError:
            options that it does not have.
    """
    if args.model is not None:
        return load_embedded(args.model, args.dtype, args.device)
    return load_pipeline(args.pipeline, args.dtype, args.device)

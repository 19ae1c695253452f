"""Command line: `toma-fx explain`, `demo`, and the commands on artifacts."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from toma_fx.cli.artifacts import add_commands
from toma_fx.errors import ConfigError, TomaError
from toma_fx.methods.config import PRESETS, method_names


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="toma-fx", description="Token merging for diffusion denoisers."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    explain = commands.add_parser("explain", help="what would merge where, and why not elsewhere")
    explain.add_argument(
        "model", help="tiny-sdxl, tiny-flux, or a folder or hub id with a UNet or Flux transformer"
    )
    explain.add_argument("--subfolder", default=None, help="unet or transformer, inside a pipeline")
    explain.add_argument(
        "--height", type=int, default=None, help="pixels (default 1024, tiny models 64)"
    )
    explain.add_argument("--width", type=int, default=None, help="pixels (default: as height)")
    explain.add_argument("--batch", type=int, default=2)
    explain.add_argument("--method", help=f"{', '.join(method_names())} (default toma)")
    explain.add_argument("--json", action="store_true", help="print JSON instead of tables")
    demo = commands.add_parser("demo", help="original against merged on the embedded models")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures")
    explain.set_defaults(function=_explain)
    demo.set_defaults(function=_demo)
    for command in (explain, demo, *add_commands(commands)):
        command.add_argument("--preset", help=f"of ToMA: {', '.join(PRESETS)}")
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="FIELD=VALUE",
            help="any field of the method's configuration",
        )
    args = parser.parse_args(argv)
    console = Console()
    try:
        options = {}
        if hasattr(args, "set"):
            options = {"toma": args.preset or True, **dict(_field(text) for text in args.set)}
        args.function(args, options, console)
    except TomaError as error:
        said = Text.assemble((type(error).__name__, "red"), f": {error}")
        Console(stderr=True).print(said, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; a build goes on where it was when started again")
        return 130
    return 0


def _field(text: str) -> tuple[str, Any]:
    """`ratio=0.5` as a name and a Python value (plain words are strings)."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError("not a setting", where="--set", expected="FIELD=VALUE", got=text)
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _explain(args: argparse.Namespace, options: dict[str, Any], console: Console) -> None:
    from toma_fx import api
    from toma_fx.models.named import example

    size = args.height, args.width, args.batch
    model, inputs = example(args.model, *size, subfolder=args.subfolder)
    report = api.explain(model, inputs, method=args.method, **options)
    if args.json:
        sys.stdout.write(report.to_json() + "\n")
    else:
        console.print(report)


def _demo(args: argparse.Namespace, options: dict[str, Any], console: Console) -> None:
    from toma_fx.cli.demo import run_demo

    outcomes = run_demo(args.out, console, options)
    table = Table(
        title="time a step, median (quartiles) of alternating runs",
        title_justify="left",
        box=SIMPLE,
    )
    for name in ("model", "original", "merged", "refresh", "gain", "ideal", "mse", "PSNR"):
        table.add_column(name, no_wrap=name in ("model", "mse", "PSNR"))
    for o in outcomes:

        def spread(key: str, median: float, quartiles: Any = o.quartiles) -> str:
            low, high = quartiles[key]
            return f"{median:.0f} ms\n({low:.0f} to {high:.0f})"

        table.add_row(
            o.model,
            spread("original", o.original_ms),
            spread("reuse", o.merged_ms),
            spread("refresh", o.refresh_ms),
            f"{o.speedup:.2f}x",
            f"{o.ideal:.2f}x",
            f"{o.mse:.4f}",
            f"{o.psnr:.1f} dB",
        )
    console.print(table)
    console.print(
        f"pictures: {args.out / 'contact-sheet.png'}, figures: {args.out / 'results.json'}"
    )


if __name__ == "__main__":
    sys.exit(main())

"""Command line: `toma-fx explain`, `demo`, and the commands on artifacts.

The parser needs no torch, and a command's module is imported when the command runs: `--help`,
`info` and `verify` answer at once.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toma_fx.cli.options import add_target_options
from toma_fx.errors import ConfigError, TomaError
from toma_fx.export.registry import TARGETS

DTYPES = ("float32", "float16", "bfloat16")
COMMANDS = {
    "explain": "toma_fx.cli.explain:explain_model",
    "demo": "toma_fx.cli.demo:show_demo",
    "build": "toma_fx.cli.build:build_artifact",
    "info": "toma_fx.cli.info:show_manifest",
    "verify": "toma_fx.cli.info:verify_files",
    "run": "toma_fx.cli.run:run_artifact",
}
"""Module and function of every command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = make_parser().parse_args(argv)
    from rich.console import Console
    from rich.text import Text

    module, _, function = COMMANDS[args.command].partition(":")
    try:
        options = {}
        if hasattr(args, "set"):
            options = {"toma": _toma(args), **dict(_field(text) for text in args.set)}
        getattr(importlib.import_module(module), function)(args, options, Console())
    except TomaError as error:
        text = Text.assemble((type(error).__name__, "red"), f": {error}")
        Console(stderr=True).print(text, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; a build goes on where it was when started again")
        return 130
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = argparse.ArgumentParser(
        prog="toma-fx", description="Token merging and step caching for diffusion denoisers."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    explain = commands.add_parser("explain", help="what would merge where, and why not elsewhere")
    explain.add_argument(
        "model", help="tiny-sdxl, tiny-flux, or a folder or hub id with a UNet or Flux transformer"
    )
    explain.add_argument("--json", action="store_true", help="print JSON instead of tables")
    demo = commands.add_parser("demo", help="original against merged on the embedded models")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures")
    build = commands.add_parser("build", help="make an artifact: a folder that runs by itself")
    _add_build_options(build)
    for command in (explain, build):
        command.add_argument("--subfolder", help="unet or transformer, inside a pipeline")
        command.add_argument("--height", type=int, help="pixels (default 1024, tiny models 64)")
        command.add_argument("--width", type=int, help="pixels (default: as height)")
        command.add_argument("--batch", type=int, default=2, help="rows of a call (2: with CFG)")
        command.add_argument("--method", help="how to merge (default toma; see docs/methods.md)")
    for command in (explain, build, demo):
        command.add_argument("--preset", help="as balanced, or paper-sdxl")
        command.add_argument("--recipe", type=Path, help="file that toma_fx.tune has written")
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="FIELD=VALUE",
            help="any field of the method's configuration",
        )
    info = commands.add_parser("info", help="what an artifact says of itself")
    info.add_argument("--json", action="store_true", help="print the manifest")
    verify = commands.add_parser("verify", help="check that the files of an artifact are unchanged")
    run = commands.add_parser("run", help="time the steps of an artifact")
    _add_run_options(run)
    for command in (info, verify, run):
        command.add_argument("path", type=Path, help="folder of the artifact")
    return parser


def _add_build_options(build: argparse.ArgumentParser) -> None:
    build.add_argument("--model", required=True, help="tiny-sdxl, tiny-flux, a folder or a hub id")
    build.add_argument("--target", required=True, choices=tuple(TARGETS))
    build.add_argument("--text", type=int, help="text tokens (default 77, Flux 512)")
    build.add_argument("--dtype", default="float32", choices=DTYPES)
    build.add_argument("--device", help="default: cuda if there is one, else cpu")
    build.add_argument("--out", type=Path, help="folder to make")
    build.add_argument("--overwrite", action="store_true", help="replace an artifact there")
    build.add_argument("--license", help="note on the model's license (default: its model card's)")
    build.add_argument(
        "--dry-run", action="store_true", help="of tensorrt: print what it takes, build nothing"
    )
    add_target_options(build)


def _add_run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("--steps", type=int, default=20, help="of a generation (default 20)")
    run.add_argument("--inputs", type=Path, help=".npz or .safetensors with inputs by name")
    run.add_argument(
        "--outputs", type=Path, help=".npz or .safetensors for the last step's outputs"
    )
    run.add_argument("--device", help="default: what it was built for")
    run.add_argument("--providers", help="of ONNX Runtime, separated by commas")
    run.add_argument("--threads", type=int, help="of ONNX Runtime, on a CPU")


def _toma(args: argparse.Namespace) -> Any:
    """What `--preset` or `--recipe` says."""
    if args.recipe is None:
        return args.preset or True
    if args.preset:
        raise ConfigError(
            "a preset and a recipe", where="--recipe", expected="one of them", got="both"
        )
    from toma_fx.methods.recipe import Recipe

    return Recipe.load(args.recipe)


def _field(text: str) -> tuple[str, Any]:
    """`ratio=0.5` as a name and a Python value (plain words are strings)."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError("not a setting", where="--set", expected="FIELD=VALUE", got=text)
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


if __name__ == "__main__":
    sys.exit(main())

"""Command line: `toma-fx explain`, `demo`, and the commands on artifacts.

A command's module is imported when the command runs, and torch with it: `--help`, `info` and
`verify` answer at once. Only `explain`, `demo` and `build` need torch for their parser (`fields`).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from toma_fx.cli.fields import FieldParser, choosing_options
from toma_fx.cli.status import DONE, FAILED, FAULT, INTERRUPTED, PIPE_CLOSED, STATUS
from toma_fx.errors import TomaError
from toma_fx.export.registry import TARGETS

MODES = ("eager", "compiled")
DTYPES = ("float32", "float16", "bfloat16")
COMMANDS = {
    "explain": "toma_fx.cli.explain:explain_model",
    "demo": "toma_fx.cli.demo:show_demo",
    "build": "toma_fx.cli.build:build_artifact",
    "info": "toma_fx.cli.info:show_manifest",
    "verify": "toma_fx.cli.info:verify_files",
    "sign": "toma_fx.cli.info:sign_files",
    "run": "toma_fx.cli.run:run_artifact",
    "quality": "toma_fx.cli.measure:measure_quality",
    "bench": "toma_fx.cli.measure:measure_speed",
    "tune": "toma_fx.cli.tune:tune_model",
    "generate": "toma_fx.cli.generate:generate_pictures",
}
"""Module and function of every command; what it returns, if anything, is the exit status."""


FIELDS = "and the fields of the configuration, as --ratio 0.4 or --cache.every 3:"
MOST = 2**31 - 1
"""The largest whole number of an option."""
TRACEBACK = "TOMA_FX_TRACEBACK"
"""Variable of the environment that lets errors through with their tracebacks."""


FORESEEN = (TomaError, OSError)
"""Errors that say what is wrong with the arguments, the files or the disk."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    from toma_fx.cli.terminal import Terminal, leave_closed_pipe, prepare_streams

    prepare_streams()
    try:
        args = make_parser().parse_args(argv)
        module, _, function = COMMANDS[args.command].partition(":")
        options = _configuration(args) if hasattr(args, "fields") else {}
        run = getattr(importlib.import_module(module), function)
        status = run(args, options, Terminal()) or DONE
        sys.stdout.flush()
    except BrokenPipeError:
        leave_closed_pipe()
        return PIPE_CLOSED
    except KeyboardInterrupt:
        hint = "interrupted; a build, quality, tune or generate goes on when it is started again"
        Terminal(stderr=True).print(hint)
        return INTERRUPTED
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        _print_error(error)
        return FAILED if isinstance(error, FORESEEN) else FAULT
    return int(status)


def _print_error(error: Exception) -> None:
    """Say what went wrong; of what nobody foresaw, that it should be reported."""
    from rich.text import Text

    from toma_fx.cli.terminal import Terminal

    lines = [f": {error}", *getattr(error, "__notes__", ())]
    if not isinstance(error, FORESEEN):
        lines += ["  this is a fault of toma-fx", f"  try: again with {TRACEBACK}=1, and report it"]
    text = Text.assemble((type(error).__name__, "red"), "\n".join(lines))
    Terminal(stderr=True).print(text, soft_wrap=True)


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = argparse.ArgumentParser(
        prog="toma-fx",
        description="Token merging and step caching for diffusion denoisers.",
        epilog="exit status: " + "; ".join(f"{n} {text}" for n, text in STATUS.items()),
    )
    parser.add_argument("--version", action="version", version=f"toma-fx {version('toma-fx')}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=FieldParser)
    chosen: dict[str, Any] = {"fields": True, "parents": [choosing_options()], "epilog": FIELDS}
    explain = commands.add_parser(
        "explain", help="what would merge where, and why not elsewhere", **chosen
    )
    _add_explain_options(explain)
    demo = commands.add_parser(
        "demo",
        help="original against merged on the embedded models",
        **{**chosen, "parents": [choosing_options(method=False)]},
    )
    _add_demo_options(demo)
    build = commands.add_parser(
        "build", help="make an artifact: a folder that runs by itself", **chosen
    )
    _add_build_options(build)
    for command in (explain, build):
        _add_call_options(command)
    info = commands.add_parser("info", help="what an artifact says of itself")
    info.add_argument("--json", action="store_true", help="print the manifest")
    verify = commands.add_parser("verify", help="check that the files of an artifact are unchanged")
    sign = commands.add_parser("sign", help="sign an artifact, so that others know who made it")
    sign.add_argument("--key", type=Path, required=True, help="PEM file of a private key")
    run = commands.add_parser("run", help="time the steps of an artifact")
    _add_run_options(run)
    quality = commands.add_parser(
        "quality", help="pictures with and without acceleration, compared"
    )
    _add_quality_options(quality)
    bench = commands.add_parser("bench", help="speed of a model: eager, compiled, accelerated")
    _add_bench_options(bench)
    tune = commands.add_parser("tune", help="find a recipe for a speed or a quality")
    _add_tune_options(tune)
    for command in (quality, bench):
        _add_config_option(command)
    generate = commands.add_parser(
        "generate",
        help="draw the pictures of many prompts with a recipe, in any number of processes",
    )
    _add_generate_options(generate)
    for command in (quality, bench, tune, generate):
        _add_subject_options(command)
    for command in (quality, tune, generate):
        _add_prompt_options(command)
    for command in (verify, run):
        command.add_argument("--trust", type=Path, help="PEM file of the key that must have signed")
    for command in (info, verify, sign, run):
        command.add_argument("path", type=Path, help="folder of the artifact")
    for command in (verify, run, generate):
        command.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def _add_explain_options(explain: argparse.ArgumentParser) -> None:
    explain.add_argument(
        "model",
        nargs="?",
        help="tiny-sdxl, tiny-flux, or a folder or hub id with a UNet or Flux transformer",
    )
    explain.add_argument(
        "--class", dest="model_class", metavar="NAME", help="of diffusers, instead of a model"
    )
    explain.add_argument("--config", type=Path, help="config.json of that class: no weights needed")
    form = explain.add_mutually_exclusive_group()
    form.add_argument("--full", action="store_true", help="a line for each branch")
    form.add_argument("--tree", action="store_true", help="modules as a tree")
    form.add_argument("--json", action="store_true", help="print JSON instead of tables")
    explain.add_argument("--html", type=Path, metavar="FILE", help="write a page with a picture")


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    demo.add_argument(
        "--model", choices=("tiny-sdxl", "tiny-flux"), help="one model (default: both)"
    )
    demo.add_argument("--quick", action="store_true", help="compile nothing, and time a few steps")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures")


def _add_call_options(command: argparse.ArgumentParser) -> None:
    """Of which call of which part of a pipeline it is."""
    command.add_argument("--subfolder", help="unet or transformer, inside a pipeline")
    command.add_argument("--height", type=count, help="pixels (default 1024, tiny models 64)")
    command.add_argument("--width", type=count, help="pixels (default: as height)")
    command.add_argument("--batch", type=count, default=2, help="rows of a call (2: with CFG)")


def count(text: str) -> int:
    """A number of things, at least one."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """A number of things, or none."""
    return _whole(text, 0)


def size(text: str) -> tuple[int, int]:
    """Width and height of a picture."""
    width, _, height = text.partition("x")
    return count(width), count(height)


def _whole(text: str, least: int) -> int:
    number = int(text)
    if not least <= number <= MOST:
        raise argparse.ArgumentTypeError(f"not a whole number from {least} to {MOST}: {text}")
    return number


def _add_build_options(build: argparse.ArgumentParser) -> None:
    build.add_argument("--model", required=True, help="tiny-sdxl, tiny-flux, a folder or a hub id")
    build.add_argument("--target", required=True, choices=tuple(TARGETS))
    build.add_argument("--size", type=size, action="append", metavar="WIDTHxHEIGHT", help="pixels, "
        "instead of height and width; may be repeated: one artifact for all sizes")  # fmt: skip
    build.add_argument("--text", type=count, help="text tokens (default 77, Flux 512)")
    build.add_argument("--dtype", default="float32", choices=DTYPES)
    build.add_argument("--device", help="default: cuda if there is one, else cpu")
    build.add_argument("--out", type=Path, help="folder to make")
    build.add_argument("--overwrite", action="store_true", help="replace an artifact there")
    build.add_argument("--license", help="note on the model's license (default: its model card's)")
    build.add_argument(
        "--dry-run", action="store_true", help="of tensorrt: print what it takes, build nothing"
    )


def _add_run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("--steps", type=count, default=20, help="of a generation (default 20)")
    run.add_argument("--size", metavar="WIDTHxHEIGHT", help="one of the artifact's (default: the "
        "first, or that of the inputs)")  # fmt: skip
    run.add_argument("--inputs", type=Path, help=".npz or .safetensors with inputs by name")
    run.add_argument(
        "--outputs", type=Path, help=".npz or .safetensors for the last step's outputs"
    )
    run.add_argument("--device", help="default: what it was built for")
    run.add_argument("--providers", help="of ONNX Runtime, separated by commas")
    run.add_argument("--threads", type=count, help="of ONNX Runtime, on a CPU")


def _add_bench_options(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--prompt", help="what is drawn (default: a caption, or a class)")
    bench.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    bench.add_argument("--rounds", type=natural, default=7, help="that count, in turn (default 7)")
    bench.add_argument("--json", type=Path, help="file for the figures; - for the output")


def _add_subject_options(command: argparse.ArgumentParser) -> None:
    """What is measured and how it draws."""
    model = command.add_mutually_exclusive_group(required=True)
    model.add_argument("--pipeline", help="folder or hub id of a pipeline of diffusers")
    model.add_argument("--model", help="an embedded model, as tiny-sdxl")
    command.add_argument("--steps", type=count, default=20, help="of a generation (default 20)")
    command.add_argument("--guidance", type=float, help="scale (default: the pipeline's)")
    command.add_argument("--height", type=count, help="pixels (default: the model's)")
    command.add_argument("--width", type=count, help="pixels (default: the model's)")
    command.add_argument("--batch", type=count, default=1, help="pictures of a call (default 1)")
    command.add_argument("--dtype", choices=DTYPES, help="of a pipeline (default float32)")
    command.add_argument("--device", help="of a pipeline (default: cuda if there is one, else cpu)")


def _add_config_option(command: argparse.ArgumentParser) -> None:
    """What is compared with the original."""
    command.add_argument(
        "--config",
        action="append",
        required=True,
        metavar="CONFIG",
        help="a preset, a method, METHOD:FIELD=VALUE,... or a recipe file; may be repeated",
    )


def _add_prompt_options(command: argparse.ArgumentParser) -> None:
    """Which pictures are drawn."""
    add = command.add_argument
    add("--prompts", required=True, help="a file (a prompt a line, .jsonl, .csv, .tsv), drawbench "
        "or partiprompts")  # fmt: skip
    add("--out", type=Path, required=True, help="folder; a run that broke off goes on there")
    add("--seed", type=int, default=0, help="of the first picture (default 0)")
    add("--seeds", type=count, default=1, help="pictures of each prompt (default 1)")
    add("--limit", type=count, help="prompts to take, from the start")
    add("--compile", action="store_true", help="compile the original and every configuration")


def _add_tune_options(tune: argparse.ArgumentParser) -> None:
    add = tune.add_argument
    target = tune.add_mutually_exclusive_group(required=True)
    target.add_argument("--speedup", type=float, help="to reach, with the least error")
    target.add_argument("--psnr", type=float, help="mean in dB to keep, with the most speed")
    add("--recipe", type=Path, required=True, help="file to write (.json, .yaml)")
    add("--clock", choices=("flops", "time"), default="flops", help="what --speedup is of: counted "
        "FLOPs of the denoiser (default) or measured whole generations")  # fmt: skip
    add("--merging", default="toma", help="method whose amounts are searched (default toma); none")
    add("--budget", type=count, metavar="N", help="pictures that the search may draw")
    add("--programs", type=count, default=4, help="that a recipe may need (default 4)")
    add("--rounds", type=natural, default=3, help="timed generations (default 3; 0: none)")


def _add_generate_options(generate: argparse.ArgumentParser) -> None:
    add = generate.add_argument
    add("--recipe", required=True, help="a recipe file, a preset, a method, METHOD:FIELD=VALUE,... "
        "or original")  # fmt: skip
    add("--shard", metavar="I/N", help="this process's share, from 0/N (default: that of torchrun)")


def _add_quality_options(quality: argparse.ArgumentParser) -> None:
    add = quality.add_argument
    add("--rounds", type=natural, default=3, help="timed generations of each (default 3; 0: none)")
    add(
        "--metric",
        action="append",
        default=[],
        metavar="NAME[=WEIGHTS]",
        help="beside psnr, ssim and mean_abs: lpips, dino, clip, clip_score, image_reward, or all; "
        "weights are a folder or a hub id; may be repeated",
    )
    add(
        "--require",
        nargs="+",
        default=[],
        metavar="METRIC[:STATISTIC]=VALUE",
        help="thresholds of the mean (or median, worst) over all pictures, as psnr=28 ssim=0.95; "
        "exit status 3 if one is not met",
    )
    add("--shown", type=natural, default=12, help="pictures on the page (default 12)")


def _configuration(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `optimize`: what the preset, the recipe, the method and the fields say.

    Raises:
        ConfigError, UnknownNameError: fields that can't be; found before a model is loaded.
    """
    from toma_fx.methods.config import make_config

    method = getattr(args, "method", None)
    make_config(getattr(args.toma, "config", args.toma), method, args.fields)
    return {"toma": args.toma, "method": method, **args.fields}


if __name__ == "__main__":
    sys.exit(main())

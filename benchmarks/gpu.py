"""All that a GPU is to be asked, in one command: `make bench-gpu`, or

    python benchmarks/gpu.py --quick

SDXL's UNet and Flux's transformer of full depth with random weights, pictures of 1024 and 2048
pixels a side, in parts:

    attention   scaled dot product attention alone, on all and on merged tokens
    selection   the facility location operator on the windows of these models, and its reference
    steps       eager, merged, cached, both, and merged with each block compiled by itself ("flat"),
                in turn with the compiled original: times by kind of step, their mean over a
                generation, compile times, peak memory
    host        time until a call returns, and where the host waits for the GPU
    profile     kernels of a step, by group; as text beside the JSON

What is worth most comes first. The file is written after each measurement, and a later run goes on
with it: what it holds of the same command and versions is not measured again. With `--minutes`
what no longer fits is listed as skipped. `--quick` is `--minutes 9 --rounds 15`. `--device cpu
--toy` takes the same way with small models; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import CLASSES, command_line, device_name, versions
from gpu_models import Bench, Options, can_compile_flat
from gpu_parts import ALONE, WHOLE, measure_profile
from ledger import Deadline, Ledger, measure_all

import toma_fx
from toma_fx.files import write_file

RESULTS = Path(__file__).parent / "results"
PARTS = ("attention", "selection", "steps", "host", "profile")
VARIANTS = ("eager", "merged", "cached", "both", "flat")
SIZES, TOY_SIZES = (1024, 2048), (256,)
QUICK_MINUTES, QUICK_ROUNDS, ROUNDS = 9.0, 15, 40


class Key(NamedTuple):
    """One measurement."""

    part: str
    model: str
    size: int
    variant: str = ""

    @property
    def name(self) -> str:
        """As the file has it: "steps sdxl 1024 merged"."""
        return " ".join(map(str, self)).rstrip()


def order(models: Sequence[str], sizes: Sequence[int]) -> Iterator[Key]:
    """Every measurement: first what is cheap, then what is worth most.

    Compiling takes most of the time, so that parts which use the same programs stand together.
    """
    first, *others = sizes
    stages: tuple[tuple[Sequence[int], Sequence[tuple[str, str]]], ...] = (
        (sizes, [("attention", ""), ("selection", "")]),
        (
            [first],
            [("steps", "eager"), *((part, "merged") for part in ("steps", "host", "profile"))],
        ),
        (others, [("steps", "eager"), ("steps", "merged")]),
        ([first], [("steps", "cached"), ("steps", "both")]),
        (others, [("steps", "cached"), ("steps", "both")]),
        (others, [("host", "merged"), ("profile", "merged")]),
        (sizes if can_compile_flat() else [], [("steps", "flat")]),
    )
    for some, parts in stages:
        for model in models:
            for size in some:
                yield from (Key(part, model, size, variant) for part, variant in parts)


def chosen(args: argparse.Namespace) -> list[Key]:
    """The measurements that were asked for, in order."""
    return [
        key
        for key in order(args.models, args.sizes)
        if key.part in args.parts and key.variant in ("", *args.variants)
    ]


def command_of(key: Key, options: Options) -> str:
    """What measures this alone."""
    words = ["python benchmarks/gpu.py", "--parts", key.part, "--models", key.model]
    words += ["--sizes", str(key.size), *(["--variants", key.variant] if key.variant else [])]
    for name, value in vars(options).items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [] if value is False else [flag, str(value)]
    return " ".join(words)


def digest_of(folder: Path) -> str:
    """A digest of the Python code of a package: its version stays for many changes."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def facts(options: Options) -> dict[str, Any]:
    """What the results are of."""
    about: dict[str, Any] = {
        "command": command_line(),
        "date": datetime.date.today().isoformat(),
        "device": device_name(options.device),
        "device_kind": options.device,
        "cores": os.cpu_count(),
        "toy": options.toy,
        "versions": {**versions(), "code": digest_of(Path(toma_fx.__file__).parent)},
        "options": {k: v for k, v in vars(options).items() if k not in ("device", "toy", "rounds")},
    }
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about["memory_gib"] = properties.total_memory / 2**30
        about["cuda"], about["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return about


class Run:
    """Measures by key.

    Attributes:
        bench: the models. out: of the results; None: text is printed.
    """

    def __init__(self, options: Options, out: Path | None) -> None:
        self.bench, self.out = Bench(options), out

    def measure(self, key: Key) -> Any:
        """The result of a measurement, as JSON has it."""
        options = self.bench.options
        with torch.inference_mode() if options.inference_mode else torch.no_grad():
            if key.part in ALONE:
                return ALONE[key.part](options, key.model, key.size)
            try:
                cell = self.bench.cell(key.model, key.size)
                if key.part in WHOLE:
                    return WHOLE[key.part](self.bench, cell, key.variant)
                found, text = measure_profile(self.bench, cell, key.variant)
            except torch.OutOfMemoryError:
                self.bench.clear()
                raise
        found["text"] = self.write(key, text)
        return found

    def write(self, key: Key, text: str) -> str:
        """Put a text beside the results; the name of its file, or the text itself without one."""
        if self.out is None:
            return text
        path = self.out.with_name(f"{self.out.stem}-{key.name.replace(' ', '-')}.txt")
        write_file(path, text)
        return path.name


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, usual = parser.add_argument, Options()
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--models", nargs="+", choices=CLASSES, default=list(CLASSES))
    add("--sizes", nargs="+", type=int, help="pixels a side")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--quick", action="store_true", help="what fits into nine minutes")
    add("--minutes", type=float, help="time for all, from the start of the process")
    add("--rounds", type=int)
    add("--device", choices=("cuda", "cpu"), default=usual.device)
    add("--toy", action="store_true", help="small models: the figures mean nothing")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default=usual.dtype)
    add("--batch", type=int, default=usual.batch)
    add("--ratio", type=float, default=usual.ratio, help="of token merging")
    add("--preset", choices=("lossless", "balanced", "fast"), default=usual.preset)
    add("--steps", type=int, default=usual.steps, help="of a generation")
    add("--inference-mode", action="store_true", help="instead of no_grad")
    add("--out", type=Path, help="default: results/gpu-DEVICE.json; printed on the CPU")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu --toy tries the code without one")
    args.sizes = args.sizes or list(TOY_SIZES if args.toy else SIZES)
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    if args.minutes is None and args.quick:
        args.minutes = QUICK_MINUTES
    if args.out is None and args.device == "cuda":
        slug = re.sub("[^a-z0-9]+", "-", device_name("cuda").lower()).strip("-")
        args.out = RESULTS / f"gpu-{slug}{'-toy' if args.toy else ''}.json"
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; the exit status says whether anything failed."""
    start = time.monotonic() - time.process_time()  # imports took seconds of what there is
    args = parse(arguments)
    options = Options(**{name: getattr(args, name) for name in vars(Options())})
    about = facts(options)
    ledger = Ledger(args.out, about, same=("device", "toy", "options"))
    keys = {key.name: key for key in chosen(args)}
    run = Run(options, args.out)
    failed = measure_all(
        ledger,
        Deadline(args.minutes, start),
        {name: command_of(key, options) for name, key in keys.items()},
        about["versions"],
        lambda name: run.measure(keys[name]),
    )
    print(f"{time.monotonic() - start:.0f} s in all; failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # compilers that were stopped go on in threads, which an exit would wait for

"""Merging signals compared: what methods choose by, weights of keys, and keys alone.

    python benchmarks/signals.py --out FILE [--models NAME ...] [--guidance 3] [--resume]
    python benchmarks/signals.py --table FILE [--page docs/methods-compared.md]

Every entry draws the same pictures as the unmerged model (twelve prompts, `--seeds` noise seeds,
eagerly), and each is paired with that of `toma`, `random` and `grid` in the same placement at the
same ratio: the mean of the paired differences, and its 95 % interval (`toma_fx.measure`). Error is
the mean squared difference of pixels in [-1, 1] from the unmerged run's. FLOPs are of the step that
usually runs against the original's.

With `--guidance` both halves of classifier-free guidance are rows of one batch, and the methods
that need them are run too. Results are saved after every entry; `--resume` goes on with a file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import command_line, device_name, save, versions
from table import show, table

from toma_fx.measure.cases import Case
from toma_fx.measure.intervals import paired_interval
from toma_fx.measure.subjects import EmbeddedSubject, Settings
from toma_fx.methods.base import BRANCHES
from toma_fx.methods.config import make_config
from toma_fx.models import latent, tiny
from toma_fx.run.report import make_report

PROMPTS = 12
"""As many as the models of pixels know; of others, spread over all."""
RATIOS = (0.25, 0.5)
BASES = ("toma", "random", "grid")
"""What the others are paired with."""
COMMON: dict[str, Any] = {"min_tokens": 256, "destinations_every": 5}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "stack": {**COMMON, "scope": "stack", "share": "stream", "branches": BRANCHES},
    "attention": {**COMMON, "scope": "sublayer", "share": "block", "branches": ("attention",)},
    "keys": {**COMMON, "scope": "keys", "share": "block"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "tomesd": {"max_downsample": 2},
    "bigain": {"max_downsample": 2},
}
"""Of methods, wherever they are placed: the grids of both levels, as the others."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dito without penalty": ("dito", {"penalty": 0.0}),
}
"""Methods with other options under names of their own."""
ROWS: dict[str, tuple[str, ...]] = {
    "stack": (
        *BASES,
        "tomesd",
        "bigain",
        "coredit",
        "toma+",
        "grid+",
        "tomesd+",
        "bigain+",
        "dito",
        "dito without penalty",
    ),
    "keys": (*BASES, "toma+", "random+", "grid+", "tomesd+", "dito+"),
    "attention": (*BASES, "tomesd", "bigain", "coredit", "toma+", "dito"),
}
"""Methods by placement; with a "+" attention weighs merged keys by their sizes."""
GUIDED: dict[str, tuple[str, ...]] = {"stack": (*BASES, "ibtm", "dito")}
"""The same where both halves of guidance are rows of one batch."""
BEGIN, END = "<!-- signals:begin -->", "<!-- signals:end -->"


@dataclass(frozen=True)
class Entry:
    """One row: a method in a placement at a ratio, its keys weighed by their sizes or not."""

    placement: str
    method: str
    proportional: bool
    ratio: float

    @property
    def title(self) -> str:
        """Its key in the result file."""
        sizes = ", proportional" if self.proportional else ""
        return f"{self.placement}: {self.method}{sizes}, ratio {self.ratio}"

    def config(self) -> Any:
        """The configuration."""
        method, own = VARIANTS.get(self.method, (self.method, {}))
        options = {**PLACEMENTS[self.placement], **OPTIONS.get(method, {}), **own}
        options |= {"ratio": self.ratio, "proportional": self.proportional}
        if "weights_every" in make_config(method=method).to_dict():
            options["weights_every"] = 5
        return make_config(method=method, options=options)


def entries(rows: Mapping[str, Sequence[str]]) -> Iterator[Entry]:
    """All of them."""
    for placement, ratio in product(rows, RATIOS):
        for name in rows[placement]:
            yield Entry(placement, name.rstrip("+"), name.endswith("+"), ratio)


def load(name: str, settings: Settings) -> EmbeddedSubject:
    """An embedded model by name, of pixels or of latents."""
    return EmbeddedSubject((tiny if name in tiny.NAMES else latent).load(name), settings)


def measure(subject: EmbeddedSubject, entry: Entry, cases: list[Case]) -> dict[str, Any]:
    """Errors picture by picture, and FLOPs."""
    config = entry.config()
    errors = 4 * (subject.draw(cases, config) - subject.reference(cases)).square().mean((1, 2, 3))
    (optimized,) = subject.optimized(config).values()
    report = make_report(optimized.specializations[0])
    counts = dict(optimized.totals)
    subject.forget(config)
    return {
        "mse": errors.tolist(),
        "flops": report.flops_after / report.flops_before,
        "steps": counts,
    }


def run(args: argparse.Namespace) -> None:
    """Measure all entries that the file lacks."""
    results: dict[str, Any] = {"runs": [], "models": {}}
    if args.resume and args.out.exists():
        results = json.loads(args.out.read_text())
    results["runs"].append(
        {
            "command": command_line(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "device": device_name(),
            "versions": versions(),
        }
    )
    results |= {"seeds": args.seeds, "steps": args.steps}
    guidance = args.guidance if args.guidance > 1 else None
    settings = Settings(steps=args.steps, guidance=guidance, batch=PROMPTS)
    for name in args.models:
        subject = load(name, settings)
        known = subject.model.prompts
        prompts = known[:: len(known) // PROMPTS][:PROMPTS]
        cases = [Case(prompt, seed) for seed in range(args.seeds) for prompt in prompts]
        key = f"{name}, guidance {guidance:g}" if guidance else name
        rows = results["models"].setdefault(key, {})
        for entry in entries(GUIDED if guidance else ROWS):
            if entry.title in rows or not any(text in entry.title for text in args.only):
                continue
            rows[entry.title] = measure(subject, entry, cases)
            mean = statistics.mean(rows[entry.title]["mse"])
            print(key, entry.title, f"{1000 * mean:.3f}e-3", flush=True)
            save(results, args.out)


# -- tables ---------------------------------------------------------------------------------------


def compared(rows: dict[str, Any], title: str, base: str) -> str:
    """Mean paired difference with a base and its interval, in thousandths; bold if it differs."""
    if base not in rows or base == title:
        return ""
    found = paired_interval(rows[title]["mse"], rows[base]["mse"])
    mean, low, high = (f"{1000 * x:+.3g}" for x in (found.mean, found.low, found.high))
    text = f"{mean} ({low} to {high})"
    return f"**{text}**" if found.differs else text


def shown(results: dict[str, Any]) -> str:
    """All tables as Markdown."""
    lines: list[str] = []
    for model, rows in results["models"].items():
        pictures = len(next(iter(rows.values()))["mse"])
        lines += [f"#### {model}, {pictures} pictures, {results['steps']} steps", ""]
        head = ["placement", "ratio", "method", "FLOPs", "MSE", *(f"minus {b}" for b in BASES)]
        cells = []
        for title, row in rows.items():
            placement, rest = title.split(": ")
            method, ratio = rest.rsplit(", ratio ", 1)
            bases = [f"{placement}: {base}, ratio {ratio}" for base in BASES]
            mean = f"{1000 * statistics.mean(row['mse']):.3g}"
            differences = [compared(rows, title, base) for base in bases]
            cells.append([placement, ratio, method, f"{row['flops']:.2f}", mean, *differences])
        cells.sort(key=lambda c: (list(PLACEMENTS).index(c[0]), c[1]))
        lines += [*table(head, cells), ""]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, help="JSON file of results")
    add("--seeds", type=int, default=3)
    add("--steps", type=int, default=12)
    add("--guidance", type=float, default=1.0, help="scale of classifier-free guidance")
    add("--models", nargs="+", default=list(tiny.NAMES))
    add("--only", nargs="+", default=[""], help="entries whose title holds one of these")
    add("--resume", action="store_true", help="keep what the file has")
    add("--table", type=Path, metavar="FILE", help="show a file of results instead")
    add("--page", type=Path, help="with --table: put the tables there, between its marks")
    args = parser.parse_args()
    if args.table:
        show(shown(json.loads(args.table.read_text())), args.page, BEGIN, END)
    elif args.out:
        torch.set_grad_enabled(False)
        run(args)
    else:
        parser.error("give --out or --table")


if __name__ == "__main__":
    main()

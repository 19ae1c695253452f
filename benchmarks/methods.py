"""All merging methods on the two embedded models: error against the unmerged run, FLOPs, time.

    python benchmarks/methods.py --out FILE --no-time             # errors
    python benchmarks/methods.py --out FILE --no-errors --resume  # times
    python benchmarks/methods.py --table FILE [--page docs/methods-compared.md]
    python benchmarks/methods.py --plot FILE PNG                  # error against speed

An entry is a method with options in a placement. `published` is each method as its authors place
it. The other placements are alike for all methods, so that a selection can be told from where it
acts.

Error: all twelve prompts and `--seeds` noise seeds, drawn eagerly, each picture against that of the
unmerged model from the same noise. Mean squared error and PSNR of pixels in [-1, 1], SSIM, and a
feature distance. No pretrained network is at hand: features are what tiny-sdxl's own middle block
makes of a picture (`Features`), for the pictures of both models.

Time: single steps through Inductor. Each entry's steps are timed beside a step of the compiled
original, all entries in turn, round after round. `speedup` is of a mean step of the whole
schedule: every kind of step weighted with how often it runs. `_processor` values are of the
processor time of this process instead of the clock: with one thread the steadier ones.

Results are saved after every entry, and after every round of timing; `--resume` goes on with a
file and adds what it lacks. One process a file at a time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import random
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from common import command_line, device_name, versions
from denoiser import clocked, summary
from table import show, table
from torch import Tensor
from torch.nn import functional as F

import toma_fx
from toma_fx.files import write_file
from toma_fx.measure.scores import ssim
from toma_fx.methods.base import BRANCHES, MethodConfig
from toma_fx.methods.config import make_config
from toma_fx.models import tiny
from toma_fx.passes.uses import PLAIN, REFRESH
from toma_fx.run.denoiser import OptimizedDenoiser
from toma_fx.run.report import make_report
from toma_fx.run.schedule import due

LABELS = tuple(range(len(tiny.CLASSES)))
RATIOS = (0.25, 0.75)
"""Besides 0.5."""
FEATURE_TIME = 0.05
"""At which tiny-sdxl looks at finished pictures; 1 is pure noise."""
CALIBRATION_SEED, CALIBRATION_STRIDE = 1000, 4
"""CA-ToMe's ratios come from every fourth step of one picture a prompt, of other noise."""
TIMED_BATCH = 4
MEASURES = ("mse", "psnr", "ssim", "features")

# -- what is compared -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        placement: where and when it merges, a key of PLACEMENTS. method: its name.
        detail: what distinguishes it from others of the method there.
        options: of `toma_fx.optimize`, besides the placement's.
        models: it is run on. timed: whether its speed is of interest.
        threshold: of CA-ToMe, whose ratios are then calibrated.
    """

    placement: str
    method: str
    detail: str
    options: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = tiny.NAMES
    timed: bool = True
    threshold: float | None = None

    @property
    def title(self) -> str:
        """Its key in the result file."""
        return f"{self.placement}: {self.method}, {self.detail}"

    @property
    def ratio(self) -> float | None:
        """The asked ratio, where it is what distinguishes the entry."""
        return self.options.get("ratio") if self.detail.startswith("ratio") else None

    def config(self, bench: Bench) -> MethodConfig:
        """The configuration for a model; calibrates if need be."""
        options = {**PLACEMENTS[self.placement], **self.options}
        if self.threshold is not None:
            options |= {"threshold": self.threshold, "steps": bench.steps}
            return toma_fx.calibrate(bench.model.denoiser, bench.calibration, **options)
        preset = options.pop("preset", True)
        method = self.method if preset is True else None
        return make_config(preset, method, options)


_STACK = {
    "scope": "stack", "share": "stream", "branches": BRANCHES, "destinations_every": 5,
    "min_tokens": 256,
}  # fmt: skip
PLACEMENTS: dict[str, dict[str, Any]] = {
    "published": {},
    "stack": _STACK,
    "attention": {
        "scope": "sublayer", "share": "block", "branches": ("attention",), "destinations_every": 1,
        "min_tokens": 256,
    },
    "stack, first half": {**_STACK, "last_step": 9},
}  # fmt: skip
SELECTIONS: dict[str, dict[str, Any]] = {
    "toma": {},
    "random": {},
    "grid": {},
    # the grids of both levels, as the others
    "tomesd": {"max_downsample": 2},
    "tofu": {"max_downsample": 2},
}
"""Methods that merge any share of the tokens wherever they are placed."""
SDXL, FLUX = (tiny.NAMES[0],), (tiny.NAMES[1],)


def entries() -> tuple[Entry, ...]:
    """All of them, what is told first of most interest."""
    return (
        *(_at_ratio("stack", method, 0.5) for method in SELECTIONS),
        *_published(),
        *(
            _at_ratio("attention", method, 0.5, timed=method in ("toma", "tomesd"))
            for method in SELECTIONS
        ),
        # where merging to the end leaves noise in the picture (docs/default.md)
        *(
            _at_ratio("stack, first half", method, 0.5, FLUX, timed=False)
            for method in ("toma", "random")
        ),
        *_others(),
        *(
            _at_ratio("stack", method, ratio, timed=method == "toma")
            for ratio in RATIOS
            for method in ("toma", "random", "tomesd")
        ),
    )


def _at_ratio(
    placement: str,
    method: str,
    ratio: float,
    models: tuple[str, ...] = tiny.NAMES,
    *,
    timed: bool = True,
) -> Entry:
    options = {**SELECTIONS[method], "ratio": ratio}
    return Entry(placement, method, f"ratio {ratio}", options, models, timed)


def _published() -> tuple[Entry, ...]:
    at = partial(Entry, "published")
    return (
        at("toma", "paper-sdxl", {"preset": "paper-sdxl"}, SDXL),
        at("toma", "paper-flux", {"preset": "paper-flux"}, FLUX),
        # on tiny-flux, which has one level, the placement "attention" is the same
        *(at(method, "ratio 0.5", {"ratio": 0.5}, SDXL) for method in ("tomesd", "tofu")),
        at("todo", "nearest", {"factor": 2}),
        at("todo", "average", {"factor": 2, "downsample": "average"}),
        at("ca-tome", "threshold 0.7", threshold=0.7),
        at("ca-tome", "threshold 0.9", timed=False, threshold=0.9),
        at("retom", "window 2", {"window": 2}),
    )


def _others() -> tuple[Entry, ...]:
    """What bears on one method only."""
    stack, attention = partial(Entry, "stack"), partial(Entry, "attention")
    return (
        stack("toma", "stripe", {"window": "stripe"}),
        stack("toma", "global", {"window": "global"}),
        stack("retom", "window 2", {"window": 2}, timed=False),
        attention("todo", "nearest", {"factor": (2, 2)}, SDXL, timed=False),
        attention(
            "todo", "average", {"factor": (2, 2), "downsample": "average"}, SDXL, timed=False
        ),
    )


# -- error ----------------------------------------------------------------------------------------


class Features:
    """What tiny-sdxl's middle block makes of finished pictures, for want of a pretrained network.

    The denoiser looks at the clean picture at time `FEATURE_TIME` under the empty prompt. It was
    trained on twelve photographs, and tiny-sdxl's pictures are its own: no neutral judge.
    """

    def __init__(self) -> None:
        self.model = tiny.load(tiny.NAMES[0])

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, 64, 64] -> unit vectors, one a position, [B, C, 256]."""
        seen: list[Tensor] = []
        handle = self.model.denoiser.mid_block.register_forward_hook(
            lambda module, args, out: seen.append(out)
        )
        empty = torch.full((len(images),), len(tiny.CLASSES))
        time = torch.full((len(images),), FEATURE_TIME)
        tiny.FLOW.velocity(
            self.model.name, self.model.denoiser, images, time, *self.model.conditioning(empty)
        )
        handle.remove()
        return F.normalize(seen[0].flatten(2), dim=1)

    def distance(self, got: Tensor, want: Tensor) -> list[float]:
        """1 - cosine similarity, averaged over positions, of each pair of pictures."""
        return (1 - (self(got) * self(want)).sum(1).mean(1)).tolist()


def differences(got: Tensor, want: Tensor, features: Features) -> dict[str, list[float]]:
    """Every measure of each pair of pictures [B, 3, H, W]."""
    mse = (got - want).square().mean((1, 2, 3)).tolist()
    return {
        "mse": mse,
        "psnr": [10 * math.log10(4 / max(e, 1e-12)) for e in mse],
        "ssim": ssim(got, want, peak=2.0),
        "features": features.distance(got, want),
    }


def scale(plain: Sequence[Tensor], features: Features) -> dict[str, dict[str, float]]:
    """What the measures say of unmerged pictures that have nothing to do with each other."""
    pairs = {"another prompt": (plain[0], plain[0].roll(1, 0))}
    if len(plain) > 1:
        pairs["the same prompt from other noise"] = (plain[0], plain[1])
    found = {}
    for name, (a, b) in pairs.items():
        found[name] = {k: statistics.mean(v) for k, v in differences(a, b, features).items()}
    return found


class Bench:
    """One embedded model, and its unmerged pictures by seed."""

    def __init__(self, name: str, steps: int) -> None:
        self.model, self.steps = tiny.load(name), steps
        self.plain: dict[int, Tensor] = {}

    @cached_property
    def calibration(self) -> list[Any]:
        """Calls to calibrate with, of one picture each: in a batch the most similar one decides."""
        calls: list[Any] = []
        for label in LABELS:
            with toma_fx.record_calls(self.model.denoiser) as seen:
                self.model.generate([label], seed=CALIBRATION_SEED + label, steps=self.steps)
            calls += seen[::CALIBRATION_STRIDE]
        return calls

    def pictures(self, seed: int) -> Tensor:
        """The unmerged ones of a seed."""
        if seed not in self.plain:
            self.plain[seed] = self.model.generate(LABELS, seed=seed, steps=self.steps)
        return self.plain[seed]

    def errors(
        self, optimized: Any, seed: int, features: Features
    ) -> tuple[dict[str, list[float]], dict[str, Any]]:
        """Differences of a seed's pictures, and what is known once the model has run."""
        optimized.reset()
        got = self.model.generate(LABELS, seed=seed, steps=self.steps, denoiser=optimized)
        found = differences(got, self.pictures(seed), features)
        return found, facts(optimized, len(LABELS), self.steps)


def facts(optimized: Any, batch: int, steps: int) -> dict[str, Any]:
    """Tokens, steps by kind, and GFLOP a picture of each kind of step."""
    report = make_report(optimized.specializations[0])
    gflop = {
        "original": report.flops_before / batch / 1e9,
        "refresh": report.flops_refresh / batch / 1e9,
        "reuse": report.flops_after / batch / 1e9,
    }
    kinds = schedule(optimized.config_toma, steps)
    of = {"plain": "original", "refresh": "refresh"}
    mean = sum(n * gflop[of.get(kind, "reuse")] for kind, n in kinds.items()) / steps
    return {
        "tokens": sorted({(r.tokens, r.merged) for r in report.rows}, reverse=True),
        "merged_branches": len(report.rows),
        "steps": kinds,
        "gflop": gflop,
        "ideal": gflop["original"] / mean,
    }


def schedule(config: MethodConfig, steps: int) -> dict[str, int]:
    """How many steps of each kind a generation has."""
    return dict(Counter(calls(config, steps)))


def calls(config: MethodConfig, steps: int) -> list[str]:
    """The kind of each step of a generation."""
    kinds = [due(config, step) for step in range(steps)]
    first = next((i for i, kind in enumerate(kinds) if kind != PLAIN.name), None)
    if config.patterned and first is not None:
        kinds[first] = REFRESH.name
    return kinds


# -- time -----------------------------------------------------------------------------------------


@dataclass
class Timed:
    """An entry's compiled model, and seconds measured.

    Attributes:
        walk: kinds of the first steps of a generation, as far as to the last new kind.
        kinds: how many steps of each kind a generation has.
        seconds: per kind, of every round: of the clock, and of processor time. "original" is the
            original's step beside them.
    """

    optimized: OptimizedDenoiser
    walk: list[str]
    kinds: dict[str, int]
    compile_s: float = 0.0
    seconds: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: MethodConfig, model: tiny.TinyModel, steps: int) -> Timed:
        """Not compiled yet."""
        order = calls(config, steps)
        last = max(order.index(kind) for kind in set(order) - {"plain"})
        optimized: Any = toma_fx.optimize(model.denoiser, method=config)
        return cls(optimized.compile(), order[: last + 1], dict(Counter(order)))

    def round(self, inputs: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
        """Time one step of each kind; what comes in between runs untimed."""
        self.optimized.reset()
        found: dict[str, tuple[float, float]] = {}
        for kind, given in zip(self.walk, inputs, strict=False):
            if kind == "plain":
                raise RuntimeError("a schedule that begins with unmerged steps can't be timed")
            took = clocked(lambda given=given: self.optimized(**given))
            found.setdefault(kind, took)
        return found

    def store(self, original: tuple[float, float], took: dict[str, tuple[float, float]]) -> None:
        """Keep what a round took."""
        for kind, seconds in {"original": original, **took}.items():
            self.seconds.setdefault(kind, []).append(seconds)

    def result(self) -> dict[str, Any]:
        """Times by kind of step, the mean step of a generation, and speed-ups."""
        found: dict[str, Any] = {k: summary(v) for k, v in self.seconds.items()}
        steps = [self._mean_step(i) for i in range(len(self.seconds["original"]))]
        found["step"] = summary(steps)
        for at, name in enumerate(("speedup", "speedup_processor")):
            ratios = [
                base[at] / step[at]
                for base, step in zip(self.seconds["original"], steps, strict=True)
            ]
            found[name] = quartiles(ratios)
        return {**found, "compile_s": self.compile_s}

    def _mean_step(self, i: int) -> tuple[float, float]:
        """Seconds of a mean step of a generation, from round `i`."""
        total = [0.0, 0.0]
        for kind, count in self.kinds.items():
            took = self.seconds["original" if kind == "plain" else kind][i]
            total = [t + count * s for t, s in zip(total, took, strict=True)]
        clock, busy = (t / sum(self.kinds.values()) for t in total)
        return clock, busy


Measured = list[tuple[Entry, dict[str, Any]]]
"""Entries with their times so far."""


def step_inputs(model: tiny.TinyModel, steps: int) -> list[dict[str, Any]]:
    """Inputs of the steps of a generation of `TIMED_BATCH` pictures; only the time changes."""
    labels = torch.tensor(LABELS[:TIMED_BATCH])
    noise = torch.Generator().manual_seed(0)
    images = torch.randn(TIMED_BATCH, 3, tiny.SIZE, tiny.SIZE, generator=noise)
    tokens, pooled = model.conditioning(labels)
    times = torch.linspace(1, 0, steps + 1)
    return [
        tiny.FLOW.denoiser_inputs(model.name, images, t.expand(TIMED_BATCH), tokens, pooled)
        for t in times[:-1]
    ]


def measure_times(
    bench: Bench, wanted: Sequence[Entry], rounds: int, done: Callable[[Measured], None]
) -> None:
    """Compile every entry, then time all in turn; `done` gets the results after every round."""
    model, steps = bench.model, bench.steps
    inputs = step_inputs(model, steps)
    original = torch.compile(model.denoiser, dynamic=False)
    clocked(lambda: original(**inputs[0]))
    ready: list[tuple[Entry, Timed]] = []
    for entry in wanted:
        timed = Timed.of(entry.config(bench), model, steps)
        # not `round`: capture and compilation count, whatever the kind of step
        timed.compile_s = clocked(lambda timed=timed: timed.round(inputs))[0]
        print(f"{model.name} {entry.title}: compiled in {timed.compile_s:.0f} s", flush=True)
        ready.append((entry, timed))
    for i in range(-1, rounds):
        for _, timed in ready:
            base = clocked(lambda: original(**inputs[0]))
            took = timed.round(inputs)
            if i >= 0:
                timed.store(base, took)
        if i >= 0:
            done([(entry, timed.result()) for entry, timed in ready])
        print(f"{model.name}: round {i + 1} of {rounds}", flush=True)


# -- a run ----------------------------------------------------------------------------------------


def missing(package: str) -> SystemExit:
    """How to get a package that only this benchmark needs."""
    return SystemExit(
        f"benchmarks/methods.py needs {package}, which is not installed.\n"
        'Install it with: pip install "toma-fx[bench]"'
    )


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    spread = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
    return dict(zip(("low", "median", "high"), spread, strict=True))


def save(results: dict[str, Any], path: Path) -> None:
    """Write results, all or nothing; lists of numbers take one line."""
    text = json.dumps(rounded(results), indent=1)
    text = re.sub(r"\[[\s\d.,eE+-]+\]", lambda m: re.sub(r"\s+", " ", m[0]), text)
    write_file(path, text + "\n")


def rounded(value: Any) -> Any:
    """The same with five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def opened(args: argparse.Namespace) -> dict[str, Any]:
    """The result file to go on with, or a new one; this run is noted in it.

    Raises:
        SystemExit: the file's pictures have another number of steps.
    """
    results: dict[str, Any] = {
        "steps": args.steps,
        "prompts": list(tiny.CLASSES),
        "feature_time": FEATURE_TIME,
        "calibration": {"seed": CALIBRATION_SEED, "stride": CALIBRATION_STRIDE},
        "timed_batch": TIMED_BATCH,
        "runs": [],
        "models": {},
    }
    if args.resume and args.out.exists():
        results = json.loads(args.out.read_text())
        if results["steps"] != args.steps:
            raise SystemExit(f"{args.out} has pictures of {results['steps']} steps")
    found = versions()
    run = {
        "command": command_line(),
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "versions": found,
    }
    results["runs"].append(run)
    return results


def run_errors(args: argparse.Namespace, results: dict[str, Any], wanted: list[Entry]) -> None:
    """Draw the pictures of every entry and seed that the file lacks."""
    features = Features()
    benches = {name: Bench(name, args.steps) for name in args.models}
    for name, bench in benches.items():
        plain = [bench.pictures(seed) for seed in range(args.seeds)]
        results["models"].setdefault(name, {"rows": {}})["scale"] = scale(plain, features)
    for entry in wanted:
        for name, bench in benches.items():
            if name not in entry.models:
                continue
            row = row_of(results, name, entry)
            errors = row.setdefault("errors", {m: [] for m in MEASURES})
            seeds = range(len(errors["mse"]), args.seeds)
            if not seeds:
                continue
            config = entry.config(bench)
            optimized = toma_fx.optimize(bench.model.denoiser, method=config)
            for seed in seeds:
                found, known = bench.errors(optimized, seed, features)
                for measure in MEASURES:
                    errors[measure].append(found[measure])
            row.update(known, config=options_of(config), errors_run=len(results["runs"]) - 1)
            save(results, args.out)
            values = [e for row in errors["mse"] for e in row]
            print(f"{name} {entry.title}: {statistics.mean(values):.5f}", flush=True)


def run_times(args: argparse.Namespace, results: dict[str, Any], wanted: list[Entry]) -> None:
    """Time every entry that the file lacks the time of."""
    for name in args.models:
        rows = results["models"].setdefault(name, {"rows": {}})["rows"]

        def lacks(entry: Entry, rows: dict[str, Any] = rows) -> bool:
            time = rows.get(entry.title, {}).get("time")
            return time is None or time["step"]["rounds"] < args.rounds

        def done(measured: Measured, name: str = name) -> None:
            for entry, time in measured:
                row_of(results, name, entry)["time"] = {**time, "run": len(results["runs"]) - 1}
            save(results, args.out)

        todo = [e for e in wanted if e.timed and name in e.models and lacks(e)]
        if todo:
            measure_times(Bench(name, args.steps), todo, args.rounds, done)


def row_of(results: dict[str, Any], name: str, entry: Entry) -> dict[str, Any]:
    """The row of an entry, made if there is none."""
    known = {
        "placement": entry.placement,
        "method": entry.method,
        "detail": entry.detail,
        "ratio": entry.ratio,
    }
    row: dict[str, Any] = results["models"][name]["rows"].setdefault(entry.title, known)
    return row


def options_of(config: MethodConfig) -> dict[str, Any]:
    """A configuration's fields where they are not a new one's of the class."""
    usual = type(config)().to_dict()
    found = config.to_dict()
    if isinstance(found.get("ratios"), tuple):
        found["ratios"] = dict(found["ratios"])
    return {k: v for k, v in found.items() if k == "method" or v != usual[k]}


# -- showing --------------------------------------------------------------------------------------


def every(row: dict[str, Any], measure: str) -> list[float]:
    """A measure of all pictures of a row."""
    return [value for seed in row["errors"][measure] for value in seed]


def speed(results: dict[str, Any], row: dict[str, Any]) -> tuple[str, dict[str, float]] | None:
    """Which speed-up to show, and its quartiles: processor time where one thread ran."""
    time = row.get("time")
    if time is None:
        return None
    one = results["runs"][time["run"]]["threads"] == 1
    return ("processor_", time["speedup_processor"]) if one else ("", time["speedup"])


def milliseconds(results: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """Cells: mean step with quartiles, refresh and reuse step, speed-up with quartiles."""
    found = speed(results, row)
    if found is None:
        return ["", "", ""]
    prefix, ratio = found
    time = row["time"]

    def median(kind: str) -> str:
        return f"{time[kind][prefix + 'median_ms']:.1f}" if kind in time else "-"

    low, high = (time["step"][f"{prefix}{q}_ms"] for q in ("low", "high"))
    return [
        f"{median('step')} ({low:.1f} to {high:.1f})",
        f"{median('refresh')} / {median('reuse')}",
        f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})",
    ]


BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
HEAD = [
    "", "method", "tokens", "FLOPs refresh / reuse / schedule", "step ms", "refresh / reuse ms",
    "speed-up", "MSE ± sd", "of each seed", "median", "PSNR ± sd", "SSIM ± sd", "features ± sd",
]  # fmt: skip
"""MSE and features are in thousandths."""


def cells(results: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """The cells of a row, without its number."""
    gflop = row["gflop"]
    refresh, reuse = (gflop["original"] / gflop[k] for k in ("refresh", "reuse"))

    def spread(measure: str, digits: int, unit: float = 1.0) -> str:
        values = [value / unit for value in every(row, measure)]
        return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

    seeds = ", ".join(f"{1e3 * statistics.mean(s):.2f}" for s in row["errors"]["mse"])
    return [
        f"{row['method']}, {row['detail']}",
        ", ".join(f"{n:,} → {m:,}" for n, m in row["tokens"]),
        f"{refresh:.2f}x / {reuse:.2f}x / {row['ideal']:.2f}x",
        *milliseconds(results, row),
        spread("mse", 2, 1e-3),
        seeds,
        f"{1e3 * statistics.median(every(row, 'mse')):.2f}",
        spread("psnr", 1),
        spread("ssim", 3),
        spread("features", 2, 1e-3),
    ]


def ordered(rows: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that have errors, by placement, method and detail."""
    methods = [*SELECTIONS, "retom", "todo", "ca-tome"]

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        place = list(PLACEMENTS).index(row["placement"])
        return place, methods.index(row["method"]), row["ratio"] is None, row["detail"]

    return sorted((r for r in rows.values() if r.get("errors", {}).get("mse")), key=key)


def rows_table(results: dict[str, Any], name: str) -> list[str]:
    """The Markdown table of a model; empty columns are left out."""
    lines: list[list[str]] = []
    rows = ordered(results["models"][name]["rows"])
    for number, row in enumerate(rows, 1):
        if number == 1 or row["placement"] != rows[number - 2]["placement"]:
            lines.append(["", f"**{row['placement']}**", *[""] * (len(HEAD) - 2)])
        lines.append([str(number), *cells(results, row)])
    used = [i for i in range(len(HEAD)) if i < 2 or any(line[i] for line in lines)]
    return table([HEAD[i] for i in used], [[line[i] for i in used] for line in lines])


def paired(ours: dict[str, Any], theirs: dict[str, Any], measure: str) -> tuple[float, ...]:
    """Geometric mean of an error of ours over theirs, its 95 % interval, share of pictures won.

    The interval is of a bootstrap over prompts: pictures of one prompt are no independent samples.
    """
    logs = [
        [math.log(max(a, 1e-12) / max(b, 1e-12)) for a, b in zip(x, y, strict=True)]
        for x, y in zip(ours["errors"][measure], theirs["errors"][measure], strict=False)
    ]
    prompts = [statistics.mean(column) for column in zip(*logs, strict=True)]
    draw = random.Random(0)
    means = sorted(statistics.mean(draw.choices(prompts, k=len(prompts))) for _ in range(10_000))
    won = statistics.mean(value < 0 for seed in logs for value in seed)
    bounds = (statistics.mean(prompts), means[249], means[9750])
    return (*(math.exp(b) for b in bounds), won)


def pairs(rows: Mapping[str, dict[str, Any]]) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    """(ToMA's row, another method's), of the same placement and ratio."""
    for row in ordered(rows):
        if row["ratio"] is None or row["method"] == "toma":
            continue
        ours = rows.get(f"{row['placement']}: toma, {row['detail']}", {})
        if ours.get("errors", {}).get("mse"):
            yield ours, row


def pairs_table(results: dict[str, Any], name: str) -> list[str]:
    """The Markdown table of ToMA's selection against the others, picture by picture."""
    head = ["placement", "ratio", "against", "MSE ratio", "95 % interval", "pictures better",
            "feature ratio", "95 % interval"]  # fmt: skip
    lines = []
    for ours, row in pairs(results["models"][name]["rows"]):
        mse, low, high, won = paired(ours, row, "mse")
        count = len(every(row, "mse"))
        feature, below, above, _ = paired(ours, row, "features")
        lines.append([
            row["placement"], f"{row['ratio']}", row["method"],
            f"{mse:.2f}", f"{low:.2f} to {high:.2f}", f"{round(won * count)} of {count}",
            f"{feature:.2f}", f"{below:.2f} to {above:.2f}",
        ])  # fmt: skip
    return table(head, lines)


def scale_text(found: dict[str, dict[str, float]]) -> list[str]:
    """What the measures say of unmerged pictures that differ for another reason."""
    lines = []
    for name, of in found.items():
        lines.append(
            f"For comparison, unmerged pictures of {name}: MSE {1e3 * of['mse']:.0f}, "
            f"PSNR {of['psnr']:.1f}, SSIM {of['ssim']:.3f}, features {1e3 * of['features']:.0f}."
        )
    return lines


def shown(results: dict[str, Any]) -> str:
    """Every table, in Markdown."""
    lines: list[str] = []
    for name, found in results["models"].items():
        lines += [f"### {name}", "", *rows_table(results, name), ""]
        lines += [*scale_text(found.get("scale", {})), ""]
        lines += [f"### {name}: the error of ToMA's selection over that of another", ""]
        lines += [*pairs_table(results, name), ""]
    return "\n".join(lines)


# -- picture --------------------------------------------------------------------------------------

COLORS = {
    "toma": "#d62728", "random": "#7f7f7f", "grid": "#000000", "tomesd": "#1f77b4",
    "tofu": "#17becf", "retom": "#2ca02c", "todo": "#ff7f0e", "ca-tome": "#9467bd",
}  # fmt: skip
MARKERS = {"published": "D", "stack": "o", "attention": "s", "stack, first half": "^"}


@dataclass(frozen=True)
class Point:
    """A row's number in the table, where it lies, and its color."""

    number: int
    at: tuple[float, float]
    color: str


def position(results: dict[str, Any], row: dict[str, Any]) -> tuple[dict[str, float], bool]:
    """Speed-up with its quartiles, and whether it was measured; else that of the FLOPs."""
    found = speed(results, row)
    if found is not None:
        return found[1], True
    return dict.fromkeys(("low", "median", "high"), row["ideal"]), False


def load_pyplot() -> Any:
    """matplotlib's pyplot, without a display; the error names the package if it is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ModuleNotFoundError:
        raise missing("matplotlib") from None
    return pyplot


def picture(results: dict[str, Any], path: Path) -> None:
    """A PNG: median error, with quartiles over pictures, against speed-up; a panel each model."""
    pyplot = load_pyplot()
    names = list(results["models"])
    figure, axes = pyplot.subplots(1, len(names), figsize=(8.5 * len(names), 7.5), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        panel(axis, results, name)
    legend(figure)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)


def panel(axis: Any, results: dict[str, Any], name: str) -> None:
    """One model; points have the numbers of their rows in the table."""
    rows = ordered(results["models"][name]["rows"])
    places = [position(results, row) for row in rows]
    measured = any(known for _, known in places)
    points: list[Point] = []
    for number, (row, (x, known)) in enumerate(zip(rows, places, strict=True), 1):
        if known != measured:
            continue
        error = quartiles(every(row, "mse"))
        style = {"color": COLORS[row["method"]], "marker": MARKERS[row["placement"]]}
        at = (x["median"], error["median"])
        bars = {
            "xerr": [[at[0] - x["low"]], [x["high"] - at[0]]],
            "yerr": [[at[1] - error["low"]], [error["high"] - at[1]]],
        }
        axis.errorbar(*at, **bars, **style, ms=7, mec="white", elinewidth=0.4, zorder=2)
        points.append(Point(number, at, style["color"]))
    join_ratios(axis, rows, points)
    axis.set_yscale("log")
    axis.margins(0.08)
    axis.grid(True, which="both", alpha=0.2)
    axis.set_title(name)
    kind = "measured" if measured else "from FLOPs (not measured)"
    axis.set_xlabel(f"speed-up of a mean step of the schedule, {kind}")
    axis.set_ylabel("squared error of the picture: median, quartiles over pictures")
    axis.figure.canvas.draw()
    write_numbers(axis, points)


def join_ratios(axis: Any, rows: Sequence[dict[str, Any]], points: Sequence[Point]) -> None:
    """Lines through the ratios of one method in one placement."""
    lines: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        row = rows[point.number - 1]
        if row["ratio"] is not None:
            lines.setdefault((row["placement"], row["method"]), []).append(point)
    for line in lines.values():
        axis.plot(*zip(*(p.at for p in line), strict=True), color=line[0].color, lw=0.8, zorder=1)


def write_numbers(axis: Any, points: Sequence[Point]) -> None:
    """Numbers beside their points, each at the free place nearest to its point."""
    from matplotlib.patheffects import withStroke

    spots = [axis.transData.transform(point.at) for point in points]
    taken: list[tuple[float, float]] = []
    ring = [
        (r * math.cos(a), r * math.sin(a))
        for r in (13, 20, 28, 38, 50, 64)
        for a in [math.pi * k / 8 for k in range(16)]
    ]
    for point, spot in zip(points, spots, strict=True):

        def free(move: tuple[float, float], spot: Any = spot) -> bool:
            x, y = spot[0] + move[0], spot[1] + move[1]
            clear = all(abs(x - a) > 17 or abs(y - b) > 12 for a, b in taken)
            return clear and all(abs(x - a) > 12 or abs(y - b) > 10 for a, b in spots)

        move = next(filter(free, ring), ring[0])
        taken.append((spot[0] + move[0], spot[1] + move[1]))
        thin = {"arrowstyle": "-", "lw": 0.4, "color": point.color, "shrinkA": 0, "shrinkB": 2}
        far = math.hypot(*move) > 16
        axis.annotate(
            str(point.number), point.at, tuple(m * 72 / axis.figure.dpi for m in move),
            textcoords="offset points", ha="center", va="center", fontsize=7.5,
            color=point.color, arrowprops=thin if far else None, zorder=3,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip


def legend(figure: Any) -> None:
    """What colors and marks mean, below the panels."""
    from matplotlib.lines import Line2D

    colors = [Line2D([], [], color=c, marker="o", ls="", label=m) for m, c in COLORS.items()]
    marks = [
        Line2D([], [], color="none", mec="black", marker=m, ls="", label=p)
        for p, m in MARKERS.items()
    ]
    for handles, height in ((colors, 0.025), (marks, 0.0)):
        at = {"loc": "lower center", "bbox_to_anchor": (0.5, height)}
        figure.legend(handles=handles, ncols=len(handles), frameon=False, **at)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path)
    add("--resume", action="store_true", help="go on with the file: run only what it lacks")
    add("--seeds", type=int, default=2, help="noise seeds, each with all twelve prompts")
    add("--steps", type=int, default=20)
    add("--rounds", type=int, default=15, help="of timing")
    add("--only", nargs="+", default=[""], help="entries whose title holds any of these")
    add("--models", nargs="+", choices=tiny.NAMES, default=list(tiny.NAMES))
    add("--no-time", action="store_true")
    add("--no-errors", action="store_true")
    add("--table", type=Path, metavar="FILE", help="print tables of a result file; run nothing")
    add("--page", type=Path, help="with --table: put the tables there, between its marks")
    add("--plot", type=Path, nargs=2, metavar=("FILE", "PNG"), help="draw a result file")
    args = parser.parse_args()
    if not (args.out or args.table or args.plot):
        parser.error("one of --out, --table and --plot is needed")
    return args


def main() -> None:
    """Run, print or draw."""
    args = parse()
    torch.set_grad_enabled(False)
    if args.table:
        show(shown(json.loads(args.table.read_text())), args.page, BEGIN, END)
    if args.plot:
        picture(json.loads(args.plot[0].read_text()), args.plot[1])
    if args.out is None:
        return
    results = opened(args)
    wanted = [e for e in entries() if any(part in e.title for part in args.only)]
    if not args.no_errors:
        run_errors(args, results, wanted)
    if not args.no_time:
        run_times(args, results, wanted)


if __name__ == "__main__":
    main()

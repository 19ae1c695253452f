"""Error against speed of merging, of step caching, of both, and of other libraries' step caches.

    python benchmarks/frontier.py --out benchmarks/results/frontier-cpu.json --plot FILE.svg
    python benchmarks/frontier.py --out FILE --resume --groups caching both   # add what lacks
    python benchmarks/frontier.py --out FILE --quick                          # does it run?

On the two embedded models, from the same noise. A row is a configuration; rows of one curve differ
in one option. For each row all twelve prompts and `--seeds` noise seeds are drawn eagerly, each
seed's pictures as one batch, and compared with the unoptimized model's:

    mse, psnr, ssim    of pictures in [-1, 1]: peak 2 for PSNR, windows of 7x7 for SSIM
    gflop              of a picture's whole generation, as torch's FlopCounterMode counts it; the
                       selection of ToMA, one operator, counts nothing
    kept_mib           most that was kept between two steps, a picture

Caches that decide by thresholds decide once for a batch. Speed is measured on whole generations of
`--timed-batch` pictures, each beside one of the original, in turn, round after round: eagerly, and
through `torch.compile` if not `--no-compile`. Only rows on the front of their group (none is better
in error and in counted FLOPs) are timed, if not `--time all`. `counted` beside a measured speed-up
is that of the same generation: where thresholds decide, it differs from that of the pictures.

Other libraries: benchmarks/peers.py. What does not run says why, under `unavailable`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from common import command_line, device_name, versions
from denoiser import clocked, summary
from methods import LABELS, SELECTIONS, Bench, Entry, load_pyplot, quartiles, save
from peers import EVERY, LAST, NOTES, WARMUP, System, Unavailable, kept_bytes, peers
from recipes import SPEEDS, beaten, described, recipe_for
from table import table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import toma_fx
from toma_fx.measure.scores import psnr, ssim
from toma_fx.models import tiny

GROUPS = ("merging", "caching", "both", "recipe", "peer")
RATIOS = (0.25, 0.5, 0.75)
SCOPES = {tiny.NAMES[0]: ("deep", "shallow", "stack"), tiny.NAMES[1]: ("stack",)}
"""Of step caching, the best first. Blocks by themselves give what a stack gives."""
SDXL, FLUX = (tiny.NAMES[0],), (tiny.NAMES[1],)
QUICK = (
    "toma, stack: ratio 0.5", "order 1: every 3", "ratio 0.25, every 3",
    "FirstBlockCache: threshold 0.2", "DeepCache branch 1: every 3", "DBCache: threshold 0.1",
)  # fmt: skip
"""What --quick runs: rows whose title holds one of these."""

# -- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A configuration.

    Attributes:
        group: one of GROUPS. curve: what it has in common with the rows that it is joined with.
        detail: what distinguishes it from them. models: it is run on.
        open: makes the system. options: for the record.
    """

    group: str
    curve: str
    detail: str
    models: tuple[str, ...]
    open: Callable[[Bench], System]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Its key in the result file."""
        return f"{self.group}, {self.curve}: {self.detail}"


class Optimized(System):
    """A denoiser of this package, whose generations are told."""

    def __init__(self, denoiser: Any, steps: int) -> None:
        super().__init__(denoiser, steps)
        self._told: Any = None
        self.described: dict[str, Any] = {}

    def compile(self) -> None:
        """Compile every program."""
        self.denoiser.compile()

    @contextmanager
    def generation(self) -> Iterator[None]:
        """A told generation."""
        with self.denoiser.generation(steps=self.steps) as self._told:
            yield

    def step(self, index: int, inputs: dict[str, Any]) -> Any:
        """A told step."""
        self._told.step(index)
        return self.run(**inputs)

    def kept(self) -> Any:
        """Kept tensors of all passes."""
        return [state.buffers for state in self.denoiser.states]


def optimized(bench: Bench, cache: Mapping[str, Any] | None = None, **options: Any) -> System:
    """A model with merging, step caching or both.

    Raises:
        Unavailable: this version has no step caching, or finds nothing to do.
    """
    if cache is not None:
        config = getattr(toma_fx, "CacheConfig", None)
        if config is None:
            raise Unavailable(f"toma_fx {toma_fx.__version__} has no CacheConfig")
        options["cache"] = config(**cache)
    return Optimized(toma_fx.optimize(bench.model.denoiser, **options), bench.steps)


def rows() -> list[Row]:
    """All of them."""
    return [*_merging(), *_caching(), *_both(), *_recipes(), *_peers()]


def _merging() -> Iterator[Row]:
    """Every method where docs/methods-compared.md finds it best on that model."""
    for entry in _entries():
        yield Row(
            "merging", f"{entry.method}, {entry.placement}", entry.detail, entry.models,
            lambda bench, entry=entry: optimized(bench, method=entry.config(bench)),
            {"placement": entry.placement, **entry.options},
        )  # fmt: skip


def _entries() -> Iterator[Entry]:
    for ratio in RATIOS:
        for method, options in SELECTIONS.items():
            placements = {SDXL: ["attention"], FLUX: ["stack"]}
            if method == "toma":
                placements = {SDXL: ["attention", "stack"], FLUX: ["stack", "stack, first half"]}
            for models, names in placements.items():
                for name in names:
                    given = {**options, "ratio": ratio}
                    yield Entry(name, method, f"ratio {ratio}", given, models)
        yield Entry("published", "retom", f"ratio {ratio}", {"window": 2, "ratio": ratio})
    yield Entry("published", "todo", "factor 2", {"factor": 2, "downsample": "average"})
    for threshold in (0.7, 0.9):
        detail = f"threshold {threshold}"
        yield Entry("published", "ca-tome", detail, threshold=threshold, models=SDXL)


def _cache(every: int, order: int, scope: str) -> dict[str, Any]:
    schedule = {"every": every, "warmup_steps": WARMUP, "warmup_interval": 2, "last_steps": LAST}
    return {**schedule, "order": order, "scope": scope}


def _caching() -> Iterator[Row]:
    for preset in ("lossless", "balanced", "fast"):
        yield Row(
            "caching", "presets", preset, (*SDXL, *FLUX),
            lambda bench, preset=preset: optimized(bench, toma=preset), {"toma": preset},
        )  # fmt: skip
    for preset in ("lossless", "balanced", "fast"):
        cache = {"steps_mask": preset, "scope": "shallow"}
        yield Row(
            "caching", "presets, shallow", preset, SDXL,
            lambda bench, cache=cache: optimized(bench, cache, toma=False), cache,
        )  # fmt: skip
    for name, scopes in SCOPES.items():
        for scope in scopes:
            for order in (1, 0, 2):
                for n in EVERY:
                    cache = _cache(n, order, scope)
                    yield Row(
                        "caching", f"{scope}, order {order}", f"every {n}", (name,),
                        lambda bench, cache=cache: optimized(bench, cache, toma=False),
                        cache,
                    )  # fmt: skip


def _both() -> Iterator[Row]:
    """ToMA where it merges best, and what caching does best at a time."""
    for name, scopes in SCOPES.items():
        placement = "attention" if name == SDXL[0] else "stack"
        for ratio in (0.1, 0.25):
            for n in EVERY[1:3]:
                yield _both_row(name, placement, scopes[0], ratio, n)


def _both_row(name: str, placement: str, scope: str, ratio: float, every: int) -> Row:
    entry = Entry(placement, "toma", f"ratio {ratio}", {"ratio": ratio})
    cache = _cache(every, 1, scope)
    return Row(
        "both", f"toma, {placement} + {scope}, order 1", f"ratio {ratio}, every {every}", (name,),
        lambda bench: optimized(bench, cache, method=entry.config(bench)),
        {"placement": placement, "ratio": ratio, "cache": cache},
    )  # fmt: skip


def _recipes() -> Iterator[Row]:
    for speed in SPEEDS:
        yield Row(
            "recipe", "tuned", f"for {speed:g}x", (*SDXL, *FLUX),
            lambda bench, speed=speed: tuned(bench, speed),
        )  # fmt: skip


def tuned(bench: Bench, speed: float) -> System:
    """A model with the recipe for a speed."""
    recipe = recipe_for(bench.model, speed, bench.steps)
    system = Optimized(toma_fx.optimize(bench.model.denoiser, recipe), bench.steps)
    system.described = described(recipe)
    return system


def _peers() -> Iterator[Row]:
    for peer in peers():
        yield Row(
            "peer", peer.curve, peer.detail, peer.models,
            lambda bench, peer=peer: peer.open(bench.model, bench.steps), peer.options,
        )  # fmt: skip


# -- error ----------------------------------------------------------------------------------------


def differences(got: Tensor, want: Tensor) -> dict[str, list[float]]:
    """Every measure of each pair of pictures [B, 3, H, W]."""
    mse = (got - want).square().mean((1, 2, 3)).tolist()
    decibels = [min(value, 120.0) for value in psnr(got, want, peak=2.0)]
    return {"mse": mse, "psnr": decibels, "ssim": ssim(got, want, peak=2.0)}


def _attention_flops(
    query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return sdpa_flop_count(query, key, value)


ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""What torch's table of formulas lacks."""


def count_flops(run: Callable[[], Any]) -> tuple[Any, float]:
    """(what `run` returns, FLOPs of it)"""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        result = run()
    return result, float(counter.get_total_flops())


def plain_pictures(bench: Bench, labels: Sequence[int], seed: int) -> Tensor:
    """Those of the unoptimized model, from the noise of the same batch."""
    if seed not in bench.plain:
        bench.plain[seed] = bench.model.generate(labels, seed=seed, steps=bench.steps)
    return bench.plain[seed]


def draw_row(bench: Bench, system: System, labels: Sequence[int], seed: int) -> dict[str, Any]:
    """Differences, GFLOP and kept MiB a picture, of the pictures of a seed."""
    kept = [0]

    def after() -> None:
        kept.append(kept_bytes(system))

    got, flops = count_flops(lambda: system.draw(bench.model, labels, seed, after))
    want, count = plain_pictures(bench, labels, seed), len(labels)
    return {
        **differences(got, want),
        "gflop": flops / count / 1e9,
        "kept_mib": max(kept) / count / 2**20,
    }


def run_pictures(args: argparse.Namespace, results: dict[str, Any], wanted: list[Row]) -> None:
    """Draw what the file lacks: the first seed of all rows, then the next."""
    benches = {name: Bench(name, args.steps) for name in args.models}
    for name, bench in benches.items():
        plain = System(bench.model.denoiser, args.steps)
        _, flops = count_flops(lambda p=plain, b=bench: p.draw(b.model, [0], 0))
        results["models"].setdefault(name, {"gflop": flops / 1e9, "rows": {}})
    for seed in range(args.seeds):
        for row in wanted:
            for name in row.models:
                if name in benches and lacks(results, name, row, seed):
                    add_pictures(args, results, benches[name], row, seed)


def lacks(results: dict[str, Any], name: str, row: Row, seed: int) -> bool:
    """Whether a row's pictures of a seed have not been drawn; what is unavailable is tried anew."""
    found = results["models"][name]["rows"].get(row.title, {})
    return "unavailable" in found or len(found.get("mse", ())) <= seed


def add_pictures(
    args: argparse.Namespace, results: dict[str, Any], bench: Bench, row: Row, seed: int
) -> None:
    """Draw a row's pictures of a seed, and save."""
    known = {k: getattr(row, k) for k in ("group", "curve", "detail")}
    known["options"] = dict(row.options)
    rows_, run = results["models"][bench.model.name]["rows"], len(results["runs"]) - 1
    if "unavailable" in rows_.get(row.title, {}):
        if rows_[row.title]["unavailable"]["run"] == run:
            return
        del rows_[row.title]
    entry = rows_.setdefault(row.title, known)
    start = time.perf_counter()
    try:
        system = row.open(bench)
        if isinstance(system, Optimized):  # what is counted is not how programs are made
            system.draw(bench.model, args.labels, seed)
            entry["options"] = {**row.options, **system.described}
        found = draw_row(bench, system, args.labels, seed)
    except Exception as error:  # a row that fails must not end the others
        reason = (
            str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"
        )
        entry["unavailable"] = {"reason": reason.strip().splitlines()[0][:300], "run": run}
        print(f"{bench.model.name} {row.title}: {reason[:200]}", flush=True)
        save(results, args.out)
        return
    for measure, value in found.items():
        entry.setdefault(measure, []).append(value)
    entry["run"] = run
    entry.update(figures(entry, results["models"][bench.model.name]["gflop"]))
    save(results, args.out)
    print(
        f"{bench.model.name} {row.title}, seed {seed}: {entry['counted_speedup']:.2f}x, "
        f"{entry['psnr_mean']:.1f} dB ({time.perf_counter() - start:.0f} s)",
        flush=True,
    )


def every(entry: Mapping[str, Any], measure: str) -> list[float]:
    """A measure of all pictures of a row."""
    return [value for seed in entry[measure] for value in seed]


def figures(entry: Mapping[str, Any], gflop: float) -> dict[str, float]:
    """Means over all pictures, and the speed-up by counted FLOPs."""
    psnr = every(entry, "psnr")
    return {
        "mse_mean": statistics.mean(every(entry, "mse")),
        "psnr_mean": statistics.mean(psnr),
        "psnr_min": min(psnr),
        "ssim_mean": statistics.mean(every(entry, "ssim")),
        "counted_speedup": gflop / max(statistics.mean(entry["gflop"]), 1e-9),
    }


# -- speed ----------------------------------------------------------------------------------------


def front(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Titles of rows that none beats in PSNR and in counted speed, slow ones first."""
    order = sorted(
        entries, key=lambda t: (-entries[t]["counted_speedup"], -entries[t]["psnr_mean"])
    )
    best, found = -math.inf, []
    for title in order:
        if entries[title]["psnr_mean"] > best:
            best = entries[title]["psnr_mean"]
            found.append(title)
    return found[::-1]


def measured(results: dict[str, Any], name: str, group: str) -> dict[str, dict[str, Any]]:
    """Rows of a group that have pictures."""
    rows_ = results["models"].get(name, {}).get("rows", {})
    return {t: e for t, e in rows_.items() if e["group"] == group and "psnr_mean" in e}


@dataclass
class Timed:
    """A row's system, and seconds of its generations.

    Attributes:
        counted: speed-up by FLOPs of the generation that is timed. compile_s: of its first run.
        seconds: of every round, with those of the original's generation before it.
    """

    row: Row
    system: System
    counted: float
    compile_s: float
    seconds: list[tuple[tuple[float, float], tuple[float, float]]] = field(default_factory=list)

    def result(self) -> dict[str, Any]:
        """Times, and speed-ups by the clock and by processor time."""
        own = [took for _, took in self.seconds]
        found: dict[str, Any] = {"generation": summary(own), "counted": self.counted}
        found["original"] = summary([base for base, _ in self.seconds])
        for at, key in enumerate(("speedup", "speedup_processor")):
            found[key] = quartiles([base[at] / took[at] for base, took in self.seconds])
        return {**found, "compile_s": self.compile_s}


def run_times(args: argparse.Namespace, results: dict[str, Any], wanted: list[Row]) -> None:
    """Time what is on the front of its group, or all."""
    for name in args.models:
        bench = Bench(name, args.steps)
        chosen = {
            title
            for group in GROUPS
            for entries in [measured(results, name, group)]
            for title in (front(entries) if args.time == "front" else entries)
        }
        for mode in ("eager", "compiled")[: 1 if args.no_compile else 2]:
            entries = results["models"].get(name, {}).get("rows", {})
            todo = [
                row
                for row in wanted
                if name in row.models and row.title in chosen and mode not in entries[row.title]
            ]
            if todo:
                time_rows(args, results, bench, todo, mode)


def time_rows(
    args: argparse.Namespace, results: dict[str, Any], bench: Bench, todo: list[Row], mode: str
) -> None:
    """Time rows in turn, each beside the original."""
    labels, compiled = list(LABELS[: args.timed_batch]), mode == "compiled"
    entries, run = results["models"][bench.model.name]["rows"], len(results["runs"]) - 1
    plain = System(bench.model.denoiser, args.steps)
    _, flops = count_flops(lambda: plain.draw(bench.model, labels, 0))
    if compiled:
        plain.compile()
        plain.draw(bench.model, labels, 0)
    ready: list[Timed] = []
    for row in todo:
        try:
            ready.append(prepare(bench, row, labels, flops, compiled))
            print(f"{row.title}, {mode}: ready, {ready[-1].compile_s:.0f} s", flush=True)
        except Exception as error:
            entries[row.title][mode] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            print(f"{row.title}, {mode}: {type(error).__name__}: {error}"[:300], flush=True)
    for i in range(args.rounds):
        for timed in ready:
            base = clocked(lambda: plain.draw(bench.model, labels, 0))
            took = clocked(lambda timed=timed: timed.system.draw(bench.model, labels, 0))
            timed.seconds.append((base, took))
        for timed in ready:
            entries[timed.row.title][mode] = {**timed.result(), "run": run}
        save(results, args.out)
        print(f"{bench.model.name}, {mode}: round {i + 1} of {args.rounds}", flush=True)


def prepare(bench: Bench, row: Row, labels: Sequence[int], flops: float, compiled: bool) -> Timed:
    """A row's system after a first generation."""
    system = row.open(bench)
    system.draw(bench.model, labels, 0)
    _, own = count_flops(lambda: system.draw(bench.model, labels, 0))
    seconds = 0.0
    if compiled:
        system.compile()
        seconds = clocked(lambda: system.draw(bench.model, labels, 0))[0]
        system.draw(bench.model, labels, 0)
    return Timed(row, system, flops / max(own, 1.0), seconds)


# -- showing --------------------------------------------------------------------------------------

HEAD = [
    "group", "curve", "", "counted", "PSNR", "lowest", "SSIM", "MSE", "kept MiB", "eager",
    "compiled", "front",
]  # fmt: skip
HIGHEST = 70.0
"""dB that the picture shows: what skips nothing has 126."""
LABEL = {
    "merging": "token merging, every method", "caching": "step caching",
    "both": "merging and caching", "recipe": "recipes of the tuner",
    "peer": "other libraries, fewer steps",
}  # fmt: skip
COLORS = {
    "merging": "#1f77b4", "caching": "#2ca02c", "both": "#9467bd", "recipe": "#d62728",
    "peer": "#7f7f7f",
}  # fmt: skip


def shown(results: dict[str, Any]) -> str:
    """A table of each model, in Markdown."""
    lines: list[str] = []
    for name, found in results["models"].items():
        fronts = {t for g in GROUPS for t in front(measured(results, name, g))}
        cells = [
            row_cells(entry, title in fronts)
            for group in GROUPS
            for title, entry in found["rows"].items()
            if entry["group"] == group
        ]
        lines += [f"### {name}", "", *table(HEAD, cells), ""]
    return "\n".join(lines)


def compared(results: dict[str, Any]) -> str:
    """Each recipe beside the best row of this project that is as fast, in Markdown."""
    cells = []
    for name, found in results["models"].items():
        for title, entry in measured(results, name, "recipe").items():
            other = beaten(found["rows"], title)
            if other:
                low, high = other["interval"]
                best = found["rows"][other["best"]]
                cells.append([
                    name, f"{entry['counted_speedup']:.2f}x", f"{entry['psnr_mean']:.1f} dB",
                    f"{1e3 * entry['mse_mean']:.3f}e-3",
                    f"{other['best'].partition(', ')[2]} ({best['counted_speedup']:.2f}x)",
                    f"{other['quotient']:.2f} ({low:.2f} to {high:.2f})", str(other["pictures"]),
                ])  # fmt: skip
    head = ["model", "recipe", "PSNR", "squared error", "best other", "quotient", "pictures"]
    return "\n".join(table(head, cells))


def row_cells(entry: Mapping[str, Any], on_front: bool) -> list[str]:
    """The cells of a row."""
    head = [entry["group"], entry["curve"], entry["detail"]]
    if "psnr_mean" not in entry:
        return [*head, entry["unavailable"]["reason"], *[""] * (len(HEAD) - 4)]
    return [
        *head,
        f"{entry['counted_speedup']:.2f}x",
        f"{entry['psnr_mean']:.1f}",
        f"{entry['psnr_min']:.1f}",
        f"{entry['ssim_mean']:.3f}",
        f"{1e3 * entry['mse_mean']:.2f}e-3",
        f"{max(entry['kept_mib']):.2f}",
        *(speed_cell(entry.get(mode)) for mode in ("eager", "compiled")),
        "yes" if on_front else "",
    ]


def speed_cell(found: Mapping[str, Any] | None) -> str:
    """Measured speed-up, by the clock and by processor time."""
    if found is None or "speedup" not in found:
        return "failed" if found else ""
    clock, busy = found["speedup"]["median"], found["speedup_processor"]["median"]
    return f"{clock:.2f}x ({busy:.2f}x)"


def picture(results: dict[str, Any], path: Path, measured_too: bool = False) -> None:
    """PSNR over speed with the front of each group; a panel each model.

    Args:
        measured_too: whether speed is that of eager generations by the clock; rows that were not
            timed are left out then. Else it is counted.
    """
    pyplot = load_pyplot()
    names = list(results["models"])
    figure, axes = pyplot.subplots(1, len(names), figsize=(8 * len(names), 6.5), squeeze=False)
    speed = "measured, eager" if measured_too else "from counted FLOPs"
    for axis, name in zip(axes[0], names, strict=True):
        for group in GROUPS:
            entries = measured(results, name, group)
            if measured_too:
                entries = {t: e for t, e in entries.items() if "speedup" in e.get("eager", {})}
            draw_group(axis, entries, group, measured_too)
        axis.set_title(name)
        axis.set_xscale("log", base=2)
        axis.set_ylim(top=HIGHEST)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.set_xlabel(f"speed-up of a generation, {speed}")
        axis.set_ylabel("PSNR against the unoptimized model, mean of all pictures (dB)")
        axis.grid(True, which="both", alpha=0.2)
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_group(
    axis: Any, entries: Mapping[str, Mapping[str, Any]], group: str, measured_too: bool
) -> None:
    """Points of a group, and a line through those on its front."""
    if not entries:
        return

    def at(title: str) -> tuple[float, float]:
        entry = entries[title]
        speed = entry["eager"]["speedup"]["median"] if measured_too else entry["counted_speedup"]
        return speed, entry["psnr_mean"]

    best, color = front(entries), COLORS[group]
    axis.scatter(*zip(*map(at, entries), strict=True), s=12, color=color, alpha=0.35, lw=0)
    line = sorted(map(at, best))
    axis.plot(*zip(*line, strict=True), color=color, marker="o", ms=4, label=LABEL[group])
    for title in best:
        entry = entries[title]
        axis.annotate(
            f"{entry['curve'].removeprefix('diffusers ')}, {entry['detail']}", at(title), (4, 3),
            textcoords="offset points", fontsize=4.5, color=color, clip_on=True,
        )  # fmt: skip


# -- a run ----------------------------------------------------------------------------------------


def opened(args: argparse.Namespace) -> dict[str, Any]:
    """The result file to go on with, or a new one; this run is noted in it."""
    results: dict[str, Any] = {
        "name": "frontier", "steps": args.steps, "labels": args.labels,
        "timed_batch": args.timed_batch, "runs": [], "models": {},
    }  # fmt: skip
    if args.resume and args.out.exists():
        results = json.loads(args.out.read_text())
        for key in ("steps", "labels", "timed_batch"):
            if results[key] != getattr(args, key):
                raise SystemExit(f"{args.out} has {key} {results[key]}")
    results["notes"] = NOTES
    found = versions()
    for package in ("cache-dit", "DeepCache"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    results["runs"].append({
        "command": command_line(), "date": datetime.date.today().isoformat(),
        "device": device_name(), "threads": torch.get_num_threads(), "versions": found,
    })  # fmt: skip
    return results


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--resume", action="store_true", help="go on with the file: run only what it lacks")
    add("--seeds", type=int, default=3, help="noise seeds, each with all twelve prompts")
    add("--steps", type=int, default=20)
    add("--models", nargs="+", choices=tiny.NAMES, default=list(tiny.NAMES))
    add("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    add("--only", nargs="+", default=[""], help="rows whose title holds any of these")
    add("--time", choices=("front", "all", "none"), default="front", help="what is timed")
    add("--rounds", type=int, default=5, help="of timing")
    add("--timed-batch", type=int, default=1, help="pictures of a timed generation")
    add("--no-compile", action="store_true", help="time eagerly alone")
    add("--no-pictures", action="store_true", help="draw nothing: time what the file has")
    add("--quick", action="store_true", help="a few rows, two prompts, one seed: does it run?")
    add("--plot", type=Path, metavar="FILE", help="draw the fronts, as SVG or PNG")
    add("--plot-measured", type=Path, metavar="FILE", help="the same over measured speed")
    add("--goal", action="store_true", help="print recipes beside the best other rows")
    add("--table", action="store_true", help="print tables at the end")
    args = parser.parse_args()
    args.labels = list(LABELS)
    if args.quick:
        args.labels, args.seeds, args.rounds, args.no_compile = list(LABELS[:2]), 1, 1, True
        args.only = list(QUICK)
    return args


def main() -> None:
    """Run, time, draw and print."""
    args = parse()
    torch.set_grad_enabled(False)
    # copies of one model share their code: the usual limit would leave most of them uncompiled
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
    results = opened(args)
    wanted = [r for r in rows() if r.group in args.groups and any(o in r.title for o in args.only)]
    if not args.no_pictures:
        run_pictures(args, results, wanted)
    if args.time != "none":
        run_times(args, results, wanted)
    if args.plot:
        picture(results, args.plot)
    if args.plot_measured:
        picture(results, args.plot_measured, measured_too=True)
    if args.goal:
        print(compared(results))
    if args.table:
        print(shown(results))


if __name__ == "__main__":
    main()

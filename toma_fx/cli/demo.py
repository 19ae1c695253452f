"""The demo: both embedded models, original against merged and cached, through Inductor."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from toma_fx.api import explain, optimize
from toma_fx.cli.demo_outcome import NOISY, PASS, Cached, Outcome, Timer
from toma_fx.cli.demo_page import page_of_demo
from toma_fx.cli.demo_sheet import CROP, Row, draw_sheet, heat, picture, token_crop
from toma_fx.measure.scores import psnr, ssim
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.cache import CacheConfig
from toma_fx.methods.toma import ToMAConfig
from toma_fx.models import tiny
from toma_fx.run.denoiser import OptimizedDenoiser
from toma_fx.run.report import Report

LABELS = (0, 2, 4, 10)
STEPS = 20
OPTIONS: dict[str, dict[str, Any]] = {"tiny-sdxl": {}, "tiny-flux": {"last_step": 9}}
"""What the demo sets besides the default. Without a VAE every Flux token is four noisy pixels:
steps that merge to the very end leave noise in the picture (docs/default.md)."""
PRESET = "balanced"
"""What the demo shows beside merging: the fastest preset that passes `PASS`."""
ROUNDS, QUICK_ROUNDS = 12, 4
GENERATIONS = 3
SHEET, PAGE = "contact-sheet.png", "index.html"


def show_demo(args: argparse.Namespace, options: dict[str, Any], console: Console) -> None:
    """Run the demo and print its times."""
    names = tiny.NAMES if args.model is None else (args.model,)
    outcomes = run_demo(args.out, console, options, names, quick=args.quick)
    table = Table(
        title="time a step, median (quartiles) of alternating runs",
        title_justify="left",
        box=SIMPLE,
    )
    for name in ("model", "original", "merged", "refresh", "gain", "CPU", "ideal", "PSNR"):
        table.add_column(name, no_wrap=name in ("model", "PSNR"))
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
            f"{o.cpu_speedup:.2f}x",
            f"{o.ideal:.2f}x",
            f"{o.psnr:.1f} dB",
        )
    console.print(table)
    noisy = [o.model for o in outcomes if o.is_noisy]
    if noisy:
        console.print(
            f"times of {', '.join(noisy)} vary by more than {NOISY:.0%} of their median: something "
            "else runs here; CPU is the gain in processor time, which suffers less"
        )
    _print_cached(outcomes, console)
    console.print(f"pictures: {args.out / SHEET}, page: {args.out / PAGE}")


def _print_cached(outcomes: list[Outcome], console: Console) -> None:
    """What the preset gains over whole generations, and what it costs."""
    table = Table(
        title=f"generations of {STEPS} steps, preset {PRESET!r}, median; least PSNR and SSIM",
        title_justify="left",
        box=SIMPLE,
    )
    names = ("model", "time", "gain", "CPU", "PSNR", "SSIM", "pass")
    for name in names:
        table.add_column(name, no_wrap=True)
    for o in outcomes:
        c = o.cached
        table.add_row(
            o.model,
            f"{c.original_s:.1f} -> {c.cached_s:.1f} s",
            f"{c.speedup:.2f}x",
            f"{c.cpu_speedup:.2f}x",
            f"{min(c.psnr):.1f} dB",
            f"{min(c.ssim):.3f}",
            "yes" if c.passes else "no",
        )
    console.print(table)
    console.print(f"passes: PSNR {PASS['psnr']} dB and SSIM {PASS['ssim']} on every picture shown")


def run_demo(
    out: Path,
    console: Console,
    options: dict[str, Any] | None = None,
    names: Sequence[str] = tiny.NAMES,
    *,
    quick: bool = False,
) -> list[Outcome]:
    """Run the demo and write `contact-sheet.png`, `index.html` and `results.json` into `out`.

    Args:
        options: fields of the configuration. names: of embedded models. quick: nothing is compiled,
            and times are measured a few times only.
    """
    out.mkdir(parents=True, exist_ok=True)
    outcomes, sheets, reports = [], [], []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for name in names:
            outcome, sheet, report = _one_model(name, console, progress, options or {}, quick)
            outcomes.append(outcome)
            sheets.append(sheet)
            reports.append(report)
    sheet = Image.new("RGB", (sheets[0].width, sum(s.height for s in sheets)), "white")
    top = 0
    for part in sheets:
        sheet.paste(part, (0, top))
        top += part.height
    sheet.save(out / SHEET)
    (out / PAGE).write_text(page_of_demo(outcomes, reports, SHEET))
    (out / "results.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=2) + "\n")
    return outcomes


def _one_model(
    name: str, console: Console, progress: Progress, options: dict[str, Any], quick: bool
) -> tuple[Outcome, Image.Image, Report]:
    """What one model does: figures, pictures, and what merges."""
    model = tiny.load(name)
    options = {**OPTIONS[name], **options}
    report = explain(model.denoiser, model.step_inputs(LABELS, 1.0), **options)
    console.rule(name)
    console.print(report)
    original: Callable[..., Any] = model.denoiser
    merged, preset = optimize(model.denoiser, **options), optimize(model.denoiser, PRESET)
    if not quick:
        original = torch.compile(model.denoiser, dynamic=False)
        merged.compile()
        preset.compile()
    compile_s = _warm_up(model, original, merged, progress)

    def draw(title: str, denoiser: Callable[..., Any]) -> Tensor:
        bar = progress.add_task(f"{name}: {title}", total=STEPS)
        return model.generate(
            LABELS, steps=STEPS, denoiser=denoiser, on_step=lambda _: progress.advance(bar)
        )

    plain = draw("original pictures", original)
    with merged.generation(steps=STEPS):
        fast = draw("merged pictures", merged)
        tokens = [token_crop(fast[i], merged, i) for i in range(len(LABELS))]
    timer = _time(model, original, merged, progress, QUICK_ROUNDS if quick else ROUNDS)
    near, cached = _cached(model, original, preset, plain, progress, 1 if quick else GENERATIONS)
    wall, cpu = timer.medians()
    mse = float((plain - fast).square().mean())
    quartiles = {key: statistics.quantiles(values, n=4) for key, values in timer.wall.items()}
    outcome = Outcome(
        model=name,
        original_ms=wall["original"] * 1e3,
        merged_ms=wall["reuse"] * 1e3,
        refresh_ms=wall["refresh"] * 1e3,
        quartiles={key: (low * 1e3, high * 1e3) for key, (low, _, high) in quartiles.items()},
        cpu_ms={key: value * 1e3 for key, value in cpu.items()},
        speedup=wall["original"] / wall["reuse"],
        cpu_speedup=cpu["original"] / cpu["reuse"],
        ideal=report.ideal_speedup,
        mse=mse,
        psnr=10 * float(np.log10(4 / mse)) if mse else float("inf"),
        psnrs=tuple(psnr(fast, plain, peak=2.0)),
        ssims=tuple(ssim(fast, plain, peak=2.0)),
        compiled=not quick,
        compile_s=compile_s,
        cached=cached,
    )
    return outcome, _sheet(outcome, merged, plain, fast, near, tokens), report


def _warm_up(
    model: tiny.TinyModel,
    original: Callable[..., Any],
    merged: OptimizedDenoiser,
    progress: Progress,
) -> float:
    """Seconds until every kind of step has run: refresh, reuse, and unmerged if there are any."""
    start, last = time.perf_counter(), merged.config_toma.last_step
    count = 2 if last is None else last + 2
    task = progress.add_task(f"{model.name}: capture and compile", total=1 + count)
    with torch.no_grad():
        original(**model.step_inputs(LABELS, 1.0))
        progress.advance(task)
        for i in range(count):
            merged(**model.step_inputs(LABELS, 1.0 - i / STEPS))
            progress.advance(task)
    return time.perf_counter() - start


def _sheet(
    outcome: Outcome,
    merged: OptimizedDenoiser,
    plain: Tensor,
    fast: Tensor,
    near: Tensor,
    tokens: Sequence[Image.Image],
) -> Image.Image:
    """The pictures of a model, and below each how near it is to the original."""

    def notes(psnrs: Sequence[float], ssims: Sequence[float]) -> list[str]:
        pairs = zip(psnrs, ssims, strict=True)
        return [f"PSNR {p:.1f} dB, SSIM {s:.3f}" for p, s in pairs]

    def heats(images: Tensor) -> list[Image.Image]:
        return [heat(a, b) for a, b in zip(images, plain, strict=True)]

    cached = outcome.cached
    difference = ["difference", "largest of a pixel's"]
    rows = [
        Row(["original"], [*map(picture, plain)]),
        Row(
            ["merged", f"{outcome.cpu_speedup:.2f}x a step", "(processor time)"],
            [*map(picture, fast)],
            notes(outcome.psnrs, outcome.ssims),
        ),
        Row(difference, heats(fast), scale=True),
        Row(
            [f"preset {PRESET}", f"{cached.cpu_speedup:.2f}x a generation", "(processor time)"],
            [*map(picture, near)],
            notes(cached.psnr, cached.ssim),
        ),
        Row(difference, heats(near), scale=True),
        Row(
            ["tokens merged", f"the middle {CROP}x{CROP}", "one color: computed as", "one token,",
             "that with the dot;", "black: windows"],
            tokens,
        ),
    ]  # fmt: skip
    names = [tiny.CLASSES[label] for label in LABELS]
    return draw_sheet(f"{outcome.model}, {_settings(merged)}; preset {PRESET}", names, rows)


def _cached(
    model: tiny.TinyModel,
    original: Callable[..., Any],
    cached: OptimizedDenoiser,
    plain: Tensor,
    progress: Progress,
    generations: int,
) -> tuple[Tensor, Cached]:
    """(pictures by the preset, how near and how fast they are)"""
    task = progress.add_task(f"{model.name}: preset {PRESET}", total=1 + 2 * generations)

    def draw(denoiser: Callable[..., Any]) -> Tensor:
        return model.generate(LABELS, steps=STEPS, denoiser=denoiser)

    def draw_cached() -> Tensor:
        with cached.generation(steps=STEPS):
            return draw(cached)

    near = draw_cached()
    steps, timer = cached.totals, Timer()
    progress.advance(task)
    for _ in range(generations):
        timer.run("original", partial(draw, original))
        progress.advance(task)
        timer.run("cached", draw_cached)
        progress.advance(task)
    report = explain(model.denoiser, model.step_inputs(LABELS, 1.0), _told_length(cached))
    wall, cpu = timer.medians()
    return near, Cached(
        preset=PRESET,
        original_s=wall["original"],
        cached_s=wall["cached"],
        speedup=wall["original"] / wall["cached"],
        cpu_speedup=cpu["original"] / cpu["cached"],
        counted=report.ideal_speedup,
        psnr=tuple(psnr(near, plain, peak=2.0)),
        ssim=tuple(ssim(near, plain, peak=2.0)),
        steps=steps,
        kept_mb=report.kept_bytes / 1e6,
    )


def _told_length(cached: OptimizedDenoiser) -> MethodConfig:
    """The configuration for generations of the demo's length."""
    cache = CacheConfig.of(cached.config_toma.cache)
    assert cache is not None
    return replace(cached.config_toma, cache=replace(cache, steps=STEPS))


def _settings(merged: OptimizedDenoiser) -> str:
    config = cast(ToMAConfig, merged.config_toma)
    last = STEPS - 1 if config.last_step is None else min(STEPS - 1, config.last_step)
    return (
        f"ratio {config.ratio}, scope {config.scope}, steps {config.first_step} to {last}"
        f" of {STEPS} merged"
    )


def _time(
    model: tiny.TinyModel,
    original: Callable[..., Any],
    merged: OptimizedDenoiser,
    progress: Progress,
    rounds: int,
) -> Timer:
    """Times of single steps, original, refresh and reuse in turn."""
    timer, task = Timer(), progress.add_task(f"{model.name}: time steps", total=rounds)
    early, late = model.step_inputs(LABELS, 1.0), model.step_inputs(LABELS, 0.9)
    with torch.no_grad():
        for _ in range(rounds):
            merged.reset()
            timer.run("original", partial(original, **early))
            timer.run("refresh", partial(merged, **early))
            timer.run("reuse", partial(merged, **late))
            progress.advance(task)
    return timer

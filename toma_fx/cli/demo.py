"""The demo: both embedded models, original against merged and cached, through Inductor."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from toma_fx.api import explain, optimize
from toma_fx.measure.scores import psnr, ssim
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.cache import CacheConfig
from toma_fx.methods.toma import ToMA, ToMAConfig
from toma_fx.models import tiny
from toma_fx.run.denoiser import OptimizedDenoiser

LABELS = (0, 2, 4, 10)
STEPS = 20
OPTIONS: dict[str, dict[str, Any]] = {"tiny-sdxl": {}, "tiny-flux": {"last_step": 9}}
"""What the demo sets besides the default. Without a VAE every Flux token is four noisy pixels:
steps that merge to the very end leave noise in the picture (docs/default.md)."""
PRESET = "balanced"
"""What the demo shows beside merging: the fastest preset that passes `PASS`."""
PASS = {"psnr": 28.0, "ssim": 0.95}
"""Least PSNR (dB) and SSIM of every picture shown, as serving projects ask in their tests."""
ROUNDS = 12
GENERATIONS = 3
CELL = 256
"""Pixels a side of one picture on the contact sheet."""


@dataclass(frozen=True)
class Cached:
    """Measured result of the preset for one model.

    Attributes:
        preset: name. original_s, cached_s: median time of a whole generation, the host included.
        speedup: original_s / cached_s. counted: speed-up from FLOPs. psnr, ssim: of each picture.
        steps: run, by kind. kept_mb: of the tensors that are kept over steps.
    """

    preset: str
    original_s: float
    cached_s: float
    speedup: float
    counted: float
    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    steps: dict[str, int]
    kept_mb: float

    @property
    def passes(self) -> bool:
        """Whether every picture is as near as `PASS` asks."""
        return min(self.psnr) >= PASS["psnr"] and min(self.ssim) >= PASS["ssim"]


@dataclass(frozen=True)
class Outcome:
    """Measured result for one model.

    Attributes:
        model: name. original_ms, merged_ms: median time of a step (merged: reuse step).
        refresh_ms: median time of a step that selects destinations. quartiles: of both, in ms.
        speedup: original_ms / merged_ms. ideal: speed-up from FLOPs.
        mse: mean squared error of the pictures in [-1, 1]. psnr: in dB, peak 2.
        compile_s: seconds to compile original and merged programs. cached: result of the preset.
    """

    model: str
    original_ms: float
    merged_ms: float
    refresh_ms: float
    quartiles: dict[str, tuple[float, float]]
    speedup: float
    ideal: float
    mse: float
    psnr: float
    compile_s: float
    cached: Cached


def show_demo(args: argparse.Namespace, options: dict[str, Any], console: Console) -> None:
    """Run the demo and print its times."""
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
    _print_cached(outcomes, console)
    console.print(
        f"pictures: {args.out / 'contact-sheet.png'}, figures: {args.out / 'results.json'}"
    )


def _print_cached(outcomes: list[Outcome], console: Console) -> None:
    """What the preset gains over whole generations, and what it costs."""
    table = Table(
        title=f"generations of {STEPS} steps, preset {PRESET!r}, median; least PSNR and SSIM",
        title_justify="left",
        box=SIMPLE,
    )
    names = ("model", "time", "gain", "counted", "PSNR", "SSIM", "kept", "pass")
    for name in names:
        table.add_column(name, no_wrap=True)
    for o in outcomes:
        c = o.cached
        table.add_row(
            o.model,
            f"{c.original_s:.1f} -> {c.cached_s:.1f} s",
            f"{c.speedup:.2f}x",
            f"{c.counted:.2f}x",
            f"{min(c.psnr):.1f} dB",
            f"{min(c.ssim):.3f}",
            f"{c.kept_mb:.1f} MB",
            "yes" if c.passes else "no",
        )
    console.print(table)
    console.print(f"passes: PSNR {PASS['psnr']} dB and SSIM {PASS['ssim']} on every picture shown")


def run_demo(out: Path, console: Console, options: dict[str, Any] | None = None) -> list[Outcome]:
    """Run the demo and write `contact-sheet.png` and `results.json` into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    outcomes, sheets = [], []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for name in tiny.NAMES:
            outcome, sheet = _one_model(name, console, progress, options or {})
            outcomes.append(outcome)
            sheets.append(sheet)
    sheet = Image.new("RGB", (sheets[0].width, sum(s.height for s in sheets)), "white")
    top = 0
    for part in sheets:
        sheet.paste(part, (0, top))
        top += part.height
    sheet.save(out / "contact-sheet.png")
    (out / "results.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=2) + "\n")
    return outcomes


def _one_model(
    name: str, console: Console, progress: Progress, options: dict[str, Any]
) -> tuple[Outcome, Image.Image]:
    model = tiny.load(name)
    options = {**OPTIONS[name], **options}
    inputs = model.step_inputs(LABELS, 1.0)
    report = explain(model.denoiser, inputs, **options)
    console.rule(name)
    console.print(report)
    original = torch.compile(model.denoiser, dynamic=False)
    merged = cast(OptimizedDenoiser, optimize(model.denoiser, **options)).compile()
    start = time.perf_counter()
    last = merged.config_toma.last_step
    # up to the first step of each kind: refresh, reuse, and unmerged if the schedule has any
    count = 2 if last is None else last + 2
    task = progress.add_task(f"{name}: compile", total=1 + count)
    with torch.no_grad():
        original(**model.step_inputs(LABELS, 1.0))
        progress.advance(task)
        for i in range(count):
            merged(**model.step_inputs(LABELS, 1.0 - i / STEPS))
            progress.advance(task)
    compile_s = time.perf_counter() - start

    def draw(title: str, denoiser: Callable[..., Any]) -> Tensor:
        bar = progress.add_task(f"{name}: {title}", total=STEPS)
        return model.generate(
            LABELS, steps=STEPS, denoiser=denoiser, on_step=lambda _: progress.advance(bar)
        )

    plain = draw("original pictures", original)
    with merged.generation(steps=STEPS):
        fast = draw("merged pictures", merged)
        tokens = [_token_map(fast[i], merged, i) for i in range(len(LABELS))]
    times = _time(model, original, merged, progress)
    near, cached = _cached(model, original, plain, progress)
    mse = float((plain - fast).square().mean())
    median = {k: statistics.median(v) * 1e3 for k, v in times.items()}
    quartiles = {}
    for key, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        quartiles[key] = (low * 1e3, high * 1e3)
    outcome = Outcome(
        model=name,
        original_ms=median["original"],
        merged_ms=median["reuse"],
        refresh_ms=median["refresh"],
        quartiles=quartiles,
        speedup=median["original"] / median["reuse"],
        ideal=report.ideal_speedup,
        mse=mse,
        psnr=10 * float(np.log10(4 / mse)) if mse else float("inf"),
        compile_s=compile_s,
        cached=cached,
    )
    rows = {
        "original": plain,
        "merged": fast,
        "difference x4": (fast - plain) * 4,
        f"preset {PRESET}": near,
        "difference x4 ": (near - plain) * 4,
    }
    title = f"{name}, {_settings(merged)}; preset {PRESET}: {cached.speedup:.2f}x"
    return outcome, _sheet(title, rows, tokens)


def _cached(
    model: tiny.TinyModel, original: Callable[..., Any], plain: Tensor, progress: Progress
) -> tuple[Tensor, Cached]:
    """(pictures by the preset, how near and how fast they are)"""
    cached = optimize(model.denoiser, PRESET).compile()
    task = progress.add_task(f"{model.name}: preset {PRESET}", total=1 + 2 * GENERATIONS)

    def draw(denoiser: Callable[..., Any]) -> Tensor:
        return model.generate(LABELS, steps=STEPS, denoiser=denoiser)

    def draw_cached() -> Tensor:
        with cached.generation(steps=STEPS):
            return draw(cached)

    near = draw_cached()
    steps = cached.totals
    progress.advance(task)
    times: dict[str, list[float]] = {"original": [], "cached": []}
    runs: dict[str, Callable[[], Tensor]] = {
        "original": partial(draw, original),
        "cached": draw_cached,
    }
    for _ in range(GENERATIONS):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            times[key].append(time.perf_counter() - start)
            progress.advance(task)
    report = explain(model.denoiser, model.step_inputs(LABELS, 1.0), _told_length(cached))
    medians = {key: statistics.median(each) for key, each in times.items()}
    return near, Cached(
        preset=PRESET,
        original_s=medians["original"],
        cached_s=medians["cached"],
        speedup=medians["original"] / medians["cached"],
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
) -> dict[str, list[float]]:
    """Seconds of single steps, original, refresh and reuse in turn."""
    times: dict[str, list[float]] = {"original": [], "refresh": [], "reuse": []}
    task = progress.add_task(f"{model.name}: time steps", total=ROUNDS)
    early, late = model.step_inputs(LABELS, 1.0), model.step_inputs(LABELS, 0.9)
    with torch.no_grad():
        for _ in range(ROUNDS):
            merged.reset()
            for key, run, inputs in (
                ("original", original, early),
                ("refresh", merged, early),
                ("reuse", merged, late),
            ):
                start = time.perf_counter()
                run(**inputs)
                times[key].append(time.perf_counter() - start)
            progress.advance(task)
    return times


def _picture(image: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] as a picture of CELL pixels a side."""
    pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    small = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return small.resize((CELL, CELL), Image.Resampling.NEAREST)


def _token_map(image: Tensor, merged: OptimizedDenoiser, index: int) -> Image.Image:
    """The picture with a line from every token to the destination it merged into most."""
    state = merged.states[0]
    group = merged.specializations[-1].plan.groups[0]
    setting = cast(ToMA, group.setting)
    (height, width), (h, w) = setting.grid, setting.tile
    idx = state.buffers[group.tensor("idx")][index]
    share = state.buffers[group.tensor("unmerge")][index]
    target = torch.take_along_dim(idx, share.argmax(-1), -1)
    picture = Image.blend(_picture(image), Image.new("RGB", (CELL, CELL), "white"), 0.35)
    draw = ImageDraw.Draw(picture)
    dy, dx = CELL / height, CELL / width

    def center(window: int, slot: int) -> tuple[float, float]:
        row, column = divmod(window, width // w)
        return ((column * w + slot % w + 0.5) * dx, (row * h + slot // w + 0.5) * dy)

    for window in range(idx.shape[0]):
        for slot, end in enumerate(target[window].tolist()):
            if slot != end:
                draw.line([center(window, slot), center(window, end)], fill=(200, 30, 30), width=1)
        for slot in idx[window].tolist():
            x, y = center(window, slot)
            draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=(20, 60, 200))
    for x in range(0, width + 1, w):
        draw.line([(x * dx, 0), (x * dx, CELL)], fill=(120, 120, 120), width=1)
    for y in range(0, height + 1, h):
        draw.line([(0, y * dy), (CELL, y * dy)], fill=(120, 120, 120), width=1)
    return picture


def _sheet(title: str, rows: dict[str, Tensor], tokens: list[Image.Image]) -> Image.Image:
    """A row of pictures for each name, and one of the tokens. One column a picture."""
    gap, left, head = 6, 110, 48
    width = left + len(tokens) * (CELL + gap)
    sheet = Image.new("RGB", (width, head + (len(rows) + 1) * (CELL + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 6), title, fill="black", font_size=16)
    for i, label in enumerate(LABELS):
        draw.text((left + i * (CELL + gap), 29), tiny.CLASSES[label], fill="gray", font_size=13)
    pictures = {name: [_picture(x.clamp(-1, 1)) for x in row] for name, row in rows.items()}
    for row, (name, cells) in enumerate({**pictures, "tokens merged": tokens}.items()):
        top = head + row * (CELL + gap)
        draw.text((8, top + CELL // 2), name.strip(), fill="black", font_size=13)
        for i, cell in enumerate(cells):
            sheet.paste(cell, (left + i * (CELL + gap), top))
    return sheet

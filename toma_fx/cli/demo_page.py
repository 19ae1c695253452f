"""The page of the demo: its sheet, its figures, and where the models merge."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from toma_fx.cli.demo_outcome import Outcome
from toma_fx.run.report import Report
from toma_fx.run.report_page import body_of, page_around, table

STEPS = ("model", "original", "merged", "refresh", "gain", "gain (CPU)", "ideal", "PSNR", "SSIM")
GENERATIONS = ("model", "preset", "original", "cached", "gain", "gain (CPU)", "counted", "PSNR",
               "SSIM", "kept")  # fmt: skip


def page_of_demo(outcomes: Sequence[Outcome], reports: Sequence[Report], sheet: str) -> str:
    """The whole page; `sheet` is the name of the picture beside it."""
    compiled = all(outcome.compiled for outcome in outcomes)
    how = "through torch.compile" if compiled else "not compiled (--quick)"
    parts = [
        "<h1>toma_fx: the demo</h1>",
        f'<p class="dim">Small embedded models on this machine, {how}. Medians of runs in turn; '
        "CPU is processor time, which other work on the machine disturbs less. They say what "
        "merging does to these models, not what it gains on a GPU.</p>",
        f'<p><img src="{escape(sheet)}" alt="pictures by each model" style="max-width:100%"></p>',
        "<h2>A step, merged</h2>",
        table(STEPS, [_step_row(outcome) for outcome in outcomes]),
        "<h2>A generation, with kept updates</h2>",
        table(GENERATIONS, [_generation_row(outcome) for outcome in outcomes]),
    ]
    for outcome, report in zip(outcomes, reports, strict=True):
        parts += [f"<h1>{escape(outcome.model)}</h1>", *body_of(report)]
    return page_around("toma_fx: the demo", parts)


def _step_row(o: Outcome) -> tuple[str, ...]:
    return (
        o.model,
        f"{o.original_ms:.0f} ms",
        f"{o.merged_ms:.0f} ms",
        f"{o.refresh_ms:.0f} ms",
        f"{o.speedup:.2f}x" + (" (times vary)" if o.is_noisy else ""),
        f"{o.cpu_speedup:.2f}x",
        f"{o.ideal:.2f}x",
        f"{min(o.psnrs):.1f} to {max(o.psnrs):.1f} dB",
        f"{min(o.ssims):.3f} to {max(o.ssims):.3f}",
    )


def _generation_row(o: Outcome) -> tuple[str, ...]:
    c = o.cached
    return (
        o.model,
        c.preset,
        f"{c.original_s:.1f} s",
        f"{c.cached_s:.1f} s",
        f"{c.speedup:.2f}x",
        f"{c.cpu_speedup:.2f}x",
        f"{c.counted:.2f}x",
        f"{min(c.psnr):.1f} to {max(c.psnr):.1f} dB",
        f"{min(c.ssim):.3f} to {max(c.ssim):.3f}",
        f"{c.kept_mb:.1f} MB",
    )

"""The page of a quality run: one HTML file with everything in it, without scripts."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from toma_fx.files import write_file
from toma_fx.measure.cases import Case
from toma_fx.measure.chart import COLORS, Point, scatter
from toma_fx.measure.configs import ORIGINAL
from toma_fx.measure.records import Records
from toma_fx.measure.results import ConfigResult, Quality, interval_text, speed_cells
from toma_fx.measure.scores import METRICS

GAIN = 4
"""What differences are multiplied by on the page."""
MANY = 12
"""Comparisons above which their table is folded."""
SIZE = 256
"""Most pixels a side of a picture on the page."""
STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fbfbf9; margin: 0 }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px }
h1 { font-size: 26px; margin: 0 0 4px } h2 { font-size: 19px; margin: 40px 0 10px }
h3 { font-size: 15px; margin: 22px 0 8px } p { margin: 6px 0; max-width: 74ch } .dim { color: #666 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 5px 12px 5px 0; text-align: right; border-bottom: 1px solid #e6e6e2;
  vertical-align: top }
th { font-weight: 600; color: #555; font-size: 13px } th:first-child, td:first-child {
  text-align: left }
.words td, .words th { text-align: left } .scroll { overflow-x: auto } .pass { color: #1f7a45 }
.fail { color: #b3261e; font-weight: 600 } .mark { display: inline-block; width: 10px;
  height: 10px; border-radius: 5px; margin-right: 7px }
svg { width: 100%; max-width: 720px; height: auto; background: #fff; border: 1px solid #e6e6e2 }
figure { margin: 0 } figcaption { font-size: 12px; color: #666; line-height: 1.35 }
.grid { display: grid; gap: 10px; overflow-x: auto; padding-bottom: 6px }
.grid figure { min-width: 96px } .head { font-size: 13px; font-weight: 600; color: #555 }
.case { font-size: 13px; overflow-wrap: anywhere }
img { width: 100%; display: block; border-radius: 3px; image-rendering: auto; background: #eee }
img.small { image-rendering: pixelated }
pre { background: #fff; border: 1px solid #e6e6e2; padding: 10px 12px; overflow-x: auto;
  font-size: 12px; line-height: 1.4 }
details { margin: 6px 0 } summary { cursor: pointer; font-weight: 600 }
"""


def write_page(
    result: Quality,
    records: Records,
    cases: Sequence[Case],
    plots: Sequence[str],
    path: Path,
    shown: int = 12,
) -> None:
    """Write the page; `shown` is how many pictures each part shows at most."""
    parts = [
        _head(result),
        _table(result),
        _checks(result),
        _charts(result),
        _comparisons(result),
        *(_worst(result, own, records, cases, shown) for own in result.configs),
        _sheet(result, records, cases, shown),
        _facts(result, plots),
    ]
    title = escape(f"Quality of {result.model}")
    write_file(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n",
    )


def _head(result: Quality) -> str:
    settings = result.settings
    words = [f"{settings['steps']} steps"]
    words += [f"guidance {settings['guidance']}"] if settings["guidance"] is not None else []
    words += [f"batches of {settings['batch']}"] if settings["batch"] > 1 else []
    words.append("compiled" if settings["compile"] else "not compiled")
    return (
        f"<h1>Quality of {escape(result.model)}, accelerated</h1>"
        f'<p class="dim">{result.pictures} pictures with each of {len(result.configs)} '
        f"configurations, from the same prompts and seeds as the original's; "
        f"{escape(', '.join(words))}; on {escape(result.environment['device'])}.</p>"
    )


def _mark(result: Quality, name: str) -> str:
    """A name with its color."""
    color = color_of(result, name)
    return f'<span class="mark" style="background:{color}"></span>{escape(name)}'


def color_of(result: Quality, name: str) -> str:
    """The color of a configuration, everywhere."""
    return COLORS[[own.name for own in result.configs].index(name) % len(COLORS)]


def _rows(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """A table of cells that are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><tr>{top}</tr>{body}</table></div>'


def _table(result: Quality) -> str:
    titles = [escape(METRICS[m].title) for m in result.metrics]
    head = ["configuration", "speed-up", "by FLOPs", "kept", "compile", *titles]
    rows = []
    for own in result.configs:
        cells = [_mark(result, own.name), *speed_cells(own.speed)]
        for metric in result.metrics:
            spread = own.scores[metric]
            gain = own.gains.get(metric)
            cells.append(
                f"<b>{spread.mean:.4g}</b> ± {spread.deviation:.2g}"
                f'<br><span class="dim">worst {spread.worst:.4g}</span>'
                + (f'<br><span class="dim">gain {interval_text(gain)}</span>' if gain else "")
            )
        rows.append(cells)
    skipped = "".join(
        f'<p class="dim">Not measured: {escape(name)} ({escape(why)})</p>'
        for name, why in result.skipped.items()
    )
    return (
        f"<h2>Configurations</h2>{_rows(head, rows)}"
        '<p class="dim">Mean ± standard deviation over the pictures. Speed: median of whole '
        "generations, measured in turn with the original; <i>by FLOPs</i> is what the counted "
        "operations of the denoiser let expect; <i>kept</i> is memory of tensors that live from "
        f"step to step.</p>{skipped}"
    )


def _checks(result: Quality) -> str:
    if not result.checks:
        return ""
    rows = []
    for check in result.checks:
        kind, word = ("pass", "pass") if check.passes else ("fail", "fail")
        value = "not measured" if check.value is None else f"{check.value:.4g}"
        rows.append(
            [_mark(result, check.config), escape(check.condition), value,
             f'<span class="{kind}">{word}</span>']
        )  # fmt: skip
    return f"<h2>Thresholds</h2>{_rows(['configuration', 'condition', 'is', ''], rows)}"


def _charts(result: Quality) -> str:
    if any(own.speed is None for own in result.configs):
        return ""
    parts: list[str] = []
    for metric in result.metrics:
        points = [
            Point(own.name, own.speed.speedup, spread.mean, spread.low, spread.high,
                  color_of(result, own.name))
            for own in result.configs
            if own.speed is not None and (spread := own.scores[metric])
        ]  # fmt: skip
        chart = scatter(points, "measured speed-up", METRICS[metric].title)
        parts.append(f"<details{' open' if not parts else ''}><summary>"
                     f"{escape(METRICS[metric].title)}</summary>{chart}</details>")  # fmt: skip
    return (
        f"<h2>Error against speed</h2>{''.join(parts)}"
        '<p class="dim">Points are means; bars go from the 10th to the 90th percentile.</p>'
    )


def _comparisons(result: Quality) -> str:
    if not result.comparisons:
        return ""
    rows = []
    for c in result.comparisons:
        pair = f"{_mark(result, c.first)} &minus; {_mark(result, c.second)}"
        words = METRICS[c.metric].title, interval_text(c.interval), c.verdict
        title, interval, verdict = map(escape, words)
        rows.append([title, pair, interval, verdict])
    table = _rows(["metric", "difference", "", ""], rows, "words")
    if len(rows) > MANY:
        table = f"<details><summary>{len(rows)} comparisons</summary>{table}</details>"
    return (
        f"<h2>Configurations compared</h2>{table}"
        '<p class="dim">Mean of the differences, picture by picture, with its 95 % bootstrap '
        "interval. A difference is claimed only if the interval excludes 0, over at least 36 "
        "pictures.</p>"
    )


# -- pictures -------------------------------------------------------------------------------------


def _image(picture: Tensor | None, alt: str) -> str:
    """A picture [3, H, W] in [0, 1] as a data URI: small ones as they are, others reduced."""
    from PIL import Image

    if picture is None:
        return f"<p>{escape(alt)} is missing</p>"
    largest = max(picture.shape[1:])
    if largest > SIZE:
        size = [max(1, round(n * SIZE / largest)) for n in picture.shape[1:]]
        picture = F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    data, small = io.BytesIO(), largest <= SIZE // 2
    image = Image.fromarray(pixels)
    if small:
        image.save(data, "PNG", optimize=True)
    else:
        image.save(data, "JPEG", quality=88)
    kind, text = "png" if small else "jpeg", base64.b64encode(data.getvalue()).decode()
    uri = f"data:image/{kind};base64,{text}"
    look = ' class="small"' if small else ""
    return f'<img{look} src="{uri}" alt="{escape(alt)}">'


def _difference(got: Tensor | None, want: Tensor | None) -> Tensor | None:
    """Where two pictures differ, from white to dark red, `GAIN` times as strong."""
    if got is None or want is None:
        return None
    strength = ((got - want).abs().amax(0) * GAIN).clamp(0, 1)
    return torch.stack([1 - 0.35 * strength, 1 - strength, 1 - strength])


def _figure(image: str, text: str) -> str:
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _scores_text(own: ConfigResult, records: Records, index: int) -> str:
    record = records.known[index, own.name]
    names = [name for name in METRICS if name in record.scores]
    return "<br>".join(f"{escape(name)} {record.scores[name]:.4g}" for name in names)


def _worst(
    result: Quality, own: ConfigResult, records: Records, cases: Sequence[Case], shown: int
) -> str:
    """Pictures that differ most, worst first."""
    metric = next((m for m in result.metrics if METRICS[m].paired), None)
    if metric is None:
        return ""
    cells = [
        f'<div class="head">{t}</div>'
        for t in ("", "original", "accelerated", f"difference &times;{GAIN}")
    ]
    for index in own.scores[metric].order[: max(1, shown // 2)]:
        want, got = (records.load_picture(index, name) for name in (ORIGINAL, own.name))
        cells += [
            f'<div class="case">{escape(cases[index].prompt)}<br><span class="dim">picture '
            f"{index}, seed {cases[index].seed}</span><br><span class='dim'>"
            f"{_scores_text(own, records, index)}</span></div>",
            _figure(_image(want, "original"), ""),
            _figure(_image(got, own.name), ""),
            _figure(_image(_difference(got, want), "difference"), ""),
        ]
    grid = "minmax(130px, 1.2fr) repeat(3, minmax(96px, 2fr))"
    return (
        f"<h2>Worst pictures of {_mark(result, own.name)}</h2>"
        f'<p class="dim">By {escape(METRICS[metric].title)}, worst first.</p>'
        f'<div class="grid" style="grid-template-columns: {grid}; max-width: 860px">'
        f"{''.join(cells)}</div>"
    )


def _sheet(result: Quality, records: Records, cases: Sequence[Case], shown: int) -> str:
    """The first pictures with every configuration, and below each where it differs."""
    names = [own.name for own in result.configs]
    head = ["", ORIGINAL, *names]
    cells = [f'<div class="head">{escape(text)}</div>' for text in head]
    for index, case in list(enumerate(cases))[:shown]:
        want = records.load_picture(index, ORIGINAL)
        cells.append(
            f'<div class="case">{escape(case.prompt)}<br>'
            f'<span class="dim">seed {case.seed}</span></div>'
        )
        cells.append(_figure(_image(want, ORIGINAL), ""))
        for own in result.configs:
            got = records.load_picture(index, own.name)
            pair = _image(got, own.name) + _image(_difference(got, want), "difference")
            cells.append(_figure(pair, ""))
    grid = f"minmax(90px, 1fr) repeat({len(names) + 1}, minmax(96px, 2fr))"
    return (
        "<h2>Contact sheet</h2>"
        f'<p class="dim">The first {min(shown, len(cases))} of {len(cases)} pictures; below '
        f"each, where it differs from the original, &times;{GAIN}.</p>"
        f'<div class="grid" style="grid-template-columns: {grid}">{"".join(cells)}</div>'
    )


def _facts(result: Quality, plots: Sequence[str]) -> str:
    """Configurations in full, settings and versions."""
    configs = "".join(
        f"<details><summary>{_mark(result, own.name)}</summary>"
        f"<pre>{escape(json.dumps(own.config, indent=2, ensure_ascii=False))}</pre></details>"
        for own in result.configs
    )
    settings = json.dumps(result.settings, indent=2, ensure_ascii=False)
    rows = [[escape(name), escape(text)] for name, text in result.environment.items()]
    files = ["images.jsonl", "report.json", "speed.json", "run.json", "pictures/", *plots]
    return (
        f"<h2>Settings</h2>{configs}<details><summary>how pictures are drawn</summary>"
        f"<pre>{escape(settings)}</pre></details><h2>Environment</h2>"
        f"{_rows(('', ''), rows, 'words')}"
        f'<p class="dim">Beside this page: {escape(", ".join(files))}.</p>'
    )

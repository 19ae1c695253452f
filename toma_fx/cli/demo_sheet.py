"""The pictures of the demo: a sheet of them, heat maps of what differs, and which tokens merged."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from toma_fx.methods.toma import ToMA
from toma_fx.run.denoiser import OptimizedDenoiser

CELL, GAP, LEFT, HEAD, LINE = 256, 8, 170, 56, 20
"""Pixels: side of a picture, space between, the column of names, the title, a line of text."""
CROP = 8
"""Tokens a side of the crop that shows what merged."""
HOT = 0.5
"""The difference, of values in [-1, 1], that is the end of the scale."""
RAMP = ((255, 255, 255), (255, 221, 120), (240, 120, 50), (150, 20, 60), (30, 0, 40))
"""Colors of the scale, from no difference to `HOT` and more."""


@dataclass(frozen=True)
class Row:
    """A row of the sheet.

    Attributes:
        name: beside it, a line each. cells: pictures. notes: below each picture; "" for none.
        scale: whether the scale of differences stands beside it.
    """

    name: Sequence[str]
    cells: Sequence[Image.Image]
    notes: Sequence[str] = ()
    scale: bool = False


def picture(image: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] as a picture of CELL pixels a side."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    small = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return small.resize((CELL, CELL), Image.Resampling.NEAREST)


def heat(a: Tensor, b: Tensor) -> Image.Image:
    """The largest difference of the channels of each pixel of [3, H, W], on the scale."""
    difference = (a - b).abs().amax(0).div(HOT).clamp(0, 1).numpy()
    small = Image.fromarray(_ramp(difference))
    return small.resize((CELL, CELL), Image.Resampling.NEAREST)


def _ramp(share: np.ndarray) -> np.ndarray:
    """Colors [..., 3] of shares of the scale."""
    stops = np.linspace(0, 1, len(RAMP))
    channels = [np.interp(share, stops, [color[i] for color in RAMP]) for i in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def token_crop(image: Tensor, merged: OptimizedDenoiser, index: int) -> Image.Image:
    """The middle of a picture, its tokens in the color of the one that each merged into most."""
    state = merged.states[0]
    group = merged.specializations[-1].plan.groups[0]
    setting = cast(ToMA, group.setting)
    (height, width), (h, w) = setting.grid, setting.tile
    idx = state.buffers[group.tensor("idx")][index]
    share = state.buffers[group.tensor("unmerge")][index]
    target = torch.take_along_dim(idx, share.argmax(-1), -1)  # [windows, tokens of one]
    rows, columns = min(CROP, height), min(CROP, width)
    top, left = (height - rows) // 2 // h * h, (width - columns) // 2 // w * w
    size = CELL / max(rows, columns)
    shown = image[:, _pixels(top, rows, height, image.shape[1]), :]
    shown = shown[:, :, _pixels(left, columns, width, image.shape[2])]
    out = Image.blend(picture(shown), Image.new("RGB", (CELL, CELL), "white"), 0.15)
    draw = ImageDraw.Draw(out, "RGBA")
    for row in range(rows):
        for column in range(columns):
            y, x = top + row, left + column
            window, slot = y // h * (width // w) + x // w, y % h * w + x % w
            end = int(target[window, slot])
            red, green, blue = _color_of(window, sorted(idx[window].tolist()).index(end))
            box = (column * size, row * size, (column + 1) * size - 2, (row + 1) * size - 2)
            draw.rectangle(box, fill=(red, green, blue, 110), outline=(red, green, blue, 255))
            if end == slot:
                x0, y0 = box[0] + size / 2 - 4, box[1] + size / 2 - 4
                draw.ellipse((x0, y0, x0 + 7, y0 + 7), fill="black", outline="white")
    for line in range(0, columns + 1, w):
        draw.line([(line * size - 1, 0), (line * size - 1, CELL)], fill="black", width=2)
    for line in range(0, rows + 1, h):
        draw.line([(0, line * size - 1), (CELL, line * size - 1)], fill="black", width=2)
    return out


def _pixels(first: int, count: int, tokens: int, pixels: int) -> slice:
    """The pixels of some tokens of a side."""
    return slice(first * pixels // tokens, (first + count) * pixels // tokens)


def _color_of(window: int, place: int) -> tuple[int, int, int]:
    """The color of a destination: its neighbors in the window have other hues."""
    hue = (place * 0.381966 + window * 0.13) % 1
    red, green, blue = colorsys.hls_to_rgb(hue, 0.45, 0.85)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_sheet(title: str, columns: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """Rows of pictures below each other, with the names of columns above."""
    heights = [CELL + (LINE if any(row.notes) else 0) + GAP for row in rows]
    width = LEFT + len(columns) * (CELL + GAP)
    sheet = Image.new("RGB", (width, HEAD + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 6), title, fill="black", font_size=16)
    for i, name in enumerate(columns):
        draw.text((LEFT + i * (CELL + GAP), 34), name, fill="#555", font_size=14)
    top = HEAD
    for row, height in zip(rows, heights, strict=True):
        for i, line in enumerate(row.name):
            size, color = (14, "black") if i == 0 else (12, "#555")
            draw.text((8, top + 8 + i * 18), line, fill=color, font_size=size)
        if row.scale:
            _draw_scale(draw, sheet, top + 40)
        for i, cell in enumerate(row.cells):
            sheet.paste(cell, (LEFT + i * (CELL + GAP), top))
        for i, note in enumerate(row.notes):
            place = (LEFT + i * (CELL + GAP), top + CELL + 2)
            draw.text(place, note, fill="black", font_size=13)
        top += height
    return sheet


def _draw_scale(draw: ImageDraw.ImageDraw, sheet: Image.Image, top: int) -> None:
    high = 160
    shares = np.linspace(1, 0, high)[:, None].repeat(16, 1)
    sheet.paste(Image.fromarray(_ramp(shares)), (8, top))
    draw.rectangle((7, top - 1, 24, top + high), outline="#888")
    for share in (1, 0.5, 0):
        mark = f"{share * HOT:.2f}" + (" and more" if share == 1 else "")
        draw.text((30, top + (1 - share) * (high - 14)), mark, fill="#555", font_size=12)

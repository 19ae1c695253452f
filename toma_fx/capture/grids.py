"""Grids of packed sequences: read off position ids, or off size arguments of a call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from toma_fx.compat.pytorch import is_fake
from toma_fx.methods.windows import Size


@dataclass(frozen=True)
class Raster:
    """What a packed sequence holds: images of equal width one below the other, among other tokens.

    Attributes:
        heights: rows of each image, or frame of a video. width: columns. rest: tokens after them.
        before: tokens before them.
    """

    heights: tuple[int, ...]
    width: int
    rest: int = 0
    before: int = 0

    @property
    def grid(self) -> Size:
        """(H, W) of the images together; (T, H, W) if there are several of one size."""
        if len(set(self.heights)) == 1 < len(self.heights):
            return len(self.heights), self.heights[0], self.width
        return sum(self.heights), self.width

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.before + self.images + self.rest

    @property
    def images(self) -> int:
        """Tokens of the images."""
        return sum(self.heights) * self.width


def ids_dim(value: Any) -> int | None:
    """The dimension of position ids that enumerates tokens: [N, d], [B, N, d] or [B, d, N]."""
    if not isinstance(value, Tensor) or value.dim() not in (2, 3) or value.is_complex():
        return None
    if 2 <= value.shape[-1] <= 4:
        return value.dim() - 2
    return 2 if value.dim() == 3 and 2 <= value.shape[1] <= 4 else None


def find_raster(value: Any) -> Raster | None:
    """What position ids [N, d], [B, N, d] or [B, d, N] enumerate in their last two columns.

    Columns at the end that are the same everywhere don't count (Flux.2's index of text). Those
    before tell images (or frames) apart. What comes before the first image, and images that differ
    from it in width, count as other tokens.
    """
    dim = ids_dim(value)
    if dim is None:
        return None
    value = value.transpose(dim, -2)
    if value.dim() == 3:
        value = value[0]
    if is_fake(value) or value.is_meta or value.shape[0] < 4:
        return None
    ids = value.detach().double().cpu()
    varying = (ids != ids[:1]).any(0).nonzero().flatten()
    if len(varying) < 2:
        return None
    ids = ids[:, : int(varying[-1]) + 1]
    # text has one id for all of its tokens
    border = (ids[1:, :-2] != ids[:-1, :-2]).any(1) | (ids[1:] == ids[:-1]).all(1)
    images = torch.tensor_split(ids, (border.nonzero().flatten() + 1).tolist())
    sizes = [_image_size(image[:, -2], image[:, -1]) for image in images]
    first = next((i for i, size in enumerate(sizes) if size is not None), None)
    if first is None:
        return None
    known = [size for size in takewhile(lambda size: size is not None, sizes[first:]) if size]
    return _make_raster(known, len(ids), sum(map(len, images[:first])))


def _make_raster(sizes: Sequence[Size], length: int, before: int = 0) -> Raster:
    """Images (H, W) one after the other in `length` tokens; after the first other width, others."""
    width = sizes[0][1]
    heights = tuple(h for h, _ in takewhile(lambda size: size[1] == width, sizes))
    return Raster(heights, width, length - before - sum(heights) * width, before)


def size_hints(value: Any) -> Iterator[Raster]:
    """What the sizes among the arguments of a call say that a packed input may hold.

    Sizes are whole numbers named height and width, perhaps num_frames (LTX), or lists of (H, W) or
    (T, H, W), one for each image of a sequence (QwenImage).
    """
    if isinstance(value, Mapping):
        named = [value.get("num_frames", 1), value.get("height"), value.get("width")]
        if _is_size(named):
            yield from size_hints(named)
        for inner in value.values():
            yield from size_hints(inner)
    elif isinstance(value, (list, tuple)):
        sizes = [value] if _is_size(value) else value
        if sizes and all(_is_size(size) for size in sizes):
            images = [(s[-2], s[-1]) for s in sizes for _ in range(math.prod(s[:-2]))]
            yield _make_raster(images, sum(math.prod(size) for size in sizes))
        else:
            for inner in value:
                yield from size_hints(inner)


def _is_size(value: object) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) in (2, 3)
        and all(type(side) is int and side > 0 for side in value)
    )


def _image_size(y: Tensor, x: Tensor) -> tuple[int, int] | None:
    """(H, W) if (y, x) run through a picture row by row."""
    width = int((y == y[0]).sum())
    if width < 2 or len(y) % width or len(y) == width:
        return None
    rows, columns = y.view(-1, width), x.view(-1, width)
    steady = (rows == rows[:, :1]).all() and (columns == columns[:1]).all()
    rising = (rows[1:, 0] > rows[:-1, 0]).all() and (columns[0, 1:] > columns[0, :-1]).all()
    return (len(y) // width, width) if bool(steady) and bool(rising) else None

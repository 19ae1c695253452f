"""Windows over a token grid: how [B, N, C] tokens are cut into T equal windows of n tokens.

A grid is (H, W), or (T, H, W) for a video, whose windows reach over space and time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

Size = tuple[int, ...]
"""(H, W) of a picture or (T, H, W) of a video, in tokens."""


def size_text(size: Size) -> str:
    """ "16x24" for (16, 24)."""
    return "x".join(map(str, size))


def window_count(grid: Size, tile: Size) -> tuple[int, int]:
    """(windows, tokens a window) for `tile` on `grid`."""
    return math.prod(grid) // math.prod(tile), math.prod(tile)


def _simplify(grid: Size, tile: Size) -> tuple[Size, Size]:
    """The same windows in the same order with as few dimensions as can be."""
    while len(grid) > 1 and tile[-1] == grid[-1]:
        grid, tile = (*grid[:-2], grid[-2] * grid[-1]), (*tile[:-2], tile[-2] * tile[-1])
    while len(grid) > 1 and tile[0] == 1:
        grid, tile = (grid[0] * grid[1], *grid[2:]), tile[1:]
    return grid, tile


def to_windows(x: Tensor, grid: Size, tile: Size) -> Tensor:
    """[B, N, C] -> [B, T, n, C]; windows and the tokens inside them in raster order."""
    windows, tokens = window_count(grid, tile)
    grid, tile = _simplify(grid, tile)
    batch, channels = x.shape[0], x.shape[-1]
    if len(grid) > 1:
        cut = [side for g, t in zip(grid, tile, strict=True) for side in (g // t, t)]
        order = [*range(1, len(cut), 2), *range(2, len(cut) + 1, 2)]
        x = x.reshape(batch, *cut, channels).permute(0, *order, len(cut) + 1)
    return x.reshape(batch, windows, tokens, channels)


def from_windows(x: Tensor, grid: Size, tile: Size) -> Tensor:
    """Inverse of `to_windows`: [B, T, n, C] -> [B, N, C]."""
    count = math.prod(grid)
    grid, tile = _simplify(grid, tile)
    batch, channels, rank = x.shape[0], x.shape[-1], len(grid)
    if rank > 1:
        outer = [g // t for g, t in zip(grid, tile, strict=True)]
        order = [side for d in range(rank) for side in (1 + d, 1 + rank + d)]
        x = x.reshape(batch, *outer, *tile, channels).permute(0, *order, 2 * rank + 1)
    return x.reshape(batch, count, channels)


def merge_windows(x: Tensor, matrix: Tensor, grid: Size, tile: Size) -> Tensor:
    """Apply merge matrices [B, T, k, n] to tokens: [B, N, C] -> [B, T*k, C]."""
    return (cast(matrix, x) @ to_windows(x, grid, tile)).flatten(1, 2)


def unmerge_windows(y: Tensor, matrix: Tensor, grid: Size, tile: Size) -> Tensor:
    """Apply unmerge matrices [B, T, n, k] to merged tokens: [B, T*k, C] -> [B, N, C]."""
    windows = y.unflatten(1, (matrix.shape[1], matrix.shape[3]))
    return from_windows(cast(matrix, y) @ windows, grid, tile)


def cast(x: Tensor, like: Tensor) -> Tensor:
    """`x` in the dtype of `like`, without a node in the graph if it has it already."""
    return x if x.dtype == like.dtype else x.to(like.dtype)


def take(x: Tensor, tokens: Tensor) -> Tensor:
    """Tokens by index: [B, N, C], [B, M] -> [B, M, C]."""
    return torch.take_along_dim(x, tokens.unsqueeze(-1), dim=1)


def token_index(idx: Tensor, grid: Size, tile: Size) -> Tensor:
    """Window-local indices [B, T, k] -> indices into the raster of all tokens, [B, T*k]."""
    window = torch.arange(idx.shape[1], device=idx.device)[:, None]
    return raster_index(window, idx, grid, tile).flatten(1)


def raster_index(window: Tensor, idx: Tensor, grid: Size, tile: Size) -> Tensor:
    """Numbers of windows and indices inside them -> indices into the raster of all tokens."""
    grid, tile = _simplify(grid, tile)
    windows, tokens = window_count(grid, tile)
    index = torch.zeros_like(idx)
    for side, length in zip(grid, tile, strict=True):
        windows, tokens = windows // (side // length), tokens // length
        outer = torch.remainder(_quotient(window, windows), side // length)
        inner = torch.remainder(_quotient(idx, tokens), length)
        index = index * side + (outer * length + inner)
    return index


def share_grid(grid: Size, tile: Size, count: int) -> Size | str:
    """The grid of the windows that each of `count` processes has, below each other; or why there
    is none."""
    windows = window_count(grid, tile)[0]
    if windows == 1:
        return "its window is the whole picture"
    if windows % count:
        return f"{windows} windows of {size_text(tile)} can't be shared evenly by {count} processes"
    return (windows // count * tile[0], *tile[1:])


def _quotient(x: Tensor, by: int) -> Tensor:
    return x if by == 1 else torch.div(x, by, rounding_mode="floor")


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def nearest_divisor(n: int, wanted: float) -> int:
    """The divisor of `n` nearest to `wanted`; of two as near, the smaller."""
    return min(_divisors(n), key=lambda d: (abs(d - wanted), d))


@cache
def dividing_tile(grid: Size, area: float) -> Size:
    """The tile (h, w) that divides `grid` evenly and comes nearest to a square of `area` tokens.

    Distance is |log(tokens / area)| plus a quarter of |log(aspect)|: a tile of another size costs
    more than an oblong one. Every grid has one, at worst a single row or column. In a video it lies
    in one frame: (1, h, w).
    """

    def distance(tile: Size) -> tuple[float, Size]:
        return (
            abs(math.log(math.prod(tile) / area)) + abs(math.log(tile[0] / tile[1])) / 4,
            tile,
        )

    *frames, height, width = grid
    sides: Iterable[Size] = ((h, w) for h in _divisors(height) for w in _divisors(width))
    return (*(1 for _ in frames), *min(sides, key=distance))

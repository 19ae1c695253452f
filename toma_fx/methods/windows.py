"""Windows over a token grid: how [B, N, C] tokens are cut into T equal windows of n tokens."""

from __future__ import annotations

import math

from torch import Tensor

Size = tuple[int, int]


def window_count(grid: Size, tile: Size) -> tuple[int, int]:
    """(windows, tokens a window) for `tile` on `grid`."""
    return (grid[0] // tile[0]) * (grid[1] // tile[1]), tile[0] * tile[1]


def to_windows(x: Tensor, grid: Size, tile: Size) -> Tensor:
    """[B, H*W, C] -> [B, T, h*w, C]; windows and the tokens inside them in raster order."""
    (height, width), (h, w) = grid, tile
    batch, tokens, channels = x.shape
    if w == width:
        return x.reshape(batch, height // h, h * w, channels)
    cut = x.reshape(batch, height // h, h, width // w, w, channels).permute(0, 1, 3, 2, 4, 5)
    return cut.reshape(batch, tokens // (h * w), h * w, channels)


def from_windows(x: Tensor, grid: Size, tile: Size) -> Tensor:
    """Inverse of `to_windows`: [B, T, h*w, C] -> [B, H*W, C]."""
    (height, width), (h, w) = grid, tile
    batch, channels = x.shape[0], x.shape[-1]
    if w != width:
        x = x.reshape(batch, height // h, width // w, h, w, channels).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height * width, channels)


def merge_windows(x: Tensor, matrix: Tensor, grid: Size, tile: Size) -> Tensor:
    """Apply merge matrices [B, T, k, n] to tokens: [B, H*W, C] -> [B, T*k, C]."""
    return (matrix @ to_windows(x, grid, tile)).flatten(1, 2)


def unmerge_windows(y: Tensor, matrix: Tensor, grid: Size, tile: Size) -> Tensor:
    """Apply unmerge matrices [B, T, n, k] to merged tokens: [B, T*k, C] -> [B, H*W, C]."""
    windows = y.unflatten(1, (matrix.shape[1], matrix.shape[3]))
    return from_windows(matrix @ windows, grid, tile)


def token_index(idx: Tensor, grid: Size, tile: Size) -> Tensor:
    """Window-local indices [B, T, k] -> indices into the raster of all tokens, [B, T*k]."""
    import torch

    width, (h, w) = grid[1], tile
    across = width // w
    window = torch.arange(idx.shape[1], device=idx.device)[:, None]
    row = torch.div(window, across, rounding_mode="floor") * h
    row = row + torch.div(idx, w, rounding_mode="floor")
    column = torch.remainder(window, across) * w + torch.remainder(idx, w)
    return (row * width + column).flatten(1)


def dividing_tile(grid: Size, area: float) -> Size:
    """The tile that divides `grid` evenly and comes nearest to a square of `area` tokens.

    Distance is |log(tokens / area)| plus a quarter of |log(aspect)|: a tile of another size costs
    more than an oblong one. Every grid has one, at worst a single row or column.
    """

    def divisors(n: int) -> list[int]:
        return [d for d in range(1, n + 1) if n % d == 0]

    def distance(tile: Size) -> tuple[float, Size]:
        return (
            abs(math.log(tile[0] * tile[1] / area)) + abs(math.log(tile[0] / tile[1])) / 4,
            tile,
        )

    return min(((h, w) for h in divisors(grid[0]) for w in divisors(grid[1])), key=distance)

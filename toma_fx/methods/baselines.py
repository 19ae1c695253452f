"""Controls: ToMA with selections that never look at the tokens.

A better selection has to beat these at the same windows, weights and number of destinations.
`Random` keeps tokens drawn by a hash, `Grid` tokens spread evenly over each window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from toma_fx.methods.hashing import hash_indices
from toma_fx.methods.toma import ToMA, ToMAConfig
from toma_fx.methods.windows import Size, window_count

_UNIT = 2**20
"""Steps of the dither are whole multiples of 1 / `_UNIT`."""


@dataclass(frozen=True)
class Random(ToMA):
    """ToMA whose destinations are drawn by a hash of window and position.

    The same for every batch element and every step. Cost: a sort of N numbers, window by window.

    Attributes:
        seed: which draw.
    """

    seed: int = 0

    def share(self, count: int) -> str:
        """Draws go by the position in the grid."""
        return "it draws by the position in the grid"

    def select(self, x: Tensor) -> tuple[Tensor, ...]:
        """`keep` tokens of every window, each as likely as any other: [B, T, keep] int64."""
        windows, tokens = window_count(self.grid, self.tile)
        # no two tokens of the grid have the same hash, so that the order has no ties
        keys = hash_indices(torch.arange(windows * tokens, device=x.device), self.seed)
        return (_lowest_keys(keys.reshape(windows, tokens), self.keep, x.shape[0]),)


@dataclass(frozen=True)
class Grid(ToMA):
    """ToMA whose destinations are spread evenly, alike in every window.

    Positions are ranked by an ordered dither: the fractional part of row * a + column * b, where
    the steps a, b are those of the R2 sequence, the generalized golden ratio (M. Roberts, "The
    unreasonable effectiveness of quasirandom sequences", 2018); those of the golden ratio and of R3
    in windows of one and of three sides longer than 1. The lowest `keep` stay, at any `keep`
    nearly as many in every part of the window. Cost: a sort of the positions of one window.
    """

    share = ToMA.share

    def select(self, x: Tensor) -> tuple[Tensor, ...]:
        """The `keep` tokens of every window that come first in the dither: [B, T, keep] int64."""
        windows, tokens = window_count(self.grid, self.tile)
        position = torch.arange(tokens, device=x.device)
        keys, below = position * 0, tokens
        for side, step in zip(self.tile, dither_steps(self.tile), strict=True):
            below //= side
            keys = keys + position // below % side * step
        # a position as the last digit makes keys unique, and ranks without ties
        keys = keys % _UNIT * tokens + position
        return (_lowest_keys(keys.expand(windows, tokens), self.keep, x.shape[0]),)


def dither_steps(tile: Size) -> tuple[int, ...]:
    """Step of the ordered dither along each side of a window, in parts of 2^20.

    With d sides longer than 1 the steps are 1/g, 1/g^2, ..., 1/g^d, where g^(d+1) = g + 1. A side
    of 1 has the step 0.
    """
    long = sum(side > 1 for side in tile)
    ratio = 1.0
    for _ in range(64):
        ratio = (1 + ratio) ** (1 / (long + 1))
    steps = iter(round(_UNIT / ratio**power) for power in range(1, long + 1))
    return tuple(next(steps) if side > 1 else 0 for side in tile)


def _lowest_keys(keys: Tensor, keep: int, batch: int) -> Tensor:
    """Where the lowest `keep` of the unique keys [T, n] are, in order: [batch, T, keep] int64."""
    chosen = keys.argsort(-1)[:, :keep]
    return chosen.expand(batch, *chosen.shape).contiguous()


@dataclass(frozen=True, kw_only=True)
class RandomConfig(ToMAConfig):
    """Random destinations: the control for ToMA's selection.

    Selects tokens of every window by a hash, the same for all images and steps. Merges and unmerges
    as `ToMAConfig`, whose fields it shares. Cost: ToMA's without its selection.

    Attributes:
        seed: which draw.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    overridable: ClassVar[tuple[str, ...]] = (*ToMAConfig.overridable, "seed")

    def check(self) -> None:
        """Check every field."""
        super().check()
        self.check_count("seed", least=0)

    def make_setting(self, **fields: Any) -> Random:
        """The setting of ToMA's fields and the seed."""
        return Random(**fields, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class GridConfig(ToMAConfig):
    """Evenly spread destinations: the control for ToMA's selection.

    Selects tokens of every window by an ordered dither, the same for all images and steps. Merges
    and unmerges as `ToMAConfig`, whose fields it has. Cost: ToMA's without its selection.
    """

    name: ClassVar[str] = "grid"

    def make_setting(self, **fields: Any) -> Grid:
        """The setting of ToMA's fields."""
        return Grid(**fields)

"""A setting of which each of several processes computes its share of the windows.

    x [B, N, C], the same in every process --merge--> y [B, M / R, C] of this process's windows
    y of this process  --unmerge, gather--> x' [B, N, C], the same in every process

R processes have T / R consecutive windows each, so that what they merge is, end to end, what one
process would. Windows never reach from one process into another: selection, weights, merge and
unmerge need no exchange.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from toma_fx.compat.collectives import gather
from toma_fx.methods.setting import Pattern, Setting
from toma_fx.methods.windows import Size, from_windows, raster_index, to_windows


@dataclass(frozen=True)
class Rank:
    """This process among those that share the tokens.

    Attributes:
        index: from 0. count: of processes. group: name of their process group.
    """

    index: int
    count: int
    group: str

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """`x` of all processes, end to end along `dim`."""
        parts = gather(x.contiguous(), self.count, self.group).unflatten(0, (self.count, -1))
        whole: Tensor = parts.movedim(0, dim).flatten(dim, dim + 1)
        return whole


@dataclass(frozen=True)
class Sharded(Setting):
    """A method at one grid, on the windows of one process.

    Attributes:
        whole: the setting of one process alone.
        local: the same method on this process's windows, which lie below each other in its grid.
        tile: the windows. rank: which process this is.
    """

    whole: Setting
    local: Setting
    tile: Size
    rank: Rank

    def __post_init__(self) -> None:
        for name in ("chosen", "weighed", "linear", "feature", "recalled", "dynamic"):
            object.__setattr__(self, name, getattr(self.local, name))

    @property
    def merged_count(self) -> int:
        """Tokens that this process has after merging."""
        return self.local.merged_count

    def describe(self) -> str:
        """As the method says, and how many processes share it."""
        return f"{self.whole.describe()}, 1 of {self.rank.count} shares"

    def own(self, x: Tensor) -> Tensor:
        """The tokens of this process, window by window: [B, N, C] -> [B, N / R, C]."""
        windows = to_windows(x, self.grid, self.tile)
        count = windows.shape[1] // self.rank.count
        return windows.narrow(1, self.rank.index * count, count).flatten(1, 2)

    def select(self, x: Tensor) -> tuple[Tensor, ...]:
        """As the method, in this process's windows."""
        return self.local.select(self.own(x))

    def select_again(self, x: Tensor, before: Pattern) -> tuple[Tensor, ...]:
        """As the method, in this process's windows."""
        return self.local.select_again(self.own(x), before)

    def weights(self, x: Tensor, chosen: Pattern) -> tuple[Tensor, ...]:
        """As the method, in this process's windows."""
        return self.local.weights(self.own(x), chosen)

    def merge(self, x: Tensor, pattern: Pattern) -> Tensor:
        """[B, N, C] -> [B, M / R, C]."""
        return self.local.merge(self.own(x), pattern)

    def unmerge(self, y: Tensor, pattern: Pattern) -> Tensor:
        """[B, M / R, C] -> [B, N, C], gathered from all processes."""
        tokens = self.rank.gather(self.local.unmerge(y, pattern), 1)
        return from_windows(tokens.unflatten(1, (-1, math.prod(self.tile))), self.grid, self.tile)

    def positions(self, pattern: Pattern) -> Tensor:
        """Where this process's merged tokens are in the grid of all."""
        own, tokens = self.local.positions(pattern), math.prod(self.tile)
        first = self.rank.index * (math.prod(self.local.grid) // tokens)
        window = torch.div(own, tokens, rounding_mode="floor") + first
        return raster_index(window, torch.remainder(own, tokens), self.grid, self.tile)

    def sizes(self, pattern: Pattern) -> Tensor:
        """Of this process's merged tokens."""
        return self.local.sizes(pattern)

    def key_positions(self, pattern: Pattern) -> Tensor:
        """Of the merged tokens of all processes."""
        return self.rank.gather(self.positions(pattern), 1)

    def key_sizes(self, pattern: Pattern) -> Tensor:
        """Of the merged tokens of all processes."""
        sizes, device = self.sizes(pattern), next(iter(pattern.values())).device
        return self.rank.gather(sizes if sizes.device == device else sizes.to(device), 1)

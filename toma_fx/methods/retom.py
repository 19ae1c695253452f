"""ReToM: local representative token guided merging (Lee, Kim, Lee, arXiv 2507.12771).

    x [B, N, C] --select--> places [B, T]       the most representative token of each window
    x           --merge--> y [B, T, C]          that token, or the mean of its window
    y           --unmerge--> x' [B, N, C]       a copy for every token of the window

Only the paper's abstract was at hand: windows are local boundaries in the input of attention,
their sizes are adjusted, and the token of the highest average similarity, at a specific timestep,
represents its window. All else here is our reading of it: similarity is the cosine, a token's
average is over the other tokens of its window, the whole window merges into its representative
unless a ratio says otherwise, and the merged token is the representative itself unless asked for
the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from toma_fx.methods.base import MethodConfig
from toma_fx.methods.checks import is_count
from toma_fx.methods.ranking import count_true, similarity_keys
from toma_fx.methods.setting import Pattern, Place, Setting
from toma_fx.methods.windows import (
    Size,
    cast,
    dividing_tile,
    from_windows,
    share_grid,
    size_text,
    take,
    to_windows,
    token_index,
    window_count,
)

Reduction = Literal["representative", "mean"]
TIE = 2.0**-14
"""Sums of cosines are compared in steps of this size, so that mathematically equal ones tie."""


@dataclass(frozen=True)
class ReToM(Setting):
    """ReToM at one grid: every window becomes one token.

    Cost: selection normalizes the tokens and reads them twice, whatever the size of a window.

    Attributes:
        window: as many sides as the grid has, dividing it.
        reduction: whether a merged token is the "representative" of the tokens it stands for or
            their "mean". The representative then only says where the merged token lies.
    """

    window: Size
    reduction: Reduction = "representative"

    chosen: ClassVar[tuple[str, ...]] = ("places",)
    feature: ClassVar[Literal["entry", "stream"]] = "stream"

    @property
    def windows(self) -> int:
        """T, the number of windows."""
        return window_count(self.grid, self.window)[0]

    @property
    def merged_count(self) -> int:
        """One token a window."""
        return self.windows

    def describe(self) -> str:
        """The window, and what becomes of it."""
        return f"{self.reduction} of {size_text(self.window)}"

    def share(self, count: int) -> tuple[Setting, Size] | str:
        """Some windows for each process."""
        grid = share_grid(self.grid, self.window, count)
        return grid if isinstance(grid, str) else (replace(self, grid=grid), self.window)

    def select(self, x: Tensor) -> tuple[Tensor, ...]:
        """`places`: the representatives as tokens of the grid, [B, T] int64."""
        return (self._token_indices(_representatives(self._unit_vectors(x))),)

    def merge(self, x: Tensor, pattern: Pattern) -> Tensor:
        """Tokens [B, N, C] -> one a window [B, T, C]."""
        if self.reduction == "mean":
            return to_windows(x, self.grid, self.window).mean(2)
        return take(x, pattern["places"])

    def unmerge(self, y: Tensor, pattern: Pattern) -> Tensor:
        """Each token of a window gets its merged token: [B, T, C] -> [B, N, C]."""
        windows, tokens = window_count(self.grid, self.window)
        copies = y.unsqueeze(2).expand(y.shape[0], windows, tokens, y.shape[2])
        return from_windows(copies, self.grid, self.window)

    def positions(self, pattern: Pattern) -> Tensor:
        """`places`."""
        return pattern["places"]

    def sizes(self, pattern: Pattern) -> Tensor:
        """The tokens of a window: [1, T] float32."""
        windows, tokens = window_count(self.grid, self.window)
        return torch.full((1, windows), float(tokens))

    def _unit_vectors(self, x: Tensor) -> Tensor:
        """Tokens as unit vectors in float32, by window: [B, T, n, C]."""
        return F.normalize(to_windows(x, self.grid, self.window).float(), dim=-1)

    def _token_indices(self, local: Tensor) -> Tensor:
        """One token of every window, from its index in the window to that in the grid: [B, T]."""
        return token_index(local.unsqueeze(-1), self.grid, self.window)


@dataclass(frozen=True, kw_only=True)
class PartialReToM(ReToM):
    """ReToM at one grid, of which only the tokens closest to their representative merge.

        merged tokens = [tokens that stay, by rising similarity | one a window]

    Of tokens equally similar to their representatives, the first in the raster merges first. Cost:
    that of `ReToM`, a choice of those that stay, and a comparison of each of them with every token.

    Attributes:
        r: tokens merged away, fewer than N - T.
    """

    r: int

    chosen: ClassVar[tuple[str, ...]] = ("places", "joins")

    @property
    def merged_count(self) -> int:
        """All tokens but r."""
        return math.prod(self.grid) - self.r

    def share(self, count: int) -> str:
        """Tokens are ranked over the whole picture."""
        return "with a ratio it ranks tokens over the whole picture"

    @property
    def staying(self) -> int:
        """Tokens that neither merge nor represent."""
        return self.merged_count - self.windows

    def describe(self) -> str:
        """The window, what becomes of it, and how many tokens merge."""
        return f"{super().describe()}, {self.r} merge"

    def select(self, x: Tensor) -> tuple[Tensor, ...]:
        """Who stays, who represents, and which merged token each token becomes.

        Returns:
            `places`, the token of the grid that each merged token stands for, [B, N - r], and
            `joins`, the merged token that each token of the grid belongs to, [B, N]. Both int64.
        """
        unit = self._unit_vectors(x)
        local = _representatives(unit)
        staying, rank = self._rank(self._keys(unit, local))
        window = self.staying + self._window_numbers(x.device)
        joins = torch.where(rank < self.staying, rank, window)
        return torch.cat([staying, self._token_indices(local)], 1), joins

    def merge(self, x: Tensor, pattern: Pattern) -> Tensor:
        """Tokens [B, N, C] -> [B, N - r, C]: those that stay, then one a window."""
        places = pattern["places"]
        if self.reduction == "representative":
            return take(x, places)
        joined = (pattern["joins"] >= self.staying).float().unsqueeze(-1)
        share = to_windows(joined, self.grid, self.window)
        share = cast(share / share.sum(2, keepdim=True), x)
        means = share.transpose(-1, -2) @ to_windows(x, self.grid, self.window)
        return torch.cat([take(x, places[:, : self.staying]), means.squeeze(2)], 1)

    def unmerge(self, y: Tensor, pattern: Pattern) -> Tensor:
        """Each token gets the merged token that it joined: [B, N - r, C] -> [B, N, C]."""
        return take(y, pattern["joins"])

    def sizes(self, pattern: Pattern) -> Tensor:
        """1 for tokens that stay, then the tokens that joined each window's: [B, N - r] float32."""
        joined = (pattern["joins"] >= self.staying).float().unsqueeze(-1)
        groups = to_windows(joined, self.grid, self.window).sum((2, 3))
        return torch.cat([groups.new_ones(len(groups), self.staying), groups], 1)

    def _rank(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens by rising key, keys [B, N] int64 being unique.

        Returns:
            The tokens of the lowest keys in order, [B, staying], and the rank of each token,
            [B, N]; of a token that does not stay it may be any that is at least `staying`.
        """
        # not two sorts: TensorRT sorts no more than 3,840 numbers, and a 64x64 grid has 4,096
        least, order = keys.topk(self.staying, largest=False)
        return order, count_true(least.unsqueeze(1) < keys.unsqueeze(-1))

    def _keys(self, unit: Tensor, local: Tensor) -> Tensor:
        """Unique numbers that rank tokens by similarity to their representative, [B, N] int64.

        Representatives rank above all others.
        """
        closest = torch.take_along_dim(unit, local[..., None, None], dim=2)
        represents = torch.arange(unit.shape[2], device=unit.device) == local.unsqueeze(-1)
        similarity = (unit * closest).sum(-1).masked_fill(represents, 2.0).unsqueeze(-1)
        similarity = from_windows(similarity, self.grid, self.window).squeeze(-1)
        total = similarity.shape[1]
        index = torch.arange(total, device=similarity.device)
        return similarity_keys(similarity, index, total)

    def _window_numbers(self, device: torch.device) -> Tensor:
        """The window of each token of the grid, [1, N] int64."""
        windows, tokens = window_count(self.grid, self.window)
        number = torch.arange(windows, device=device)[None, :, None, None]
        return from_windows(number.expand(1, windows, tokens, 1), self.grid, self.window)[..., 0]


def _representatives(unit: Tensor) -> Tensor:
    """The unit vector of the highest mean cosine with the others: [B, T, n, C] -> [B, T] int64.

    The sum of cosines with the others is one product with the sum of the others. Sums equal to
    within `TIE` go to the lowest index: those of a window of two tokens always are.
    """
    others = unit.sum(2, keepdim=True) - unit
    return torch.round((unit * others).sum(-1) * (1 / TIE)).argmax(-1)


@dataclass(frozen=True, kw_only=True)
class ReToMConfig(MethodConfig):
    """ReToM: local representative token guided merging (Lee, Kim, Lee, arXiv 2507.12771).

    Selects in every window the token most similar to the window's others; `select_at` and
    `destinations_every` say at which steps. Merges the window into that token. Unmerges by copies.
    Cost: selection reads the tokens twice and compares no pairs; with a ratio it also sorts them
    twice. Read from the abstract alone; `toma_fx.methods.retom` says which parts are our reading.

    Attributes:
        window: side of the square windows, in tokens; a tuple gives the sides for level 0 (the
            finest grid), 1, and so on, the last of them also for levels beyond it. 1 leaves a level
            alone. Where it does not divide the grid, the nearest window that does is taken.
        ratio: share of all tokens that merges away, in [0, 1): those most similar to their
            representative. None merges every window whole, and so does a ratio beyond that.
        reduction: whether a merged token is the "representative" itself or the "mean" of all tokens
            that it stands for.

    The other fields are those of `MethodConfig`.
    """

    window: int | tuple[int, ...] = 2
    ratio: float | None = None
    reduction: Reduction = "representative"

    name: ClassVar[str] = "retom"
    overridable: ClassVar[tuple[str, ...]] = ("window", "ratio", "reduction", "min_tokens")

    def check(self) -> None:
        """Check every field."""
        super().check()
        self.check_choice("reduction", get_args(Reduction))
        self.require(
            bool(self.sides) and all(map(is_count, self.sides)),
            "window",
            "a whole number of at least 1, or one for every level from the finest",
        )
        if self.ratio is not None:
            self.check_ratio()

    @property
    def sides(self) -> tuple[int, ...]:
        """The side of the windows at each level; the last holds beyond."""
        return self.window if isinstance(self.window, tuple) else (self.window,)

    @property
    def is_off(self) -> bool:
        """Whether every window is one token, or the ratio is 0."""
        return self.ratio == 0 or all(side == 1 for side in self.sides)

    def setting(self, place: Place) -> ReToM | str:
        """The windows of the place's level, and how many tokens merge."""
        side = self.sides[min(place.level, len(self.sides) - 1)]
        if side == 1:
            return f"a window of one token at level {place.level} merges nothing"
        if side > min(place.unit[-2:]):
            return f"a {side}x{side} window does not fit a {size_text(place.unit)} grid"
        window = dividing_tile(place.unit, side * side)
        windows, tokens = window_count(place.grid, window)
        if tokens == 1:
            return f"no window of about {side}x{side} divides a {size_text(place.unit)} grid"
        if self.ratio is None:
            return ReToM(place.grid, window, self.reduction)
        r = int(windows * tokens * self.ratio + 1e-9)
        if r == 0:
            return f"ratio {self.ratio} merges no token of a {size_text(place.grid)} grid"
        if r >= windows * (tokens - 1):
            return ReToM(place.grid, window, self.reduction)
        return PartialReToM(place.grid, window, self.reduction, r=r)

"""ToDo: token downsampling (Smith, Saxena, Saha, arXiv 2402.13573).

    q = x [B, N, C]                          queries stay whole
    x --merge--> y [B, M, C] --> k, v        keys and values come from a coarser image

Down-sampling is the same for all tokens and steps: there is no pattern, nothing to select, and
nothing to unmerge, because attention gives as many tokens as it has queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from toma_fx.errors import RewriteError
from toma_fx.methods.base import MethodConfig, Scope
from toma_fx.methods.checks import is_count
from toma_fx.methods.setting import Pattern, Place, Setting
from toma_fx.methods.windows import Size, size_text

Downsampling = Literal["nearest", "average", "area"]


@dataclass(frozen=True)
class ToDo(Setting):
    """ToDo at one grid: every plane of tokens becomes a coarser plane.

    A plane is one image, or one frame of one video: the last two sides of `unit`. Of h rows with
    the factor f there remain
        "nearest"  h // f, the rows floor(i * h / (h // f)), as `F.interpolate` takes them;
        "average"  ceil(h / f), means of f rows each; the last mean may have fewer;
        "area"     h // f, means of rows floor(i * h / (h // f)) up to the next mean's first,
                   rounded up: `F.interpolate`'s windows, which overlap if f does not divide h;
    and as many columns by the same rule. Where f divides both sides "average" and "area" agree.
    `merge` costs one read of the tokens. Where means of unequal windows are asked for, it takes two
    small matrix products instead, of M * h and N * w / f multiplications a channel or less.

    Attributes:
        unit: what is down-sampled by itself, (h, w) or (t, h, w): the grid, or one of several
            equal images that lie below each other in it.
        factor: how many times coarser a side becomes, at most the shorter side.
        downsample: "nearest", "average" or "area".
    """

    unit: Size
    factor: int
    downsample: Downsampling = "nearest"

    @property
    def plane(self) -> tuple[int, int]:
        """(h, w) before."""
        return self.unit[-2], self.unit[-1]

    @property
    def coarse(self) -> tuple[int, int]:
        """(h, w) after."""
        height, width = self.plane
        up = self.factor - 1 if self.downsample == "average" else 0
        return (height + up) // self.factor, (width + up) // self.factor

    @property
    def planes(self) -> int:
        """Images and frames in the grid."""
        return math.prod(self.grid) // math.prod(self.plane)

    @property
    def merged_count(self) -> int:
        """Tokens after down-sampling, of all planes."""
        return self.planes * math.prod(self.coarse)

    def describe(self) -> str:
        """How the sides change."""
        return f"{self.downsample} {size_text(self.plane)} to {size_text(self.coarse)}"

    def merge(self, x: Tensor, pattern: Pattern) -> Tensor:
        """Down-sample every plane: [B, N, C] -> [B, M, C]."""
        if self.downsample == "nearest":
            return torch.index_select(x, 1, self._representatives(x.device))
        (height, width), (rows, columns) = self.plane, self.coarse
        batch, channels = x.shape[0], x.shape[-1]
        if (rows * self.factor, columns * self.factor) == (height, width):
            cut = (batch, self.planes * rows, self.factor, columns, self.factor, channels)
            return x.reshape(cut).mean((2, 4)).flatten(1, 2)
        y = self._averaging_matrix(0, x) @ x.reshape(batch, self.planes, height, width * channels)
        y = self._averaging_matrix(1, x) @ y.reshape(batch, self.planes * rows, width, channels)
        return y.flatten(1, 2)

    def unmerge(self, y: Tensor, pattern: Pattern) -> Tensor:
        """Refuse.

        Raises:
            RewriteError: always. What follows down-sampled keys and values is as long as the
                queries; nothing is left to unmerge.
        """
        raise RewriteError(
            "down-sampled keys and values can't be unmerged",
            where="ToDo.unmerge",
            expected="no unmerge after attention whose queries stayed whole",
            got=f"{y.shape[1]} tokens",
            hint="in scope 'keys' nothing is unmerged",
        )

    def positions(self, pattern: Pattern) -> Tensor:
        """The token taken, or the middle one of those averaged (of two, the first): [1, M]."""
        return self._representatives(None).unsqueeze(0)

    def sizes(self, pattern: Pattern) -> Tensor:
        """How many tokens each mean is of; of "nearest", the mean number: [1, M] float32."""
        if self.downsample == "nearest":
            share = math.prod(self.plane) / math.prod(self.coarse)
            return torch.full((1, self.merged_count), share)
        rows, columns = (end - first for first, end in (self._windows(i, None) for i in (0, 1)))
        cells = (rows[:, None] * columns).flatten()
        return cells.repeat(self.planes).unsqueeze(0).float()

    def _representatives(self, device: torch.device | None) -> Tensor:
        """The token of the grid that stands for each merged one, [M] int64."""
        height, width = self.plane
        planes = torch.arange(self.planes, device=device) * (height * width)
        rows, columns = (self._middle(side, device) for side in (0, 1))
        cells = rows[:, None] * width + columns
        return (planes[:, None, None] + cells).flatten()

    def _middle(self, side: int, device: torch.device | None) -> Tensor:
        first, end = self._windows(side, device)
        return first if self.downsample == "nearest" else (first + end - 1) // 2

    def _windows(self, side: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
        """First row of every window along a side, and the row after its last."""
        before, after = self.plane[side], self.coarse[side]
        i = torch.arange(after, device=device)
        if self.downsample == "average":
            return i * self.factor, ((i + 1) * self.factor).clamp(max=before)
        # floor and ceiling of i * before / after, without the rounding of a float
        return i * before // after, ((i + 1) * before + after - 1) // after

    def _averaging_matrix(self, side: int, like: Tensor) -> Tensor:
        """The averaging matrix of a side, [after, before], dtype and device of `like`."""
        first, end = (edge[:, None] for edge in self._windows(side, like.device))
        row = torch.arange(self.plane[side], device=like.device)
        inside = (row >= first) & (row < end)
        return inside.to(like.dtype) / (end - first).to(like.dtype)


@dataclass(frozen=True, kw_only=True)
class ToDoConfig(MethodConfig):
    """ToDo: token downsampling (Smith, Saxena, Saha, arXiv 2402.13573).

    Selects nothing: keys and values of self-attention are taken from a coarser image, the same
    tokens at every step. Merges a factor x factor cell into its first token, or its mean. Unmerges
    nothing: queries stay whole. Cost: keys and values are read and projected factor^2 times less
    often, attention does factor^2 times less; the rest of the model is as it was.

    Attributes:
        factor: how many times coarser a side of the image becomes. An int acts at the finest
            attention grid only, the published default; a tuple gives the factors of level 0
            (the finest), 1, and so on, and grids beyond it stay whole. 1 leaves a level alone.
        downsample: "nearest" takes one token of a cell, "average" and "area" their mean; they
            differ where the factor does not divide a side (see `ToDo`).

    The other fields are those of `MethodConfig`. Those on patterns have no effect; `scope` and
    `branches` must be "keys" and ("attention",).
    """

    factor: int | tuple[int, ...] = 2
    downsample: Downsampling = "nearest"
    scope: Scope = "keys"

    name: ClassVar[str] = "todo"
    overridable: ClassVar[tuple[str, ...]] = ("factor", "downsample", "min_tokens")
    patterned: ClassVar[bool] = False

    def check(self) -> None:
        """Check every field."""
        super().check()
        self.check_choice("downsample", get_args(Downsampling))
        self.require(
            bool(self.factors) and all(map(is_count, self.factors)),
            "factor",
            "a whole number of at least 1, or one for every level from the finest",
        )
        only = "since keys and values of self-attention are all that it merges"
        self.require(self.scope == "keys", "scope", f"'keys', {only}")
        self.require(self.branches == ("attention",), "branches", f"('attention',), {only}")

    @property
    def factors(self) -> tuple[int, ...]:
        """The factor of each level; 1 beyond."""
        return self.factor if isinstance(self.factor, tuple) else (self.factor,)

    @property
    def is_off(self) -> bool:
        """Whether every factor is 1."""
        return all(factor == 1 for factor in self.factors)

    def setting(self, place: Place) -> ToDo | str:
        """The factor of the place's level, if its images are large enough."""
        factor = self.factors[place.level] if place.level < len(self.factors) else 1
        if factor == 1:
            return f"the factor is 1 at level {place.level}"
        if factor > min(place.unit[-2:]):
            return f"factor {factor} is larger than a side of a {size_text(place.unit)} grid"
        return ToDo(place.grid, place.unit, factor, self.downsample)

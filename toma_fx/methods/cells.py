"""Cells: one destination in every small rectangle of the grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from toma_fx.methods.base import MethodConfig
from toma_fx.methods.hashing import hashed
from toma_fx.methods.setting import Place
from toma_fx.methods.windows import Size, size_text


@dataclass(frozen=True)
class Cells:
    """How pictures of one size are cut into cells, and in which order their tokens are looked at.

    The order of a picture's n tokens: sources of the first cell, of the second, ..., sources that
    no cell holds because the grid is no multiple of it, destinations. Everything is arithmetic on
    `torch.arange`: a traced graph holds no constant.

    Attributes:
        pictures: how many pictures, or frames, follow each other.
        height, width: of each, in tokens.
        sy, sx: rows and columns of a cell.
        random, seed: as in `ToMeSD`.
    """

    pictures: int
    height: int
    width: int
    sy: int
    sx: int
    random: bool = False
    seed: int = 0

    @property
    def rows(self) -> int:
        """Cells below each other in a picture."""
        return self.height // self.sy

    @property
    def columns(self) -> int:
        """Cells beside each other in a picture."""
        return self.width // self.sx

    @property
    def tokens(self) -> int:
        """Tokens of a picture."""
        return self.height * self.width

    @property
    def destinations(self) -> int:
        """Destinations of a picture, one a cell."""
        return self.rows * self.columns

    @property
    def sources(self) -> int:
        """Sources of a picture."""
        return self.tokens - self.destinations

    def order(self, device: torch.device) -> Tensor:
        """Raster index inside its picture of each token in turn: [pictures, n] int64."""
        cell = torch.arange(self.destinations, device=device)
        corner = cell // self.columns * (self.sy * self.width) + cell % self.columns * self.sx
        own = self._own(device)
        other = torch.arange(self.sy * self.sx - 1, device=device)
        other = other + (other >= own.unsqueeze(-1)).to(torch.int64)
        inside = (corner.unsqueeze(-1) + self._inside(other)).flatten(1)
        return torch.cat([inside, *self._outside(device), corner + self._inside(own)], 1)

    def position(self, device: torch.device) -> Tensor:
        """The inverse of `order`: the turn of each token, [pictures, n] int64."""
        token = torch.arange(self.tokens, device=device)
        row, column = token // self.width, token % self.width
        cell = (row // self.sy).clamp(max=self.rows - 1) * self.columns
        cell = cell + (column // self.sx).clamp(max=self.columns - 1)
        offset = row % self.sy * self.sx + column % self.sx
        own = torch.take_along_dim(self._own(device), cell.unsqueeze(0), 1)
        others = self.sy * self.sx - 1
        turn = cell * others + offset - (offset > own).to(torch.int64)
        turn = torch.where(offset == own, self.sources + cell, turn)
        high, wide = self.rows * self.sy, self.columns * self.sx
        margin, before = self.width - wide, self.destinations * others
        if margin:
            turn = torch.where(column >= wide, before + row * margin + column - wide, turn)
        if self.height > high:
            turn = torch.where(row >= high, before + token - high * wide, turn)
        return turn

    def _own(self, device: torch.device) -> Tensor:
        """Which of its cell's tokens the destination is: [pictures, cells]."""
        shape = (self.pictures, self.destinations)
        if not self.random:
            return torch.zeros(shape, dtype=torch.int64, device=device)
        cell = torch.arange(math.prod(shape), device=device).view(shape)
        return hashed(cell, self.seed) % (self.sy * self.sx)

    def _inside(self, offset: Tensor) -> Tensor:
        """Raster distance from a cell's corner of its token number `offset`."""
        return offset // self.sx * self.width + offset % self.sx

    def _outside(self, device: torch.device) -> list[Tensor]:
        """Raster index of the tokens right of the last cell, and of those below: [pictures, .]."""
        high, wide = self.rows * self.sy, self.columns * self.sx
        margin, found = self.width - wide, []
        if margin:
            token = torch.arange(high * margin, device=device)
            found.append(token // margin * self.width + wide + token % margin)
        if self.height > high:
            found.append(torch.arange(high * self.width, self.tokens, device=device))
        return [index.expand(self.pictures, -1) for index in found]


def cells(grid: Size, unit: Size, sy: int, sx: int, random: bool = False, seed: int = 0) -> Cells:
    """The cells of a grid that is made of pictures of size `unit`."""
    height, width = unit[-2:]
    pictures = math.prod(grid) // (height * width)
    return Cells(pictures, height, width, sy, sx, random, seed)


@dataclass(frozen=True, kw_only=True)
class CellConfig(MethodConfig):
    """What methods have in common that match sources with one destination a cell.

    Attributes:
        sx, sy: columns and rows of a cell. Columns and rows of a grid that don't fill a cell are
            all sources.
        random: whether the destination of a cell is any of its tokens, drawn once for all steps,
            instead of the top left one.
        seed: which draw.
        max_downsample: how many times coarser than the model's finest attention a grid may be. 1
            merges at the finest only, whatever that is. (The published package counts from the
            latent instead, so that its 1 merges nothing on SDXL, whose finest attention is at half
            the latent's size.)

    The other fields are those of `MethodConfig`.
    """

    sx: int = 2
    sy: int = 2
    random: bool = False
    seed: int = 0
    max_downsample: int = 1

    def check(self) -> None:
        """Check every field."""
        super().check()
        self.count("sx", "sy", "max_downsample")
        self.count("seed", least=0)
        self.require(isinstance(self.random, bool), "random", "True or False")

    def refusal(self, place: Place) -> str:
        """Why cells can't be cut at a place, or ""."""
        if place.downsample > self.max_downsample:
            return (
                f"{place.downsample} times coarser than the finest grid, "
                f"max_downsample is {self.max_downsample}"
            )
        cut = cells(place.grid, place.unit, self.sy, self.sx)
        if not cut.destinations:
            picture = size_text((cut.height, cut.width))
            return f"a {size_text((self.sy, self.sx))} cell is larger than the {picture} grid"
        return ""

    def sources(self, place: Place) -> int:
        """Sources of the whole grid at a place."""
        cut = cells(place.grid, place.unit, self.sy, self.sx)
        return cut.pictures * cut.sources

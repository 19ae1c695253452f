"""Cells: one destination in every small rectangle of the grid.

+---+---+   one token of every sy x sx cell is a destination (D), the others are sources (s);
| D   s |   a picture, or a frame of a video, is cut by itself
| s   s |
+---+---+
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from toma_fx.methods.base import MethodConfig
from toma_fx.methods.hashing import hash_indices
from toma_fx.methods.setting import Place
from toma_fx.methods.windows import size_text


@dataclass(frozen=True)
class Cells:
    """How pictures of one size are cut into cells, and in which order their tokens are looked at.

    The order of a picture's n tokens: sources of the first cell, of the second, ..., sources that
    no cell holds because the grid is no multiple of it, destinations. Everything is arithmetic on
    `torch.arange`: a traced graph holds no constant.

    Attributes:
        pictures: how many pictures, or frames, follow each other in the grid.
        height, width: of each, in tokens.
        sy, sx: rows and columns of a cell.
        random: whether the destination of a cell is any of its tokens, instead of the top left.
        seed: which draw; a draw holds for all steps and batch elements.
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

    def order(self, device: torch.device, slots: Tensor | None = None) -> Tensor:
        """Raster index inside its picture of each token in turn: [..., pictures, n] int64.

        Args:
            slots: which of its cell's tokens, in raster order, each destination is, int64
                [..., pictures, cells]; None for those that the fields say.
        """
        cell = torch.arange(self.destinations, device=device)
        corner = cell // self.columns * (self.sy * self.width) + cell % self.columns * self.sx
        destination = self._destination_slots(device) if slots is None else slots
        source = torch.arange(self.sy * self.sx - 1, device=device)
        source = source + (source >= destination.unsqueeze(-1)).to(torch.int64)
        sources = (corner.unsqueeze(-1) + self._raster_offset(source)).flatten(-2)
        destinations = corner + self._raster_offset(destination)
        margins = (m.expand(*destination.shape[:-1], -1) for m in self._margins(device))
        return torch.cat([sources, *margins, destinations], -1)

    def inverse_order(self, device: torch.device, slots: Tensor | None = None) -> Tensor:
        """Where each token of a picture is in `order`: [..., pictures, n] int64."""
        token = torch.arange(self.tokens, device=device)
        row, column = token // self.width, token % self.width
        cell = (row // self.sy).clamp(max=self.rows - 1) * self.columns
        cell = cell + (column // self.sx).clamp(max=self.columns - 1)
        offset = row % self.sy * self.sx + column % self.sx
        slots = self._destination_slots(device) if slots is None else slots
        cell_of = cell.view(*[1] * (slots.dim() - 1), -1)
        destination = torch.take_along_dim(slots, cell_of, -1)
        sources = self.sy * self.sx - 1
        rank = cell * sources + offset - (offset > destination).to(torch.int64)
        rank = torch.where(offset == destination, self.sources + cell, rank)
        high, wide = self.rows * self.sy, self.columns * self.sx
        margin, before = self.width - wide, self.destinations * sources
        if margin:
            rank = torch.where(column >= wide, before + row * margin + column - wide, rank)
        if self.height > high:
            rank = torch.where(row >= high, before + token - high * wide, rank)
        return rank

    def _destination_slots(self, device: torch.device) -> Tensor:
        """Which of its cell's tokens, in raster order, the destination is: [pictures, cells]."""
        shape = (self.pictures, self.destinations)
        if not self.random:
            return torch.zeros(shape, dtype=torch.int64, device=device)
        cell = torch.arange(math.prod(shape), device=device).view(shape)
        return hash_indices(cell, self.seed) % (self.sy * self.sx)

    def _raster_offset(self, slot: Tensor) -> Tensor:
        """Raster distance of a token of a cell, by its number in the cell, from the corner."""
        return slot // self.sx * self.width + slot % self.sx

    def _margins(self, device: torch.device) -> list[Tensor]:
        """Raster index of the tokens right of the last cell, and of those below: [.]."""
        high, wide = self.rows * self.sy, self.columns * self.sx
        margin, indices = self.width - wide, []
        if margin:
            token = torch.arange(high * margin, device=device)
            indices.append(token // margin * self.width + wide + token % margin)
        if self.height > high:
            indices.append(torch.arange(high * self.width, self.tokens, device=device))
        return indices


@dataclass(frozen=True, kw_only=True)
class CellConfig(MethodConfig):
    """What methods have in common that match sources with one destination a cell.

    Attributes:
        sx: columns of a cell. Columns of a grid that don't fill a cell are all sources.
        sy: rows of a cell, likewise.
        random: whether the destination of a cell is any of its tokens, instead of the top left.
        seed: which draw; a draw holds for all steps and batch elements.
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
        self.check_count("sx", "sy", "max_downsample")
        self.check_count("seed", least=0)
        self.require(isinstance(self.random, bool), "random", "True or False")

    def refusal(self, place: Place) -> str:
        """Why cells can't be cut at a place, or ""."""
        if place.downsample > self.max_downsample:
            return (
                f"{place.downsample} times coarser than the finest grid, "
                f"max_downsample is {self.max_downsample}"
            )
        cells = self.cells(place)
        if not cells.destinations:
            picture = size_text((cells.height, cells.width))
            return f"a {size_text((self.sy, self.sx))} cell is larger than the {picture} grid"
        return ""

    def cells(self, place: Place) -> Cells:
        """The cells of the grid at a place."""
        height, width = place.unit[-2:]
        pictures = math.prod(place.grid) // (height * width)
        return Cells(pictures, height, width, self.sy, self.sx, self.random, self.seed)

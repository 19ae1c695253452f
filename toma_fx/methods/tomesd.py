"""ToMeSD: token merging for Stable Diffusion (Bolya & Hoffman, arXiv 2303.17604).

One token of every cell is a destination (see `cells`), the others are sources. Each source looks up
the most similar destination of its picture; the r sources that are most similar to theirs join it,
the others stay.

    merged tokens = [sources that stay, by falling similarity | destinations, cell after cell]

A pattern is two lists of indices, from which everything else follows by comparison and lookup:
`places` [B, M], the token of the grid that each merged token stands for, and `joins` [B, N], the
merged token that each token of the grid belongs to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from toma_fx.methods.cells import CellConfig, Cells
from toma_fx.methods.ranking import count_true, key_index, similarity_keys
from toma_fx.methods.setting import Pattern, Place, Setting
from toma_fx.methods.windows import cast, size_text, take


@dataclass(frozen=True)
class ToMeSD(Setting):
    """ToMeSD at one grid.

    Selects one destination a cell, and matches each source with the destination of its picture that
    has the largest cosine similarity (float32; of equal ones the first). The r most similar sources
    of the whole grid join, equal ones by their raster index. Merges a destination and those that
    join it into their mean. Unmerges by copying. Cost: matching takes C multiply-adds for every
    source and destination of a picture, merging as many for every token and destination, unmerging
    one lookup. Source: arXiv 2303.17604.

    Attributes:
        cells: of all pictures or frames of the grid. No token joins another picture's.
        r: tokens merged away, from 0 to the number of sources.
    """

    cells: Cells
    r: int

    chosen: ClassVar[tuple[str, ...]] = ("places", "joins")
    feature = "stream"

    @property
    def merged_count(self) -> int:
        """Tokens after merging."""
        return math.prod(self.grid) - self.r

    def describe(self) -> str:
        """The cell."""
        size = size_text((self.cells.sy, self.cells.sx))
        return f"{size} cells" + (", random" if self.cells.random else "")

    def select(self, x: Tensor) -> tuple[Tensor, ...]:
        """`places` [B, M] and `joins` [B, N] int64, for tokens [B, N, C]."""
        return self.arrange(*self.match(x), self.r)

    def match(self, x: Tensor, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The best destination of each source.

        Args:
            slots: which token of its cell each destination is, [B, pictures, cells], where that
                follows from the tokens.

        Returns:
            Its cosine similarity, float32, and its number in its picture, int64, both
            [B, pictures, sources]. A token of zeros has similarity 0.
        """
        cells = self.cells
        order = _in_batch(cells.order(x.device, slots)).unsqueeze(-1)
        x = x.unflatten(1, (cells.pictures, cells.tokens))
        unit = F.normalize(torch.take_along_dim(x, order, 2).float(), dim=-1)
        sources, destinations = unit[:, :, : cells.sources], unit[:, :, cells.sources :]
        similarity = sources @ destinations.transpose(-1, -2)
        # Torch-TensorRT has no maximum that also says where it is; Inductor makes both in one pass
        return similarity.amax(-1), similarity.argmax(-1)

    def arrange(
        self, best: Tensor, match: Tensor, r: int, slots: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The pattern in which the `r` best of the matches merge: `places` and `joins`."""
        cells, device, batch, total = self.cells, best.device, best.shape[0], math.prod(self.grid)
        picture = torch.arange(cells.pictures, device=device).unsqueeze(-1)
        raster = _in_batch(cells.order(device, slots) + picture * cells.tokens)
        places = raster[..., cells.sources :].flatten(1).expand(batch, -1)
        staying = cells.pictures * cells.sources - r
        target = staying + picture * cells.destinations + match
        if staying:
            key = similarity_keys(best, raster[..., : cells.sources], total)
            least = key.flatten(1).topk(staying, largest=False).values.flip(1)
            places = torch.cat([key_index(least, total), places], 1)
            rank = count_true(least[:, None, None, :] > key.unsqueeze(-1))
            target = torch.where(key <= least[:, :1, None], rank, target)
        else:
            places = places.contiguous()
        destination = torch.arange(cells.destinations, device=device)
        destination = staying + (destination + picture * cells.destinations)
        target = torch.cat([target, destination.expand(batch, -1, -1)], -1)
        joins = torch.take_along_dim(target, _in_batch(cells.inverse_order(device, slots)), -1)
        return places, joins.flatten(1)

    def merge(self, x: Tensor, pattern: Pattern) -> Tensor:
        """Sources that stay, then the mean of every destination and those that join it."""
        staying = self._count_staying(pattern)
        groups = self.merge_groups(x, pattern).flatten(1, 2)
        if not staying:
            return groups
        return torch.cat([take(x, pattern["places"][:, :staying]), groups], 1)

    def merge_groups(self, x: Tensor, pattern: Pattern) -> Tensor:
        """One token for every destination and those that join it: [B, pictures, cells, C]."""
        total, _, share = self.sum_groups(x, self.membership(pattern))
        return cast(total / share, x)

    def membership(self, pattern: Pattern) -> Tensor:
        """Who belongs to which destination: [B, pictures, cells, n] bool."""
        cells, joins = self.cells, pattern["joins"]
        group = torch.arange(cells.pictures * cells.destinations, device=joins.device)
        group = group + self._count_staying(pattern)
        group = group.view(cells.pictures, cells.destinations, 1)
        return joins.reshape(-1, cells.pictures, 1, cells.tokens) == group

    def sum_groups(self, x: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over groups as matrix products, which are deterministic where a scatter is not.

        Returns:
            float32: sums [B, pictures, cells, C], of float16 tokens scaled; how many tokens each
            is of, [B, pictures, cells, 1]; what to divide the sum by for the mean, of that shape.
        """
        number = members.sum(-1, keepdim=True, dtype=torch.float32)
        scale, share = x.new_ones(()), number
        if x.dtype == torch.float16:
            # the sum of thousands of tokens may overflow: powers of two scale exactly, and the
            # cast makes one of what a back end's pow gives
            scale = cast(torch.pow(2.0, -torch.floor(torch.log2(number))), x)
            share = number * scale.float()
        # chosen, because Inductor's CPU code for a cast from bool to bfloat16 is half as fast
        weight = torch.where(members, scale, x.new_zeros(()))
        total = weight @ x.unflatten(1, (members.shape[1], members.shape[3]))
        return total.float(), number, share

    def unmerge(self, y: Tensor, pattern: Pattern) -> Tensor:
        """Every token receives a copy of what it belongs to."""
        return take(y, pattern["joins"])

    def positions(self, pattern: Pattern) -> Tensor:
        """`places`."""
        return pattern["places"]

    def sizes(self, pattern: Pattern) -> Tensor:
        """1 for sources that stay, the number in its group for a destination: [B, M] float32."""
        groups = self.membership(pattern).sum(-1, dtype=torch.float32).flatten(1)
        staying = self._count_staying(pattern)
        return torch.cat([groups.new_ones(len(groups), staying), groups], 1) if staying else groups

    def _count_staying(self, pattern: Pattern) -> int:
        """How many sources do not merge."""
        return pattern["places"].shape[1] - self.cells.pictures * self.cells.destinations


def _in_batch(order: Tensor) -> Tensor:
    """[pictures, n] of all batch elements -> [1, pictures, n]."""
    return order if order.dim() == 3 else order.unsqueeze(0)


@dataclass(frozen=True, kw_only=True)
class ToMeSDConfig(CellConfig):
    """ToMeSD: token merging for Stable Diffusion (Bolya & Hoffman, arXiv 2303.17604).

    Selects one token of every sy x sx cell as a destination. Merges the most similar of the other
    tokens into their most similar destination, as a mean. Unmerges by copying. Cost: C
    multiply-adds for every source and destination to match them, as many for every token and
    destination to merge them. In a video, or several pictures in one sequence, tokens merge
    inside their own.

    Attributes:
        ratio: share of the tokens that is merged away, in [0, 1); 0 turns merging off. Destinations
            always stay, so that no more than 1 - 1 / (sx * sy) has an effect.

    The other fields are those of `CellConfig` and `MethodConfig`.
    """

    ratio: float = 0.5

    name: ClassVar[str] = "tomesd"
    overridable: ClassVar[tuple[str, ...]] = ("ratio", "sx", "sy", "max_downsample", "min_tokens")

    def check(self) -> None:
        """Check every field."""
        super().check()
        self.check_ratio()

    @property
    def is_off(self) -> bool:
        """Whether the ratio is 0."""
        return self.ratio == 0

    def setting(self, place: Place) -> ToMeSD | str:
        """The cells of a grid, and how many of its tokens merge."""
        if self.is_off:
            return "ratio is 0"
        if why := self.refusal(place):
            return why
        cells = self.cells(place)
        r = min(int(math.prod(place.grid) * self.ratio), cells.pictures * cells.sources)
        if r == 0:
            return f"ratio {self.ratio} merges no token of a {size_text(place.grid)} grid"
        return self.make_setting(place, cells, r)

    def make_setting(self, place: Place, cells: Cells, r: int) -> ToMeSD:
        """The setting that merges `r` tokens; methods that merge otherwise replace this."""
        return ToMeSD(place.grid, cells, r)

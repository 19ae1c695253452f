"""ToMeSD: token merging for Stable Diffusion (Bolya & Hoffman, arXiv 2303.17604).

    +---+---+   one token of every sy x sx cell is a destination (D), the others are sources (s);
    | D   s |   each source looks up the most similar destination of its picture; the r sources
    | s   s |   that are most similar to theirs join it, the others stay
    +---+---+

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

from toma_fx.methods.cells import CellConfig, Cells, cells
from toma_fx.methods.setting import Pattern, Place, Setting
from toma_fx.methods.windows import Size, cast, size_text, take

STEPS = 2**23
"""Steps a unit of cosine similarity by which sources are ordered; equal ones go by their index."""


@dataclass(frozen=True)
class ToMeSD(Setting):
    """ToMeSD at one grid.

    Selects one destination a cell, its top left token or a hashed one, and matches each source with
    the destination of its picture that has the largest cosine similarity (float32; of equal ones
    the first). The r most similar sources of the whole grid join, equal ones by their raster index.
    Merges a destination and those that join it into their mean. Unmerges by copying. Cost: matching
    takes C multiply-adds for every source and destination of a picture, merging as many for every
    token and destination, unmerging one lookup. Source: arXiv 2303.17604.

    Attributes:
        unit: (height, width) of one picture or frame, which its last two sides are; the grid is a
            whole number of them. No token joins another picture's.
        sy, sx: rows and columns of a cell.
        r: tokens merged away, from 0 to the number of sources.
        random: whether the destination of a cell is any of its tokens, instead of the top left.
        seed: which draw; a draw holds for all steps and batch elements.
    """

    unit: Size
    sy: int
    sx: int
    r: int
    random: bool = False
    seed: int = 0

    chosen: ClassVar[tuple[str, ...]] = ("places", "joins")
    feature = "stream"

    @property
    def cells(self) -> Cells:
        """The cells of the grid."""
        return cells(self.grid, self.unit, self.sy, self.sx, self.random, self.seed)

    @property
    def merged(self) -> int:
        """Tokens after merging."""
        return math.prod(self.grid) - self.r

    def text(self) -> str:
        """The cell."""
        return f"{size_text((self.sy, self.sx))} cells" + (", random" if self.random else "")

    def select(self, x: Tensor) -> tuple[Tensor, ...]:
        """`places` [B, M] and `joins` [B, N] int64, for tokens [B, N, C]."""
        return self.arranged(*self.matches(x), self.r)

    def matches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The best destination of each source.

        Returns:
            Its cosine similarity, float32, and its number in its picture, int64, both
            [B, pictures, sources]. A token of zeros has similarity 0.
        """
        cut = self.cells
        order = cut.order(x.device)[None, :, :, None]
        x = x.unflatten(1, (cut.pictures, cut.tokens))
        unit = F.normalize(torch.take_along_dim(x, order, 2).float(), dim=-1)
        sources, destinations = unit[:, :, : cut.sources], unit[:, :, cut.sources :]
        likeness = sources @ destinations.transpose(-1, -2)
        # Torch-TensorRT has no maximum that also says where it is; Inductor makes both in one pass
        return likeness.amax(-1), likeness.argmax(-1)

    def arranged(self, best: Tensor, match: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """The pattern in which the `r` best of the matches merge: `places` and `joins`."""
        cut, device, batch, total = self.cells, best.device, best.shape[0], math.prod(self.grid)
        picture = torch.arange(cut.pictures, device=device).unsqueeze(-1)
        raster = cut.order(device) + picture * cut.tokens
        places = raster[:, cut.sources :].reshape(1, -1).expand(batch, -1)
        staying = cut.pictures * cut.sources - r
        goal = staying + picture * cut.destinations + match
        if staying:
            # positive numbers, so that their remainder is the same on every back end
            level = torch.round(best * STEPS).to(torch.int64) + 2 * STEPS
            key = level * total + (total - 1 - raster[:, : cut.sources])
            least = key.flatten(1).topk(staying, largest=False).values.flip(1)
            places = torch.cat([total - 1 - least % total, places], 1)
            above = least[:, None, None, :] > key.unsqueeze(-1)
            rank = above.sum(-1, dtype=torch.int32).to(torch.int64)
            goal = torch.where(key <= least[:, :1, None], rank, goal)
        else:
            places = places.contiguous()
        own = torch.arange(cut.destinations, device=device) + picture * cut.destinations
        goal = torch.cat([goal, (staying + own).expand(batch, -1, -1)], -1)
        joins = torch.take_along_dim(goal, cut.position(device).unsqueeze(0), -1)
        return places, joins.flatten(1)

    def merge(self, x: Tensor, pattern: Pattern) -> Tensor:
        """Sources that stay, then the mean of every destination and those that join it."""
        staying = self._staying(pattern)
        groups = self.groups(x, pattern).flatten(1, 2)
        if not staying:
            return groups
        kept = take(x, pattern["places"][:, :staying])
        return torch.cat([kept, groups], 1)

    def groups(self, x: Tensor, pattern: Pattern) -> Tensor:
        """One token for every destination and those that join it: [B, pictures, cells, C]."""
        total, _, share = self.summed(x, self.members(pattern))
        return cast(total / share, x)

    def members(self, pattern: Pattern) -> Tensor:
        """Who belongs to which destination: [B, pictures, cells, n] bool."""
        cut, joins = self.cells, pattern["joins"]
        own = torch.arange(cut.pictures * cut.destinations, device=joins.device)
        own = (own + self._staying(pattern)).view(cut.pictures, cut.destinations, 1)
        return joins.reshape(-1, cut.pictures, 1, cut.tokens) == own

    def summed(self, x: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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

    def kept(self, pattern: Pattern) -> Tensor:
        """`places`."""
        return pattern["places"]

    def _staying(self, pattern: Pattern) -> int:
        """Sources that do not merge."""
        cut = self.cells
        return pattern["places"].shape[1] - cut.pictures * cut.destinations


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
    def off(self) -> bool:
        """Whether the ratio is 0."""
        return self.ratio == 0

    def setting(self, place: Place) -> ToMeSD | str:
        """The cells of a grid, and how many of its tokens merge."""
        if self.off:
            return "ratio is 0"
        if why := self.refusal(place):
            return why
        r = min(int(math.prod(place.grid) * self.ratio), self.sources(place))
        if r == 0:
            return f"ratio {self.ratio} merges no token of a {size_text(place.grid)} grid"
        return self.at_place(place, r)

    def at_place(self, place: Place, r: int) -> ToMeSD:
        """The setting that merges `r` tokens; methods that merge otherwise replace this."""
        unit = place.unit[-2:]
        return ToMeSD(place.grid, unit, self.sy, self.sx, r, self.random, self.seed)

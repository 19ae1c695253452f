"""ToFu: token fusion (Kim et al., arXiv 2312.01026): ToMeSD's matching, pruned or merged by depth.

Early blocks are far from linear: the mean of two tokens is a poor stand-in for either, and dropping
one of them is better. Later blocks are nearer to linear and merge; the mean of different directions
is too short, so it is stretched to the norm of the longest token (MLERP).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from toma_fx.methods.cells import Cells
from toma_fx.methods.checks import is_number
from toma_fx.methods.setting import Pattern, Place
from toma_fx.methods.tomesd import ToMeSD, ToMeSDConfig
from toma_fx.methods.windows import cast, take


@dataclass(frozen=True)
class ToFu(ToMeSD):
    """ToFu at one grid.

    Selects and unmerges as `ToMeSD`. Merges a group into its mean, stretched to the largest norm in
    the group: mean / |mean| * max |x_j|, norms in float32; a group of one is unchanged, a mean of
    norm 0 stays 0. With `prune` destinations stay as they are, and what joined them is dropped.
    Cost: that of ToMeSD, and two norms a token; with `prune`, merging is one lookup. Source: arXiv
    2312.01026.

    Attributes:
        prune: whether to drop instead of merging.
    """

    prune: bool = False

    # Not with `prune` either: merging is then the same as a lookup at `positions`.
    linear: ClassVar[bool] = False

    def describe(self) -> str:
        """The cell, and what happens in it."""
        return f"{super().describe()}, {'pruned' if self.prune else 'norm kept'}"

    def merge(self, x: Tensor, pattern: Pattern) -> Tensor:
        """Sources that stay, then destinations, or what their group becomes."""
        if self.prune:
            return take(x, pattern["places"])
        return super().merge(x, pattern)

    def merge_groups(self, x: Tensor, pattern: Pattern) -> Tensor:
        """The mean of each group in the length of its longest token: [B, pictures, cells, C]."""
        members = self.membership(pattern)
        total, number, share = self.sum_groups(x, members)
        norm = torch.linalg.vector_norm(x.float(), dim=-1)
        norm = norm.reshape(-1, members.shape[1], 1, members.shape[3])
        longest = (members * norm).amax(-1, keepdim=True)
        stretched = F.normalize(total, dim=-1) * longest
        return cast(torch.where(number > 1, stretched, total / share), x)


@dataclass(frozen=True, kw_only=True)
class ToFuConfig(ToMeSDConfig):
    """ToFu: token fusion (Kim et al., arXiv 2312.01026).

    Selects and matches as ToMeSD. In the first blocks of the model drops the matched tokens, in the
    later ones merges them by a mean that keeps the largest norm (MLERP). Unmerges by copying. Cost:
    as ToMeSD; pruning blocks merge by a lookup.

    Attributes:
        prune_depth: share of the model's blocks, from the first, that prune instead of merging, in
            [0, 1].

    The other fields are those of `ToMeSDConfig`.
    """

    prune_depth: float = 0.5

    name: ClassVar[str] = "tofu"
    overridable: ClassVar[tuple[str, ...]] = (*ToMeSDConfig.overridable, "prune_depth")

    def check(self) -> None:
        """Check every field."""
        super().check()
        share = is_number(self.prune_depth) and 0 <= self.prune_depth <= 1
        self.require(share, "prune_depth", "a number in [0, 1], the share of blocks that prune")

    def make_setting(self, place: Place, cells: Cells, r: int) -> ToFu:
        """The setting that prunes or merges `r` tokens."""
        return ToFu(place.grid, cells, r, prune=place.depth < self.prune_depth)

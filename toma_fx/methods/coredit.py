"""CoReDiT: coherence-guided token pruning and reconstruction (Li et al., arXiv 2605.14191).

    x [B, N, C] --select--> idx [B, T, k]     the tokens of a window least like their neighbors
    x, idx      --weights--> unmerge          by cosine similarity with those that stay
    x           --merge--> y [B, T*k, C]      those that stay, unchanged
    y           --unmerge--> x' [B, N, C]     they themselves, or a weighted mean of theirs

Only the paper's abstract was at hand: a spatial coherence score of linear cost says which tokens
are redundant, attention skips those of high coherence, and their outputs are reconstructed by
coherence-guided aggregation of spatially neighboring tokens that stayed. All else here is our
reading of it: the score is the mean cosine similarity with the four neighbors in the picture, every
window keeps as many tokens, and neighbors are the tokens of one window, weighed by a softmax of
their similarity. Its schedule, which adapts the share to blocks and steps, is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from toma_fx.methods.base import Scope, Share
from toma_fx.methods.ranking import similarity_keys
from toma_fx.methods.setting import Pattern, Place
from toma_fx.methods.toma import ToMA, ToMAConfig
from toma_fx.methods.windows import Size, take, to_windows


@dataclass(frozen=True, kw_only=True)
class CoReDiT(ToMA):
    """CoReDiT at one grid.

    Cost: selection takes 4 C multiply-adds a token and a sort of each window; weights take
    k * n * C a window; merging is one lookup.

    Attributes:
        unit: what neighbors must not cross: the grid, or one of several equal images in it.
    """

    unit: Size

    weighed: ClassVar[tuple[str, ...]] = ("unmerge",)

    def share(self, count: int) -> str:
        """Neighbors of a token may lie in other windows."""
        return "it compares tokens with neighbors in other windows"

    def select(self, x: Tensor) -> tuple[Tensor, ...]:
        """The `keep` tokens of every window of the lowest coherence, the lowest first.

        Returns:
            `idx`: window-local indices [B, T, keep], int64. Of equal ones the last of the window.
        """
        score = to_windows(self.coherence(x).unsqueeze(-1), self.grid, self.tile).squeeze(-1)
        tokens = score.shape[-1]
        index = torch.arange(tokens, device=x.device)
        keys = similarity_keys(score, index, tokens)
        return (keys.topk(self.keep, dim=-1, largest=False).indices,)

    def coherence(self, x: Tensor) -> Tensor:
        """Mean cosine similarity of each token with its two to four neighbors: [B, N] float32."""
        height, width = self.unit[-2:]
        planes = math.prod(self.grid) // (height * width)
        unit = F.normalize(x.float(), dim=-1).unflatten(1, (planes, height, width))
        down = (unit[:, :, 1:] * unit[:, :, :-1]).sum(-1)
        right = (unit[..., 1:, :] * unit[..., :-1, :]).sum(-1)
        total = F.pad(down, (0, 0, 0, 1)) + F.pad(down, (0, 0, 1, 0))
        total = total + F.pad(right, (0, 1)) + F.pad(right, (1, 0))
        count = _neighbors(height, x.device)[:, None] + _neighbors(width, x.device)
        return (total / count.clamp(min=1)).flatten(1)

    def weights(self, x: Tensor, chosen: Pattern) -> tuple[Tensor, ...]:
        """Who makes up each token: itself if it stays, else softmax(scale * cosine).

        Returns:
            `unmerge` [B, T, n, keep] in the dtype of `x`, computed in float32.
        """
        unit = F.normalize(to_windows(x, self.grid, self.tile).float(), dim=-1)
        staying = torch.take_along_dim(unit, chosen["idx"].unsqueeze(-1), dim=-2)
        share = torch.softmax(self.scale * (unit @ staying.transpose(-1, -2)), dim=-1)
        index = torch.arange(unit.shape[-2], device=x.device).unsqueeze(-1)
        own = index == chosen["idx"].unsqueeze(-2)
        return (torch.where(own.any(-1, keepdim=True), own.float(), share).to(x.dtype),)

    def merge(self, x: Tensor, pattern: Pattern) -> Tensor:
        """The tokens that stay."""
        return take(x, self.positions(pattern))


def _neighbors(length: int, device: torch.device) -> Tensor:
    """How many neighbors each of `length` tokens in a row has: [length] int64."""
    at = torch.arange(length, device=device)
    return (at > 0).to(torch.int64) + (at < length - 1).to(torch.int64)


@dataclass(frozen=True, kw_only=True)
class CoReDiTConfig(ToMAConfig):
    """CoReDiT: coherence-guided token pruning and reconstruction (Li et al., arXiv 2605.14191).

    Selects in every window the tokens least similar to their neighbors in the picture. Merges
    nothing: the other tokens are skipped. Unmerges by a mean of the window's tokens that stayed,
    weighed by similarity. Cost: selection takes 4 C multiply-adds a token, no pair of a window is
    compared. Read from the abstract alone; `toma_fx.methods.coredit` says which parts are our
    reading.

    Attributes:
        scale: sharpness of the weights of a skipped token.

    The other fields are those of `ToMAConfig`; `inverse` has no effect.
    """

    scope: Scope = "sublayer"
    share: Share = "block"
    branches: tuple[str, ...] = ("attention",)
    destinations_every: int = 1
    weights_every: int = 1

    name: ClassVar[str] = "coredit"

    def setting(self, place: Place) -> ToMA | str:
        """The windows of a grid, and what neighbors must not cross."""
        setting = super().setting(place)
        return replace(setting, unit=place.unit) if isinstance(setting, CoReDiT) else setting

    def make_setting(self, **fields: Any) -> CoReDiT:
        """The setting of ToMA's fields."""
        return CoReDiT(**fields, unit=fields["grid"])

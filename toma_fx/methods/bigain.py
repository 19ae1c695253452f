"""BiGain's Laplacian-gated token merging (Liu et al., CVPR 2026, arXiv 2603.12240).

ToMeSD with one change: the destination of a cell is not its top left token but its smoothest, so
that flat tokens absorb others, and edges and texture are less often what others become.

    score of a token = sum over channels of |up + down + left + right - 4 x|

Read: the abstract, the README and the published code. Not read: the paper's text. The paper's other
operator blends nearest and mean keys; `todo` has both ends of that blend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from toma_fx.methods.cells import Cells
from toma_fx.methods.setting import Place
from toma_fx.methods.tomesd import ToMeSD, ToMeSDConfig


@dataclass(frozen=True)
class BiGain(ToMeSD):
    """BiGain at one grid.

    Selects in every cell the token with the lowest Laplacian score as its destination, of equal
    ones the first. Merges and unmerges as `ToMeSD`. Cost: that of ToMeSD, and five reads of the
    tokens. Source: the published code of arXiv 2603.12240.
    """

    def describe(self) -> str:
        """The cell, and which of its tokens is the destination."""
        return f"{super().describe()}, smoothest"

    def select(self, x: Tensor) -> tuple[Tensor, ...]:
        """`places` [B, M] and `joins` [B, N] int64, for tokens [B, N, C]."""
        slots = self.smoothest(x)
        return self.arrange(*self.match(x, slots), self.r, slots)

    def smoothest(self, x: Tensor) -> Tensor:
        """Which token of its cell, in raster order, has the lowest score: [B, pictures, cells]."""
        cells = self.cells
        planes = x.unflatten(1, (cells.pictures, cells.height, cells.width))
        inside = laplacian_score(planes)[..., : cells.rows * cells.sy, : cells.columns * cells.sx]
        cut = inside.unflatten(3, (cells.columns, cells.sx)).unflatten(2, (cells.rows, cells.sy))
        # [B, pictures, rows, sy, columns, sx]
        slots: Tensor = cut.transpose(3, 4).flatten(4).flatten(2, 3).argmin(-1)
        return slots


def laplacian_score(planes: Tensor) -> Tensor:
    """How far each token is from its four neighbors: [B, pictures, H, W, C] -> [B, pictures, H, W].

    The L1 norm of the discrete Laplacian in float32. Beyond a border there are zeros, as in the
    published convolution, so that tokens at a border count as edges.
    """
    x = planes.float()
    up, down = F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)), F.pad(x[:, :, 1:], (0, 0, 0, 0, 0, 1))
    left, right = F.pad(x[..., :-1, :], (0, 0, 1, 0)), F.pad(x[..., 1:, :], (0, 0, 0, 1))
    return torch.abs(up + down + left + right - 4 * x).sum(-1)


@dataclass(frozen=True, kw_only=True)
class BiGainConfig(ToMeSDConfig):
    """BiGain: Laplacian-gated token merging (Liu et al., CVPR 2026, arXiv 2603.12240).

    Selects the smoothest token of every cell as its destination. Merges the most similar of the
    other tokens into their most similar destination, as a mean. Unmerges by copying. Cost: that of
    ToMeSD, and five reads of the tokens. Written after the published code, without the paper's
    text. `random` and `seed` have no effect.

    The fields are those of `ToMeSDConfig`.
    """

    name: ClassVar[str] = "bigain"

    def make_setting(self, place: Place, cells: Cells, r: int) -> BiGain:
        """The setting that merges `r` tokens."""
        return BiGain(place.grid, cells, r)

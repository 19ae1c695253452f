"""A merging method of one's own: docs/methods.md goes through it.

In every window the tokens that differ most from the window's mean stay, because they carry the
detail; each other token joins the most similar of them.

    python examples/own_method.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import toma_fx
from toma_fx.methods.setting import Pattern
from toma_fx.methods.windows import (
    Size,
    dividing_tile,
    from_windows,
    merge_windows,
    to_windows,
    token_index,
    window_count,
)


@dataclass(frozen=True)
class Salient(toma_fx.Setting):
    """The method at one token grid: `keep` tokens of each `tile` stay."""

    tile: Size
    keep: int

    chosen = ("idx", "joins")

    @property
    def merged_count(self) -> int:
        """Tokens after merging."""
        return window_count(self.grid, self.tile)[0] * self.keep

    def describe(self) -> str:
        """For the table of `toma_fx.explain`."""
        return f"{self.keep} of {math.prod(self.tile)}"

    def select(self, x: Tensor) -> tuple[Tensor, ...]:
        """Who stays [B, T, k], and whom each token joins [B, T, n]."""
        unit = F.normalize(to_windows(x, self.grid, self.tile).float(), dim=-1)
        similarity = (unit * unit.mean(-2, keepdim=True)).sum(-1)
        idx = similarity.topk(self.keep, largest=False).indices
        staying = torch.take_along_dim(unit, idx.unsqueeze(-1), -2)
        return idx, (unit @ staying.transpose(-1, -2)).argmax(-1)

    def merge(self, x: Tensor, pattern: Pattern) -> Tensor:
        """The mean of every group."""
        group = torch.arange(self.keep, device=x.device).unsqueeze(-1)
        member = (pattern["joins"].unsqueeze(-2) == group).to(x.dtype)
        share = member / member.sum(-1, keepdim=True).clamp(min=1)
        return merge_windows(x, share, self.grid, self.tile)

    def unmerge(self, y: Tensor, pattern: Pattern) -> Tensor:
        """Every token gets a copy of its group's."""
        windows = y.unflatten(1, (-1, self.keep))
        copies = torch.take_along_dim(windows, pattern["joins"].unsqueeze(-1), -2)
        return from_windows(copies, self.grid, self.tile)

    def positions(self, pattern: Pattern) -> Tensor:
        """Where the tokens that stay are, for rotary tables and masks."""
        return token_index(pattern["idx"], self.grid, self.tile)


@dataclass(frozen=True, kw_only=True)
class SalientConfig(toma_fx.MethodConfig):
    """What users write: `toma_fx.optimize(model, method=SalientConfig, ratio=0.5)`."""

    ratio: float = 0.5
    window: int = 16

    name = "salient"
    overridable = ("ratio", "window", "min_tokens")

    def check(self) -> None:
        """Check every field."""
        super().check()
        self.check_ratio()
        self.check_count("window")

    def setting(self, place: toma_fx.Place) -> Salient | str:
        """The setting for a grid, or why there is none."""
        tile = dividing_tile(place.unit, self.window)
        keep = math.prod(tile) - int(math.prod(tile) * self.ratio)
        if keep == math.prod(tile):
            return f"ratio {self.ratio} merges nothing"
        return Salient(place.grid, tile, keep)


def main() -> None:
    """Merge an embedded model by the method above."""
    from toma_fx.models import tiny

    model = tiny.load("tiny-sdxl")
    labels = [tiny.CLASSES.index("cat")]
    plain = model.generate(labels, steps=10)
    methods = {"salient": SalientConfig, "tomesd": "tomesd", "random": "random"}
    for name, method in methods.items():
        optimized = toma_fx.optimize(
            model.denoiser, method=method, scope="sublayer", branches="attention", min_tokens=256
        )
        merged = model.generate(labels, steps=10, denoiser=optimized)
        print(f"{name:8} squared error {float((merged - plain).square().mean()):.5f}")


if __name__ == "__main__":
    main()

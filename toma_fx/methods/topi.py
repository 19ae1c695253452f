"""Merging of reference images alone, the placement of ToPi (Lin et al., arXiv 2602.01609).

    sequence   [text | picture | reference, reference ...]     Flux Kontext, Flux.2, Qwen-Image-Edit
    merged     [text | picture | fewer tokens of references]

In a model that is given pictures to edit or to follow, their tokens are context: they stay the same
from step to step, and what the model makes of them at the end is thrown away. The tokens that are
drawn all stay.

Only the paper's abstract was at hand: context tokens are pruned, those being drawn are not; which
ones, a metric of their influence tells, read off attention layers that calibration finds; it is
updated as steps go on. Of this, the placement is here. Which tokens stay and what becomes of the
others is ToMA's: there is no metric of influence and no calibration, and merging takes the place of
pruning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from toma_fx.methods.setting import Pattern, Place, Setting
from toma_fx.methods.toma import ToMA, ToMAConfig


@dataclass(frozen=True)
class ToPi(Setting):
    """ToPi's placement at one grid: the first image stays whole, ToMA merges the others.

    Attributes:
        target: tokens of the first image. references: how the others merge, as one grid.
    """

    target: int
    references: ToMA

    chosen: ClassVar[tuple[str, ...]] = ToMA.chosen
    weighed: ClassVar[tuple[str, ...]] = ToMA.weighed

    @property
    def merged_count(self) -> int:
        """Tokens after merging, of all images."""
        return self.target + self.references.merged_count

    def describe(self) -> str:
        """The window, and where."""
        return f"{self.references.describe()} of references"

    def select(self, x: Tensor) -> tuple[Tensor, ...]:
        """ToMA's destinations among the tokens of references."""
        return self.references.select(x[:, self.target :])

    def weights(self, x: Tensor, chosen: Pattern) -> tuple[Tensor, ...]:
        """ToMA's weights for them."""
        return self.references.weights(x[:, self.target :], chosen)

    def merge(self, x: Tensor, pattern: Pattern) -> Tensor:
        """The first image as it is, the others merged."""
        merged = self.references.merge(x[:, self.target :], pattern)
        return torch.cat([x[:, : self.target], merged], 1)

    def unmerge(self, y: Tensor, pattern: Pattern) -> Tensor:
        """The first image as it is, the others unmerged."""
        restored = self.references.unmerge(y[:, self.target :], pattern)
        return torch.cat([y[:, : self.target], restored], 1)

    def positions(self, pattern: Pattern) -> Tensor:
        """All tokens of the first image, then the destinations."""
        kept = self.target + self.references.positions(pattern)
        own = torch.arange(self.target, device=kept.device)
        return torch.cat([own.expand(len(kept), -1), kept], 1)

    def sizes(self, pattern: Pattern) -> Tensor:
        """1 for the first image, then ToMA's."""
        sizes = self.references.sizes(pattern)
        return torch.cat([sizes.new_ones(len(sizes), self.target), sizes], 1)


@dataclass(frozen=True, kw_only=True)
class ToPiConfig(ToMAConfig):
    """Merging of reference images alone, the placement of ToPi (Lin et al., arXiv 2602.01609).

    Selects as ToMA, among the tokens of every image of a sequence but the first, once for a
    generation. Merges and unmerges them as ToMA; the first image stays whole. Cost: ToMA's on fewer
    tokens, and its selection only once. The paper's own metric was not read and is not built;
    `toma_fx.methods.topi` says what is.

    For sequences of several images of one width, of which the first is drawn; frames of a video
    look the same. References of another width are no images to the analysis and stay whole.

    Attributes:
        ratio: share of the tokens of references that is merged away.

    The other fields are those of `ToMAConfig`.
    """

    select_at: tuple[int, ...] | None = (0,)
    weights_every: int = 1000

    name: ClassVar[str] = "topi"

    def setting(self, place: Place) -> ToPi | str:  # type: ignore[override]  # it holds a ToMA
        """ToMA for the images after the first; a reason if there are none."""
        first, *others = place.heights or (0,)
        if not others:
            return "there is no reference: the sequence holds one image"
        width = place.grid[-1]
        grid, unit = (sum(others), width), (math.gcd(*others), width)
        references = super().setting(replace(place, grid=grid, unit=unit))
        if isinstance(references, str):
            return references
        return ToPi(place.grid, first * width, references)

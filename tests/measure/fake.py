"""A subject that draws at once: the tests of runs need no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import toma_fx
from toma_fx.measure.cases import Case
from toma_fx.measure.subjects import Settings, Subject


class FakeSubject(Subject):
    """Noise by the seed; what is "optimized" adds noise of its own.

    Attributes:
        drawn: (prompt, configuration) of each picture.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            "fake", {"denoiser": nn.Linear(2, 2).requires_grad_(False)}, Settings(**settings)
        )
        nn.init.ones_(self.denoisers["denoiser"].weight)
        nn.init.ones_(self.denoisers["denoiser"].bias)
        self.drawn: list[tuple[str, str]] = []

    def draw(self, cases: Sequence[Case], config: Any = None) -> Tensor:
        name = "original" if config is None else config.name
        self.drawn += [(case.prompt, name) for case in cases]
        pictures = []
        for case in cases:
            g = torch.Generator().manual_seed(case.seed)
            picture = torch.rand(3, 16, 16, generator=g)
            if config is not None:
                strength = 0.02 * (1 + case.seed) * (1 + (name == "tomesd"))
                picture = picture + strength * torch.randn(3, 16, 16, generator=g)
            pictures.append(picture.clamp(0, 1))
        return torch.stack(pictures)

    def _generate(self, cases: Sequence[Case], denoisers: Mapping[str, Any]) -> Tensor:
        raise NotImplementedError


def run(out: Any, subject: Any = None, **changes: Any) -> Any:
    """A run of four pictures and two configurations, not timed."""
    arguments = {"prompts": ["a", "b", "c", "d"], "configs": ["toma", "tomesd"], "rounds": 0}
    return toma_fx.quality(subject or FakeSubject(), out=out, **{**arguments, **changes})

"""The smallest denoiser with a text, its calls, and the plain truth about them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import toma_fx
from tests.methods.test_methods import inputs, model

CONFIG: dict[str, Any] = {"min_tokens": 1, "destinations_every": 4, "weights_every": 4}


class Texted(nn.Module):
    """A model of one block whose picture is brighter for some texts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """A step; `encoder_hidden_states` is [1, 3]."""
        out: Tensor = self.inner(sample=sample + encoder_hidden_states.mean(), timestep=timestep)
        return out


@cache
def denoiser() -> nn.Module:
    """A model to optimize; it is shared, and not to be changed."""
    return Texted().eval()


def optimized(**options: Any) -> Any:
    """The denoiser with merging."""
    return toma_fx.optimize(denoiser(), **{**CONFIG, **options})


@cache
def text_of(seed: int) -> Tensor:
    """A text, the same tensor every time."""
    return torch.randn(1, 3, generator=torch.Generator().manual_seed(seed))


def call(seed: int, step: int, text: Tensor | None = None, **size: Any) -> dict[str, Any]:
    """The call of a step of a picture; its text is that of the seed if none is given."""
    own = inputs(seed=seed * 100 + step, timestep=900.0 - 100 * step, **size)
    return {**own, "encoder_hidden_states": text_of(seed) if text is None else text}


def truth(optimized: Any, calls: Iterable[tuple[Any, dict[str, Any]]]) -> list[Tensor]:
    """What `step` gives for (name of the pass, call) with one state for each pass."""
    states: dict[Any, toma_fx.State] = {}
    outputs = []
    for name, each in calls:
        output, states[name] = optimized.step(each, states.get(name, toma_fx.State()))
        outputs.append(output)
    return outputs


def same(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Whether two lists of outputs are bit-equal."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

"""What the matrix of denoisers knows about each: how to build it, call it, and what must merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Crop:
    """How to ask the model itself for the top left `size` tokens, if its positions allow that.

    Attributes:
        size: token grid (h, w) or (t, h, w) of the corner.
        inputs: the call that sees this corner alone.
        output: cuts the corner out of the whole output.
    """

    size: tuple[int, ...]
    inputs: Callable[[Inputs], Inputs]
    output: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One denoiser of the matrix.

    Attributes:
        name: short unique name. title: what users call it.
        build: a tiny seeded model of the real class, in evaluation mode.
        inputs: seed -> keyword arguments; shapes and constants are the same for every seed.
        grids: token grid (H, W) or (T, H, W) of every image segment that merges.
        sites: number of scaled-dot-product attentions of each kind in the whole model.
        attention, mlp: branches that merge in scope "sublayer": with attention, and without.
        why: where these counts come from in the model's code.
        config: fields of ToMAConfig that the case needs.
        refused: (error type name, part of its message) if the model can't be merged.
        crop: see `Crop`.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    grids: tuple[tuple[int, ...], ...] = ()
    sites: Mapping[str, int] = field(default_factory=dict)
    attention: int = 0
    mlp: int = 0
    why: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    refused: tuple[str, str] | None = None
    crop: Crop | None = None


def lively(model: nn.Module) -> nn.Module:
    """Evaluation mode, with every parameter away from values that would hide an error.

    Biases and norms leave their zeros and ones; zero-initialized matrices (gates, last layers)
    get weights.
    """
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=g)
            if parameter.dim() == 1 or not parameter.any():
                parameter.add_(0.1 * noise)
    return model.eval().requires_grad_(False)


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A factory whose model is the same at every call."""

    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return lively(make())

    return build


def randn(seed: int, *shape: int) -> Tensor:
    """Normal noise of its own generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

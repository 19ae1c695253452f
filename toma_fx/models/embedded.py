"""What embedded models have in common: they draw pictures of prompts with a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class EmbeddedModel(Protocol):
    """A small trained model: a denoiser, and all that it takes to draw pictures with it."""

    @property
    def name(self) -> str:
        """Of the model, as in `toma_fx.models.named`."""

    @property
    def denoiser(self) -> nn.Module:
        """A module of diffusers."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Texts that it knows how to draw."""

    @property
    def size(self) -> int:
        """Pixels a side."""

    def step_inputs(
        self, prompts: Sequence[str], t: float, /, *, seed: int | Sequence[int] = 0
    ) -> dict[str, Any]:
        """Keyword arguments of one denoiser call at time `t` (1 is pure noise) on fresh noise."""

    def generate(
        self,
        prompts: Sequence[str],
        /,
        *,
        seed: int | Sequence[int] = 0,
        steps: int = ...,
        guidance: float = 1.0,
        denoiser: Callable[..., Any] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Draw one picture per prompt, [B, 3, size, size] in [-1, 1].

        `seed` is that of the batch, or one for each picture, whose noise then depends on it alone.
        `denoiser` replaces the model's own. `guidance` above 1 doubles the batch.

        Raises:
            UnknownNameError: the model does not know a prompt.
        """

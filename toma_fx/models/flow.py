"""What the embedded models share: inputs of their denoisers, and drawing by rectified flow.

A `UNet2DConditionModel` shaped like SDXL's takes the grid of values as it is, a
`FluxTransformer2DModel` as tokens of 2x2 values. Which one a model is, its name ends with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def pack(x: Tensor) -> Tensor:
    """[B, C, H, W] -> Flux's packed tokens [B, (H/2)*(W/2), 4 C]."""
    return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `pack`: [B, (H/2)*(W/2), 4 C] -> [B, C, H, W]."""
    grid = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return F.pixel_shuffle(grid, 2)


@dataclass(frozen=True)
class Flow:
    """Flow between noise and a grid of values: pixels, or latents.

    Attributes:
        channels, side: of the full grid. pixels: a side of one value.
    """

    channels: int
    side: int
    pixels: int = 1

    def image_ids(self, height: int, width: int, *, device: torch.device | None = None) -> Tensor:
        """Flux position ids of the packed tokens of `height` x `width` values, float32.

        Positions count tokens of the full grid; fewer values are the same scene on a coarser grid,
        so that their tokens lie further apart (training starts there).

        Returns:
            [(H/2)*(W/2), 3].
        """
        rows, columns = height // 2, width // 2
        step = self.side / height
        y = (torch.arange(rows, device=device) + 0.5) * step - 0.5
        x = (torch.arange(columns, device=device) + 0.5) * step - 0.5
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)
        return torch.cat([torch.zeros(rows * columns, 1, device=device), grid], 1)

    def denoiser_inputs(
        self, name: str, x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor
    ) -> dict[str, Any]:
        """Keyword arguments of one denoiser call.

        Args:
            name: of the model. x: values with noise [B, C, H, W]. t: [B] in [0, 1], 1 is pure
                noise. tokens: text [B, T, D]. pooled: [B, D].
        """
        height, width = x.shape[-2:]
        shared = {"encoder_hidden_states": tokens, "return_dict": False}
        if name.endswith("sdxl"):
            sides = [height * self.pixels, width * self.pixels]
            size = torch.tensor([*sides, 0, 0, *sides], dtype=x.dtype, device=x.device)
            conditions = {"text_embeds": pooled, "time_ids": size.expand(len(x), 6)}
            return {"sample": x, "timestep": t * 1000, "added_cond_kwargs": conditions, **shared}
        return {
            "hidden_states": pack(x),
            "pooled_projections": pooled,
            "timestep": t,
            "img_ids": self.image_ids(height, width, device=x.device),
            "txt_ids": torch.zeros(tokens.shape[1], 3, device=x.device),
            **shared,
        }

    def velocity(
        self,
        name: str,
        denoiser: Callable[..., Any],
        x: Tensor,
        t: Tensor,
        tokens: Tensor,
        pooled: Tensor,
    ) -> Tensor:
        """Predicted velocity (noise minus values), [B, C, H, W]."""
        out: Tensor = denoiser(**self.denoiser_inputs(name, x, t, tokens, pooled))[0]
        return out if name.endswith("sdxl") else unpack(out, *x.shape[-2:])

    def noise(self, count: int, seed: int | Sequence[int]) -> Tensor:
        """Noise [count, C, side, side]; of one seed for all, or one for each."""
        shape = self.channels, self.side, self.side
        if isinstance(seed, int):
            return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
        each = (torch.Generator().manual_seed(one) for one in seed)
        return torch.stack([torch.randn(shape, generator=g) for g in each])

    def integrate(
        self,
        name: str,
        denoiser: Callable[..., Any],
        noise: Tensor,
        tokens: Tensor,
        pooled: Tensor,
        *,
        steps: int,
        guidance: float,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Values [B, C, H, W] of noise, by Euler steps.

        With `guidance` above 1 `tokens` and `pooled` are of twice as many rows, the unconditional
        ones first, as in SDXL pipelines. `on_step(i)` is called after each step.
        """
        x, guided = noise, guidance > 1.0
        times = torch.linspace(1, 0, steps + 1, device=noise.device)
        for i in range(steps):
            batch = torch.cat([x, x]) if guided else x
            v = self.velocity(name, denoiser, batch, times[i].expand(len(batch)), tokens, pooled)
            if guided:
                unconditional, conditional = v.chunk(2)
                v = unconditional + guidance * (conditional - unconditional)
            x = x + (times[i + 1] - times[i]) * v
            if on_step is not None:
                on_step(i)
        return x


def build(name: str, configs: dict[str, dict[str, Any]]) -> Any:
    """The untrained denoiser of a model; `configs` are of all models, by name."""
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel

    kind = UNet2DConditionModel if name.endswith("sdxl") else FluxTransformer2DModel
    return kind(**configs[name])

"""Two small trained denoisers that ship with the package, and their sampler.

`tiny-sdxl` is a `UNet2DConditionModel` with SDXL's conditioning (text_time) and two attention
resolutions; `tiny-flux` is a `FluxTransformer2DModel`. Both work on 64x64 RGB pixels (no VAE), are
conditioned on one of twelve photographs, and were trained with rectified flow by
`examples/train_tiny.py`. They exist so that the demo, the benchmarks and the tests have a real
model that needs no download.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from toma_fx.errors import UnknownNameError, nearest
from toma_fx.models import flow
from toma_fx.models.flow import Flow

CLASSES: tuple[str, ...] = (
    "astronaut",
    "camera",
    "cat",
    "clock",
    "coffee",
    "coins",
    "grass",
    "hubble",
    "retina",
    "rocket",
    "china",
    "flower",
)
SIZE = 64
"""Pixels a side."""
TEXT_TOKENS = 4
COND_DIM = 64
TIME_ID_DIM = 16
SDXL_CONFIG: dict[str, Any] = {
    "sample_size": SIZE,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64, 112),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 7),
    "use_linear_projection": True,
    "norm_num_groups": 16,
    "cross_attention_dim": COND_DIM,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_ID_DIM,
    "projection_class_embeddings_input_dim": COND_DIM + 6 * TIME_ID_DIM,
}
FLUX_CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 12,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 5,
    "joint_attention_dim": COND_DIM,
    "pooled_projection_dim": COND_DIM,
    "axes_dims_rope": (8, 12, 12),
}
NAMES = ("tiny-sdxl", "tiny-flux")
FLOW = Flow(channels=3, side=SIZE)
"""Between noise and pixels."""


class ClassConditioning(nn.Module):
    """Learned stand-in for a text encoder: class index -> (tokens, pooled).

    Index `len(CLASSES)` is the empty prompt of classifier-free guidance.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(len(CLASSES) + 1, TEXT_TOKENS * COND_DIM)
        self.pooled = nn.Embedding(len(CLASSES) + 1, COND_DIM)

    def forward(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`labels` [B] int64 -> tokens [B, 4, 64], pooled [B, 64]."""
        return self.tokens(labels).unflatten(-1, (TEXT_TOKENS, COND_DIM)), self.pooled(labels)


def build(name: str) -> nn.Module:
    """The untrained architecture `name` ("tiny-sdxl" or "tiny-flux")."""
    return cast(nn.Module, flow.build(name, {NAMES[0]: SDXL_CONFIG, NAMES[1]: FLUX_CONFIG}))


@dataclass(frozen=True)
class TinyModel:
    """A loaded embedded model: the diffusers denoiser and its class conditioning."""

    name: str
    denoiser: nn.Module
    conditioning: ClassConditioning

    @property
    def prompts(self) -> tuple[str, ...]:
        """What it draws, `CLASSES`."""
        return CLASSES

    @property
    def size(self) -> int:
        """Pixels a side."""
        return SIZE

    @torch.no_grad()
    def step_inputs(
        self, labels: Sequence[int | str], t: float, *, seed: int | Sequence[int] = 0
    ) -> dict[str, Any]:
        """Keyword arguments of one denoiser call at time `t` (1 is pure noise) on fresh noise."""
        tokens, pooled = self.conditioning(torch.tensor([_label(each) for each in labels]))
        images, times = FLOW.noise(len(labels), seed), torch.full((len(labels),), t)
        return FLOW.denoiser_inputs(self.name, images, times, tokens, pooled)

    @torch.no_grad()
    def generate(
        self,
        labels: Sequence[int | str],
        *,
        seed: int | Sequence[int] = 0,
        steps: int = 20,
        guidance: float = 1.0,
        denoiser: Callable[..., Any] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Draw one picture per label with Euler steps of the flow, [B, 3, 64, 64] in [-1, 1].

        A label is one of `CLASSES` or its index. `seed` is that of the batch, or one for each
        picture, whose noise then depends on it alone.
        `denoiser` replaces the model's own (an optimized or compiled one). With `guidance` above 1
        the unconditional half of the batch comes first, as in SDXL pipelines. `on_step(i)` is
        called after each of the `steps` steps.

        Raises:
            UnknownNameError: there is no such class.
        """
        classes = torch.tensor([_label(each) for each in labels])
        if guidance > 1.0:
            classes = torch.cat([torch.full_like(classes, len(CLASSES)), classes])
        images = FLOW.integrate(
            self.name,
            self.denoiser if denoiser is None else denoiser,
            FLOW.noise(len(labels), seed),
            *self.conditioning(classes),
            steps=steps,
            guidance=guidance,
            on_step=on_step,
        )
        return images.clamp(-1, 1)


def _label(label: int | str) -> int:
    """The index of a class."""
    if not isinstance(label, str):
        return label
    if label in CLASSES:
        return CLASSES.index(label)
    raise UnknownNameError(
        "a pixel model draws its classes only",
        where="prompt",
        expected="a name of a class",
        got=repr(label),
        hint=nearest(label, CLASSES),
    )


def weights_dir(name: str) -> Path:
    """Folder of the embedded weights of `name`."""
    return Path(__file__).parent / "weights" / name


def load(name: str) -> TinyModel:
    """Load an embedded model in float32, evaluation mode (stored in float16)."""
    from safetensors.torch import load_file

    folder = weights_dir(name)
    denoiser = build(name)
    denoiser.load_state_dict(load_file(folder / "denoiser.safetensors"))
    conditioning = ClassConditioning()
    conditioning.load_state_dict(load_file(folder / "conditioning.safetensors"))
    return TinyModel(name, denoiser.eval(), conditioning.eval().requires_grad_(False))

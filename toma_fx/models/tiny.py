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


def pack(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> Flux's packed tokens [B, (H/2)*(W/2), 12]."""
    return nn.functional.pixel_unshuffle(images, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `pack`: [B, (H/2)*(W/2), 12] -> [B, 3, H, W]."""
    grid = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return nn.functional.pixel_shuffle(grid, 2)


def image_ids(
    height: int, width: int, *, full: int = SIZE, device: torch.device | None = None
) -> Tensor:
    """Flux position ids of the packed tokens, [(H/2)*(W/2), 3] float32.

    Positions are counted in tokens of a picture of `full` pixels; a smaller picture is the same
    scene on a coarser grid, so its tokens lie further apart (training starts at half the size).
    """
    rows, columns = height // 2, width // 2
    step = full / height
    y = (torch.arange(rows, device=device) + 0.5) * step - 0.5
    x = (torch.arange(columns, device=device) + 0.5) * step - 0.5
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)
    return torch.cat([torch.zeros(rows * columns, 1, device=device), grid], 1)


def denoiser_inputs(
    name: str, images: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor
) -> dict[str, Any]:
    """Keyword arguments of one denoiser call.

    `images` [B, 3, H, W] noisy pixels, `t` [B] in [0, 1] (1 is pure noise), `tokens`/`pooled` from
    `ClassConditioning`.
    """
    height, width = images.shape[-2:]
    if name == "tiny-sdxl":
        size = torch.tensor([height, width, 0, 0, height, width], dtype=images.dtype)
        time_ids = size.to(images.device).expand(len(images), 6)
        return {
            "sample": images,
            "timestep": t * 1000,
            "encoder_hidden_states": tokens,
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids},
            "return_dict": False,
        }
    return {
        "hidden_states": pack(images),
        "encoder_hidden_states": tokens,
        "pooled_projections": pooled,
        "timestep": t,
        "img_ids": image_ids(height, width, device=images.device),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3, device=images.device),
        "return_dict": False,
    }


def velocity(
    name: str,
    denoiser: Callable[..., Any],
    images: Tensor,
    t: Tensor,
    tokens: Tensor,
    pooled: Tensor,
) -> Tensor:
    """Predicted velocity (noise minus picture), [B, 3, H, W]."""
    out: Tensor = denoiser(**denoiser_inputs(name, images, t, tokens, pooled))[0]
    return out if name == "tiny-sdxl" else unpack(out, *images.shape[-2:])


def build(name: str) -> nn.Module:
    """The untrained architecture `name` ("tiny-sdxl" or "tiny-flux")."""
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel

    if name == "tiny-sdxl":
        return cast(nn.Module, UNet2DConditionModel(**SDXL_CONFIG))
    return cast(nn.Module, FluxTransformer2DModel(**FLUX_CONFIG))


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
        images = _noise(len(labels), seed)
        return denoiser_inputs(self.name, images, torch.full((len(labels),), t), tokens, pooled)

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
        run = self.denoiser if denoiser is None else denoiser
        classes = torch.tensor([_label(each) for each in labels])
        guided = guidance > 1.0
        if guided:
            classes = torch.cat([torch.full_like(classes, len(CLASSES)), classes])
        tokens, pooled = self.conditioning(classes)
        images = _noise(len(labels), seed)
        times = torch.linspace(1, 0, steps + 1)
        for i in range(steps):
            batch = torch.cat([images, images]) if guided else images
            v = velocity(self.name, run, batch, times[i].expand(len(batch)), tokens, pooled)
            if guided:
                unconditional, conditional = v.chunk(2)
                v = unconditional + guidance * (conditional - unconditional)
            images = images + (times[i + 1] - times[i]) * v
            if on_step is not None:
                on_step(i)
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


def _noise(count: int, seed: int | Sequence[int]) -> Tensor:
    """Noise of `count` pictures."""
    if isinstance(seed, int):
        return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    each = (torch.Generator().manual_seed(one) for one in seed)
    return torch.stack([torch.randn(3, SIZE, SIZE, generator=g) for g in each])


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

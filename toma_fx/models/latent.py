"""Two small latent denoisers, with their autoencoder and text encoder.

`latent-sdxl` is a `UNet2DConditionModel` shaped like SDXL's (text_time conditioning, a first level
of convolutions alone, attention at 32x32 and 16x16 tokens); `latent-flux` is a
`FluxTransformer2DModel` on 32x32 tokens of 2x2 latents. Both are to draw pictures of 256x256 pixels
from captions such as "a photo of a cat, at sunset, mirrored". As in real pipelines, the denoiser
works on latents (8x64x64) that an autoencoder decodes, and its text comes from an encoder.

No weights ship: `examples/train_latent.py` trains them, with rectified flow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toma_fx.errors import ModelTypeError
from toma_fx.models import flow, tiny
from toma_fx.models.captions import PROMPTS, TEXT_TOKENS, VOCABULARY, token_ids
from toma_fx.models.flow import Flow

NAMES = ("latent-sdxl", "latent-flux")
SIZE = 256
"""Pixels a side."""
FACTOR = 4
"""Pixels a side of one latent."""
CHANNELS = 8
"""Channels of the latents."""
GRID = SIZE // FACTOR
"""Latents a side."""
FLOW = Flow(CHANNELS, GRID, FACTOR)
"""Between noise and latents."""
TEXT_DIM = 128
TIME_ID_DIM = 16

SDXL_CONFIG: dict[str, Any] = {
    "sample_size": GRID,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 96, 160),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2, 2),
    "attention_head_dim": (1, 3, 5),
    "use_linear_projection": True,
    "norm_num_groups": 16,
    "cross_attention_dim": TEXT_DIM,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_ID_DIM,
    "projection_class_embeddings_input_dim": TEXT_DIM + 6 * TIME_ID_DIM,
}
FLUX_CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 4 * CHANNELS,
    "num_layers": 2,
    "num_single_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": TEXT_DIM,
    "pooled_projection_dim": TEXT_DIM,
    "axes_dims_rope": (8, 12, 12),
}


class TextEncoder(nn.Module):
    """Learned words and positions through one transformer layer: ids -> (tokens, pooled)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(VOCABULARY), TEXT_DIM)
        self.positions = nn.Parameter(0.02 * torch.randn(TEXT_TOKENS, TEXT_DIM))
        self.norm = nn.LayerNorm(TEXT_DIM)
        self.attention = nn.MultiheadAttention(TEXT_DIM, 4, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(TEXT_DIM),
            nn.Linear(TEXT_DIM, 2 * TEXT_DIM),
            nn.GELU(),
            nn.Linear(2 * TEXT_DIM, TEXT_DIM),
        )
        self.final = nn.LayerNorm(TEXT_DIM)
        self.pool = nn.Linear(TEXT_DIM, TEXT_DIM)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """`ids` [B, 16] int64 -> tokens [B, 16, 128], pooled [B, 128]."""
        x = self.words(ids) + self.positions
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = self.final(x + self.mlp(x))
        return x, self.pool(x.mean(1))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, x + self.conv2(F.silu(self.conv1(F.silu(x)))))


class Autoencoder(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] <-> latents [B, 8, H/4, W/4] of about unit variance.

    Convolutions at a quarter (and, to decode, half) of the resolution correct a linear map of 4x4
    pixels, which starts as the principal components. It is cheaper on a CPU than `AutoencoderKL`,
    whose first and last levels work on every pixel.
    """

    def __init__(self, width: int = 96, fine: int = 32) -> None:
        super().__init__()
        pixels = 3 * FACTOR**2
        self.linear_encoder = nn.Conv2d(pixels, CHANNELS, 1)
        self.encoder = nn.Sequential(
            nn.Conv2d(pixels, width, 3, padding=1),
            *(_Residual(width) for _ in range(2)),
            nn.SiLU(),
            nn.Conv2d(width, CHANNELS, 3, padding=1),
        )
        self.linear_decoder = nn.Conv2d(CHANNELS, pixels, 1)
        self.decoder = nn.Sequential(
            nn.Conv2d(CHANNELS, width, 3, padding=1),
            *(_Residual(width) for _ in range(4)),
            nn.SiLU(),
            nn.Conv2d(width, 4 * fine, 3, padding=1),
            nn.PixelShuffle(2),
            _Residual(fine),
            nn.SiLU(),
            nn.Conv2d(fine, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.zeros(CHANNELS, 1, 1))
        self.register_buffer("scale", torch.ones(()))

    def encode(self, images: Tensor) -> Tensor:
        """Latents of pictures."""
        x = F.pixel_unshuffle(images, FACTOR)
        latents: Tensor = self.linear_encoder(x) + self.encoder(x)
        return (latents - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of latents, not clamped."""
        x = latents / self.scale + self.shift
        images: Tensor = F.pixel_shuffle(self.linear_decoder(x), FACTOR) + self.decoder(x)
        return images


def build(name: str) -> nn.Module:
    """The untrained denoiser `name` ("latent-sdxl" or "latent-flux")."""
    return cast(nn.Module, flow.build(name, {NAMES[0]: SDXL_CONFIG, NAMES[1]: FLUX_CONFIG}))


@dataclass(frozen=True)
class LatentModel:
    """A loaded embedded model: the diffusers denoiser, its text encoder and its autoencoder."""

    name: str
    denoiser: nn.Module
    text: TextEncoder
    autoencoder: Autoencoder

    @property
    def prompts(self) -> tuple[str, ...]:
        """The captions of which pictures exist; other orders and parts of them work too."""
        return PROMPTS

    @property
    def size(self) -> int:
        """Pixels a side."""
        return SIZE

    @torch.no_grad()
    def step_inputs(
        self, prompts: Sequence[str], t: float, *, seed: int | Sequence[int] = 0
    ) -> dict[str, Any]:
        """Keyword arguments of one denoiser call at time `t` (1 is pure noise) on fresh noise."""
        device = self.text.positions.device
        latents = FLOW.noise(len(prompts), seed).to(device)
        times = torch.full((len(prompts),), t, device=device)
        text = self.text(token_ids(prompts).to(device))
        return FLOW.denoiser_inputs(self.name, latents, times, *text)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        steps: int = 24,
        guidance: float = 1.0,
        denoiser: Callable[..., Any] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Draw one picture per prompt with Euler steps of the flow, [B, 3, 256, 256] in [-1, 1].

        A prompt is a text of words in `VOCABULARY`; the empty one is the unconditional. `seed` is
        that of the batch, or one for each picture, whose noise then depends on it alone.
        `denoiser` replaces the model's own (an optimized or compiled one). With `guidance` above 1
        the unconditional half of the batch comes first, as in SDXL pipelines. `on_step(i)` is
        called after each of the `steps` steps.

        Raises:
            UnknownNameError: a word is unknown, or there are too many.
        """
        texts = [""] * len(prompts) * (guidance > 1.0) + list(prompts)
        device = self.text.positions.device
        latents = FLOW.integrate(
            self.name,
            self.denoiser if denoiser is None else denoiser,
            FLOW.noise(len(prompts), seed).to(device),
            *self.text(token_ids(texts).to(device)),
            steps=steps,
            guidance=guidance,
            on_step=on_step,
        )
        return self.autoencoder.decode(latents).clamp(-1, 1)


def load(name: str, weights: Path | None = None) -> LatentModel:
    """Load a model in float32, evaluation mode (stored in float16).

    Args:
        name: "latent-sdxl" or "latent-flux".
        weights: folder with `name`/denoiser.safetensors, `name`/text.safetensors and
            latent-autoencoder/autoencoder.safetensors, as `examples/train_latent.py export` writes.

    Raises:
        ModelTypeError: there are no such weights.
    """
    from safetensors.torch import load_file

    root = weights or tiny.weights_dir(name).parent
    parts = {"denoiser": build(name), "text": TextEncoder(), "autoencoder": Autoencoder()}
    for part, module in parts.items():
        file = root / ("latent-autoencoder" if part == "autoencoder" else name)
        file = file / f"{part}.safetensors"
        if not file.is_file():
            raise ModelTypeError(
                f"{name} has no weights",
                where=str(file),
                expected="the files that examples/train_latent.py writes",
                got="no such file",
                hint="train it, then load(name, folder)",
            )
        module.load_state_dict(load_file(file))
        module.eval().requires_grad_(False)
    return LatentModel(name, **cast(dict[str, Any], parts))

"""Small denoisers with real diffusers classes, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import nn


def sdxl(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """SDXL's shape in miniature: attention at two resolutions, one and two layers deep."""
    torch.manual_seed(seed)
    config = {
        "sample_size": 32,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16, 32),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 2, 4),
        "use_linear_projection": True,
        "norm_num_groups": 4,
        "cross_attention_dim": 24,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    }
    return _lively(UNet2DConditionModel(**{**config, **changes}))


def small_sdxl(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """SDXL's shape with one level of attention, three transformers of one layer."""
    small = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32),
        "transformer_layers_per_block": (1, 1),
        "attention_head_dim": (1, 2),
        "mid_block_type": None,
    }
    return sdxl(seed, **{**small, **changes})


def sd15(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """SD 1.5's shape: convolutional projections, attention from the first resolution."""
    torch.manual_seed(seed)
    config = {
        "sample_size": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "cross_attention_dim": 24,
    }
    return _lively(UNet2DConditionModel(**{**config, **changes}))


def small_sd15(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """SD 1.5's shape with one level, three transformers of one layer."""
    small = {
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "block_out_channels": (16,),
        "mid_block_type": None,
    }
    return sd15(seed, **{**small, **changes})


def small_flux(seed: int = 0, **changes: Any) -> FluxTransformer2DModel:
    """Flux with one double and one single block."""
    return flux(seed, **{"num_layers": 1, "num_single_layers": 1, **changes})


def flux(seed: int = 0, **changes: Any) -> FluxTransformer2DModel:
    """Flux in miniature: two double and two single blocks."""
    torch.manual_seed(seed)
    config = {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    }
    return _lively(FluxTransformer2DModel(**{**config, **changes}))


def _lively(model: nn.Module) -> Any:
    """Evaluation mode, with biases and norms away from their zeros and ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def sdxl_inputs(
    height: int = 32, width: int = 32, batch: int = 2, seed: int = 1, timestep: float = 500.0
) -> dict[str, Any]:
    """A call of `sdxl()`: attention grids are (height/2, width/2) and (height/4, width/4)."""
    g = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, height, width, generator=g),
        "timestep": torch.tensor(float(timestep)),
        "encoder_hidden_states": torch.randn(batch, 5, 24, generator=g),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, 16, generator=g),
            "time_ids": torch.rand(batch, 6, generator=g),
        },
        "return_dict": False,
    }


def small_sdxl_inputs(height: int = 16, width: int = 16, **call: Any) -> dict[str, Any]:
    """A call of `small_sdxl()`: the attention grid is (height/2, width/2)."""
    return sdxl_inputs(height, width, **call)


def sd15_inputs(height: int = 16, width: int = 16, batch: int = 2, seed: int = 1) -> dict[str, Any]:
    """A call of `sd15()`: the attention grid is (height, width)."""
    g = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, height, width, generator=g),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 5, 24, generator=g),
        "return_dict": False,
    }


def ids(height: int, width: int) -> torch.Tensor:
    """Flux position ids [height*width, 3]."""
    grid = torch.zeros(height, width, 3)
    grid[..., 1] += torch.arange(height)[:, None]
    grid[..., 2] += torch.arange(width)[None, :]
    return grid.flatten(0, 1)


def flux_inputs(
    height: int = 16,
    width: int = 16,
    batch: int = 2,
    text: int = 5,
    seed: int = 1,
    timestep: float = 0.5,
) -> dict[str, Any]:
    """A call of `flux()` with height*width image tokens and `text` text tokens."""
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, height * width, 4, generator=g),
        "encoder_hidden_states": torch.randn(batch, text, 24, generator=g),
        "pooled_projections": torch.randn(batch, 16, generator=g),
        "timestep": torch.full((batch,), timestep),
        "img_ids": ids(height, width),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def small_flux_inputs(height: int = 8, width: int = 8, **call: Any) -> dict[str, Any]:
    """A call of `small_flux()`."""
    return flux_inputs(height, width, **call)


def at_step(make: Any, step: int, start: float = 900.0, **call: Any) -> dict[str, Any]:
    """The call of a step that `make` makes: another picture each time, the same text."""
    made = make(timestep=start - step, seed=1, **call)
    name = "sample" if "sample" in made else "hidden_states"
    return {**made, name: make(seed=step, **call)[name]}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value of `b`."""
    return float((a - b).abs().max() / b.abs().max())


def counting_inner_compile(fresh: list[int]) -> Any:
    """For `compile_fx(inner_compile=)`: runs graphs as they are, notes their non-static inputs."""

    def inner(gm: Any, inputs: Any, static_input_idxs: Any = (), **kwargs: Any) -> Any:
        fresh.append(len(inputs) - len(set(static_input_idxs)))

        def run(args: list[Any]) -> Any:
            return gm.forward(*args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return inner

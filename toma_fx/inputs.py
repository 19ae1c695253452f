"""Example inputs for the two denoiser families, from their configuration alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from toma_fx.errors import ModelTypeError


def example_inputs(
    model: nn.Module,
    height: int = 1024,
    width: int = 1024,
    batch: int = 2,
    *,
    text: int | None = None,
) -> dict[str, Any]:
    """Random keyword inputs of one denoising step for a picture of `height` x `width` pixels.

    Supports `UNet2DConditionModel` (latents at an eighth of the size) and `FluxTransformer2DModel`
    (tokens of 2x2 latents). `text` is the number of text tokens (default 77, Flux 512). Tensors
    have the model's dtype and device; position ids are float32.

    Raises:
        ModelTypeError: another model; give `explain` and `optimize` your own inputs.
    """
    own = next(model.parameters())
    put = {"dtype": own.dtype, "device": own.device}
    family = type(model).__name__
    if family == "UNet2DConditionModel":
        return _unet_inputs(model.config, height, width, batch, text or 77, put)
    if family == "FluxTransformer2DModel":
        return _flux_inputs(model.config, height, width, batch, text or 512, put)
    raise ModelTypeError(
        "no example inputs for this model",
        where=family,
        expected="UNet2DConditionModel or FluxTransformer2DModel",
        got=family,
        hint="call toma_fx.explain(model, example_inputs) with your own",
    )


def _unet_inputs(
    config: Any, height: int, width: int, batch: int, text: int, put: dict[str, Any]
) -> dict[str, Any]:
    """`put` holds the dtype and device of the model."""
    inputs: dict[str, Any] = {
        "sample": torch.randn(batch, config.in_channels, height // 8, width // 8, **put),
        "timestep": torch.tensor(500, device=put["device"]),
        "encoder_hidden_states": torch.randn(batch, text, config.cross_attention_dim, **put),
        "return_dict": False,
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        size = [height, width, 0, 0, height, width]
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, pooled, **put),
            "time_ids": torch.tensor([size] * batch, **put),
        }
    return inputs


def _flux_inputs(
    config: Any, height: int, width: int, batch: int, text: int, put: dict[str, Any]
) -> dict[str, Any]:
    """`put` holds the dtype and device of the model."""
    device = put["device"]
    rows, columns = height // 16, width // 16
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(columns, device=device)[None, :]
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(batch, rows * columns, config.in_channels, **put),
        "encoder_hidden_states": torch.randn(batch, text, config.joint_attention_dim, **put),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim, **put),
        "timestep": torch.full((batch,), 0.5, **put),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(text, 3, device=device),
        "return_dict": False,
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 3.5, **put)
    return inputs

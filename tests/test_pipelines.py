"""Real diffusers pipelines on tiny components: the denoiser is swapped, nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

import toma_fx
from tests import models
from toma_fx.errors import ModelTypeError

STEPS = 5


def vae(channels: int) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=64,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
        shift_factor=0.0,
    ).eval()


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline(
        vae=vae(4),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=models.sdxl(projection_class_embeddings_input_dim=16 + 6 * 8),
        scheduler=DDIMScheduler(),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl_call(pipe: Any, **changes: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    prompts = {
        "prompt_embeds": torch.randn(1, 5, 24, generator=g),
        "pooled_prompt_embeds": torch.randn(1, 16, generator=g),
        "negative_prompt_embeds": torch.randn(1, 5, 24, generator=g),
        "negative_pooled_prompt_embeds": torch.randn(1, 16, generator=g),
    }
    settings = {"num_inference_steps": STEPS, "height": 64, "width": 64, "output_type": "latent"}
    return pipe(**prompts, **settings, generator=g, **changes).images


def flux_pipeline() -> FluxPipeline:
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(4),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=models.flux(in_channels=16),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_call(pipe: Any, **changes: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    prompts = {
        "prompt_embeds": torch.randn(1, 5, 24, generator=g),
        "pooled_prompt_embeds": torch.randn(1, 16, generator=g),
    }
    settings = {"num_inference_steps": STEPS, "height": 64, "width": 96, "output_type": "latent"}
    return pipe(**prompts, **settings, generator=g, **changes).images


CASES = {
    "sdxl": (sdxl_pipeline, sdxl_call, "unet"),
    "flux": (flux_pipeline, flux_call, "transformer"),
}


@pytest.mark.parametrize("name", CASES)
def test_ratio_zero_gives_the_same_latents(name: str) -> None:
    make, call, component = CASES[name]
    pipe = make()
    want = call(pipe)
    original = getattr(pipe, component)
    assert toma_fx.optimize(pipe, ratio=0) is pipe
    assert getattr(pipe, component).denoiser is original
    assert torch.equal(call(pipe), want)


@pytest.mark.parametrize("name", CASES)
def test_merging_changes_the_latents_and_resets_between_generations(name: str) -> None:
    make, call, component = CASES[name]
    pipe = make()
    plain = call(pipe)
    toma_fx.optimize(pipe, min_tokens=60, tile=4)
    first = call(pipe)
    assert torch.isfinite(first).all()
    assert not torch.allclose(first, plain)
    assert torch.equal(call(pipe), first), "the second generation starts anew"
    optimized = getattr(pipe, component)
    (state,) = optimized.states
    assert state.step == 0, "the pipeline reset the state at its end"
    assert len(optimized.specializations) == 1


def test_one_line_swap_of_the_component() -> None:
    pipe = sdxl_pipeline()
    plain = sdxl_call(pipe)
    pipe.unet = toma_fx.optimize(pipe.unet, toma=True, min_tokens=60, tile=4)
    merged = sdxl_call(pipe)
    assert not torch.allclose(merged, plain)
    pipe.unet = pipe.unet.denoiser
    assert torch.equal(sdxl_call(pipe), plain)


def test_flux_true_guidance_keeps_the_two_passes_apart() -> None:
    pipe = flux_pipeline()
    toma_fx.optimize(pipe, min_tokens=60, tile=4)
    g = torch.Generator().manual_seed(5)
    negative = {
        "negative_prompt_embeds": torch.randn(1, 5, 24, generator=g),
        "negative_pooled_prompt_embeds": torch.randn(1, 16, generator=g),
    }
    flux_call(pipe, true_cfg_scale=2.0, **negative)
    assert {context for context, _ in pipe.transformer._implicit.generations} == {"cond", "uncond"}


def test_sd15_pipeline() -> None:
    pipe = StableDiffusionPipeline(
        vae=vae(4),
        text_encoder=None,
        tokenizer=None,
        unet=models.sd15(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(1))

    def call() -> torch.Tensor:
        return pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=-embeds,
            num_inference_steps=3,
            height=32,
            width=32,
            output_type="latent",
            generator=torch.Generator().manual_seed(2),
        ).images

    plain = call()
    toma_fx.optimize(pipe, min_tokens=200)
    assert not torch.allclose(call(), plain)


def test_pipeline_without_a_denoiser() -> None:
    pipe = sdxl_pipeline()
    pipe.unet = None
    with pytest.raises(ModelTypeError, match="no denoiser"):
        toma_fx.optimize(pipe)

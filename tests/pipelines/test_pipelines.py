"""Real diffusers pipelines that are not in the matrix of test_matrix.py, and pipelines that can't
be optimized."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

import toma_fx
from tests import denoisers
from tests.diffusers_pipelines import CASES, vae
from toma_fx.errors import ModelTypeError
from toma_fx.run.told import Run


def test_one_line_swap_of_the_component() -> None:
    case = CASES["flux"]
    pipe = case.make()
    plain = case.call(pipe)
    pipe.transformer = toma_fx.optimize(pipe.transformer, toma=True, min_tokens=60, tile=4)
    assert not torch.allclose(case.call(pipe), plain)
    assert not pipe.transformer.states, "the pipeline reset the state at its end"
    pipe.transformer = pipe.transformer.denoiser
    assert torch.equal(case.call(pipe), plain)


def test_both_denoisers_of_a_pipeline_are_optimized_and_restored() -> None:
    """Wan 2.2 has one transformer for noisy steps and one for the others."""
    first, second = denoisers.flux(), denoisers.flux(seed=1)
    pipe = SimpleNamespace(transformer=first, transformer_2=second)
    toma_fx.optimize(pipe, min_tokens=60)
    assert (pipe.transformer.denoiser, pipe.transformer_2.denoiser) == (first, second)
    assert toma_fx.summary(pipe.transformer_2).active
    toma_fx.restore(pipe)
    assert (pipe.transformer, pipe.transformer_2) == (first, second)


def test_the_pipelines_labels_keep_the_passes_of_guidance_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES["flux_true_cfg"]
    pipe = toma_fx.optimize(case.make(), min_tokens=60, tile=4)
    labels, real = set(), Run.place

    def place(self: Run, label: Any, *arguments: Any) -> Any:
        labels.add(label[0])
        return real(self, label, *arguments)

    monkeypatch.setattr(Run, "place", place)
    case.call(pipe)
    assert labels == {"cond", "uncond"}


def test_sd15_pipeline() -> None:
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        unet=denoisers.sd15(),
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


@pytest.mark.parametrize("act", [toma_fx.optimize, toma_fx.restore, toma_fx.summary])
def test_pipeline_without_a_denoiser(act: Any) -> None:
    pipe = CASES["flux"].make()
    pipe.transformer = None
    with pytest.raises(ModelTypeError, match="no denoiser") as caught:
        act(pipe)
    assert "unet or transformer" in str(caught.value)

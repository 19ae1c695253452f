"""Small pipelines of diffusers with their text encoders, saved as folders: for snippets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionXLPipeline,
)
from torch._inductor import compile_fx as inductor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests import denoisers
from tests.diffusers_pipelines import vae


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )


def clip(kind: type, vocabulary: int, width: int) -> Any:
    """A text encoder of two layers."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return kind(config).eval()


def save_sdxl(folder: Path, work: Path) -> None:
    tokenizer = clip_tokenizer(work / "clip")
    StableDiffusionXLPipeline(
        vae=vae(4),
        text_encoder=clip(CLIPTextModel, len(tokenizer), 12),
        text_encoder_2=clip(CLIPTextModelWithProjection, len(tokenizer), 12),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=denoisers.small_sdxl(),
        scheduler=DDIMScheduler(),
        add_watermarker=False,
    ).save_pretrained(folder)


def save_flux(folder: Path, work: Path) -> None:
    tokenizer = clip_tokenizer(work / "clip")
    torch.manual_seed(0)
    t5 = T5Config(vocab_size=110, d_model=24, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    FluxPipeline(
        vae=vae(4),
        text_encoder=clip(CLIPTextModel, len(tokenizer), 16),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=T5TokenizerFast(),
        transformer=denoisers.flux(in_channels=16, num_layers=1, num_single_layers=1),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)


def run_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Inductor would compile runs as it is, for snippets that compile."""
    compile_module = torch.compile

    def compiled(*args: Any, **options: Any) -> Any:
        return compile_module(*args, **{"backend": "eager", **options})

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(inductor, "compile_fx", lambda gm, inputs, config_patches: gm.forward)
    torch._dynamo.reset()

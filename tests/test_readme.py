"""The README's snippets, run as they stand on small pipelines in local folders of those names.

Only the device is replaced: "cuda" by "cpu".
"""

from __future__ import annotations

import json
import re
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
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

import toma_fx
from tests import denoisers
from tests.diffusers_pipelines import vae

README = Path(__file__).parent.parent / "README.md"


def snippets() -> dict[str, str]:
    """Python snippets of the README by the heading line before them."""
    text = README.read_text()
    found = re.findall(r"\n([^\n]+):\n\n```python\n(.*?)```", text, re.DOTALL)
    return dict(found)


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
        unet=denoisers.sdxl(),
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


CASES = {
    "SDXL": ("stabilityai/stable-diffusion-xl-base-1.0", save_sdxl, "unet"),
    "Flux": ("black-forest-labs/FLUX.1-dev", save_flux, "transformer"),
}


@pytest.mark.parametrize("name", CASES)
def test_snippet(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_id, save, component = CASES[name]
    save(tmp_path / hub_id, tmp_path / "work")
    monkeypatch.chdir(tmp_path)
    code = snippets()[name]
    assert hub_id in code
    space: dict[str, Any] = {}
    with torch.no_grad():
        exec(code.replace('"cuda"', '"cpu"'), space)
    assert space["image"].size == (64, 64) if name == "SDXL" else space["image"].size[0] >= 64
    found = toma_fx.summary(space["pipe"])
    assert found.active
    assert found.compiled
    assert found.steps["reuse"] > found.steps["refresh"] > 0
    assert toma_fx.restore(space["pipe"]).components[component].config is not None


def test_the_other_snippets_name_things_that_exist() -> None:
    text = README.read_text()
    names = set(re.findall(r"toma_fx\.(\w+)", text)) - {"py"}
    assert {"optimize", "explain", "summary", "restore", "State", "ToMAConfig"} <= names
    assert all(hasattr(toma_fx, name) for name in names), names

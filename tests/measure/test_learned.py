"""Metrics with weights, on tiny models with random ones, and what can't be had."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from tests.measure.fake import run
from toma_fx.measure.learned import open_scorers

LAYER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PROMPTS = ["a cat", "dogs"]
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def save_processor(folder: Path) -> None:
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size=size, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)


def save_clip(folder: Path) -> CLIPModel:
    words = ["<|startoftext|>", "<|endoftext|>", *"acdgost", *(f"{c}</w>" for c in "acdgost")]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    text = {**LAYER, "intermediate_size": 16, "vocab_size": len(words), "bos_token_id": 0,
            "max_position_embeddings": 12, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
    vision = {**LAYER, "intermediate_size": 16, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model.save_pretrained(folder)
    save_processor(folder)
    return model


def pictures() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    want = (torch.rand(2, 3, 32, 32, generator=g) * 255).round() / 255
    return (want + (0.3 * torch.randn(want.shape, generator=g)).round(decimals=1)).clamp(0, 1), want


def normalized(x: Tensor) -> Tensor:
    x = (x * 255).round() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@torch.no_grad()
def test_clip_compares_features_of_both_pictures_and_of_the_prompt(tmp_path: Path) -> None:
    model = save_clip(tmp_path)
    weights = str(tmp_path)
    scorers, skipped = open_scorers({"clip": weights, "clip_score": weights})
    assert not skipped
    got, want = pictures()
    a, b = (model.visual_projection(model.vision_model(normalized(x)).pooler_output)
            for x in (got, want))  # fmt: skip
    assert scorers["clip"](got, want, PROMPTS) == pytest.approx(
        F.cosine_similarity(a, b).tolist(), abs=1e-4
    )
    assert scorers["clip"](want, want, PROMPTS) == pytest.approx([1, 1], abs=1e-5)
    tokens = CLIPTokenizer.from_pretrained(weights)(PROMPTS, padding=True, return_tensors="pt")
    texts = model.text_projection(model.text_model(**tokens).pooler_output)
    scores = (100 * F.cosine_similarity(texts, a)).clamp(min=0).tolist()
    assert scorers["clip_score"](got, want, PROMPTS) == pytest.approx(scores, abs=1e-3)
    long = ["cat " * 50, "dog"]
    assert len(scorers["clip_score"](got, want, long)) == 2


@torch.no_grad()
def test_dino_compares_the_class_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**LAYER, image_size=32, patch_size=8, mlp_ratio=1)).eval()
    model.save_pretrained(tmp_path)
    save_processor(tmp_path)
    scorers, skipped = open_scorers({"dino": str(tmp_path)})
    assert not skipped
    got, want = pictures()
    a, b = (model(normalized(x)).last_hidden_state[:, 0] for x in (got, want))
    similar = F.cosine_similarity(a, b).tolist()
    assert scorers["dino"](got, want, PROMPTS) == pytest.approx(similar, abs=1e-4)


def test_a_run_with_clip_rates_the_original_too(tmp_path: Path) -> None:
    weights = tmp_path / "clip"
    weights.mkdir()
    save_clip(weights)
    metrics = {"psnr": None, "clip": str(weights), "clip_score": str(weights)}
    result = run(tmp_path / "out", metrics=metrics, prompts=["cat", "dog"], require=["clip=-1"])
    assert result.metrics == ("psnr", "clip", "clip_score")
    assert set(result.original) == {"clip_score"}
    own = result.configs[0]
    gain = own.scores["clip_score"].mean - result.original["clip_score"].mean
    assert own.gains["clip_score"].mean == pytest.approx(gain)
    assert result.passes


def test_weights_that_can_not_be_had_are_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    metrics = ("psnr", "clip", "clip_score", "dino")
    scorers, skipped = open_scorers({**dict.fromkeys(metrics), "dino": str(tmp_path)})
    assert list(scorers) == ["psnr"]
    assert set(skipped) == {"clip", "clip_score", "dino"}
    assert all(reason for reason in skipped.values())


def test_packages_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lpips", "ImageReward"):
        monkeypatch.setitem(sys.modules, name, None)
    scorers, skipped = open_scorers({"lpips": None, "image_reward": None})
    assert not scorers
    assert "lpips" in skipped["lpips"]
    assert "ImageReward" in skipped["image_reward"]


def test_lpips_and_image_reward_are_called_as_their_packages_ask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class LPIPS(nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert net == "alex"

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            assert -1 <= float(a.min()) < -0.5 < 0.5 < float(a.max()) <= 1
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    class Reward:
        def score(self, prompt: str, image: Any) -> float:
            assert image.size == (32, 32)
            return float(len(prompt))

    def load(name: str, device: str) -> Reward:
        assert (name, device) == ("ImageReward-v1.0", "cpu")
        return Reward()

    for name, own in (("lpips", {"LPIPS": LPIPS}), ("ImageReward", {"load": load})):
        module = types.ModuleType(name)
        vars(module).update(own)
        monkeypatch.setitem(sys.modules, name, module)
    scorers, skipped = open_scorers({"lpips": None, "image_reward": None})
    assert not skipped
    got, want = pictures()
    distance = (2 * (got - want)).abs().mean((1, 2, 3)).tolist()
    assert scorers["lpips"](got, want, PROMPTS) == pytest.approx(distance)
    assert scorers["image_reward"](got, want, PROMPTS) == [5.0, 4.0]

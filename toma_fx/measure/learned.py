"""Metrics with weights: LPIPS, DINO, CLIP, ImageReward.

One whose package or weights can't be had is skipped with the reason; nothing stands in for it.
Weights are a local folder or a hub id: `open_scorers({"clip": "path/or/id"})`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from toma_fx.measure.scores import METRICS, PLAIN

_log = logging.getLogger("toma_fx.measure")
Scorer = Callable[[Tensor, Tensor, Sequence[str]], list[float]]
"""(got, want, prompts) -> a score for each picture; pictures [B, 3, H, W] in [0, 1] on the CPU."""


def open_scorers(
    metrics: Mapping[str, str | None], device: torch.device | str = "cpu"
) -> tuple[dict[str, Scorer], dict[str, str]]:
    """(scorers, reasons why others are skipped), both by metric.

    Args:
        metrics: names, and weights that replace the default ones. device: of the weights.
    """
    scorers: dict[str, Scorer] = {}
    skipped: dict[str, str] = {}
    models: dict[str, Any] = {}
    for name, weights in metrics.items():
        if name in PLAIN:
            scorers[name] = _plain(name)
            continue
        try:
            with torch.no_grad():
                scorers[name] = _OPENERS[name](weights or METRICS[name].weights, device, models)
        except Exception as error:  # whatever packages, hubs and files raise
            skipped[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            _log.warning("metric %s is skipped: %s", name, skipped[name])
    return scorers, skipped


def _plain(name: str) -> Scorer:
    return lambda got, want, prompts: PLAIN[name](got, want)


class _Model:
    """A model of transformers with its preprocessing, on a device."""

    def __init__(self, weights: str, device: torch.device | str) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.weights, self.device = weights, device
        self.processor = AutoImageProcessor.from_pretrained(weights)
        self.model = AutoModel.from_pretrained(weights).eval().to(device)

    @torch.no_grad()
    def inputs(self, pictures: Tensor) -> dict[str, Tensor]:
        """Pictures as the model takes them, after its own resizing and normalization."""
        images = [(p * 255).round().to(torch.uint8).permute(1, 2, 0).numpy() for p in pictures]
        values = self.processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": values.to(self.device)}


def _shared(models: dict[str, Any], weights: str, device: torch.device | str) -> _Model:
    """The model of some weights, loaded once for all metrics."""
    if weights not in models:
        models[weights] = _Model(weights, device)
    model: _Model = models[weights]
    return model


def _numbers(scores: Tensor) -> list[float]:
    return [float(score) for score in scores.flatten()]


def _pooled(output: Any) -> Tensor:
    """Features of a picture or text; newer transformers wrap them."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(features.float(), dim=-1)


def _open_clip(weights: str, device: torch.device | str, models: dict[str, Any]) -> Scorer:
    own = _shared(models, weights, device)
    if not hasattr(own.model, "get_image_features"):
        raise TypeError(f"{type(own.model).__name__} has no features of pictures")

    @torch.no_grad()
    def score(got: Tensor, want: Tensor, prompts: Sequence[str]) -> list[float]:
        a, b = (_pooled(own.model.get_image_features(**own.inputs(x))) for x in (got, want))
        return _numbers((a * b).sum(-1))

    return score


def _open_clip_score(weights: str, device: torch.device | str, models: dict[str, Any]) -> Scorer:
    from transformers import AutoTokenizer

    own = _shared(models, weights, device)
    tokenizer = AutoTokenizer.from_pretrained(weights)
    length = own.model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def score(got: Tensor, want: Tensor, prompts: Sequence[str]) -> list[float]:
        tokens = tokenizer(
            list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(device)
        texts = _pooled(own.model.get_text_features(**tokens))
        pictures = _pooled(own.model.get_image_features(**own.inputs(got)))
        return _numbers(100 * (texts * pictures).sum(-1).clamp(min=0))

    return score


def _open_dino(weights: str, device: torch.device | str, models: dict[str, Any]) -> Scorer:
    own = _shared(models, weights, device)

    @torch.no_grad()
    def features(pictures: Tensor) -> Tensor:
        state: Tensor = own.model(**own.inputs(pictures)).last_hidden_state
        return F.normalize(state[:, 0].float(), dim=-1)  # the class token

    def score(got: Tensor, want: Tensor, prompts: Sequence[str]) -> list[float]:
        return _numbers((features(got) * features(want)).sum(-1))

    return score


def _open_lpips(weights: str, device: torch.device | str, models: dict[str, Any]) -> Scorer:
    import lpips

    network = lpips.LPIPS(net=weights, verbose=False).eval().to(device)

    @torch.no_grad()
    def score(got: Tensor, want: Tensor, prompts: Sequence[str]) -> list[float]:
        distance = network((2 * got - 1).to(device), (2 * want - 1).to(device))
        return _numbers(distance.flatten())

    return score


def _open_image_reward(weights: str, device: torch.device | str, models: dict[str, Any]) -> Scorer:
    import ImageReward
    from PIL import Image

    model = ImageReward.load(weights, device=str(device))

    @torch.no_grad()
    def score(got: Tensor, want: Tensor, prompts: Sequence[str]) -> list[float]:
        pixels = (got * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        pairs = zip(prompts, map(Image.fromarray, pixels), strict=True)
        return [float(model.score(prompt, picture)) for prompt, picture in pairs]

    return score


_OPENERS: dict[str, Callable[[str, torch.device | str, dict[str, Any]], Scorer]] = {
    "lpips": _open_lpips,
    "dino": _open_dino,
    "clip": _open_clip,
    "clip_score": _open_clip_score,
    "image_reward": _open_image_reward,
}

"""Scores of pictures: what needs no weights, and the table of all metrics.

A *paired* metric compares a picture with the one that the original drew from the same prompt and
seed. The others rate a picture by itself or beside its prompt, and are compared as differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from toma_fx.errors import UnknownNameError, nearest

Better = Literal["higher", "lower"]
HIGHEST_PSNR = 100.0
"""dB that a record holds for equal pictures, so that means stay finite."""


def psnr(got: Tensor, want: Tensor, peak: float = 1.0) -> list[float]:
    """PSNR in dB of each pair of pictures [B, 3, H, W]; infinite if equal.

    `peak` is the range of values: 1 for pictures in [0, 1], 2 in [-1, 1].
    """
    errors = (got - want).square().mean((1, 2, 3)).tolist()
    return [10 * math.log10(peak * peak / e) if e else math.inf for e in errors]


def ssim(got: Tensor, want: Tensor, peak: float = 1.0) -> list[float]:
    """SSIM of each pair of pictures [B, 3, H, W], in uniform windows of 7x7.

    Wang et al., 2004, with sample covariances, as scikit-image computes it. `peak` as for `psnr`.
    """
    a, b = got.double(), want.double()
    sample = 49 / 48

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 7, stride=1)

    ma, mb = mean(a), mean(b)
    va, vb = sample * (mean(a * a) - ma * ma), sample * (mean(b * b) - mb * mb)
    both = sample * (mean(a * b) - ma * mb)
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    value = (2 * ma * mb + c1) * (2 * both + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    similar: list[float] = value.mean((1, 2, 3)).tolist()
    return similar


def mean_abs(got: Tensor, want: Tensor) -> list[float]:
    """Mean absolute difference of each pair of pictures [B, 3, H, W] in [0, 1], on 0..255."""
    differences: list[float] = (255 * (got - want).abs().mean((1, 2, 3))).tolist()
    return differences


@dataclass(frozen=True)
class Metric:
    """What a score is.

    Attributes:
        name: in records, options and thresholds. title: in tables. better: which is better.
        paired: whether it compares with the original's picture. weights: default weights, a hub id,
            of those that need some; "" where none are needed. packages: that bring it.
        perfect: its value for equal pictures, if paired.
    """

    name: str
    title: str
    better: Better
    paired: bool = True
    weights: str = ""
    packages: tuple[str, ...] = ()
    perfect: float = 1.0

    @property
    def sign(self) -> int:
        """1 where higher is better, else -1."""
        return 1 if self.better == "higher" else -1


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("psnr", "PSNR (dB)", "higher", perfect=HIGHEST_PSNR),
        Metric("ssim", "SSIM", "higher"),
        Metric("mean_abs", "mean abs. difference (0..255)", "lower", perfect=0.0),
        Metric(
            "lpips", "LPIPS", "lower", weights="alex", packages=("lpips", "torchvision"),
            perfect=0.0,
        ),
        Metric(
            "dino", "DINO similarity", "higher", weights="facebook/dinov2-base",
            packages=("transformers",),
        ),
        Metric(
            "clip", "CLIP image similarity", "higher", weights="openai/clip-vit-large-patch14",
            packages=("transformers",),
        ),
        Metric(
            "clip_score", "CLIP score", "higher", False, "openai/clip-vit-large-patch14",
            ("transformers",),
        ),
        Metric(
            "image_reward", "ImageReward", "higher", False, "ImageReward-v1.0", ("ImageReward",)
        ),
    )
}  # fmt: skip
"""Every metric by name. `dino`, `clip`: cosine of the features of both pictures (arXiv 2304.07193,
2103.00020); `clip_score`: 100 times the cosine of picture and prompt, at least 0 (arXiv
2104.08718); `lpips`: arXiv 1801.03924; `image_reward`: arXiv 2304.05977."""
PLAIN: Mapping[str, Callable[[Tensor, Tensor], list[float]]] = {
    "psnr": lambda got, want: [min(value, HIGHEST_PSNR) for value in psnr(got, want)],
    "ssim": ssim,
    "mean_abs": mean_abs,
}
"""Metrics that need neither packages nor weights, of pictures in [0, 1]."""


def metric_of(name: str) -> Metric:
    """A metric by its name.

    Raises:
        UnknownNameError: there is none, with the nearest names.
    """
    if name not in METRICS:
        raise UnknownNameError(
            f"unknown metric {name!r}", where="metric", hint=nearest(name, METRICS)
        )
    return METRICS[name]


def score_pairs(
    got: Tensor, want: Tensor, names: Sequence[str] = tuple(PLAIN)
) -> dict[str, list[float]]:
    """Scores of each pair of pictures [B, 3, H, W] in [0, 1], by metrics without weights."""
    return {name: PLAIN[name](got, want) for name in names}

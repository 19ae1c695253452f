"""Measures of pictures against others."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F


def peak_ratio(got: Tensor, want: Tensor) -> list[float]:
    """PSNR in dB of each pair of pictures [B, 3, H, W] in [-1, 1] (peak 2); infinite if equal."""
    errors = (got - want).square().mean((1, 2, 3)).tolist()
    return [10 * math.log10(4 / e) if e else math.inf for e in errors]


def structural_similarity(got: Tensor, want: Tensor) -> list[float]:
    """SSIM of each pair of pictures [B, 3, H, W] in [-1, 1], in uniform windows of 7x7.

    Wang et al., 2004, with sample covariances, as scikit-image computes it.
    """
    a, b = got.double(), want.double()
    sample = 49 / 48

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 7, stride=1)

    ma, mb = mean(a), mean(b)
    va, vb = sample * (mean(a * a) - ma * ma), sample * (mean(b * b) - mb * mb)
    both = sample * (mean(a * b) - ma * mb)
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    value = (2 * ma * mb + c1) * (2 * both + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    similar: list[float] = value.mean((1, 2, 3)).tolist()
    return similar

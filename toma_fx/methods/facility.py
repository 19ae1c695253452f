"""Greedy facility location on similarity matrices, as used by ToMA's selection."""

from __future__ import annotations

import torch
from torch import Tensor

TIE = 2.0**-14
"""Gains are compared in steps of this size. Mutual nearest neighbours have mathematically equal
gains whose rounding differs between back ends; on this grid they tie, and ties go to the lowest
index, so that eager, compiled and exported programs choose the same tokens."""


def facility_location(similarity: Tensor, keep: int) -> Tensor:
    """Choose `keep` rows of each matrix greedily: [..., n, n] -> [..., keep] int64.

    First the row with the largest sum, then repeatedly the row j with the largest gain
    sum_i max(0, S[j, i] - m[i]), m being the running maximum of the chosen rows. Gains equal to
    within `TIE` go to the lowest index; no row is chosen twice.
    """
    slots = torch.arange(similarity.shape[-1], device=similarity.device)
    best = _steps(similarity.sum(-1)).argmax(-1, keepdim=True)
    covered, taken, chosen = _row(similarity, best), slots == best, [best]
    for _ in range(keep - 1):
        gain = _steps((similarity - covered.unsqueeze(-2)).relu().sum(-1))
        best = gain.masked_fill(taken, -1.0).argmax(-1, keepdim=True)
        chosen.append(best)
        covered = torch.maximum(covered, _row(similarity, best))
        taken = taken | (slots == best)
    return torch.cat(chosen, -1)


def _row(similarity: Tensor, j: Tensor) -> Tensor:
    """Row j [..., 1] of each matrix, [..., n]."""
    return torch.take_along_dim(similarity, j.unsqueeze(-1), dim=-2).squeeze(-2)


def _steps(gain: Tensor) -> Tensor:
    """Gains in whole multiples of `TIE`."""
    return torch.round(gain * (1 / TIE))

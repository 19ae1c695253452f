"""Greedy facility location on similarity matrices, as used by ToMA's selection."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 16
"""Similarities are integer multiples of 2^-BITS."""
_EXACT = 24
"""Bits of the integers that float32 adds without rounding."""


def facility_location(similarity: Tensor, keep: int) -> Tensor:
    """Choose `keep` rows of each symmetric matrix greedily: [..., n, n] -> [..., keep] int64.

    First the row with the largest sum, then repeatedly the row j with the largest gain
    sum_i max(0, S[j, i] - m[i]), m being the running maximum of the chosen rows. S is rounded to
    steps of 2^-`BITS` first. Of equal gains the lowest index wins; no row is chosen twice.

    Args:
        similarity: float32 in [-1, 1].
    """
    similarity = quantize(similarity)
    slots = torch.arange(similarity.shape[-1], device=similarity.device)
    best = similarity.sum(-1).argmax(-1, keepdim=True)
    covered, is_chosen, chosen = _row(similarity, best), slots == best, [best]
    for _ in range(keep - 1):
        gain = (similarity - covered.unsqueeze(-2)).relu().sum(-1)
        best = gain.masked_fill(is_chosen, -1.0).argmax(-1, keepdim=True)
        chosen.append(best)
        covered = torch.maximum(covered, _row(similarity, best))
        is_chosen = is_chosen | (slots == best)
    return torch.cat(chosen, -1)


def quantize(similarity: Tensor) -> Tensor:
    """Similarities as integer numbers of steps, of which no sum of n is rounded.

    Mutual nearest neighbors have mathematically equal gains. As integers they are equal in every
    back end, however it rounds and in whatever order it adds, and so all choose the same tokens; as
    fractions rounding would decide, and a picture would change with the back end.
    """
    bits = min(BITS, _EXACT - (similarity.shape[-1] - 1).bit_length())
    # a product need not be symmetric to the last bit
    return torch.round(torch.maximum(similarity, similarity.mT) * 2.0**bits)


def _row(similarity: Tensor, j: Tensor) -> Tensor:
    """Row j [..., 1] of each matrix, [..., n]."""
    return torch.take_along_dim(similarity, j.unsqueeze(-1), dim=-2).squeeze(-2)

"""Ranking tokens by similarity without ties, the same on every back end."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 2**23
"""Steps a unit of cosine similarity by which tokens are ordered; equal ones go by their index."""


def similarity_keys(similarity: Tensor, index: Tensor, total: int) -> Tensor:
    """Unique positive keys that order tokens by similarity; of equals the first index is higher.

    Args:
        similarity: float32 in [-2, 2].
        index: int64 in [0, total), unique wherever keys are compared; broadcasts to `similarity`.

    Returns:
        int64 of the shape of `similarity`. `key_index` gives the index back.
    """
    # positive numbers, so that their remainder is the same on every back end
    level = torch.round(similarity * STEPS).to(torch.int64) + 2 * STEPS
    return level * total + (total - 1 - index)


def key_index(key: Tensor, total: int) -> Tensor:
    """The index in a key of `similarity_keys`."""
    return total - 1 - key % total


def count_true(mask: Tensor) -> Tensor:
    """How many are True along the last dimension, int64."""
    return mask.sum(-1, dtype=torch.int32).to(torch.int64)

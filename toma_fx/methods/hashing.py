"""Pseudo-random integers as arithmetic on tensors: no generator, so it traces and exports."""

from __future__ import annotations

import torch
from torch import Tensor

PRIME = 2**31 - 1
"""Modulus of the hash: the product of two residues fits int64."""
_ROUNDS = ((1_583_458_089, 784_588_716), (1_226_874_159, 1_934_104_823), (950_706_376, 69_621_571))
"""Factors of the value and of the seed in each round: any residues but 0."""


def hash_indices(index: Tensor, seed: int) -> Tensor:
    """Pseudo-random numbers, the same on every device and back end.

    Each of three rounds is an affine map and a fifth power modulo `PRIME`. Both are permutations
    of the residues (5 does not divide PRIME - 1), so that different indices never collide and
    the result can serve as a sorting key without ties. Cost: 12 remainders an element.

    Args:
        index: numbers to hash, any shape, int64 in [0, PRIME).
        seed: which hash; seeds that are equal modulo `PRIME` are the same.

    Returns:
        int64 in [0, PRIME), the shape of `index`; a permutation of the residues for every seed.
    """
    # a comparison ends Inductor's symbolic arithmetic on indices, which would write out the hash of
    # an arange as one nested polynomial and take minutes
    value = torch.where(index >= 0, index, 0)
    for factor, salt in _ROUNDS:
        # the seed enters every round: in one alone it would only shift or scale the sequence
        shift = (seed * salt + factor) % PRIME
        value = (value * factor + shift) % PRIME
        square = value * value % PRIME
        value = square * square % PRIME * value % PRIME
    return value

"""Keys that rank tokens: order, ties, range."""

from __future__ import annotations

import torch

from toma_fx.methods.ranking import STEPS, count_true, key_index, similarity_keys


def test_keys_order_by_similarity_and_then_by_index() -> None:
    similarity = torch.tensor([0.5, -2.0, 0.5, 2.0, -1.0, 0.5 + 0.4 / STEPS])
    keys = similarity_keys(similarity, torch.arange(6), 6)
    assert keys.argsort(descending=True).tolist() == [3, 0, 2, 5, 4, 1]
    assert int(keys.min()) >= 0
    assert key_index(keys, 6).tolist() == list(range(6))


def test_keys_are_unique_at_the_largest_grids() -> None:
    total = 2**20
    keys = similarity_keys(torch.ones(total), torch.arange(total), total)
    assert torch.equal(keys, keys[0] - torch.arange(total))
    assert 0 < int(keys[0]) < 2**62


def test_one_step_of_similarity_outweighs_every_index() -> None:
    similarity = torch.tensor([0.25, 0.25 + 1 / STEPS])
    low, high = similarity_keys(similarity, torch.tensor([0, 4095]), 4096)
    assert low < high


def test_count_true() -> None:
    mask = torch.tensor([[True, False, True], [False, False, False]])
    assert torch.equal(count_true(mask), torch.tensor([2, 0]))

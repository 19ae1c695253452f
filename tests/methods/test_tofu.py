"""ToFu: against a plain loop over tokens, norms, pruning, and depth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.test_tomesd import noise, pattern, smooth
from toma_fx.errors import ConfigError
from toma_fx.methods.cells import Cells
from toma_fx.methods.setting import Place
from toma_fx.methods.tofu import ToFu, ToFuConfig
from toma_fx.methods.tomesd import ToMeSD

GRIDS = [((6, 6), 2, 2), ((5, 8), 2, 3), ((6, 9), 3, 3)]


def by_hand(
    x: Tensor, grid: tuple[int, int], sy: int, sx: int, r: int, prune: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Merged tokens and unmerged tokens of one sequence [N, C], token after token, in float64."""
    tokens = list(x.double())
    height, width = grid
    destinations = [
        row * width + column
        for row in range(0, height - sy + 1, sy)
        for column in range(0, width - sx + 1, sx)
    ]
    found = []
    for i in range(height * width):
        if i not in destinations:
            cosines = [
                float(tokens[i] @ tokens[d] / tokens[i].norm() / tokens[d].norm())
                for d in destinations
            ]
            best = max(range(len(cosines)), key=cosines.__getitem__)
            found.append((cosines[best], i, destinations[best]))
    found.sort(key=lambda match: -match[0])
    joined: dict[int, list[int]] = {d: [d] for d in destinations}
    for _, i, d in found[:r]:
        joined[d].append(i)
    merged, home = [], {}
    for _, i, _ in found[r:]:
        home[i] = len(merged)
        merged.append(tokens[i])
    for d in destinations:
        home.update(dict.fromkeys(joined[d], len(merged)))
        if prune:
            merged.append(tokens[d])
        else:
            mean = sum(tokens[i] for i in joined[d]) / len(joined[d])
            longest = max(float(tokens[i].norm()) for i in joined[d])
            merged.append(mean / mean.norm() * longest)
    return merged, [merged[home[i]] for i in range(height * width)]


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.7])
@pytest.mark.parametrize(("grid", "sy", "sx"), GRIDS)
def test_equals_a_loop_over_tokens(
    grid: tuple[int, int], sy: int, sx: int, ratio: float, prune: bool
) -> None:
    x = smooth(grid, channels=8)
    config = ToFuConfig(ratio=ratio, sy=sy, sx=sx, prune_depth=1.0 if prune else 0.0)
    setting = config.setting(Place(grid, grid))
    assert isinstance(setting, ToFu)
    parts = pattern(setting, x)
    merged = setting.merge(x, parts)
    out = setting.unmerge(merged, parts)
    for b in range(2):
        wanted, whole = by_hand(x[b], grid, sy, sx, setting.r, prune)
        torch.testing.assert_close(merged[b].double(), torch.stack(wanted), atol=2e-6, rtol=0)
        torch.testing.assert_close(out[b].double(), torch.stack(whole), atol=2e-6, rtol=0)


def test_merging_and_pruning_and_means_differ() -> None:
    grid, x = (8, 8), noise((8, 8))
    merging, pruning = (
        ToFu(grid, Cells(1, *grid, 2, 2), 32),
        ToFu(grid, Cells(1, *grid, 2, 2), 32, prune=True),
    )
    mean = ToMeSD(grid, Cells(1, *grid, 2, 2), 32)
    parts = pattern(mean, x)
    for setting in (merging, pruning):
        assert all(torch.equal(pattern(setting, x)[name], parts[name]) for name in parts)
    made = [setting.merge(x, parts) for setting in (merging, pruning, mean)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (made[first] - made[second]).abs().max() > 0.1


def test_merging_keeps_the_largest_norm() -> None:
    setting = ToFu((8, 8), Cells(1, 8, 8, 2, 2), 32)
    x = noise((8, 8)) * torch.arange(1, 65).view(1, 64, 1)
    parts = pattern(setting, x)
    merged = setting.merge(x, parts)
    for b in range(2):
        for place in range(setting.merged_count):
            group = x[b, parts["joins"][b] == place]
            longest = group.norm(dim=-1).max()
            torch.testing.assert_close(merged[b, place].norm(), longest, rtol=1e-5, atol=0)
            if len(group) == 1:
                assert torch.equal(merged[b, place], group[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruning_keeps_destinations_as_they_are(dtype: torch.dtype) -> None:
    setting = ToFu((6, 6), Cells(1, 6, 6, 2, 2), 18, prune=True)
    x = noise((6, 6)).to(dtype)
    parts = pattern(setting, x)
    merged = setting.merge(x, parts)
    corners = [row * 6 + column for row in (0, 2, 4) for column in (0, 2, 4)]
    assert torch.equal(merged[:, -9:], x[:, corners])
    assert torch.equal(merged, x.gather(1, parts["places"].unsqueeze(-1).expand(-1, -1, 24)))
    assert torch.equal(setting.unmerge(merged, parts)[:, corners], x[:, corners])


def test_opposite_and_zero_tokens_give_zero() -> None:
    """A mean without a direction has no norm to stretch."""
    x = torch.zeros(1, 4, 4)
    x[0, 0, 0], x[0, 1, 0] = 3.0, -3.0
    setting = ToFu((2, 2), Cells(1, 2, 2, 2, 2), 3)
    merged = setting.merge(x, pattern(setting, x))
    assert torch.equal(merged, torch.zeros(1, 1, 4))


def test_half_precision() -> None:
    setting = ToFu((12, 12), Cells(1, 12, 12, 2, 2), 72)
    x = smooth((12, 12)).bfloat16()
    parts = pattern(setting, x)
    merged = setting.merge(x, parts)
    assert merged.dtype == torch.bfloat16
    wanted = setting.merge(x.float(), parts)
    torch.testing.assert_close(merged.float(), wanted, atol=0.02, rtol=0.02)


def test_depth_decides() -> None:
    config = ToFuConfig()
    grid = (8, 8)
    early = config.setting(Place(grid, grid, depth=0.49))
    late = config.setting(Place(grid, grid, depth=0.5))
    assert early == ToFu(grid, Cells(1, *grid, 2, 2), 32, prune=True)
    assert late == ToFu(grid, Cells(1, *grid, 2, 2), 32)
    assert (early.describe(), late.describe()) == ("2x2 cells, pruned", "2x2 cells, norm kept")
    assert not late.linear
    always, never = ToFuConfig(prune_depth=1), ToFuConfig(prune_depth=0)
    assert always.setting(Place(grid, grid, depth=0.99)) == early
    assert never.setting(Place(grid, grid)) == late
    assert "ratio is 0" in str(ToFuConfig(ratio=0).setting(Place(grid, grid)))
    video = ToFuConfig(random=True, seed=2).setting(Place((3, 4, 4), (3, 4, 4)))
    assert video == ToFu((3, 4, 4), Cells(3, 4, 4, 2, 2, True, 2), math.prod((3, 4, 4)) // 2, True)


def test_depth_may_be_overridden() -> None:
    config = ToFuConfig(overrides={"up.*": {"prune_depth": 0.0}})
    assert config.at("up.1").prune_depth == 0.0
    assert config.at("down.1").prune_depth == 0.5


@pytest.mark.parametrize("value", [-0.1, 1.1, "0.5", True, None])
def test_depth_out_of_range(value: Any) -> None:
    with pytest.raises(ConfigError, match="prune_depth"):
        ToFuConfig(prune_depth=value)

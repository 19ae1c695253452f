"""Shares of the windows make, end to end, what one process makes of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.denoisers import relative
from toma_fx.methods import sharded
from toma_fx.methods.baselines import Grid, Random
from toma_fx.methods.coredit import CoReDiT
from toma_fx.methods.dito import DiTo
from toma_fx.methods.ibtm import IBTM
from toma_fx.methods.retom import PartialReToM, ReToM
from toma_fx.methods.setting import Pattern, Setting
from toma_fx.methods.sharded import Rank, Sharded
from toma_fx.methods.toma import ToMA

GRID, VIDEO = (6, 10), (4, 6, 10)
TILED = {"tile": (3, 2), "keep": 3, "scale": 100.0}
SHARED = [
    (ToMA(GRID, **TILED), 2),
    (ToMA(GRID, **TILED), 5),
    (ToMA(GRID, (3, 2), 5, 100.0, "pinv"), 2),
    (ToMA(GRID, (1, 10), 5, 100.0), 3),
    (ToMA(VIDEO, (1, 3, 2), 3, 100.0), 4),
    (ToMA(VIDEO, (2, 3, 5), 8, 100.0), 2),
    (DiTo(GRID, **TILED, penalty=0.5), 2),
    (IBTM(GRID, **TILED), 2),
    (Grid(GRID, **TILED), 2),
    (ReToM(GRID, (3, 2)), 2),
    (ReToM(VIDEO, (1, 2, 5), "mean"), 3),
]


def share(setting: Setting, count: int) -> list[Sharded]:
    """The settings of all processes."""
    shared = setting.share(count)
    assert not isinstance(shared, str)
    return [Sharded(setting.grid, setting, *shared, Rank(i, count, "0")) for i in range(count)]


def pattern_of(setting: Setting, x: Tensor) -> Pattern:
    pattern = dict(zip(setting.chosen, setting.select(x), strict=True))
    return pattern | dict(zip(setting.weighed, setting.weights(x, pattern), strict=True))


@pytest.mark.parametrize(("whole", "count"), SHARED)
def test_shares_make_what_one_process_makes(
    whole: Setting, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(3)
    tokens = torch.Size(whole.grid).numel()
    x, update = torch.randn(2, 2, tokens, 8, generator=g)
    own = share(whole, count)
    expected, patterns = pattern_of(whole, x), [pattern_of(s, x) for s in own]
    pairs = list(zip(own, patterns, strict=True))

    def exchange(make: Callable[[Sharded, Pattern], Tensor]) -> Tensor:
        """What process 0 has of what all of them send."""
        sent: list[Tensor] = []
        monkeypatch.setattr(
            sharded, "gather", lambda x, *_: sent.append(x) or x.repeat(count, *[1] * (x.dim() - 1))
        )
        for setting, pattern in pairs:
            make(setting, pattern)
        monkeypatch.setattr(sharded, "gather", lambda *_: torch.cat(sent))
        return make(*pairs[0])

    merged = [s.merge(x, p) for s, p in pairs]
    assert {y.shape[1] for y in merged} == {whole.merged_count // count} == {own[0].merged_count}
    assert relative(torch.cat(merged, 1), whole.merge(x, expected)) < 1e-6
    positions = torch.cat([s.positions(p) for s, p in pairs], 1)
    assert torch.equal(positions, whole.positions(expected))
    assert torch.equal(exchange(lambda s, p: s.key_positions(p)), positions)
    assert relative(exchange(lambda s, p: s.key_sizes(p)), whole.sizes(expected)) < 1e-6
    parts = iter([s.merge(update, p) for s, p in pairs] + [pairs[0][0].merge(update, patterns[0])])
    back = exchange(lambda s, p: s.unmerge(next(parts), p))
    assert relative(back, whole.unmerge(whole.merge(update, expected), expected)) < 1e-6


def test_a_selection_that_recalls_sees_its_own_windows() -> None:
    whole = DiTo(GRID, **TILED, penalty=0.5)
    x = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(3))
    own = share(whole, 2)
    assert own[0].recalled == whole.recalled
    assert own[0].feature == "output"
    before = [dict(zip(s.chosen, s.select(x), strict=True)) for s in (whole, *own)]
    again = [s.select_again(x, b) for s, b in zip((whole, *own), before, strict=True)]
    assert not torch.equal(again[0][0], before[0]["idx"])
    assert torch.equal(torch.cat([again[1][0], again[2][0]], 1), again[0][0])


@pytest.mark.parametrize(
    ("setting", "count", "reason"),
    [
        (ToMA(GRID, **TILED), 4, "10 windows of 3x2 can't be shared evenly by 4 processes"),
        (ToMA(GRID, GRID, 30, 100.0), 2, "its window is the whole picture"),
        (Random(GRID, **TILED), 2, "by the position in the grid"),
        (CoReDiT(GRID, **TILED, unit=GRID), 2, "neighbors in other windows"),
        (PartialReToM(GRID, (3, 2), r=20), 2, "over the whole picture"),
    ],
)
def test_what_can_not_be_shared(setting: Setting, count: int, reason: str) -> None:
    shared = setting.share(count)
    assert isinstance(shared, str)
    assert reason in shared


def test_shares_of_other_processes_are_other_settings() -> None:
    first, second = share(ToMA(GRID, **TILED), 2)
    assert first != second
    assert replace(first, rank=second.rank) == second
    assert first.describe() == "3x2, 1 of 2 shares"

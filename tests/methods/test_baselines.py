"""Controls for ToMA's selection: they never look at the tokens, and share all else with ToMA."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tracing import Program, check_onnx, check_traces
from toma_fx.errors import ConfigError, TileError, UnknownNameError
from toma_fx.methods.baselines import Grid, GridConfig, Random, RandomConfig
from toma_fx.methods.config import with_options
from toma_fx.methods.hashing import PRIME, hash_indices
from toma_fx.methods.setting import Place
from toma_fx.methods.toma import ToMA, ToMAConfig
from toma_fx.methods.windows import from_windows

CONFIGS = [RandomConfig(), GridConfig()]
ids = [config.name for config in CONFIGS]


def kept_mask(setting: ToMA) -> Tensor:
    """Which tokens of the grid stay, as zeros and ones in the shape of the grid."""
    count = math.prod(setting.grid)
    (idx,) = setting.select(torch.randn(1, count, 4))
    windows, tokens = idx.shape[1], math.prod(setting.tile)
    mask = torch.zeros(1, windows, tokens, 1)
    mask.scatter_(2, idx.unsqueeze(-1), 1.0)
    return from_windows(mask, setting.grid, setting.tile).reshape(setting.grid)


# -- hashing --------------------------------------------------------------------------------------


def test_the_hash_is_fifth_powers_of_python() -> None:
    def slowly(value: int, seed: int) -> int:
        rounds = (
            (1_583_458_089, 784_588_716),
            (1_226_874_159, 1_934_104_823),
            (950_706_376, 69_621_571),
        )
        for factor, salt in rounds:
            value = pow(value * factor + seed * salt + factor, 5, PRIME)
        return value

    index = [0, 1, 2, 4095, 10**9, PRIME - 1]
    for seed in (0, 1, 2**40):
        assert hash_indices(torch.tensor(index), seed).tolist() == [slowly(i, seed) for i in index]


def test_hashes_never_collide_and_depend_on_the_seed() -> None:
    index = torch.arange(50_000)
    draws = [hash_indices(index, seed) for seed in range(4)]
    for draw in draws:
        assert draw.dtype == torch.int64
        assert draw.min() >= 0
        assert draw.max() < PRIME
        assert draw.unique().numel() == index.numel()
    assert torch.equal(draws[1], hash_indices(index, PRIME + 1))
    table = torch.corrcoef(torch.stack([d.double() for d in (*draws, index)])) - torch.eye(5)
    assert table.abs().max() < 0.02


def test_hashes_are_spread_evenly() -> None:
    # about as even as independent draws: a share of 1/k has a deviation of sqrt(1/k (1-1/k) / n)
    draw = hash_indices(torch.arange(40_000), 7)
    for k in (2, 4, 9):
        shares = torch.bincount(draw % k, minlength=k) / draw.numel()
        assert (shares - 1 / k).abs().max() < 4 * math.sqrt((1 - 1 / k) / k / draw.numel())
    neighbors = torch.stack([draw[1:].double(), draw[:-1].double()])
    assert torch.corrcoef(neighbors)[0, 1].abs() < 0.02


# -- random ---------------------------------------------------------------------------------------


def test_random_keeps_distinct_tokens_whatever_the_tokens_are() -> None:
    setting = Random((8, 12), (4, 4), 5, 1000.0, seed=3)
    (idx,) = setting.select(torch.randn(3, 96, 7))
    assert idx.shape == (3, 6, 5)
    assert idx.dtype == torch.int64
    assert idx.is_contiguous()
    assert idx.min() >= 0
    assert idx.max() < 16
    assert all(row.unique().numel() == 5 for row in idx.flatten(0, 1))
    assert torch.equal(idx, setting.select(torch.zeros(3, 96, 7))[0])
    assert torch.equal(idx[0], idx[2])


def test_random_differs_by_window_and_by_seed() -> None:
    grid, tile = (16, 16), (4, 4)
    first, second = (
        Random(grid, tile, 8, 1000.0, seed=seed).select(torch.zeros(1, 256, 1))[0][0].sort(-1)[0]
        for seed in (0, 1)
    )
    assert len({tuple(row.tolist()) for row in first}) == 16
    assert not (first == second).all(-1).any()


def test_random_keeps_every_position_equally_often() -> None:
    setting = Random((256, 256), (4, 4), 4, 1000.0)
    (idx,) = setting.select(torch.zeros(1, 256 * 256, 1))
    shares = torch.bincount(idx.flatten(), minlength=16) / 4096
    assert (shares - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / 4096)


# -- grid -----------------------------------------------------------------------------------------


def test_half_of_a_4x4_window_is_two_in_every_row_and_column() -> None:
    mask = kept_mask(Grid((4, 4), (4, 4), 8, 1000.0))
    assert mask.sum(0).tolist() == mask.sum(1).tolist() == [2.0] * 4


def test_every_window_is_alike() -> None:
    (idx,) = Grid((8, 8), (4, 4), 6, 1000.0).select(torch.randn(2, 64, 3))
    assert idx.shape == (2, 4, 6)
    assert idx.is_contiguous()
    assert (idx == idx[:1, :1]).all()


@pytest.mark.parametrize("tile", [(2, 4), (4, 4), (4, 8), (8, 8), (16, 16)])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_no_part_of_a_window_is_empty(tile: tuple[int, int], share: float) -> None:
    count = math.prod(tile)
    mask = kept_mask(Grid(tile, tile, int(count * share), 1000.0))
    assert mask.sum() == int(count * share)
    # sums over a part twice as large as the mean distance of two kept tokens
    side = 2 if share >= 0.5 else min(4, *tile)
    parts = torch.nn.functional.avg_pool2d(mask[None], side, 1) * side**2
    assert parts.min() >= 1
    assert parts.max() <= math.ceil(share * side**2) + 2


@pytest.mark.parametrize("keep", [8, 16, 24])
def test_the_grid_is_more_even_than_chance(keep: int) -> None:
    def unevenness(mask: Tensor) -> float:
        return float(torch.nn.functional.avg_pool2d(mask[None], 2).std())

    even = unevenness(kept_mask(Grid((8, 8), (8, 8), keep, 1000.0)))
    chance = [
        unevenness(kept_mask(Random((8, 8), (8, 8), keep, 1000.0, seed=seed))) for seed in range(20)
    ]
    assert even <= min(chance)
    assert even < 0.8 * sum(chance) / len(chance)


def test_windows_over_frames_and_rows() -> None:
    # a video's window: every frame and every row of it keeps about as many
    mask = kept_mask(Grid((4, 4, 4), (4, 4, 4), 32, 1000.0))
    for others in ((1, 2), (0, 2), (0, 1)):
        assert mask.sum(others).tolist() == pytest.approx([8.0] * 4, abs=2)
    # windows of one frame are those of a picture
    video = Grid((3, 4, 4), (1, 4, 4), 8, 1000.0)
    picture = kept_mask(Grid((4, 4), (4, 4), 8, 1000.0))
    assert torch.equal(kept_mask(video), picture.expand(3, 4, 4))
    # a row keeps every other token, or nearly
    row = kept_mask(Grid((1, 16), (1, 16), 8, 1000.0))[0]
    assert torch.nn.functional.avg_pool1d(row[None], 3, 1).min() > 0


# -- in ToMA's place ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=ids)
@pytest.mark.parametrize("window", ["tile", "stripe", "global"])
def test_all_but_the_selection_is_as_in_toma(config: ToMAConfig, window: Any) -> None:
    fields = {"window": window, "scale": 50.0, "inverse": "pinv", "ratio": 0.25}
    place = Place((8, 12), (8, 12))
    own, toma = (replace(c, **fields).setting(place) for c in (config, ToMAConfig()))
    assert isinstance(own, ToMA)
    assert isinstance(toma, ToMA)
    assert type(own) is not ToMA
    assert (own.tile, own.keep, own.scale, own.inverse) == (
        toma.tile, toma.keep, toma.scale, toma.inverse,
    )  # fmt: skip
    assert own.merged_count == toma.merged_count
    x = torch.randn(2, 96, 6)
    idx = own.select(x)[0]
    assert idx.shape == toma.select(x)[0].shape
    for mine, theirs in zip(
        own.weights(x, {"idx": idx}), toma.weights(x, {"idx": idx}), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("config", CONFIGS, ids=ids)
def test_defaults_are_those_of_toma(config: ToMAConfig) -> None:
    expected = ToMAConfig().to_dict()
    own = config.to_dict()
    assert {name: own[name] for name in expected if name != "method"} == {
        name: value for name, value in expected.items() if name != "method"
    }
    assert set(own) - set(expected) <= {"seed"}


def test_the_seed_reaches_the_setting() -> None:
    place = Place((8, 8), (8, 8))
    config = RandomConfig(seed=5, overrides={"up.*": {"seed": 6}})
    for path, seed in (("down.0", 5), ("up.0", 6)):
        setting = config.at(path).setting(place)
        assert isinstance(setting, Random)
        assert setting.seed == seed


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"seed": -1}, ConfigError, "at least 0"),
        ({"seed": 0.5}, ConfigError, "whole number"),
        ({"ratio": 1}, ConfigError, r"\[0, 1\)"),
        ({"window": "tiles"}, UnknownNameError, "tile or stripe"),
        ({"tile": (0, 2)}, TileError, "at least 1"),
    ],
)
def test_config_errors_say_what_is_right(
    fields: dict[str, Any], error: type[ConfigError], text: str
) -> None:
    with pytest.raises(error, match=text):
        RandomConfig(**fields)


def test_the_grid_has_no_seed() -> None:
    with pytest.raises(UnknownNameError, match=r"it is an option of .*random"):
        with_options(GridConfig(), {"seed": 1})


# -- as programs ----------------------------------------------------------------------------------

SETTINGS = [
    Random((8, 6), (4, 3), 5, 1000.0, seed=1),
    Grid((8, 6), (4, 3), 5, 1000.0),
    Grid((2, 4, 4), (2, 4, 2), 7, 20.0),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_traces(setting: ToMA, dtype: torch.dtype) -> None:
    check_traces(Program(setting), torch.randn(2, math.prod(setting.grid), 8, dtype=dtype))


@pytest.mark.parametrize("setting", SETTINGS[::2], ids=str)
def test_exports_to_onnx(setting: ToMA, tmp_path: Any) -> None:
    x = torch.randn(2, math.prod(setting.grid), 8)
    check_onnx(Program(setting), x, tmp_path / "baseline.onnx")

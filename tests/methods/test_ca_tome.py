"""CA-ToMe: the published package's results, its checkpoints, and the calibrated form."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.methods.test_tomesd import noise, pattern, smooth
from toma_fx.errors import ConfigError, UnknownNameError
from toma_fx.methods.ca_tome import CHECKPOINTS, CAToMe, CAToMeConfig
from toma_fx.methods.cells import Cells
from toma_fx.methods.setting import Place
from toma_fx.methods.tomesd import ToMeSD

Grid = tuple[int, int]
GRIDS = [((8, 8), 2, 2), ((6, 10), 2, 2), ((9, 7), 2, 3), ((9, 9), 3, 3)]


def package_module(name: str) -> Any:
    """A module of the published package."""
    return pytest.importorskip(f"ca_tome.{name}")


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The published matching at a checkpoint, with its sorts made stable (see test_tomesd)."""
    merge = package_module("merge")
    argsort = Tensor.argsort
    stable = lambda self, dim=-1, descending=False: argsort(  # noqa: E731
        self, dim=dim, descending=descending, stable=True
    )
    monkeypatch.setattr(Tensor, "argsort", stable)

    def matched(x: Tensor, grid: Grid, sy: int, sx: int, threshold: float) -> Any:
        cache: dict[str, Any] = {"compute_on": [0], "merge": None, "unmerge": None}
        return merge.bipartite_soft_matching_random2d(
            x, grid[1], grid[0], sx, sy, threshold, cache, 0, no_rand=True
        )

    return matched


def uneven(grid: Grid) -> Tensor:
    """One smooth picture and one noisier, so that different numbers reach a threshold."""
    x = smooth(grid)
    return x + torch.tensor([0.0, 0.6]).view(2, 1, 1) * noise(grid, seed=2)


@pytest.mark.parametrize("threshold", [-1.0, 0.2, 0.5, 0.7, 0.95])
@pytest.mark.parametrize(("grid", "sy", "sx"), GRIDS)
def test_equals_the_package(package: Any, grid: Grid, sy: int, sx: int, threshold: float) -> None:
    x, other = uneven(grid), noise(grid, channels=5, seed=1)
    setting = CAToMe(grid, Cells(1, *grid, sy, sx), threshold=threshold)
    ours = pattern(setting, x)
    merge, unmerge = package(x, grid, sy, sx, threshold)
    for value in (x, other):
        merged = merge(value)
        torch.testing.assert_close(setting.merge(value, ours), merged, atol=1e-6, rtol=0)
        assert torch.equal(setting.unmerge(merged, ours), unmerge(merged))
    assert setting.count_merged(ours) == ours["places"].shape[1] == merged.shape[1]
    number = torch.arange(float(merged.shape[1])).view(1, -1, 1).expand(2, -1, 1)
    assert torch.equal(ours["joins"], unmerge(number).long().squeeze(-1))


def test_the_batch_merges_as_many_as_its_most_similar(package: Any) -> None:
    grid, x = (8, 8), uneven((8, 8))
    setting = CAToMe(grid, Cells(1, *grid, 2, 2), threshold=0.7)
    best, _ = setting.match(x)
    counts = (best.flatten(1) >= 0.7).sum(-1)
    assert counts[0] > counts[1] > 0
    assert setting.count_merged(pattern(setting, x)) == 64 - int(counts[0])


def test_another_threshold_differs_from_the_package(package: Any) -> None:
    """The comparison above sees a wrong threshold."""
    grid, x = (8, 8), uneven((8, 8))
    setting = CAToMe(grid, Cells(1, *grid, 2, 2), threshold=0.75)
    assert package(x, grid, 2, 2, 0.7)[0](x).shape[1] != setting.count_merged(pattern(setting, x))


def test_nothing_similar_merges_nothing() -> None:
    setting = CAToMe((6, 6), Cells(1, 6, 6, 2, 2), threshold=0.99)
    x = noise((6, 6))
    parts = pattern(setting, x)
    assert setting.count_merged(parts) == 36
    assert torch.equal(setting.unmerge(setting.merge(x, parts), parts), x)
    full = CAToMe((6, 6), Cells(1, 6, 6, 2, 2), threshold=1.0)
    same = torch.ones(1, 36, 4)
    assert full.count_merged(pattern(full, same)) == 36


def test_fake_tensors_merge_nothing() -> None:
    setting = CAToMe((6, 6), Cells(1, 6, 6, 2, 2), threshold=-1.0)
    with FakeTensorMode():
        x = torch.empty(2, 36, 4)
        parts = pattern(setting, x)
        assert parts["places"].shape == parts["joins"].shape == (2, 36)
        merged = setting.merge(x, parts)
        assert merged.shape[1] == setting.merged_count == setting.count_merged(parts) == 36
        assert setting.unmerge(merged, parts).shape == x.shape


# -- checkpoints ----------------------------------------------------------------------------------


def test_checkpoints_are_the_published_ones() -> None:
    conf = package_module("confs").CacheConf
    for ours, theirs in [(f"config-{i}", f"CONFIG_{i}") for i in (1, 2, 3, 4)] + [
        ("adaptive", "ADAPTIVE"), ("config-5", "CONFIG_Five")
    ]:  # fmt: skip
        assert list(CHECKPOINTS[ours]) == getattr(conf, theirs)
    assert len(CHECKPOINTS) == 6


@pytest.mark.parametrize(
    ("name", "steps", "wanted"),
    [
        ("config-3", 50, (0, 8, 11, 13, 20, 25, 30, 35, 45, 46, 47, 48, 49)),
        ("config-3", 28, (0, 4, 6, 7, 11, 14, 17, 20, 25, 26, 27)),
        ("config-3", 20, (0, 3, 4, 5, 8, 10, 12, 14, 18, 19)),
        ("adaptive", 50, (0, 1, 5, 7, 10, 12, 15, 35, 40, 45, 46, 47, 48, 49)),
        ("config-5", 20, (0, 2, 4, 6, 8, 10, 12, 14, 16, 18)),
        ("config-1", 1, (0,)),
    ],
)
def test_checkpoints_scale(name: str, steps: int, wanted: tuple[int, ...]) -> None:
    config = CAToMeConfig(checkpoints=name, steps=steps)
    assert config.refresh_steps == wanted
    due = [since for since in range(steps) if config.renewal(since) == "refresh"]
    assert tuple(due) == wanted
    assert {config.renewal(since) for since in range(steps)} <= {"refresh", "reuse"}


def test_other_renewals() -> None:
    every = CAToMeConfig(checkpoints=None, destinations_every=3)
    assert every.refresh_steps is None
    assert [s for s in range(7) if every.renewal(s) == "refresh"] == [0, 3, 6]
    listed = CAToMeConfig(select_at=(0, 2))
    assert [s for s in range(9) if listed.renewal(s) == "refresh"] == [0, 2]


# -- configuration --------------------------------------------------------------------------------


def place(grid: tuple[int, ...] = (8, 8), **fields: Any) -> Place:
    return Place(grid, grid, **fields)


def test_dynamic_form() -> None:
    config = CAToMeConfig(threshold=0.6, sy=3, random=True, seed=4)
    setting = config.setting(place())
    assert setting == CAToMe((8, 8), Cells(1, 8, 8, 3, 2, True, 4), 0, 0.6)
    assert (config.form, setting.dynamic, setting.merged_count) == ("dynamic", True, 64)
    assert setting.describe() == "3x2 cells, random, similarity 0.6"
    assert "calibrate" in config.static_form
    assert CAToMeConfig().at("any") == CAToMeConfig()


def test_calibrated_form() -> None:
    config = CAToMeConfig(ratios={"up.0": 0.3, "down.0": 0.9, "mid": 0.001, "out": 0.0})
    assert (config.form, config.static_form, config.is_off) == ("calibrated", "", False)
    setting = config.setting(place((7, 9), group="up.0"))
    assert setting == ToMeSD((7, 9), Cells(1, 7, 9, 2, 2), 19)
    assert not setting.dynamic
    capped = config.setting(place(group="down.0"))
    assert isinstance(capped, ToMeSD)
    assert capped.r == 48
    assert config.setting(place(group="up.1")) == "no ratio was calibrated for 'up.1'"
    for group in ("mid", "out"):
        assert "merges no token" in str(config.setting(place(group=group)))
    assert CAToMeConfig(ratios={"up.0": 0.0}).is_off


def test_ratios_are_frozen_and_go_through_json() -> None:
    config = CAToMeConfig(ratios={"b": 0.25, "a": 0.5})
    assert config.ratios == (("a", 0.5), ("b", 0.25))
    assert hash(config) == hash(CAToMeConfig(ratios=(("b", 0.25), ("a", 0.5))))
    fields = json.loads(json.dumps(config.to_dict()))
    assert fields.pop("method") == "ca-tome"
    assert CAToMeConfig(**fields) == config


def test_reasons_to_leave_a_place_alone() -> None:
    assert CAToMeConfig(threshold=1).is_off
    assert "threshold of 1" in str(CAToMeConfig(threshold=1).setting(place()))
    assert "2 times coarser" in str(CAToMeConfig().setting(place(downsample=2)))
    assert "larger than the 1x8 grid" in str(CAToMeConfig().setting(place((1, 8))))


def test_overrides() -> None:
    config = CAToMeConfig(threshold=1.0, overrides={"down.*": {"threshold": 0.5}})
    assert config.is_off
    assert config.merges
    assert config.at("down.0").threshold == 0.5
    with pytest.raises(UnknownNameError, match="checkpoints"):
        CAToMeConfig(overrides={"*": {"checkpoints": None}})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threshold", 1.1), ("threshold", -1.1), ("threshold", "0.7"), ("steps", 0),
        ("checkpoints", "config-6"), ("ratios", {"a": 1.0}), ("ratios", {"a": "0.5"}),
        ("ratios", {1: 0.5}), ("ratios", (("a",),)), ("ratios", 0.5), ("ratios", "a"),
        ("seed", -1), ("sx", 0), ("random", "yes"),
    ],
)  # fmt: skip
def test_values_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        CAToMeConfig(**{field: value})

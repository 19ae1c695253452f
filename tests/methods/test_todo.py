"""ToDo against PyTorch's own resampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.tracing import Program, check_onnx, check_traces
from toma_fx.errors import ConfigError, RewriteError, UnknownNameError
from toma_fx.methods.setting import Place
from toma_fx.methods.todo import ToDo, ToDoConfig

# (h, w), factor: divided by it, one side divided, no side divided, as large as a side
PLANES = [((8, 12), 2), ((9, 6), 3), ((8, 7), 2), ((13, 11), 3), ((26, 38), 4), ((3, 5), 3)]


def resampled(x: Tensor, plane: tuple[int, int], factor: int, downsample: str) -> Tensor:
    """What PyTorch makes of every plane of [B, N, C] tokens."""
    height, width = plane
    batch, _, channels = x.shape
    images = x.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
    if downsample == "average":
        small = F.avg_pool2d(images, factor, ceil_mode=True, count_include_pad=False)
    else:
        small = F.interpolate(images, (height // factor, width // factor), mode=downsample)
    return small.permute(0, 2, 3, 1).reshape(batch, -1, channels)


@pytest.mark.parametrize("downsample", ["nearest", "average", "area"])
@pytest.mark.parametrize(("plane", "factor"), PLANES)
def test_a_plane_is_resampled_as_by_pytorch(
    plane: tuple[int, int], factor: int, downsample: Any
) -> None:
    x = torch.randn(2, plane[0] * plane[1], 5)
    setting = ToDo(plane, plane, factor, downsample)
    y = setting.merge(x, {})
    torch.testing.assert_close(y, resampled(x, plane, factor, downsample))
    assert y.shape == (2, setting.merged_count, 5)
    assert not torch.equal(y, ToDo(plane, plane, factor, downsample).merge(x.flip(1), {}))


def test_the_three_ways_differ_where_the_factor_does_not_divide() -> None:
    x = torch.randn(1, 7 * 9, 4)
    nearest, average, area = (
        ToDo((7, 9), (7, 9), 2, downsample).merge(x, {})
        for downsample in ("nearest", "average", "area")
    )
    assert nearest.shape == area.shape == (1, 3 * 4, 4)
    assert average.shape == (1, 4 * 5, 4)
    assert not torch.allclose(nearest, area)


def test_average_and_area_are_one_where_the_factor_divides() -> None:
    x = torch.randn(1, 48, 4)
    average, area = (
        ToDo((6, 8), (6, 8), 2, downsample).merge(x, {}) for downsample in ("average", "area")
    )
    torch.testing.assert_close(average, area)


def test_nearest_rows_are_those_of_pytorch_at_every_size() -> None:
    # PyTorch multiplies by a rounded quotient; whole numbers give the same rows
    for height in range(2, 200):
        rows = torch.arange(height, dtype=torch.float64)
        for factor in range(2, min(height, 9)):
            taken = ToDo((height, factor), (height, factor), factor).positions({}) // factor
            published = F.interpolate(rows[None, None], height // factor, mode="nearest")
            assert torch.equal(taken, published[0].long()), (height, factor)


@pytest.mark.parametrize("downsample", ["nearest", "average", "area"])
@pytest.mark.parametrize(
    ("grid", "unit"),
    [((21, 6), (7, 6)), ((3, 7, 6), (3, 7, 6)), ((4, 7, 6), (2, 7, 6))],
    ids=["images below each other", "frames", "videos"],
)
def test_nothing_crosses_images_or_frames(
    grid: tuple[int, ...], unit: tuple[int, ...], downsample: Any
) -> None:
    setting = ToDo(grid, unit, 2, downsample)
    planes = torch.randn(1, setting.planes, 42, 3)
    alone = ToDo((7, 6), (7, 6), 2, downsample)
    expected = torch.cat([alone.merge(planes[:, i], {}) for i in range(setting.planes)], 1)
    torch.testing.assert_close(setting.merge(planes.flatten(1, 2), {}), expected)
    assert setting.positions({}).shape == (1, setting.merged_count)
    assert torch.equal(setting.positions({})[:, : alone.merged_count], alone.positions({}))
    last = 42 * (setting.planes - 1)
    assert torch.equal(setting.positions({})[:, -alone.merged_count :], alone.positions({}) + last)
    if (
        downsample != "nearest"
    ):  # as one picture of odd height, means would reach into the next image
        one = ToDo((7 * setting.planes, 6), (7 * setting.planes, 6), 2, downsample)
        mixed = one.merge(planes.flatten(1, 2), {})
        assert mixed.shape != expected.shape or not torch.allclose(mixed, expected)


@pytest.mark.parametrize("downsample", ["nearest", "average", "area"])
@pytest.mark.parametrize(("plane", "factor"), PLANES)
def test_a_position_is_the_middle_of_what_is_averaged(
    plane: tuple[int, int], factor: int, downsample: Any
) -> None:
    setting = ToDo(plane, plane, factor, downsample)
    count = plane[0] * plane[1]
    shares = setting.merge(torch.eye(count)[None], {})[0]
    torch.testing.assert_close(shares.sum(1), torch.ones(setting.merged_count))
    for share, position in zip(shares, setting.positions({})[0].tolist(), strict=True):
        inside = share.nonzero().flatten()
        rows, columns = inside // plane[1], inside % plane[1]
        # the lower median is the middle one of consecutive numbers
        assert (position // plane[1], position % plane[1]) == (rows.median(), columns.median())
        assert downsample != "nearest" or inside.tolist() == [position]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("downsample", ["nearest", "average", "area"])
def test_half_precision_stays(downsample: Any, dtype: torch.dtype) -> None:
    x = torch.randn(1, 63, 8)
    setting = ToDo((7, 9), (7, 9), 2, downsample)
    y = setting.merge(x.to(dtype), {})
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), setting.merge(x, {}), rtol=0.02, atol=0.02)


def test_there_is_nothing_to_unmerge() -> None:
    setting = ToDo((4, 4), (4, 4), 2)
    assert setting.parts == ()
    assert setting.select(torch.randn(1, 16, 2)) == ()
    with pytest.raises(RewriteError, match="keys"):
        setting.unmerge(torch.randn(1, 4, 2), {})


# -- configuration --------------------------------------------------------------------------------


def at(level: int, side: int = 16) -> Place:
    return Place((side, side), (side, side), level, 2**level)


def test_one_factor_is_for_the_finest_level_and_several_go_down() -> None:
    one, several = ToDoConfig(factor=3), ToDoConfig(factor=(4, 1, 2), downsample="area")
    assert one.setting(at(0)) == ToDo((16, 16), (16, 16), 3, "nearest")
    assert one.setting(at(1)) == "the factor is 1 at level 1"
    assert several.setting(at(0)) == ToDo((16, 16), (16, 16), 4, "area")
    assert isinstance(several.setting(at(1)), str)
    assert several.setting(at(2)) == ToDo((16, 16), (16, 16), 2, "area")
    assert isinstance(several.setting(at(3)), str)


def test_a_unit_smaller_than_the_factor_is_left_alone() -> None:
    config = ToDoConfig(factor=4)
    assert isinstance(config.setting(Place((4, 9), (4, 9))), ToDo)
    for unit in [(3, 9), (9, 3), (8, 3, 9)]:
        assert config.setting(Place(unit, unit)) == (
            f"factor 4 is larger than a side of a {'x'.join(map(str, unit))} grid"
        )
    # two images of three rows are no picture of six
    assert isinstance(config.setting(Place((6, 9), (3, 9))), str)


def test_config_says_what_is_off_and_that_there_is_no_pattern() -> None:
    assert not ToDoConfig().is_off
    assert ToDoConfig(factor=1).is_off
    assert ToDoConfig(factor=(1, 1)).is_off
    assert not ToDoConfig(factor=(1, 2)).is_off
    assert not ToDoConfig.patterned
    assert ToDoConfig().scope == "keys"
    assert ToDoConfig(factor=[2, 1]).factor == (2, 1)  # type: ignore[arg-type]


def test_overrides_reach_the_factor() -> None:
    config = ToDoConfig(overrides={"up.*": {"factor": 4, "downsample": "average"}})
    assert config.at("up.0").setting(at(0)) == ToDo((16, 16), (16, 16), 4, "average")
    assert config.at("down.0").setting(at(0)) == ToDo((16, 16), (16, 16), 2, "nearest")


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"factor": 0}, ConfigError, "at least 1"),
        ({"factor": 2.0}, ConfigError, "whole number"),
        ({"factor": True}, ConfigError, "whole number"),
        ({"factor": ()}, ConfigError, "one for every level"),
        ({"factor": (2, 0)}, ConfigError, r"got: \(2, 0\)"),
        ({"downsample": "bilinear"}, UnknownNameError, "nearest or average or area"),
        ({"scope": "block"}, ConfigError, "keys and values"),
        ({"branches": ("mlp",)}, ConfigError, "keys and values"),
        ({"overrides": {"x": {"factor": 0}}}, ConfigError, "at least 1"),
        ({"overrides": {"x": {"scope": "block"}}}, UnknownNameError, "factor, downsample"),
    ],
)
def test_config_errors_say_what_is_right(
    fields: dict[str, Any], error: type[ConfigError], text: str
) -> None:
    with pytest.raises(error, match=text):
        ToDoConfig(**fields)


# -- as programs ----------------------------------------------------------------------------------

SETTINGS = [
    ToDo((8, 8), (8, 8), 2),
    ToDo((8, 7), (8, 7), 2),
    ToDo((8, 8), (8, 8), 2, "average"),
    ToDo((14, 5), (7, 5), 2, "average"),
    ToDo((2, 7, 5), (2, 7, 5), 2, "area"),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_traces(setting: ToDo, dtype: torch.dtype) -> None:
    x = torch.randn(2, setting.planes * setting.plane[0] * setting.plane[1], 4, dtype=dtype)
    check_traces(Program(setting, unmerges=False), x)


@pytest.mark.parametrize("setting", SETTINGS[1:4:2], ids=str)
def test_exports_to_onnx(setting: ToDo, tmp_path: Any) -> None:
    x = torch.randn(2, setting.planes * setting.plane[0] * setting.plane[1], 4)
    check_onnx(Program(setting, unmerges=False), x, tmp_path / "todo.onnx")

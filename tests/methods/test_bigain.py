"""BiGain: the published score by a convolution, matching by loops over tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests import published
from tests.tracing import Program, check_onnx, check_traces
from toma_fx.methods.bigain import BiGain, BiGainConfig
from toma_fx.methods.cells import Cells
from toma_fx.methods.setting import Pattern, Place
from toma_fx.methods.tomesd import ToMeSD, ToMeSDConfig

GRIDS = [(8, 8), (6, 10), (7, 9)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pattern_of(setting: ToMeSD, x: Tensor) -> Pattern:
    return dict(zip(setting.parts, setting.select(x), strict=True))


def smoothest(x: Tensor, grid: tuple[int, int]) -> list[int]:
    """The token of each 2x2 cell whose Laplacian is smallest, by PyTorch's convolution."""
    height, width = grid
    channels = x.shape[-1]
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(channels, 1, 3, 3)
    image = x.T.reshape(1, channels, height, width)
    score = F.conv2d(image, kernel, padding=1, groups=channels).abs().sum(1).flatten()
    heads = []
    for top in range(0, height // 2 * 2, 2):
        for left in range(0, width // 2 * 2, 2):
            cell = [(top + r) * width + left + c for r in (0, 1) for c in (0, 1)]
            heads.append(min(cell, key=lambda i: float(score[i])))
    return heads


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.75])
def test_equals_loops_over_tokens(grid: tuple[int, int], ratio: float) -> None:
    x, other = noise(2, grid[0] * grid[1], 6), noise(2, grid[0] * grid[1], 3, seed=1)
    cells = Cells(1, *grid, 2, 2)
    setting = BiGain(grid, cells, min(int(grid[0] * grid[1] * ratio), cells.sources))
    pattern = pattern_of(setting, x)
    groups = [published.cell_groups(row, grid, ratio, heads=smoothest(row, grid)) for row in x]
    for value in (x, other):
        merge, unmerge = published.pair(groups, published.mean)
        merged = setting.merge(value, pattern)
        assert merged.shape[1] == setting.merged_count
        got = setting.unmerge(merged, pattern)
        torch.testing.assert_close(got, unmerge(merge(value)), atol=1e-5, rtol=0)
    plain = ToMeSD(grid, cells, setting.r)
    assert not torch.equal(plain.select(x)[1], setting.select(x)[1]), "other destinations"


def test_destinations_are_themselves_and_differ_by_row_of_the_batch() -> None:
    x = noise(3, 64, 5)
    setting = BiGain((8, 8), Cells(1, 8, 8, 2, 2), 48)
    pattern = pattern_of(setting, x)
    places = pattern["places"]
    number = torch.arange(16).expand(3, -1)
    assert torch.equal(torch.take_along_dim(pattern["joins"], places, 1), number)
    assert not torch.equal(places[0], places[1])
    assert [p.tolist() for p in places] == [smoothest(row, (8, 8)) for row in x]


def test_edges_are_no_destinations() -> None:
    """A line one token wide through a flat picture: what is on it joins, and nothing joins it."""
    image = torch.ones(1, 8, 8, 3)
    image[:, :, 2] = torch.tensor([3.0, -1.0, 0.5])
    setting = BiGain((8, 8), Cells(1, 8, 8, 2, 2), 48)
    places = pattern_of(setting, image.flatten(1, 2))["places"]
    assert not (places % 8 == 2).any()
    plain = ToMeSD((8, 8), Cells(1, 8, 8, 2, 2), 48)
    assert (pattern_of(plain, image.flatten(1, 2))["places"] % 8 == 2).any()


@pytest.mark.parametrize("dims", [(1,), (2,), (1, 2)])
def test_a_mirrored_picture_merges_mirrored(dims: tuple[int, ...]) -> None:
    x = noise(1, 8, 10, 4)
    setting = BiGain((8, 10), Cells(1, 8, 10, 2, 2), 40)

    def through(image: Tensor) -> Tensor:
        tokens = image.flatten(1, 2)
        pattern = pattern_of(setting, tokens)
        return setting.unmerge(setting.merge(tokens, pattern), pattern).view(image.shape)

    torch.testing.assert_close(through(x.flip(dims)), through(x).flip(dims), atol=1e-5, rtol=0)


def test_pictures_do_not_see_each_other() -> None:
    cells = Cells(2, 4, 6, 2, 2)
    x = noise(1, 48, 4)
    both = BiGain((8, 6), cells, 24).smoothest(x)
    alone = [BiGain((4, 6), Cells(1, 4, 6, 2, 2), 12).smoothest(x[:, i : i + 24]) for i in (0, 24)]
    assert torch.equal(both, torch.cat(alone, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_choose_as_float32(dtype: torch.dtype) -> None:
    x = noise(2, 64, 8).to(dtype)
    setting = BiGain((8, 8), Cells(1, 8, 8, 2, 2), 32)
    assert torch.equal(setting.select(x)[1], setting.select(x.float())[1])
    assert setting.merge(x, pattern_of(setting, x)).dtype == dtype


def test_configuration() -> None:
    setting = BiGainConfig(ratio=0.25, sx=4).setting(Place((8, 8), (8, 8)))
    assert setting == BiGain((8, 8), Cells(1, 8, 8, 2, 4), 16)
    assert "smoothest" in setting.describe()
    fields = {f.name for f in dataclasses.fields(BiGainConfig)}
    assert fields == {f.name for f in dataclasses.fields(ToMeSDConfig)}


SETTINGS = [
    BiGain((8, 6), Cells(1, 8, 6, 2, 2), 20),
    BiGain((2, 5, 7), Cells(2, 5, 7, 2, 3), 20),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_traces(setting: BiGain, dtype: torch.dtype) -> None:
    tokens = setting.cells.pictures * setting.cells.tokens
    check_traces(Program(setting), noise(2, tokens, 8).to(dtype))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_exports_to_onnx(setting: BiGain, tmp_path: Any) -> None:
    tokens = setting.cells.pictures * setting.cells.tokens
    check_onnx(Program(setting), noise(2, tokens, 8), tmp_path / "bigain.onnx")

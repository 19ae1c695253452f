"""CoReDiT: coherence, what stays, and what the rest becomes, by loops over tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import windows_of
from tests.tracing import Program, check_onnx, check_traces
from toma_fx.methods.coredit import CoReDiT, CoReDiTConfig
from toma_fx.methods.setting import Pattern, Place
from toma_fx.methods.toma import ToMA, ToMAConfig

SCALE = 5.0


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def setting_of(grid: tuple[int, ...], tile: tuple[int, ...], keep: int, **fields: Any) -> CoReDiT:
    return CoReDiT(grid, tile, keep, SCALE, **{"unit": grid, **fields})


def pattern_of(setting: ToMA, x: Tensor) -> Pattern:
    pattern = dict(zip(setting.chosen, setting.select(x), strict=True))
    return pattern | dict(zip(setting.weighed, setting.weights(x, pattern), strict=True))


def coherence(x: Tensor, height: int, width: int) -> list[float]:
    """Mean cosine of each token with those above, below, left and right of it."""
    unit = [row / row.norm() for row in x.double()]
    scores = []
    for i in range(height * width):
        row, column = divmod(i, width)
        near = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        inside = [r * width + c for r, c in near if 0 <= r < height and 0 <= c < width]
        scores.append(sum(float(unit[i] @ unit[j]) for j in inside) / len(inside))
    return scores


def eager(x: Tensor, y: Tensor, grid: tuple[int, int], tile: tuple[int, int], keep: int) -> Tensor:
    """What of values `y` comes back: those that stay, and weighted means of them."""
    score = coherence(x, *grid)
    unit, out = [row / row.norm() for row in x.double()], y.clone()
    for window in windows_of([grid], tile):
        staying = sorted(window, key=lambda i: score[i])[:keep]
        for i in window:
            if i in staying:
                continue
            weights = torch.softmax(torch.stack([SCALE * (unit[i] @ unit[j]) for j in staying]), 0)
            out[i] = sum(w * y[j] for w, j in zip(weights.to(y.dtype), staying, strict=True))
    return out


@pytest.mark.parametrize(
    ("grid", "tile", "keep"), [((8, 8), (4, 4), 8), ((6, 9), (3, 3), 2), ((4, 10), (4, 2), 7)]
)
def test_equals_loops_over_tokens(grid: Any, tile: Any, keep: int) -> None:
    count = math.prod(grid)
    x, y = noise(2, count, 6), noise(2, count, 3, seed=1)
    setting = setting_of(grid, tile, keep)
    got = setting.coherence(x)
    want = torch.tensor([coherence(row, *grid) for row in x])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    pattern = pattern_of(setting, x)
    for value in (x, y):
        merged = setting.merge(value, pattern)
        assert merged.shape[1] == setting.merged_count
        assert torch.equal(
            merged, torch.take_along_dim(value, setting.positions(pattern).unsqueeze(-1), 1)
        )
        back = setting.unmerge(merged, pattern)
        for b in range(2):
            torch.testing.assert_close(
                back[b], eager(x[b], value[b], grid, tile, keep), atol=1e-5, rtol=0
            )


def test_what_stays_is_unchanged_and_what_is_equal_to_it_too() -> None:
    x = noise(1, 16, 8)
    x[:, 4:] = x[:, :4].repeat(1, 3, 1)  # rows alike
    setting = CoReDiT((4, 4), (4, 4), 8, 1000.0, unit=(4, 4))
    pattern = pattern_of(setting, x)
    back = setting.unmerge(setting.merge(x, pattern), pattern)
    at = setting.positions(pattern)
    assert torch.equal(back[0, at[0]], x[0, at[0]])
    torch.testing.assert_close(pattern["unmerge"].sum(-1), torch.ones(1, 1, 16))


def test_an_isolated_token_stays_and_a_flat_part_goes() -> None:
    image = torch.zeros(1, 8, 8, 4)
    image[..., 0] = 1
    image[:, 3, 5] = torch.tensor([0.0, 1, 0, 0])
    setting = setting_of((8, 8), (4, 4), 4)
    places = setting.positions(pattern_of(setting, image.flatten(1, 2)))[0].tolist()
    assert 3 * 8 + 5 in places
    # its neighbors cohere less than the rest, those in the window below its own, too
    assert {2 * 8 + 5, 3 * 8 + 4, 3 * 8 + 6, 4 * 8 + 5} <= set(places)


@pytest.mark.parametrize("dims", [(1,), (2,), (1, 2)])
def test_a_mirrored_picture_keeps_the_mirrored_tokens(dims: tuple[int, ...]) -> None:
    x, setting = noise(1, 8, 8, 4), setting_of((8, 8), (4, 4), 6)

    def mask(image: Tensor) -> Tensor:
        kept = setting.positions(pattern_of(setting, image.flatten(1, 2)))
        return torch.zeros(1, 64).scatter(1, kept, 1.0).view(1, 8, 8)

    assert torch.equal(mask(x.flip(dims)), mask(x).flip(dims))


@pytest.mark.parametrize(
    ("grid", "unit"), [((8, 6), (4, 6)), ((2, 4, 6), (2, 4, 6))], ids=["pictures", "frames"]
)
def test_neighbors_lie_in_one_picture_or_frame(grid: Any, unit: Any) -> None:
    x = noise(1, 48, 4)
    both = setting_of(grid, (*[1] * (len(grid) - 2), 4, 2), 4, unit=unit).coherence(x)
    one = setting_of((4, 6), (4, 2), 4)
    alone = [one.coherence(x[:, i : i + 24]) for i in (0, 24)]
    torch.testing.assert_close(both, torch.cat(alone, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x, setting = noise(2, 64, 8).to(dtype), setting_of((8, 8), (4, 4), 8)
    assert torch.equal(setting.select(x)[0], setting.select(x.float())[0])
    assert pattern_of(setting, x)["unmerge"].dtype == dtype


def test_configuration() -> None:
    config = CoReDiTConfig(ratio=0.25, tile=4, scale=2)
    setting = config.setting(Place((8, 8), (4, 8)))
    assert setting == CoReDiT((8, 8), (4, 4), 12, 2.0, unit=(4, 8))
    assert CoReDiTConfig(ratio=0).setting(Place((8, 8), (8, 8))) == "ratio is 0"
    assert (config.scope, config.branches) == ("sublayer", ("attention",))
    toma = ToMAConfig(ratio=0.25, tile=4).setting(Place((8, 8), (8, 8)))
    assert isinstance(toma, ToMA)
    assert toma.merged_count == setting.merged_count  # type: ignore[union-attr]


SETTINGS = [setting_of((8, 6), (4, 3), 5), setting_of((2, 4, 4), (1, 4, 2), 3)]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_traces(setting: CoReDiT, dtype: torch.dtype) -> None:
    check_traces(Program(setting), noise(2, math.prod(setting.grid), 8).to(dtype))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_exports_to_onnx(setting: CoReDiT, tmp_path: Any) -> None:
    check_onnx(Program(setting), noise(2, math.prod(setting.grid), 8), tmp_path / "coredit.onnx")

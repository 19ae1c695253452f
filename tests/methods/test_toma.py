"""ToMA at one grid: golden vectors of the published code, shapes, precision, ties, NaN."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from toma_fx.errors import TileError
from toma_fx.methods.facility import facility_location
from toma_fx.methods.toma import (
    UNROLL,
    ToMA,
    ToMAConfig,
    cosine_similarity,
    pseudo_inverse,
    resolve_tile,
    ridge_of,
)
from toma_fx.methods.windows import (
    dividing_tile,
    from_windows,
    to_windows,
    token_index,
    window_count,
)

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "toma_reference.npz")
SDXL_BUCKETS = [
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664),
    (640, 1600), (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280),
    (832, 1216), (832, 1152), (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024),
]  # fmt: skip


def golden(case: str) -> tuple[Tensor, ToMA]:
    """Tokens, and the setting that the published code merged them by."""
    height, width, tiles, ratio, scale = GOLDEN[f"{case}_meta"]
    side = int((height * width / tiles) ** 0.5)
    keep = side * side - int(side * side * ratio)
    x = torch.from_numpy(GOLDEN[f"{case}_x"])
    return x, ToMA((int(height), int(width)), (side, side), keep, float(scale))


def weights(setting: ToMA, x: Tensor, idx: Tensor) -> dict[str, Tensor]:
    """The pattern for chosen destinations."""
    return dict(zip(setting.parts, (idx, *setting.weights(x, {"idx": idx})), strict=True))


def pattern_of(setting: ToMA, x: Tensor) -> dict[str, Tensor]:
    (idx,) = setting.select(x)
    return weights(setting, x, idx)


def round_trip(setting: ToMA, x: Tensor) -> Tensor:
    pattern = pattern_of(setting, x)
    return setting.unmerge(setting.merge(x, pattern), pattern)


def worst_regret(x: Tensor, setting: ToMA, idx: Tensor) -> float:
    """How far any choice lies below the best gain at its turn, replayed in float64."""
    windows = to_windows(x, setting.grid, setting.tile)
    unit = torch.nn.functional.normalize(windows.double(), dim=-1)
    worst = 0.0
    for similarity, order in zip((unit @ unit.mT).flatten(0, 1), idx.flatten(0, 1), strict=True):
        covered = None
        for j in order:
            rows = similarity if covered is None else (similarity - covered).relu()
            gains = rows.sum(-1)
            worst = max(worst, float(gains.max() - gains[j]))
            covered = similarity[j] if covered is None else torch.maximum(covered, similarity[j])
    return worst


@pytest.mark.parametrize("case", ["a", "c"])
def test_selection_equals_published_code_up_to_ties(case: str) -> None:
    x, setting = golden(case)
    (idx,) = setting.select(x)
    published = torch.from_numpy(GOLDEN[f"{case}_idx"])
    assert idx.shape == published.shape
    assert worst_regret(x, setting, idx) < 1e-6
    assert worst_regret(x, setting, published) < 1e-6
    # wherever the two first part ways, the gains tie: up to there they are equal
    assert (idx == published).float().mean() > 0.8


@pytest.mark.parametrize("case", ["a", "c"])
def test_merge_and_unmerge_equal_published_code(case: str) -> None:
    x, setting = golden(case)
    pattern = weights(setting, x, torch.from_numpy(GOLDEN[f"{case}_idx"]))
    merged = setting.merge(x, pattern)
    np.testing.assert_allclose(merged, GOLDEN[f"{case}_merged"], atol=1e-6)
    unmerged = setting.unmerge(merged, pattern)
    np.testing.assert_allclose(unmerged, GOLDEN[f"{case}_unmerged"], atol=1e-6)
    off = weights(replace(setting, scale=setting.scale / 2), x, pattern["idx"])
    assert (setting.merge(x, off) - merged).abs().max() > 1e-3, "another scale shows"


@pytest.mark.parametrize("keep", [UNROLL, UNROLL + 1])
def test_the_operator_and_the_loop_choose_the_same_tokens(keep: int) -> None:
    x, setting = torch.randn(2, 256, 16), ToMA((16, 16), (8, 8), keep, 1000.0)
    similarity = cosine_similarity(to_windows(x, setting.grid, setting.tile))
    (idx,) = setting.select(x)
    assert torch.equal(idx, facility_location(similarity, keep))


def test_compiled_and_eager_choose_the_same_tokens() -> None:
    x, setting = torch.randn(2, 64, 16), ToMA((8, 8), (4, 4), 3, 1000.0)
    compiled = torch.compile(setting.select)
    assert torch.equal(setting.select(x)[0], compiled(x)[0])


@pytest.mark.parametrize(("windows", "tokens", "keep"), [(2**14, 16, 8), (8, 300, 50)])
def test_choices_do_not_hang_on_the_rounding_of_sums(windows: int, tokens: int, keep: int) -> None:
    """Mutual neighbors have equal gains: in float32 they are equal as well."""
    x = torch.randn(windows, tokens, 24, generator=torch.Generator().manual_seed(0))
    similarity = cosine_similarity(x)
    exact = facility_location(similarity.double(), keep)
    assert torch.equal(facility_location(similarity, keep), exact)
    assert torch.equal(facility_location(similarity.mT, keep), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_selects_in_float32(dtype: torch.dtype) -> None:
    x, setting = torch.randn(2, 64, 32).to(dtype), ToMA((8, 8), (4, 4), 8, 1000.0)
    pattern = pattern_of(setting, x)
    assert torch.equal(pattern["idx"], setting.select(x.float())[0])
    assert pattern["merge"].dtype == pattern["unmerge"].dtype == dtype
    assert round_trip(setting, x).dtype == dtype


def test_batch_elements_have_their_own_patterns() -> None:
    x, setting = torch.randn(3, 96, 8), ToMA((8, 12), (4, 4), 5, 1000.0)
    (together,) = setting.select(x)
    for b in range(3):
        assert torch.equal(together[b : b + 1], setting.select(x[b : b + 1])[0])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("x", [torch.ones(1, 16, 4), torch.zeros(1, 16, 4)])
def test_equal_tokens_keep_distinct_destinations_in_index_order(x: Tensor) -> None:
    setting = ToMA((4, 4), (4, 4), 6, 1000.0)
    assert setting.select(x)[0].tolist() == [[[0, 1, 2, 3, 4, 5]]]
    assert torch.isfinite(round_trip(setting, x)).all()


@pytest.mark.parametrize("inverse", ["transpose", "pinv"])
def test_nan_gives_nan_and_stays_in_its_window(inverse: Any) -> None:
    x = torch.randn(1, 64, 8)
    x[0, 0] = float("nan")
    setting = ToMA((8, 8), (4, 4), 4, 10.0, inverse)
    out = to_windows(round_trip(setting, x), setting.grid, setting.tile)
    assert out[0, 0].isnan().all()
    assert out[0, 1:].isfinite().all()


def test_keeping_all_tokens_is_a_permutation() -> None:
    x, setting = torch.randn(2, 36, 16), ToMA((6, 6), (3, 3), 9, 1e6)
    (idx,) = setting.select(x)
    assert torch.equal(idx.sort(-1).values, torch.arange(9).expand(2, 4, 9))
    assert torch.allclose(round_trip(setting, x), x, atol=1e-5)


def test_pseudo_inverse_returns_merged_tokens_exactly() -> None:
    x, y = torch.randn(2, 64, 8), torch.randn(2, 32, 8)
    transpose = ToMA((8, 8), (4, 4), 8, 20.0)
    exact = replace(transpose, inverse="pinv")
    pattern, transposed = pattern_of(exact, x), pattern_of(transpose, x)
    assert torch.equal(pattern["merge"], transposed["merge"])
    assert torch.allclose(exact.merge(exact.unmerge(y, pattern), pattern), y, atol=1e-4)
    back = transpose.merge(transpose.unmerge(y, transposed), transposed)
    assert not torch.allclose(back, y, atol=1e-2)
    dense = torch.linalg.pinv(pattern["merge"].double())
    assert torch.allclose(pattern["unmerge"].double(), dense, atol=1e-4)


@pytest.mark.parametrize("scale", [20.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pseudo_inverse_of_well_conditioned_windows(scale: float, dtype: torch.dtype) -> None:
    merge = pattern_of(ToMA((8, 8), (4, 4), 8, scale), torch.randn(4, 64, 32))["merge"]
    exact = torch.linalg.pinv(merge.double())
    assert torch.linalg.cond(merge.double()).max() < 10
    tolerance = max(1e-5, torch.finfo(dtype).eps)
    assert torch.allclose(pseudo_inverse(merge, dtype).double(), exact, atol=tolerance)


@pytest.mark.parametrize("scale", [20.0, 1000.0])
@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pseudo_inverse_of_a_flat_window(scale: float, noise: float, dtype: torch.dtype) -> None:
    """Rows of the merge matrix are nearly equal: nothing is blown up, and other windows are as if
    it were not there."""
    x = torch.randn(2, 8, 8, 16)
    flat = x.clone()
    flat[:, :4, :4] = x[:, :1, :1] + noise * torch.randn(2, 4, 4, 16)
    x, flat = (each.flatten(1, 2).to(dtype) for each in (x, flat))
    setting = ToMA((8, 8), (4, 4), 8, scale, "pinv")
    pattern = pattern_of(setting, flat)
    assert all(part.isfinite().all() for part in pattern.values())
    merge = pattern_of(replace(setting, inverse="transpose"), flat.float())["merge"]
    gram = merge @ merge.mT
    ridge = ridge_of(dtype) * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    norm = torch.linalg.matrix_norm(pattern["unmerge"].float(), 2)
    assert (norm <= 0.8 / ridge.sqrt() * 1.02).all()
    back = round_trip(setting, flat).float()
    tolerance = 5e-3 if dtype is torch.float32 else 0.1
    windows = to_windows(back - flat.float(), setting.grid, setting.tile)[:, 0]
    assert windows.abs().max() < tolerance
    for name, part in pattern_of(setting, x).items():
        assert torch.equal(part[:, 1:], pattern[name][:, 1:])


def test_merge_rows_sum_to_one_and_unmerge_shares_sum_to_one() -> None:
    pattern = pattern_of(ToMA((8, 8), (8, 8), 16, 5.0), torch.randn(1, 64, 8))
    assert torch.allclose(pattern["merge"].sum(-1), torch.ones(1, 1, 16), atol=1e-6)
    assert torch.allclose(pattern["unmerge"].sum(-1), torch.ones(1, 1, 64), atol=1e-6)


def test_facility_location_beats_random_choices() -> None:
    x = torch.randn(1, 64, 4).cumsum(1)
    unit = torch.nn.functional.normalize(x, dim=-1)[0]
    similarity = unit @ unit.T
    (idx,) = ToMA((8, 8), (8, 8), 16, 1000.0).select(x)
    objective = similarity[idx[0, 0]].max(0).values.sum()
    for _ in range(20):
        other = torch.randperm(64)[:16]
        assert objective > similarity[other].max(0).values.sum()


@pytest.mark.parametrize(
    ("grid", "tile"), [((8, 12), (4, 3)), ((6, 10), (3, 10)), ((5, 7), (5, 7))]
)
def test_windows_round_trip(grid: tuple[int, int], tile: tuple[int, int]) -> None:
    x = torch.randn(2, grid[0] * grid[1], 3)
    cut = to_windows(x, grid, tile)
    assert cut.shape[1:3] == window_count(grid, tile)
    assert torch.equal(from_windows(cut, grid, tile), x)
    # the raster index of every slot finds the slot's token again
    slots = torch.arange(cut.shape[2]).expand(2, cut.shape[1], -1)
    found = x[:, token_index(slots, grid, tile)[0]]
    assert torch.equal(found, cut.flatten(1, 2))


@pytest.mark.parametrize("bucket", SDXL_BUCKETS)
@pytest.mark.parametrize("down", [16, 32])
def test_every_sdxl_bucket_has_a_dividing_tile(bucket: tuple[int, int], down: int) -> None:
    for height, width in (bucket, bucket[::-1]):
        grid = (height // down, width // down)
        h, w = resolve_tile(ToMAConfig(), grid, "")
        assert grid[0] % h == 0
        assert grid[1] % w == 0
        assert 8 <= h * w <= 32
        x = torch.randn(1, grid[0] * grid[1], 4)
        assert round_trip(ToMA(grid, (h, w), h * w // 2, 1000.0), x).shape == x.shape


def test_dividing_tile_prefers_squares_of_the_wanted_area() -> None:
    assert dividing_tile((64, 64), 64) == (8, 8)
    assert dividing_tile((32, 32), 16) == (4, 4)
    assert dividing_tile((26, 38), 64) == (26, 2)
    assert dividing_tile((7, 7), 64) == (7, 7)


@pytest.mark.parametrize(
    ("tile", "keep", "text"),
    [
        ((9, 4), 4, "larger than the token grid"),
        ((2, 4, 4), 4, "larger than the token grid"),
        ((3, 4), 4, "does not divide"),
        ((4, 4), 17, "1 to 16"),
        ((4, 4), 0, "1 to 16"),
    ],
)
def test_a_setting_refuses_what_does_not_fit(tile: tuple[int, ...], keep: int, text: str) -> None:
    with pytest.raises(TileError, match=text):
        ToMA((8, 8), tile, keep, 1000.0)

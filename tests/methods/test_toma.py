"""ToMA's pure functions: golden vectors of the published code, shapes, precision, ties, NaN."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from toma_fx.errors import TileError
from toma_fx.methods import toma
from toma_fx.methods.facility import facility_location
from toma_fx.methods.toma import ToMAConfig
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


def golden(case: str) -> tuple[Tensor, tuple[int, int], tuple[int, int], int, float]:
    height, width, tiles, ratio, scale = GOLDEN[f"{case}_meta"]
    side = int((height * width / tiles) ** 0.5)
    keep = side * side - int(side * side * ratio)
    x = torch.from_numpy(GOLDEN[f"{case}_x"])
    return x, (int(height), int(width)), (side, side), keep, float(scale)


def worst_regret(x: Tensor, grid: tuple[int, int], tile: tuple[int, int], idx: Tensor) -> float:
    """How far any choice lies below the best gain at its turn, replayed in float64."""
    unit = torch.nn.functional.normalize(to_windows(x, grid, tile).double(), dim=-1)
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
    x, grid, tile, keep, _ = golden(case)
    idx = toma.select(x, grid, tile, keep)
    published = torch.from_numpy(GOLDEN[f"{case}_idx"])
    assert idx.shape == published.shape
    assert worst_regret(x, grid, tile, idx) < 1e-6
    assert worst_regret(x, grid, tile, published) < 1e-6
    # wherever the two first part ways, the gains tie: up to there they are equal
    assert (idx == published).float().mean() > 0.8


@pytest.mark.parametrize("case", ["a", "c"])
def test_merge_and_unmerge_equal_published_code(case: str) -> None:
    x, grid, tile, _, scale = golden(case)
    idx = torch.from_numpy(GOLDEN[f"{case}_idx"])
    pattern = toma.weights(x, idx, grid, tile, scale)
    merged = toma.merge(x, pattern)
    np.testing.assert_allclose(merged, GOLDEN[f"{case}_merged"], atol=1e-6)
    np.testing.assert_allclose(toma.unmerge(merged, pattern), GOLDEN[f"{case}_unmerged"], atol=1e-6)


def test_eager_opaque_and_compiled_choose_the_same_tokens() -> None:
    x = torch.randn(2, 256, 16)
    eager = toma.select(x, (16, 16), (8, 8), 5)
    assert torch.equal(eager, toma.select(x, (16, 16), (8, 8), 5, opaque=True))
    compiled = torch.compile(lambda x: toma.select(x, (16, 16), (8, 8), 5))
    assert torch.equal(eager, compiled(x))


@pytest.mark.parametrize(("windows", "tokens", "keep"), [(2**14, 16, 8), (8, 300, 50)])
def test_choices_do_not_hang_on_the_rounding_of_sums(windows: int, tokens: int, keep: int) -> None:
    """Mutual neighbours have equal gains: in float32 they are equal as well."""
    x = torch.randn(windows, tokens, 24, generator=torch.Generator().manual_seed(0))
    similarity = toma.cosine_similarity(x)
    exact = facility_location(similarity.double(), keep)
    assert torch.equal(facility_location(similarity, keep), exact)
    assert torch.equal(facility_location(similarity.mT, keep), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_selects_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(2, 64, 32).to(dtype)
    idx = toma.select(x, (8, 8), (4, 4), 8)
    assert torch.equal(idx, toma.select(x.float(), (8, 8), (4, 4), 8))
    pattern = toma.weights(x, idx, (8, 8), (4, 4), 1000.0)
    assert pattern.merge.dtype == pattern.unmerge.dtype == dtype
    assert toma.unmerge(toma.merge(x, pattern), pattern).dtype == dtype


def test_batch_elements_have_their_own_patterns() -> None:
    x = torch.randn(3, 96, 8)
    together = toma.select(x, (8, 12), (4, 4), 5)
    for b in range(3):
        assert torch.equal(together[b : b + 1], toma.select(x[b : b + 1], (8, 12), (4, 4), 5))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("x", [torch.ones(1, 16, 4), torch.zeros(1, 16, 4)])
def test_equal_tokens_keep_distinct_destinations_in_index_order(x: Tensor) -> None:
    idx = toma.select(x, (4, 4), (4, 4), 6)
    assert idx.tolist() == [[[0, 1, 2, 3, 4, 5]]]
    pattern = toma.weights(x, idx, (4, 4), (4, 4), 1000.0)
    assert torch.isfinite(toma.unmerge(toma.merge(x, pattern), pattern)).all()


def test_nan_gives_nan_and_stays_in_its_window() -> None:
    x = torch.randn(1, 64, 8)
    x[0, 0] = float("nan")
    for unmerge in ("transpose", "pinv"):
        pattern = toma.weights(
            x, toma.select(x, (8, 8), (4, 4), 4), (8, 8), (4, 4), 10.0, unmerge=unmerge
        )
        out = to_windows(toma.unmerge(toma.merge(x, pattern), pattern), (8, 8), (4, 4))
        assert out[0, 0].isnan().all()
        assert out[0, 1:].isfinite().all()


def test_keeping_all_tokens_is_a_permutation() -> None:
    x = torch.randn(2, 36, 16)
    idx = toma.select(x, (6, 6), (3, 3), 9)
    assert torch.equal(idx.sort(-1).values, torch.arange(9).expand(2, 4, 9))
    pattern = toma.weights(x, idx, (6, 6), (3, 3), 1e6)
    assert torch.allclose(toma.unmerge(toma.merge(x, pattern), pattern), x, atol=1e-5)


def test_pseudo_inverse_returns_merged_tokens_exactly() -> None:
    x, y = torch.randn(2, 64, 8), torch.randn(2, 32, 8)
    idx = toma.select(x, (8, 8), (4, 4), 8)
    exact = toma.weights(x, idx, (8, 8), (4, 4), 20.0, unmerge="pinv")
    transposed = toma.weights(x, idx, (8, 8), (4, 4), 20.0)
    assert torch.allclose(toma.merge(toma.unmerge(y, exact), exact), y, atol=1e-4)
    assert not torch.allclose(toma.merge(toma.unmerge(y, transposed), transposed), y, atol=1e-2)
    dense = torch.linalg.pinv(exact.merge.double())
    assert torch.allclose(exact.unmerge.double(), dense, atol=1e-4)


def test_merge_rows_sum_to_one_and_unmerge_shares_sum_to_one() -> None:
    x = torch.randn(1, 64, 8)
    pattern = toma.weights(x, toma.select(x, (8, 8), (8, 8), 16), (8, 8), (8, 8), 5.0)
    assert torch.allclose(pattern.merge.sum(-1), torch.ones(1, 1, 16), atol=1e-6)
    assert torch.allclose(pattern.unmerge.sum(-1), torch.ones(1, 1, 64), atol=1e-6)


def test_facility_location_beats_random_choices() -> None:
    x = torch.randn(1, 64, 4).cumsum(1)
    unit = torch.nn.functional.normalize(x, dim=-1)[0]
    similarity = unit @ unit.T
    chosen = toma.select(x, (8, 8), (8, 8), 16)[0, 0]
    objective = similarity[chosen].max(0).values.sum()
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
        h, w = toma.resolve_tile(ToMAConfig(), grid, "")
        assert grid[0] % h == 0
        assert grid[1] % w == 0
        assert 8 <= h * w <= 32
        x = torch.randn(1, grid[0] * grid[1], 4)
        keep = h * w // 2
        pattern = toma.weights(x, toma.select(x, grid, (h, w), keep), grid, (h, w), 1000.0)
        assert toma.unmerge(toma.merge(x, pattern), pattern).shape == x.shape


def test_dividing_tile_prefers_squares_of_the_wanted_area() -> None:
    assert dividing_tile((64, 64), 64) == (8, 8)
    assert dividing_tile((32, 32), 16) == (4, 4)
    assert dividing_tile((26, 38), 64) == (26, 2)
    assert dividing_tile((7, 7), 64) == (7, 7)


@pytest.mark.parametrize(("tile", "keep"), [((9, 4), 4), ((3, 4), 4), ((4, 4), 17), ((4, 4), 0)])
def test_select_refuses_what_does_not_fit(tile: tuple[int, int], keep: int) -> None:
    with pytest.raises(TileError):
        toma.select(torch.randn(1, 64, 4), (8, 8), tile, keep)

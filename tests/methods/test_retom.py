"""ReToM against loops over windows and tokens, written from the description alone."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tracing import Program, check_onnx, check_traces
from toma_fx.errors import ConfigError, UnknownNameError
from toma_fx.methods import retom
from toma_fx.methods.retom import PartialReToM, ReToM, ReToMConfig
from toma_fx.methods.setting import Place

SHAPES = [
    ((4, 4), (2, 2)),
    ((4, 6), (2, 2)),
    ((6, 9), (3, 3)),
    ((8, 4), (2, 4)),
    ((6, 4), (6, 4)),
    ((3, 4), (1, 2)),
    ((2, 4, 6), (1, 2, 3)),
    ((2, 4, 4), (2, 2, 2)),
]


def windows_of(grid: tuple[int, ...], window: tuple[int, ...]) -> list[list[int]]:
    """Raster indices of the tokens of each window."""
    corners = itertools.product(*(range(0, g, w) for g, w in zip(grid, window, strict=True)))
    found = []
    for corner in corners:
        tokens = []
        for offset in itertools.product(*map(range, window)):
            index = 0
            for side, start, step in zip(grid, corner, offset, strict=True):
                index = index * side + start + step
            tokens.append(index)
        found.append(tokens)
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / (float(a.norm()) * float(b.norm()))


def reference(
    x: Tensor, grid: tuple[int, ...], window: tuple[int, ...], r: int | None, reduction: str
) -> tuple[dict[int, Tensor], Tensor]:
    """One image [N, C]: {token that stands for a merged one: its value}, and what is unmerged."""
    x, back, values, joins = x.double(), x.double().clone(), {}, []
    for tokens in windows_of(grid, window):
        scores = []
        for i in tokens:
            others = [cosine(x[i], x[j]) for j in tokens if j != i]
            scores.append(sum(others) / len(others))
        best = max(scores)
        # the two tokens of a pair are each other's only neighbors: the first represents
        chosen = next(i for i, s in zip(tokens, scores, strict=True) if s > best - 1e-9)
        joins += [(cosine(x[i], x[chosen]), i, chosen) for i in tokens if i != chosen]
        values[chosen] = x[chosen]
    joins.sort(reverse=True)
    merging = joins if r is None else joins[:r]
    for _, i, _ in joins[len(merging) :]:
        values[i] = x[i]
    for chosen in {into for *_, into in merging}:
        group = [chosen, *(i for _, i, into in merging if into == chosen)]
        if reduction == "mean":
            values[chosen] = sum(x[i] for i in group) / len(group)
        for i in group:
            back[i] = values[chosen]
    return values, back


def run(setting: ReToM, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merged tokens, where they lie, and what is unmerged."""
    pattern = dict(zip(setting.chosen, setting.select(x), strict=True))
    y = setting.merge(x, pattern)
    return y, setting.positions(pattern), setting.unmerge(y, pattern)


@pytest.mark.parametrize("reduction", ["representative", "mean"])
@pytest.mark.parametrize("share", [None, 0.1, 0.4])
@pytest.mark.parametrize(("grid", "window"), SHAPES)
def test_merges_as_described(
    grid: tuple[int, ...], window: tuple[int, ...], share: float | None, reduction: Any
) -> None:
    generator = torch.Generator().manual_seed(math.prod(grid))
    x = torch.randn(2, math.prod(grid), 6, generator=generator)
    r = None if share is None else max(1, int(share * math.prod(grid)))
    setting = (
        ReToM(grid, window, reduction) if r is None else PartialReToM(grid, window, reduction, r=r)
    )
    merged, places, back = run(setting, x)
    assert merged.shape == (2, setting.merged_count, 6)
    for image, y, place, unmerged in zip(x, merged, places, back, strict=True):
        values, expected = reference(image, grid, window, r, reduction)
        assert sorted(place.tolist()) == sorted(values)
        wanted = torch.stack([values[token] for token in place.tolist()])
        torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(unmerged.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [0.1, 0.4])
@pytest.mark.parametrize(("grid", "window"), SHAPES)
def test_the_least_similar_stay_in_order_and_join_themselves(
    grid: tuple[int, ...], window: tuple[int, ...], share: float
) -> None:
    """Many ties: the ranks are those of a sort of unique keys."""
    r = max(1, int(share * math.prod(grid)))
    setting = PartialReToM(grid, window, r=r)
    noise = torch.randn(2, math.prod(grid), 6, generator=torch.Generator().manual_seed(r))
    for x in (noise, noise.sign(), torch.ones_like(noise)):
        unit = setting._unit_vectors(x)
        (representatives,) = ReToM(grid, window).select(x)
        local = retom._representatives(unit)
        order = setting._keys(unit, local).argsort(-1)[:, : setting.staying]
        places, joins = setting.select(x)
        assert torch.equal(places, torch.cat([order, representatives], 1))
        turn = torch.arange(setting.staying).expand(2, -1)
        assert torch.equal(torch.take_along_dim(joins, order, 1), turn)


def test_another_window_gives_another_result() -> None:
    x = torch.randn(1, 64, 8)
    results = [
        run(ReToM((8, 8), window, reduction), x)[2]
        for window in [(2, 2), (2, 4), (4, 2), (4, 4)]
        for reduction in ("representative", "mean")
    ]
    assert not any(torch.allclose(a, b) for a, b in itertools.combinations(results, 2))


def test_the_most_similar_token_represents() -> None:
    # three tokens point up, one to the right: the one in the middle of the three represents
    angles = torch.tensor([[0.0, 0.2, 1.5, -0.2]])
    x = torch.stack([angles.cos(), angles.sin()], -1)
    # the outlier draws the mean direction to its side
    (places,) = ReToM((2, 2), (2, 2)).select(x)
    assert places.tolist() == [[1]]
    # lengths don't matter
    (places,) = ReToM((2, 2), (2, 2)).select(x * torch.tensor([9.0, 0.1, 3.0, 5.0])[:, None])
    assert places.tolist() == [[1]]


def test_similarity_to_itself_does_not_count() -> None:
    # two opposite tokens, one of zeros, one at right angles: the last two tie at 0
    x = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]])
    (places,) = ReToM((2, 2), (2, 2)).select(x)
    assert places.tolist() == [[2]]


def test_ties_go_to_the_first() -> None:
    x = torch.ones(1, 16, 4)
    (places,) = ReToM((4, 4), (2, 2)).select(x)
    assert places.tolist() == [[0, 2, 8, 10]]
    places, joins = PartialReToM((4, 4), (2, 2), r=5).select(x)
    # sources 1, 3, 4, 5, 6 merge; the rest stay, the last first
    assert places.tolist() == [[15, 14, 13, 12, 11, 9, 7, 0, 2, 8, 10]]
    assert joins.tolist() == [[7, 7, 8, 8, 7, 7, 8, 6, 9, 5, 10, 4, 3, 2, 1, 0]]


def test_unmerging_returns_tokens_that_stay_and_merging_again_changes_nothing() -> None:
    x = torch.randn(2, 48, 5)
    setting = PartialReToM((6, 8), (3, 2), r=20)
    pattern = dict(zip(setting.chosen, setting.select(x), strict=True))
    y = setting.merge(x, pattern)
    back = setting.unmerge(y, pattern)
    assert torch.equal(setting.merge(back, pattern), y)
    assert torch.equal((back == x).all(-1).sum(1), torch.tensor([28, 28]))


@pytest.mark.parametrize("setting", [ReToM((8, 6), (4, 2)), PartialReToM((8, 6), (4, 2), r=13)])
def test_batch_elements_do_not_see_each_other(setting: ReToM) -> None:
    x = torch.randn(3, 48, 5)
    for part, alone in zip(setting.select(x), setting.select(x[1:2]), strict=True):
        assert torch.equal(part[1:2], alone)


@pytest.mark.parametrize("reduction", ["representative", "mean"])
def test_half_precision_selects_in_float32(reduction: Any) -> None:
    x = torch.randn(1, 64, 16).half()
    setting = PartialReToM((8, 8), (2, 2), reduction, r=20)
    half, full = run(setting, x), run(setting, x.float())
    assert half[0].dtype == torch.float16
    assert torch.equal(half[1], full[1])
    torch.testing.assert_close(half[2].float(), full[2], rtol=2e-3, atol=2e-3)


# -- configuration --------------------------------------------------------------------------------


def at(level: int, grid: tuple[int, ...] = (16, 24)) -> Place:
    return Place(grid, grid, level, 2**level)


def test_windows_by_level() -> None:
    config = ReToMConfig(window=(4, 2, 1), reduction="mean")
    assert config.setting(at(0)) == ReToM((16, 24), (4, 4), "mean")
    assert config.setting(at(1)) == ReToM((16, 24), (2, 2), "mean")
    assert config.setting(at(2)) == "a window of one token at level 2 merges nothing"
    assert config.setting(at(5)) == "a window of one token at level 5 merges nothing"
    assert ReToMConfig().setting(at(3)) == ReToM((16, 24), (2, 2), "representative")


def test_windows_divide_the_grid() -> None:
    config = ReToMConfig(window=4)
    setting = config.setting(at(0, (26, 38)))
    assert isinstance(setting, ReToM)
    assert all(g % w == 0 for g, w in zip((26, 38), setting.window, strict=True))
    assert setting.window == (13, 1) or math.prod(setting.window) in range(8, 33)
    assert config.setting(at(0, (3, 9))) == "a 4x4 window does not fit a 3x9 grid"
    assert config.setting(at(0, (101, 101))) != config.setting(at(0, (100, 100)))
    reason = ReToMConfig().setting(at(0, (101, 103)))
    assert reason == "no window of about 2x2 divides a 101x103 grid"


def test_windows_stay_in_one_image_and_one_frame() -> None:
    two = ReToMConfig(window=3).setting(Place((18, 9), (9, 9)))
    assert two == ReToM((18, 9), (3, 3))
    low = ReToMConfig(window=2).setting(Place((6, 4), (3, 4)))
    assert isinstance(low, ReToM)
    assert 3 % low.window[0] == 0
    video = ReToMConfig(window=2).setting(at(0, (3, 8, 6)))
    assert video == ReToM((3, 8, 6), (1, 2, 2))


def test_ratio_counts_all_tokens() -> None:
    setting = ReToMConfig(ratio=0.5).setting(at(0))
    assert setting == PartialReToM((16, 24), (2, 2), r=192)
    assert isinstance(setting, ReToM)
    assert setting.merged_count == 192
    # 0.75 of the tokens are not representatives: then all merge
    assert ReToMConfig(ratio=0.75).setting(at(0)) == ReToM((16, 24), (2, 2))
    assert ReToMConfig(ratio=0.9).setting(at(0)) == ReToM((16, 24), (2, 2))
    reason = ReToMConfig(ratio=0.001).setting(at(0))
    assert reason == "ratio 0.001 merges no token of a 16x24 grid"


def test_config_says_what_is_off() -> None:
    assert not ReToMConfig().is_off
    assert ReToMConfig(window=1).is_off
    assert ReToMConfig(window=(1, 1)).is_off
    assert ReToMConfig(ratio=0).is_off
    assert not ReToMConfig(window=(1, 2)).is_off


def test_overrides_and_steps() -> None:
    config = ReToMConfig(
        select_at=(0, 10), overrides={"up.*": {"window": (4,), "reduction": "mean"}}
    )
    assert config.at("up.1").setting(at(0)) == ReToM((16, 24), (4, 4), "mean")
    assert [config.renewal(step) for step in (0, 1, 10)] == ["refresh", "reuse", "refresh"]


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"window": 0}, ConfigError, "at least 1"),
        ({"window": ()}, ConfigError, "one for every level"),
        ({"window": (2, 2.5)}, ConfigError, "whole number"),
        ({"window": "tile"}, ConfigError, "whole number"),
        ({"ratio": 1.0}, ConfigError, r"\[0, 1\)"),
        ({"ratio": "half"}, ConfigError, r"\[0, 1\)"),
        ({"reduction": "average"}, UnknownNameError, "representative or mean"),
        ({"overrides": {"x": {"window": 0}}}, ConfigError, "at least 1"),
        ({"overrides": {"x": {"windows": 2}}}, UnknownNameError, "nearest: window"),
    ],
)
def test_config_errors_say_what_is_right(
    fields: dict[str, Any], error: type[ConfigError], text: str
) -> None:
    with pytest.raises(error, match=text):
        ReToMConfig(**fields)


# -- as programs ----------------------------------------------------------------------------------

SETTINGS = [
    ReToM((4, 6), (2, 2)),
    ReToM((2, 4, 6), (1, 2, 3), "mean"),
    PartialReToM((6, 4), (3, 2), r=9),
    PartialReToM((4, 8), (2, 4), "mean", r=9),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_traces(setting: ReToM, dtype: torch.dtype) -> None:
    x = torch.randn(2, math.prod(setting.grid), 8, dtype=dtype)
    check_traces(Program(setting), x)


@pytest.mark.parametrize("setting", SETTINGS[1:], ids=str)
def test_exports_to_onnx(setting: ReToM, tmp_path: Any) -> None:
    x = torch.randn(2, math.prod(setting.grid), 8)
    check_onnx(Program(setting), x, tmp_path / "retom.onnx")

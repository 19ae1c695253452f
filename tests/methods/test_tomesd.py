"""ToMeSD: the published package's results, ties, pictures, precision, tracing and ONNX."""

from __future__ import annotations

import math
import operator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from toma_fx.errors import ConfigError, UnknownNameError
from toma_fx.methods.cells import Cells
from toma_fx.methods.setting import Place, Setting
from toma_fx.methods.tofu import ToFu
from toma_fx.methods.tomesd import ToMeSD, ToMeSDConfig

Grid = tuple[int, int]
CASES = [
    # grid, sy, sx: square, not square, remainders in one or both sides, cells that aren't square
    ((8, 8), 2, 2), ((6, 10), 2, 2), ((7, 9), 2, 2), ((8, 9), 2, 2), ((9, 9), 3, 3),
    ((8, 11), 3, 3), ((10, 7), 2, 3), ((9, 8), 3, 2), ((5, 12), 1, 4),
]  # fmt: skip


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The published matching, with its sorts made stable.

    It finds destinations by sorting a list of 0 and -1, so that their order among each other is
    whatever the sort does to equal numbers; a stable sort gives raster order.
    """
    merge = pytest.importorskip("tomesd.merge")
    argsort = Tensor.argsort
    stable = lambda self, dim=-1, descending=False: argsort(  # noqa: E731
        self, dim=dim, descending=descending, stable=True
    )
    monkeypatch.setattr(Tensor, "argsort", stable)
    return merge.bipartite_soft_matching_random2d


def noise(grid: Grid, *, batch: int = 2, channels: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, math.prod(grid), channels, generator=generator)


def smooth(grid: Grid, *, batch: int = 2, channels: int = 24, seed: int = 0) -> Tensor:
    """Low-frequency pictures with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.arange(side) / side * 2 * math.pi for side in grid)
    frequency = torch.rand(2, batch, channels, 1, 1, generator=generator) * 1.5
    phase = torch.rand(batch, channels, 1, 1, generator=generator) * 2 * math.pi
    x = torch.sin(frequency[0] * rows[:, None] + frequency[1] * columns + phase)
    x = x.flatten(2).transpose(1, 2) + 0.05 * noise(grid, batch=batch, channels=channels, seed=seed)
    return x.contiguous()


def kinds(grid: tuple[int, ...], *, batch: int = 2, channels: int = 4, seed: int = 0) -> Tensor:
    """Tokens of a few kinds whose similarities are exactly 0 or 1, full of ties."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(channels, (batch, math.prod(grid), 1), generator=generator)
    return (kind == torch.arange(channels)).float()


def capped(grid: tuple[int, ...], sy: int, sx: int, ratio: float) -> int:
    """Tokens that a ratio merges away."""
    tokens, cells = math.prod(grid), (grid[-2] // sy) * (grid[-1] // sx) * math.prod(grid[:-2])
    return min(int(tokens * ratio), tokens - cells)


def pattern(setting: Setting, x: Tensor) -> dict[str, Tensor]:
    return dict(zip(setting.parts, setting.select(x), strict=True))


# -- the published package ------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.75])
@pytest.mark.parametrize(("grid", "sy", "sx"), CASES)
@pytest.mark.parametrize("content", [noise, smooth])
def test_equals_the_package(
    package: Any, content: Any, grid: Grid, sy: int, sx: int, ratio: float
) -> None:
    x, other = content(grid), noise(grid, channels=5, seed=1)
    setting = ToMeSD(grid, Cells(1, *grid, sy, sx), capped(grid, sy, sx, ratio))
    ours = pattern(setting, x)
    merge, unmerge = package(
        x, grid[1], grid[0], sx, sy, int(math.prod(grid) * ratio), no_rand=True
    )
    for value in (x, other):
        merged = merge(value)
        assert merged.shape[1] == setting.merged_count < math.prod(grid)
        torch.testing.assert_close(setting.merge(value, ours), merged, atol=1e-6, rtol=0)
        assert torch.equal(setting.unmerge(merged, ours), unmerge(merged))
    number = torch.arange(setting.merged_count, dtype=torch.float64).view(1, -1, 1).expand(2, -1, 1)
    assert torch.equal(ours["joins"], unmerge(number.float()).long().squeeze(-1))


def test_equals_the_package_as_it_is() -> None:
    """Unmerged tokens don't depend on the order of the destinations."""
    package = pytest.importorskip("tomesd.merge").bipartite_soft_matching_random2d
    x = smooth((16, 12))
    merge, unmerge = package(x, 12, 16, 2, 2, 96, no_rand=True)
    setting = ToMeSD((16, 12), Cells(1, 16, 12, 2, 2), 96)
    ours = pattern(setting, x)
    round_trip = setting.unmerge(setting.merge(x, ours), ours)
    torch.testing.assert_close(round_trip, unmerge(merge(x)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("sy", "sx", "ratio"), [(2, 2, 0.4), (3, 2, 0.5), (2, 3, 0.5)])
def test_another_setting_differs_from_the_package(
    package: Any, sy: int, sx: int, ratio: float
) -> None:
    """The comparison above sees a wrong ratio, a wrong cell, and swapped sides."""
    grid, x = (12, 6), smooth((12, 6))
    merge, unmerge = package(x, 6, 12, 2, 2, 36, no_rand=True)
    if (sy, sx) == (2, 3):
        merge, unmerge = package(x, 6, 12, 2, 3, 36, no_rand=True)
    setting = ToMeSD(grid, Cells(1, *grid, sy, sx), capped(grid, sy, sx, ratio))
    ours = pattern(setting, x)
    round_trip = setting.unmerge(setting.merge(x, ours), ours)
    assert (round_trip - unmerge(merge(x))).abs().max() > 0.1


# -- what a pattern promises ----------------------------------------------------------------------


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize(("grid", "sy", "sx"), CASES)
def test_the_inverse_order_is_one(grid: Grid, sy: int, sx: int, random: bool) -> None:
    cells = Cells(3, *grid, sy, sx, random)
    device = torch.device("cpu")
    order, inverse = cells.order(device), cells.inverse_order(device).expand(3, -1)
    turns = torch.arange(cells.tokens).expand(3, -1)
    assert torch.equal(order.gather(1, inverse), turns)
    assert torch.equal(inverse.gather(1, order), turns)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize(("grid", "sy", "sx"), CASES)
def test_tokens_get_the_mean_of_their_group(grid: Grid, sy: int, sx: int, random: bool) -> None:
    setting = ToMeSD(grid, Cells(1, *grid, sy, sx, random, seed=3), capped(grid, sy, sx, 0.5))
    x = smooth(grid)
    parts = pattern(setting, x)
    places, joins = parts["places"], parts["joins"]
    assert places.shape == (2, setting.merged_count)
    assert joins.shape == (2, math.prod(grid))
    assert places.dtype == joins.dtype == torch.int64
    out = setting.unmerge(setting.merge(x, parts), parts)
    for b in range(2):
        assert places[b].unique().numel() == setting.merged_count
        assert torch.equal(joins[b, places[b]], torch.arange(setting.merged_count))
        for token in range(math.prod(grid)):
            group = x[b, joins[b] == joins[b, token]]
            torch.testing.assert_close(out[b, token], group.mean(0), atol=1e-6, rtol=0)
    assert torch.equal(setting.positions(parts), places)


def test_constant_tokens_stay_constant() -> None:
    setting = ToMeSD((9, 7), Cells(1, 9, 7, 2, 2), 30)
    x = torch.full((2, 63, 8), 0.7)
    parts = pattern(setting, x)
    out = setting.unmerge(setting.merge(x, parts), parts)
    torch.testing.assert_close(out, x, atol=1e-6, rtol=0)


def test_ties_go_to_the_lower_index() -> None:
    grid, r = (6, 6), 10
    setting = ToMeSD(grid, Cells(1, *grid, 2, 2), r)
    parts = pattern(setting, kinds(grid, channels=1))
    sources = [t for t in range(36) if (t // 6) % 2 or (t % 6) % 2]
    destinations = [t for t in range(36) if t not in sources]
    assert parts["places"].tolist() == [sources[r:] + destinations] * 2
    joins = parts["joins"][0]
    assert joins[sources[:r]].tolist() == [len(sources) - r] * r
    assert joins[sources[r:]].tolist() == list(range(len(sources) - r))


def test_all_sources_may_merge() -> None:
    setting = ToMeSD((4, 6), Cells(1, 4, 6, 2, 2), 18)
    x = noise((4, 6))
    parts = pattern(setting, x)
    assert parts["places"].shape == (2, 6)
    assert parts["places"].is_contiguous()
    assert setting.merge(x, parts).shape == (2, 6, 24)


@pytest.mark.parametrize("grid", [(3, 4, 6), (12, 6)])
def test_nothing_crosses_a_picture(grid: tuple[int, ...]) -> None:
    x = smooth((12, 6))
    for random in (False, True):
        setting = ToMeSD(grid, Cells(3, 4, 6, 2, 2, random), 36)
        parts = pattern(setting, x)
        token = torch.arange(72).expand(2, -1)
        home = parts["places"].gather(1, parts["joins"])
        assert torch.equal(home // 24, token // 24)
        assert (home != token).any()
    whole = ToMeSD((12, 6), Cells(1, 12, 6, 2, 2), 36)
    joins = pattern(whole, x)
    home = joins["places"].gather(1, joins["joins"])
    assert not torch.equal(home // 24, token // 24)


def test_pictures_match_as_if_alone() -> None:
    """With every source merged, pictures in one sequence are as pictures in a batch."""
    x = noise((5, 6), batch=3)
    one = ToMeSD((5, 6), Cells(1, 5, 6, 2, 2), 24)
    many = ToMeSD((3, 5, 6), Cells(3, 5, 6, 2, 2), 72)
    rows = x.reshape(1, 90, 24)
    alone = one.merge(x, pattern(one, x))
    torch.testing.assert_close(
        many.merge(rows, pattern(many, rows)).view(3, 6, 24), alone, atol=1e-6, rtol=0
    )


def test_zero_tokens_are_finite() -> None:
    x = noise((6, 6))
    x[:, [0, 3, 14]] = 0
    setting = ToMeSD((6, 6), Cells(1, 6, 6, 2, 2), 18)
    parts = pattern(setting, x)
    assert setting.merge(x, parts).isfinite().all()
    assert not {3} & set(parts["places"][0, 9 + 9 :].tolist())


# -- drawn destinations ---------------------------------------------------------------------------


def drawn(grid: Grid, sy: int, sx: int, seed: int) -> Tensor:
    """Which token of its cell each destination is, cell after cell."""
    setting = ToMeSD(grid, Cells(1, *grid, sy, sx, True, seed), 1)
    own = setting.cells.order(torch.device("cpu"))[0, setting.cells.sources :]
    row, column = own // grid[1], own % grid[1]
    cell = row // sy * (grid[1] // sx) + column // sx
    assert torch.equal(cell, torch.arange(setting.cells.destinations))
    return row % sy * sx + column % sx


@pytest.mark.parametrize(("grid", "sy", "sx"), [((64, 64), 2, 2), ((61, 65), 3, 2)])
def test_drawn_destinations_are_uniform(grid: Grid, sy: int, sx: int) -> None:
    area = sy * sx
    draws = torch.stack([drawn(grid, sy, sx, seed) for seed in range(12)])
    share = torch.bincount(draws.flatten(), minlength=area) / draws.numel()
    assert (share - 1 / area).abs().max() < 0.02
    neighbors = (draws[:, 1:] == draws[:, :-1]).float().mean()
    assert abs(neighbors - 1 / area) < 0.02
    for first, second in pairwise(draws):
        assert abs((first == second).float().mean() - 1 / area) < 0.08


def test_draws_hold_for_the_batch_and_differ_by_frame() -> None:
    setting = ToMeSD((2, 16, 16), Cells(2, 16, 16, 2, 2, True), 200)
    places = pattern(setting, noise((32, 16)))["places"][:, -128:]
    assert torch.equal(places[0], places[1])
    assert not torch.equal(places[0, :64] + 256, places[0, 64:])


# -- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    setting = ToMeSD((12, 12), Cells(1, 12, 12, 2, 2), 72)
    x = smooth((12, 12)).to(dtype)
    parts, exact = pattern(setting, x), pattern(setting, x.float())
    assert all(torch.equal(parts[name], exact[name]) for name in setting.parts)
    merged = setting.merge(x, parts)
    assert merged.dtype == dtype
    assert setting.unmerge(merged, parts).dtype == dtype
    wanted = setting.merge(x.double(), exact)
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(merged.double(), wanted, atol=tolerance, rtol=tolerance)


def test_large_groups_do_not_overflow() -> None:
    """1,200 tokens of 100 sum to more than float16 holds."""
    setting = ToMeSD((40, 40), Cells(1, 40, 40, 2, 2), 1200)
    x = 100 * kinds((40, 40), batch=1, channels=1).half()
    parts = pattern(setting, x)
    assert int((parts["joins"] == 0).sum()) > 1000
    assert torch.equal(setting.merge(x, parts), torch.full((1, 400, 1), 100.0).half())


def test_scaling_needs_no_exact_powers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 1 to hundreds of tokens, and a back end whose powers are off by a rounding."""
    setting = ToMeSD((24, 24), Cells(1, 24, 24, 2, 2), 400)
    x = kinds((24, 24), channels=8).half() * torch.linspace(1, 2, 576)[:, None].half()
    parts = pattern(setting, x)
    exact, power, used = setting.merge(x, parts), torch.pow, []

    def off(base: float, exponent: Tensor) -> Tensor:
        used.append(exponent)
        return power(base, exponent) * (1 + 2**-22)

    monkeypatch.setattr(torch, "pow", off)
    assert torch.equal(setting.merge(x, parts), exact)
    assert used


# -- configuration --------------------------------------------------------------------------------


def place(grid: tuple[int, ...], **fields: Any) -> Place:
    return Place(grid, fields.pop("unit", grid), **fields)


def test_configuration_gives_settings() -> None:
    config = ToMeSDConfig()
    assert config.setting(place((7, 9))) == ToMeSD((7, 9), Cells(1, 7, 9, 2, 2), 31)
    assert config.setting(place((7, 9))).describe() == "2x2 cells"
    video = ToMeSDConfig(ratio=0.25, sy=3, sx=1, random=True, seed=5)
    setting = video.setting(place((4, 6, 8)))
    assert setting == ToMeSD((4, 6, 8), Cells(4, 6, 8, 3, 1, True, 5), 48)
    assert setting.describe() == "3x1 cells, random"
    two = config.setting(place((16, 8), unit=(8, 8)))
    assert (two.cells.pictures, two.cells.height) == (2, 8)
    assert (two.feature, two.linear, two.dynamic) == ("stream", True, False)


def test_a_ratio_merges_sources_at_most() -> None:
    setting = ToMeSDConfig(ratio=0.9).setting(place((8, 8)))
    assert isinstance(setting, ToMeSD)
    assert (setting.r, setting.merged_count) == (48, 16)


@pytest.mark.parametrize(
    ("fields", "where", "reason"),
    [
        ({"ratio": 0}, place((8, 8)), "ratio is 0"),
        ({}, place((8, 8), downsample=2), "2 times coarser"),
        ({"sx": 9}, place((8, 8)), "2x9 cell is larger than the 8x8 grid"),
        ({"sy": 5}, place((8, 8), unit=(4, 8)), "5x2 cell is larger than the 4x8 grid"),
        ({"ratio": 0.01}, place((8, 8)), "merges no token"),
        ({"sx": 1, "sy": 1}, place((8, 8)), "merges no token"),
    ],
)
def test_reasons_to_leave_a_place_alone(fields: dict[str, Any], where: Place, reason: str) -> None:
    answer = ToMeSDConfig(**fields).setting(where)
    assert isinstance(answer, str)
    assert reason in answer


def test_coarser_grids_on_request() -> None:
    assert isinstance(ToMeSDConfig(max_downsample=2).setting(place((8, 8), downsample=2)), ToMeSD)


def test_off_and_overrides() -> None:
    assert ToMeSDConfig(ratio=0).is_off
    config = ToMeSDConfig(ratio=0, overrides={"down.*": {"ratio": 0.5, "sx": 4}})
    assert config.merges
    assert (config.at("down.0").ratio, config.at("down.0").sx) == (0.5, 4)
    with pytest.raises(UnknownNameError, match="seed"):
        ToMeSDConfig(overrides={"*": {"seed": 1}})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ratio", 1), ("ratio", -0.1), ("ratio", "0.5"), ("sx", 0), ("sy", 2.0), ("sx", True),
        ("max_downsample", 0), ("seed", -1), ("seed", 0.5), ("random", 1),
    ],
)  # fmt: skip
def test_values_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        ToMeSDConfig(**{field: value})


# -- tracing and export ---------------------------------------------------------------------------

STATIC = [
    ToMeSD((6, 8), Cells(1, 6, 8, 2, 2), 20),
    ToMeSD((6, 8), Cells(1, 6, 8, 2, 2), 36),
    ToMeSD((2, 5, 7), Cells(2, 5, 7, 2, 3, True, 1), 30),
    ToFu((7, 6), Cells(1, 7, 6, 2, 2), 20),
    ToFu((6, 8), Cells(1, 6, 8, 2, 2), 20, prune=True),
]


class RoundTrip(torch.nn.Module):
    """Everything that a setting does."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        parts = pattern(self.setting, x)
        merged = self.setting.merge(y, parts)
        return (
            *parts.values(),
            self.setting.positions(parts),
            merged,
            self.setting.unmerge(merged, parts),
        )


@pytest.mark.parametrize("setting", STATIC, ids=str)
def test_functions_trace_into_calls(setting: ToMeSD) -> None:
    with FakeTensorMode():
        x = torch.empty(2, math.prod(setting.grid), 8, dtype=torch.bfloat16)
        graph = make_fx(RoundTrip(setting), pre_dispatch=True)(x, x).graph
    assert {n.op for n in graph.nodes} == {"placeholder", "call_function", "output"}
    calls = [n.target for n in graph.nodes if n.op == "call_function"]
    calls = [target for target in calls if target is not operator.getitem]
    assert len(calls) > 20
    assert not any(target._schema.is_mutable for target in calls)
    unwanted = ("scatter", "one_hot", "searchsorted", "unique", "nonzero", "rand", "item", "sort")
    assert not [t for t in calls if any(word in str(t) for word in unwanted)]


@pytest.mark.parametrize("setting", STATIC[1:4], ids=str)
def test_onnx_gives_the_same(setting: ToMeSD, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    grid, module = setting.grid, RoundTrip(setting)
    y = noise((1, math.prod(grid)), channels=6, seed=1)
    x = noise((1, math.prod(grid)), channels=6)
    program = torch.export.export(module, (x, y), strict=False)
    path = tmp_path / "method.onnx"
    made = torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False)
    assert made is not None
    made.save(path)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    for features in (x, kinds(grid, channels=6)):
        given = dict(zip(names, (features.numpy(), y.numpy()), strict=True))
        for got, wanted in zip(session.run(None, given), module(features, y), strict=True):
            if wanted.dtype == torch.int64:
                assert np.array_equal(got, wanted.numpy())
            else:
                np.testing.assert_allclose(got, wanted.numpy(), atol=1e-6)

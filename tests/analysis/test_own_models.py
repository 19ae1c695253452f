"""Models outside diffusers: the plain vision transformers of examples/own_model.py, and the page
docs/own-models.md about them.

The example holds three kinds: pictures (the grid is seen), packed tokens (grid= tells it), and a
custom operator (tokenwise declares it). All have a token of the time in front, so that their
attention is joint, and two branches a block.
"""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toma_fx
from tests.denoisers import relative
from tests.examples import load_example
from tests.reference import Pattern, Settings, make_pattern
from tests.zoo.base import Case, lively, randn
from tests.zoo.check import check, permuted, trace
from toma_fx.analysis.rules.base import RULES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "own-models.md"
SMALL = {"min_tokens": 16, "tile": 4}
EXACT = 1e-5
ODD = [(9, 15), (13, 17)]
"""Token grids that no power of two divides; the sides of the second are prime."""


own = load_example("own_model")
RULE = own.OPERATOR.replace("::", ".")


@pytest.fixture(autouse=True)
def undeclared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example's operator is not declared before a test, nor after it."""
    monkeypatch.delitem(RULES, RULE, raising=False)
    yield
    RULES.pop(RULE, None)


def picture(grid: tuple[int, int], depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return lively(own.PictureDenoiser(grid, width=32, heads=2, depth=depth))


def packed(grid: tuple[int, ...], depth: int = 2, **extra: Any) -> nn.Module:
    torch.manual_seed(0)
    return lively(own.PackedDenoiser(grid, width=32, heads=2, depth=depth, **extra))


def picture_inputs(grid: tuple[int, int], seed: int = 1, timestep: float = 800) -> dict[str, Any]:
    sample = randn(seed, 2, 4, 2 * grid[0], 2 * grid[1])
    return {"sample": sample, "timestep": torch.full((2,), float(timestep))}


def packed_inputs(grid: tuple[int, ...], seed: int = 1, timestep: float = 800) -> dict[str, Any]:
    tokens = randn(seed, 2, math.prod(grid), 16)
    return {"hidden_states": tokens, "timestep": torch.full((2,), float(timestep))}


KINDS = {"picture": (picture, picture_inputs), "packed": (packed, packed_inputs)}


def options_of(kind: str, grid: tuple[int, int], **extra: Any) -> dict[str, Any]:
    given = {} if kind == "picture" else {"grid": grid}
    return {**SMALL, **given, **extra}


# -- what merges ----------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ODD)
@pytest.mark.parametrize("kind", KINDS)
def test_both_pass_the_oracles_of_the_matrix(kind: str, grid: tuple[int, int]) -> None:
    """Counts, equality with merging off, permuted tokens, and that merging changes something."""
    build, inputs = KINDS[kind]
    tile = {"tile": None, "min_tokens": 16}
    case = Case(
        name=f"{kind}-{grid}",
        title=kind,
        build=lambda: build(grid),
        inputs=lambda seed: inputs(grid, seed),
        grids=(grid,),
        sites={"joint": 2},
        attention=2,
        mlp=2,
        why="two blocks of attention among time and image tokens, and MLP",
        config=options_of(kind, grid, **tile),
    )
    found = check(case)
    assert found.segments == 1
    assert found.permuted is not None


@pytest.mark.parametrize(("kind", "depth"), [("picture", 1), ("packed", 3)])
def test_every_block_merges_its_attention_and_its_mlp(kind: str, depth: int) -> None:
    build, inputs = KINDS[kind]
    grid = (9, 15)
    report = toma_fx.explain(build(grid, depth), inputs(grid), **options_of(kind, grid))
    names = [f"blocks.{i}.{part}" for i in range(depth) for part in ("attention", "mlp")]
    assert [row.module for row in report.rows] == names
    assert [row.kind for row in report.rows] == ["attention", "mlp"] * depth
    assert {(row.grid, row.window, row.tokens) for row in report.rows} == {(grid, "3x5", 135)}
    assert report.rejections == ()


def test_packed_videos() -> None:
    grid = (3, 5, 7)
    options = {"min_tokens": 16, "grid": grid}
    report = toma_fx.explain(packed(grid), packed_inputs(grid), **options)
    assert len(report.rows) == 4
    assert {(row.grid, row.window[:2]) for row in report.rows} == {(grid, "1x")}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merging_off_is_bit_equal(kind: str) -> None:
    build, inputs = KINDS[kind]
    grid = (9, 15)
    model = build(grid)
    denoiser = toma_fx.optimize(model, toma=False, **options_of(kind, grid))
    for step in range(3):
        call = inputs(grid, seed=step, timestep=900 - step)
        assert torch.equal(denoiser(**call), model(**call))
    assert toma_fx.summary(denoiser).steps == {"plain": 3}


# -- what merging computes ------------------------------------------------------------------------


class MergedBlocks(nn.Module):
    """Stands for a model's blocks and merges around them with dense matrices.

    The first token is the time's; `settings.refresh` says whether to select anew.
    """

    def __init__(self, blocks: nn.ModuleList, grid: tuple[int, int], settings: Settings) -> None:
        super().__init__()
        self.blocks, self.grid, self.settings = blocks, grid, settings
        self.pattern: Pattern | None = None

    def forward(self, x: Tensor, moment: Tensor) -> Tensor:
        if self.settings.refresh:
            self.pattern = None
        if self.settings.scope == "stack":
            return self.around(x, moment, self.blocks)
        for block in self.blocks:
            if self.settings.scope == "block":
                x = self.around(x, moment, [block])
            else:
                x = self.sublayers(x, moment, block)
        return x

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor, Pattern]:
        time, image = x[:, :1], x[:, 1:]
        if self.pattern is None:
            self.pattern = make_pattern(image, [self.grid], self.settings)
        return time, image, self.pattern

    def around(self, x: Tensor, moment: Tensor, blocks: Any) -> Tensor:
        time, image, p = self.apart(x)
        entered = p.merge @ image
        y = torch.cat([time, entered], 1)
        for block in blocks:
            y = block(y, moment)
        return torch.cat([y[:, :1], image + p.unmerge @ (y[:, 1:] - entered)], 1)

    def sublayers(self, x: Tensor, moment: Tensor, block: Any) -> Tensor:
        scale1, shift1, scale2, shift2 = block.modulation(F.silu(moment))[:, None].chunk(4, -1)
        for norm, scale, shift, layer in (
            (block.norm1, scale1, shift1, block.attention),
            (block.norm2, scale2, shift2, block.mlp),
        ):
            time, image, p = self.apart(norm(x) * (1 + scale) + shift)
            y = layer(torch.cat([time, p.merge @ image], 1))
            x = x + torch.cat([y[:, :1], p.unmerge @ y[:, 1:]], 1)
        return x


def reference(model: nn.Module, grid: tuple[int, int], settings: Settings) -> nn.Module:
    """A copy of a model whose blocks merge, written in plain PyTorch."""
    model = copy.deepcopy(model)
    model.blocks = nn.ModuleList([MergedBlocks(model.blocks, grid, settings)])
    return model


@pytest.mark.parametrize("scope", ["sublayer", "block", "stack"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merged_outputs_equal_an_independent_implementation(kind: str, scope: str) -> None:
    build, inputs = KINDS[kind]
    grid = (9, 15)
    model = build(grid)
    settings = Settings(tile=(3, 5), keep=8, scope=scope)
    expect = reference(model, grid, settings)
    denoiser = toma_fx.optimize(model, **options_of(kind, grid, scope=scope))
    for step in range(3):
        call = inputs(grid, seed=step, timestep=900 - step)
        settings.refresh = step == 0
        expected, got = expect(**call), denoiser(**call)
        assert relative(got, expected) < EXACT, f"step {step}"
        assert relative(got, model(**call)) > 1e-2
    assert toma_fx.summary(denoiser).steps == {"refresh": 1, "reuse": 2}


# -- grids ----------------------------------------------------------------------------------------


def test_packed_tokens_without_a_grid_are_refused_with_a_hint() -> None:
    model, call = packed((9, 15)), packed_inputs((9, 15))
    with pytest.raises(toma_fx.NoMergeSites) as caught:
        toma_fx.explain(model, call, **SMALL)
    assert "grid=" in caught.value.hint
    assert any("its queries carry no image tokens" in r for r in caught.value.reasons)
    denoiser = toma_fx.optimize(model, **SMALL)
    with pytest.raises(toma_fx.NoMergeSites):
        denoiser(**call)


@pytest.mark.parametrize(
    "wrong", [(9, 14), (15, 15), (1, 134), (9, 15, 2), (0, 15), (9,), (9.0, 15)]
)
def test_a_wrong_grid_is_refused(wrong: Any) -> None:
    with pytest.raises((toma_fx.NoMergeSites, toma_fx.ConfigError)) as caught:
        toma_fx.explain(packed((9, 15)), packed_inputs((9, 15)), grid=wrong, **SMALL)
    assert "grid" in str(caught.value)


def test_a_given_grid_holds_for_every_call() -> None:
    model = packed((9, 15))
    model.position = nn.Parameter(model.position[:, :1], requires_grad=False)
    denoiser = toma_fx.optimize(model, grid=(9, 15), **SMALL)
    denoiser(**packed_inputs((9, 15)))
    with pytest.raises(toma_fx.NoMergeSites):
        denoiser(**packed_inputs((9, 14)))


class Sized(own.PackedDenoiser):
    def forward(self, hidden_states: Tensor, timestep: Tensor, height: int, width: int) -> Tensor:
        return super().forward(hidden_states, timestep)


class Listed(own.PackedDenoiser):
    def forward(self, hidden_states: Tensor, timestep: Tensor, shapes: list[Any]) -> Tensor:
        return super().forward(hidden_states, timestep)


class Placed(own.PackedDenoiser):
    def forward(self, hidden_states: Tensor, timestep: Tensor, places: Tensor) -> Tensor:
        return super().forward(hidden_states, timestep)


def places(height: int, width: int) -> Tensor:
    """[H*W, 2] row and column of each token."""
    return torch.cartesian_prod(torch.arange(float(height)), torch.arange(float(width)))


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        (Sized, {"height": 9, "width": 15}),
        (Listed, {"shapes": [(9, 15)]}),
        (Listed, {"shapes": [(1, 9, 15)]}),
        (Placed, {"places": places(9, 15)}),
    ],
)
def test_sizes_and_positions_among_the_arguments_tell_the_grid(kind: Any, extra: Any) -> None:
    model = lively(kind((9, 15), width=32, depth=2))
    report = toma_fx.explain(model, {**packed_inputs((9, 15)), **extra}, **SMALL)
    assert {row.grid for row in report.rows} == {(9, 15)}
    assert len(report.rows) == 4


class Video(own.PackedDenoiser):
    """Frames lie before the channels, or behind them."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        if sample.shape[2] == 16:
            sample = sample.transpose(1, 2)
        return super().forward(sample.flatten(2).transpose(1, 2), timestep)


@pytest.mark.parametrize("shape", [(2, 16, 3, 5, 7), (2, 3, 16, 5, 7)])
def test_folded_videos(shape: tuple[int, ...]) -> None:
    model = lively(Video((3, 5, 7), width=32, depth=2))
    call = {"sample": randn(1, *shape), "timestep": torch.full((2,), 800.0)}
    report = toma_fx.explain(model, call, min_tokens=16)
    assert [row.grid for row in report.rows] == [(3, 5, 7)] * 4


# -- operators of one's own -----------------------------------------------------------------------


@torch.no_grad()
def test_an_operator_of_ones_own_is_named_until_it_is_declared() -> None:
    grid = (9, 15)
    model, call = packed(grid, fused=True), packed_inputs(grid)
    with pytest.raises(toma_fx.NoMergeSites) as caught:
        toma_fx.explain(model, call, grid=grid, **SMALL)
    for i in range(2):
        reason = next(r for r in caught.value.reasons if r.startswith(f"blocks.{i}.attention"))
        assert f"no transfer rule for {RULE}" in reason
    toma_fx.tokenwise(own.OPERATOR)
    report = toma_fx.explain(model, call, grid=grid, **SMALL)
    assert [row.kind for row in report.rows] == ["attention", "mlp"] * 2
    plain = packed(grid)
    plain.load_state_dict(model.state_dict())
    got = toma_fx.optimize(model, grid=grid, **SMALL)(**call)
    expected = toma_fx.optimize(plain, grid=grid, **SMALL)(**call)
    assert relative(got, expected) < EXACT
    assert relative(got, model(**call)) > 1e-2


def test_operators_that_do_not_exist_or_have_a_rule() -> None:
    with pytest.raises(toma_fx.UnknownNameError):
        toma_fx.tokenwise("own_model::lineer")
    with pytest.raises(toma_fx.ConfigError, match="rule already"):
        toma_fx.tokenwise(torch.ops.aten.scaled_dot_product_attention)


# -- what is refused ------------------------------------------------------------------------------


class Causal(own.Attention):
    def forward(self, x: Tensor) -> Tensor:
        heads = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, 2))
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Windowed(own.Attention):
    """Attention inside windows of 3x5 tokens; the time's token by itself."""

    def forward(self, x: Tensor) -> Tensor:
        cut = x[:, 1:].unflatten(1, (3, 3, 3, 5)).transpose(2, 3)
        y = super().forward(cut.reshape(-1, 15, x.shape[-1])).view_as(cut).transpose(2, 3)
        return torch.cat([self.out(x[:, :1]), y.flatten(1, 4)], 1)


class Written(own.Attention):
    """Attention as two products around a softmax."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, 2))
        y = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, -1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Library(own.Attention):
    """PyTorch's own module."""

    def __init__(self, width: int, heads: int, *, fused: bool) -> None:
        super().__init__(width, heads, fused=fused)
        self.module = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, x, x, need_weights=False)[0]


class Summed(own.Attention):
    """Attention by torch.einsum."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in self.qkv(x).chunk(3, 2))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        return self.out(torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(2))


def with_attention(kind: type[nn.Module]) -> nn.Module:
    model = own.PackedDenoiser((9, 15), width=32, heads=2, depth=2)
    for block in model.blocks:
        block.attention = kind(32, 2, fused=False)
    return lively(model)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Causal, "causal attention depends on the order of the tokens"),
        (Windowed, "a reshape that cuts the token axis"),
    ],
)
def test_attention_that_can_not_merge_is_left_alone_and_the_mlps_merge(
    kind: Any, reason: str
) -> None:
    """The page lists these. A rule that comes to understand one takes it off here and there."""
    model, call = with_attention(kind), packed_inputs((9, 15))
    report = toma_fx.explain(model, call, grid=(9, 15), **SMALL)
    assert [row.module for row in report.rows] == ["blocks.0.mlp", "blocks.1.mlp"]
    assert sum(reason in rejection.reason for rejection in report.rejections) == 2
    assert reason in PAGE.read_text()


@torch.no_grad()
def test_pytorchs_own_attention_module_merges() -> None:
    model, call = with_attention(Library), packed_inputs((9, 15))
    report = toma_fx.explain(model, call, grid=(9, 15), **SMALL)
    assert [row.module for row in report.rows] == [
        f"blocks.{i}.{part}" for i in range(2) for part in ("attention.module", "mlp")
    ]
    case = Case("library", "", lambda: model, lambda _: call, config={"grid": (9, 15)})
    traced = trace(case, exact=False)
    for scope in ("sublayer", "stack"):
        permuted(traced, scope)


@pytest.mark.parametrize("kind", [Written, Summed])
@torch.no_grad()
def test_attention_written_out_merges_as_the_fused_operator_does(kind: Any) -> None:
    fused, call = with_attention(own.Attention), packed_inputs((9, 15))
    written = with_attention(kind)
    written.load_state_dict(fused.state_dict())
    outputs = [toma_fx.optimize(m, grid=(9, 15), **SMALL)(**call) for m in (fused, written)]
    assert relative(outputs[1], outputs[0]) < EXACT
    assert relative(outputs[1], written(**call)) > 1e-2


class ChannelsLast(own.PackedDenoiser):
    """Takes pictures [batch, height, width, channels]."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(sample.flatten(1, 2), timestep)


@torch.no_grad()
def test_pictures_with_channels_last_merge() -> None:
    model = lively(ChannelsLast((9, 15), width=32, depth=2))

    def call(seed: int) -> dict[str, Tensor]:
        return {"sample": randn(seed, 2, 9, 15, 16), "timestep": torch.full((2,), 800.0)}

    traced = trace(Case("channels last", "", lambda: model, call))
    plan = traced.plan(scope="sublayer")
    assert [s.image.grid for s in plan.segments] == [(9, 15)] * 4
    for scope in ("sublayer", "stack"):
        permuted(traced, scope)


@pytest.mark.parametrize("layout", ["no batch", "unfold", "one row"])
def test_layouts_that_are_not_understood_are_refused(layout: str) -> None:
    """The page says so; none of them is passed over in silence."""

    class Model(own.PackedDenoiser):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            if layout == "no batch":
                tokens = sample[None]
            elif layout == "unfold":
                tokens = F.unfold(sample, 2, stride=2).transpose(1, 2)
            else:
                tokens = sample.flatten(2, 3).transpose(1, 2)
            return super().forward(tokens, timestep[: len(tokens)])

    shapes = {
        "no batch": (135, 16),
        "unfold": (2, 4, 18, 30),
        "one row": (2, 16, 1, 135),
    }
    model = lively(Model((9, 15), width=32, depth=2))
    call = {"sample": randn(1, *shapes[layout]), "timestep": torch.full((2,), 800.0)}
    model(**call)
    reason = "no transfer rule for aten.im2col" if layout == "unfold" else "carry no image tokens"
    with pytest.raises(toma_fx.NoMergeSites, match=reason):
        toma_fx.explain(model, call, grid=(9, 15), **SMALL)


class Unlike(own.PackedDenoiser):
    """Its Python looks at values."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(hidden_states if timestep[0] > 0 else -hidden_states, timestep)


def test_python_that_depends_on_values_is_refused_with_its_line() -> None:
    with pytest.raises(toma_fx.CaptureError, match=r"timestep\[0\] > 0"):
        toma_fx.explain(lively(Unlike((9, 15))), packed_inputs((9, 15)), grid=(9, 15), **SMALL)


# -- steps ----------------------------------------------------------------------------------------


class Renamed(own.PackedDenoiser):
    def forward(self, hidden_states: Tensor, when: Tensor) -> Tensor:
        return super().forward(hidden_states, when)


@torch.no_grad()
def test_the_timestep_tells_generations_and_the_state_tells_steps() -> None:
    tokens = packed_inputs((9, 15))["hidden_states"]
    options = {"grid": (9, 15), **SMALL}
    named = toma_fx.optimize(packed((9, 15), 1), **options)
    for _ in range(2):
        for t in (900.0, 800.0, 700.0):
            named(tokens, torch.tensor([t, t]))
    assert toma_fx.summary(named).steps == {"refresh": 2, "reuse": 4}
    renamed = toma_fx.optimize(lively(Renamed((9, 15), width=32, depth=1)), **options)
    for t in (900.0, 800.0, 700.0):
        renamed(tokens, torch.tensor([t, t]))
    assert toma_fx.summary(renamed).steps == {"refresh": 1, "reuse": 2}, "found by its sine"
    state = toma_fx.State()
    for t in (900.0, 800.0, 700.0):
        _, state = renamed.step({"hidden_states": tokens, "when": torch.tensor([t, t])}, state)
    assert toma_fx.summary(renamed).steps == {"refresh": 2, "reuse": 4}


# -- the script and the page ----------------------------------------------------------------------


def test_the_example_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which has imported everything already."""
    small = ["--grid", "15", "21", "--depth", "1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["own_model.py", *small])
    own.main()
    printed = capsys.readouterr().out
    assert printed.count("a step takes") == 3
    lines = re.findall(r"blocks\.0\.attention +1x +15x21: 315 -> 168", printed)
    assert len(lines) == 3
    assert f"no transfer rule for {RULE}" in printed


def test_every_block_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """In order and in one name space, as a reader would type them."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 7
    space: dict[str, Any] = {}
    with torch.no_grad():
        for block in blocks:
            exec(block, space)
    printed = capsys.readouterr().out
    assert "give grid=(H, W)" in printed
    assert f"no transfer rule for {RULE}" in printed
    assert toma_fx.summary(space["denoiser"]).steps == {"refresh": 5, "reuse": 16}


def test_numbers_of_the_page() -> None:
    """What the page says about windows and minimum sizes."""
    text = re.sub(r"\s+", " ", PAGE.read_text())
    for grid, said in (((21, 35), "4x4 becomes 3x5"), ((31, 37), "one column of 31")):
        assert said in text
        report = toma_fx.explain(packed(grid, 1), packed_inputs(grid), grid=grid, tile=4)
        assert {row.window for row in report.rows} == {"3x5" if grid == (21, 35) else "31x1"}
    assert "`min_tokens` tokens (256)" in text
    assert toma_fx.ToMAConfig().min_tokens == 256
    assert "`destinations_every` steps (5)" in text
    assert toma_fx.ToMAConfig().destinations_every == 5

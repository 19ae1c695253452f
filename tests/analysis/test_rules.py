"""Transfer rules and what the analysis makes of them, on modules of a few lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import denoisers
from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.factors import Segment
from toma_fx.analysis.facts import Analysis, Branch
from toma_fx.analysis.labels import axis, plain, tokens, tokens_of
from toma_fx.analysis.propagate import analyze
from toma_fx.analysis.rules import base
from toma_fx.analysis.rules.views import regroup
from toma_fx.capture.grids import Raster, find_raster
from toma_fx.capture.model import Captured, capture

GRID = (4, 6)
N, C, TEXT = 24, 8, 5


# -- regroup --------------------------------------------------------------------------------------


@st.composite
def factorizations(draw: Callable[..., Any]) -> tuple[list[int], list[int]]:
    """Two shapes of equally many elements, with sizes of 1 in between."""

    def shape(factors: list[int]) -> list[int]:
        out = [1]
        for factor in factors:
            if draw(st.booleans()):
                out.append(1)
            out[-1] *= factor
            if draw(st.booleans()):
                out.append(1)
        return out

    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3, 4, 5]), min_size=1, max_size=6))
    # the same prime runs in the same order or shuffled: both happen in models
    return shape(factors), shape(draw(st.permutations(factors)) if draw(st.booleans()) else factors)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(factorizations())
def test_groups_partition_both_shapes(shapes: tuple[list[int], list[int]]) -> None:
    source, target = shapes
    groups = regroup(source, target)
    assert [d for ins, _ in groups for d in ins] == list(range(len(source)))
    assert [d for _, outs in groups for d in outs] == list(range(len(target)))
    for ins, outs in groups:
        assert prod(source[d] for d in ins) == prod(target[d] for d in outs)
    pairs = [(ins[0], outs[0]) for ins, outs in groups if len(ins) == len(outs) == 1]
    assert pairs == sorted(pairs)
    assert all(source[a] == target[b] for a, b in pairs)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(factorizations())
def test_groups_are_finest(shapes: tuple[list[int], list[int]]) -> None:
    """No group of a reshape can be cut into two that keep their elements together."""
    source, target = shapes
    for ins, outs in regroup(source, target):
        for i in range(1, len(ins)):
            for j in range(1, len(outs)):
                left = prod(source[d] for d in ins[:i]), prod(target[d] for d in outs[:j])
                assert left[0] != left[1]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(factorizations())
def test_a_dimension_of_a_pair_is_the_same_index(shapes: tuple[list[int], list[int]]) -> None:
    """An index along one dimension of a 1:1 group is the index along the other."""
    source, target = shapes
    for ins, outs in regroup(source, target):
        if len(ins) == len(outs) == 1:
            size, (a,), (b,) = source[ins[0]], ins, outs
            column = torch.arange(size).view([size if d == a else 1 for d in range(len(source))])
            expected = torch.arange(size).view([size if d == b else 1 for d in range(len(target))])
            assert torch.equal(column.expand(source).reshape(target), expected.expand(target))


@pytest.mark.parametrize(
    ("source", "target", "groups"),
    [
        ([2, 256, 64], [2, 256, 4, 16], [((0,), (0,)), ((1,), (1,)), ((2,), (2, 3))]),
        ([2, 4, 4], [2, 16], [((0,), (0,)), ((1, 2), (1,))]),
        ([4, 4, 4], [4, 4, 2, 2], [((0,), (0,)), ((1,), (1,)), ((2,), (2, 3))]),
        ([1, 16, 8], [16, 8], [((0,), ()), ((1,), (0,)), ((2,), (1,))]),
        ([2, 8], [2, 1, 8], [((0,), (0,)), ((), (1,)), ((1,), (2,))]),
        ([2, 3], [3, 2], [((0, 1), (0, 1))]),
        ([1, 1], [1], [((0,), (0,)), ((1,), ())]),
    ],
)
def test_regroup_examples(source: list[int], target: list[int], groups: Any) -> None:
    assert regroup(source, target) == groups


# -- tiny modules ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A captured module and its analysis."""

    captured: Captured
    analysis: Analysis
    flow: Flow

    def only(self, op: str) -> str:
        """Name of the only node of an op."""
        (name,) = [n for n, found in self.flow.ops.items() if found == f"aten.{op}"]
        return name

    def reasons(self) -> list[str]:
        """Why token flow ended, or can't be merged across."""
        refusals = (*self.analysis.refusals.values(), *self.flow.needs_all_tokens.values())
        return [str(refusal) for refusal in refusals]

    def kinds(self) -> list[str]:
        return [site.kind for site in self.analysis.sites]

    def tokens(self, op: str) -> list[str]:
        """Names of the segments in the output of the only node of an op."""
        label = tokens_of(self.flow.layout(self.only(op)))
        return [s.name for s in label.segments] if label else []

    def branches(self) -> list[Branch]:
        return [branch for stream in self.analysis.streams for branch in stream.branches]


class Tiny(nn.Module):
    """Linear maps, and a forward given as a function."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(C, C) for _ in range(4))
        self.over_tokens, self.conv = nn.Linear(N, N), nn.Conv2d(3, C, 1)
        self.norm, self.run = nn.LayerNorm(C), run

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], 2, C // 2).transpose(1, 2)

    def attention(self, x: Tensor, source: Tensor, **options: Any) -> Tensor:
        q, k, v = self.heads(self.a(x)), self.heads(self.b(source)), self.heads(self.c(source))
        out = F.scaled_dot_product_attention(q, k, v, **options)
        return self.d(out.transpose(1, 2).flatten(2))

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.run(self, **inputs)


def find(run: Callable[..., Tensor], grid: Any = GRID, **inputs: Tensor) -> Found:
    torch.manual_seed(0)
    model = Tiny(run).eval().requires_grad_(False)
    captured = capture(model, (), inputs or {"x": torch.randn(2, N, C)})
    return Found(captured, *analyze(captured, grid))


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, N, C)


def text() -> Tensor:
    return torch.randn(2, TEXT, C)


def residual(inner: Callable[[Tiny, Tensor], Tensor]) -> Callable[[Tiny, Tensor], Tensor]:
    """A branch to test, then an MLP that merges whatever happens in the branch."""

    def run(m: Tiny, x: Tensor) -> Tensor:
        x = x + inner(m, m.norm(x))
        return x + m.b(F.gelu(m.a(m.norm(x))))

    return run


# -- where tokens come from -----------------------------------------------------------------------


def test_packed_input_with_a_given_grid() -> None:
    found = find(lambda m, x: m.a(x))
    segment = Segment("x", N, GRID, "sequence", (GRID[0],))
    layout = (axis("batch", 2), tokens(segment), plain(C))
    assert found.analysis.facts["x"] == layout
    assert found.analysis.facts[found.only("linear")] == layout


def test_packed_input_without_a_grid_has_no_image() -> None:
    found = find(residual(lambda m, n: m.attention(n, n)), grid=None)
    assert found.kinds() == ["text"]
    assert found.analysis.streams == ()


@pytest.mark.parametrize("rows", [1, 2])
def test_grid_from_position_ids(rows: int) -> None:
    ids = denoisers.ids(*GRID) if rows == 1 else denoisers.ids(*GRID)[None]
    found = find(lambda m, x, ids: m.attention(x, x), grid=None, x=image(), ids=ids)
    assert found.analysis.rasters == {"x": Raster((GRID[0],), GRID[1])}
    assert found.kinds() == ["self"]


def test_ids_that_line_up_tell_which_of_two_equal_inputs_is_the_image() -> None:
    inputs = {"x": image(), "y": image(), "ids": denoisers.ids(*GRID)}
    unused = find(lambda m, ids, x, y: m.attention(x, y), grid=None, **inputs)
    assert unused.analysis.rasters == {}
    lined_up = find(lambda m, ids, x, y: m.attention(x * ids[:, :1], y), grid=None, **inputs)
    assert lined_up.analysis.rasters == {"x": Raster((GRID[0],), GRID[1])}
    assert lined_up.kinds() == ["cross"]


def test_shuffled_ids_are_no_grid() -> None:
    ids = denoisers.ids(*GRID)[torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    found = find(lambda m, x, ids: m.attention(x, x), grid=None, x=image(), ids=ids)
    assert found.analysis.rasters == {}
    assert found.kinds() == ["text"]


def two_images(width: int) -> Tensor:
    """Ids of a 4x6 picture and of one of 2 rows, told apart by the first column."""
    second = denoisers.ids(2, width)
    second[:, 0] = 1
    return torch.cat([denoisers.ids(*GRID), second])


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (denoisers.ids(*GRID), Raster((4,), 6)),
        (denoisers.ids(*GRID)[None], Raster((4,), 6)),
        (two_images(6), Raster((4, 2), 6)),
        (two_images(5), Raster((4,), 6, rest=10)),
        (torch.cat([denoisers.ids(*GRID), torch.zeros(5, 3)]), None),
        (denoisers.ids(1, 6), None),
        (torch.zeros(7, 3), None),
    ],
)
def test_rasters(ids: Tensor, expected: Raster | None) -> None:
    assert find_raster(ids) == expected


@pytest.mark.parametrize(("width", "names"), [(6, ["x"]), (5, ["x", "x/rest"])])
def test_two_images_in_one_sequence(width: int, names: list[str]) -> None:
    """Images of one width merge together; one of another width counts as other tokens."""
    ids = two_images(width)
    x = torch.randn(2, len(ids), C, generator=torch.Generator().manual_seed(0))
    found = find(lambda m, x, ids: x + m.attention(x, x), grid=None, x=x, ids=ids)
    label = tokens_of(found.flow.layout("x"))
    assert label is not None
    assert [s.name for s in label.segments] == names
    assert found.kinds() == ["self" if width == 6 else "joint"]
    assert found.analysis.streams[0].segment.heights == ((4, 2) if width == 6 else (4,))


# -- rows of the batch ----------------------------------------------------------------------------


def test_rows_of_the_batch_are_cut_and_joined() -> None:
    def run(m: Tiny, x: Tensor) -> Tensor:
        first, second = x.chunk(2)
        first = m.attention(first, first)
        return x + torch.cat([first, m.a(second)])

    found = find(run)
    label = found.analysis.facts["x"]
    assert label is not None
    assert found.analysis.facts[found.only("cat")] == label
    assert [b.rejected for b in found.branches()] == [None]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m, x: torch.cat(x.chunk(2)[::-1]), "their rows in another order"),
        (lambda m, x: torch.cat([x.chunk(2)[0], x.chunk(2)[0]]), "their rows in another order"),
        (lambda m, x: torch.cat([x, x]).chunk(2)[0], "batches of tokens are joined"),
        (lambda m, x: torch.cat([x[:2] * x[2:], x[2:]]), "different rows of the batch meet"),
    ],
)
def test_rows_that_meet_otherwise_are_refused(change: Any, reason: str) -> None:
    x = torch.randn(4, N, C, generator=torch.Generator().manual_seed(0))
    found = find(through(change), x=x)
    assert any(reason in text for text in found.reasons()), found.reasons()


# -- what counts as a residual add ----------------------------------------------------------------


def block(m: Tiny, x: Tensor) -> Tensor:
    return x + m.attention(m.a(x), m.a(x))


@pytest.mark.parametrize(
    ("join", "streams", "additions"),
    [
        (lambda x, c: x + c, [2], 1),
        (lambda x, c: c + x, [2], 1),
        (lambda x, c: torch.add(x, c, alpha=0.5), [1, 1], 0),
        (lambda x, c: x + 1.0, [1, 1], 0),
        (lambda x, c: x + x, [1, 1], 0),
        (lambda x, c: x * c, [1, 1], 0),
    ],
)
def test_a_stream_goes_on_behind_a_plain_addition(join: Any, streams: Any, additions: int) -> None:
    def run(m: Tiny, x: Tensor, c: Tensor) -> Tensor:
        return block(m, join(block(m, x), c))

    c = torch.randn(N, C, generator=torch.Generator().manual_seed(1))
    found = find(run, x=image(), c=c)
    mine = [s for s in found.analysis.streams if s.segment.name == "x"]
    assert [len(s.branches) for s in mine] == streams
    assert sum(len(s.additions) for s in mine) == additions


def test_a_scaled_sum_is_no_residual_add() -> None:
    found = find(lambda m, x: torch.add(m.attention(x, x), x, alpha=0.5))
    assert found.analysis.streams == ()


# -- where tokens come from: pictures -------------------------------------------------------------


def test_spatial_fold_seeds_a_segment() -> None:
    def run(m: Tiny, picture: Tensor) -> Tensor:
        return m.a(m.conv(picture).flatten(2).transpose(1, 2))

    found = find(run, grid=None, picture=torch.randn(2, 3, *GRID))
    label = tokens_of(found.flow.layout(found.only("linear")))
    assert label is not None
    assert [(s.length, s.grid, s.role) for s in label.segments] == [(N, GRID, "image")]


def test_spatial_fold_and_unfold_around_attention() -> None:
    def run(m: Tiny, picture: Tensor) -> Tensor:
        h = m.conv(picture)
        x = h.permute(0, 2, 3, 1).reshape(2, N, C)
        x = x + m.attention(m.norm(x), m.norm(x))
        return h + x.reshape(2, *GRID, C).permute(0, 3, 1, 2)

    found = find(run, grid=None, picture=torch.randn(2, 3, *GRID))
    assert found.kinds() == ["self"]
    assert [b.rejected for b in found.branches()] == [None]
    assert any("laid out as a spatial grid" in reason for reason in found.reasons())


def test_square_channels_are_no_grid() -> None:
    """[B, N, 4, 4] of heads folds back to channels, not to an image."""
    found = find(
        lambda m, x: m.attention(x, x), grid=(4, 4), x=torch.randn(2, 16, C)
    )  # head width 4, 2 heads
    names = {s.name for n in found.flow.order for s in found.flow.segments(n)}
    assert names == {"x"}


# -- kinds of attention ---------------------------------------------------------------------------


def test_self_attention() -> None:
    found = find(residual(lambda m, n: m.attention(n, n)))
    (site,) = found.analysis.sites
    assert (site.kind, site.segment) == ("self", "x")
    assert [b.kinds for b in found.branches()] == [("attention",), ("mlp",)]
    assert all(b.rejected is None for b in found.branches())


def test_cross_attention() -> None:
    found = find(lambda m, x, y: x + m.attention(m.norm(x), y), x=image(), y=text())
    (site,) = found.analysis.sites
    assert (site.kind, site.query, site.key) == ("cross", "[x 24 (4x6)]", "[y 5]")
    assert [b.kinds for b in found.branches()] == [("cross",)]


@pytest.mark.parametrize("place", ["first", "last", "middle"])
def test_joint_attention(place: str) -> None:
    parts = {"first": "yx", "last": "xy", "middle": "yxz"}[place]

    def run(m: Tiny, **inputs: Tensor) -> Tensor:
        joined = torch.cat([inputs[name] for name in parts], 1)
        start = 0 if place == "last" else TEXT
        return inputs["x"] + m.attention(joined, joined)[:, start : start + N]

    given_ = {"x": image(), "y": text(), "z": text()}
    found = find(run, **{name: given_[name] for name in sorted(parts)})
    assert found.kinds() == ["joint"]
    assert found.tokens("cat") == list(parts)
    assert found.tokens("scaled_dot_product_attention") == list(parts)
    assert [b.rejected for b in found.branches()] == [None]
    slices = [n for n, op in found.flow.ops.items() if op == "aten.slice"]
    assert [s.name for s in found.flow.segments(slices[-1])] == ["x"]


def test_attention_of_text_alone() -> None:
    def run(m: Tiny, x: Tensor, y: Tensor) -> Tensor:
        return x + m.attention(x, y + m.attention(y, y))

    assert find(run, x=image(), y=text()).kinds() == ["text", "cross"]


def test_attention_over_batched_tokens_is_temporal() -> None:
    def inner(m: Tiny, n: Tensor) -> Tensor:
        q = n.view(2, N, 2, C // 2)
        return m.a(F.scaled_dot_product_attention(q, q, q).flatten(2))

    found = find(residual(inner))
    assert found.kinds() == ["temporal"]
    first, second = found.branches()
    assert first.rejected is not None
    assert second.rejected is None


def test_head_width_equal_to_the_number_of_tokens() -> None:
    found = find(lambda m, x: x + m.attention(m.norm(x), m.norm(x)), (2, 2), x=torch.randn(4, 4, C))
    assert found.kinds() == ["self"]
    assert [b.rejected for b in found.branches()] == [None]
    patches = [p for t in found.analysis.transfers.values() for p in t.patches]
    assert {p.path for p in patches} == {(1, 1)}, "only the token count of [B, N, heads, width]"


# -- refusals -------------------------------------------------------------------------------------


def through(change: Callable[[Tiny, Tensor], Tensor]) -> Callable[[Tiny, Tensor], Tensor]:
    """A branch whose inside passes through `change`."""
    return residual(lambda m, n: m.c(change(m, m.d(n))))


REFUSED = {
    "causal attention": (lambda m, x: m.attention(x, x, is_causal=True), "causal attention"),
    "linear over tokens": (
        lambda m, x: m.over_tokens(x.transpose(1, 2)).transpose(1, 2),
        "linear map over the token axis",
    ),
    "mean over tokens": (lambda m, x: x - x.mean(1, keepdim=True), "reduction over the token axis"),
    "sum of everything": (lambda m, x: x / x.sum(), "reduction over the"),
    "softmax over tokens": (lambda m, x: x * x.softmax(-2), "reduction over the token axis"),
    "cumsum over tokens": (lambda m, x: x + x.cumsum(1), "aten.cumsum"),
    "dropout in training mode": (lambda m, x: F.dropout(x, 0.5, True), "active dropout"),
    "alpha dropout in training mode": (
        lambda m, x: F.alpha_dropout(x, 0.5, True),
        "active dropout",
    ),
    "roll": (lambda m, x: x + x.roll(1, 1), "an op along the token axis"),
    "flip": (lambda m, x: x + x.flip(1), "an op along the token axis"),
    "sort": (lambda m, x: x + x.sort(1)[0], "no transfer rule for aten.sort"),
    "index": (lambda m, x: x + x[:, torch.arange(N)], "no transfer rule for aten.index"),
    "fold with the batch, cut elsewhere": (
        lambda m, x: m.a(x.reshape(2 * N, C)).view(4, N // 2, C).reshape(2, N, C),
        "cuts the token axis",
    ),
    "a fold with channels, cut elsewhere": (
        lambda m, x: x.reshape(2, N * C).view(2, C, N).mT * x,
        "cuts the token axis",
    ),
    "linear over a fold with channels": (
        lambda m, x: F.rms_norm(x.reshape(2, N * C), (N * C,)).view(2, N, C) * x,
        "normalization over the token axis",
    ),
    "windows": (
        lambda m, x: m.attention(*[x.view(2, 2, N // 2, C).flatten(0, 1)] * 2).view(2, N, C) * x,
        "cuts the token axis",
    ),
    "slice of the image": (
        lambda m, x: torch.cat([x[:, :5], m.a(x[:, 5:])], 1),
        "an image is cut in two",
    ),
    "split of the image": (
        lambda m, x: torch.cat(x.split([5, N - 5], 1)[::-1], 1),
        "an image is cut in two",
    ),
    "chunks of the image": (
        lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1),
        "equal pieces of the token axis",
    ),
    "strides": (lambda m, x: x * x[:, ::2].repeat(1, 2, 1), "a stride over the token axis"),
    "selection": (lambda m, x: x * x[:, 3:4] + x[:, 0][:, None], "cut in two"),
    "repetition": (lambda m, x: x * x.repeat(1, 2, 1)[:, :N], "folded or narrowed token axis"),
    "negative padding": (
        lambda m, x: x * F.pad(F.pad(x, (0, 0, -1, 0)), (0, 0, 1, 0)),
        "padding of the token axis",
    ),
    "padding by reflection": (
        lambda m, x: x * F.pad(x.mT, (1, 1), mode="reflect")[..., 1:-1].mT,
        "padding of the token axis",
    ),
    "shares that count the keys": (
        lambda m, x: (1 - (x @ x.mT).softmax(-1)) @ x,
        "a sum over tokens without softmax",
    ),
    "normalization over the batch": (
        lambda m, x: F.layer_norm(x.permute(1, 0, 2), (2, C)).permute(1, 0, 2) * x,
        "normalization over the batch of tokens",
    ),
    "twice in one sequence": (
        lambda m, x: m.attention(x, torch.cat([x, x], 1)),
        "the same tokens occur twice",
    ),
    "attention without softmax": (
        lambda m, x: (x @ x.transpose(1, 2)) @ x,
        "a sum over tokens without softmax",
    ),
    "softmax over the queries": (
        lambda m, x: (x @ x.transpose(1, 2)).softmax(-2) @ x,
        "a reduction over the token axis",
    ),
    "linear attention of other rows": (
        lambda m, x: x @ torch.stack([y.mT @ y for y in x.unbind(0)][::-1]),
        "rows of the batch are taken apart",
    ),
    "a product over keys": (
        lambda m, x: (x @ x.mT) @ (x @ x.mT) @ x,
        "a matrix product over token axes",
    ),
    "normalization over tokens": (
        lambda m, x: F.layer_norm(x.transpose(1, 2), (N,)).transpose(1, 2) * x,
        "normalization over the token axis",
    ),
    "group norm": (
        lambda m, x: F.group_norm(x.transpose(1, 2), 2).transpose(1, 2) * x,
        "statistics over the token axis",
    ),
    "pooling": (
        lambda m, x: F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2) * x,
        "avg_pool1d",
    ),
    "channels as tokens": (
        lambda m, x: F.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3).transpose(1, 2) * x,
        "tokens lie along the width",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_and_rejected_branch(name: str) -> None:
    """The op is refused with its reason, its branch is rejected, the MLP after it is not."""
    change, reason = REFUSED[name]
    found = find(through(change))
    assert any(reason in text for text in found.reasons()), found.reasons()
    branches = found.branches()
    assert branches[-1].kinds == ("mlp",)
    assert branches[-1].rejected is None
    assert all(b.rejected is not None or b.leak is not None for b in branches[:-1])


def test_the_rejection_of_a_leak_names_the_refused_op() -> None:
    found = find(through(lambda m, x: x - x.mean(1, keepdim=True)))
    rejected = found.branches()[0].rejected
    assert rejected is not None
    assert rejected.node == found.only("mean")
    assert rejected == found.analysis.refusals[found.only("mean")]
    assert (rejected.op, rejected.kind, rejected.module) == ("aten.mean", "rule", "")
    assert rejected.dim == "[x 24 (4x6)]"
    assert rejected.line.startswith("test_rules.py:")
    assert "outside the branch" in rejected.advice
    assert str(rejected) == "mean: a reduction over the token axis (aten.mean)"


@pytest.mark.parametrize(
    ("change", "kind", "op"),
    [
        (lambda m, x: x - x.mean(1, keepdim=True), "rule", "aten.mean"),
        (lambda m, x: x.cummax(1).values, "no_rule", "aten.cummax"),
        (lambda m, x: torch.stack(x.unbind(0)), "needs_all_tokens", "aten.unbind"),
    ],
)
def test_a_refusal_says_what_refuses(change: Callable[..., Tensor], kind: str, op: str) -> None:
    found = find(through(change))
    refusals = {**found.analysis.refusals, **found.flow.needs_all_tokens}
    refusal = refusals[found.only(op.removeprefix("aten."))]
    assert (refusal.kind, refusal.op) == (kind, op)


def test_a_refusal_of_text_does_not_concern_the_image() -> None:
    def run(m: Tiny, x: Tensor, y: Tensor) -> Tensor:
        return x + m.attention(m.norm(x), y - y.mean(1, keepdim=True))

    found = find(run, x=image(), y=text())
    assert len(found.analysis.refusals) == 1
    assert [b.rejected for b in found.branches()] == [None]


@pytest.mark.parametrize(
    "change",
    [
        lambda m, x: x * x.mean(-1, keepdim=True),
        lambda m, x: x.softmax(-1),
        lambda m, x: F.feature_alpha_dropout(F.alpha_dropout(F.dropout(x, 0.5, False)), 0.5, False),
        lambda m, x: torch.native_dropout(x, 0.5, False)[0],
        lambda m, x: x / x.norm(dim=-1, keepdim=True),
        lambda m, x: torch.cat(x.chunk(2, -1)[::-1], -1),
        lambda m, x: x.view(2, N, 2, 2, 2).permute(3, 0, 1, 2, 4)[1].flatten(2).repeat(1, 1, 2),
        lambda m, x: x @ m.a.weight,
        lambda m, x: F.pad(x, (1, 0))[..., 1:],
        lambda m, x: torch.stack(x.view(2, N, C // 2, 2).unbind(-1)[::-1], -1).flatten(2),
    ],
)
def test_channel_ops_keep_the_token_axis(change: Callable[[Tiny, Tensor], Tensor]) -> None:
    found = find(through(change))
    assert found.reasons() == []
    assert [b.rejected for b in found.branches()] == [None, None]


# -- positional operands --------------------------------------------------------------------------


def test_operands_that_line_up_are_positional() -> None:
    def run(m: Tiny, x: Tensor, table: Tensor, bias: Tensor) -> Tensor:
        q = m.heads(x) * table
        out = F.scaled_dot_product_attention(q, m.heads(x), m.heads(x), attn_mask=bias)
        return out.transpose(1, 2).flatten(2)

    inputs = {"x": image(), "table": torch.randn(N, C // 2), "bias": torch.ones(2, 1, N, N) > 0}
    found = find(run, **inputs)
    transfers = found.analysis.transfers
    (table,) = transfers[found.only("mul")].positionals
    assert (table.operand, table.dim) == ("table", 2)
    batch, tokens = axis("batch", 2), found.flow.layout("x")[1]
    assert table.layout == (batch, plain(2), tokens, plain(C // 2))
    masks = transfers[found.only("scaled_dot_product_attention")].positionals
    assert [(m.operand, m.dim, m.layout[0]) for m in masks] == [
        ("bias", 2, batch),
        ("bias", 3, batch),
    ]


def test_vectors_over_channels_are_not_positional() -> None:
    """A vector of as many channels as there are tokens lies along the channels."""
    found = find(lambda m, x, v: x * v, (2, 4), x=torch.randn(2, 8, 8), v=torch.randn(8))
    assert found.only("mul") not in found.analysis.transfers


def test_a_key_mask_is_positional_to_the_keys_only() -> None:
    def run(m: Tiny, x: Tensor, keep: Tensor) -> Tensor:
        return m.attention(x, x, attn_mask=keep)

    found = find(run, x=image(), keep=torch.ones(2, 1, 1, N) > 0)
    (mask,) = found.analysis.transfers[found.only("scaled_dot_product_attention")].positionals
    assert mask.dim == 3


# -- ops of one class are taken alike -------------------------------------------------------------

aten = torch.ops.aten
SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "alias": aten.alias,
    "detach": lambda x: x.detach(),
    "lift_fresh_copy": aten.lift_fresh_copy,
    "to": lambda x: x.to(torch.float64).to(torch.float32),
    "_to_copy": lambda x: aten._to_copy(aten._to_copy(x, dtype=torch.float64), dtype=x.dtype),
}
RESHAPED: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: aten.view(x, x.shape),
    "reshape": lambda x: aten.reshape(x, x.shape),
    "_unsafe_view": lambda x: aten._unsafe_view(x, x.shape),
    "view_copy": lambda x: aten.view_copy(x, x.shape),
}


def nodes_of(found: Found, op: str) -> list[str]:
    return [name for name, known in found.flow.ops.items() if known == f"aten.{op}"]


@pytest.mark.parametrize("op", SAME)
def test_copies_and_casts_of_a_norm_belong_to_the_prologue(op: str) -> None:
    """Tokens merge behind them: one merge for q, k and v, in the precision that these see."""

    def run(m: Tiny, x: Tensor) -> Tensor:
        n = SAME[op](m.norm(x))
        return x + m.attention(n, n)

    found = find(run)
    inside = nodes_of(found, op)
    (branch,) = found.branches()
    assert (branch.kinds, branch.rejected) == (("attention",), None)
    if op == "contiguous":  # torch leaves out what is contiguous
        assert branch.entries == ("layer_norm",)
    else:
        assert branch.entries == (inside[-1],)


@pytest.mark.parametrize("op", ["std", "var", "mean", "sum", "amax", "amin"])
def test_a_norm_by_any_statistic_is_one(op: str) -> None:
    def run(m: Tiny, x: Tensor) -> Tensor:
        scale = getattr(x.abs(), op)(-1, keepdim=True)
        return x + m.c(F.gelu(m.d(x / (scale + 1))))

    found = find(run)
    assert nodes_of(found, op)
    (branch,) = found.branches()
    assert branch.entries == (found.only("div"),), "merged behind the division, and once"


@pytest.mark.parametrize("op", [*SAME, *RESHAPED])
def test_written_out_attention_around_copies_casts_and_reshapes(op: str) -> None:
    """Between scores and softmax, between softmax and product; of self- and cross-attention."""
    change = (SAME | RESHAPED)[op]

    def attend(m: Tiny, x: Tensor, y: Tensor) -> Tensor:
        n = m.norm(x)
        scores = m.heads(m.a(n)) @ m.heads(m.b(n if y is x else y)).transpose(-1, -2)
        shares = change(change(scores).softmax(-1))
        out = shares @ m.heads(m.c(n if y is x else y))
        return x + m.d(out.transpose(1, 2).flatten(2))

    found = find(lambda m, x: attend(m, x, x))
    assert op == "contiguous" or nodes_of(found, op)
    (branch,) = found.branches()
    assert (found.kinds(), branch.kinds, branch.rejected) == (["self"], ("attention",), None)
    crossed = find(attend, x=image(), y=text())
    (branch,) = crossed.branches()
    assert (crossed.kinds(), branch.kinds, branch.rejected) == (["cross"], ("cross",), None)


# -- a rule of one's own --------------------------------------------------------------------------


def test_the_rule_of_a_new_operator_is_ten_lines_in_one_place() -> None:
    """CONTRIBUTING shows it; before, its branch is refused for the lack of it."""

    def run(m: Tiny, x: Tensor) -> Tensor:
        return x + m.c(F.glu(torch.cat([m.a(m.norm(x)), m.b(m.norm(x))], -1)))

    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    code = page.partition('```python\n@rule("glu")')[2].partition("```")[0]
    code = f'@rule("glu"){code}'
    assert len(code.strip().splitlines()) <= 10
    (branch,) = find(run).branches() or [None]
    assert branch is None or branch.rejected is not None
    assert any("no transfer rule for aten.glu" in r for r in find(run).reasons())
    before = dict(base.RULES)
    try:
        exec(code, {name: getattr(base, name) for name in ("rule", "Call", "Layout", "plain")})
        (branch,) = find(run).branches()
        assert (branch.kinds, branch.rejected) == (("mlp",), None)
        along = find(lambda m, x: x + F.glu(torch.cat([x, x.sin()], 1), 1))
        assert not along.branches() or along.branches()[0].rejected is not None
    finally:
        base.RULES.clear()
        base.RULES.update(before)

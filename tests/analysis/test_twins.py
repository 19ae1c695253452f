"""The twin oracle: every token has an exact twin, so merging half of them must not change a thing.

Twins lie elsewhere in every row of the batch, so whatever mixes rows of tokens without being
noticed comes out wrong. Each branch merges right, or is refused for the true reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toma_fx
from toma_fx.methods.toma import ToMA
from toma_fx.run.report import Report

N, C = 16, 8
EXACT = 1e-4
OPTIONS: dict[str, Any] = {"grid": (4, 4), "window": "global", "ratio": 0.5, "min_tokens": 1}
sdpa = F.scaled_dot_product_attention


class Model(nn.Module):
    """Residual branches: one to try, then an MLP that merges whatever the first does."""

    def __init__(self, branch: Callable[..., Tensor], mlp: bool = True) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(C), nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.q, self.k, self.v = (nn.Linear(C, C) for _ in range(3))
        self.branch, self.with_mlp = branch, mlp

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states
        x = x + self.branch(self, self.norm(x))
        return x + self.mlp(self.norm(x)) if self.with_mlp else x


def twins(rows: int) -> Tensor:
    """[rows, N, C]: each token twice, at places of its own in every row."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, N // 2, C, generator=generator).repeat(1, 2, 1)
    return torch.stack([row[torch.randperm(N, generator=generator)] for row in x])


@torch.no_grad()
def check(branch: Callable[..., Tensor], rows: int, *, mlp: bool = True, **options: Any) -> Report:
    """Merging half of the tokens gives the original output; what merges, and what does not."""
    torch.manual_seed(0)
    model, x = Model(branch, mlp).eval(), twins(rows)
    for scope in ("sublayer", "stack"):
        merged = toma_fx.optimize(model, **OPTIONS, scope=scope, **options)
        expected, got = model(x), merged(x)
        error = float((got - expected).abs().max() / expected.abs().max())
        assert error < EXACT, f"{error:.1e} in scope {scope}"
    return toma_fx.explain(model, {"hidden_states": x}, **OPTIONS, scope="sublayer", **options)


# -- rows of the batch ----------------------------------------------------------------------------

MIXED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "mean over views": (lambda y: y.mean(2, keepdim=True), "aten.mean"),
    "mean over frames": (lambda y: y.mean(1, keepdim=True), "aten.mean"),
    "mean over clips": (lambda y: y.mean(0, keepdim=True), "aten.mean"),
    "largest of clips and views": (lambda y: y.amax((0, 2), keepdim=True), "aten.amax"),
    "sum by einsum": (lambda y: torch.einsum("bfvnc->bfnc", y)[:, :, None], "aten.einsum"),
    "shares by einsum": (
        lambda y: torch.einsum("bfvnc,uv->bfunc", y, torch.eye(2) + 0.3),
        "aten.einsum",
    ),
    "running sum": (lambda y: y.cumsum(2), "aten.cumsum"),
    "softmax": (lambda y: y.softmax(1), "aten.softmax"),
    "linear map": (
        lambda y: F.linear(y.movedim(2, -1), torch.eye(2) + 0.3).movedim(-1, 2),
        "aten.linear",
    ),
    "product": (
        lambda y: ((torch.eye(2) + 0.3) @ y.flatten(3)).unflatten(3, (N, C)),
        "aten.matmul",
    ),
    "norm": (
        lambda y: F.layer_norm(y.movedim(2, -1), (2,)).movedim(-1, 2),
        "aten.layer_norm",
    ),
    "the first view": (lambda y: y[:, :, :1], ""),
    "the other view": (lambda y: y.flip(2), "aten.flip"),
    "rolled frames": (lambda y: y.roll(1, 1), "aten.roll"),
    "views and frames exchanged": (lambda y: y.transpose(1, 2), "rows of the batch meet"),
    "clips and views exchanged": (lambda y: y.permute(2, 1, 0, 3, 4), "rows of the batch meet"),
    "views cut apart": (lambda y: torch.cat(y.chunk(2, 2)[::-1], 2), "in another order"),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_rows_is_refused(name: str) -> None:
    """A batch of 8 is clips x frames x views; tokens of one meet those of another."""
    mix, reason = MIXED[name]

    def branch(m: Model, n: Tensor) -> Tensor:
        y = n.view(2, 2, 2, N, C)
        return m.mlp((y + mix(y)).flatten(1, 2).flatten(0, 1))

    model, x = Model(branch, mlp=False).eval(), twins(8)
    with pytest.raises(toma_fx.NoMergeSites) as error:
        toma_fx.explain(model, {"hidden_states": x}, **OPTIONS)
    assert reason in str(error.value.reasons)


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "views": lambda y: y * 2.0,
    "a factor of each view": lambda y: y * torch.arange(1.0, 3.0)[:, None, None],
    "exchanged and back": lambda y: y.permute(2, 0, 1, 3, 4).square().permute(1, 2, 0, 3, 4),
    "cut and joined": lambda y: torch.cat([v.square() for v in y.chunk(2, 2)], 2),
    "frames before clips": lambda y: y.transpose(0, 1).flatten(0, 1).sin().unflatten(0, (2, 2))
    .transpose(0, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_rows_taken_apart_and_put_together_merge(name: str) -> None:
    def branch(m: Model, n: Tensor) -> Tensor:
        y = n.view(2, 2, 2, N, C)
        return m.mlp(KEPT[name](y).reshape(8, N, C))

    report = check(branch, 8)
    assert len(report.rows) == 2, report.rejections


# -- heads, tables, gates -------------------------------------------------------------------------


def fold(x: Tensor) -> Tensor:
    """Heads into the batch: [B, N, C] -> [B * 2, N, C / 2]."""
    return x.reshape(len(x), -1, 2, C // 2).permute(0, 2, 1, 3).reshape(len(x) * 2, -1, C // 2)


def unfold(y: Tensor) -> Tensor:
    """Heads out of the batch."""
    y = y.reshape(len(y) // 2, 2, -1, C // 2)
    return y.permute(0, 2, 1, 3).reshape(len(y), -1, C)


def folded(m: Model, n: Tensor) -> Tensor:
    return unfold(sdpa(fold(m.q(n)), fold(m.k(n)), fold(m.v(n))))


def table_on_folded_heads(m: Model, n: Tensor) -> Tensor:
    """What is added, and what multiplies, to batch and heads in one dimension."""
    table = torch.ones(N, C // 2) * 0.3
    return unfold((fold(m.q(n)) + table) * (1 + table) + fold(m.v(n)).sin())


def folded_written_out(m: Model, n: Tensor) -> Tensor:
    scores = torch.bmm(fold(m.q(n)), fold(m.k(n)).transpose(1, 2))
    return unfold(torch.bmm(scores.softmax(-1), fold(m.v(n))))


def all_in_one_row(m: Model, n: Tensor) -> Tensor:
    """Batch and tokens folded, as quantized linear layers do; the token count is a literal."""
    return m.mlp(n.flatten(0, 1)).unflatten(0, n.shape[:2])


def tokens_and_channels(m: Model, n: Tensor) -> Tensor:
    return m.mlp(n.reshape(len(n), N * C).sin().view(n.shape))


def gate(m: Model, n: Tensor) -> Tensor:
    """A condition made of the tokens."""
    y = m.mlp(n)
    return torch.where(n[..., :1] > 0, y, -y)


def linear_attention(m: Model, n: Tensor) -> Tensor:
    """Keys and values are summed over tokens, with a normalizer."""
    q, k, v = m.q(n).relu(), m.k(n).relu(), m.v(n)
    return (q @ (k.mT @ v)) / ((q @ k.sum(1, keepdim=True).mT) + 1)


def linear_attention_by_einsum(m: Model, n: Tensor) -> Tensor:
    q, k, v = (fold(f(n)).relu() for f in (m.q, m.k, m.v))
    weights = torch.einsum("bnd,bne->bde", k, v)
    normalizer = torch.einsum("bnd,bd->bn", q, torch.einsum("bnd->bd", k)) + 1
    return unfold(torch.einsum("bnd,bde->bne", q, weights) / normalizer[..., None])


def einsum_with_a_size_of_one(m: Model, n: Tensor) -> Tensor:
    return m.down(torch.einsum("bnc,bnd->bnd", m.q(n), torch.ones(1, 1, 2 * C)) * m.up(n))


def counts_of_positive_tokens(m: Model, n: Tensor) -> Tensor:
    """In whole numbers a merged token can't count 1.5 times: these are of all tokens."""
    return m.mlp(n) / ((m.q(n) > 0).sum(1, keepdim=True) + 1)


def linear_attention_with_ones(m: Model, n: Tensor) -> Tensor:
    """As Sana writes it: a row of ones beside the values sums the keys."""
    q, k, v = m.q(n).relu().mT, m.k(n).relu(), F.pad(m.v(n).mT, (0, 0, 0, 1), value=1.0)
    out = (v @ k) @ q
    return (out[:, :-1] / (out[:, -1:] + 1)).mT


MERGED = {
    f.__name__: f
    for f in (
        folded, folded_written_out, table_on_folded_heads, all_in_one_row, tokens_and_channels,
        gate, linear_attention, linear_attention_by_einsum, linear_attention_with_ones,
        einsum_with_a_size_of_one, counts_of_positive_tokens,
    )
}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", MERGED)
def test_branches_that_merge(name: str, rows: int) -> None:
    report = check(MERGED[name], rows)
    assert len(report.rows) == 2, report.rejections


def test_linear_attention_needs_the_sizes_of_merged_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They count: without them the sum over half of the tokens would be half of it."""
    original = ToMA.sizes
    monkeypatch.setattr(ToMA, "sizes", lambda *args: original(*args) * 0 + 1)
    with pytest.raises(AssertionError, match="in scope sublayer"):
        check(linear_attention, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
@torch.no_grad()
def test_tables_of_whole_numbers_are_gathered(dtype: torch.dtype) -> None:
    """Half of a whole number is none: such tables, and yes or no, are not merged but gathered."""

    def branch(m: Model, n: Tensor) -> Tensor:
        place = (torch.arange(N) // 2)[None, :, None].to(dtype)
        return m.down(F.gelu(m.up(n)) + place)

    model = Model(branch, mlp=False).eval()
    x = torch.randn(2, N // 2, C).repeat_interleave(2, 1)
    merged = toma_fx.optimize(model, **OPTIONS)
    torch.testing.assert_close(merged(x), model(x), rtol=0, atol=1e-5)


# -- two sequences, masks -------------------------------------------------------------------------

MASK = torch.randn(2, 1, N, N, generator=torch.Generator().manual_seed(2))


def packed(m: Model, n: Tensor) -> Tensor:
    """All pictures in one sequence, with a mask that keeps them apart."""
    y, place = n.reshape(1, -1, C), torch.arange(len(n) * N) // N
    return sdpa(y, y, y, attn_mask=place[:, None] == place[None]).view(n.shape)


def mask_of_frames(m: Model, n: Tensor) -> Tensor:
    """[clips, frames, tokens, channels]: a mask of each clip."""
    y = n.view(2, 2, N, C)
    return sdpa(y, y, y, attn_mask=MASK).view(n.shape)


def values_of_which_sight_is_lost(m: Model, n: Tensor) -> Tensor:
    return sdpa(n, n, torch.roll(n, 3, 1))


@pytest.mark.parametrize(
    ("branch", "merging", "reason"),
    [
        (packed, 1, "share a dimension"),
        (mask_of_frames, 2, ""),
        (values_of_which_sight_is_lost, 1, "from different tokens"),
    ],
)
@torch.no_grad()
def test_what_can_merge_does_and_the_rest_is_refused_before(
    branch: Callable[..., Tensor], merging: int, reason: str
) -> None:
    """The plan knows; no rewrite fails half-way."""
    model, x = Model(branch).eval(), twins(4)
    report = toma_fx.explain(model, {"hidden_states": x}, **OPTIONS)
    assert len(report.rows) == merging
    assert any(reason in r.reason for r in report.rejections) or not reason
    assert toma_fx.optimize(model, **OPTIONS)(x).isfinite().all()


@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_the_order_of_a_sum_does_not_matter(first: bool) -> None:
    """A bias [B, N, N] among the inputs, or another sequence of as many tokens."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Model(lambda m, n: n)

        def forward(self, hidden_states: Tensor, mask: Tensor, other: Tensor) -> Tensor:
            m, x = self.inner, hidden_states
            n = m.norm(x)
            scores = m.q(n) @ m.k(n).mT
            scores = mask + scores if first else scores + mask
            x = x + scores.softmax(-1) @ m.v(n)
            x = other + x if first else x + other
            return x + m.mlp(m.norm(x))

    inputs = {"hidden_states": twins(2), "mask": torch.randn(2, N, N), "other": twins(2)}
    report = toma_fx.explain(Biased().eval(), inputs, **OPTIONS, scope="sublayer")
    assert len(report.rows) == 2, report.rejections


# -- streams --------------------------------------------------------------------------------------


class Long(nn.Module):
    """Two blocks; `end` says what comes after them."""

    def __init__(self, end: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.embed, self.end = Model(lambda m, n: n), nn.Linear(C, C), end

    def attend(self, x: Tensor) -> Tensor:
        n = self.inner.norm(x)
        return x + sdpa(self.inner.q(n), self.inner.k(n), self.inner.v(n))

    def think(self, x: Tensor) -> Tensor:
        return x + self.inner.mlp(self.inner.norm(x))

    def forward(self, hidden_states: Tensor) -> Any:
        x = first = self.embed(hidden_states)
        for _ in range(2):
            x = self.think(self.attend(x))
        return self.end(self, x, first)


ENDS: dict[str, tuple[Callable[..., Any], int]] = {
    "a skip over the whole stream": (lambda m, x, first: x + first, 4),
    "a skip, and a block": (lambda m, x, first: m.think(m.attend(first + x)), 6),
    "two heads": (lambda m, x, first: (x, m.think(first)), 5),
    "three heads": (lambda m, x, first: (x, m.think(first), m.attend(first)), 6),
}


@pytest.mark.parametrize("scope", ["sublayer", "block", "stack"])
@pytest.mark.parametrize("method", ["toma", "tomesd"])
@pytest.mark.parametrize("name", ENDS)
@torch.no_grad()
def test_streams_with_skips_and_heads(name: str, method: Any, scope: Any) -> None:
    end, count = ENDS[name]
    torch.manual_seed(0)
    model, x = Long(end).eval(), twins(2)
    options = {"grid": (4, 4), "min_tokens": 1, "scope": scope, "method": method}
    options |= {"ratio": 0.5, "branches": ("attention", "mlp")}
    report = toma_fx.explain(model, {"hidden_states": x}, **options)
    assert len(report.rows) == count, report.rejections
    if method == "toma":
        got = toma_fx.optimize(model, **options, window="global")(x)
        for a, b in zip(
            *((y if isinstance(y, tuple) else (y,)) for y in (got, model(x))), strict=True
        ):
            assert float((a - b).abs().max() / b.abs().max()) < EXACT


@pytest.mark.parametrize("scope", ["sublayer", "block", "stack"])
@torch.no_grad()
def test_two_attentions_that_read_one_value(scope: Any) -> None:
    """What is reported as merged runs on merged tokens: the second branch starts before its add."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.first, self.second = nn.LayerNorm(C), nn.Linear(C, 24), nn.Linear(C, 24)

        def forward(self, hidden_states: Tensor) -> Tensor:
            x, n = hidden_states, self.norm(hidden_states)
            x = x + sdpa(*self.first(n).chunk(3, -1))
            return x + sdpa(*self.second(n).chunk(3, -1))

    model, x = Pair().eval(), twins(2)
    options = {**OPTIONS, "scope": scope}
    assert len(toma_fx.explain(model, {"hidden_states": x}, **options).rows) == 2
    denoiser = toma_fx.optimize(model, **options)
    torch.testing.assert_close(denoiser(x), model(x), rtol=0, atol=1e-4)
    graph = denoiser.specializations[0].program("refresh").graph_module.graph
    calls = [n for n in graph.nodes if "scaled_dot_product" in str(n.target)]
    assert [n.args[0].meta["val"].shape[-2] for n in calls] == [N // 2] * 2


# -- pictures and videos before they are tokens ---------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        lambda x: torch.cat([x[:, :, :1], x[:, :, 1:] * 2], 2),
        lambda x: torch.cat([x[:, :, :, :2], x[:, :, :, 2:] * 2], 3),
        lambda x: torch.cat([*x[..., :1].split(1, -1), *x[..., 1:].split(1, -1)], 4),
    ],
)
@torch.no_grad()
def test_a_write_into_a_part_of_a_video_leaves_it_a_video(write: Callable[..., Tensor]) -> None:
    class Video(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.norm, self.q = nn.Conv3d(4, C, 1), nn.LayerNorm(C), nn.Linear(C, C)

        def forward(self, sample: Tensor) -> Tensor:
            x = write(self.patch(sample)).flatten(2).transpose(1, 2)
            n = self.norm(x)
            return x + sdpa(self.q(n), n, n)

    report = toma_fx.explain(Video().eval(), {"sample": torch.randn(2, 4, 3, 4, 4)}, min_tokens=1)
    assert [row.grid for row in report.rows] == [(3, 4, 4)]

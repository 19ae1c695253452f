"""Random chains of steps that models are made of: what merges is right, the rest is refused.

Oracle: computing on all tokens in another order, one of its own in every row of the batch, gives
the original output in every scope. Steps mix rows, tokens, streams and layouts in ways that real
models do, and in ways that none does.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import denoisers
from tests.analysis.test_properties import permutation, program_output
from tests.zoo.check import keep_all
from toma_fx.analysis.propagate import analyze
from toma_fx.capture.model import capture
from toma_fx.errors import TomaError
from toma_fx.methods.toma import ToMAConfig
from toma_fx.plan.planner import make_plan

N, C, TEXT, GRID = 16, 8, 5, (4, 4)
sdpa = F.scaled_dot_product_attention


@dataclass
class State:
    """What a model holds between its steps: the picture, text, a second stream, values of before.

    Attributes:
        rows: of the batch, as (clips, frames, views).
    """

    x: Tensor
    text: Tensor
    other: Tensor
    table: Tensor
    first: Tensor
    rows: tuple[int, int, int]
    layers: nn.ModuleList
    used: int = 0
    kept: list[Tensor] = field(default_factory=list)

    def linear(self, x: Tensor) -> Tensor:
        """A linear map; after a while the first ones come again, as shared weights do."""
        self.used += 1
        return self.layers[self.used % len(self.layers)](x)

    def norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (C,))

    def heads(self, x: Tensor) -> Tensor:
        return self.linear(x).unflatten(-1, (2, C // 2)).transpose(1, 2)

    def apart(self, x: Tensor) -> Tensor:
        """[clips, frames, views, tokens, channels]"""
        return x.unflatten(0, self.rows)


Step = Callable[[State], None]
STEPS: dict[str, Step] = {}


def step(function: Step) -> Step:
    STEPS[function.__name__] = function
    return function


def branch(function: Callable[[State, Tensor], Tensor]) -> Callable[[State, Tensor], Tensor]:
    """A step that adds a branch to the picture."""

    def run(s: State) -> None:
        s.x = s.x + function(s, s.norm(s.x))

    STEPS[function.__name__] = run
    return function


def join_heads(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


# -- attention ------------------------------------------------------------------------------------


@branch
def self_attention(s: State, n: Tensor) -> Tensor:
    return s.linear(join_heads(sdpa(s.heads(n), s.heads(n), s.heads(n))))


@branch
def rotary_attention(s: State, n: Tensor) -> Tensor:
    q, k = (s.heads(n) * s.table[:, : C // 2] for _ in range(2))
    return s.linear(join_heads(sdpa(q, k, s.heads(n))))


@branch
def biased_attention(s: State, n: Tensor) -> Tensor:
    bias = s.table @ s.table.mT
    return s.linear(join_heads(sdpa(s.heads(n), s.heads(n), s.heads(n), attn_mask=bias)))


@branch
def cross_attention(s: State, n: Tensor) -> Tensor:
    return s.linear(join_heads(sdpa(s.heads(n), s.heads(s.text), s.heads(s.text))))


@step
def joint_attention(s: State) -> None:
    """Text first, last, or around: both are updated."""
    n, t = s.norm(s.x), s.norm(s.text)
    order = s.used % 3
    parts = {0: [t, n], 1: [n, t], 2: [t[:, :2], n, t[:, 2:]]}[order]
    both = torch.cat(parts, 1)
    y = s.linear(join_heads(sdpa(s.heads(both), s.heads(both), s.heads(both))))
    at = {0: TEXT, 1: 0, 2: 2}[order]
    s.x = s.x + y[:, at : at + N]
    s.text = s.text + torch.cat([y[:, :at], y[:, at + N :]], 1)


@branch
def folded_heads(s: State, n: Tensor) -> Tensor:
    q, k, v = (s.heads(n).flatten(0, 1) for _ in range(3))
    y = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)
    return s.linear(join_heads(y.unflatten(0, (len(n), 2))))


@branch
def attention_by_einsum(s: State, n: Tensor) -> Tensor:
    q, k, v = (s.linear(n).unflatten(-1, (2, C // 2)) for _ in range(3))
    shares = torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1)
    return s.linear(torch.einsum("bhnm,bmhd->bnhd", shares, v).flatten(2))


@branch
def linear_attention(s: State, n: Tensor) -> Tensor:
    q, k, v = s.heads(n).relu(), s.heads(n).relu(), s.heads(n)
    return s.linear(join_heads(q @ (k.mT @ v) / (q @ k.sum(2, keepdim=True).mT + 1)))


def cut_windows(x: Tensor, dilated: bool) -> Tensor:
    """[B, 4, 4, C] -> [B * 4, 4, C]: four windows, or four grids of every other token."""
    y = x.unflatten(2, (2, 2)).unflatten(1, (2, 2))
    order = (0, 2, 4, 1, 3, 5) if dilated else (0, 1, 3, 2, 4, 5)
    return y.permute(order).reshape(-1, 4, C)


def join_windows(y: Tensor, dilated: bool) -> Tensor:
    order = (0, 3, 1, 4, 2, 5) if dilated else (0, 1, 3, 2, 4, 5)
    return y.reshape(-1, 2, 2, 2, 2, C).permute(order).reshape(-1, 4, 4, C)


@branch
def windows(s: State, n: Tensor) -> Tensor:
    """Of a picture that is rolled; a window that wraps around has a mask, all a bias."""
    y = cut_windows(s.linear(n.unflatten(1, GRID)).roll((-1, -1), (1, 2)), dilated=False)
    mask = (s.table[:, :4] @ s.table[:4, :4].mT).unflatten(0, (4, 4)).repeat(len(n), 1, 1)
    y = s.linear(sdpa(s.linear(y), s.linear(y), y, attn_mask=mask + s.table[:4, :4]))
    return join_windows(y, dilated=False).roll((1, 1), (1, 2)).flatten(1, 2)


@branch
def dilated_windows(s: State, n: Tensor) -> Tensor:
    y = cut_windows(n.unflatten(1, GRID), dilated=True)
    y = s.linear(sdpa(s.linear(y), s.linear(y), y))
    y = y + s.linear(F.gelu(s.linear(y)))
    return join_windows(y, dilated=True).flatten(1, 2)


@branch
def windows_apart(s: State, n: Tensor) -> Tensor:
    """[B, windows, tokens, C], and what mixes the windows."""
    y = cut_windows(n.unflatten(1, GRID), dilated=False).unflatten(0, (len(n), 4))
    y = y + s.linear(sdpa(s.linear(y), s.linear(y), y))
    if s.used % 2:
        y = y + s.linear(y.mean(1, keepdim=True) * y.flip(1))
    return join_windows(y.flatten(0, 1), dilated=False).flatten(1, 2)


@branch
def attention_over_frames(s: State, n: Tensor) -> Tensor:
    y = s.apart(n).permute(0, 2, 3, 1, 4)
    return s.linear(sdpa(y, y, y).permute(0, 3, 1, 2, 4).flatten(0, 2))


@branch
def attention_over_the_batch(s: State, n: Tensor) -> Tensor:
    y = n.transpose(0, 1)
    return s.linear(sdpa(y, y, y).transpose(0, 1))


@branch
def latent_queries(s: State, n: Tensor) -> Tensor:
    """Text looks at the picture, and the picture at what the text saw."""
    seen = sdpa(s.linear(s.text), s.linear(n), s.linear(n))
    return sdpa(s.linear(n), s.linear(seen), seen)


@branch
def normalized_over_queries(s: State, n: Tensor) -> Tensor:
    return (s.linear(n) @ s.linear(n).mT).softmax(1) @ s.linear(n)


# -- MLPs and gates -------------------------------------------------------------------------------


@branch
def mlp(s: State, n: Tensor) -> Tensor:
    return s.linear(F.gelu(s.linear(n)))


@branch
def gated_mlp(s: State, n: Tensor) -> Tensor:
    return s.linear(F.silu(s.linear(n)) * s.linear(n))


@branch
def experts(s: State, n: Tensor) -> Tensor:
    """Each token is computed by all experts; a router weighs them."""
    weights = s.linear(n)[..., :3].softmax(-1)
    return torch.stack([s.linear(n) for _ in range(3)], -1).mul(weights[:, :, None]).sum(-1)


@branch
def modulated(s: State, n: Tensor) -> Tensor:
    shift, scale, gate = s.linear(s.text.mean(1, keepdim=True)).tanh().expand(-1, 3, -1).unbind(1)
    n = n * (1 + scale[:, None]) + shift[:, None]
    return gate[:, None] * s.linear(F.gelu(s.linear(n)))


@branch
def modulated_by_token(s: State, n: Tensor) -> Tensor:
    return s.table.tanh() * s.linear(F.gelu(s.linear(n * (1 + s.table) + s.table)))


@branch
def gated_by_itself(s: State, n: Tensor) -> Tensor:
    y = s.linear(n)
    return torch.where(n[..., :1] > 0, y, -y)


@branch
def folded_rows(s: State, n: Tensor) -> Tensor:
    return s.linear(F.gelu(s.linear(n.flatten(0, 1)))).unflatten(0, n.shape[:2])


@branch
def as_one_sequence(s: State, n: Tensor) -> Tensor:
    return s.linear(n.reshape(1, -1, C)).reshape(n.shape)


# -- what mixes tokens or rows --------------------------------------------------------------------


@branch
def mean_of_tokens(s: State, n: Tensor) -> Tensor:
    return s.linear(n - n.mean(1, keepdim=True))


@branch
def convolution(s: State, n: Tensor) -> Tensor:
    y = n.mT.unflatten(2, GRID)
    return F.avg_pool2d(y, 3, 1, 1).flatten(2).mT


@branch
def mean_of_views(s: State, n: Tensor) -> Tensor:
    y = s.apart(n)
    return s.linear((y + y.mean(2, keepdim=True)).flatten(0, 2))


@branch
def frames_by_einsum(s: State, n: Tensor) -> Tensor:
    y = s.apart(n)
    return s.linear((y + torch.einsum("cfvnd->cvnd", y)[:, None]).flatten(0, 2))


@branch
def rows_exchanged(s: State, n: Tensor) -> Tensor:
    y = s.apart(n)
    return s.linear((y + y.roll(1, 1) * y.flip(0)).flatten(0, 2))


@branch
def rows_apart(s: State, n: Tensor) -> Tensor:
    return s.linear(torch.cat([s.linear(y) for y in n.split(1)]))


@branch
def frames_before_clips(s: State, n: Tensor) -> Tensor:
    y = s.apart(n).transpose(0, 1)
    z = F.gelu(s.linear(y.flatten(0, 2))).unflatten(0, y.shape[:3])
    return s.linear(z.transpose(0, 1)).flatten(0, 2)


# -- streams --------------------------------------------------------------------------------------


@step
def long_skip(s: State) -> None:
    s.x = s.x + s.first


@step
def skip_to_earlier(s: State) -> None:
    s.kept.append(s.x)
    s.x = s.kept[0] + s.x


@step
def long_concatenation(s: State) -> None:
    s.x = s.linear(s.x) + s.linear(torch.cat([s.x, s.first], -1)[..., 4 : 4 + C])


@step
def second_stream(s: State) -> None:
    """Another sequence of as many tokens, with a branch of its own, joins."""
    s.other = s.other + s.linear(F.gelu(s.linear(s.norm(s.other))))
    s.x = s.other + s.x


@step
def two_in_one(s: State) -> None:
    """Two branches that read one value."""
    n = s.norm(s.x)
    s.x = s.x + sdpa(s.linear(n), s.linear(n), s.linear(n))
    s.x = s.x + sdpa(s.linear(n), s.linear(n), s.linear(n))


@step
def parallel(s: State) -> None:
    n = s.norm(s.x)
    s.x = s.x + s.linear(torch.cat([s.linear(n), sdpa(n, n, s.linear(n))], -1)[..., 3 : 3 + C])


@step
def halved(s: State) -> None:
    s.x = s.x * 0.7 + s.linear(F.gelu(s.linear(s.norm(s.x))))


@step
def picture_in_between(s: State) -> None:
    y = s.x.mT.unflatten(2, GRID)
    s.x = (y + F.avg_pool2d(y, 3, 1, 1)).flatten(2).mT


class Chain(nn.Module):
    """A model of some steps."""

    def __init__(self, names: list[str], rows: tuple[int, int, int]) -> None:
        super().__init__()
        self.names, self.rows = names, rows
        self.layers = nn.ModuleList(nn.Linear(C, C) for _ in range(11))
        self.register_buffer("table", torch.randn(N, C))

    def forward(self, hidden_states: Tensor, text: Tensor, other: Tensor) -> Any:
        x = hidden_states
        s = State(x, text, other, self.table, x, self.rows, self.layers)
        for name in self.names:
            STEPS[name](s)
        return s.x, s.text, s.other


def check(seed: int) -> Counter[str]:
    """Both scopes of a random model; how often something merged."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows = rng.choice([(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 2, 2)])
    names = rng.choices(list(STEPS), k=rng.randint(1, 4)) + ["mlp"] * rng.randint(0, 1)
    model = Chain(names, rows).double().eval().requires_grad_(False)
    sizes = {"hidden_states": N, "text": TEXT, "other": N}
    inputs = {k: torch.randn(rows[0] * rows[1] * rows[2], n, C).double() for k, n in sizes.items()}
    captured = capture(model, (), inputs)
    results: Counter[str] = Counter()
    planned = (captured, *analyze(captured, GRID))
    for scope in ("sublayer", "block", "stack"):
        config = ToMAConfig(window="global", min_tokens=1, scope=scope)  # type: ignore[arg-type]
        try:
            plan = make_plan(*planned[1:], config)
        except TomaError:
            results["nothing merges"] += 1
            continue
        got = program_output(planned, keep_all(plan), inputs, permutation)
        expected = model(**inputs)[0]
        error = denoisers.relative(got, expected)
        assert error < 1e-5, f"seed {seed}, {names}, rows {rows}, {scope}: {error:.1e}"
        results.update(names)
        results["merged"] += 1
    return results


@pytest.mark.parametrize("examples", [25, 2000])
@torch.no_grad()
def test_random_modules_are_right_or_refused(examples: int) -> None:
    """No rewrite fails half-way, and none is wrong."""
    results: Counter[str] = Counter()
    for seed in range(examples):
        results += check(seed)
    assert results["merged"] > results["nothing merges"], results

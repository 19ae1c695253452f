"""Random transformers whose sizes coincide: a rewrite is right or refused, never wrong.

Two oracles: a permutation of the tokens must give the original output at every scope, and merging
with arbitrary dense matrices must equal an eager run that merges by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import gelu, one_hot, scaled_dot_product_attention

from tests import denoisers
from tests.zoo.check import keep_all
from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.facts import Analysis
from toma_fx.analysis.propagate import analyze
from toma_fx.capture.model import Captured, capture, flatten_call
from toma_fx.errors import TomaError
from toma_fx.methods.toma import ToMAConfig
from toma_fx.passes.pipeline import rewrite
from toma_fx.passes.uses import REUSE
from toma_fx.plan.plan import MergePlan, PatternGroup
from toma_fx.plan.planner import make_plan

TOLERANCE = 1e-5
SCOPES = ("sublayer", "block", "stack")
Patterns = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Spec:
    """A transformer: its sizes, and how its attention is written.

    Attributes:
        mode: "none" (no text), "sequence" (one sequence of text and image), "joint" (two streams
            that meet in attention), "cross" (a cross-attention to text in each block).
        qkv: "separate", or one linear map taken apart by "chunk", "unbind" or "permute".
        split: op that makes the heads. infer: size that this op infers ("" for none).
        fold: whether heads join the batch before attention.
        table: shape of the factors of q and k: "", "before" [1, N, 1, D], "after" [N, D].
        mask: "", "one" [1, 1, N, N], "each" [B, 1, N, N] or "bool" [1, 1, N, N].
        position: whether the ids are mapped to channels and added to the image.
    """

    batch: int = 2
    grid: tuple[int, int] = (4, 4)
    text: int = 0
    mode: str = "none"
    first: bool = True
    heads: int = 2
    width: int = 4
    qkv: str = "separate"
    split: str = "view"
    infer: str = ""
    fold: bool = False
    table: str = ""
    mask: str = ""
    mlp: bool = True
    blocks: int = 1
    position: bool = False

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def channels(self) -> int:
        return self.heads * self.width

    @property
    def total(self) -> int:
        return self.tokens + (self.text if self.mode in ("sequence", "joint") else 0)


@dataclass(frozen=True)
class Merge:
    """Dense matrices [B, M, N] and [B, N, M], destinations [B, M], and the modules that merge."""

    merge: Tensor
    unmerge: Tensor
    destinations: Tensor
    paths: frozenset[str]
    spec: Spec

    def around(self, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """`run` on the image part of the stream."""
        if self.spec.mode != "sequence":
            return run(x)
        text, size = self.spec.text, x.shape[1]
        if self.spec.first:
            return torch.cat([x[:, :text], run(x[:, text:])], 1)
        return torch.cat([run(x[:, : size - text]), x[:, size - text :]], 1)

    def enter(self, x: Tensor) -> Tensor:
        return self.around(x, lambda image: self.merge @ image)

    def leave(self, x: Tensor) -> Tensor:
        return self.around(x, lambda image: self.unmerge @ image)

    def kept(self, b: int) -> Tensor:
        """Rows of the whole sequence that stay, for one batch element."""
        spec, count = self.spec, self.spec.total - self.spec.tokens
        if spec.first:
            return torch.cat([torch.arange(count), count + self.destinations[b]])
        return torch.cat([self.destinations[b], spec.tokens + torch.arange(count)])

    def table(self, table: Tensor | None) -> Tensor | None:
        """[1, N, 1, D] -> [B, M, 1, D], [N, D] -> [B, 1, M, D]."""
        if table is None:
            return None
        each = range(self.spec.batch)
        if table.dim() == 4:
            return torch.stack([table[0, self.kept(b)] for b in each])
        return torch.stack([table[self.kept(b)][None] for b in each])

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """[1 or B, 1, N, N] -> [B, 1, M, M]."""
        if mask is None:
            return None
        whole = mask.expand(self.spec.batch, -1, -1, -1)
        rows = [whole[b][:, self.kept(b)][:, :, self.kept(b)] for b in range(self.spec.batch)]
        return torch.stack(rows)


class Attention(nn.Module):
    """Attention in one of many spellings."""

    def __init__(self, spec: Spec, cross: bool = False) -> None:
        super().__init__()
        c, self.spec = spec.channels, spec
        self.fused = spec.qkv != "separate" and not cross
        if self.fused:
            self.qkv = nn.Linear(c, 3 * c)
        else:
            self.q, self.k, self.v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.out = nn.Linear(c, c)
        if spec.mode == "joint" and not cross:
            self.text_qkv, self.text_out = nn.Linear(c, 3 * c), nn.Linear(c, c)

    def heads(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, heads, width]."""
        (b, n, _), h, d = x.shape, self.spec.heads, self.spec.width
        sizes = {
            "batch": (-1, n, h, d),
            "tokens": (b, -1, h, d),
            "heads": (b, n, -1, d),
            "width": (b, n, h, -1),
        }.get(self.spec.infer, (b, n, h, d))
        if self.spec.split == "unflatten":
            return x.unflatten(-1, sizes[2:])
        return x.view(sizes) if self.spec.split == "view" else x.reshape(sizes)

    def joined(self, x: Tensor) -> Tensor:
        """[B, heads, N, width] -> [B, N, C]."""
        b, h, n, d = x.shape
        x = x.transpose(1, 2)
        if self.spec.split == "unflatten":
            return x.flatten(2)
        last = -1 if self.spec.infer in ("heads", "width") else h * d
        sizes = {"batch": (-1, n, last), "tokens": (b, -1, last)}.get(self.spec.infer, (b, n, last))
        return x.contiguous().view(sizes) if self.spec.split == "view" else x.reshape(sizes)

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, each [B, N, heads, width]."""
        if not self.fused:
            return self.heads(self.q(x)), self.heads(self.k(source)), self.heads(self.v(source))
        qkv, (b, n, _) = self.qkv(x), x.shape
        if self.spec.qkv == "chunk":
            return tuple(self.heads(part) for part in qkv.chunk(3, dim=-1))
        rows = -1 if self.spec.infer == "tokens" else n
        parts = qkv.view(b, rows, 3, self.spec.heads, self.spec.width)
        if self.spec.qkv == "unbind":
            return parts.unbind(2)
        return tuple(part.transpose(1, 2) for part in parts.permute(2, 0, 3, 1, 4).unbind(0))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, table: Any, mask: Any) -> Tensor:
        """Attention of [B, N, heads, width], as [B, heads, N, width]."""
        (b, _, h, d), m = q.shape, k.shape[1]
        if table is not None and self.spec.table == "before":
            q, k, table = q * table, k * table, None
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if not self.spec.fold or mask is not None:
            if table is not None:
                q, k = q * table, k * table
            return scaled_dot_product_attention(q, k, v, attn_mask=mask)
        n = q.shape[2]
        q, k, v = q.reshape(b * h, n, d), k.reshape(b * h, m, d), v.reshape(b * h, m, d)
        if table is not None:
            table = table.expand(-1, h, -1, -1).flatten(0, 1) if table.dim() == 4 else table
            q, k = q * table, k * table
        return scaled_dot_product_attention(q, k, v).view(b, h, n, d)

    def forward(
        self, x: Tensor, text: Tensor | None = None, table: Any = None, mask: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention, cross-attention to `text`, or both streams of joint attention."""
        if not hasattr(self, "text_qkv"):
            q, k, v = self.project(x, x if text is None else text)
            return self.out(self.joined(self.attend(q, k, v, table, mask))), None
        assert text is not None
        image, other = self.project(x, x), map(self.heads, self.text_qkv(text).chunk(3, -1))
        ordered = (other, image) if self.spec.first else (image, other)
        pairs = zip(*ordered, strict=True)
        both = self.joined(self.attend(*(torch.cat(pair, 1) for pair in pairs), table, mask))
        image_size, text_size = x.shape[1], text.shape[1]
        if self.spec.first:
            told, seen = both[:, :text_size], both[:, text_size:]
        elif self.spec.infer:
            seen, told = both.split([image_size, text_size], 1)
        else:
            seen, told = both[:, :image_size], both[:, image_size:]
        return self.out(seen), self.text_out(told)


class Mlp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(channels, 3 * channels), nn.Linear(3 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm residual branches; those named in `merge.paths` merge."""

    def __init__(self, spec: Spec, path: str) -> None:
        super().__init__()
        self.path, norm = path, lambda: nn.LayerNorm(spec.channels)
        self.attn, self.norm1 = Attention(spec), norm()
        if spec.mode == "joint":
            self.text_norm = norm()
        if spec.mode == "cross":
            self.cross, self.norm2 = Attention(spec, cross=True), norm()
        if spec.mlp:
            self.mlp, self.norm3 = Mlp(spec.channels), norm()

    def forward(
        self, x: Tensor, text: Any, table: Any, mask: Any, merge: Merge | None
    ) -> tuple[Tensor, Any]:
        def branch(name: str, norm: nn.Module, run: Callable[[Tensor, bool], Tensor]) -> Tensor:
            if merge is None or f"{self.path}.{name}" not in merge.paths:
                return run(norm(x), False)
            return merge.leave(run(merge.enter(norm(x)), True))

        told = None

        def attend(n: Tensor, merged: bool) -> Tensor:
            nonlocal told
            rows = merge.table(table) if merged and merge else table
            visible = merge.mask(mask) if merged and merge else mask
            normed = self.text_norm(text) if hasattr(self, "text_norm") else None
            seen, told = self.attn(n, normed, rows, visible)
            return seen

        x = x + branch("attn", self.norm1, attend)
        text = text if told is None else text + told
        if hasattr(self, "cross"):
            x = x + branch("cross", self.norm2, lambda n, _: self.cross(n, text)[0])
        if hasattr(self, "mlp"):
            x = x + branch("mlp", self.norm3, lambda n, _: self.mlp(n))
        return x, text


class Transformer(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.blocks = nn.ModuleList(Block(spec, f"blocks.{i}") for i in range(spec.blocks))
        self.place, self.final = nn.Linear(3, spec.channels), nn.Linear(spec.channels, 3)

    def forward(
        self,
        x: Tensor,
        ids: Tensor,
        text: Tensor | None = None,
        table: Tensor | None = None,
        mask: Tensor | None = None,
        merge: Merge | None = None,
    ) -> Tensor:
        tokens = x.shape[1]
        if self.spec.position:
            x = x + self.place(ids)
        if self.spec.mode == "sequence":
            assert text is not None
            x = torch.cat([text, x] if self.spec.first else [x, text], 1)
        for block in self.blocks:
            x, text = block(x, text, table, mask, merge)
        if self.spec.mode == "sequence":
            x = x[:, x.shape[1] - tokens :] if self.spec.first else x[:, :tokens]
        return self.final(x)


def build(spec: Spec) -> tuple[Transformer, dict[str, Tensor]]:
    """A model in double precision with a call of it."""
    torch.manual_seed(0)
    model = Transformer(spec).double().eval().requires_grad_(False)
    x = torch.randn(spec.batch, spec.tokens, spec.channels)
    inputs = {"x": x, "ids": denoisers.ids(*spec.grid)}
    if spec.mode != "none":
        inputs["text"] = torch.randn(spec.batch, spec.text, spec.channels)
    n, d = spec.total, spec.width
    if spec.table:
        inputs["table"] = torch.randn((1, n, 1, d) if spec.table == "before" else (n, d))
    if spec.mask:
        mask = torch.randn(spec.batch if spec.mask == "each" else 1, 1, n, n)
        seen = (mask > 0) | torch.eye(n, dtype=torch.bool)
        inputs["mask"] = seen if spec.mask == "bool" else mask
    return model, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


Planned = tuple[Captured, Analysis, Flow]


def program_output(
    planned: Planned, plan: MergePlan, inputs: dict[str, Tensor], make: Callable[..., Patterns]
) -> Tensor:
    """Output of the reuse program on the patterns that `make` gives each group."""
    program = rewrite(*planned, plan, REUSE)
    patterns = [part for group in plan.groups for part in make(group)]
    return program.graph_module(*flatten_call((), inputs)[0], *patterns)[0]


def permutation(group: PatternGroup) -> Patterns:
    """A pattern that permutes the tokens of each window."""
    s = group.setting
    tokens = s.tile[0] * s.tile[1]
    generator = torch.Generator().manual_seed(3)
    order = torch.rand(group.batch, s.windows, tokens, generator=generator).argsort(-1)
    matrix = one_hot(order, tokens).double()
    return order, matrix, matrix.transpose(-1, -2).contiguous()


def dense(group: PatternGroup) -> Patterns:
    """Arbitrary destinations and matrices for one window of all tokens."""
    s = group.setting
    generator = torch.Generator().manual_seed(4)
    order = torch.rand(group.batch, 1, s.grid[0] * s.grid[1], generator=generator).argsort(-1)
    idx = order[..., : s.keep]
    merge = torch.rand(group.batch, 1, s.keep, order.shape[-1], generator=generator).double()
    unmerge = torch.rand(group.batch, 1, order.shape[-1], s.keep, generator=generator).double()
    return idx, merge.softmax(-1), unmerge.softmax(-1)


def eager_output(model: Transformer, plan: MergePlan, inputs: dict[str, Tensor]) -> Tensor:
    """The model merging by itself in the branches of the plan."""
    idx, merge, unmerge = dense(plan.groups[0])
    paths = frozenset(path for segment in plan.segments for path in segment.modules)
    return model(**inputs, merge=Merge(merge[:, 0], unmerge[:, 0], idx[:, 0], paths, model.spec))


@torch.no_grad()
def check(spec: Spec, scope: str) -> int:
    """Both oracles; returns the number of merged branches, 0 for a refusal."""
    model, inputs = build(spec)
    captured = capture(model, (), inputs)
    planned = (captured, *analyze(captured, spec.grid))
    config = ToMAConfig(window="global", min_tokens=1, scope=scope)  # type: ignore[arg-type]
    small = replace(config, scope="sublayer")
    try:
        plans = make_plan(*planned[1:], config), make_plan(*planned[1:], small)
        permuted = program_output(planned, keep_all(plans[0]), inputs, permutation)
        merged = program_output(planned, plans[1], inputs, dense)
    except TomaError:
        return 0
    plain = model(**inputs)
    assert denoisers.relative(permuted, plain) < TOLERANCE, f"permuted tokens, {plans[0].segments}"
    assert denoisers.relative(merged, eager_output(model, plans[1], inputs)) < TOLERANCE
    return sum(len(segment.branches) for segment in plans[1].segments)


def branches(spec: Spec) -> int:
    """Number of residual branches of the image."""
    return spec.blocks * (1 + spec.mlp + (spec.mode == "cross"))


@st.composite
def specs(draw: Callable[..., Any]) -> Spec:
    """Transformers whose sizes are often equal."""
    sides = st.sampled_from([2, 2, 3, 4, 4, 5, 8])
    batch, grid = draw(st.integers(1, 3)), (draw(sides), draw(sides))
    tokens = grid[0] * grid[1]
    mode = draw(st.sampled_from(["none", "sequence", "joint", "cross"]))
    text = 0 if mode == "none" else draw(st.sampled_from([1, 2, 3, 5, min(grid[1], 5), batch]))
    total = tokens + (text if mode in ("sequence", "joint") else 0)
    heads = draw(st.sampled_from([1, 2, 3, batch, min(grid)]))
    # head width or channels equal to a number of tokens
    width = draw(st.sampled_from([4, tokens, total, max(2, tokens // heads), heads + 1]))
    mask = draw(st.sampled_from(["", "", "one", "each", "bool"]))
    return Spec(
        batch, grid, text, mode, draw(st.booleans()), heads, width,
        qkv=draw(st.sampled_from(["separate", "chunk", "unbind", "permute"])),
        split=draw(st.sampled_from(["view", "reshape", "unflatten"])),
        infer=draw(st.sampled_from(["", "batch", "tokens", "heads", "width"])),
        fold=not mask and draw(st.booleans()) and draw(st.booleans()),
        table=draw(st.sampled_from(["", "before", "after"])),
        mask=mask,
        mlp=draw(st.booleans()),
        blocks=draw(st.integers(1, 2)),
        position=draw(st.booleans()),
    )  # fmt: skip


@pytest.mark.parametrize("examples", [12, 40])
def test_right_or_refused(examples: int) -> None:
    accepted: list[bool] = []

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(spec=specs(), scope=st.sampled_from(SCOPES))
    def run(spec: Spec, scope: str) -> None:
        accepted.append(check(spec, scope) > 0)

    run()
    assert sum(accepted) > 0.75 * len(accepted), "too many are refused to prove anything"


def plain_cases() -> Iterator[Spec]:
    """Common spellings, with sizes that coincide, that must merge whole."""
    yield Spec(infer="batch")
    yield Spec(width=16, infer="tokens", split="reshape", table="after", mask="each")
    yield Spec(heads=4, width=4, qkv="chunk", split="unflatten", table="before")
    yield Spec(batch=1, grid=(2, 2), heads=1, width=4, qkv="unbind", mask="one")
    yield Spec(batch=3, grid=(3, 5), heads=3, width=5, mode="sequence", text=5, mask="bool")
    yield Spec(mode="sequence", text=4, first=False, table="after", qkv="permute", blocks=2)
    yield Spec(mode="joint", text=5, width=21, heads=1, table="after", mask="each", infer="width")
    yield Spec(mode="joint", text=3, first=False, table="before", split="reshape", blocks=2)
    yield Spec(mode="cross", text=4, grid=(4, 8), width=32, position=True, infer="heads")
    yield Spec(mode="cross", text=2, grid=(8, 2), fold=True, heads=1, mlp=False)


@pytest.mark.parametrize("spec", plain_cases(), ids=lambda s: f"{s.mode}-{s.qkv}-{s.split}")
def test_common_spellings_merge_whole(spec: Spec) -> None:
    assert check(spec, "stack") == branches(spec)


# -- odd branches ---------------------------------------------------------------------------------


class Odd(nn.Module):
    """A residual branch given as a function of (module, normalized x), then an MLP."""

    def __init__(self, run: Callable[[Odd, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8), Mlp(8)
        self.norm1, self.norm2, self.run = nn.LayerNorm(8), nn.LayerNorm(8), run
        self.register_buffer("vector", torch.randn(8))
        self.register_buffer("rows", torch.randn(1, 16, 8))
        self.register_buffer("bias", torch.randn(2, 16, 16))

    def attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q = self.up(x).view(2, 16, 2, 4).transpose(1, 2)
        out = scaled_dot_product_attention(q, q, q, attn_mask=mask)
        return self.down(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.run(self, self.norm1(x))
        return x + self.mlp(self.norm2(x))


def between(change: Callable[[Tensor], Tensor]) -> Callable[[Odd, Tensor], Tensor]:
    """A branch with `change` between two linear maps."""
    return lambda m, n: m.down(change(m.up(n)))


def swapped(u: Tensor) -> Tensor:
    first, second = u.chunk(2, 0)
    return torch.cat([second, first], 0)


def doubled_in_place(n: Tensor) -> Tensor:
    n[..., :4].mul_(2.0)
    return n


def in_folded_heads(m: Odd, u: Tensor) -> Tensor:
    """`u` times a table, while its heads are part of the batch."""
    folded = u.view(2, 16, 2, 4).transpose(1, 2).flatten(0, 1) * m.rows[0, :, :4]
    return u * folded.unflatten(0, (2, 2)).transpose(1, 2).flatten(2)


ODD: dict[str, Callable[[Odd, Tensor], Tensor]] = {
    "mask of two dimensions": (lambda m, n: m.attention(n, m.bias[0])),
    "mask of three dimensions": (lambda m, n: m.attention(n, m.bias)),
    "bias a head": (lambda m, n: m.attention(n, m.bias[None])),
    "expanded bias": (lambda m, n: m.attention(n, m.bias[None].expand(2, -1, -1, -1))),
    "mask of keys": (lambda m, n: m.attention(n, m.bias[:, None, :1])),
    "arange": (between(lambda u: u * torch.arange(16)[:, None])),
    "mean over tokens": (between(lambda u: u - u.mean(1, keepdim=True))),
    "flipped tokens": (between(lambda u: u * u.flip(1))),
    "flipped batch": (between(lambda u: u * u.flip(0))),
    "part in place": (between(doubled_in_place)),
    "all in place": (lambda m, n: m.mlp(n.mul_(2.0))),
    "heads before batch": (
        lambda m, n: m.down(
            scaled_dot_product_attention(*[m.up(n).view(2, 16, 2, 4).permute(2, 0, 1, 3)] * 3)
            .permute(1, 2, 0, 3)
            .flatten(2)
        )
    ),
    "attention over the batch": (
        lambda m, n: m.down(
            scaled_dot_product_attention(*[m.up(n).transpose(0, 1)] * 3).transpose(0, 1)
        )
    ),
    "mean over the batch": (between(lambda u: u - u.mean(0, keepdim=True))),
    "first of the batch": (between(lambda u: u - u[:1])),
    "one of the batch": (between(lambda u: u - u[0])),
    "softmax over the batch": (between(lambda u: u.softmax(0))),
    "sum along the batch": (between(lambda u: u.cumsum(0))),
    "swapped batch": (between(lambda u: u * swapped(u))),
    "repeated batch": (between(lambda u: u * u.repeat(2, 1, 1)[1:3])),
    "table on folded heads": (lambda m, n: m.down(in_folded_heads(m, m.up(n)))),
    "entry in place": (lambda m, n: m.mlp(doubled_in_place(n))),
    "product with a vector": (
        lambda m, n: torch.sigmoid(m.up(n) @ m.vector).unsqueeze(-1) * m.mlp(n)
    ),
}


@pytest.mark.parametrize("run", ODD.values(), ids=ODD)
@torch.no_grad()
def test_odd_branches_are_right_or_refused(run: Callable[[Odd, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Odd(run).double().eval().requires_grad_(False)
    inputs = {"x": torch.randn(2, 16, 8).double()}
    captured = capture(model, (), inputs)
    planned = (captured, *analyze(captured, (4, 4)))
    plan = make_plan(*planned[1:], ToMAConfig(window="global", min_tokens=1))
    assert plan.segments, "the MLP merges whatever the branch is"
    try:
        got = program_output(planned, keep_all(plan), inputs, permutation)
    except TomaError:
        return
    assert denoisers.relative(got, model(**inputs)) < TOLERANCE

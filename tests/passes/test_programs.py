"""What carrying out a plan changes in a graph, for every scope and every kind of program.

The method is a toy whose functions are a few operators each, so that the changes can be read.
"""
# ruff: noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from difflib import unified_diff
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import toma_fx
from toma_fx.analysis.propagate import analyze
from toma_fx.capture.model import capture
from toma_fx.graph.printing import print_node
from toma_fx.methods.base import Scope
from toma_fx.methods.setting import Pattern
from toma_fx.passes.pipeline import Program, rewrite
from toma_fx.passes.uses import REFRESH, uses_of
from toma_fx.plan.planner import make_plan

N, C = 16, 8
SHAPES = (2, N, C), (2, N, C), (N, C)


@dataclass(frozen=True)
class Attending(toma_fx.Setting):
    """The largest half of the tokens stay and take what they attend to."""

    chosen: ClassVar = ("idx",)
    weighed: ClassVar = ("share",)
    merged_count: ClassVar = N // 2

    def describe(self) -> str:
        return "half"

    def select(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x.amax(-1).argsort(-1).narrow(-1, 0, self.merged_count),)

    def weights(self, x: Tensor, chosen: Pattern) -> tuple[Tensor, ...]:
        staying = torch.take_along_dim(x, chosen["idx"].unsqueeze(-1), 1)
        return ((staying @ x.mT).softmax(-1),)

    def merge(self, x: Tensor, pattern: Pattern) -> Tensor:
        return pattern["share"] @ x

    def unmerge(self, y: Tensor, pattern: Pattern) -> Tensor:
        return pattern["share"].mT @ y

    def positions(self, pattern: Pattern) -> Tensor:
        return pattern["idx"]


@dataclass(frozen=True, kw_only=True)
class AttendingConfig(toma_fx.MethodConfig):
    """The toy as a method; `keys` merges keys and values only."""

    name: ClassVar[str] = "attending"

    def setting(self, place: toma_fx.Place) -> Attending:
        return Attending(place.grid)


@dataclass(frozen=True, kw_only=True)
class KeysConfig(AttendingConfig):
    """The toy for keys and values alone."""

    name: ClassVar[str] = "keys"
    scope: Scope = "keys"


class Block(nn.Module):
    """Attention with a table of positions, and an MLP; each follows a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.q, self.k, self.v, self.out, self.up, self.down = (
            nn.Linear(C, C, bias=False) for _ in range(6)
        )

    def forward(self, x: Tensor, table: Tensor | None) -> Tensor:
        n = self.norm(x)
        x = x + self.out(self.attention(n, n, table).reshape(2, N, C))
        return x + self.mlp(x)

    def attention(self, n: Tensor, keys: Tensor, table: Tensor | None) -> Tensor:
        q = self.q(n) if table is None else self.q(n) * table
        return F.scaled_dot_product_attention(q, self.k(keys), self.v(keys))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm2(x)).relu())


class Net(nn.Module):
    """Blocks, one after the other."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, table)
        return x


SEEDED = torch.Generator().manual_seed(1)
X, Y, TABLE = (torch.randn(*shape, generator=SEEDED) for shape in SHAPES)


def programs(
    config: toma_fx.MethodConfig, *uses: Any, blocks: int = 1, table: bool = False
) -> tuple[Any, Any, list[Program]]:
    """The model, its captured graph, and programs of its plan."""
    torch.manual_seed(0)
    model = Net(blocks).eval().requires_grad_(False)
    captured = capture(model, (X, TABLE) if table else (X,), {})
    analysis, flow = analyze(captured, grid=(4, 4))
    plan = make_plan(analysis, flow, config)
    assert {s.scope for s in plan.segments} == {config.scope}
    rows = uses_of(config)
    results = [rewrite(captured, analysis, flow, plan, rows[use]) for use in uses]
    return model, captured.graph_module.graph, results


def lines(graph: fx.Graph) -> list[str]:
    """Calls without their types, and what is returned."""
    calls = [n for n in graph.nodes if n.op == "call_function"]
    texts = [f"{n.name} = {print_node(n).partition(' = ')[2]}" for n in calls]
    return [*texts, print_node(graph.output_node())]


def changes(before: fx.Graph, after: fx.Graph) -> str:
    """Lines that went (-) and came (+), in order."""
    diff = [x for x in unified_diff(lines(before), lines(after), n=0, lineterm="") if x[:2] != "@@"]
    return "\n".join(x[0] + " " + x[1:] for x in diff[2:])


BOTH: Any = ("attention", "mlp")
SCOPES = {
    "sublayer": (AttendingConfig(), 1, """\
+ unsqueeze_default = aten.unsqueeze(table, 0)
+ to_dtype_layout = aten.to.dtype_layout(pattern_p0_idx, dtype=torch.int64, layout=torch.strided, device=cpu)
+ reshape_default = aten.reshape(to_dtype_layout, [2, 8, 1])
+ expand_default = aten.expand(unsqueeze_default, [2, 16, 8])
+ take_along_dim_default = aten.take_along_dim(expand_default, reshape_default, 1)
- linear = aten.linear(layer_norm, blocks_0_q_weight)
- mul = aten.mul.Tensor(linear, table)
- linear_1 = aten.linear(layer_norm, blocks_0_k_weight)
- linear_2 = aten.linear(layer_norm, blocks_0_v_weight)
+ matmul_default = aten.matmul(pattern_p0_share, layer_norm)
+ linear = aten.linear(matmul_default, blocks_0_q_weight)
+ mul = aten.mul.Tensor(linear, take_along_dim_default)
+ linear_1 = aten.linear(matmul_default, blocks_0_k_weight)
+ linear_2 = aten.linear(matmul_default, blocks_0_v_weight)
- reshape = aten.reshape(scaled_dot_product_attention, [2, 16, 8])
+ reshape = aten.reshape(scaled_dot_product_attention, [2, 8, 8])
- add = aten.add.Tensor(x, linear_3)
+ m_t_default = aten.mT(pattern_p0_share)
+ matmul_default_1 = aten.matmul(m_t_default, linear_3)
+ add = aten.add.Tensor(x, matmul_default_1)"""),
    "block": (AttendingConfig(scope="block", branches=BOTH), 1, """\
- layer_norm = aten.layer_norm(x, [8], blocks_0_norm_weight, None, 1e-05, False)
+ unsqueeze_default = aten.unsqueeze(table, 0)
+ to_dtype_layout = aten.to.dtype_layout(pattern_p0_idx, dtype=torch.int64, layout=torch.strided, device=cpu)
+ reshape_default = aten.reshape(to_dtype_layout, [2, 8, 1])
+ expand_default = aten.expand(unsqueeze_default, [2, 16, 8])
+ take_along_dim_default = aten.take_along_dim(expand_default, reshape_default, 1)
+ matmul_default = aten.matmul(pattern_p0_share, x)
+ layer_norm = aten.layer_norm(matmul_default, [8], blocks_0_norm_weight, None, 1e-05, False)
- mul = aten.mul.Tensor(linear, table)
+ mul = aten.mul.Tensor(linear, take_along_dim_default)
- reshape = aten.reshape(scaled_dot_product_attention, [2, 16, 8])
+ reshape = aten.reshape(scaled_dot_product_attention, [2, 8, 8])
- add = aten.add.Tensor(x, linear_3)
+ add = aten.add.Tensor(matmul_default, linear_3)
- return (add_1)
+ sub_tensor = aten.sub.Tensor(add_1, matmul_default)
+ m_t_default = aten.mT(pattern_p0_share)
+ matmul_default_1 = aten.matmul(m_t_default, sub_tensor)
+ add_tensor = aten.add.Tensor(x, matmul_default_1)
+ return (add_tensor)"""),
    "stack": (AttendingConfig(scope="stack", share="stream", branches=BOTH), 2, """\
- layer_norm = aten.layer_norm(x, [8], blocks_0_norm_weight, None, 1e-05, False)
+ unsqueeze_default = aten.unsqueeze(table, 0)
+ to_dtype_layout = aten.to.dtype_layout(pattern_p0_idx, dtype=torch.int64, layout=torch.strided, device=cpu)
+ reshape_default = aten.reshape(to_dtype_layout, [2, 8, 1])
+ expand_default = aten.expand(unsqueeze_default, [2, 16, 8])
+ take_along_dim_default = aten.take_along_dim(expand_default, reshape_default, 1)
+ matmul_default = aten.matmul(pattern_p0_share, x)
+ layer_norm = aten.layer_norm(matmul_default, [8], blocks_0_norm_weight, None, 1e-05, False)
- mul = aten.mul.Tensor(linear, table)
+ mul = aten.mul.Tensor(linear, take_along_dim_default)
- reshape = aten.reshape(scaled_dot_product_attention, [2, 16, 8])
+ reshape = aten.reshape(scaled_dot_product_attention, [2, 8, 8])
- add = aten.add.Tensor(x, linear_3)
+ add = aten.add.Tensor(matmul_default, linear_3)
- mul_1 = aten.mul.Tensor(linear_6, table)
+ mul_1 = aten.mul.Tensor(linear_6, take_along_dim_default)
- reshape_1 = aten.reshape(scaled_dot_product_attention_1, [2, 16, 8])
+ reshape_1 = aten.reshape(scaled_dot_product_attention_1, [2, 8, 8])
- return (add_3)
+ sub_tensor = aten.sub.Tensor(add_3, matmul_default)
+ m_t_default = aten.mT(pattern_p0_share)
+ matmul_default_1 = aten.matmul(m_t_default, sub_tensor)
+ add_tensor = aten.add.Tensor(x, matmul_default_1)
+ return (add_tensor)"""),
    "keys": (KeysConfig(), 1, """\
+ matmul_default = aten.matmul(pattern_p0_share, layer_norm)
- linear_1 = aten.linear(layer_norm, blocks_0_k_weight)
- linear_2 = aten.linear(layer_norm, blocks_0_v_weight)
+ linear_1 = aten.linear(matmul_default, blocks_0_k_weight)
+ linear_2 = aten.linear(matmul_default, blocks_0_v_weight)"""),
}  # fmt: skip


def test_the_graph_before() -> None:
    _, graph, _ = programs(AttendingConfig(), table=True)
    assert lines(graph) == [
        "layer_norm = aten.layer_norm(x, [8], blocks_0_norm_weight, None, 1e-05, False)",
        "linear = aten.linear(layer_norm, blocks_0_q_weight)",
        "mul = aten.mul.Tensor(linear, table)",
        "linear_1 = aten.linear(layer_norm, blocks_0_k_weight)",
        "linear_2 = aten.linear(layer_norm, blocks_0_v_weight)",
        "scaled_dot_product_attention = aten.scaled_dot_product_attention(mul, linear_1, linear_2)",
        "reshape = aten.reshape(scaled_dot_product_attention, [2, 16, 8])",
        "linear_3 = aten.linear(reshape, blocks_0_out_weight)",
        "add = aten.add.Tensor(x, linear_3)",
        "layer_norm_1 = aten.layer_norm(add, [8], blocks_0_norm2_weight, None, 1e-05, False)",
        "linear_4 = aten.linear(layer_norm_1, blocks_0_up_weight)",
        "relu = aten.relu(linear_4)",
        "linear_5 = aten.linear(relu, blocks_0_down_weight)",
        "add_1 = aten.add.Tensor(add, linear_5)",
        "return (add_1)",
    ]


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_changes_the_graph(scope: str) -> None:
    """Merging in front of a segment, unmerging behind it, positions of the tokens that stay."""
    config, blocks, expected = SCOPES[scope]
    _, before, (program,) = programs(config, "reuse", blocks=blocks, table=True)
    assert changes(before, program.graph_module.graph).splitlines() == expected.splitlines()


def eager(scope: str, model: Net, idx: Tensor, share: Tensor) -> Tensor:
    """What each scope computes, written out."""
    first = model.blocks[0]
    assert isinstance(first, Block)
    table = torch.take_along_dim(TABLE.expand(2, N, C), idx.unsqueeze(-1), 1)
    n = first.norm(X)
    if scope == "keys":
        x = X + first.out(first.attention(n, share @ n, TABLE))
        return x + first.mlp(x)
    if scope == "sublayer":
        x = X + share.mT @ first.out(first.attention(share @ n, share @ n, table))
        return x + first.mlp(x)
    x = share @ X
    for block in model.blocks:
        assert isinstance(block, Block)
        n = block.norm(x)
        x = x + block.out(block.attention(n, n, table))
        x = x + block.mlp(x)
    return X + share.mT @ (x - share @ X)


@pytest.mark.parametrize("scope", SCOPES)
@torch.no_grad()
def test_a_scope_computes_what_it_says(scope: str) -> None:
    config, blocks, _ = SCOPES[scope]
    model, _, (program,) = programs(config, "reuse", blocks=blocks, table=True)
    idx = torch.tensor([[0, 2, 3, 5, 7, 8, 11, 13], [1, 2, 4, 6, 9, 10, 14, 15]])
    share = torch.randn(2, N // 2, N, generator=torch.Generator().manual_seed(2)).softmax(-1)
    (got,) = program.graph_module(X, TABLE, idx, share)
    torch.testing.assert_close(got, eager(scope, model, idx, share), rtol=0, atol=2e-6)
    assert (got - model(X, TABLE)).abs().max() > 1e-2, "merging changes the output"


USES = {
    "refresh": """\
- linear = aten.linear(layer_norm, blocks_0_q_weight)
- linear_1 = aten.linear(layer_norm, blocks_0_k_weight)
- linear_2 = aten.linear(layer_norm, blocks_0_v_weight)
+ amax_default = aten.amax(layer_norm, [-1])
+ argsort_default = aten.argsort(amax_default)
+ narrow_default = aten.narrow(argsort_default, -1, 0, 8)
+ unsqueeze_default = aten.unsqueeze(narrow_default, -1)
+ take_along_dim_default = aten.take_along_dim(layer_norm, unsqueeze_default, 1)
+ m_t_default = aten.mT(layer_norm)
+ matmul_default = aten.matmul(take_along_dim_default, m_t_default)
+ softmax_int = aten.softmax.int(matmul_default, -1)
+ matmul_default_1 = aten.matmul(softmax_int, layer_norm)
+ linear = aten.linear(matmul_default_1, blocks_0_q_weight)
+ linear_1 = aten.linear(matmul_default_1, blocks_0_k_weight)
+ linear_2 = aten.linear(matmul_default_1, blocks_0_v_weight)
- reshape = aten.reshape(scaled_dot_product_attention, [2, 16, 8])
+ reshape = aten.reshape(scaled_dot_product_attention, [2, 8, 8])
- add = aten.add.Tensor(x, linear_3)
+ m_t_default_1 = aten.mT(softmax_int)
+ matmul_default_2 = aten.matmul(m_t_default_1, linear_3)
+ add = aten.add.Tensor(x, matmul_default_2)
- return (add_1)
+ return (add_1, narrow_default, softmax_int)""",
    "reweigh": """\
- linear = aten.linear(layer_norm, blocks_0_q_weight)
- linear_1 = aten.linear(layer_norm, blocks_0_k_weight)
- linear_2 = aten.linear(layer_norm, blocks_0_v_weight)
+ unsqueeze_default = aten.unsqueeze(pattern_p0_idx, -1)
+ take_along_dim_default = aten.take_along_dim(layer_norm, unsqueeze_default, 1)
+ m_t_default = aten.mT(layer_norm)
+ matmul_default = aten.matmul(take_along_dim_default, m_t_default)
+ softmax_int = aten.softmax.int(matmul_default, -1)
+ matmul_default_1 = aten.matmul(softmax_int, layer_norm)
+ linear = aten.linear(matmul_default_1, blocks_0_q_weight)
+ linear_1 = aten.linear(matmul_default_1, blocks_0_k_weight)
+ linear_2 = aten.linear(matmul_default_1, blocks_0_v_weight)
- reshape = aten.reshape(scaled_dot_product_attention, [2, 16, 8])
+ reshape = aten.reshape(scaled_dot_product_attention, [2, 8, 8])
- add = aten.add.Tensor(x, linear_3)
+ m_t_default_1 = aten.mT(softmax_int)
+ matmul_default_2 = aten.matmul(m_t_default_1, linear_3)
+ add = aten.add.Tensor(x, matmul_default_2)
- return (add_1)
+ return (add_1, softmax_int)""",
    "reuse": """\
- linear = aten.linear(layer_norm, blocks_0_q_weight)
- linear_1 = aten.linear(layer_norm, blocks_0_k_weight)
- linear_2 = aten.linear(layer_norm, blocks_0_v_weight)
+ matmul_default = aten.matmul(pattern_p0_share, layer_norm)
+ linear = aten.linear(matmul_default, blocks_0_q_weight)
+ linear_1 = aten.linear(matmul_default, blocks_0_k_weight)
+ linear_2 = aten.linear(matmul_default, blocks_0_v_weight)
- reshape = aten.reshape(scaled_dot_product_attention, [2, 16, 8])
+ reshape = aten.reshape(scaled_dot_product_attention, [2, 8, 8])
- add = aten.add.Tensor(x, linear_3)
+ m_t_default = aten.mT(pattern_p0_share)
+ matmul_default_1 = aten.matmul(m_t_default, linear_3)
+ add = aten.add.Tensor(x, matmul_default_1)""",
    "mixed": """\
- linear = aten.linear(layer_norm, blocks_0_q_weight)
- linear_1 = aten.linear(layer_norm, blocks_0_k_weight)
- linear_2 = aten.linear(layer_norm, blocks_0_v_weight)
+ amax_default = aten.amax(layer_norm, [-1])
+ argsort_default = aten.argsort(amax_default)
+ narrow_default = aten.narrow(argsort_default, -1, 0, 8)
+ view_default = aten.view(pattern_select, [-1, 1])
+ where_self = aten.where.self(view_default, narrow_default, pattern_p0_idx)
+ unsqueeze_default = aten.unsqueeze(where_self, -1)
+ take_along_dim_default = aten.take_along_dim(layer_norm, unsqueeze_default, 1)
+ m_t_default = aten.mT(layer_norm)
+ matmul_default = aten.matmul(take_along_dim_default, m_t_default)
+ softmax_int = aten.softmax.int(matmul_default, -1)
+ view_default_1 = aten.view(pattern_weigh, [-1, 1, 1])
+ where_self_1 = aten.where.self(view_default_1, softmax_int, pattern_p0_share)
+ matmul_default_1 = aten.matmul(where_self_1, layer_norm)
+ linear = aten.linear(matmul_default_1, blocks_0_q_weight)
+ linear_1 = aten.linear(matmul_default_1, blocks_0_k_weight)
+ linear_2 = aten.linear(matmul_default_1, blocks_0_v_weight)
- reshape = aten.reshape(scaled_dot_product_attention, [2, 16, 8])
+ reshape = aten.reshape(scaled_dot_product_attention, [2, 8, 8])
- add = aten.add.Tensor(x, linear_3)
+ m_t_default_1 = aten.mT(where_self_1)
+ matmul_default_2 = aten.matmul(m_t_default_1, linear_3)
+ add = aten.add.Tensor(x, matmul_default_2)
- return (add_1)
+ return (add_1, where_self, where_self_1)""",
}


@pytest.mark.parametrize("use", USES)
def test_a_kind_of_program_changes_the_graph(use: Any) -> None:
    """Where its pattern comes from, and that it returns what is new of it."""
    _, before, (program,) = programs(AttendingConfig(), use)
    assert changes(before, program.graph_module.graph).splitlines() == USES[use].splitlines()


@torch.no_grad()
def test_kinds_of_programs_agree() -> None:
    """A mixed program does for each row what the other kinds do for all rows."""
    kinds = ("refresh", "reweigh", "reuse", "mixed")
    _, _, results = programs(AttendingConfig(), *kinds)
    refresh, reweigh, reuse, mixed = (program.graph_module for program in results)
    _, *old = refresh(Y)
    fresh, idx, share = refresh(X)
    kept = reuse(X, *old)[0]
    weighed, weights = reweigh(X, old[0])
    assert torch.equal(reuse(X, idx, share)[0], fresh)
    assert not torch.equal(old[0], idx)
    assert len({float(x.sum()) for x in (fresh, kept, weighed)}) == 3
    yes, no = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    for row in range(2):
        only = torch.arange(2) == row
        for masks, wanted in (
            ((only, only), (fresh, idx, share)),
            ((no, only), (weighed, old[0], weights)),
            ((no, no), (kept, *old)),
            ((yes, yes), (fresh, idx, share)),
        ):
            got = mixed(X, *masks, *old)
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a[row], b[row], rtol=0, atol=2e-6)


class Picture(nn.Module):
    """A block on tokens that lie transposed in memory, as those of a picture do."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, picture: Tensor) -> Tensor:
        x = picture.flatten(2).transpose(1, 2)
        n = self.block.norm(x)
        x = self.block.out(self.block.attention(n, n, None).reshape(2, N, C)) + x
        return (self.block.mlp(x) + x).double().view(2, N * C)


@torch.no_grad()
def test_values_behind_a_segment_may_lie_otherwise_in_memory() -> None:
    """A sum lies as its first operand does: out + x contiguous, x + update transposed.

    Strides are recorded anew behind the segment, and a view that they rule out becomes a reshape.
    """
    picture = X.view(2, C, 4, 4)
    model = Picture().eval().requires_grad_(False)
    captured = capture(model, (picture,), {})
    analysis, flow = analyze(captured)
    plan = make_plan(analysis, flow, AttendingConfig(scope="block", branches=BOTH))
    program = rewrite(captured, analysis, flow, plan, REFRESH)
    before, after = (
        {n.name: n for n in g.graph.nodes} for g in (captured.graph_module, program.graph_module)
    )
    assert before["to"].meta["val"].stride() == (N * C, C, 1)
    assert after["to"].meta["val"].stride() == (N * C, 1, N)
    assert ("merge_segments", "view becomes reshape", "view") in program.log
    out, *_ = program.graph_module(picture)
    assert (out - model(picture)).abs().max() > 1e-3

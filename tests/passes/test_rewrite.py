"""The rewrite's passes: graphs before and after, twins they must refuse, verification."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import denoisers
from toma_fx.analysis.facts import Patch
from toma_fx.analysis.propagate import analyze
from toma_fx.capture.model import Captured, capture
from toma_fx.errors import NoMergeSites, RewriteError
from toma_fx.graph.nodes import op_name
from toma_fx.methods.toma import ToMAConfig
from toma_fx.passes.pipeline import rewrite
from toma_fx.passes.uses import REFRESH, REUSE, REWEIGH, uses_of
from toma_fx.plan.planner import make_plan


class Block(nn.Module):
    """One pre-norm attention block on packed tokens; `leak` makes a twin that must be refused."""

    def __init__(self, leak: str = "") -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.leak = leak

    def forward(self, x: Tensor, ids: Tensor) -> Any:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (t.view(1, -1, 2, 4).transpose(1, 2) for t in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2).reshape(1, 16, 8)
        if self.leak == "mean":
            y = y - y.mean(1, keepdim=True)
        if self.leak == "roll":
            y = torch.roll(y, 1, 1)
        if self.leak == "causal":
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            y = y.transpose(1, 2).reshape(1, 16, 8)
        return (x + self.out(y), y) if self.leak == "output" else x + self.out(y)


def captured_block(leak: str = "") -> tuple[Captured, Any, Any]:
    torch.manual_seed(0)
    module = Block(leak).eval().requires_grad_(False)
    captured = capture(module, (torch.randn(1, 16, 8), denoisers.ids(4, 4)), {})
    return captured, *analyze(captured, grid=(4, 4))


CONFIG = ToMAConfig(min_tokens=4, tile=2, scope="sublayer")


def ops(graph: Any) -> str:
    """The calls of a graph, one line each, in order."""
    return "\n".join(
        f"{n.name} = {op_name(n.target)}({', '.join(i.name for i in n.all_input_nodes)})"
        for n in graph.nodes
        if n.op == "call_function"
    )


BEFORE = """\
layer_norm = aten.layer_norm(x, norm_weight, norm_bias)
linear = aten.linear(layer_norm, qkv_weight, qkv_bias)
chunk = aten.chunk(linear)
getitem = getitem(chunk)
getitem_1 = getitem(chunk)
getitem_2 = getitem(chunk)
view = aten.view(getitem)
transpose = aten.transpose(view)
view_1 = aten.view(getitem_1)
transpose_1 = aten.transpose(view_1)
view_2 = aten.view(getitem_2)
transpose_2 = aten.transpose(view_2)
scaled_dot_product_attention = aten.scaled_dot_product_attention(transpose, transpose_1, transpose_2)
transpose_3 = aten.transpose(scaled_dot_product_attention)
reshape = aten.reshape(transpose_3)
linear_1 = aten.linear(reshape, out_weight, out_bias)
add = aten.add(x, linear_1)"""  # noqa: E501

ADDED_FRONT = """\
layer_norm = aten.layer_norm(x, norm_weight, norm_bias)
reshape_default = aten.reshape(layer_norm)
permute_default = aten.permute(reshape_default)
reshape_default_1 = aten.reshape(permute_default)
matmul_default = aten.matmul(pattern_p0_merge, reshape_default_1)
flatten_using_ints = aten.flatten(matmul_default)
linear = aten.linear(flatten_using_ints, qkv_weight, qkv_bias)"""

ADDED_BACK = """\
linear_1 = aten.linear(reshape, out_weight, out_bias)
unflatten_int = aten.unflatten(linear_1)
matmul_default_1 = aten.matmul(pattern_p0_unmerge, unflatten_int)
reshape_default_2 = aten.reshape(matmul_default_1)
permute_default_1 = aten.permute(reshape_default_2)
reshape_default_3 = aten.reshape(permute_default_1)
add = aten.add(x, reshape_default_3)"""


def test_graph_before_and_after() -> None:
    captured, analysis, flow = captured_block()
    before = ops(captured.graph_module.graph).replace("p_", "")
    assert before.splitlines() == BEFORE.splitlines()
    program = rewrite(captured, analysis, flow, make_plan(analysis, flow, CONFIG), REUSE)
    after = ops(program.graph_module.graph).splitlines()
    middle = BEFORE.splitlines()[2:-2]
    assert after == [*ADDED_FRONT.splitlines(), *middle, *ADDED_BACK.splitlines()]
    literal = next(n for n in program.graph_module.graph.nodes if n.name == "reshape").args[1]
    assert literal == [1, 8, 8], "the literal token count was patched"
    assert ops(captured.graph_module.graph).splitlines() == BEFORE.splitlines(), "input changed"


@pytest.mark.parametrize(
    ("leak", "reason"),
    [
        ("mean", "a reduction over the token axis"),
        ("roll", "an op along the token axis"),
        ("causal", "causal attention depends on the order of the tokens"),
        ("output", "is an output of the model"),
    ],
)
def test_twins_are_refused_with_the_reason(leak: str, reason: str) -> None:
    _, analysis, flow = captured_block(leak)
    with pytest.raises(NoMergeSites) as caught:
        make_plan(analysis, flow, CONFIG)
    assert any(reason in r for r in caught.value.reasons)


@pytest.mark.parametrize("use", ["refresh", "reweigh", "reuse"])
def test_programs_share_parameters_and_name_their_patterns(use: Any) -> None:
    captured, analysis, flow = captured_block()
    program = rewrite(
        captured, analysis, flow, make_plan(analysis, flow, CONFIG), uses_of(CONFIG)[use]
    )
    own = {id(p) for p in captured.graph_module.parameters()}
    assert own
    assert {id(p) for p in program.graph_module.parameters()} == own
    inputs = [n.name for n in program.graph_module.graph.nodes if n.op == "placeholder"]
    assert inputs == [i.name for i in captured.inputs] + list(program.takes)
    count = {"refresh": (0, 3), "reweigh": (1, 2), "reuse": (3, 0)}[use]
    assert (len(program.takes), len(program.gives)) == count


@torch.no_grad()
def test_reweigh_with_the_same_tokens_equals_refresh() -> None:
    captured, analysis, flow = captured_block()
    plan = make_plan(analysis, flow, CONFIG)
    x, ids = torch.randn(1, 16, 8), denoisers.ids(4, 4)
    out, *pattern = rewrite(captured, analysis, flow, plan, REFRESH).graph_module(x, ids)
    again, *weights = rewrite(captured, analysis, flow, plan, REWEIGH).graph_module(
        x, ids, pattern[0]
    )
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(pattern[1:], weights, strict=True))
    changed = torch.randn(1, 16, 8)
    other = rewrite(captured, analysis, flow, plan, REWEIGH).graph_module(changed, ids, pattern[0])
    assert not torch.equal(other[1], pattern[1]), "weights follow the tokens"


def test_a_wrong_literal_is_caught_before_it_runs() -> None:
    captured, analysis, flow = captured_block()
    plan = make_plan(analysis, flow, CONFIG)
    transfers = {
        name: dataclasses.replace(t, patches=tuple(Patch(p.path, ()) for p in t.patches))
        for name, t in analysis.transfers.items()
    }
    assert any(t.patches for t in transfers.values())
    broken = dataclasses.replace(analysis, transfers=transfers)
    with pytest.raises(RewriteError, match="reshape"):
        rewrite(captured, broken, flow, plan, REUSE)


def test_log_says_which_pass_did_what() -> None:
    captured, analysis, flow = captured_block()
    program = rewrite(captured, analysis, flow, make_plan(analysis, flow, CONFIG), REUSE)
    changed = {name for name, action, _ in program.log if action != "changed nothing"}
    assert changed == {"provide_patterns", "merge_segments"}
    assert ("merge_segments", "set literal", "reshape") in program.log


def test_rotary_tables_are_gathered_once_for_all_blocks() -> None:
    inputs = denoisers.flux_inputs(16, 16)
    captured = capture(denoisers.flux(), (), inputs)
    analysis, flow = analyze(captured)
    uses = [p for t in analysis.transfers.values() for p in t.positionals]
    assert len(uses) == 16, "q and k, cos and sin, in four attentions"
    program = rewrite(captured, analysis, flow, make_plan(analysis, flow, ToMAConfig()), REUSE)
    targets = [op_name(n.target) for n in program.graph_module.graph.nodes]
    assert targets.count("aten.take_along_dim") == 2

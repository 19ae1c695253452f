"""The pass that replaces the selection operator by its body: graphs before and after, values."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

import toma_fx.methods
from tests import denoisers
from tests.passes.test_rewrite import Block
from toma_fx.errors import VerifyError
from toma_fx.export.programs import export_programs
from toma_fx.export.selection import ExpandSelection
from toma_fx.graph.nodes import op_name
from toma_fx.graph.rewriter import Rewriter
from toma_fx.graph.verify import output_values, verify
from toma_fx.methods import ops as ops_module
from toma_fx.methods.cells import Cells
from toma_fx.methods.ops import Choice
from toma_fx.methods.setting import Setting
from toma_fx.methods.toma import UNROLL, ToMA
from toma_fx.methods.tomesd import ToMeSD

BODY = """\
m_t_default = aten.mT(matmul)
maximum_default = aten.maximum(matmul, m_t_default)
mul_tensor = aten.mul(maximum_default)
round_default = aten.round(mul_tensor)
arange_default = aten.arange()
sum_dim_int_list = aten.sum(round_default)
argmax_default = aten.argmax(sum_dim_int_list)"""


def traced(setting: Setting, batch: int = 2) -> fx.GraphModule:
    """The selection of a setting as a graph with fake values."""
    tokens = torch.randn(batch, setting.grid[0] * setting.grid[1], 8)
    graph_module = make_fx(lambda x: setting.select(x), pre_dispatch=True, tracing_mode="fake")(
        tokens
    )
    graph_module.graph.eliminate_dead_code()
    return graph_module


def ops(graph: fx.Graph) -> list[str]:
    return [
        f"{n.name} = {op_name(n.target)}({', '.join(i.name for i in n.all_input_nodes)})"
        for n in graph.nodes
        if n.op == "call_function"
    ]


def expand(graph_module: fx.GraphModule) -> Rewriter:
    """Run the pass and verify what it leaves."""
    rewriter, before = Rewriter(graph_module), output_values(graph_module.graph)
    expand = ExpandSelection()
    with rewriter.running(expand.name):
        expand.apply(rewriter)
    inputs = [n.name for n in graph_module.graph.find_nodes(op="placeholder")]
    verify(graph_module, inputs, before, expand.name, rewriter.settle())
    graph_module.recompile()
    return rewriter


@pytest.mark.parametrize("keep", [UNROLL + 1, 20])
def test_the_operator_becomes_its_body(keep: int) -> None:
    graph_module = traced(ToMA((8, 12), (4, 6), keep, 1000.0))
    x = torch.randn(2, 96, 8, generator=torch.Generator().manual_seed(keep))
    # rows alike, so that gains tie
    x[:, 1::2] = x[:, ::2]
    before = graph_module(x)
    front = ops(graph_module.graph)
    assert front.pop() == "facility_location = toma_fx.facility_location(matmul)"
    rewriter = expand(graph_module)
    after = ops(graph_module.graph)
    assert after[: len(front)] == front
    assert "\n".join(after[len(front) :]).startswith(BODY)
    assert after[-1].startswith("cat_default = aten.cat(argmax_default, ")
    assert after[-1].count("argmax") == keep
    assert not any("toma_fx" in line for line in after)
    assert torch.equal(graph_module(x)[0], before[0])
    assert {where for where, *_ in rewriter.log} == {"expand_selection"}


@pytest.mark.parametrize(
    "setting",
    [ToMA((4, 4), (4, 4), UNROLL, 1000.0), ToMeSD((4, 4), Cells(1, 4, 4, 2, 2), 5)],
    ids=str,
)
def test_a_graph_without_the_operator_stays(setting: Setting) -> None:
    graph_module = traced(setting)
    before = ops(graph_module.graph)
    assert not any("toma_fx" in line for line in before)
    assert expand(graph_module).log == []
    assert ops(graph_module.graph) == before


def test_what_is_left_over_is_not_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that keeps the operator is refused before a runtime fails on it."""
    inputs = (torch.randn(1, 16, 8), denoisers.ids(4, 4))
    optimized = toma_fx.optimize(Block().eval(), tile=4, ratio=0.25, min_tokens=4)
    monkeypatch.setattr(ExpandSelection, "apply", lambda self, rewriter: None)
    with pytest.raises(VerifyError, match="only this package registers it") as caught:
        export_programs(optimized, inputs)
    assert "export_refresh, after its passes: %facility_location" in caught.value.where


def test_exports_do_not_hold_the_triton_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process would run on a GPU does not change what leaves it."""
    inputs = (torch.randn(1, 16, 8), denoisers.ids(4, 4))
    torch.manual_seed(0)
    model = Block().eval()

    def export() -> dict[str, str]:
        optimized = toma_fx.optimize(model, tile=4, ratio=0.25, min_tokens=4)
        programs = export_programs(optimized, inputs)
        return {name: str(exported.program.graph) for name, exported in programs.items()}

    reference = export()
    assert reference["refresh"].count("aten.argmax") == 12
    assert not any(name in text for text in reference.values() for name in ("toma_fx", "triton"))
    monkeypatch.setattr(ops_module, "choose_implementation", lambda *args: Choice("triton", "test"))
    monkeypatch.setattr(toma_fx.methods, "facility_triton", None, raising=False)
    assert export() == reference

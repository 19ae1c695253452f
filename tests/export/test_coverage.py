"""What TensorRT takes of our programs: rules and checks, without TensorRT."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toma_fx
from tests import denoisers
from tests.methods.test_methods import BUILT_IN, inputs, model, static
from tests.tracing import Program
from toma_fx.errors import BuildError
from toma_fx.export import Exported, export_programs
from toma_fx.export.builder import export
from toma_fx.export.selection import ExpandSelection
from toma_fx.export.to_onnx.target import ONNXTarget
from toma_fx.export.to_tensorrt.aten import aten_coverage, decompositions
from toma_fx.export.to_tensorrt.coverage import Coverage, require
from toma_fx.export.to_tensorrt.onnx_parser import TRAPS, onnx_coverage
from toma_fx.graph.rewriter import Rewriter
from toma_fx.methods.baselines import Grid, Random
from toma_fx.methods.cells import Cells
from toma_fx.methods.config import make_config
from toma_fx.methods.retom import PartialReToM, ReToM
from toma_fx.methods.setting import Setting
from toma_fx.methods.todo import ToDo
from toma_fx.methods.tofu import ToFu
from toma_fx.methods.toma import ToMA
from toma_fx.methods.tomesd import ToMeSD

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "tomesd-random-cells": ("tomesd", {"sx": 3, "random": True, "ratio": 0.6}),
    "tomesd-all": ("tomesd", {"ratio": 0.9}),
    "tofu-merged": ("tofu", {"prune_depth": 0}),
    "retom-ratio": ("retom", {"ratio": 0.5}),
    "retom-ratio-mean": ("retom", {"ratio": 0.3, "reduction": "mean"}),
    "todo-area": ("todo", {"downsample": "area", "factor": 3}),
    "toma-global": ("toma", {"window": "global", "ratio": 0.9}),
}
"""Forms of methods that compute with other operators than the defaults."""
PROGRAMS = (*BUILT_IN, *FORMS)


def optimized(name: str) -> Any:
    """The smallest model with a method, or a form of one."""
    method, options = FORMS.get(name, (name, {}))
    return toma_fx.optimize(model(), method=replace(static(method), **options))


@cache
def programs(name: str) -> dict[str, Exported]:
    return dict(export_programs(optimized(name), inputs()))


def covered(function: Callable[..., Any], *args: Tensor, **options: Any) -> Coverage:
    """Coverage of a function of tensors."""

    class Module(nn.Module):
        def forward(self, *given: Tensor) -> Any:
            return function(*given)

    return aten_coverage(torch.export.export(Module(), args, strict=False, **options))


def to_onnx(exported: Exported, opset: int = 20) -> Any:
    pytest.importorskip("onnxscript")
    made = torch.onnx.export(exported.program, dynamo=True, opset_version=opset, verbose=False)
    assert made is not None
    return made.model_proto


# -- programs of torch.export ---------------------------------------------------------------------


def settled(found: Coverage) -> None:
    """Everything is taken, and nothing is left to a rule that is not here."""
    require(found)
    assert all(row.verdict != "conditional" for row in found.ops)
    assert not found.findings


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_every_method(name: str) -> None:
    for exported in programs(name).values():
        settled(aten_coverage(exported.program))


SETTINGS: dict[str, Setting] = {
    "tomesd": ToMeSD((6, 8), Cells(1, 6, 8, 2, 2), 20),
    "tomesd-all": ToMeSD((6, 8), Cells(1, 6, 8, 2, 2), 36),
    "tomesd-frames": ToMeSD((2, 5, 7), Cells(2, 5, 7, 2, 3, True, 1), 30),
    "tofu": ToFu((7, 6), Cells(1, 7, 6, 2, 2), 20),
    "tofu-pruned": ToFu((6, 8), Cells(1, 6, 8, 2, 2), 20, prune=True),
    "retom": ReToM((2, 4, 6), (1, 2, 3)),
    "retom-ratio": PartialReToM((64, 64), (2, 2), r=2048),
    "retom-ratio-mean": PartialReToM((4, 8), (2, 4), "mean", r=9),
    "todo": ToDo((2, 7, 8), (2, 7, 8), 2),
    "todo-average": ToDo((7, 8), (7, 8), 2, "average"),
    "todo-area": ToDo((14, 8), (7, 8), 3, "area"),
    "toma-frames": ToMA((2, 4, 4), (1, 4, 4), 5, 1000.0),
    "toma-global": ToMA((4, 8), (4, 8), 5, 1000.0),
    "random": Random((4, 8), (2, 4), 4, 1000.0),
    "grid": Grid((4, 8), (2, 4), 4, 1000.0),
}


def covered_setting(setting: Setting, dtype: torch.dtype = torch.float32) -> Coverage:
    """Coverage of all functions of a setting; no values are computed, however large the grid."""
    program = Program(setting, unmerges=not isinstance(setting, ToDo))
    x = torch.empty(2, math.prod(setting.grid), 8, dtype=dtype)
    exported = torch.export.export(program, (x,), strict=False)
    ExpandSelection().apply(Rewriter(exported.graph_module))
    return aten_coverage(exported)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_functions_of_every_method(name: str, dtype: torch.dtype) -> None:
    """In every dtype: sums of float16 tokens are scaled."""
    settled(covered_setting(SETTINGS[name], dtype))


def test_grids_that_are_too_large() -> None:
    """4,096 of 16,384 tokens stay, more than are picked; of 64x64 they are 1,024."""
    large = covered_setting(ToMeSD((128, 128), Cells(1, 128, 128, 2, 2), 8192))
    (row,) = large.uncovered
    assert row.name == "aten.topk.default"
    assert row.note == "picks 4096 values, at most 3840 are possible"
    settled(covered_setting(ToMeSD((64, 64), Cells(1, 64, 64, 2, 2), 2048)))


def test_pseudo_inverse_has_no_converter() -> None:
    fields = {"min_tokens": 1, "inverse": "pinv", "destinations_every": 2}
    optimized = toma_fx.optimize(model(), method="toma", **fields)
    found = aten_coverage(export_programs(optimized, inputs())["refresh"].program)
    assert [row.name for row in found.uncovered] == ["aten._linalg_solve_ex.default"]


def test_attention_and_projections_stay_whole() -> None:
    program = programs("toma")["reuse"].program
    rows = aten_coverage(program).ops
    nodes = program.run_decompositions(decompositions()).graph.nodes
    assert sum(row.count for row in rows) == sum(n.op == "call_function" for n in nodes)
    ops = {row.name: row for row in rows}
    assert ops["aten.scaled_dot_product_attention.default"].verdict == "taken"
    assert ops["aten.linear.default"].note == "converted"
    assert ops["aten.silu.default"].note == "decomposed by Torch-TensorRT"
    assert "aten.layer_norm.default" not in ops


def test_what_needs_no_input_is_folded() -> None:
    """Also what has no converter."""
    found = covered(lambda x: x + torch.exp2(torch.arange(4)), torch.rand(4))
    (row,) = (row for row in found.ops if row.name.startswith("aten.exp2"))
    assert (row.verdict, row.locations) == ("folded", ())
    assert found.complete
    found = covered(torch.exp2, torch.rand(4))
    assert [(row.name, row.verdict) for row in found.uncovered] == [
        ("aten.exp2.default", "missing")
    ]


@pytest.mark.parametrize(
    ("function", "args", "words"),
    [
        (lambda x: x.topk(3841), (torch.rand(1, 4000),), "3841"),
        (lambda x: x.sort(0, descending=True), (torch.rand(4000, 1),), "4000"),
        (lambda x: x.sort(), (torch.rand(1, 4),), "by default"),
        (lambda x: x.max(-1), (torch.rand(4, 4),), "first result"),
        (lambda x: x[x > 0.5], (torch.rand(4),), "follow the data"),
        (lambda x: x & 3, (torch.arange(4),), "bits"),
        (lambda x: x.double() * 2, (torch.rand(4),), "torch.float64"),
        (
            nn.functional.scaled_dot_product_attention,
            (torch.rand(1, 2, 4, 8), torch.rand(1, 2, 4, 8), torch.rand(1, 2, 4, 6)),
            "keys and values",
        ),
    ],
)
def test_use_that_a_converter_refuses(function: Any, args: tuple[Tensor, ...], words: str) -> None:
    notes = [row.note for row in covered(function, *args).uncovered if row.verdict == "refused"]
    assert any(words in note for note in notes)


def test_twins_that_are_taken() -> None:
    x = torch.rand(4, 8)
    for function in (
        lambda x: x.topk(3, -1, largest=False).values,
        lambda x: x.sort(-1, descending=True)[1],
        lambda x: (x.amax(-1), x.argmax(-1)),
        lambda x: x[torch.arange(2)],
        lambda x: ((x > 0.5) & (x < 0.7)).to(x.dtype),
        lambda x: nn.functional.scaled_dot_product_attention(x[:2], x, x),
    ):
        found = covered(function, x)
        assert found.complete, str(found)


def scatter(x: Tensor, index: Tensor, include_self: bool) -> Tensor:
    return torch.zeros(3, 4).scatter_reduce(0, index, x, "sum", include_self=include_self)


def test_traps() -> None:
    x, index = torch.rand(5, 4), torch.randint(3, (5, 4))
    batch = torch.export.Dim("batch")
    cases: dict[str, Coverage] = {
        "control flow": covered(
            lambda x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)), x
        ),
        "scatter_reduce": covered(lambda x, i: scatter(x, i, False), x, index),
        "no converter": covered(lambda x: torch.searchsorted(torch.arange(4.0), x), x),
        "dynamic shapes": covered(lambda x: x + 1, x, dynamic_shapes={"given": ({0: batch},)}),
        "rank": covered(lambda x: x.view(1, 1, 1, 5, 1, 1, 1, 1, 4) + 1, x),
        "float64": covered(lambda x: x.double() * 2, x),
        "complex": covered(lambda x: torch.view_as_complex(x.view(5, 2, 2)) * 2j, x),
    }
    for name, found in cases.items():
        finding = next(f for f in found.findings if f.trap == name)
        assert finding.fatal
        assert not found.complete
        assert name in {trap.name for trap in TRAPS}
        with pytest.raises(BuildError, match=finding.location.node):
            require(found)
    (higher,) = cases["control flow"].uncovered
    assert higher.name == "higher_order.cond"
    assert cases["complex"].findings[0].detail == "is torch.complex64, like 1 more here"
    slow = covered(lambda x, i: scatter(x, i, True), x, index)
    (finding,) = slow.findings
    assert (finding.trap, finding.fatal) == ("scatter_add", False)
    assert "5 scatters" in finding.detail
    require(slow)


def test_float64_may_be_truncated() -> None:
    class Precise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * torch.arange(4, dtype=torch.float64)).sin().float()

    program = torch.export.export(Precise(), (torch.rand(4, 4),), strict=False)
    refused, truncated = aten_coverage(program), aten_coverage(program, truncate_double=True)
    assert not refused.complete
    assert truncated.complete
    assert truncated.findings[0].detail == refused.findings[0].detail


def test_error_names_operators_and_modules() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.exp2(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Inner()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x) + 1  # type: ignore[no-any-return]

    found = aten_coverage(torch.export.export(Outer(), (torch.rand(3),), strict=False))
    with pytest.raises(BuildError) as caught:
        require(found)
    assert "aten.exp2.default (no converter) at blocks.0: exp2" in caught.value.where
    text = str(found)
    assert "1 of 2 nodes are not taken" in text
    assert "blocks.0: exp2" in text
    read = json.loads(found.to_json())
    assert not read["complete"]
    assert read["ops"][0]["locations"] == [{"node": "exp2", "module": "blocks.0"}]


# -- ONNX models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_onnx_artifacts_of_every_method(name: str, tmp_path: Path) -> None:
    """The models as they are deployed, which know the type of every value."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    manifest = export(optimized(name), inputs(), tmp_path / "out", ONNXTarget(opset=23))
    assert len(manifest.calls[0].programs) == (1 if name.startswith("todo") else 2)
    for program in manifest.calls[0].programs.values():
        made = onnx.load(tmp_path / "out" / program.file, load_external_data=False)
        typed = {value.name for value in (*made.graph.value_info, *made.graph.output)}
        assert {name for node in made.graph.node for name in node.output} <= typed
        settled(onnx_coverage(made))


@pytest.mark.parametrize("name", BUILT_IN)
def test_onnx_models_of_every_method(name: str) -> None:
    """As the exporter of torch writes them."""
    for exported in programs(name).values():
        for opset in (18, 20, 23, 24):
            found = onnx_coverage(to_onnx(exported, opset))
            assert found.complete, str(found)


def one_node(
    kind: str, *given: tuple[str, list[int]], outputs: int = 1, opset: int = 20, **attributes: Any
) -> Any:
    """A model of one node; inputs are (element type, shape), those of type "K" constants."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    names, placeholders, constants = [], [], []
    for i, (kind_of, shape) in enumerate(given):
        names.append(f"x{i}")
        if kind_of == "K":
            constants.append(helper.make_tensor(f"x{i}", onnx.TensorProto.INT64, [1], shape))
        else:
            elem = getattr(onnx.TensorProto, kind_of)
            placeholders.append(helper.make_tensor_value_info(f"x{i}", elem, shape))
    made = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(kind, names, made, name="it", **attributes)
    results = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in made]
    graph = helper.make_graph([node], "graph", placeholders, results, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


F = ("FLOAT", [1, 2, 3, 4])


@pytest.mark.parametrize(
    ("arguments", "attributes", "words"),
    [
        (("TopK", F, ("K", [3840])), {"outputs": 2}, "3840"),
        (("TopK", F, ("INT64", [1])), {"outputs": 2}, "at build time"),
        (("TopK", F, ("K", [2])), {"outputs": 2, "sorted": 0}, "sorted"),
        (("ScatterND", F, ("INT64", [1, 4]), F), {"reduction": "add"}, "reduction add"),
        (("ReduceSum", F, ("INT64", [1])), {}, "axes"),
        (("CumSum", ("INT64", [4]), ("K", [0])), {}, "INT64"),
        (("LayerNormalization", F, F), {"outputs": 2}, "first output"),
        (("Resize", F), {"mode": "cubic"}, "mode cubic"),
        (("Attention", *[("FLOAT", [1, 3, 8])] * 3), {"opset": 23}, "4 dimensions"),
        (("Unique", F), {}, "not supported"),
        (("Swish", F), {}, "does not know"),
    ],
)
def test_use_that_the_parser_refuses(
    arguments: tuple[Any, ...], attributes: dict[str, Any], words: str
) -> None:
    (row,) = onnx_coverage(one_node(*arguments, **attributes)).uncovered
    assert words in row.note
    assert str(row.locations[0]) == "it"


def test_late_operators_and_opsets() -> None:
    attention = one_node("Attention", *[F] * 3, opset=23)
    assert onnx_coverage(attention).complete
    assert onnx_coverage(attention, "10.14.1").complete
    (row,) = onnx_coverage(attention, "10.13").uncovered
    assert row.note == "only from TensorRT 10.14"
    (finding,) = onnx_coverage(one_node("Abs", F, opset=25)).findings
    assert finding.trap == "opset"
    assert "9 to 24" in finding.detail


def test_onnx_traps() -> None:
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    dynamic = one_node("Abs", F)
    dynamic.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    deep = one_node("Abs", ("FLOAT", [1] * 9))

    value = helper.make_tensor("value", onnx.TensorProto.FLOAT, [1], [0.0])
    node = helper.make_node("Constant", [], ["out"], value=value)
    out = helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1])
    branch = helper.make_graph([node], "branch", [], [out])
    choice = one_node("If", ("BOOL", []), then_branch=branch, else_branch=branch)
    for name, wrong in {"dynamic shapes": dynamic, "rank": deep}.items():
        (finding,) = onnx_coverage(wrong).findings
        assert finding.trap == name
        assert not onnx_coverage(wrong).complete
    (row,) = onnx_coverage(choice).ops
    assert (row.verdict, row.note) == ("conditional", "its subgraph was not looked into")


# -- whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "call"),
    [(denoisers.sdxl, denoisers.sdxl_inputs), (denoisers.flux, denoisers.flux_inputs)],
    ids=["sdxl", "flux"],
)
def test_whole_models(make: Any, call: Any) -> None:
    config = make_config(method="toma", options={"min_tokens": 60})
    made = export_programs(toma_fx.optimize(make(), method=config), call())
    for exported in made.values():
        found = aten_coverage(exported.program, truncate_double=True)  # Flux's rotary tables
        assert found.complete, str(found)
        found = onnx_coverage(to_onnx(exported))
        assert found.complete, str(found)

"""What TensorRT takes of our programs: the tables, the rules, the checks and the script that renews
the tables. TensorRT itself is neither needed nor imported."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toma_fx
from tests import denoisers
from tests.examples import ROOT, load_example
from tests.methods.test_methods import BUILT_IN, inputs, model, static
from tests.tracing import Program
from toma_fx.errors import BuildError
from toma_fx.export import Exported, export_programs
from toma_fx.export.builder import export
from toma_fx.export.selection import ExpandSelection
from toma_fx.export.to_onnx.target import ONNXTarget
from toma_fx.export.to_tensorrt.aten import IRRELEVANT, VALIDATORS, aten_coverage, decompositions
from toma_fx.export.to_tensorrt.coverage import TABLES, Coverage, load_table, require
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

SIGNATURES = ROOT / "tests" / "data" / "signatures.json"
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
QUICK = ("toma", "tomesd")


def slow_but(quick: tuple[str, ...], names: tuple[str, ...]) -> list[Any]:
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


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


# -- the tables -----------------------------------------------------------------------------------


def test_tables_say_version_and_source() -> None:
    for path in (*TABLES.glob("*.json"), SIGNATURES):
        table = json.loads(path.read_text())
        assert table["version"]
        assert table["source"]
        assert (ROOT / table["made_with"]).exists()
        assert renew().dump(table) == path.read_text(), "written by the script, not by hand"
    converters = load_table("torch_tensorrt")["converters"]
    assert len(converters) > 200
    assert converters["aten.topk.default"]["validators"] == ["topk_validator"]
    assert "aten.one_hot.default" not in converters
    operators = load_table("onnx_tensorrt")["operators"]
    assert len(operators) > 150
    assert operators["TopK"]["mentions"] == ["K", "sorted"]
    assert not operators["Unique"]["supported"]


def test_package_data_holds_the_tables() -> None:
    assert '"export/to_tensorrt/tables/*.json"' in (ROOT / "pyproject.toml").read_text()


def test_rules_are_about_validators_of_the_table() -> None:
    entries = load_table("torch_tensorrt")["converters"].values()
    assert {*VALIDATORS, *IRRELEVANT} <= {name for entry in entries for name in entry["validators"]}


def test_signatures_of_what_an_engine_is_built_with() -> None:
    signatures = json.loads(SIGNATURES.read_text())
    functions = signatures["functions"]
    options = {
        name: {p["name"]: p.get("default") for p in parameters}
        for name, parameters in functions.items()
    }
    for name in ("compile", "convert_exported_program_to_serialized_trt_engine"):
        made = options[f"torch_tensorrt.dynamo.{name}"]
        assert {"exported_program", "arg_inputs", "require_full_compilation"} <= set(made)
        assert made["immutable_weights"] == "True"
        assert made["attn_bias_is_causal"] == "True"
        assert made["min_block_size"] == "5"
    assert options["torch_tensorrt.save"]["output_format"] == "'exported_program'"
    names = signatures["tensorrt"]["names"]
    assert names["build_serialized_network"]
    assert names["STRONGLY_TYPED"]
    assert not names["EXPLICIT_BATCH"], "TensorRT 11 has no implicit batch to choose against"


# -- programs of torch.export ---------------------------------------------------------------------


def settled(found: Coverage) -> None:
    """Everything is taken, and nothing is left to a rule that is not here."""
    require(found)
    assert all(row.verdict != "conditional" for row in found.ops)
    assert not found.findings


@pytest.mark.parametrize("name", slow_but(QUICK, PROGRAMS))
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
@pytest.mark.parametrize("name", slow_but(("tofu", "retom-ratio"), tuple(SETTINGS)))
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
    assert (row.verdict, row.places) == ("folded", ())
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
        with pytest.raises(BuildError, match=finding.place.node):
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
    assert read["ops"][0]["places"] == [{"node": "exp2", "module": "blocks.0"}]


# -- ONNX models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(("toma",), PROGRAMS))
def test_onnx_artifacts_of_every_method(name: str, tmp_path: Path) -> None:
    """The models as they are deployed, which know the type of every value."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    manifest = export(optimized(name), inputs(), tmp_path / "out", ONNXTarget(opset=23))
    assert len(manifest.programs) == (1 if name.startswith("todo") else 2)
    for program in manifest.programs.values():
        made = onnx.load(tmp_path / "out" / program.file, load_external_data=False)
        typed = {value.name for value in (*made.graph.value_info, *made.graph.output)}
        assert {name for node in made.graph.node for name in node.output} <= typed
        settled(onnx_coverage(made))


@pytest.mark.slow
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
    assert str(row.places[0]) == "it"


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

    def branch(name: str, shape: list[int]) -> Any:
        value = helper.make_tensor("value", onnx.TensorProto.FLOAT, shape, [0.0])
        node = helper.make_node("Constant", [], [name], value=value)
        out = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        return helper.make_graph([node], name, [], [out])

    condition = ("BOOL", [])
    given: dict[str, Any] = {"else_branch": branch("no", [1])}
    uneven = one_node("If", condition, then_branch=branch("yes", [1, 1]), **given)
    even = one_node("If", condition, then_branch=branch("yes", [1]), **given)
    for name, made in {"dynamic shapes": dynamic, "rank": deep, "branches": uneven}.items():
        (finding,) = onnx_coverage(made).findings
        assert finding.trap == name
        assert not onnx_coverage(made).complete
    assert not onnx_coverage(even).findings
    assert sum(row.count for row in onnx_coverage(even).ops) == 3, "those of branches count"


# -- whole models ---------------------------------------------------------------------------------


@pytest.mark.slow
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


# -- the script -----------------------------------------------------------------------------------


def renew() -> ModuleType:
    return load_example("renew_tables", "tools")


CONVERTERS = """
@dynamo_tensorrt_converter(torch.ops.aten.a.default, supports_dynamic_shapes=True)
@dynamo_tensorrt_converter(torch.ops.aten.b.Tensor, capability_validator=small)
def one(ctx): ...

@dynamo_tensorrt_converter(
    torch.ops.aten.b.Tensor, capability_validator=lambda node, settings: not wide(node)
)
@dynamo_tensorrt_converter(torch.ops.aten.a.default, capability_validator=made(True))
@dynamo_tensorrt_converter(operator.add)
@dynamo_tensorrt_converter(local_name)
def two(ctx): ...
"""
FAKE = {
    "dynamo/conversion/aten_ops_converters.py": CONVERTERS,
    "dynamo/lowering/_decomposition_groups.py": (
        "torch_enabled_decompositions: Set[str] = {aten.e, aten.d.default}\n"
        "torch_disabled_decompositions: Set[str] = {aten.k.default}\n"
    ),
    "dynamo/lowering/_decompositions.py": (
        "replace_inplace_op(aten.i_, aten.i)\n"
        "@register_torch_trt_decomposition(torch.ops.aten.o.default, registry=R)\n"
        "@register_torch_trt_decomposition(aten.attend, registry=R)\n"
        "def f(x): ...\n"
        "ATTENTION_DECOMPOSITION_OPS = {aten.attend.default}\n"
    ),
    "dynamo/lowering/passes/remove_assert_nodes.py": "node.target == torch.ops.aten._assert.x",
    "dynamo/lowering/passes/remove_detach.py": "node.target == 'detach'",
    "dynamo/lowering/passes/replace_fused_rms_norm.py": "",
    "dynamo/_defaults.py": "DEVICE = None\n",
    "dynamo/_compiler.py": (
        "def compile(program, inputs=(), *, device=_defaults.DEVICE, **more): ...\n"
        "def convert_exported_program_to_serialized_trt_engine(program): ...\n"
    ),
    "dynamo/_refit.py": "def refit_module_weights(module): ...\n",
    "_compile.py": "def save(module): ...\ndef load(path=''): ...\n",
}
OPERATORS = """
TensorRT 12.3 supports operators in the inclusive range of opset 9 to opset 26. More is below.

| Operator | Supported | Supported Types | Restrictions |
|----------|-----------|-----------------|--------------|
| TopK     | Y         | FP32, INT64     | `K ` is small, and `sorted` set
| Abs      | Y         | FP32, FP16, |
| Unique   | N         |
"""


def test_renewing_the_tables(tmp_path: Path) -> None:
    wheel = tmp_path / "torch_tensorrt-9.1.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in FAKE.items():
            archive.writestr(f"torch_tensorrt/{path}", text)
        head = (
            "Version: 9.1\nRequires-Dist: torch<9\nRequires-Dist: x; extra == 'all'\n\nVersion: 0"
        )
        archive.writestr("torch_tensorrt-9.1.dist-info/METADATA", head)
    bindings = tmp_path / "tensorrt_bindings.whl"
    with zipfile.ZipFile(bindings, "w") as archive:
        archive.writestr("b/tensorrt.so", b"\0Builder\0FP16s\0")
        archive.writestr("b-1.dist-info/METADATA", "Version: 8.0\n\n")
    operators = tmp_path / "operators.md"
    operators.write_text(OPERATORS)
    out = tmp_path / "tables"
    out.mkdir()
    args = ["--torch-tensorrt", wheel, "--bindings", bindings, "--operators", operators]
    for _ in range(2):
        renew().main([*map(str, args), "--commit", "abc", "--out", str(out)])
        first = {path.name: path.read_text() for path in out.iterdir()}
    tables = {name: json.loads(text) for name, text in first.items()}
    assert first == {name: renew().dump(table) for name, table in tables.items()}

    torch_table = tables["torch_tensorrt.json"]
    assert (torch_table["version"], torch_table["requires"]) == ("9.1", ["torch<9"])
    a, b = (torch_table["converters"][f"aten.{n}"] for n in ("a.default", "b.Tensor"))
    assert a == {"validated": False, "validators": ["made"], "dynamic_shapes": True}
    assert b == {"validated": True, "validators": ["small", "wide"], "dynamic_shapes": False}
    assert "operator.add" in torch_table["converters"]
    assert torch_table["unresolved_keys"] == ["local_name"]
    assert torch_table["decomposed"] == {
        "by_torch": ["aten.d.default", "aten.e"],
        "own": ["aten.i_", "aten.o.default"],
        "attention": ["aten.attend.default"],
        "kept": ["aten.k.default"],
    }
    assert torch_table["lowered"] == {"aten._assert.x": "remove_assert_nodes"}

    signatures = tables["signatures.json"]
    assert signatures["functions"]["torch_tensorrt.dynamo.compile"] == [
        {"name": "program", "kind": "positional"},
        {"name": "inputs", "kind": "positional", "default": "()"},
        {"name": "device", "kind": "keyword", "default": "None"},
        {"name": "more", "kind": "**"},
    ]
    assert signatures["tensorrt"]["version"] == "8.0"
    names = signatures["tensorrt"]["names"]
    assert (names["Builder"], names["FP16"]) == (True, False)

    onnx_table = tables["onnx_tensorrt.json"]
    assert (onnx_table["version"], onnx_table["opsets"]) == ("12.3", [9, 26])
    assert onnx_table["source"]["commit"] == "abc"
    assert onnx_table["operators"]["TopK"] == {
        "supported": True,
        "types": ["FP32", "INT64"],
        "restricted": True,
        "mentions": ["K", "sorted"],
    }
    assert onnx_table["operators"]["Abs"]["types"] == ["FP32", "FP16"]
    assert not onnx_table["operators"]["Unique"]["supported"]

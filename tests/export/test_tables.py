"""The tables of what TensorRT takes, and the script that renews them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from types import ModuleType

from tests.examples import ROOT, load_example
from toma_fx.export.to_tensorrt.aten import IRRELEVANT, VALIDATORS
from toma_fx.export.to_tensorrt.coverage import TABLES, load_table

SIGNATURES = ROOT / "tests" / "data" / "signatures.json"


def renew() -> ModuleType:
    return load_example("renew_tables", "tools")


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


# -- the script -----------------------------------------------------------------------------------


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

"""Renews the tables of what TensorRT takes from what NVIDIA publishes, importing none of it.

Three tables, each from its own source; only those whose source is named are written:

    torch_tensorrt.json, signatures.json   a wheel of torch-tensorrt, whose Python files are parsed
    signatures.json ("tensorrt")           a wheel of tensorrt-cu13-bindings, searched for names
    onnx_tensorrt.json                     docs/operators.md of github.com/onnx/onnx-tensorrt

The package reads the tables of operators (toma_fx/export/to_tensorrt/tables); its tests hold every
call of TensorRT to the signatures (tests/data).

Usual call, with the versions that belong together (the first wheel's metadata names the second):

    pip download --no-deps -d wheels torch-tensorrt==2.13.0 tensorrt-cu13-bindings==11.0.0.114
    python tools/renew_tables.py --torch-tensorrt wheels/torch_tensorrt-2.13.0-*.whl \\
        --bindings wheels/tensorrt_cu13_bindings-*.whl --operators operators.md --commit SHA

`--download VERSION` calls that pip for the first wheel; `--operators` takes an address, too. The
same sources give the same bytes. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MADE_WITH = "tools/renew_tables.py"
ROOT = Path(__file__).parent.parent
TABLES = ROOT / "toma_fx" / "export" / "to_tensorrt" / "tables"
SIGNATURES = ROOT / "tests" / "data"
PACKAGE = "torch_tensorrt/"
CONVERSION = PACKAGE + "dynamo/conversion/"
LOWERING = PACKAGE + "dynamo/lowering/"
PASSES = ("remove_assert_nodes", "remove_detach", "replace_fused_rms_norm")
"""Lowering passes of Torch-TensorRT that remove or replace operators by name."""
FUNCTIONS = {
    "torch_tensorrt.dynamo.compile": "dynamo/_compiler.py",
    "torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine": (
        "dynamo/_compiler.py"
    ),
    "torch_tensorrt.dynamo.refit_module_weights": "dynamo/_refit.py",
    "torch_tensorrt.load": "_compile.py",
    "torch_tensorrt.save": "_compile.py",
}
"""What toma_fx calls of Torch-TensorRT, and where each is defined."""
NAMES = (
    "Builder", "BuilderFlag", "IBuilderConfig", "MemoryPoolType", "WORKSPACE",
    "NetworkDefinitionCreationFlag", "STRONGLY_TYPED", "EXPLICIT_BATCH", "OnnxParser",
    "OnnxParserFlag", "NATIVE_INSTANCENORM", "Logger", "Severity", "Runtime", "ICudaEngine",
    "IExecutionContext", "TensorIOMode", "create_network", "create_builder_config",
    "build_serialized_network", "set_memory_pool_limit", "builder_optimization_level",
    "set_flag", "clear_flag", "FP16", "BF16", "TF32", "REFIT", "STRIP_PLAN",
    "create_timing_cache", "set_timing_cache", "parse", "parse_from_file", "supports_model",
    "supports_model_v2", "num_errors", "get_error", "deserialize_cuda_engine", "num_io_tensors",
    "get_tensor_name", "get_tensor_mode", "get_tensor_shape", "get_tensor_dtype",
    "create_execution_context", "set_input_shape", "set_tensor_address", "execute_async_v3",
)  # fmt: skip
"""Names of TensorRT's Python interface that a builder and a runtime of ONNX files may use."""


def sources(wheel: Path) -> dict[str, str]:
    """Text of every Python file of a wheel, by its path inside."""
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.endswith(".py")]
        return {n: archive.read(n).decode() for n in names}


def metadata(wheel: Path) -> tuple[str, list[str]]:
    """Version of a wheel, and what it requires outside of extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        head = archive.read(name).decode().split("\n\n")[0]
    (version,) = re.findall(r"^Version: (.+)$", head, re.M)
    needed = re.findall(r"^Requires-Dist: ([^;\n]+)$", head, re.M)
    return version, sorted(needed)


def source_of(wheel: Path) -> dict[str, str]:
    """Which file a table was made from."""
    return {"file": wheel.name, "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()}


# -- Torch-TensorRT -------------------------------------------------------------------------------


def op_name(key: ast.expr) -> str:
    """Name of an operator as torch prints it: "aten.add.Tensor", "operator.getitem"."""
    text = ast.unparse(key)
    return text.removeprefix("torch.ops.")


def is_operator(name: str) -> bool:
    """Whether a graph can hold it: an operator of torch or of Python, not a local variable."""
    return name.startswith(("aten.", "prims.", "operator.", "torch.", "math."))


def calls(tree: ast.AST, function: str) -> Iterator[ast.Call]:
    """Calls of a function by its plain name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == function:
            yield node


def validators(value: ast.expr) -> list[str]:
    """Functions that decide whether a converter takes a node."""
    if isinstance(value, ast.Lambda):
        return sorted({ast.unparse(n.func) for n in ast.walk(value) if isinstance(n, ast.Call)})
    if isinstance(value, ast.Call):
        return [ast.unparse(value.func)]
    return [ast.unparse(value)]


def converters(files: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Converters by operator, and keys that are no operator's name.

    An operator may have several: it is "validated" if each of them may refuse a node, and has
    "dynamic_shapes" if one of them takes such.
    """
    found: dict[str, Any] = {}
    unresolved = set()
    for path in sorted(files):
        if not path.startswith(CONVERSION) or path.startswith(CONVERSION + "plugins/"):
            continue
        for call in calls(ast.parse(files[path]), "dynamo_tensorrt_converter"):
            name, options = op_name(call.args[0]), {k.arg: k.value for k in call.keywords}
            if not is_operator(name):
                unresolved.add(name)
                continue
            given = options.get("capability_validator")
            entry = found.setdefault(
                name, {"validated": True, "validators": set(), "dynamic_shapes": False}
            )
            entry["validated"] &= given is not None
            entry["validators"] |= set(validators(given) if given is not None else [])
            shapes = options.get("supports_dynamic_shapes")
            entry["dynamic_shapes"] |= isinstance(shapes, ast.Constant) and shapes.value is True
    listed = {n: {**e, "validators": sorted(e["validators"])} for n, e in sorted(found.items())}
    return listed, sorted(unresolved)


def names_in_set(tree: ast.Module, variable: str) -> list[str]:
    """Operators of a set that a module defines."""
    for node in tree.body:
        target: ast.expr | None = None
        if isinstance(node, ast.AnnAssign):
            target = node.target
        elif isinstance(node, ast.Assign):
            target = node.targets[0]
        if isinstance(target, ast.Name) and target.id == variable:
            assert isinstance(node, ast.AnnAssign | ast.Assign)
            if isinstance(node.value, ast.Set):
                return sorted(op_name(e) for e in node.value.elts)
    raise SystemExit(f"the wheel defines no set {variable}: look for where it went")


def decompositions(files: Mapping[str, str]) -> dict[str, list[str]]:
    """What is decomposed before conversion, by whom.

    "by_torch" with torch's decompositions, "own" with Torch-TensorRT's, "attention" only if asked
    for, "kept" never; composite operators of ATen that are in none of them are decomposed, too.
    A name without an overload stands for all of them.
    """
    groups = ast.parse(files[LOWERING + "_decomposition_groups.py"])
    tree = ast.parse(files[LOWERING + "_decompositions.py"])
    attention = names_in_set(tree, "ATTENTION_DECOMPOSITION_OPS")
    own = {op_name(c.args[0]) for c in calls(tree, "register_torch_trt_decomposition")}
    own |= {op_name(c.args[0]) for c in calls(tree, "replace_inplace_op")}
    own = {n for n in own if is_operator(n)} - {a.removesuffix(".default") for a in attention}
    return {
        "by_torch": names_in_set(groups, "torch_enabled_decompositions"),
        "own": sorted(own - set(attention)),
        "attention": attention,
        "kept": names_in_set(groups, "torch_disabled_decompositions"),
    }


def lowered(files: Mapping[str, str]) -> dict[str, str]:
    """Operators that a lowering pass compares targets with: it removes or replaces them."""
    found = {}
    for name in PASSES:
        for node in ast.walk(ast.parse(files[f"{LOWERING}passes/{name}.py"])):
            if isinstance(node, ast.Compare):
                texts = [op_name(e) for e in node.comparators]
                found.update({t: name for t in texts if t.startswith("aten.")})
    return dict(sorted(found.items()))


def signature(function: ast.FunctionDef, defaults: Mapping[str, str]) -> list[dict[str, str]]:
    """Parameters of a function: name, kind and, where there is one, the default's source text."""
    args = function.args
    plain = [*args.posonlyargs, *args.args]
    given = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    rows = [(a.arg, "positional", d) for a, d in zip(plain, given, strict=True)]
    if args.vararg:
        rows.append((args.vararg.arg, "*", None))
    rows += [(a.arg, "keyword", d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg:
        rows.append((args.kwarg.arg, "**", None))
    result = []
    for name, kind, default in rows:
        row = {"name": name, "kind": kind}
        if default is not None:
            text = ast.unparse(default)
            row["default"] = defaults.get(text.removeprefix("_defaults."), text)
        result.append(row)
    return result


def signatures(files: Mapping[str, str]) -> dict[str, list[dict[str, str]]]:
    """Parameters of every function of `FUNCTIONS`."""
    named = ast.parse(files[PACKAGE + "dynamo/_defaults.py"]).body
    defaults = {
        n.targets[0].id: ast.unparse(n.value)
        for n in named
        if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)
    }
    found = {}
    for full, path in FUNCTIONS.items():
        wanted = full.rpartition(".")[2]
        nodes = [
            n
            for n in ast.parse(files[PACKAGE + path]).body
            if isinstance(n, ast.FunctionDef) and n.name == wanted
        ]
        if not nodes:
            raise SystemExit(f"{full} is no longer defined in {path}")
        found[full] = signature(nodes[-1], defaults)
    return found


def torch_tensorrt_table(wheel: Path) -> dict[str, Any]:
    """What Torch-TensorRT converts, decomposes and removes."""
    files, (version, needed) = sources(wheel), metadata(wheel)
    listed, unresolved = converters(files)
    return {
        "version": version,
        "source": source_of(wheel),
        "made_with": MADE_WITH,
        "requires": needed,
        "converters": listed,
        "unresolved_keys": unresolved,
        "decomposed": decompositions(files),
        "lowered": lowered(files),
    }


# -- TensorRT -------------------------------------------------------------------------------------


def names_of(wheel: Path) -> dict[str, Any]:
    """Which of `NAMES` the binding library has: each is a text that ends with a zero byte there.

    What a linker merged into the end of a longer text counts as there, so that a "true" is weaker
    evidence than a "false".
    """
    with zipfile.ZipFile(wheel) as archive:
        library = b"".join(archive.read(n) for n in archive.namelist() if n.endswith(".so"))
    return {
        "version": metadata(wheel)[0],
        "source": source_of(wheel),
        "names": {name: name.encode() + b"\0" in library for name in sorted(NAMES)},
    }


def operators_table(text: str, commit: str) -> dict[str, Any]:
    """The support matrix of the ONNX parser of TensorRT.

    Restrictions are prose; the table says whether there are any and the identifiers they mention.
    """
    head = re.search(r"TensorRT ([\d.]+) supports operators .*?opset (\d+) to opset (\d+)", text)
    if head is None:
        raise SystemExit("operators.md does not say which TensorRT and opsets it is for")
    rows = {}
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")]
        if len(cells) < 2 or cells[1] not in ("Y", "N"):
            continue
        types = [t.strip() for t in cells[2].split(",")] if len(cells) > 2 else []
        words = cells[3] if len(cells) > 3 else ""
        rows[cells[0]] = {
            "supported": cells[1] == "Y",
            "types": [t for t in types if t],
            "restricted": bool(words),
            "mentions": sorted({m.strip() for m in re.findall(r"`([^`]+)`", words)}),
        }
    return {
        "version": head[1],
        "opsets": [int(head[2]), int(head[3])],
        "source": {
            "repository": "onnx/onnx-tensorrt",
            "path": "docs/operators.md",
            "commit": commit,
        },
        "made_with": MADE_WITH,
        "operators": dict(sorted(rows.items())),
    }


# -- files ----------------------------------------------------------------------------------------


def dump(table: Mapping[str, Any]) -> str:
    """JSON text with one line for each entry at the third level."""

    def inner(value: Any, depth: int) -> str:
        if depth == 2 or not isinstance(value, dict) or not value:
            return json.dumps(value)
        pad = "  " * (depth + 1)
        rows = [f"{pad}{json.dumps(k)}: {inner(v, depth + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(rows) + "\n" + "  " * depth + "}"

    return inner(dict(table), 0) + "\n"


def update(path: Path, table: Mapping[str, Any]) -> None:
    """Writes a table; entries at the top that it does not have stay."""
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(dump({**before, **table}))
    print(path)


def download(version: str, folder: str) -> Path:
    """The wheel of torch-tensorrt from the package index of pip."""
    wanted = f"torch-tensorrt=={version}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, wanted]
    subprocess.run(pip, check=True)
    (wheel,) = Path(folder).glob("torch_tensorrt-*.whl")
    return wheel


def read(place: str) -> str:
    """Text of a file or of a web address."""
    if place.startswith("https://"):
        with urllib.request.urlopen(place) as answer:
            return str(answer.read().decode())
    return Path(place).read_text()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-tensorrt", type=Path, help="wheel of torch-tensorrt")
    parser.add_argument("--download", metavar="VERSION", help="fetch that wheel with pip instead")
    parser.add_argument("--bindings", type=Path, help="wheel of tensorrt-cu13-bindings")
    parser.add_argument("--operators", help="operators.md of onnx/onnx-tensorrt, or its address")
    parser.add_argument("--commit", default="unknown", help="which commit that file is of")
    parser.add_argument("--out", type=Path, help="one folder for all tables")
    args = parser.parse_args(argv)
    tables, signatures_file = args.out or TABLES, (args.out or SIGNATURES) / "signatures.json"
    with tempfile.TemporaryDirectory() as folder:
        wheel = download(args.download, folder) if args.download else args.torch_tensorrt
        if wheel is not None:
            update(tables / "torch_tensorrt.json", torch_tensorrt_table(wheel))
            made = {"version": metadata(wheel)[0], "source": source_of(wheel)}
            listed = {**made, "made_with": MADE_WITH, "functions": signatures(sources(wheel))}
            update(signatures_file, listed)
    if args.bindings is not None:
        update(signatures_file, {"tensorrt": names_of(args.bindings)})
    if args.operators is not None:
        table = operators_table(read(args.operators), args.commit)
        update(tables / "onnx_tensorrt.json", table)
    if not (wheel or args.bindings or args.operators):
        parser.error("name at least one source")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The way through the house: imports go one way; importing does nothing but register operators."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent / "toma_fx"
ROOMS = [
    ["errors", "printed"],
    ["methods.windows", "methods.facility", "methods.hashing", "ops"],
    ["methods.base"],
    ["methods.toma", "methods.tomesd", "methods.todo"],
    ["methods.tofu", "methods.ca_tome", "methods.retom", "methods.baselines"],
    ["config", "axis"],
    ["rules.base"],
    ["rules.compute", "rules.shape", "rules.attention", "rules.quantised"],
    ["rules", "guard"],
    ["canonical"],
    ["capture", "dynamo"],
    ["flow"],
    ["parity"],
    ["analysis"],
    ["places"],
    ["plan", "flops"],
    ["verify"],
    ["passes.rewriter", "passes.tokens", "passes.provide_patterns", "passes.merge_segments",
     "passes.pipeline"],
    ["state"],
    ["specialize"],
    ["requests"],
    ["runtime"],
    ["backend"],
    ["report"],
    ["api"],
    ["calibration"],
    ["export.manifest"],
    ["export.artifact", "export.programs", "export.coverage"],
    ["export.targets"],
    ["export.to_onnx", "export.to_aoti", "export.builder"],
    ["export.to_tensorrt"],
    ["export.entry", "export.loader"],
    ["tiny"],
    ["inputs", "demo"],
    ["artifact_commands"],
    ["cli"],
]  # fmt: skip
LEVEL = {name: i for i, room in enumerate(ROOMS) for name in room}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("toma_fx."):
            module = node.module.removeprefix("toma_fx.")
            if module in ("methods", "passes"):
                found.update(f"{module}.{alias.name}" for alias in node.names)
            else:
                found.add(module)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("toma_fx."):
                    found.add(alias.name.removeprefix("toma_fx."))
    return found


def test_imports_go_one_way() -> None:
    modules = [p for p in ROOT.rglob("*.py") if p.name != "__init__.py"]
    assert len(modules) > 15
    for path in modules:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for other in imports(path):
            assert LEVEL[other] <= LEVEL[name], f"{name} imports {other}, a later room"


def test_only_the_rewriter_mutates_graphs_after_capture() -> None:
    doors = {"passes/rewriter.py", "canonical.py", "export/to_onnx.py"}  # the last: of ONNX
    calls = {"erase_node", "replace_all_uses_with", "replace_input_with", "call_function"}
    for path in ROOT.rglob("*.py"):
        if str(path.relative_to(ROOT)) in doors:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in calls, f"{path.name} calls {node.func.attr}"


def test_importing_needs_no_optional_package_and_no_diffusers() -> None:
    code = (
        "import sys, toma_fx; "
        "print([m for m in ('diffusers', 'onnx', 'skimage') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"

"""The layout of the package: a folder imports only those named before it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import toma_fx

ROOT = Path(__file__).parent.parent / "toma_fx"
ORDER = (
    "errors", "events", "files", "devices", "compat", "methods", "models", "graph", "capture",
    "analysis", "plan", "passes", "run", "export", "api", "inputs", "serving",
    "calibration", "measure", "offline", "cli", "__main__",
)  # fmt: skip
"""Folders and files of the package in the order of the pipeline. `toma_fx/__init__.py` is last."""
LONGEST = 400
"""Lines of a file."""
REWRITERS = {"graph/rewriter.py", "graph/outline.py", "graph/lifting.py"}
MUTATORS = {
    "erase_node", "replace_all_uses_with", "replace_input_with", "call_function", "placeholder",
    "create_node", "graph_copy", "node_copy", "inserting_before", "inserting_after", "get_attr",
    "call_module", "eliminate_dead_code", "set_codegen", "update_arg", "insert_arg", "update_kwarg",
}  # fmt: skip
FIELDS = {"args", "kwargs", "target", "meta"}


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    """Dotted name inside the package; a package is called by its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in files()}


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names, inside the package, of the modules that a file imports anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            module = node.module or ""
            full = [f"{module}.{alias.name}" for alias in node.names]
            found = [f if f.removeprefix("toma_fx.") in MODULES else module for f in full]
        else:
            continue
        for name in found:
            if name == "toma_fx":
                yield ""
            elif name.startswith("toma_fx."):
                yield name.removeprefix("toma_fx.")


IMPORTS = {name_of(p): set(imported(ast.parse(p.read_text()))) for p in files()}


def room(module: str) -> str:
    return module.partition(".")[0]


def test_the_order_names_every_folder() -> None:
    assert len(MODULES) > 80
    assert {room(m) for m in MODULES if m} == set(ORDER)


def test_a_folder_imports_only_those_before_it() -> None:
    place = {name: i for i, name in enumerate(ORDER)}
    for module, others in IMPORTS.items():
        for other in others if module else ():
            assert other, f"{module} imports the package itself, which imports everything"
            assert place[room(other)] <= place[room(module)], f"{module} imports {other}"


def test_the_files_of_a_folder_form_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle of imports: {' -> '.join((*path, module))}"
        if module not in done:
            for other in IMPORTS[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_packages_hold_no_code() -> None:
    for path in ROOT.rglob("__init__.py"):
        if path.parent == ROOT:
            continue
        allowed = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            assert isinstance(node, allowed), f"{path}: {ast.unparse(node)[:60]}"


def test_files_are_short() -> None:
    long = {name_of(p): n for p in files() if (n := len(p.read_text().splitlines())) > LONGEST}
    assert not long


def _written_field(target: ast.AST) -> str:
    """`node.args = ...` and `node.meta[...] = ...`: the name of the field of a node."""
    if isinstance(target, ast.Subscript):
        target = target.value
        return "meta" if isinstance(target, ast.Attribute) and target.attr == "meta" else ""
    named = isinstance(target, ast.Attribute) and target.attr in FIELDS
    return target.attr if named and isinstance(target, ast.Attribute) else ""


def mutations(tree: ast.AST) -> Iterator[str]:
    """What a file does to graphs: calls of FX's mutators, and writes to the fields of nodes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in MUTATORS:
                yield node.func.attr
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in (x for t in targets for x in getattr(t, "elts", [t])):
                own = (
                    isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self"
                )
                if not own and (field := _written_field(target)):
                    yield f"{field} ="


NO_GRAPHS = ("export/to_onnx/", "compat/")
"""Files that change graphs of ONNX, and that note on inputs what only compilers read."""


def test_only_the_rewriter_changes_graphs() -> None:
    for path in REWRITERS:
        assert set(mutations(ast.parse((ROOT / path).read_text()))) >= {"erase_node", "meta ="}
    for path in files():
        inside = str(path.relative_to(ROOT))
        if inside in REWRITERS or inside.startswith(NO_GRAPHS):
            continue
        assert not list(mutations(ast.parse(path.read_text()))), inside


HEAVY = (
    "torch._dynamo", "torch._inductor", "diffusers", "torchao", "rich", "onnx", "skimage", "triton",
    "toma_fx.methods.facility_triton",
)  # fmt: skip


def imported_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has imported after `code`."""
    code += "; import sys; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_importing_the_package_imports_nothing() -> None:
    assert not {"torch", "rich", "numpy"} & imported_by("import toma_fx; dir(toma_fx)")


def test_importing_optimize_imports_nothing_heavy() -> None:
    alone = imported_by("import torch")
    modules = imported_by("import torch, toma_fx; toma_fx.optimize; toma_fx.explain")
    assert "toma_fx.run.denoiser" in modules
    assert not (modules - alone) & set(HEAVY)


def test_every_public_name_is_there_for_type_checkers_too() -> None:
    """The names below `if TYPE_CHECKING` are those of the table."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0]
    named = {a.name: n.module for n in imports if n.module != "typing" for a in n.names}
    assert named.pop("export") == "toma_fx"
    assert named == toma_fx._MODULES
    assert set(toma_fx.__all__) == {*named, "export"}
    assert set(toma_fx.__all__) <= set(dir(toma_fx))
    for name in toma_fx.__all__:
        assert getattr(toma_fx, name).__doc__, name
    everything: dict[str, object] = {}
    exec("from toma_fx import *", everything)
    assert everything.keys() >= set(toma_fx.__all__)
    with pytest.raises(AttributeError, match="optimise"):
        toma_fx.optimise  # noqa: B018

"""What pyproject.toml says of the package fits what the package imports."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import toma_fx

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "tensorrt": "torch-tensorrt"}
"""Distributions that bring a module of another name."""
NOT_DECLARED = {
    "ImageReward": "pins old versions of timm and fairscale; docs/quality.md says how to have it",
    "vllm_omni": "an engine, which loads this package as a plug-in of its own",
    "sglang": "an engine, which loads this package as a plug-in of its own",
}
"""Modules that no extra may bring, and why."""
IMPORTERS = re.compile(r"^_?import_\w+$|^find_spec$")
"""Functions that import the package that their first argument names."""


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", DISTRIBUTIONS.get(name, name)).lower()


def names_of(requirements: list[str]) -> set[str]:
    return {normalized(re.split(r"[\[<>=!~; ]", text)[0]) for text in requirements}


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules that a file imports anywhere, functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if IMPORTERS.match(function):
                yield str(node.args[0].value)


def third_party() -> dict[str, set[str]]:
    """Foreign top-level modules, and the files that import them."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "toma_fx").rglob("*.py")):
        for name in imported(ast.parse(path.read_text())):
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top != "toma_fx":
                found.setdefault(top, set()).add(str(path.relative_to(ROOT)))
    return found


def test_every_import_is_declared() -> None:
    extras = PROJECT["optional-dependencies"]
    declared = names_of(
        [*PROJECT["dependencies"], *(x for extra in extras.values() for x in extra)]
    )
    found = third_party()
    assert {"torch", "PIL", "yaml", "onnx_ir", "tensorrt", "transformers"} <= set(found)
    missing = {name: files for name, files in found.items() if normalized(name) not in declared}
    assert set(missing) - set(NOT_DECLARED) == set(), missing


def test_every_dependency_is_imported() -> None:
    assert names_of(PROJECT["dependencies"]) <= {normalized(name) for name in third_party()}


def test_what_every_file_imports_at_once_is_a_dependency() -> None:
    """But for files that are themselves imported only where an extra is installed."""
    optional = {"toma_fx/methods/facility_triton.py"}
    core = names_of(PROJECT["dependencies"])
    for path in sorted((ROOT / "toma_fx").rglob("*.py")):
        body = ast.parse(path.read_text()).body
        top = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        for name in imported(ast.Module(top, [])):
            top_name = name.split(".")[0]
            if top_name in sys.stdlib_module_names or top_name == "toma_fx":
                continue
            file = str(path.relative_to(ROOT))
            assert normalized(top_name) in core or file in optional, f"{file} imports {name}"


def test_the_extra_all_names_extras() -> None:
    (text,) = PROJECT["optional-dependencies"]["all"]
    names = re.fullmatch(r"toma-fx\[(.+)\]", text)
    assert names is not None
    assert set(names[1].split(",")) <= set(PROJECT["optional-dependencies"]) - {"all"}


def test_versions_agree() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert PROJECT["version"] == toma_fx.__version__
    assert f"\nversion: {PROJECT['version']}\n" in citation
    assert f"\nlicense: {PROJECT['license']}\n" in citation


def test_python_versions_agree() -> None:
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    told = [
        text.rpartition(" ")[2]
        for text in PROJECT["classifiers"]
        if re.search(r"Python :: 3\.\d+$", text)
    ]
    assert told == ["3.11", "3.12", "3.13"]
    assert str(told).replace("'", '"') in (ROOT / "noxfile.py").read_text()

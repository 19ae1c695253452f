"""What AOTInductor artifacts store, and how their builds go wrong; nothing is compiled."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch

import toma_fx
from tests.methods.test_methods import inputs, model, static
from toma_fx.errors import BuildError, ConfigError, UnknownNameError
from toma_fx.export.builder import export
from toma_fx.export.machine import architecture
from toma_fx.export.to_aoti import files, lower, target
from toma_fx.export.to_aoti.files import PACKAGE, WEIGHTS
from toma_fx.export.to_aoti.target import AOTITarget

CPU = torch.device("cpu")


@cache
def optimized() -> Any:
    return toma_fx.optimize(model(), method=static("grid"))


def test_weights_file_keeps_layouts(tmp_path: Path) -> None:
    given = {
        "plain": torch.arange(6.0).reshape(2, 3),
        "last": torch.arange(48.0).reshape(1, 3, 4, 4).to(memory_format=torch.channels_last),
        "row": torch.arange(3.0).expand(4, 3),
        "part": torch.arange(20.0).reshape(4, 5)[1:3, 1:4],
        "half": torch.arange(4).to(torch.bfloat16),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 4),
    }
    files.save_tensors(tmp_path / "w.safetensors", given, {}, CPU)
    found, aliases = files.load_weights(tmp_path / "w.safetensors", CPU)
    assert aliases == {}
    for name, x in given.items():
        assert torch.equal(found[name], x)
        assert found[name].stride() == x.stride()
        assert found[name].dtype == x.dtype


def test_tensors_of_gpu_programs_that_stay_on_the_host(tmp_path: Path) -> None:
    gpu = torch.device("meta")
    files.save_tensors(tmp_path / "w.safetensors", {"a": torch.ones(2)}, {}, gpu)
    files.save_tensors(tmp_path / "v.safetensors", {"a": torch.ones(2)}, {}, CPU)
    for name, where in (("w", "cpu"), ("v", "meta")):
        found, _ = files.load_weights(tmp_path / f"{name}.safetensors", gpu)
        assert found["a"].device.type == where


def test_tied_weights_and_constants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied weights are stored once; constants of equal value, too; others under other names."""
    table = torch.arange(6.0)
    state = {"in": torch.ones(2, 3), "out": torch.zeros(3)}
    state["tied"] = state["in"]
    known = files.names_by_memory(state)
    (tmp_path / files.PARTS).mkdir()
    values = {"a_refresh": table, "a_reuse": table.clone(), "b_plain": table + 1, "b_reuse": table}
    for label, extra in values.items():
        given = {"in": state["in"], "tied": state["tied"], "lifted": extra}
        files.save_constants(tmp_path / files.part_files(label)[1], given, known, CPU)

    class Calls(list[str]):
        device = CPU
        name = "a"

        def label(self, kind: str) -> str:
            return f"{self.name}_{kind}"

    first, second = Calls(("refresh", "reuse")), Calls(("plain", "reuse"))
    second.name = "b"
    monkeypatch.setattr(files, "weights_of", lambda programs: state)
    files.save_weights(tmp_path, [first, second])  # type: ignore[list-item]
    found, aliases = files.load_weights(tmp_path / WEIGHTS, CPU)
    assert set(found) == {"in", "constant.0", "constant.1"}
    assert {aliases[f"{label}/tied"] for label in values} == {"in"}
    lifted = {label: aliases[f"{label}/lifted"] for label in values}
    assert lifted["a_refresh"] == lifted["a_reuse"] == lifted["b_reuse"] != lifted["b_plain"]
    assert torch.equal(found[lifted["b_plain"]], table + 1)


@pytest.mark.usefixtures("exported_once")
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ((("max_autotun", True),), UnknownNameError),
        ((("aot_inductor.package_constants_in_so", True),), ConfigError),
        ((("freezing", True),), ConfigError),
    ],
)
def test_bad_options(tmp_path: Path, options: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        export(optimized(), inputs(), tmp_path / "a", AOTITarget(inductor=options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("exported_once")
def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "has_cpp_compiler", lambda: False)
    with pytest.raises(BuildError, match=r"C\+\+ compiler"):
        export(optimized(), inputs(), tmp_path / "a", AOTITarget())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("exported_once")
def test_an_interrupted_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that were compiled are not compiled again, whenever the interruption comes."""
    compiled, at = [], ["two_reuse", "one_refresh", "package", "weights", "open", ""]
    calls, names = [inputs(), inputs(batch=1)], ["two", "one"]

    def compile(label: str, *args: Any) -> None:
        *_, folder = args
        if at[0] == label:
            raise KeyboardInterrupt
        compiled.append(label)
        (folder / files.PARTS).mkdir(exist_ok=True)
        for name in files.part_files(label):
            (folder / name).write_text(label)

    def step(name: str, file: str) -> Callable[..., None]:
        def write(folder: Path, *args: Any) -> None:
            if at[0] == name:
                raise KeyboardInterrupt
            ZipFile(folder / file, "w").close()

        return write

    def opened(artifact: Any, *args: Any) -> Any:
        if at[0] == "open":
            raise KeyboardInterrupt
        assert {p.name for p in artifact.folder.path.iterdir()} == {PACKAGE, WEIGHTS}
        raise SystemExit

    monkeypatch.setattr(lower, "compile_program", compile)
    monkeypatch.setattr(lower, "join_parts", step("package", PACKAGE))
    monkeypatch.setattr(lower, "save_weights", step("weights", WEIGHTS))
    monkeypatch.setattr(AOTITarget, "open", staticmethod(opened))
    while at[0]:
        with pytest.raises(KeyboardInterrupt):
            export(optimized(), calls, tmp_path / "a", AOTITarget(), names=names)
        at.pop(0)
    with pytest.raises(SystemExit):
        export(optimized(), calls, tmp_path / "a", AOTITarget(), names=names)
    assert compiled == ["two_refresh", "two_reuse", "one_refresh", "one_reuse"]


def test_architecture_names_the_machine() -> None:
    words = architecture(CPU).split()
    assert words[0] == sys.platform
    assert len(words) == len(set(words))

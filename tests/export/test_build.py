"""Builds: all or nothing, resumed where they were interrupted, compared with the process."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import toma_fx
from tests.examples import ROOT, load_example
from tests.export.in_process import InProcess
from tests.methods.test_methods import inputs, model
from toma_fx.errors import BuildError, ModelTypeError
from toma_fx.export import builder, building
from toma_fx.export.builder import export
from toma_fx.export.building import Stage
from toma_fx.export.reading import verify_artifact

pytestmark = pytest.mark.usefixtures("exported_once")


# -- all or nothing -------------------------------------------------------------------------------


def test_wrong_programs_are_never_published(tmp_path: Path, optimized: Any) -> None:
    with pytest.raises(BuildError, match="does not compute"):
        export(optimized, inputs(), tmp_path / "a", InProcess(error=0.01))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_goes_on(tmp_path: Path, optimized: Any, target: InProcess) -> None:
    target.fail_at = "reuse.txt"
    with pytest.raises(KeyboardInterrupt):
        export(optimized, inputs(), tmp_path / "a", target)
    assert not (tmp_path / "a").exists()
    assert target.made == ["refresh.txt", "reweigh.txt"]
    target.fail_at, said = "", list[Stage]()
    export(optimized, inputs(), tmp_path / "a", target, report=said.append)
    assert target.made == ["refresh.txt", "reweigh.txt", "reuse.txt"], "nothing is made twice"
    assert [(s.name, s.state) for s in said] == [
        ("export", "begun"),
        ("export", "done"),
        ("refresh", "kept"),
        ("reweigh", "kept"),
        ("reuse", "begun"),
        ("reuse", "done"),
        ("compare with the process", "begun"),
        ("compare with the process", "done"),
    ]
    assert [s.size for s in said if s.name == "reuse"] == [0, len("reuse.txt")]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_build_of_something_else_starts_anew(
    tmp_path: Path, optimized: Any, target: InProcess
) -> None:
    target.fail_at = "reuse.txt"
    with pytest.raises(KeyboardInterrupt):
        export(optimized, inputs(), tmp_path / "a", target)
    target.fail_at = ""
    other = toma_fx.optimize(model(), min_tokens=1, ratio=0.25, weights_every=2)
    export(other, inputs(), tmp_path / "a", target)
    assert target.made.count("refresh.txt") == 2


def test_a_build_by_other_code_starts_anew(
    tmp_path: Path, optimized: Any, target: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text("x = 1")
    first = builder.source_digest(tmp_path / "package")
    (tmp_path / "package" / "a.py").write_text("x = 2")
    assert first != builder.source_digest(tmp_path / "package")
    target.fail_at = "reuse.txt"
    with pytest.raises(KeyboardInterrupt):
        export(optimized, inputs(), tmp_path / "a", target)
    target.fail_at = ""
    monkeypatch.setattr(builder, "source_digest", lambda: "edited")
    export(optimized, inputs(), tmp_path / "a", target)
    assert target.made.count("refresh.txt") == 2


def test_an_artifact_is_replaced_only_by_a_finished_one(
    tmp_path: Path, optimized: Any, target: InProcess
) -> None:
    out = tmp_path / "a"
    first = export(optimized, inputs(), out, target)
    with pytest.raises(BuildError, match="not empty"):
        export(optimized, inputs(), out, target)
    target.fail_at = "reuse.txt"
    with pytest.raises(KeyboardInterrupt):
        export(optimized, inputs(), out, target, overwrite=True)
    assert verify_artifact(out) == first
    target.fail_at = ""
    second = export(optimized, inputs(), out, target, overwrite=True, license="new")
    assert verify_artifact(out) == second
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_folders_of_others_are_left_alone(
    tmp_path: Path, optimized: Any, target: InProcess
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("all my work")
    (tmp_path / "b").write_text("a file")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "manifest.json").write_text('{"name": "a web site"}')
    export(optimized, inputs(), tmp_path / "d", target)
    (tmp_path / "d" / "notes.txt").write_text("beside an artifact")
    for name in "abcd":
        with pytest.raises(BuildError):
            export(optimized, inputs(), tmp_path / name, target, overwrite=True)
    assert (tmp_path / "a" / "thesis.tex").read_text() == "all my work"
    assert (tmp_path / "d" / "notes.txt").exists()


def test_a_full_disk(
    tmp_path: Path, optimized: Any, target: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    first = export(optimized, inputs(), tmp_path / "a", target)
    monkeypatch.setattr(building, "write_file", full)
    with pytest.raises(BuildError, match="No space left"):
        export(optimized, inputs(), tmp_path / "a", target, overwrite=True)
    assert verify_artifact(tmp_path / "a") == first


def test_a_folder_that_cannot_be_written(optimized: Any, target: InProcess) -> None:
    with pytest.raises(BuildError, match=r"can.t be written"):
        export(optimized, inputs(), "/proc/artifact", target)


def test_only_optimized_models_are_built(tmp_path: Path, target: InProcess) -> None:
    with pytest.raises(ModelTypeError):
        export(model(), inputs(), tmp_path / "a", target)


def test_the_published_schema(tmp_path: Path, optimized: Any, target: InProcess) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    written = load_example("write_schema", "tools")
    assert written.PATH.read_text() == written.text(), "python tools/write_schema.py"
    assert '"export/*.json"' in (ROOT / "pyproject.toml").read_text(), "it is in the package"
    export(optimized, inputs(), tmp_path / "a", target)
    data = json.loads((tmp_path / "a" / "manifest.json").read_text())
    check = jsonschema.Draft202012Validator(json.loads(written.text())).validate
    check(data)
    for wrong in ({"version": 2}, {"files": {"a": 3}}, {"schedule": {}}, {"more": 1}):
        with pytest.raises(jsonschema.ValidationError):
            check({**data, **wrong})


# -- choices that depend on rounding --------------------------------------------------------------


class Weighing(InProcess):
    """Gives other weights than the process, and computes with them."""

    def step(self, kind: Any, inputs: Sequence[Tensor], kept: Mapping[str, Tensor]) -> Any:
        outputs, made = self.programs.run(kind, inputs, kept)
        if made:
            made = {n: 1.2 * x if x.is_floating_point() else x for n, x in made.items()}
            outputs, _ = self.programs.run("reuse", inputs, {**kept, **made})
        return outputs, made


def test_wrong_weights_are_a_fault(tmp_path: Path, optimized: Any) -> None:
    with pytest.raises(BuildError, match="merged alike"):
        export(optimized, inputs(), tmp_path / "a", Weighing())


class Choosing(InProcess):
    """Keeps in some windows one token that the process merges away."""

    def __init__(self, windows: int) -> None:
        super().__init__()
        self.windows = windows

    def step(self, kind: Any, inputs: Sequence[Tensor], kept: Mapping[str, Tensor]) -> Any:
        outputs, made = self.programs.run(kind, inputs, kept)
        if kind != "refresh":
            return outputs, made
        ((name, idx),) = ((n, x.clone()) for n, x in made.items() if n.endswith("idx"))
        every = torch.arange(made[name.replace("idx", "merge")].shape[-1])
        for row in idx.flatten(0, 1)[: self.windows]:
            row[0] = every[~torch.isin(every, row)][0]
        outputs, weights = self.programs.run("reweigh", inputs, {**made, name: idx})
        return outputs, {name: idx, **weights}


def test_choices_that_depend_on_rounding_are_no_fault(tmp_path: Path, optimized: Any) -> None:
    made = export(optimized, inputs(), tmp_path / "a", Choosing(1))
    assert 0.95 < made.calls[0].parity[0].alike < 1 == made.calls[0].parity[1].alike
    with pytest.raises(BuildError, match="merged alike"):
        export(optimized, inputs(), tmp_path / "b", Choosing(1000))

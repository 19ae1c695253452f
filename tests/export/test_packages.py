"""Packages of compiled programs that hold what they should not; nothing is compiled."""

from __future__ import annotations

import io
import json
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import toma_fx
from tests.export.edited import edit
from tests.export.fuzz import damaged_bytes
from tests.export.in_process import InProcess
from tests.methods.test_methods import inputs, model
from toma_fx.errors import ArtifactError
from toma_fx.export.archive import entry_sizes, read_entries
from toma_fx.export.builder import export
from toma_fx.export.manifest import CallSpec, Manifest
from toma_fx.export.programs import export_programs
from toma_fx.export.reading import file_spec, open_artifact, verify_artifact
from toma_fx.export.to_aoti.package import PACKAGE, SPECS, check_package, specs_text, write_package


def archive(*entries: tuple[str | zipfile.ZipInfo, bytes], compression: int = 0) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", compression) as written:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in entries:
            written.writestr(name, content)
    return file.getvalue()


def link() -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("archive/link")
    entry.create_system, entry.external_attr = 3, 0o120777 << 16
    return entry


GOOD = archive(("archive/a", b"x"), ("archive/.data/b", b"yy"))
BOMB = zipfile.ZIP_DEFLATED
WRONG_ARCHIVES: dict[str, bytes] = {
    "above": archive(("../a", b"")),
    "above inside": archive(("archive/../../a", b"")),
    "absolute": archive(("/a", b"")),
    "backslash": archive(("..\\a", b"")),
    "drive": archive(("C:a", b"")),
    "twice": archive(("a", b"1"), ("a", b"2")),
    "folder": archive(("a/", b"")),
    "current folder": archive(("./a", b"")),
    "NUL": GOOD.replace(b"archive/a", b"archive\0a"),
    "link": archive((link(), b"/etc/passwd")),
    "bomb": archive(("a", bytes(10**7)), compression=BOMB),
    "encrypted": GOOD.replace(b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\1\0"),
    "cut": GOOD[:-30],
    "two names": GOOD.replace(b"archive/a", b"archive/z", 1),
    "nothing": b"",
    "no archive": b"x" * 1000,
}


@pytest.mark.parametrize("content", WRONG_ARCHIVES.values(), ids=WRONG_ARCHIVES)
def test_archives_are_refused(content: bytes) -> None:
    listed = {"archive/a": 1, "archive/.data/b": 2}
    assert dict(read_entries(io.BytesIO(GOOD), listed, "")) == {
        "archive/a": b"x", "archive/.data/b": b"yy"
    }  # fmt: skip
    with pytest.raises(ArtifactError):
        dict(read_entries(io.BytesIO(content), listed, ""))


def test_packages_are_checked_with_the_other_files(copy: Path) -> None:
    """Whether or not anything is loaded, and although every checksum fits."""
    (copy / "a.pt2").write_bytes(GOOD)
    edit(copy, lambda data: data["files"].update({"a.pt2": asdict(file_spec(copy / "a.pt2"))}))
    with open_artifact(copy) as files:
        assert files.read_package("a.pt2") == {"archive/a": b"x", "archive/.data/b": b"yy"}
    edit(copy, lambda data: data["files"]["a.pt2"].update(entries={"archive/a": 1}))
    with pytest.raises(ArtifactError, match="the manifest lists"):
        verify_artifact(copy)


def test_damaged_archives_raise_nothing_else() -> None:
    chance, listed, same = random.Random(0), {"archive/a": 1, "archive/.data/b": 2}, 0
    for _ in range(1000):
        damaged = damaged_bytes(GOOD, chance)
        try:
            entries = dict(read_entries(io.BytesIO(damaged), listed, ""))
        except ArtifactError:
            continue
        same += 1
        assert {name: len(content) for name, content in entries.items()} == listed
    assert same < 500


@pytest.mark.parametrize("listed", [{}, {"archive/a": 1}, {"archive/a": 2, "archive/.data/b": 2}])
def test_entries_are_those_that_are_listed(listed: dict[str, int]) -> None:
    assert entry_sizes(io.BytesIO(GOOD), "") == {"archive/a": 1, "archive/.data/b": 2}
    with pytest.raises(ArtifactError, match="the manifest lists"):
        dict(read_entries(io.BytesIO(GOOD), listed, ""))


# -- what may be in a package ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, dict[str, bytes]]:
    """A manifest, and a package of its programs, without their code."""
    optimized = toma_fx.optimize(model(), method="toma", min_tokens=1)
    manifest = export(optimized, inputs(), tmp_path_factory.mktemp("p") / "a", InProcess())
    programs = export_programs(optimized, inputs())
    entries = {f"archive/data/aotinductor/{kind}/a.so": b"" for kind in programs}
    specs = {kind: programs.tensors_of(kind) for kind in programs}
    return manifest, {"archive/byteorder": b"", SPECS: specs_text(specs).encode(), **entries}


def test_a_package_of_the_programs(program: Any, tmp_path: Path) -> None:
    manifest, entries = program
    check_package(entries, manifest)
    write_package(tmp_path / PACKAGE, entries)
    spec = file_spec(tmp_path / PACKAGE)
    assert spec.entries == {name: len(content) for name, content in entries.items()}
    with (tmp_path / PACKAGE).open("rb") as file:
        assert dict(read_entries(file, spec.entries, "")) == entries


CODE = "archive/data/aotinductor/reuse/"


@pytest.mark.parametrize(
    "name",
    [
        CODE + "a.pt", CODE + "a.PKL", CODE + "x/a.so", "archive/data/sample_inputs/reuse.pt",
        "archive/models/reuse.json", "archive/data/weights/weight_0", "archive/extra/more.json",
        "archive/data/aotinductor/other/a.so", "other/data/aotinductor/reuse/a.so",
        "archive/data/constants/tensor_0",
    ],
)  # fmt: skip
def test_what_has_no_place_in_a_package(program: Any, name: str) -> None:
    manifest, entries = program
    with pytest.raises(ArtifactError, match="does not belong"):
        check_package({**entries, name: pickle.dumps(print)}, manifest)


def first_input(call: CallSpec, **change: Any) -> CallSpec:
    first, *others = call.inputs
    return replace(call, inputs=(replace(first, tensor=replace(first.tensor, **change)), *others))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: first_input(m, shape=(1,)),
        lambda m: first_input(m, dtype="float64"),
        lambda m: first_input(m, name="x"),
        lambda m: replace(m, inputs=m.inputs[::-1]),
        lambda m: replace(m, outputs=(replace(m.outputs[0], shape=(1, 1)),)),
        lambda m: replace(m, programs={k: replace(p, takes=()) for k, p in m.programs.items()}),
        lambda m: replace(m, kept=tuple(replace(s, dtype="int8") for s in m.kept)),
        lambda m: replace(m, programs={**m.programs, "x": replace(m.programs["reuse"], entry="x")}),
    ],
)
def test_a_package_is_bound_to_its_manifest(
    program: Any, change: Callable[[CallSpec], CallSpec]
) -> None:
    manifest, entries = program
    changed = replace(manifest, calls=(change(manifest.calls[0]),))
    with pytest.raises(ArtifactError, match="does not belong"):
        check_package(entries, changed)


@pytest.mark.parametrize("text", ["", "{", "[" * 10**5, "{}", json.dumps({"reuse": 1})])
def test_a_package_that_does_not_say_what_it_takes(program: Any, text: str) -> None:
    manifest, entries = program
    with pytest.raises(ArtifactError, match="does not belong"):
        check_package({**entries, SPECS: text.encode()}, manifest)

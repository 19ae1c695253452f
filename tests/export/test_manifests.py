"""Manifests that toma_fx did not write, or whose fields contradict each other."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import toma_fx
from tests.export.edited import edit, put
from tests.export.in_process import InProcess
from tests.methods.test_methods import inputs, model
from toma_fx.errors import ArtifactError
from toma_fx.export.builder import export
from toma_fx.export.reading import DIGEST, MANIFEST, parse_manifest, read_manifest, verify_artifact


def flipped(folder: Path, name: str, every: int) -> int:
    """Flip each bit of a file in turn, or one in so many; returns how many."""
    good = (folder / name).read_bytes()
    with (folder / name).open("r+b", buffering=0) as file:
        flips = range(0, 8 * len(good), every)
        for flip in flips:
            at, bit = divmod(flip, 8)
            os.pwrite(file.fileno(), bytes([good[at] ^ 1 << bit]), at)
            with pytest.raises(ArtifactError):
                read_manifest(folder)
            os.pwrite(file.fileno(), good[at : at + 1], at)
    return len(flips)


@pytest.mark.parametrize("every", [101, 1])
def test_flipped_bits_are_noticed(copy: Path, every: int) -> None:
    """Of the manifest and of the digest beside it, in steps of so many bits."""
    flips = flipped(copy, MANIFEST, every) + flipped(copy, DIGEST, max(1, every // 20))
    read_manifest(copy)
    print(flips, "flips of a bit: all refused")


def replacing(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new)


CONFIG, LICENSE = '"model_config": {', '"license": ""'
NOT_CANONICAL: dict[str, Callable[[str], str]] = {
    "brackets": lambda text: "[" * 10**5,
    "brackets inside": replacing(CONFIG, CONFIG + '"a": ' + "[" * 10**5),
    "a number of 5,000 digits": replacing('"size": ', '"size": ' + "1" * 5000),
    "NaN": replacing('"relative": ', '"relative": NaN, "x": '),
    "infinity": replacing(CONFIG, CONFIG + '"a": 1e999, '),
    "a field twice": replacing(LICENSE, '"license": "a", "license": ""'),
    "a key twice": replacing(CONFIG, CONFIG + '"a": 5, "a": 5'),
    "another order": lambda text: json.dumps(dict(reversed(json.loads(text).items())), indent=2),
    "other spaces": lambda text: text + " ",
    "an unknown field": replacing(LICENSE, '"license": "", "x": 1'),
    "an unknown schema": replacing("urn:toma-fx", "urn:toma"),
    "a lone surrogate": replacing(LICENSE, '"license": "\\ud800"'),
    "a number for a name": replacing(LICENSE, '"license": 5'),
    "a fraction for a size": replacing('"size": ', '"size": 0.5, "x": '),
    "nothing": lambda text: "",
}


@pytest.mark.parametrize("change", NOT_CANONICAL.values(), ids=NOT_CANONICAL)
def test_text_that_toma_fx_does_not_write(copy: Path, change: Callable[[str], str]) -> None:
    """Although the digest is that of the text."""
    text = (copy / MANIFEST).read_text()
    assert change(text) != text
    put(copy, change(text).encode())
    with pytest.raises(ArtifactError):
        verify_artifact(copy)


def at(data: Any, *path: str | int) -> Any:
    for key in path:
        data = data[key]
    return data


CALL = ("calls", 0)


def setting(*path: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the field at a path (all but the last) to the last."""

    def change(data: dict[str, Any]) -> None:
        at(data, *path[:-2])[path[-2]] = path[-1]

    return change


def removing(*path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        del at(data, *path[:-1])[path[-1]]

    return change


def renaming(name: str) -> Callable[[dict[str, Any]], None]:
    """List a file by another name, too."""

    def change(data: dict[str, Any]) -> None:
        data["files"][name] = data["files"]["reuse.txt"]

    return change


def in_call(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda data: change(at(data, *CALL))


NUMBERED = {"kind": "tuple", "fields": ["1"]}


def twice(call: dict[str, Any]) -> None:
    call["programs"]["reuse"]["takes"].append(call["kept"][0]["name"])


def late(call: dict[str, Any]) -> None:
    first = call["schedule"]["phases"][0]
    call["schedule"]["phases"].append({**first, "begin": 10**12})


def circle(call: dict[str, Any]) -> None:
    call["programs"]["reuse"]["instead"] = "reweigh"
    call["programs"]["reweigh"]["instead"] = "reuse"


CONTRADICTIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "file name of 300 characters": (renaming("a" * 300), "files"),
    "path of 6,000 characters": (renaming("/".join(["a"] * 3000)), "files"),
    "hidden file": (renaming(".a"), "files"),
    "size": (setting("files", "reuse.txt", "size", -1), "files"),
    "digest": (setting("files", "reuse.txt", "sha256", "A" * 64), "files"),
    "entries": (setting("files", "reuse.txt", "entries", {}), "entries"),
    "device": (setting("device", "type", "foo:3"), "device.type"),
    "dtype": (setting("dtype", "nn"), "dtype"),
    "output dtype": (setting(*CALL, "outputs", 0, "dtype", "load"), "tensor output_0"),
    "negative shape": (setting(*CALL, "outputs", 0, "shape", [-1]), "tensor output_0"),
    "large shape": (setting(*CALL, "outputs", 0, "shape", [10**13]), "tensor output_0"),
    "larger shape": (setting(*CALL, "outputs", 0, "shape", [2**70]), "tensor output_0"),
    "output name": (setting(*CALL, "outputs", 0, "name", "zzz"), "outputs"),
    "no outputs": (setting(*CALL, "outputs", []), "outputs"),
    "empty path": (setting(*CALL, "inputs", 0, "path", []), "inputs"),
    "input name": (setting(*CALL, "inputs", 0, "tensor", "name", "x"), "inputs"),
    "an input twice": (in_call(lambda c: c["inputs"].insert(0, c["inputs"][0])), "each once"),
    "raster": (setting(*CALL, "inputs", 0, "raster", [[10**6], 10**6, 0, 0]), "raster"),
    "raster of nothing": (setting(*CALL, "inputs", 0, "raster", [[], 1, 0, 0]), "raster"),
    "timestep": (setting(*CALL, "timestep", ["x"]), "timestep"),
    "parameters": (setting("parameters", ["a", "a"]), "parameters"),
    "structure kind": (setting(*CALL, "structure", "kind", ""), "structure"),
    "structure fields": (setting(*CALL, "structure", "fields", []), "structure"),
    "structure numbers": (setting(*CALL, "structure", NUMBERED), "structure"),
    "kept name": (setting(*CALL, "kept", 0, "name", "zzz"), "takes|gives"),
    "kept by nobody": (in_call(lambda c: c["kept"].append({**c["kept"][0], "name": "z"})), "kept"),
    "takes unknown": (setting(*CALL, "programs", "reuse", "takes", ["zzz"]), "takes"),
    "takes twice": (in_call(twice), "takes"),
    "instead": (setting(*CALL, "programs", "reuse", "instead", "reuse"), "instead"),
    "a circle": (in_call(circle), "instead"),
    "program file": (setting(*CALL, "programs", "reuse", "file", "x"), "files that are listed"),
    "one program for two": (setting(*CALL, "programs", "reuse", "file", "refresh.txt"), None),
    "a program missing": (removing(*CALL, "programs", "reweigh"), "programs|schedule|parity"),
    "no programs": (setting(*CALL, "programs", {}), "kept|programs"),
    "older": (in_call(lambda c: c["older"].update({c["kept"][0]["name"]: "z"})), "older"),
    "cycle": (setting(*CALL, "schedule", "phases", 0, "cycle", []), "phases"),
    "unknown kind": (setting(*CALL, "schedule", "phases", 0, "cycle", ["x"]), "programs"),
    "no phases": (setting(*CALL, "schedule", "phases", []), "schedule"),
    "begin": (setting(*CALL, "schedule", "phases", 0, "begin", 1), "schedule"),
    "late begin": (in_call(late), "schedule"),
    "first step": (setting(*CALL, "schedule", "first_step", -1), "schedule"),
    "last step": (setting(*CALL, "schedule", "last_step", 10**12), "schedule"),
    "parity": (setting(*CALL, "parity", 0, "relative", 0.5), "parity"),
    "huge parity": (setting(*CALL, "parity", 0, "tolerance", 10**400), "JSON"),
    "no calls": (setting("calls", []), "calls"),
    "a call twice": (lambda d: d["calls"].append({**at(d, *CALL), "name": "other"}), "calls"),
    "a name twice": (lambda d: d["calls"].append(at(d, *CALL)), "each once"),
    "a name with a path": (setting(*CALL, "name", "../a"), "names of letters"),
    "version": (setting("version", 6), "another version"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "field"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions(copy: Path, change: Any, field: str | None) -> None:
    """Fields that contradict each other, in a manifest whose digest is right."""
    edit(copy, change)
    if field is None:  # two names of one thing: harmless
        verify_artifact(copy)
        return
    with pytest.raises(ArtifactError, match=field):
        verify_artifact(copy)


CACHING = {
    "every": 2, "mask": None, "policy": None, "share": None, "warmup_steps": 1, "last_steps": 0,
    "warmup_interval": 1, "most": None, "steps": None, "threshold": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"every": 0}, {"mask": []}, {"mask": [0, 1]}, {"mask": [1, 2]}, {"policy": "x"},
        {"share": 2.0}, {"share": 0.5, "mask": [1]}, {"warmup_steps": -1}, {"last_steps": 1.5},
        {"warmup_interval": 0}, {"most": 0}, {"steps": 10**9}, {"threshold": 0.1},
        {"steps": 2, "warmup_steps": 5},
    ],
)  # fmt: skip
def test_contradictions_of_cached_steps(copy: Path, change: dict[str, Any]) -> None:
    edit(copy, lambda data: data["calls"][0]["schedule"].update(caching={**CACHING, **change}))
    with pytest.raises(ArtifactError, match="schedule"):
        verify_artifact(copy)


def test_what_is_written_is_read(small_artifact: Path) -> None:
    """Configurations with values that JSON has not, and licenses that a terminal broke."""
    content = (small_artifact / MANIFEST).read_bytes()
    assert parse_manifest(content, "").to_json().encode() == content


def test_configurations_without_a_form_in_json(tmp_path: Path) -> None:
    network = copy.deepcopy(model())  # others share it
    config = {"limit": float("inf"), "none": float("nan"), "text": "\ud800", "big": 10**30}
    network.__class__ = type("Configured", (type(network),), {"config": config})
    optimized = toma_fx.optimize(network, method="toma", min_tokens=1)
    made = export(optimized, inputs(), tmp_path / "a", InProcess(), license="\udcff")
    assert made.model_config == {"limit": "Infinity", "none": "NaN", "text": "?", "big": 10**30}
    assert verify_artifact(tmp_path / "a") == made
    assert made.license == "?"

"""The package of an AOTInductor artifact: what may be in it, and what its programs take and give.

    archive/data/aotinductor/PROGRAM/...   compiled code and its source
    archive/extra/programs.json            inputs and outputs of every program, as it was compiled
    archive/archive_format, ...            what torch writes beside

Compiled code reads memory of the shapes that it was compiled for, whatever it gets. So the package
says itself what these are, and is compared with the manifest before anything is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import ZipFile, ZipInfo

from toma_fx.errors import ArtifactError
from toma_fx.export.manifest import Manifest, TensorSpec

PACKAGE = "programs.pt2"
SPECS = "archive/extra/programs.json"
IO = tuple[Sequence[TensorSpec], Sequence[TensorSpec]]
"""What a program takes and gives."""
_PROGRAM = re.compile(r"archive/data/aotinductor/(\w+)/[^/]+", re.ASCII)
_BESIDE = frozenset(
    f"archive/{name}"
    for name in (
        *("archive_format", "archive_version", "byteorder", "version"),
        *(".data/version", ".data/serialization_id", "extra/programs.json"),
    )
)
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin")
"""Ends of names of what torch unpickles."""


def specs_text(specs: Mapping[str, IO]) -> str:
    """What programs take and give, as the package holds it."""
    return json.dumps({kind: _plain(takes, gives) for kind, (takes, gives) in specs.items()})


def _plain(takes: Sequence[TensorSpec], gives: Sequence[TensorSpec]) -> dict[str, Any]:
    return {"takes": [asdict(spec) for spec in takes], "gives": [asdict(spec) for spec in gives]}


def check_package(entries: Mapping[str, bytes], manifest: Manifest) -> None:
    """Passes if a package holds the programs of the manifest, and nothing else.

    Raises:
        ArtifactError: an entry that has no place in it (a pickle, say), a program too many or too
            few, or one that takes or gives other tensors.
    """
    found = set()
    for name in entries:
        program = _PROGRAM.fullmatch(name)
        if (not program and name not in _BESIDE) or name.lower().endswith(_PICKLES):
            raise _refused("compiled programs alone", repr(name))
        found |= {program[1]} if program else set()
    want = {
        call.programs[kind].entry: _plain(call.inputs_of(kind), call.outputs_of(kind))
        for _, kind, call in manifest.each_program
    }
    if found != {*want}:
        raise _refused(f"the programs {sorted(want)}", str(sorted(found)))
    try:
        got = json.loads(entries.get(SPECS, b""))
    except (ValueError, RecursionError) as error:
        raise _refused(f"what its programs take and give, in {SPECS}", str(error)) from error
    # as text, because tuples become lists
    if json.dumps(got, sort_keys=True) != json.dumps(want, sort_keys=True):
        raise _refused(f"programs that take and give {want}", str(got))


def write_package(path: Path, entries: Mapping[str, bytes]) -> None:
    """Write a package of these entries."""
    with ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(ZipInfo(name), content)


def _refused(expected: str, got: str) -> ArtifactError:
    return ArtifactError(
        "the package does not belong to the manifest",
        where=PACKAGE,
        expected=expected[:500],
        got=got[:500],
        hint="this artifact was damaged or edited: build it anew",
    )

"""The folder of an artifact: written all or nothing, verified before anything in it is used.

    .NAME.building/   stages of a build that is under way, or was interrupted
    NAME/             manifest.json and the files that it lists

A build that is interrupted leaves the first; the next build of the same thing continues with its
finished stages. Only a finished build creates, or replaces, the second.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from toma_fx.errors import ArtifactError, BuildError
from toma_fx.export.manifest import FileSpec, Manifest

MANIFEST = "manifest.json"
STAGES = "stages.json"


@dataclass(frozen=True)
class Stage:
    """Progress of a build.

    Attributes:
        name: of the stage. state: "begun", "done", or "kept", if an earlier build has done it.
        seconds: that it took. size: of its files, in bytes.
    """

    name: str
    state: Literal["begun", "done", "kept"]
    seconds: float = 0.0
    size: int = 0


OnStage = Callable[[Stage], Any]
"""Called with every stage of a build, as it begins and as it ends."""


def ignore(stage: Stage) -> None:
    """Do nothing: the report of a build that shows no progress."""


@contextmanager
def report_stage(name: str, report: OnStage) -> Iterator[None]:
    """OnStage a stage without files: its beginning, and its end if it comes to one."""
    report(Stage(name, "begun"))
    start = time.perf_counter()
    yield
    report(Stage(name, "done", time.perf_counter() - start))


def file_spec(path: Path) -> FileSpec:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return FileSpec(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact; no other file is looked at.

    Raises:
        ArtifactError: there is none, or it is damaged or of another version.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(
            "no artifact",
            where=str(folder),
            expected=f"a folder with a {MANIFEST}",
            got=f"{type(error).__name__}: {error}",
            hint="give the folder that `toma-fx build` wrote",
        ) from error
    return Manifest.of(text, str(path))


def verify_artifact(folder: Path) -> Manifest:
    """The manifest of an artifact whose files are all there and unchanged.

    Raises:
        ArtifactError: naming the first file that is missing, a link, or has changed.
    """
    manifest = read_manifest(folder)
    for name, spec in manifest.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise _changed(path, "a file", "a link" if path.is_symlink() else "nothing")
        if path.stat().st_size != spec.size:
            raise _changed(path, f"{spec.size} bytes", f"{path.stat().st_size} bytes")
        if (digest := file_spec(path).sha256) != spec.sha256:
            raise _changed(path, f"SHA-256 {spec.sha256}", digest)
    return manifest


def _changed(path: Path, expected: str, got: str) -> ArtifactError:
    return ArtifactError(
        "the artifact is damaged",
        where=str(path),
        expected=expected,
        got=got,
        hint="copy it again, or build it anew",
    )


class Build:
    """An artifact under construction.

    Attributes:
        out: where it will be. folder: where it is built.
    """

    def __init__(self, out: Path, key: str, report: OnStage) -> None:
        """Use `building` instead."""
        self.out, self.folder = out, out.parent / f".{out.name}.building"
        self._old = out.parent / f".{out.name}.old"
        self._key, self._report = key, report
        self._done: dict[str, dict[str, Any]] = {}

    def stage(self, name: str, make: Callable[[Path], Any], *files: str) -> None:
        """Write `files`: `make` gets the folder. Skipped if an earlier build of the same did it.

        Raises:
            BuildError: the disk is full or can't be written.
        """
        if self.has(name, *files):
            self._report(Stage(name, "kept", size=self._size(name)))
            return
        self._report(Stage(name, "begun"))
        start = time.perf_counter()
        with _disk(self.folder):
            make(self.folder)
            self._done.pop(name, None)  # the latest stage is the last
            self._done[name] = {f: asdict(file_spec(self.folder / f)) for f in files}
            _write(self.folder / STAGES, json.dumps({"key": self._key, "done": self._done}))
        self._report(Stage(name, "done", time.perf_counter() - start, self._size(name)))

    def has(self, name: str, *files: str) -> bool:
        """Whether an earlier build of the same finished this stage."""
        known = self._done.get(name)
        return known is not None and all(self._unchanged(file, known) for file in files)

    def finish(self, manifest: Manifest) -> Manifest:
        """Write the manifest with the checksums of the files of all stages."""
        specs = {file: spec for files in self._done.values() for file, spec in files.items()}
        files = {f: FileSpec(**specs[f]) for f in sorted(specs) if (self.folder / f).is_file()}
        manifest = replace(manifest, files=files)
        with _disk(self.folder):
            _write(self.folder / MANIFEST, manifest.to_json())
        return manifest

    def start(self) -> None:
        """Create the folder, or continue in the one that an interrupted build of the same left."""
        left = self.folder / STAGES
        try:
            known = json.loads(left.read_text(encoding="utf-8"))
            self._done = known["done"] if known["key"] == self._key else {}
        except (OSError, ValueError, KeyError, TypeError):
            self._done = {}
        with _disk(self.out.parent):
            if self._old.exists() and not self.out.exists():
                os.replace(self._old, self.out)  # a build ended between the two moves of publish()
            if not self._done and self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)

    def discard(self) -> None:
        """Forget the finished stages: what they wrote is wrong."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self) -> None:
        """Move the finished folder to its place, instead of what is there."""
        with _disk(self.out.parent):
            (self.folder / STAGES).unlink(missing_ok=True)
            if self.out.exists():
                shutil.rmtree(self._old, ignore_errors=True)
                os.replace(self.out, self._old)
            os.replace(self.folder, self.out)
            shutil.rmtree(self._old, ignore_errors=True)

    def _unchanged(self, file: str, known: dict[str, Any]) -> bool:
        path = self.folder / file
        return path.is_file() and asdict(file_spec(path)) == known.get(file)

    def _size(self, name: str) -> int:
        return sum(spec["size"] for spec in self._done[name].values())


def check_output(out: Path, overwrite: bool) -> None:
    """Passes if an artifact can be put at `out`.

    Raises:
        BuildError: it is no folder, or not empty and nothing that may be replaced.
    """
    if out.exists() and not out.is_dir():
        raise BuildError(
            "the output is no folder",
            where=str(out),
            expected="a new or empty folder",
            got="a file",
        )
    if out.exists() and any(out.iterdir()):
        artifact = _is_artifact_alone(out)
        if not (overwrite and artifact):
            raise BuildError(
                "the output folder is not empty",
                where=str(out),
                expected="an empty folder, or none",
                got="an artifact" if artifact else "other files",
                hint="overwrite=True (--overwrite) replaces an artifact once the new one is done"
                if artifact
                else "choose another folder",
            )


def _is_artifact_alone(folder: Path) -> bool:
    """Whether a folder holds nothing that replacing an artifact would lose."""
    try:
        known = {MANIFEST, *read_manifest(folder).files}
    except ArtifactError:
        return False
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()} <= known


@contextmanager
def building(
    out: Path, key: str, *, overwrite: bool = False, report: OnStage = ignore
) -> Iterator[Build]:
    """Build an artifact at `out`.

    Inside, run stages, then `finish`. An exception leaves the finished stages for the next build
    with the same `key`, and whatever is at `out` as it was.

    Raises:
        BuildError: as of `check_output`, or the disk is full or can't be written.
    """
    check_output(out, overwrite)
    build = Build(out, key, report)
    build.start()
    yield build
    if not (build.folder / MANIFEST).is_file():
        raise BuildError("the build did not come to its end", where=str(out))
    build.publish()


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Errors of the disk as typed ones."""
    try:
        yield
    except OSError as error:
        raise BuildError(
            "the artifact can't be written",
            where=str(error.filename or folder),
            expected="a folder that can be written, on a disk with room",
            got=f"{type(error).__name__}: {error.strerror or error}",
            hint="free space, or choose another folder; finished stages are kept",
        ) from error


def _write(path: Path, text: str) -> None:
    """Write a file all or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)

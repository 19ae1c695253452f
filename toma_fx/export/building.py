"""An artifact under construction: in stages that outlive an interruption, published at once.

    .NAME.lock            held by the build that is under way
    .NAME.building/       of one user alone
        stages.json       what is finished, with checksums
        artifact/         the files
    NAME/                 a finished artifact

A build that is interrupted leaves the second; the next build of the same thing continues with its
finished stages. Only a finished build creates the third, or replaces it: by one
exchange of two names.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from toma_fx.errors import BuildError
from toma_fx.export.destination import (
    check_exchange,
    check_output,
    disk_errors,
    hold,
    private_folder,
)
from toma_fx.export.manifest import FileSpec, Manifest
from toma_fx.export.reading import MANIFEST, file_spec, write_manifest
from toma_fx.files import exchange, flush, flush_tree, write_file

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
    """Report a stage without files: its beginning, and its end if it comes to one."""
    report(Stage(name, "begun"))
    start = time.perf_counter()
    yield
    report(Stage(name, "done", time.perf_counter() - start))


class Build:
    """An artifact under construction.

    Attributes:
        out: where it will be. folder: where its files are written.
    """

    def __init__(self, out: Path, key: str, report: OnStage) -> None:
        """Use `building` instead."""
        self.out, self._work = out, out.with_name(f".{out.name}.building")
        self.folder = self._work / "artifact"
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
        with disk_errors(self.folder):
            make(self.folder)
            for file in files:
                flush(self.folder / file)
            self._done.pop(name, None)  # the latest stage is the last
            self._done[name] = {f: asdict(file_spec(self.folder / f)) for f in files}
            write_file(self._work / STAGES, json.dumps({"key": self._key, "done": self._done}))
        self._report(Stage(name, "done", time.perf_counter() - start, self._size(name)))

    def has(self, name: str, *files: str) -> bool:
        """Whether an earlier build of the same finished this stage."""
        known = self._done.get(name)
        return known is not None and all(self._unchanged(file, known) for file in files)

    def finish(self, manifest: Manifest) -> Manifest:
        """Write the manifest with the checksums of the files of all stages."""
        manifest = self.list_files(manifest)
        with disk_errors(self.folder):
            write_manifest(self.folder, manifest)
        return manifest

    def list_files(self, manifest: Manifest) -> Manifest:
        """The manifest, with the checksums of the files of all stages."""
        specs = {file: spec for files in self._done.values() for file, spec in files.items()}
        files = {f: FileSpec(**specs[f]) for f in sorted(specs) if (self.folder / f).is_file()}
        return replace(manifest, files=files)

    def start(self) -> None:
        """Create the folder, or continue in the one that an interrupted build of the same left."""
        with disk_errors(self.out.parent):
            private_folder(self._work)
            self._done = self._finished()
            self.folder.mkdir(exist_ok=True)
            if self.out.exists() and any(self.out.iterdir()):
                check_exchange(self._work, self.out)
            known = {self.folder / f for files in self._done.values() for f in files}
            for path in sorted(self.folder.rglob("*"), reverse=True):
                if path.is_dir() and not path.is_symlink():
                    if not any(path.iterdir()):
                        path.rmdir()
                elif path not in known:
                    path.unlink()

    def discard(self) -> None:
        """Forget the finished stages: what they wrote is wrong."""
        shutil.rmtree(self._work, ignore_errors=True)

    def publish(self) -> None:
        """Put the finished folder in its place, instead of what is there.

        A kill at any moment leaves there what was there, or what was built.
        """
        with disk_errors(self.out.parent):
            flush_tree(self.folder)
            if self.out.exists() and any(self.out.iterdir()):
                exchange(self.folder, self.out)
            else:
                os.replace(self.folder, self.out)  # at most an empty folder is there
            flush(self.out.parent)
            shutil.rmtree(self._work)

    def _finished(self) -> dict[str, dict[str, Any]]:
        """Stages that an earlier build of the same finished, whose files are as it left them."""
        try:
            known = json.loads((self._work / STAGES).read_text(encoding="utf-8"))
            done: dict[str, dict[str, Any]] = known["done"] if known["key"] == self._key else {}
            return {
                name: files
                for name, files in done.items()
                if all(self._unchanged(file, files) for file in files)
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _unchanged(self, file: str, known: dict[str, Any]) -> bool:
        path = self.folder / file
        return path.is_file() and asdict(file_spec(path)) == known.get(file)

    def _size(self, name: str) -> int:
        return sum(spec["size"] for spec in self._done[name].values())


@contextmanager
def building(
    out: Path, key: str, *, overwrite: bool = False, report: OnStage = ignore
) -> Iterator[Build]:
    """Build an artifact at `out`.

    Inside, run stages, then `finish`. An exception leaves the finished stages for the next build
    with the same `key`, and whatever is at `out` as it was.

    Raises:
        BuildError: as of `check_output`; another build is making it; the file system can't replace
            what is there at once; or the disk is full or can't be written.
    """
    out = check_output(out, overwrite)
    with disk_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    with hold(out):
        build = Build(out, key, report)
        build.start()
        yield build
        if not (build.folder / MANIFEST).is_file():
            raise BuildError("the build did not come to its end", where=str(out))
        check_output(out, overwrite)  # again: somebody may have put something there
        build.publish()

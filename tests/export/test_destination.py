"""Where artifacts are put: refused before anything is computed, held by one build at a time."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.export.in_process import InProcess
from tests.methods.test_methods import inputs
from toma_fx import files
from toma_fx.errors import BuildError
from toma_fx.export import destination
from toma_fx.export.builder import export
from toma_fx.export.building import building
from toma_fx.export.reading import verify_artifact

pytestmark = pytest.mark.usefixtures("exported_once")


def link_to(folder: Path, target: str) -> Path:
    (folder / "link").symlink_to(target)
    return folder / "link"


def circle(folder: Path) -> Path:
    (folder / "b").symlink_to("link")
    return link_to(folder, "b")


def file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file"


REFUSED: dict[str, tuple[Callable[[Path], str | Path], str]] = {
    "the current folder": (lambda folder: ".", "the current folder"),
    "one above it": (lambda folder: "..", "the current folder, or one above"),
    "a file": (file, "a file"),
    "a mount point": (lambda folder: "/proc", "a mount point"),
    "NUL": (lambda folder: f"{folder}/a\0b", "null"),
    "a circle of links": (circle, "Symlink loop|Too many levels"),
    "a long name": (lambda folder: folder / ("x" * 256), "File name too long"),
    "a name too long for its stages": (lambda folder: folder / ("x" * 250), "File name too long"),
}


@pytest.mark.parametrize(("place", "reason"), REFUSED.values(), ids=REFUSED)
def test_places_are_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, reason: str
) -> None:
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    before = {*tmp_path.rglob("*")}
    out = place(tmp_path)
    made = {*tmp_path.rglob("*")} - before
    with pytest.raises(BuildError, match=reason), building(out, "key"):
        raise AssertionError("it began")
    assert {*tmp_path.rglob("*")} - before == made


def test_a_link_leads_to_the_place(tmp_path: Path, optimized: Any, target: InProcess) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("elsewhere", "nowhere"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(name)
        for _ in range(2):
            export(optimized, inputs(), tmp_path / "link", target, overwrite=True)
        assert (tmp_path / "link").is_symlink()
        verify_artifact(tmp_path / name)
    assert {p.name for p in tmp_path.iterdir()} == {"link", "elsewhere", "nowhere"}


def test_one_build_at_a_time(tmp_path: Path, optimized: Any, target: InProcess) -> None:
    with destination.hold(tmp_path / "a"):
        with pytest.raises(BuildError, match=f"process {os.getpid()} on"):
            export(optimized, inputs(), tmp_path / "a", target)
        refused: list[BaseException] = []

        def build() -> None:
            try:
                export(optimized, inputs(), tmp_path / "a", target)
            except BuildError as error:
                refused.append(error)

        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
        assert refused, "a thread of the same process is another build"
    assert list(tmp_path.iterdir()) == []
    export(optimized, inputs(), tmp_path / "a", target)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_dead_holder_holds_nothing(tmp_path: Path, optimized: Any, target: InProcess) -> None:
    code = f"""
import os, signal
from pathlib import Path
from filelock import FileLock
FileLock({str(tmp_path / ".a.lock")!r}).acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert (tmp_path / ".a.lock").exists()
    export(optimized, inputs(), tmp_path / "a", target)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_stages_that_others_could_write_are_not_taken(
    tmp_path: Path, optimized: Any, target: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.fail_at = "reuse.txt"
    with pytest.raises(KeyboardInterrupt):
        export(optimized, inputs(), tmp_path / "a", target)
    stages = tmp_path / ".a.building"
    assert stages.stat().st_mode & 0o777 == 0o700
    for change in (
        lambda: stages.chmod(0o770),
        lambda: monkeypatch.setattr(destination.os, "geteuid", lambda: 54321),
        lambda: (stages.rename(tmp_path / "b"), stages.symlink_to("b")),
    ):
        change()
        with pytest.raises(BuildError, match="not this user's alone"):
            export(optimized, inputs(), tmp_path / "a", target)
        monkeypatch.undo()
        if not stages.is_symlink():
            stages.chmod(0o700)


def test_a_file_system_that_cannot_exchange_folders(
    tmp_path: Path, optimized: Any, target: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first build needs no exchange; what would leave a gap is refused before it begins."""

    def unable(a: Path, b: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(destination, "exchange", unable)
    first = export(optimized, inputs(), tmp_path / "a", target)
    target.made.clear()
    with pytest.raises(BuildError, match="can't be replaced"):
        export(optimized, inputs(), tmp_path / "a", target, overwrite=True)
    assert target.made == []
    assert verify_artifact(tmp_path / "a") == first


def test_what_came_there_meanwhile_stays(tmp_path: Path) -> None:
    def lower(folder: Path) -> None:
        (folder / "manifest.json").write_text("{}")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "notes.txt").write_text("of somebody")

    def build() -> None:
        with building(tmp_path / "a", "k") as work:
            work.stage("s", lower, "manifest.json")

    with pytest.raises(BuildError, match="not empty"):
        build()
    assert (tmp_path / "a" / "notes.txt").read_text() == "of somebody"


def test_errors_of_the_caller_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a weight"), building(tmp_path / "a", "k"):
        raise FileNotFoundError("a weight")


def test_a_file_is_written_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_file(path, "old")
    (tmp_path / "plain").write_text("old")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").unlink()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_file(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]

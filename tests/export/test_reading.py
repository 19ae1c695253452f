"""Reading artifacts that were damaged, edited or made by somebody who means harm."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import toma_fx
from tests.export.edited import edit, list_anew
from toma_fx.errors import ArtifactError
from toma_fx.export import folder as folders
from toma_fx.export.reading import (
    DIGEST,
    LARGEST,
    MANIFEST,
    open_artifact,
    read_manifest,
    verify_artifact,
)
from toma_fx.files import exchange


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def none_left_open() -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() == before


# -- the folder -----------------------------------------------------------------------------------


def listed(copy: Path, name: str) -> None:
    """List a file that holds "x"."""
    spec = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest(), "entries": None}
    edit(copy, lambda data: data["files"].update({name: spec}))


def behind_a_linked_folder(copy: Path) -> None:
    (copy.parent / "outside").mkdir()
    (copy.parent / "outside" / "secret").write_text("x")
    (copy / "sub").symlink_to("../outside")
    listed(copy, "sub/secret")


def unlisted_link(copy: Path) -> None:
    (copy / "notes").symlink_to("/etc/passwd")


def with_a_socket(copy: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(copy / "s"))
    server.close()


def deep(copy: Path) -> None:
    (copy / "/".join("abcdefghijklmnopqrst")).mkdir(parents=True)


def sparse(copy: Path) -> None:
    (copy / MANIFEST).unlink()
    with (copy / MANIFEST).open("wb") as file:
        file.truncate(40 << 30)


def instead_of(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(copy: Path) -> None:
        (copy / name).unlink()
        make(copy / name)

    return change


WRONG_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "behind a linked folder": (behind_a_linked_folder, "a link"),
    "a link that is not listed": (unlisted_link, "a link"),
    "a socket": (with_a_socket, "socket"),
    "deep": (deep, "deep"),
    "a pipe": (instead_of(MANIFEST, os.mkfifo), "a pipe"),
    "a pipe for a digest": (instead_of(DIGEST, os.mkfifo), "a pipe"),
    "a pipe for a file": (instead_of("reuse.txt", os.mkfifo), "a pipe"),
    "a link to a device": (
        instead_of(MANIFEST, lambda p: p.symlink_to("/dev/zero")), "a link"
    ),
    "a folder for a file": (instead_of("reuse.txt", Path.mkdir), "something else"),
    "huge": (sparse, f"at most {LARGEST} bytes"),
    "no digest": (lambda copy: (copy / DIGEST).unlink(), "nothing"),
    "no manifest": (lambda copy: (copy / MANIFEST).unlink(), "no artifact"),
    "a file in a file": (lambda copy: listed(copy, "reuse.txt/a"), "Not a directory"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "got"), WRONG_FOLDERS.values(), ids=WRONG_FOLDERS)
def test_folders_are_refused(copy: Path, damage: Any, got: str) -> None:
    damage(copy)
    with pytest.raises(ArtifactError, match=got):
        verify_artifact(copy)


def test_nothing_outside_is_told(copy: Path) -> None:
    """Size and checksum of a file behind a link are nobody's business."""
    behind_a_linked_folder(copy)
    with pytest.raises(ArtifactError) as caught:
        verify_artifact(copy)
    assert hashlib.sha256(b"x").hexdigest() not in str(caught.value)


@pytest.mark.parametrize("path", ["a\0b", "nowhere", "x" * 300, "a/manifest.json"])
def test_paths_that_are_no_folder(copy: Path, path: str) -> None:
    with pytest.raises(ArtifactError, match="no artifact"):
        toma_fx.load(copy.parent / path)


def test_too_many_files(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MOST_ENTRIES", 4)
    with pytest.raises(ArtifactError, match="at most 4 files"):
        read_manifest(copy)


def test_a_link_to_the_folder_and_files_that_are_not_listed(copy: Path) -> None:
    """The name of the folder is the user's; what is not listed is not opened."""
    (copy / "README.md").write_text("notes")
    (copy.parent / "current").symlink_to("a")
    assert verify_artifact(copy.parent / "current") == verify_artifact(copy)
    with open_artifact(copy) as files, pytest.raises(ArtifactError, match="none such"):
        files.read("README.md")


# -- changes while it is read ---------------------------------------------------------------------


def test_an_artifact_that_is_replaced_is_read_to_its_end(copy: Path) -> None:
    """The files are those that were opened, although others have their names now."""
    with open_artifact(copy) as files:
        shutil.move(copy, copy.parent / "old")
        shutil.copytree(copy.parent / "old", copy)
        (copy / "reuse.txt").write_text("new")
        shutil.rmtree(copy.parent / "old")
        assert files.read("reuse.txt") == b"reuse.txt"
        assert Path(files.file("reuse.txt").path).read_bytes() == b"reuse.txt"


def test_artifacts_that_are_exchanged_all_the_time(copy: Path) -> None:
    """What is read is one of them, never of both."""
    other = Path(shutil.copytree(copy, copy.parent / "b"))
    (other / "reuse.txt").write_text("REUSE.txt")
    edit(list_anew(other), lambda data: data.update(license="b"))
    child = os.fork()
    if not child:
        while True:
            exchange(copy, other)
    seen = set()
    try:
        for _ in range(100):
            with open_artifact(copy) as files:
                seen.add((files.manifest.license, files.read("reuse.txt")))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert seen == {("", b"reuse.txt"), ("b", b"REUSE.txt")}


def test_a_file_that_is_written_to_is_noticed(copy: Path) -> None:
    def overwrite(text: str) -> None:
        os.utime(copy / "reuse.txt", ns=(0, 0))
        with open_artifact(copy):
            (copy / "reuse.txt").write_text(text)

    with pytest.raises(ArtifactError, match="changed while it was read"):
        overwrite("REUSE.txt")
    (copy / "reuse.txt").write_text("reuse.txt")
    with open_artifact(copy) as files:
        (copy / "reuse.txt").write_text("REUSE.txt")
        with pytest.raises(ArtifactError, match="SHA-256"):
            files.read("reuse.txt")
        (copy / "reuse.txt").write_text("short")
        with pytest.raises(ArtifactError, match="5 bytes"):
            files.read("reuse.txt")
        (copy / "reuse.txt").write_text("reuse.txt")
        os.utime(copy / "reuse.txt", ns=(files.file("reuse.txt")._opened.st_mtime_ns,) * 2)

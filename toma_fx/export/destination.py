"""Where an artifact will be: checked before anything is computed, held by one build at a time."""

from __future__ import annotations

import errno
import json
import os
import platform
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from toma_fx.errors import ArtifactError, BuildError
from toma_fx.export.reading import MANIFEST_FILES, read_manifest
from toma_fx.files import exchange

UNABLE = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EPERM})
"""Errors of a file system that can't exchange two folders."""


def destination(out: str | Path) -> Path:
    """Where an artifact will be, without links.

    Raises:
        BuildError: no folder can be there.
    """
    exists = True
    try:
        path = Path(out).resolve()
        path.stat()  # from Python 3.13 on `resolve` and `exists` say nothing of a circle of links
    except (FileNotFoundError, NotADirectoryError):
        exists = False
    except (OSError, ValueError, RuntimeError) as error:  # a name with NUL, a circle of links
        raise _refusal(out, "the name of a folder", f"{type(error).__name__}: {error}") from error
    if exists and not path.is_dir():
        raise _refusal(out, "a new or empty folder", "a file")
    if path == Path.cwd() or path in Path.cwd().parents:
        raise _refusal(out, "a folder that can be replaced", "the current folder, or one above it",
                       "name a folder in it")  # fmt: skip
    if os.path.ismount(path):
        raise _refusal(out, "a folder that can be replaced", "a mount point", "name a folder in it")
    return path


def check_output(out: str | Path, overwrite: bool) -> Path:
    """Where an artifact will be, if one can be put there.

    Raises:
        BuildError: it is no folder, not empty and nothing that may be replaced, or can't be moved.
    """
    if not isinstance(out, (str, os.PathLike)):
        raise _refusal(out, "export(model, inputs, folder)", f"{type(out).__name__} as the folder")
    path = destination(out)
    if not path.exists():
        return path
    try:
        empty = not any(path.iterdir())
    except OSError as error:
        raise _refusal(out, "a folder that can be read", str(error)) from error
    if not empty:
        artifact = _is_artifact_alone(path)
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
    if not _can_be_moved(path):
        raise _refusal(out, "a folder that this user may move", "one that it may not",
                       "change its owner or its permissions, or choose another")  # fmt: skip
    return path


def _is_artifact_alone(folder: Path) -> bool:
    """Whether a folder holds nothing that replacing an artifact would lose."""
    try:
        known = {*MANIFEST_FILES, *read_manifest(folder).files}
        files = {p.relative_to(folder) for p in folder.rglob("*") if not p.is_dir()}
        # what Python made of a model.py while it served
        return {str(p) for p in files if p.parent.name != "__pycache__"} <= known
    except (ArtifactError, OSError):
        return False


def _can_be_moved(path: Path) -> bool:
    """Whether a folder can be given another parent."""
    if os.name == "nt":
        return os.access(path, os.W_OK)
    user, parent = os.geteuid(), path.parent.stat()
    if parent.st_mode & stat.S_ISVTX and user not in (0, parent.st_uid, path.stat().st_uid):
        return False
    return os.access(path, os.W_OK | os.X_OK) and os.access(path.parent, os.W_OK | os.X_OK)


def check_exchange(folder: Path, out: Path) -> None:
    """Passes if two folders can be exchanged where `folder` is.

    Raises:
        BuildError: the artifact at `out` can't be replaced without a moment of neither.
    """
    pair = folder / "a", folder / "b"
    for each in pair:
        each.mkdir(exist_ok=True)
    try:
        exchange(*pair)
    except OSError as error:
        if error.errno not in UNABLE:
            raise
        raise BuildError(
            "the artifact there can't be replaced",
            where=str(out),
            expected="a file system that exchanges two folders (renameat2 of Linux)",
            got=str(error.strerror),
            hint="build into a new folder and point what loads it there, or remove the old one",
        ) from error
    finally:
        for each in pair:
            each.rmdir()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Errors of the disk as typed ones."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise BuildError(
            "the artifact can't be written",
            where=str(getattr(error, "filename", None) or folder),
            expected="a folder that can be written, on a disk with room",
            got=f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}",
            hint="free space, or choose another folder; finished stages are kept",
        ) from error


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """One build at a time at `out`.

    Raises:
        BuildError: another build holds it; it is named.
    """
    path = out.with_name(f".{out.name}.lock")

    def introduce(handle: int) -> None:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps({"process": os.getpid(), "host": platform.node(), "since": since})
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, text.encode())

    lock = FileLock(path, timeout=0, mode=0o644, on_acquired=introduce)
    with disk_errors(out.parent):
        try:
            lock.acquire()
        except Timeout as error:
            if not path.exists():  # it could not be made
                raise FileNotFoundError(errno.ENOENT, "no file can be made", str(path)) from error
            raise BuildError(
                "another build is making this artifact",
                where=str(out),
                expected="one build at a time",
                got=_holder(path),
                hint="wait for it, or build elsewhere",
            ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is released: who opened it meanwhile tries anew
        lock.release()


def _holder(path: Path) -> str:
    """Who holds a lock, as far as that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")[:1000])
        return f"process {found['process']:d} on {found['host']!r}, since {found['since']!r}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that does not say who it is"


def private_folder(path: Path) -> None:
    """Make a folder that nobody else can write, or check that the one there is such.

    Raises:
        BuildError: another user's folder, or something else, is there.
    """
    try:
        path.mkdir(mode=0o700)
        return
    except FileExistsError:
        found = path.lstat()
    mine = os.name == "nt" or (found.st_uid == os.geteuid() and not found.st_mode & 0o077)
    if not (stat.S_ISDIR(found.st_mode) and mine):
        raise BuildError(
            "the folder for the stages of the build is not this user's alone",
            where=str(path),
            expected="none, or one that an earlier build of this user left",
            got=f"owner {found.st_uid}, mode {stat.filemode(found.st_mode)}",
            hint="look at what it is and remove it, or build elsewhere",
        )


def _refusal(out: str | Path, expected: str, got: str, hint: str = "") -> BuildError:
    return BuildError(
        "no artifact can be put there",
        where=repr(str(out)),
        expected=expected,
        got=got,
        hint=hint or "choose another folder",
    )

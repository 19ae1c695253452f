"""Files of a folder that is not trusted: each is opened once, checked, and used as it was checked.

    folder --open--> descriptor --each part of a name, no links--> descriptor of a file --> fstat
                                                                                       --> SHA-256
                                                                                       --> its use

Everything after the first step goes by descriptors. A folder that is replaced meanwhile stays the
one that was opened, and no name is looked up twice.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from toma_fx.errors import ArtifactError

MOST_ENTRIES, DEEPEST = 10_000, 16
"""Files and folders that a folder may hold, and how deep."""
DAMAGED, MISSING = "the artifact is damaged", "no artifact"
CHUNK = 1 << 20
_FILE = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
# a pipe must not be waited for, a terminal not become this process's
_FILE |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_FOLDER = _FILE | getattr(os, "O_DIRECTORY", 0)
_DESCRIPTORS = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"


class OpenFile:
    """A regular file that is open for reading.

    Attributes:
        name: inside its folder. size: in bytes, as it was opened.
    """

    def __init__(self, handle: int, name: str, where: str) -> None:
        self._handle, self.name, self.where = handle, name, where
        self._opened = os.fstat(handle)
        self.size = self._opened.st_size

    @property
    def path(self) -> str:
        """A path that leads to this very file while it is open, whatever its name leads to."""
        return f"{_DESCRIPTORS}/{self._handle}"

    def chunks(self) -> Iterator[bytes]:
        """The content from the first byte to the size it was opened with, in pieces.

        Raises:
            ArtifactError: it can't be read, or has become shorter.
        """
        at = 0
        while at < self.size:
            try:
                chunk = os.pread(self._handle, min(CHUNK, self.size - at), at)
            except OSError as error:
                raise refused(self.where, "a file that can be read", str(error.strerror)) from error
            if not chunk:
                raise refused(self.where, f"{self.size} bytes", f"{at} bytes")
            at += len(chunk)
            yield chunk

    def read(self) -> bytes:
        """The content, in memory; see `chunks`."""
        content = BytesIO()  # hands its memory over without a copy
        for chunk in self.chunks():
            content.write(chunk)
        return content.getvalue()

    def digest(self) -> str:
        """SHA-256 of the content."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Pass if nobody has written to it since it was opened.

        Raises:
            ArtifactError: its size or its time of change is another.
        """
        now, then = os.fstat(self._handle), self._opened
        if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise refused(self.where, "a file that stays as it is", "changed while it was read")


class OpenFolder:
    """A folder that is open, and the files opened in it; a context that closes them.

    Attributes:
        path: by which it was opened; for messages. names: of what is in it.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a folder and look through it. `path` itself may be a link.

        Raises:
            ArtifactError: no folder, one that can't be read, or with links, pipes or devices in it.
        """
        self.names: frozenset[str] = frozenset()
        self._files: dict[str, OpenFile] = {}
        if os.open not in os.supports_dir_fd:
            raise refused(path, "a system that opens files by folder: Linux, macOS", sys.platform)
        with ExitStack() as stack, _refusing(path, MISSING):
            self.path = Path(path)
            self._handle = os.open(path, _FOLDER & ~os.O_NOFOLLOW)
            stack.callback(os.close, self._handle)
            self._look_through()
            self.names = frozenset(os.listdir(self._handle))
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def open(self, name: str, most: int, what: str = DAMAGED) -> OpenFile:
        """A file of the folder, the same whenever it is asked for.

        Args:
            name: inside the folder, with "/". most: bytes that it may have. what: the message if
                it can't be opened.

        Raises:
            ArtifactError: nothing of this name, no regular file, a link on the way, or too large.
        """
        if name in self._files:
            return self._files[name]
        where, parts = str(self.path / name), PurePosixPath(name).parts
        with ExitStack() as stack, _refusing(where, what):
            folder = self._handle
            for part in parts[:-1]:
                folder = os.open(part, _FOLDER, dir_fd=folder)
                stack.callback(os.close, folder)
            handle = os.open(parts[-1], _FILE, dir_fd=folder)
        self._stack.callback(os.close, handle)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise refused(where, "a file", "something else")
        file = OpenFile(handle, name, where)
        if file.size > most:
            raise refused(where, f"at most {most} bytes", f"{file.size} bytes")
        self._files[name] = file
        return file

    def check_unchanged(self) -> None:
        """Pass if nobody has written to a file since it was opened.

        Raises:
            ArtifactError: names the first that was written to.
        """
        for file in self._files.values():
            file.check_unchanged()

    def _look_through(self) -> None:
        """Refuse what nothing should open by accident: links, pipes, devices, endless folders."""
        seen = 0
        todo = [(PurePosixPath(), os.dup(self._handle))]
        try:
            while todo:
                folder, handle = todo.pop()
                with _closing(handle), os.scandir(handle) as entries:
                    for entry in entries:
                        seen, inner = seen + 1, folder / entry.name
                        _check_entry(entry, str(self.path / inner))
                        if seen > MOST_ENTRIES or len(inner.parts) > DEEPEST:
                            limits = f"at most {MOST_ENTRIES} files, {DEEPEST} folders deep"
                            raise refused(self.path, limits, "more")
                        if entry.is_dir(follow_symlinks=False):
                            todo.append((inner, os.open(entry.name, _FOLDER, dir_fd=handle)))
        finally:
            for _, handle in todo:
                os.close(handle)


def _check_entry(entry: os.DirEntry[str], where: str) -> None:
    if entry.is_symlink():
        raise refused(where, "a file", "a link")
    if not (entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)):
        raise refused(where, "a file or a folder", "a pipe, device or socket")


@contextmanager
def _closing(handle: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def _refusing(where: str | Path, what: str) -> Iterator[None]:
    """What the system says of a name, as a typed error."""
    try:
        yield
    except (OSError, ValueError, TypeError) as error:  # ValueError: a name with NUL
        code = getattr(error, "errno", None)
        got = {errno.ENOENT: "nothing", errno.ELOOP: "a link"}.get(code or 0)
        got = got or str(getattr(error, "strerror", None) or error)
        raise refused(repr(str(where)), "what can be opened", got, what) from error


def refused(where: str | Path, expected: str, got: str, what: str = DAMAGED) -> ArtifactError:
    """The error for a file or folder that is not as it must be."""
    return ArtifactError(
        what,
        where=str(where),
        expected=expected,
        got=got,
        hint="copy it again, or build it anew",
    )

"""Files and folders that are written all or nothing, and stay when the machine stops."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

_SWAP = {"linux": ("renameat2", -100), "darwin": ("renameatx_np", -2)}
"""By platform: the function of the C library that exchanges two names, and what stands for the
current folder in it."""
_FLAG = 2
"""Asks either of them for the exchange."""


def write_file(path: Path, data: str | bytes) -> None:
    """Write a file, or replace it at once; it is on the disk when this returns.

    Raises:
        OSError: it can't be written; what was there stays.
    """
    _write(path, data, os.replace)


def write_new_file(path: Path, data: str | bytes) -> None:
    """As `write_file`, of a file that is not there: of several processes, one writes it.

    Raises:
        FileExistsError: it is there. OSError: it can't be written.
    """
    _write(path, data, _put_new)


def _put_new(part: Path, path: Path) -> None:
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(part, path)
    else:
        part.unlink()


def is_part(path: Path) -> bool:
    """Whether a file is one that `write_file` has not finished."""
    return path.name.startswith(".") and path.suffix == ".part"


def _write(path: Path, data: str | bytes, put: Callable[[Path, Path], None]) -> None:
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        put(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # folders can't be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """Put a folder and all in it on the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            flush(Path(parent, name))
        flush(Path(parent))


def exchange(a: Path, b: Path) -> None:
    """Exchange two files or folders: at no moment is one of the names without either of them.

    Raises:
        OSError: the system, or the file system, can't do that (ENOSYS, EINVAL), or did not.
    """
    name, here = _SWAP.get(sys.platform, ("", 0))
    swap = getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
    if swap is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(a), None, str(b))
    if swap(here, os.fsencode(a), here, os.fsencode(b), ctypes.c_uint(_FLAG)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(a), None, str(b))

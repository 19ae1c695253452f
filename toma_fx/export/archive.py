"""Zip archives that are not trusted: every entry is checked before anybody unpacks one."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO

from toma_fx.errors import ArtifactError

MOST_ENTRIES = 10_000
_PART = re.compile(r"\.?[A-Za-z0-9_][A-Za-z0-9._-]*")


def entry_sizes(file: IO[bytes], where: str) -> dict[str, int]:
    """Sizes of the entries of an archive by name.

    Raises:
        ArtifactError: no archive; or an entry that would leave the folder it is unpacked into, is
            there twice, is compressed (and so of any size), encrypted or a link.
    """
    with _opened(file, where) as archive:
        return {entry.filename: entry.file_size for entry in _entries(archive, where)}


def read_entries(
    file: IO[bytes], listed: Mapping[str, int], where: str
) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the entries of an archive.

    Args:
        file: the archive. listed: sizes of the entries that it must have. where: for messages.

    Raises:
        ArtifactError: as of `entry_sizes`, or other entries.
    """
    with _opened(file, where) as archive:
        entries = _entries(archive, where)
        found = {entry.filename: entry.file_size for entry in entries}
        if found != listed:
            other = min(found.items() ^ listed.items())
            raise _refused(where, "the entries that the manifest lists", f"{other[0]!r} differs")
        for entry in entries:
            yield entry.filename, archive.read(entry)


def _entries(archive: zipfile.ZipFile, where: str) -> list[zipfile.ZipInfo]:
    entries = archive.infolist()
    if len(entries) > MOST_ENTRIES or len({entry.filename for entry in entries}) != len(entries):
        raise _refused(where, f"at most {MOST_ENTRIES} entries, each once", f"{len(entries)}")
    for entry in entries:
        name, kind = entry.filename, entry.external_attr >> 28
        # the name as it is stored: some readers take another, up to its first NUL
        if entry.orig_filename != name or not all(map(_PART.fullmatch, name.split("/"))):
            raise _refused(where, "plain names inside the package", repr(entry.orig_filename))
        stored = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
        if not stored or entry.file_size != entry.compress_size or kind not in (0, 8):
            raise _refused(where, "plain files, stored as they are", repr(name))
    return entries


@contextmanager
def _opened(file: IO[bytes], where: str) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except ArtifactError:
        raise
    except Exception as error:  # damaged archives raise whatever their bytes lead to
        got = f"{type(error).__name__}: {error}"
        raise _refused(where, "a zip archive", got) from error


def _refused(where: str, expected: str, got: str) -> ArtifactError:
    return ArtifactError(
        "a package of the artifact is not what it must be",
        where=where,
        expected=expected,
        got=got[:200],
        hint="this artifact was not made by toma_fx: don't load it",
    )

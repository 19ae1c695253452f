"""Reading an artifact: verified before anything in it is used, and used as it was verified.

manifest.json     what the artifact is; lists every other file that is opened
manifest.sha256   its SHA-256, as `sha256sum` writes and checks it
model.sig         optional: who vouches for it (see `signatures`)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec

from toma_fx.errors import ArtifactError, TomaError
from toma_fx.export.archive import entry_sizes, read_entries
from toma_fx.export.checks import PACKAGE_SUFFIX, check_manifest, malformed
from toma_fx.export.folder import MISSING, OpenFile, OpenFolder, refused
from toma_fx.export.manifest import VERSION, FileSpec, Manifest
from toma_fx.files import write_file

MANIFEST, DIGEST, SIGNATURE = "manifest.json", "manifest.sha256", "model.sig"
MANIFEST_FILES = frozenset({MANIFEST, DIGEST, SIGNATURE})
"""Files of an artifact that its manifest does not list."""
LARGEST = 16 << 20
"""Bytes that a manifest, or a signature, may have."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of an artifact whose other files are there, and its digest.

    Raises:
        ArtifactError: no reader would take it. OSError: the disk is full or can't be written.
    """
    content = manifest.to_json().encode()
    parse_manifest(content, str(folder / MANIFEST))
    write_file(folder / MANIFEST, content)
    write_file(folder / DIGEST, digest_line(manifest.digest))


def digest_line(digest: str) -> str:
    """The content of `manifest.sha256`."""
    return f"{digest}  {MANIFEST}\n"


def file_spec(path: Path) -> FileSpec:
    """What a manifest says of a file.

    Raises:
        ArtifactError: a package that no reader would take.
    """
    with path.open("rb") as file:
        entries = entry_sizes(file, str(path)) if path.suffix == PACKAGE_SUFFIX else None
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileSpec(path.stat().st_size, digest, entries)


@dataclass(frozen=True)
class ArtifactFiles:
    """The files of an artifact, open.

    Attributes:
        folder: that holds them. manifest: that lists them.
    """

    folder: OpenFolder
    manifest: Manifest

    def file(self, name: str) -> OpenFile:
        """A file that the manifest lists, as it was verified.

        Raises:
            ArtifactError: it does not.
        """
        if name not in self.manifest.files:
            raise refused(self.folder.path / MANIFEST, f"{name} among the files", "none such")
        return self.folder.open(name, self.manifest.files[name].size)

    def read(self, name: str) -> bytes:
        """The content of a file, in memory of this process.

        Raises:
            ArtifactError: the manifest lists no such file, or one of other content.
        """
        file = self.file(name)
        content = file.read()
        _check_digest(file, self.manifest.files[name], hashlib.sha256(content).hexdigest())
        return content

    def read_package(self, name: str) -> dict[str, bytes]:
        """The entries of a package, by name: those that the manifest lists, and no others.

        Raises:
            ArtifactError: as of `read`; or no package, or one of other entries.
        """
        file, listed = self.file(name), self.manifest.files[name].entries or {}
        return dict(read_entries(BytesIO(self.read(name)), listed, file.where))

    def copy(self, name: str, path: Path) -> None:
        """Write a copy of a file.

        Raises:
            ArtifactError: as of `read`. OSError: the disk is full or can't be written.
        """
        file, digest = self.file(name), hashlib.sha256()
        with path.open("xb") as copy:
            for chunk in file.chunks():
                digest.update(chunk)
                copy.write(chunk)
        _check_digest(file, self.manifest.files[name], digest.hexdigest())

    def copy_signature(self, folder: Path) -> None:
        """Write a copy of the signature, if there is one, into a folder.

        Raises:
            ArtifactError: it can't be read. OSError: the disk is full or can't be written.
        """
        if self.signed:
            write_file(folder / SIGNATURE, self.folder.open(SIGNATURE, LARGEST).read())

    @property
    def signed(self) -> bool:
        """Whether there is a signature, whosever it is."""
        return SIGNATURE in self.folder.names


@contextmanager
def reading(file: OpenFile) -> Iterator[None]:
    """What libraries raise for a file that they can't read, as one typed error."""
    from safetensors import SafetensorError

    try:
        yield
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        if isinstance(error, TomaError):
            raise
        raise ArtifactError(
            "a file of the artifact can't be loaded",
            where=file.where,
            got=f"{type(error).__name__}: {str(error)[:500]}",
            hint="build the artifact anew",
        ) from error


@contextmanager
def open_artifact(path: str | Path) -> Iterator[ArtifactFiles]:
    """An artifact whose files are all there and unchanged, open.

    Raises:
        ArtifactError: no artifact, one of another version, or naming the first file that is
            missing, is no file, or has changed; also if one is written to before it is closed.
    """
    with OpenFolder(path) as folder:
        files = ArtifactFiles(folder, _manifest_in(folder))
        specs = files.manifest.files
        opened = {name: files.file(name) for name in specs}  # all, before somebody removes one
        for name, file in opened.items():
            if file.size != specs[name].size:
                raise refused(file.where, f"{specs[name].size} bytes", f"{file.size} bytes")
        for name, file in opened.items():
            _check_digest(file, specs[name], file.digest())
            if specs[name].entries is not None:
                files.read_package(name)
        yield files
        folder.check_unchanged()


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of an artifact; the files that it lists are not opened.

    Raises:
        ArtifactError: there is none, or it is damaged or of another version.
    """
    with OpenFolder(folder) as opened:
        return _manifest_in(opened)


def verify_artifact(folder: str | Path) -> Manifest:
    """The manifest of an artifact whose files are all there and unchanged.

    Raises:
        ArtifactError: as of `open_artifact`.
    """
    with open_artifact(folder) as files:
        return files.manifest


def _manifest_in(folder: OpenFolder) -> Manifest:
    file = folder.open(MANIFEST, LARGEST, MISSING)
    content = file.read()
    _check_version(content, file.where)  # an older one has no digest
    line = folder.open(DIGEST, 1024)
    want, got = digest_line(hashlib.sha256(content).hexdigest()).encode(), line.read()
    if got != want:
        raise refused(line.where, repr(want.decode()), repr(got)[:120])
    return parse_manifest(content, file.where)


def parse_manifest(content: bytes, where: str) -> Manifest:
    """A manifest from JSON text, checked throughout.

    Args:
        content: of the file. where: its path, for messages.

    Raises:
        ArtifactError: not JSON, another version, not of its form, with fields that contradict each
            other, or written in another way than `Manifest.to_json` does: a field twice, say.
    """
    _check_version(content, where)
    manifest: Manifest = _decode(content, Manifest, where)
    check_manifest(manifest, where)
    if manifest.to_json().encode() != content:
        raise malformed(where, "every field once, as toma_fx writes it", "other JSON text")
    return manifest


class _Version(msgspec.Struct):
    version: int


def _check_version(content: bytes, where: str) -> None:
    version = _decode(content, _Version, where).version
    if version != VERSION:
        raise ArtifactError(
            "the artifact has another version",
            where=where,
            expected=f"manifest version {VERSION}",
            got=repr(version),
            hint="build it anew, or read it with the toma_fx that made it",
        )


def _decode(content: bytes, kind: Any, where: str) -> Any:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise malformed(where, "JSON of the form of the schema", str(error)) from error


def _check_digest(file: OpenFile, spec: FileSpec, digest: str) -> None:
    if digest != spec.sha256:
        raise refused(file.where, f"SHA-256 {spec.sha256}", digest)

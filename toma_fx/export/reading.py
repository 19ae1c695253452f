"""Reading an artifact: verified before anything in it is used."""

from __future__ import annotations

import hashlib
from pathlib import Path

from toma_fx.errors import ArtifactError
from toma_fx.export.manifest import FileSpec, Manifest
from toma_fx.files import write_file

MANIFEST = "manifest.json"
MANIFEST_FILES = frozenset({MANIFEST})
"""Files of an artifact that its manifest does not list."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of an artifact whose other files are there.

    Raises:
        OSError: the disk is full or can't be written.
    """
    write_file(folder / MANIFEST, manifest.to_json())


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

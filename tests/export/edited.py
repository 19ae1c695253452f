"""Artifacts that somebody edited with care: the digest of the manifest is that of the new one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toma_fx.export.reading import DIGEST, MANIFEST, digest_line, file_spec


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the manifest of an artifact, as JSON data."""
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    put(folder, (json.dumps(data, indent=2) + "\n").encode())
    return folder


def put(folder: Path, manifest: bytes) -> None:
    """Write a manifest and its digest."""
    (folder / MANIFEST).write_bytes(manifest)
    (folder / DIGEST).write_text(digest_line(hashlib.sha256(manifest).hexdigest()))


def list_anew(folder: Path) -> Path:
    """Let the manifest list the files as they are now."""

    def change(data: dict[str, Any]) -> None:
        data["files"] = {name: asdict(file_spec(folder / name)) for name in data["files"]}

    return edit(folder, change)

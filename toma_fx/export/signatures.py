"""Who made an artifact: signatures by the model-signing package of Sigstore's OpenSSF project.

    model.sig     a Sigstore bundle: the checksums of all files of the artifact, signed

Signed are the checksums of the files that were opened, and these are what a signature is compared
with: nothing is read a second time. The bundle is that of `model_signing sign key`, and either
verifies what the other signed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from toma_fx.errors import ArtifactError, ConfigError, MissingPackageError
from toma_fx.export.packages import import_package
from toma_fx.export.reading import (
    DIGEST,
    LARGEST,
    MANIFEST,
    SIGNATURE,
    ArtifactFiles,
    digest_line,
    open_artifact,
)
from toma_fx.files import write_file


@dataclass(frozen=True)
class _Digest:
    """A checksum, as model-signing reads one."""

    digest_hex: str
    algorithm: str = "sha256"

    @property
    def digest_value(self) -> bytes:
        return bytes.fromhex(self.digest_hex)


@dataclass(frozen=True)
class _Resource:
    identifier: str
    digest: _Digest


class _Verified:
    """Files whose checksums are known: stands for model-signing's hashing, and for its result."""

    def __init__(self, name: str, digests: Mapping[str, str]) -> None:
        self.model_name, self._digests = name, digests
        self.serialization_type = {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": False,
            "ignore_paths": [SIGNATURE],
        }

    def hash(self, path: Any, **options: Any) -> _Verified:
        """Nothing to hash."""
        return self

    def add_ignored_paths(self, **options: Any) -> None:
        """Nothing is ignored, whatever a signature says."""

    def resource_descriptors(self) -> Iterator[_Resource]:
        """All files, in the order that is signed."""
        for name in sorted(self._digests):
            yield _Resource(name, _Digest(self._digests[name]))

    def __eq__(self, other: Any) -> bool:
        signed = [
            (r.identifier, r.digest.algorithm, r.digest.digest_hex)
            for r in other.resource_descriptors()
        ]
        return sorted(signed) == sorted(
            (r.identifier, r.digest.algorithm, r.digest.digest_hex)
            for r in self.resource_descriptors()
        )

    __hash__ = None  # type: ignore[assignment]


def sign(artifact: str | Path, key: str | Path) -> None:
    """Sign an artifact: writes `model.sig` into its folder, or replaces the one that is there.

    Args:
        artifact: the folder. key: a private key on an elliptic curve (NIST P-256, P-384, P-521), in
            a PEM file without a password.

    Raises:
        ArtifactError: the artifact is damaged, or can't be written to. ConfigError: no such key.
        MissingPackageError: the extra `[sign]` is not installed.
    """
    signing = _package("model_signing.signing")
    with open_artifact(artifact) as files, TemporaryDirectory() as folder:
        try:
            signer = signing.Config().use_elliptic_key_signer(private_key=_key(key))
            signer.set_hashing_config(_verified(files))
            signer.sign(files.folder.path, Path(folder, SIGNATURE))
            signature = Path(folder, SIGNATURE).read_bytes()
        except (ValueError, TypeError, OSError) as error:  # TypeError: a password is asked for
            raise _wrong_key(key, "a private key without a password", error) from error
        try:
            write_file(files.folder.path / SIGNATURE, signature)
        except OSError as error:
            raise ArtifactError(
                "the signature can't be written",
                where=str(files.folder.path / SIGNATURE),
                expected="a folder that can be written, on a disk with room",
                got=str(error.strerror),
            ) from error


def check_signature(files: ArtifactFiles, key: str | Path) -> None:
    """Passes if an artifact, as it was opened, is what the owner of a key signed.

    Args:
        files: of a verified artifact. key: the public key, in a PEM file.

    Raises:
        ArtifactError: it is not signed, not by this key, or other files were signed.
        ConfigError: no such key. MissingPackageError: the extra `[sign]` is not installed.
    """
    verifying = _package("model_signing.verifying")
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=_key(key))
    except (ValueError, TypeError, OSError) as error:
        raise _wrong_key(key, "a public key", error) from error
    signature = files.folder.open(SIGNATURE, LARGEST, "the artifact is not signed")
    verifier.set_hashing_config(_verified(files))
    try:
        verifier.verify(files.folder.path, signature.path)
    except Exception as error:  # damaged signatures raise whatever their bytes lead to
        raise ArtifactError(
            "the artifact is not what the owner of the key signed",
            where=signature.where,
            expected=f"a signature of these files by {key}",
            got=f"{type(error).__name__}: {error}"[:300],
            hint="don't load it unless you know better who made it",
        ) from error


def _verified(files: ArtifactFiles) -> _Verified:
    manifest = files.manifest
    line = digest_line(manifest.digest)
    own = {MANIFEST: manifest.digest, DIGEST: hashlib.sha256(line.encode()).hexdigest()}
    listed = {name: spec.sha256 for name, spec in manifest.files.items()}
    return _Verified(files.folder.path.resolve().name, {**own, **listed})


def _key(key: str | Path) -> Path:
    path = Path(key)
    if not path.is_file():
        raise ValueError("no such file")
    return path


def _wrong_key(key: str | Path, expected: str, error: Exception) -> ConfigError:
    return ConfigError(
        "the key can't be used",
        where=str(key),
        expected=f"{expected} on an elliptic curve, in a PEM file",
        got=f"{type(error).__name__}: {error}"[:200],
        hint="openssl ecparam -name prime256v1 -genkey -noout -out key.pem; "
        "openssl ec -in key.pem -pubout -out key.pub",
    )


def _package(name: str) -> Any:
    def explain(error: Exception) -> MissingPackageError:
        return MissingPackageError(
            "signatures need the package model-signing",
            where=name,
            got=str(error),
            hint="pip install toma_fx[sign]",
        )

    return import_package(name, explain)

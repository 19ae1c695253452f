"""`load`: open an artifact, as a module that pipelines save and load, and that can be copied."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from toma_fx.devices import usable_device
from toma_fx.errors import ArtifactError, ConfigError
from toma_fx.export.building import building
from toma_fx.export.denoiser import ArtifactDenoiser
from toma_fx.export.manifest import Manifest
from toma_fx.export.reading import MANIFEST, ArtifactFiles, open_artifact
from toma_fx.export.registry import TARGETS, target_class
from toma_fx.export.signatures import check_signature
from toma_fx.export.targets import Runtime
from toma_fx.methods.checks import check_switch
from toma_fx.models.hub import REPOSITORY


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    trust: str | Path | None = None,
    cast: bool = False,
    revision: str | None = None,
    **options: Any,
) -> ArtifactDenoiser:
    """Load an artifact.

    Args:
        path: the folder that a build made, or the id of a repository of the hub with its files
            ("owner/name"), which is downloaded. It holds native code: load what you built, or give
            `trust`.
        device: to run on; what the artifact was built on if not given. Compiled artifacts are for
            devices of that kind alone, ONNX models for the CPU and for CUDA.
        trust: PEM file of a public key: nothing is run unless its owner signed the artifact.
        cast: take calls in any floating dtype and give outputs in that of their first floating
            input, as a float16 artifact in a float32 pipeline needs. Each step then rounds.
        revision: of the repository: a commit, tag or branch.
        options: of the target: `providers=` for ONNX Runtime.

    Returns:
        A module that stands where the denoiser stood: `pipe.unet = toma_fx.load("sdxl-onnx")`.

    Raises:
        ArtifactError: a file is missing or has changed, another version of the manifest or of what
            the target needs, another device or architecture. Nothing of the artifact was run then.
            Not signed, or not by the owner of the key.
        ConfigError: no such device, or key; `cast` is no bool.
        MissingPackageError: the target, or a signature, needs a package that is not installed.
    """
    check_switch("cast", cast, "load")
    return _load(find_folder(path, revision), device, trust, options, cast=cast)


def find_folder(path: str | Path, revision: str | None = None) -> Path:
    """The folder of an artifact, downloaded if it is named by a repository of the hub.

    Raises:
        ArtifactError: neither. It says so of folders of diffusers, too.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArtifactError(
            "no artifact",
            where="load",
            expected="the path of a folder, or the id of a repository",
            got=type(path).__name__,
        )
    folder = Path(path)
    if os.path.isdir(folder):  # False, too, for names that no file can have
        made = [name for name in ("model_index.json", "config.json") if (folder / name).is_file()]
        if made and not (folder / MANIFEST).exists():
            raise ArtifactError(
                "no artifact, but a model of diffusers",
                where=str(folder),
                expected=MANIFEST,
                got=made[0],
                hint=f"toma-fx build --model {folder} --target onnx --out artifact makes one of it",
            )
        return folder
    if os.path.exists(folder) or not REPOSITORY.fullmatch(str(path)):
        return folder  # what is wrong with it is said when it is opened
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), revision=revision))
    except OSError as error:  # what the hub's errors are, too
        raise ArtifactError(
            "no artifact",
            where=str(path),
            expected="a folder, or a repository of the hub",
            got=f"no such folder, and {type(error).__name__}: {str(error).splitlines()[0]}",
        ) from error


def _load(
    path: str | Path,
    device: str | torch.device | None,
    trust: str | Path | None,
    options: Mapping[str, Any],
    digest: str | None = None,
    *,
    cast: bool = False,
) -> LoadedDenoiser:
    """See `load`; only the artifact of this manifest, if one is named."""
    with open_artifact(path) as artifact:
        if digest is not None:
            _check_same(artifact, digest)
        if trust is not None:
            check_signature(artifact, trust)
        manifest = artifact.manifest
        wanted = _own_device(manifest) if device is None else usable_device(device)
        if manifest.target.name not in TARGETS:
            raise ArtifactError(
                "the artifact has an unknown target",
                where="target.name",
                expected=", ".join(TARGETS),
                got=repr(manifest.target.name),
                hint="read it with the toma_fx that made it",
            )
        runtime = target_class(manifest.target.name).open(artifact, wanted, options)
    folder = Path(path).resolve()
    return LoadedDenoiser(folder, manifest, runtime, wanted, trust, options, cast=cast)


def _own_device(manifest: Manifest) -> torch.device:
    try:
        return usable_device(manifest.device.type)
    except ConfigError as error:
        raise ArtifactError(
            "the device that the artifact was built on is not here",
            where="device.type",
            expected=error.expected,
            got=error.got,
            hint='ONNX models run on others: load(..., device="cpu")',
        ) from error


class LoadedDenoiser(ArtifactDenoiser):
    """The denoiser of an artifact that lies in a folder. Made by `toma_fx.load`.

    Copies and pickles open the folder again, on the same device and with the same options. It is
    saved with a pipeline of diffusers, as a copy of the folder, and loaded with it.

    Attributes:
        folder: of the artifact. trust: path of the key that it must be signed by, if any.
        options: of the target.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        runtime: Runtime,
        device: torch.device,
        trust: str | Path | None,
        options: Mapping[str, Any],
        *,
        cast: bool = False,
    ) -> None:
        ArtifactDenoiser.__init__(self, manifest, runtime, device, cast=cast)
        self.folder, self.options = folder, dict(options)
        self.trust = None if trust is None else str(Path(trust).resolve())

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """To diffusers a model: its pipelines leave out what is none of their classes."""
        return _model_class() if "diffusers.models.modeling_utils" in sys.modules else type(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        device = str(self.device)
        settings = device, self.trust, self.options, self._digest, self.cast
        return _reopen, (str(self.folder), *settings)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Copy the artifact; called by `save_pretrained` of pipelines.

        Args:
            save_directory: where to. An artifact that is there is replaced.
            options: of diffusers, for files of weights: an artifact's are as they are.

        Raises:
            ArtifactError: its folder is gone, or has changed. BuildError: other files are where it
                would be saved, or the disk is full.
        """
        out = Path(save_directory)
        if out.resolve() == self.folder:
            return
        with open_artifact(self.folder) as artifact:
            _check_same(artifact, self._digest)

            def copy(folder: Path) -> None:
                for name in artifact.manifest.files:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    artifact.copy(name, folder / name)

            with building(out, self._digest, overwrite=True) as build:
                build.stage("copy", copy, *artifact.manifest.files)
                build.finish(artifact.manifest)
                artifact.copy_signature(build.folder)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> ArtifactDenoiser:
        """`toma_fx.load` for pipelines of diffusers; dtype and device are the artifact's."""
        return load(path)


ModelMixin = LoadedDenoiser
"""diffusers loads a component with `from_pretrained` if its module has its class by this name."""


@cache
def _model_class() -> type:
    """The class as one of diffusers' models; nothing is ever made of it."""
    from diffusers import ModelMixin

    return type(LoadedDenoiser.__name__, (LoadedDenoiser, ModelMixin), {"__module__": __name__})


def _reopen(
    folder: str,
    device: str,
    trust: str | None,
    options: Mapping[str, Any],
    digest: str,
    cast: bool,
) -> ArtifactDenoiser:
    """A copy of a loaded artifact.

    Raises:
        ArtifactError: as of `load`, or another artifact is in the folder now.
    """
    return _load(folder, device, trust, options, digest, cast=cast)


def _check_same(artifact: ArtifactFiles, digest: str) -> None:
    found = artifact.manifest.digest
    if found != digest:
        raise ArtifactError(
            "a loaded artifact can't be opened again",
            where=str(artifact.folder.path),
            expected=f"the artifact that was loaded (manifest {digest[:12]})",
            got=f"another one (manifest {found[:12]})",
            hint="toma_fx.load() opens the one that is there now",
        )

"""`load`: open an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from toma_fx.errors import ArtifactError
from toma_fx.export.artifact import verify_artifact
from toma_fx.export.denoiser import ArtifactDenoiser
from toma_fx.export.registry import TARGETS, target_class


def load(
    path: str | Path, *, device: str | torch.device | None = None, **options: Any
) -> ArtifactDenoiser:
    """Load an artifact.

    Args:
        path: the folder that a build made.
        device: to run on; what the artifact was built on if not given. Compiled artifacts are for
            devices of that kind alone, ONNX models for the CPU and for CUDA.
        options: of the target: `providers=` for ONNX Runtime.

    Returns:
        A module that stands where the denoiser stood: `pipe.unet = toma_fx.load("sdxl-onnx")`.

    Raises:
        ArtifactError: a file is missing or has changed, another version of the manifest or of what
            the target needs, another device or architecture. Nothing of the artifact was run then.
        MissingPackageError: the target needs a package that is not installed.
    """
    folder = Path(path)
    manifest = verify_artifact(folder)
    wanted = torch.device(manifest.device.type if device is None else device)
    if manifest.target.name not in TARGETS:
        raise ArtifactError(
            "the artifact has an unknown target",
            where="target.name",
            expected=", ".join(TARGETS),
            got=repr(manifest.target.name),
            hint="read it with the toma_fx that made it",
        )
    target = target_class(manifest.target.name)
    return ArtifactDenoiser(manifest, target.open(folder, manifest, wanted, options), wanted)

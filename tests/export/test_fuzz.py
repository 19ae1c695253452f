"""Damaged manifests and folders: refused with a typed error, or read as they were; nothing hangs,
nothing outside the folder is read, nothing stays open."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import toma_fx
from tests.export.fuzz import fuzz_folders, fuzz_manifests, told
from tests.export.in_process import InProcess
from tests.methods.test_methods import inputs, model
from toma_fx.errors import TomaError
from toma_fx.export.builder import export
from toma_fx.export.denoiser import ArtifactDenoiser
from toma_fx.export.manifest import Manifest
from toma_fx.export.reading import verify_artifact
from toma_fx.export.targets import Runtime


class Zeros(Runtime):
    """Gives tensors of the shapes that the manifest says."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def run(self, kind: str, inputs: Sequence[Any], kept: Any) -> Any:
        gives = self.manifest.outputs_of(kind)
        tensors = {s.name: torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in gives}
        results = list(tensors.values())[: len(self.manifest.outputs)]
        return results, {name: tensors[name] for name in self.manifest.gives(kind)}


def use(manifest: Manifest) -> None:
    """Steps of an artifact with this manifest: they work, or say what is wrong."""
    large = [s for s in (*manifest.outputs, *manifest.kept) if torch.Size(s.shape).numel() > 10**6]
    if large:
        return
    try:
        denoiser = ArtifactDenoiser(manifest, Zeros(manifest), torch.device("cpu"))
        assert denoiser.dtype is not None
        with torch.no_grad():
            for step in range(3):
                denoiser(**inputs(timestep=800.0 - step))
    except TomaError:
        return


@pytest.mark.parametrize("count", [120, 20_000])
def test_damaged_manifests(tmp_path: Path, count: int) -> None:
    optimized = toma_fx.optimize(model(), method="toma", min_tokens=1, weights_every=2)
    export(optimized, inputs(), tmp_path / "a", InProcess())
    results = fuzz_manifests(tmp_path / "a", count, 0, verify_artifact, use)
    assert sum(results.values()) == count
    print(f"{count:,} damaged manifests: {told(results)}")


@pytest.mark.parametrize("count", [60, 2000])
def test_damaged_folders(tmp_path: Path, count: int) -> None:
    pytest.importorskip("onnxruntime")
    optimized = toma_fx.optimize(model(), method="toma", min_tokens=1)
    toma_fx.export.onnx(optimized, inputs(), tmp_path / "a")

    def load(folder: Path) -> Manifest:
        loaded: Any = toma_fx.load(folder)
        manifest: Manifest = loaded.manifest
        return manifest

    results = fuzz_folders(tmp_path / "a", tmp_path, count, 0, load)
    assert sum(results.values()) == count
    print(f"{count:,} damaged folders: {told(results)}")

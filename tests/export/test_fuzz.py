"""Damaged manifests and folders: refused with a typed error, or read as they were; nothing hangs,
nothing outside the folder is read, nothing stays open."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import toma_fx
from tests.export.edited import edit, list_anew
from tests.export.fuzz import fuzz_folders, fuzz_manifests, told
from tests.export.in_process import InProcess
from tests.methods.test_methods import inputs, model
from toma_fx.errors import ArtifactError, TomaError
from toma_fx.export.builder import export
from toma_fx.export.denoiser import ArtifactDenoiser
from toma_fx.export.manifest import Manifest
from toma_fx.export.reading import verify_artifact
from toma_fx.export.targets import Runtime


class Zeros(Runtime):
    """Gives tensors of the shapes that the manifest says."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def run(self, call: int, kind: str, inputs: Sequence[Any], kept: Any) -> Any:
        spec = self.manifest.calls[call]
        gives = spec.outputs_of(kind)
        tensors = {s.name: torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in gives}
        results = list(tensors.values())[: len(spec.outputs)]
        return results, {name: tensors[name] for name in spec.gives(kind)}


def use(manifest: Manifest) -> None:
    """Steps of an artifact with this manifest: they work, or say what is wrong."""
    specs = (s for call in manifest.calls for s in (*call.outputs, *call.kept))
    large = [s for s in specs if torch.Size(s.shape).numel() > 10**6]
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
    export(optimized, [inputs(), inputs(batch=1)], tmp_path / "a", InProcess())
    results = fuzz_manifests(tmp_path / "a", count, 0, verify_artifact, use)
    assert sum(results.values()) == count
    print(f"{count:,} damaged manifests: {told(results)}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX artifact."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("onnx") / "a"
    optimized = toma_fx.optimize(model(), method="toma", min_tokens=1)
    toma_fx.export.onnx(optimized, inputs(), folder)
    return folder


@pytest.mark.parametrize("count", [60, 2000])
def test_damaged_folders(models: Path, tmp_path: Path, count: int) -> None:
    def load(folder: Path) -> Manifest:
        loaded: Any = toma_fx.load(folder)
        manifest: Manifest = loaded.manifest
        return manifest

    results = fuzz_folders(models, tmp_path, count, 0, load)
    assert sum(results.values()) == count
    print(f"{count:,} damaged folders: {told(results)}")


@pytest.mark.parametrize(
    "place", ["{outside}/weights.safetensors", "../outside/weights.safetensors", "other"]
)
def test_models_find_no_file_but_the_weights(models: Path, tmp_path: Path, place: str) -> None:
    """Whatever they name, in an artifact whose checksums fit."""
    onnx = pytest.importorskip("onnx")
    copy, outside = tmp_path / "a", tmp_path / "outside"
    for folder in (copy, outside):
        shutil.copytree(models, folder)
    shutil.copy(copy / "weights.safetensors", copy / "other")
    changed = onnx.load(copy / "reuse.onnx", load_external_data=False)
    (weight, *_) = (t for t in changed.graph.initializer if t.external_data)
    for entry in weight.external_data:
        if entry.key == "location":
            entry.value = place.format(outside=outside)
    (copy / "reuse.onnx").write_bytes(changed.SerializeToString())
    with pytest.raises(ArtifactError, match="can't open a model"):
        toma_fx.load(list_anew(copy))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.graph.input[0], "name", "x"),
        lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 3),
        lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", 11),
        lambda m: m.graph.output.append(m.graph.output[0]),
        lambda m: m.graph.input.pop(),
    ],
)
def test_models_are_bound_to_their_manifest(models: Path, tmp_path: Path, change: Any) -> None:
    onnx = pytest.importorskip("onnx")
    copy = Path(shutil.copytree(models, tmp_path / "a"))
    changed = onnx.load(copy / "reuse.onnx", load_external_data=False)
    change(changed)
    (copy / "reuse.onnx").write_bytes(changed.SerializeToString())
    with pytest.raises(ArtifactError, match=r"can't open a model|other tensors than"):
        toma_fx.load(list_anew(copy))


def test_a_manifest_of_other_shapes(models: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(models, tmp_path / "a"))

    def change(data: dict[str, Any]) -> None:
        for spec in data["calls"][0]["inputs"]:
            spec["tensor"]["shape"] = [1, *spec["tensor"]["shape"][1:]]

    with pytest.raises(ArtifactError, match="other tensors than the manifest"):
        toma_fx.load(edit(copy, change))

"""A loaded artifact is saved with a pipeline and loaded with it; copies open its folder again."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, ModelMixin

import toma_fx
from tests.export.edited import edit
from tests.export.in_process import InProcess
from tests.methods.test_methods import inputs
from toma_fx.errors import ArtifactError, BuildError
from toma_fx.export import loader
from toma_fx.export.builder import export
from toma_fx.export.denoiser import ArtifactDenoiser

pytestmark = pytest.mark.usefixtures("exported_once")


@pytest.fixture
def folder(
    tmp_path: Path, optimized: Any, target: InProcess, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An artifact that `load` opens in process."""
    export(optimized, inputs(), tmp_path / "artifact", target)
    monkeypatch.setattr(loader, "TARGETS", {"in-process": ""})
    monkeypatch.setattr(loader, "target_class", lambda name: target)
    return tmp_path / "artifact"


def pipeline(unet: Any) -> Any:
    return DDIMPipeline(unet=unet, scheduler=DDIMScheduler())


@torch.no_grad()
def test_a_pipeline_saves_and_loads_it(folder: Path, tmp_path: Path) -> None:
    artifact = toma_fx.load(folder)
    pipe, saved = pipeline(artifact), tmp_path / "saved"
    pipe.save_pretrained(saved)
    assert sorted(p.name for p in (saved / "unet").iterdir()) == sorted(
        p.name for p in folder.iterdir()
    )
    shutil.rmtree(folder)
    again = DiffusionPipeline.from_pretrained(saved)
    assert isinstance(again.unet, ArtifactDenoiser)
    assert torch.equal(again.unet(**inputs()), artifact(**inputs()))
    explicit = DiffusionPipeline.from_pretrained(saved, unet=toma_fx.load(saved / "unet"))
    assert torch.equal(explicit.unet(**inputs()), artifact(**inputs()))
    again.save_pretrained(saved)  # onto itself
    again.save_pretrained(tmp_path / "other")
    again.save_pretrained(tmp_path / "other")  # replaces an artifact


def test_it_is_not_saved_over_other_files_or_from_a_damaged_folder(
    folder: Path, tmp_path: Path
) -> None:
    pipe = pipeline(toma_fx.load(folder))
    (tmp_path / "saved" / "unet").mkdir(parents=True)
    (tmp_path / "saved" / "unet" / "config.json").write_text("{}")
    with pytest.raises(BuildError, match="not empty"):
        pipe.save_pretrained(tmp_path / "saved")
    assert [p.name for p in (tmp_path / "saved" / "unet").iterdir()] == ["config.json"]
    (folder / "refresh.txt").write_text("other")
    with pytest.raises(ArtifactError, match="damaged"):
        pipe.save_pretrained(tmp_path / "new")


def test_it_is_a_model_to_diffusers(folder: Path) -> None:
    artifact = toma_fx.load(folder)
    assert isinstance(artifact, ModelMixin)
    assert isinstance(artifact, ArtifactDenoiser)
    assert not issubclass(type(artifact), ModelMixin)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}


@pytest.mark.parametrize("how", COPIES)
@torch.no_grad()
def test_copies_open_the_folder_again(
    how: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    artifact: Any = toma_fx.load(folder.name, device="cpu", threads=2)
    first = artifact(**inputs(timestep=900.0))
    monkeypatch.chdir("/")
    other = COPIES[how](artifact)
    assert other is not artifact
    assert other.folder == folder.resolve()
    assert other.options == {"threads": 2}
    assert other.device == artifact.device
    assert torch.equal(other(**inputs(timestep=900.0)), first), "it begins a generation"
    assert isinstance(COPIES[how](pipeline(artifact)).unet, ArtifactDenoiser)


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_what_is_gone_or_another_says_so(
    how: str, folder: Path, target: InProcess, optimized: Any
) -> None:
    artifact = toma_fx.load(folder)
    shutil.move(folder, folder.parent / "moved")
    with pytest.raises(ArtifactError, match="no artifact"):
        COPIES[how](artifact)
    shutil.copytree(folder.parent / "moved", folder)
    edit(folder, lambda data: data.update(license="other"))
    with pytest.raises(ArtifactError, match="be opened again"):
        COPIES[how](artifact)
    with pytest.raises(ArtifactError, match="be opened again"):
        artifact.save_pretrained(folder.parent / "saved")
    assert not (folder.parent / "saved").exists()

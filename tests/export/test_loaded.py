"""A loaded artifact is saved with a pipeline and loaded with it; copies open its folder again."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, ModelMixin

import toma_fx
from tests.export.edited import edit
from tests.export.in_process import InProcess
from tests.methods.test_methods import inputs
from toma_fx.errors import ArtifactError, BuildError, ConfigError, SignatureError
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


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_calls_in_another_floating_dtype(folder: Path, dtype: torch.dtype) -> None:
    own, call = toma_fx.load(folder), inputs()
    other = {**call, "sample": call["sample"].to(dtype), "timestep": call["timestep"].to(dtype)}
    hint = r"pipe.to\(torch.float32\) before, or toma_fx.load\(..., cast=True\)"
    with pytest.raises(SignatureError, match=hint):
        own(**other)
    casting = toma_fx.load(folder, cast=True)
    rounded = {name: x.to(torch.float32) for name, x in other.items()}
    for artifact in (casting, copy.deepcopy(casting), pickle.loads(pickle.dumps(casting))):
        outputs = artifact(**other)
        assert outputs.dtype == dtype
        assert torch.equal(outputs, own(**rounded).to(dtype))
        own.reset()
        artifact.reset()
    stepped, state = casting.step(other, toma_fx.State())
    assert torch.equal(stepped, own.step(rounded, toma_fx.State())[0].to(dtype))
    assert {x.dtype for x in state.kept.values() if x.is_floating_point()} <= {torch.float32}
    assert casting(**call).dtype == torch.float32
    with pytest.raises(SignatureError, match="sample"):
        casting(**{**call, "sample": call["sample"].to(torch.int64)})
    with pytest.raises(ConfigError, match="cast"):
        toma_fx.load(folder, cast="yes")  # type: ignore[arg-type]


@torch.no_grad()
def test_from_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def download(name: str, revision: str | None = None) -> str:
        asked.append((name, revision))
        if name == "somebody/none":
            raise OSError("404: no such repository\nand more")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    artifact = toma_fx.load("somebody/sdxl-onnx", revision="v1")
    assert torch.equal(artifact(**inputs()), toma_fx.load(folder)(**inputs()))
    with pytest.raises(ArtifactError, match="no such folder, and OSError: 404"):
        toma_fx.load("somebody/none")
    for path in ("nowhere", "./a/b", "a/b/c", tmp_path / "gone"):
        with pytest.raises(ArtifactError):
            toma_fx.load(path)
    assert asked == [("somebody/sdxl-onnx", "v1"), ("somebody/none", None)]


def test_a_folder_of_diffusers_is_known(tmp_path: Path) -> None:
    for name in ("model_index.json", "config.json"):
        made = tmp_path / name
        made.mkdir()
        (made / name).write_text("{}")
        with pytest.raises(ArtifactError, match=f"a model of diffusers(.|\n)*{made} --target"):
            toma_fx.load(made)

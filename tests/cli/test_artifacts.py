"""`toma-fx build`, `info`, `verify` and `run`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toma_fx
from tests.cli.conftest import build
from toma_fx.capture.grids import find_raster
from toma_fx.cli.main import main
from toma_fx.cli.run import arguments_for
from toma_fx.cli.text import bytes_text
from toma_fx.errors import ModelTypeError
from toma_fx.export.manifest import Manifest
from toma_fx.export.reading import parse_manifest, verify_artifact
from toma_fx.models import tiny
from toma_fx.models.named import example, license_of

STAGES = ["load the model", "export", "onnx refresh", "compare with the process"]


def test_what_was_built(artifact: Path) -> None:
    manifest = verify_artifact(artifact)
    assert manifest.model == "FluxTransformer2DModel", "found inside the pipeline's folder"
    assert manifest.license == "flux-1-dev", "from the model card"
    assert manifest.target.options["form"] == "cached"
    hidden = next(s for s in manifest.calls[0].inputs if s.path == ("hidden_states",))
    assert hidden.tensor.shape[:2] == (1, 64)
    assert manifest.calls[0].plan["config"]["min_tokens"] == 16


def test_what_a_build_says(
    artifact: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = ("--target", "onnx", "--form", "stateless", "--opset", 20)
    more = ("--license", "mine", "--overwrite")
    shutil.copytree(artifact, tmp_path / "a")
    assert build("--model", model_folder, *target, *more, "--out", tmp_path / "a") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == STAGES
    assert lines[2].split()[-1] in ("kB", "MB"), "size of what the stage wrote"
    assert "largest difference" in lines[-1]
    manifest = verify_artifact(tmp_path / "a")
    assert (manifest.license, manifest.target.options["opset"]) == ("mine", "20")


def test_info_and_verify(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(artifact)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "onnx, form cached, opset 23",
        "refresh.onnx",
        "(refresh reuse reuse reuse reuse)",
    ):
        assert words in text
    assert main(["info", str(artifact), "--json"]) == 0
    assert parse_manifest(capsys.readouterr().out.encode(), "printed") == verify_artifact(artifact)
    assert main(["verify", str(artifact)]) == 0
    assert "3 files" in capsys.readouterr().out


def test_damage_is_an_error(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "a"
    shutil.copytree(artifact, damaged)
    with (damaged / "weights.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    for command in ("verify", "run"):
        assert main([command, str(damaged)]) == 1
        assert "weights.safetensors" in capsys.readouterr().err
    assert main(["info", str(damaged)]) == 0, "the manifest can still be read"


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_run(artifact: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(artifact), "--steps", "3", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    counts = [line.split()[:2] for line in text.splitlines() if " ms" in line]
    assert counts == [["refresh", "1"], ["reuse", "2"]]

    manifest = verify_artifact(artifact)
    call = arguments_for(manifest.calls[0], {})
    given = {spec.tensor.name: call[spec.path[0]] for spec in manifest.calls[0].inputs}
    path = tmp_path / f"inputs.{kind}"
    if kind == "npz":
        np.savez(path, **{name: x.numpy() for name, x in given.items()})
    else:
        from safetensors.torch import save_file

        save_file(given, path)
    out = tmp_path / f"outputs.{kind}"
    files = ("--inputs", str(path), "--outputs", str(out))
    assert main(["run", str(artifact), "--steps", "1", *files]) == 0
    want = toma_fx.load(artifact)(**call)[0]
    if kind == "npz":
        got = torch.from_numpy(np.load(out)["output_0"])
    else:
        from safetensors.torch import load_file

        got = load_file(out)["output_0"]
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--inputs", "nosuch.npz"], "can't be read"),
        (["--inputs", "x.pickle"], "ends in .npz or .safetensors"),
        (["--device", "cuda:7"], ""),
        (["--providers", "NoSuchProvider"], "has no such provider"),
    ],
)
def test_bad_runs(
    artifact: Path, args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(artifact), *args]) == 1
    assert words in capsys.readouterr().err


def test_inputs_that_are_pickled_or_not_all(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, hidden_states=np.array([{"code": "never run"}], dtype=object))
    assert main(["run", str(artifact), "--inputs", str(path)]) == 1
    assert "allow_pickle" in capsys.readouterr().err
    np.savez(path, hidden_states=np.zeros(3))
    assert main(["run", str(artifact), "--inputs", str(path)]) == 1
    assert "encoder_hidden_states" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--target", "aoti", "--opset", 20], "another target"),
        (["--target", "onnx", "--dry-run"], "only TensorRT"),
        (["--target", "onnx"], "--out"),
        (["--target", "tensorrt", "--out", "OUT"], "toma_fx[tensorrt]"),
        (["--target", "onnx", "--out", "OUT", "--opset", 17], "18 to 25"),
        (["--target", "onnx", "--out", "OUT", "--ration", "0.5"], "ration"),
    ],
)
def test_bad_builds(
    model_folder: Path,
    tmp_path: Path,
    args: list[Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = [str(tmp_path / "a") if a == "OUT" else a for a in args]
    assert build("--model", model_folder, *args) == 1
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_goes_on(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from toma_fx.export import builder

    def interrupt(*args: Any) -> Any:
        raise KeyboardInterrupt

    args = ("--model", model_folder, "--target", "onnx", "--form", "stateless")
    with monkeypatch.context() as patch:
        patch.setattr(builder, "_compare", interrupt)
        assert build(*args, "--out", tmp_path / "a") == 130
    assert "goes on" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert build(*args, "--out", tmp_path / "a") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == STAGES
    assert "done before" in lines[2]
    assert "largest difference" in lines[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_in_use_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("all my work")
    assert build("--model", "nosuch", "--target", "aoti", "--out", tmp_path) == 1
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("route", ["torch", "onnx"])
def test_dry_run(name: str, route: str, capsys: pytest.CaptureFixture[str]) -> None:
    merge = ("--min_tokens", "64")
    args = ("--target", "tensorrt", "--dry-run", "--route", route, *merge)
    assert main(["build", "--model", name, *args]) == 0
    text = capsys.readouterr().out
    assert text.count("every operator is taken") == 2
    assert "program reuse" in text


def test_dry_run_says_what_is_not_taken(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge = ("--method", "toma", "--inverse", "pinv", "--destinations_every", "2")
    args = ("--target", "tensorrt", "--dry-run", *merge)
    assert build("--model", model_folder, *args) == 1
    found = capsys.readouterr()
    assert "aten._linalg_solve_ex" in found.out
    assert "does not take the whole program" in found.err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_example_calls_run(name: str, dtype: torch.dtype) -> None:
    model, inputs = example(name, 32, 64, 1, dtype=dtype)
    with torch.no_grad():
        (out,) = model(**inputs)
    assert out.dtype == dtype
    assert inputs["encoder_hidden_states"].dtype == dtype


def test_unknown_models(tmp_path: Path) -> None:
    with pytest.raises(ModelTypeError, match=r"config\.json"):
        example(str(tmp_path))
    assert license_of(str(tmp_path)) == ""
    assert "Apache-2.0" in license_of("tiny-sdxl")


def test_sizes() -> None:
    assert [bytes_text(n) for n in (7, 1500, 2_500_000, 3 * 10**9)] == [
        "7 B",
        "1.5 kB",
        "2.5 MB",
        "3.0 GB",
    ]


def test_positions_of_several_images(artifact: Path) -> None:
    manifest = _with_raster(artifact, ((4, 2), 4, 0, 3))
    ids = arguments_for(manifest.calls[0], {})["img_ids"]
    assert ids.shape == (27, 3)
    spec = next(s for s in manifest.calls[0].inputs if s.path == ("img_ids",))
    found = find_raster(ids)
    assert found is not None
    assert (found.heights, found.width, found.rest, found.before) == spec.raster


def _with_raster(artifact: Path, raster: Any) -> Manifest:
    manifest = verify_artifact(artifact)
    heights, width, rest, before = raster
    shape = (before + sum(heights) * width + rest, 3)
    inputs = (
        replace(spec, raster=raster, tensor=replace(spec.tensor, shape=shape))
        if spec.path == ("img_ids",)
        else spec
        for spec in manifest.calls[0].inputs
    )
    call = replace(manifest.calls[0], inputs=tuple(inputs))
    return replace(manifest, calls=(call,))

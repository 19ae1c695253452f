"""`toma-fx build --size A --size B`, and what ONNX Runtime computes of such an artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import toma_fx
from tests.cli.conftest import build
from toma_fx.cli.main import main
from toma_fx.cli.run import arguments_for
from toma_fx.errors import SignatureError
from toma_fx.export.reading import verify_artifact
from toma_fx.export.to_onnx.weights import WEIGHTS

SIZES = ("128x128", "64x128")
"""The first is that of the fixture `artifact`."""


def built(model_folder: Path, out: Path, every: int, *sizes: str) -> Path:
    given: list[Any] = ["--batch", 1, "--text", 8, "--method", "grid", "--min_tokens", 16]
    given += ["--destinations_every", every, "--target", "onnx", "--out", out]
    given += [word for size in sizes for word in ("--size", size)]
    assert main(["build", "--model", str(model_folder), *map(str, given)]) == 0
    return out


@pytest.fixture(scope="module")
def both(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of two sizes, which selects in every step."""
    pytest.importorskip("onnxscript")
    return built(model_folder, tmp_path_factory.mktemp("sizes") / "a", 1, *SIZES)


def check_generations(folder: Path, alone: Path, place: int, steps: int) -> None:
    """One of two sizes of an artifact computes what the artifact of that size computes."""
    several, one = toma_fx.load(folder), toma_fx.load(alone)
    call = several.manifest.calls[place]
    given = arguments_for(call, {})
    for step in range(steps):
        each = {**given, "timestep": given["timestep"] * (1 - step / 8)}
        assert torch.equal(several(**each)[0], one(**each)[0]), step
    kinds = call.kinds(steps)
    assert several._stepper.totals == {kind: kinds.count(kind) for kind in kinds}
    assert all(p.relative < 1e-5 for p in call.parity)


@torch.no_grad()
def test_a_step_equals_that_of_an_artifact_of_one_size(both: Path, artifact: Path) -> None:
    check_generations(both, artifact, 0, steps=1)


@torch.no_grad()
def test_generations_equal_those_of_artifacts_of_one_size(
    artifact: Path, model_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    several = built(model_folder, tmp_path / "several", 5, *SIZES)
    second = built(model_folder, tmp_path / "second", 5, SIZES[1])
    for place, alone in enumerate((artifact, second)):
        check_generations(several, alone, place, steps=4)
    assert (several / WEIGHTS).read_bytes() == (artifact / WEIGHTS).read_bytes()


def test_the_weights_are_there_once(both: Path, artifact: Path) -> None:
    assert (both / WEIGHTS).read_bytes() == (artifact / WEIGHTS).read_bytes()
    models = {path.name: path.stat().st_size for path in both.glob("*.onnx")}
    assert {*models} == {f"{size}_refresh.onnx" for size in SIZES}
    assert max(models.values()) < 1.1 * (artifact / "refresh.onnx").stat().st_size


def test_an_unknown_size(both: Path) -> None:
    call = arguments_for(verify_artifact(both).calls[0], {})
    call["hidden_states"] = call["hidden_states"][:, :40]
    with pytest.raises(SignatureError, match=r"128x128: hidden(.|\n)*64x128: hidden") as caught:
        toma_fx.load(both)(**call)
    assert (caught.value.where, caught.value.got) == ("hidden_states", "(1, 40, 4) float32")


def test_info_shows_the_sizes(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(both)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "size 128x128 hidden_states [1, 64, 4]" in lines
    assert "size 64x128 hidden_states [1, 32, 4]" in lines
    assert "input hidden_states [1, 64, 4] float32; [1, 32, 4] float32" in lines
    assert "program refresh 128x128_refresh.onnx; 64x128_refresh.onnx" in lines


def test_run_takes_one_of_them(
    both: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ran(*args: Any) -> str:
        assert main(["run", str(both), "--steps", "2", "--json", *map(str, args)]) == 0
        size: str = json.loads(capsys.readouterr().out)["size"]
        return size

    assert ran() == SIZES[0]
    assert ran("--size", SIZES[1]) == SIZES[1]
    call = verify_artifact(both).calls[1]
    save_file(
        {x.tensor.name: arguments_for(call, {})[x.path[0]] for x in call.inputs},
        tmp_path / "inputs.safetensors",
    )
    given = ("--inputs", tmp_path / "inputs.safetensors")
    assert ran(*given) == SIZES[1]
    assert main(["run", str(both), "--size", "64x64"]) == 1
    assert "128x128, 64x128" in capsys.readouterr().err
    assert main(["run", str(both), "--size", SIZES[0], *map(str, given)]) == 1
    assert "of their own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--target", "onnx", "--size", "64x64"), "sizes in two ways"),
        (("--target", "triton", "--size", "64x64", "--size", "64x128"), "sizes in two ways"),
    ],
)
def test_sizes_in_two_ways(
    tmp_path: Path, args: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`build` of the conftest gives a height; nothing is loaded."""
    assert build("--model", "nosuch", "--out", tmp_path / "a", *args) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--target", "triton", "--size", "64x64", "--size", "64x128"), "config.pbtxt"),
        (("--target", "onnx", "--size", "64x64", "--size", "64x64"), "each once"),
        (("--target", "tensorrt", "--dry-run", "--size", "8x8", "--size", "6x6"), "one size"),
    ],
)
def test_sizes_that_can_not_be_built(
    tmp_path: Path, args: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before a model is loaded."""
    assert main(["build", "--model", "nosuch", "--out", str(tmp_path / "a"), *args]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("size", ["64", "64x", "x64", "64x64x64", "0x64", "-8x8", "64X64"])
def test_sizes_that_are_none(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["build", "--model", "tiny-sdxl", "--target", "onnx", f"--size={size}"])
    assert "--size" in capsys.readouterr().err

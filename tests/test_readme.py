"""The README's Python snippets, all run as they stand, on small models in folders of those names.

Replaced are the device, "cuda" by "cpu", and Inductor, by running the graphs that it would compile:
tests/run compile with it. Commands of a shell are run in tests/cli; a TensorRT build needs a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, UNet2DConditionModel

import toma_fx
from tests import denoisers
from tests.methods import test_methods as one_block
from tests.saved_pipelines import run_uncompiled, save_flux, save_sdxl
from toma_fx.export.to_onnx.target import ONNXTarget
from toma_fx.inputs import example_inputs

README = Path(__file__).parent.parent / "README.md"


def snippets() -> dict[str, str]:
    """Python snippets of the README by the words before them."""
    parts = re.split(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    prose = [re.sub("```.*?```", "", text, flags=re.DOTALL) for text in parts[:-1:2]]
    words = [text.strip().splitlines()[-1] for text in prose]
    return dict(zip(words, parts[1::2], strict=True))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the snippet whose introduction begins so, on names that are there already."""
    found = snippets()

    def run_snippet(start: str, **names: Any) -> dict[str, Any]:
        (words,) = [words for words in found if words.startswith(start)]
        with torch.no_grad():
            exec(found[words].replace('"cuda"', '"cpu"'), names)
        return names

    run_uncompiled(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return run_snippet


Run = Callable[..., dict[str, Any]]
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
FLUX = "black-forest-labs/FLUX.1-dev"


def check_merged(pipe: Any) -> None:
    found = toma_fx.summary(pipe)
    assert found.active
    assert found.compiled
    assert found.steps["reuse"] > found.steps["refresh"] > 0


def test_sdxl_another_method_and_the_summary(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_sdxl(tmp_path / SDXL, tmp_path / "work")
    names = run("SDXL:")
    pipe, first = names["pipe"], names["image"]
    assert first.size == (64, 64)
    check_merged(pipe)
    original = toma_fx.restore(pipe).unet
    assert type(original) is UNet2DConditionModel
    run("Another method", pipe=pipe, toma_fx=toma_fx)
    assert pipe.unet.denoiser is original
    assert pipe.unet.config_toma == toma_fx.ToMeSDConfig(ratio=0.4)
    pipe("a lighthouse in a storm", num_inference_steps=2)
    run("What is active", pipe=pipe, toma_fx=toma_fx)
    assert "tomesd" in capsys.readouterr().out
    assert toma_fx.summary(pipe).steps["refresh"] > 0
    run("Fewer steps that compute", pipe=pipe, toma_fx=toma_fx)
    pipe("a lighthouse in a storm", num_inference_steps=4)
    assert toma_fx.summary(pipe).steps == {"refresh": 1, "reuse": 1, "cached": 2}


def test_flux(run: Run, tmp_path: Path) -> None:
    save_flux(tmp_path / FLUX, tmp_path / "work")
    names = run("Flux:")
    assert names["image"].size[0] >= 64
    check_merged(names["pipe"])
    assert type(toma_fx.restore(names["pipe"]).transformer) is FluxTransformer2DModel


class Pipe:
    """What the snippets ask of a pipeline: it has a UNet."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet


@torch.no_grad()
def test_back_end(run: Run) -> None:
    model, call = denoisers.small_sdxl(), denoisers.small_sdxl_inputs(32, 32)
    pipe = Pipe(model)
    run("As a back end of `torch.compile`:", pipe=pipe, torch=torch)
    merged = toma_fx.optimize(model, ratio=0.5)
    assert denoisers.relative(pipe.unet(**call)[0], merged(**call)[0]) < 1e-5
    assert denoisers.relative(pipe.unet(**call)[0], model(**call)[0]) > 1e-3


@torch.no_grad()
def test_server(run: Run) -> None:
    denoiser = toma_fx.optimize(one_block.model(), method="tomesd", min_tokens=1)
    a = denoiser.step(one_block.inputs(batch=1), toma_fx.State())[1]
    names = run(
        "In a server",
        denoiser=denoiser,
        inputs=one_block.inputs(batch=1),
        state=toma_fx.State(),
        inputs_of_both=one_block.inputs(batch=2),
        a=a,
        b=toma_fx.State(),
    )
    assert [names[x].step for x in ("state", "a", "b")] == [1, 2, 1]
    assert names["out"].shape == one_block.inputs(batch=2)["sample"].shape


@torch.no_grad()
def test_loop(run: Run) -> None:
    denoiser = toma_fx.optimize(one_block.model(), method="tomesd", min_tokens=1)
    names = run("In a loop", denoiser=denoiser, inputs=one_block.inputs(batch=1))
    assert names["out"].shape == one_block.inputs(batch=1)["sample"].shape
    assert names["run"].ended


@torch.no_grad()
def test_artifact(run: Run) -> None:
    pytest.importorskip("onnxruntime")
    optimized = toma_fx.optimize(one_block.model(), method="todo", min_tokens=1)
    toma_fx.export.export(optimized, one_block.inputs(), Path("sdxl-onnx"), ONNXTarget())
    pipe = run("([docs/artifacts.md]", pipe=Pipe(None), toma_fx=toma_fx)["pipe"]
    got, want = (m(**one_block.inputs()) for m in (pipe.unet, optimized))
    assert denoisers.relative(got, want) < 1e-5
    halves = {name: x.to(torch.bfloat16) for name, x in one_block.inputs().items()}
    assert pipe.unet(**halves).dtype is torch.bfloat16  # the pipeline above is loaded in it


def test_explain(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_flux(tmp_path / FLUX, tmp_path / "work")
    pipe = FluxPipeline.from_pretrained(FLUX)
    sizes: dict[str, int] = {}

    def small(pipe: Any, *, height: int, width: int) -> Any:
        sizes.update(height=height, width=width)
        return example_inputs(pipe, 128, 128)

    monkeypatch.setattr(toma_fx, "example_inputs", small)
    run("What would merge", pipe=pipe, toma_fx=toma_fx)
    assert sizes == {"height": 1024, "width": 1024}
    assert "32x32: 1024 -> 512" in capsys.readouterr().out


def test_every_snippet_is_run() -> None:
    source = Path(__file__).read_text()
    starts = re.findall(r'run\(\s*"(.+?)"', source)
    assert len(snippets()) == 10
    for words in snippets():
        assert sum(words.startswith(start) for start in starts) == 1, words


def test_other_names_exist() -> None:
    names = set(re.findall(r"toma_fx\.(\w+)", README.read_text())) - {"py"}
    assert {"optimize", "explain", "summary", "restore", "State", "ToMAConfig"} <= names
    assert all(hasattr(toma_fx, name) for name in names), names

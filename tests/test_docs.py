"""The Python snippets of docs/, run as they stand on small models; of the README: test_readme.py.

A snippet is named by its page and the words that it begins with. Sizes and numbers of steps are
made small in the text before it runs, "cuda" becomes "cpu", and Inductor's graphs run uncompiled.
What can't run here is in `NOT_RUN`, with the reason; what another file of the tests runs, or
compares with an example that runs, in `ELSEWHERE`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

import toma_fx
from tests import denoisers
from tests.export.test_signatures import new_key
from tests.methods import test_methods as one_block
from tests.saved_pipelines import run_uncompiled, save_flux, save_sdxl
from tests.serving.comfyui_stand_in import BaseModel, ModelPatcher, UNetModel
from toma_fx.export import builder
from toma_fx.export.registry import make_target
from toma_fx.models.named import load_embedded

DOCS = Path(__file__).parent.parent / "docs"
NOT_RUN = {
    ("generate.md", "import ray, toma_fx"): "Ray, an extra; tests/serving/test_ray_serve.py has it",
    ("parallel.md", "# torchrun"): "four processes; tests/run and the next one's example have them",
    ("parallel.md", "torch.distributed"): "two processes; examples/cfg_parallel.py is run in tests",
    ("serving.md", "for i, t in enumerate(scheduler.timesteps)"): "a client of a running Triton",
}
"""Page and first words of snippets that no test runs, and why."""
ELSEWHERE = {
    "own-models.md": "tests/analysis/test_own_models.py",
    "methods.md: @dataclass": "tests/methods/test_methods.py",
}
"""Pages whose snippets, or those that begin so, another file runs."""
PIPE_STEPS = 3


def snippets() -> list[tuple[str, str]]:
    """Page and text of each Python snippet."""
    return [
        (page.name, block)
        for page in sorted(DOCS.glob("*.md"))
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    ]


def find(page: str, start: str) -> str:
    (found,) = [text for name, text in snippets() if name == page and text.startswith(start)]
    return found


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a snippet in an empty folder, on names that are there already."""

    def run_snippet(
        page: str, start: str, *, small: dict[str, str] | None = None, **names: Any
    ) -> dict[str, Any]:
        text = find(page, start)
        for large, little in {'"cuda"': '"cpu"', **(small or {})}.items():
            assert large in text or large == '"cuda"', f"{page} has no {large} any more"
            text = text.replace(large, little)
        with torch.no_grad():
            exec(compile(text, f"{page}: {start}", "exec"), names)
        return names

    run_uncompiled(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return run_snippet


@pytest.fixture
def pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small SDXL pipeline of 64x64 pixels, saved in my-sdxl, whose generations are short."""
    save_sdxl(tmp_path / "my-sdxl", tmp_path / "work")
    call = StableDiffusionXLPipeline.__call__

    @wraps(call)
    def short(self: Any, *args: Any, **options: Any) -> Any:
        return call(self, *args, **{"num_inference_steps": PIPE_STEPS, **options})

    monkeypatch.setattr(StableDiffusionXLPipeline, "__call__", short)
    loaded = StableDiffusionXLPipeline.from_pretrained(tmp_path / "my-sdxl")
    loaded.set_progress_bar_config(disable=True)
    return loaded


def denoiser(**options: Any) -> Any:
    """An optimized model of one block."""
    return toma_fx.optimize(one_block.model(), method="tomesd", min_tokens=1, **options)


def export_block(folder: str) -> None:
    pytest.importorskip("onnxruntime")
    optimized = toma_fx.optimize(one_block.model(), method="todo", min_tokens=1)
    toma_fx.export.onnx(optimized, one_block.inputs(), folder)


class Holder:
    """A pipeline as far as a snippet looks: it holds a denoiser."""

    unet: Any = None
    transformer: Any = None


# -- start ----------------------------------------------------------------------------------------


def test_index(run: Run, pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    original = pipe.unet
    names = run("index.md", "import toma_fx", pipe=pipe)
    assert names["image"].size == (64, 64)
    assert "refresh" in capsys.readouterr().out
    assert names["pipe"].unet is original


def test_first_picture(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("first-picture.md", "import toma_fx")
    assert "1024 -> 512" in capsys.readouterr().out
    names = run("first-picture.md", "denoiser =", small={"steps=20": "steps=4"}, **names)
    assert toma_fx.summary(names["denoiser"]).steps == {"refresh": 1, "reuse": 3}
    few = {"steps=20": "steps=4"}
    names = run("first-picture.md", "original =", small=few, **names)
    assert torch.equal(names["same"], names["original"])
    assert (names["images"] - names["original"]).square().mean() > 1e-5


def test_errors(run: Run, pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run("errors.md", "try:", pipe=pipe, toma_fx=toma_fx)
    assert "ratio" in capsys.readouterr().out


def test_drop_in(run: Run, pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    original, names = pipe.unet, {"pipe": pipe, "toma_fx": toma_fx, "torch": torch}
    run("drop-in.md", "toma_fx.optimize(pipe)", **names)
    assert pipe.unet is original
    remove = run("drop-in.md", "remove =", **names)["remove"]
    run("drop-in.md", "denoiser =", prompt="a lighthouse", **names)
    steps = toma_fx.summary(pipe).steps
    assert steps == {"refresh": 1, "reuse": 2, "plain": 3}
    assert "capture" in capsys.readouterr().out
    remove()
    own = {"pipe_of_this_request": pipe, "prompt": "a cat"}
    run("drop-in.md", "with denoiser.own_state", denoiser=pipe.unet, **own)
    pipe = toma_fx.restore(pipe)
    run("drop-in.md", "pipe.unet = torch.compile", pipe=pipe, torch=torch)
    assert pipe("a cat").images[0].size == (64, 64)


@torch.no_grad()
def test_drop_in_for_servers(run: Run) -> None:
    call, merged = one_block.inputs(), denoiser()
    moments = [torch.full((2,), t) for t in (900.0, 700.0)]
    names = {"toma_fx": toma_fx, "denoiser": merged, "inputs": call, "x": call["sample"]}
    names = run("drop-in.md", "state =", timesteps=moments, **names)
    assert names["state"].step == 2
    first = [merged.step(one_block.inputs(batch=1), toma_fx.State())[1] for _ in range(2)]
    names = run(
        "drop-in.md",
        "out, (a, b)",
        denoiser=merged,
        batch_of_two=call,
        a=first[0],
        b=first[1],
    )
    assert [names["a"].step, names["b"].step] == [2, 2]


# -- choose and tune ------------------------------------------------------------------------------


def test_caching(run: Run, pipe: Any) -> None:
    names = run("caching.md", "pipe =", pipe=pipe, toma_fx=toma_fx)
    assert names["pipe"].unet.config_toma.cache == toma_fx.CacheConfig(
        every=4, order=1, last_steps=1
    )
    names = run("caching.md", "cache =", small={"28": "4"}, **names)
    assert len(names["cache"].steps_mask) == 4
    assert names["pipe"].unet.config_toma.cache == names["cache"]


def test_methods(run: Run, pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    call = toma_fx.example_inputs(pipe, height=64, width=64)
    run("methods.md", "pipe.unet =", pipe=pipe, toma_fx=toma_fx, example_inputs=call)
    assert pipe.unet.config_toma == toma_fx.ToDoConfig(factor=2)
    assert "merged" in capsys.readouterr().out
    toma_fx.restore(pipe)
    names = run("methods.md", "with toma_fx.record_calls", pipe=pipe, toma_fx=toma_fx)
    assert len(names["calls"]) == PIPE_STEPS
    assert isinstance(pipe.unet.config_toma, toma_fx.CAToMeConfig)
    assert pipe.unet.config_toma.form != "dynamic"


def test_quality(run: Run, pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"pipe": pipe, "toma_fx": toma_fx, "prompts": ["a lighthouse", "a cat"]}
    names = run("quality.md", "result =", small={"steps=30": "steps=2, rounds=0"}, **names)
    assert len(names["result"].configs) == 2
    assert "psnr" in capsys.readouterr().out.lower()


def test_tuning(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tune` stands for a search of minutes, with its arguments; tests/measure runs it."""
    save_flux(tmp_path / "flux", tmp_path / "work")
    pipe = Holder()
    pipe.transformer = denoisers.flux(num_layers=1, num_single_layers=1)
    found = toma_fx.Recipe(
        config=toma_fx.ToMAConfig(ratio=0.25, min_tokens=16),
        model=type(pipe.transformer).__name__,
    )
    tune = create_autospec(toma_fx.tune, return_value=found)
    monkeypatch.setattr(toma_fx, "tune", tune)
    run("tuning.md", "recipe =", pipe=pipe, toma_fx=toma_fx, prompts=["a cat"])
    assert tune.call_count == 2
    assert pipe.transformer.config_toma == found.config


# -- generate and serve ---------------------------------------------------------------------------


@torch.no_grad()
def test_generations(run: Run) -> None:
    call, merged = one_block.inputs(), denoiser(destinations_every=2)
    names = run(
        "generations.md",
        "with denoiser.generation",
        denoiser=merged,
        timesteps=[torch.full((2,), t) for t in (900.0, 700.0)],
        tiles={"left": call["sample"], "right": call["sample"].flip(-1)},
        conditions={},
        noise={},
    )
    assert set(names["noise"]) == {"left", "right"}
    assert toma_fx.summary(merged).steps == {"refresh": 2, "reuse": 2}


def test_generate(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.jsonl").write_text('{"prompt": "rocket"}\n{"prompt": "coffee"}\n')
    toma_fx.Recipe(config=toma_fx.ToMAConfig()).save("recipe.json")
    model = load_embedded("tiny-flux")
    small = {"steps=30": "steps=2"}
    names = run("generate.md", "result =", small=small, pipe=model, toma_fx=toma_fx)
    assert names["result"].drawn == 1
    assert not names["result"].complete
    assert len(list(Path("pictures").rglob("*.png"))) == 1


@torch.no_grad()
def test_serving(run: Run) -> None:
    call = one_block.inputs(batch=1)
    names = {"denoiser": denoiser(), "call_of_a": call, "call_of_b": call}
    source = find("serving.md", "from toma_fx.serving import Step")
    assert '# and "b", whenever it comes' in source
    both = {"steps=20)": 'steps=20); batcher.join("b", steps=20)'}
    names = run("serving.md", "from toma_fx.serving import Step", small=both, **names)
    assert names["state"].step == 1


def test_comfyui(run: Run) -> None:
    model = ModelPatcher(BaseModel(UNetModel().eval()))
    names = run("serving.md", "from toma_fx.serving import comfyui", model=model)
    assert names["model"] is not model
    assert names["model"].model is model.model


def test_compiling(run: Run) -> None:
    merged = denoiser()
    run("scaling.md", "denoiser.compile_repeated_blocks()", denoiser=merged)
    assert merged.compiled


@torch.no_grad()
def test_warmup(run: Run, pipe: Any) -> None:
    small = {"(1024, 1024), (832, 1216)": "(256, 256)"}  # of a VAE of factor 8
    call = toma_fx.example_inputs(pipe, height=64, width=64)
    names = {"pipe": pipe, "toma_fx": toma_fx, "inputs": call}
    merged = run("scaling.md", "denoiser = toma_fx", small=small, **names)["denoiser"]
    assert merged.compiled
    assert len(merged.specializations) == 2


# -- export ---------------------------------------------------------------------------------------


def test_artifact_of_the_page(run: Run, pipe: Any) -> None:
    """The command above the snippet builds in float16, and a float16 pipeline takes it."""
    pytest.importorskip("onnxruntime")
    page = (DOCS / "artifacts.md").read_text()
    assert "--target onnx --height 1024 --dtype float16 --out sdxl-onnx" in page
    small = {"1024": "64", '"./my-sdxl"': '"my-sdxl"'}
    build = {"pipe": pipe.to(torch.float16), "toma_fx": toma_fx}
    names = run("artifacts.md", "example_inputs =", small={"1024": "64"}, **build)
    assert names["optimized"].dtype is torch.float16
    names = run("artifacts.md", "import toma_fx, torch", small=small)
    assert names["image"].size == (64, 64)
    assert isinstance(names["pipe"].unet, toma_fx.ArtifactDenoiser)


def test_other_targets_of_the_page(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """They need a compiler, or a GPU: tests/export builds them. Here their options must exist."""
    names = ("aoti", "tensorrt", "triton")
    builds = {name: create_autospec(builder.export) for name in names}
    for name, build in builds.items():
        monkeypatch.setattr(builder, name, build)
    run("artifacts.md", "toma_fx.export.aoti", toma_fx=toma_fx, optimized=None, example_inputs={})
    shown = re.findall(r"export\.(\w+)\(.*# (.*)", find("artifacts.md", "toma_fx.export.aoti"))
    assert [name for name, _ in shown] == list(names)
    for name, options in shown:
        assert builds[name].call_count == 1
        known = {field.name for field in fields(type(make_target(name, {})))}
        assert set(re.findall(r"(\w+)=", options)) <= known


@torch.no_grad()
def test_trusted_artifact(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    pipe = Holder()
    export_block("sdxl-onnx")
    toma_fx.export.sign("sdxl-onnx", new_key(tmp_path / "key.pem"))
    run("artifacts.md", "pipe.unet = toma_fx.load", pipe=pipe, toma_fx=toma_fx)
    assert pipe.unet(**one_block.inputs()).isfinite().all()


@torch.no_grad()
def test_onnx(run: Run) -> None:
    pytest.importorskip("onnxruntime")
    pipe, call = Holder(), one_block.inputs()
    optimized = toma_fx.optimize(one_block.model(), method="todo", min_tokens=1)
    names = {"optimized": optimized, "example_inputs": call, "pipe": pipe}
    run("onnx.md", "toma_fx.export.onnx", toma_fx=toma_fx, **names)
    assert denoisers.relative(pipe.unet(**call), optimized(**call)) < 1e-5


# -- all of them ----------------------------------------------------------------------------------


def test_every_snippet_is_run_or_listed() -> None:
    source = Path(__file__).read_text()
    run_here = re.findall(r'run\(\s*"([\w-]+\.md)",\s*"(.+?)"', source)
    found = snippets()
    assert len(found) > 25
    for page, text in found:
        if page in ELSEWHERE or any(f"{page}: {text}".startswith(each) for each in ELSEWHERE):
            continue
        starts = [start for name, start in (*run_here, *NOT_RUN) if name == page]
        assert sum(text.startswith(start) for start in starts) == 1, f"{page}: {text[:60]}"
    for page, start in NOT_RUN:
        assert find(page, start)
    for file in ELSEWHERE.values():
        assert (DOCS.parent / file).exists()

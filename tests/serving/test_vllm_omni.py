"""The plug-in of vLLM-Omni, in a stand-in of its runner; and its contract, where the wheel is.

vLLM-Omni has no CPU platform, so that the runner itself is not run here. `Request` and `steps` are
written after `StepRequestState` and `DiffusionModelRunner._execute_stepwise_core` of 0.30.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from tests import denoisers, diffusers_pipelines
from toma_fx.errors import ConfigError
from toma_fx.serving import vllm_omni

METHODS = ("prepare_encode", "denoise_step", "step_scheduler", "post_decode")
STEPS = 4
OPTIONS = {"min_tokens": 1, "destinations_every": 4, "weights_every": 2, "buckets": (4,)}


@dataclass
class Request:
    """A `StepRequestState`, as far as the plug-in reads and writes it."""

    request_id: str
    sampling: Any
    prompt: Any
    latents: Any = None
    timesteps: Any = None
    step_index: int = 0
    scheduler: Any = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def current_timestep(self) -> Any:
        return self.timesteps[self.step_index]


def request(name: str, seed: int, prompt: Any = None, count: int = 1) -> Request:
    sampling = SimpleNamespace(
        height=32, width=48, num_outputs_per_prompt=count, max_sequence_length=None,
        generator=torch.Generator().manual_seed(seed), num_inference_steps=STEPS,
        guidance_scale=None, guidance_scale_provided=False, output_type="pil",
    )  # fmt: skip
    return Request(name, sampling, name if prompt is None else prompt)


def encode(prompt: str, *, num_images_per_prompt: int = 1, **_: Any) -> tuple[Tensor, ...]:
    """Stands in for text encoders: numbers that depend on the text."""
    g = torch.Generator().manual_seed(sum(prompt.encode()))
    embeds, pooled = torch.randn(1, 5, 24, generator=g), torch.randn(1, 16, generator=g)
    n = num_images_per_prompt
    return embeds.expand(n, -1, -1), pooled.expand(n, -1), torch.zeros(5, 3)


def module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(content)
    return made


def load(folder: str, *, torch_dtype: torch.dtype) -> Any:
    """Stands in for `from_pretrained`: a small pipeline without text encoders."""
    assert (folder, torch_dtype) == ("a folder", torch.float32)
    transformer = denoisers.small_flux(in_channels=16, num_single_layers=0)
    return diffusers_pipelines.flux(transformer=transformer)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pipeline, with what it imports of vLLM-Omni."""
    data = "vllm_omni.diffusion.data"
    utils = "vllm_omni.diffusion.distributed.utils"
    monkeypatch.setitem(sys.modules, data, module(data, DiffusionOutput=SimpleNamespace))
    place = lambda: torch.device("cpu")  # noqa: E731
    monkeypatch.setitem(sys.modules, utils, module(utils, get_local_device=place))
    monkeypatch.setattr(FluxPipeline, "from_pretrained", load)
    pipeline = vllm_omni.TomaFluxPipeline(od_config=config())
    pipeline.pipeline.encode_prompt = encode
    return pipeline


def config(**changes: Any) -> Any:
    settings = {"additional_config": {"toma_fx": OPTIONS}, "output_type": "pil"}
    return SimpleNamespace(
        **{"model": "a folder", "dtype": torch.float32, "step_execution": True}
        | settings | changes
    )  # fmt: skip


def steps(
    plugin: Any, requests: list[Any], new: list[Any], batch: Callable[[Any], Any] = lambda _: None
) -> dict[str, Any]:
    """One step as the runner takes it; what ended, by name."""
    for each in new:
        plugin.prepare_encode(each)
    states = [*requests, *new]
    noise, offset, ended = plugin.denoise_step(batch(states), states=states), 0, {}
    for each in states:
        rows = len(each.latents)
        try:
            plugin.step_scheduler(each, noise[offset : offset + rows])
            if each.step_index >= len(each.timesteps):
                ended[each.request_id] = plugin.post_decode(each).output
        except Exception as error:  # as the runner does: an error ends one request
            ended[each.request_id] = error
        offset += rows
    return ended


def alone(plugin: Any, name: str, seed: int, count: int = 1) -> Tensor:
    """What diffusers' own loop draws with the same denoiser."""
    pipe = plugin.pipeline
    original, pipe.transformer = pipe.transformer, plugin.batcher.denoiser
    try:
        with plugin.batcher.denoiser.generation(steps=STEPS):
            images: Tensor = pipe(
                name, height=32, width=48,
                num_images_per_prompt=count, num_inference_steps=STEPS, output_type="pt",
                generator=torch.Generator().manual_seed(seed),
            ).images  # fmt: skip
    finally:
        pipe.transformer = original
    return images


@torch.inference_mode()
def test_pictures_are_those_of_diffusers(plugin: Any) -> None:
    """Requests come at different times, one with two pictures; one is aborted, as nothing tells."""
    a, b, aborted = request("a", 1), request("b", 2, {"prompt": "b"}, count=2), request("x", 3)
    steps(plugin, [], [a, aborted])
    steps(plugin, [a], [b])
    ended: dict[str, Any] = {}
    while len(ended) < 2:
        ended |= steps(plugin, [r for r in (a, b) if r.request_id not in ended], [])
    assert not plugin.batcher.requests
    for name, seed, count in (("a", 1, 1), ("b", 2, 2)):
        got = (ended[name] / 2 + 0.5).clamp(0, 1)
        assert got.shape == (count, 3, 32, 48)
        assert (got - alone(plugin, name, seed, count)).abs().max() < 1e-4
    assert plugin.batcher.denoiser.totals["mixed"] > 0, "they shared batches"
    assert (ended["a"] - ended["b"][:1]).abs().max() > 1e-2, "the comparison can fail"


@torch.inference_mode()
def test_a_request_that_fails_fails_alone(plugin: Any) -> None:
    good, bad = request("good", 1), request("bad", 2)
    steps(plugin, [], [good, bad])
    bad.latents[0, 0, 0] = torch.nan
    ended = steps(plugin, [good, bad], [])
    assert list(ended) == ["bad"]
    assert "not finite" in str(ended["bad"])
    with pytest.raises(ConfigError, match="can't be drawn"):
        plugin.prepare_encode(request("c", 3, {"prompt": "c", "negative_prompt": "d"}))


def test_weights_are_loaded_and_pictures_are_made(plugin: Any) -> None:
    names = plugin.load_weights(iter(()))
    assert any(name.startswith("transformer.") for name in names)
    images = vllm_omni.post_process(config())(torch.zeros(1, 3, 8, 8))
    assert images[0].size == (8, 8)
    with pytest.raises(ConfigError, match="step by step"):
        vllm_omni.TomaFluxPipeline(od_config=config(step_execution=False))


def test_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    name = "vllm_omni.diffusion.registry"
    known = module(name, register_diffusion_model=lambda *a, **k: calls.append((a, k)))
    monkeypatch.setitem(sys.modules, name, known)
    vllm_omni.register()
    ((arguments, options),) = calls
    assert arguments == ("TomaFluxPipeline", "toma_fx.serving.vllm_omni", "TomaFluxPipeline")
    assert callable(getattr(vllm_omni, options["post_process_func_name"]))


# -- the contract, read from the wheel's sources -------------------------------------------------


def path_of(file: str) -> Path:
    """A file of vLLM-Omni, which is not imported: that would need vLLM."""
    spec = importlib.util.find_spec("vllm_omni")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vllm-omni is not installed")
    return Path(spec.submodule_search_locations[0]) / file


def source(file: str) -> ast.Module:
    return ast.parse(path_of(file).read_text())


def definition(tree: ast.AST, name: str) -> Any:
    kinds = (ast.ClassDef, ast.FunctionDef)
    return next(n for n in ast.walk(tree) if isinstance(n, kinds) and n.name == name)


def parameters(function: ast.FunctionDef) -> list[tuple[str, str]]:
    """Names of parameters and how they may be given."""
    arguments = function.args
    names = [(a.arg, "positional") for a in arguments.args]
    names += [(a.arg, "keyword") for a in arguments.kwonlyargs]
    return names + ([("**", "rest")] if arguments.kwarg else [])


def test_signatures_are_those_of_the_protocol() -> None:
    protocol = definition(source("diffusion/models/interface.py"), "SupportsStepExecution")
    own = definition(ast.parse(inspect.getsource(vllm_omni)), "TomaFluxPipeline")
    for name in METHODS:
        assert parameters(definition(own, name)) == parameters(definition(protocol, name))
    fields = {f.target.id for f in protocol.body if isinstance(f, ast.AnnAssign)}
    assert fields == {"supports_step_execution"}


def test_what_is_read_exists() -> None:
    state = definition(source("diffusion/worker/utils.py"), "StepRequestState")
    fields = {f.target.id for f in state.body if isinstance(f, ast.AnnAssign)}
    fields |= {f.name for f in state.body if isinstance(f, ast.FunctionDef)}
    assert fields >= {*Request.__dataclass_fields__, "current_timestep"}
    sampling = definition(source("inputs/data.py"), "OmniDiffusionSamplingParams")
    fields = {f.target.id for f in sampling.body if isinstance(f, ast.AnnAssign)}
    assert fields >= set(vars(request("a", 0).sampling))
    settings = definition(source("diffusion/data.py"), "OmniDiffusionConfig")
    fields = {f.target.id for f in settings.body if isinstance(f, ast.AnnAssign)}
    assert fields >= set(vars(config()))
    output = definition(source("diffusion/data.py"), "DiffusionOutput")
    assert "output" in {f.target.id for f in output.body if isinstance(f, ast.AnnAssign)}
    assert definition(source("diffusion/distributed/utils.py"), "get_local_device")


def test_the_runner_calls_what_the_stand_in_calls() -> None:
    runner = source("diffusion/worker/diffusion_model_runner.py")
    text = ast.unparse(runner)
    assert "pipeline.prepare_encode(state)" in text
    assert "pipeline.denoise_step(input_batch, states=states)" in text
    assert "pipeline.post_decode(req)" in text
    register = definition(source("diffusion/registry.py"), "register_diffusion_model")
    names = [name for name, _ in parameters(register)]
    assert names[:3] == ["model_arch", "module_name", "class_name"]
    assert "post_process_func_name" in names


def loaded(name: str, file: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One file of vLLM-Omni as a module, without the package around it."""
    spec = importlib.util.spec_from_file_location(name, path_of(file))
    assert spec is not None
    assert spec.loader is not None
    result = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, result)
    spec.loader.exec_module(result)
    return result


@torch.inference_mode()
def test_with_its_own_states_and_batches(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    states = loaded("vllm_omni.diffusion.worker.utils", "diffusion/worker/utils.py", monkeypatch)
    prompts = "vllm_omni.diffusion.interaction.modality_handlers.prompt"
    none = module(prompts, prompt_update_versions=lambda states: (0,) * len(states))
    monkeypatch.setitem(sys.modules, prompts, none)
    batches = loaded(
        "vllm_omni.diffusion.worker.input_batch", "diffusion/worker/input_batch.py", monkeypatch
    )
    interface = loaded("interface_of_vllm_omni", "diffusion/models/interface.py", monkeypatch)
    assert interface.supports_step_execution(plugin)
    a, b = (
        states.StepRequestState(name, request(name, seed).sampling, name)
        for name, seed in (("a", 1), ("b", 2))
    )
    batch = batches.InputBatch.make_batch
    steps(plugin, [], [a], batch)
    steps(plugin, [a], [b], batch)
    ended: dict[str, Any] = {}
    while len(ended) < 2:
        running = [r for r in (a, b) if not r.denoise_completed]
        ended |= steps(plugin, running, [], batch)
    for name, seed in (("a", 1), ("b", 2)):
        got = (ended[name] / 2 + 0.5).clamp(0, 1)
        assert (got - alone(plugin, name, seed)).abs().max() < 1e-4

"""The plug-in of SGLang-Diffusion: in a stand-in, and in the wheel's own files where it is.

Of SGLang itself only single files are run: its hook registry, and the pipeline of its diffusers
back end with stand-ins for what that imports. Its server is not run, and no part of it on a GPU.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import denoisers, diffusers_pipelines
from toma_fx.errors import ConfigError, MissingPackageError, RecipeError
from toma_fx.run.denoiser import OptimizedDenoiser
from toma_fx.serving import sglang

RUNTIME = "sglang.multimodal_gen.runtime"
OPTIONS = '{"min_tokens": 1, "destinations_every": 2}'
STEPS = 4


def module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(content)
    return made


def encode(prompt: str, *, num_images_per_prompt: int = 1, **_: Any) -> tuple[Tensor, ...]:
    """Stands in for text encoders: numbers that depend on the text."""
    text = prompt if isinstance(prompt, str) else "".join(prompt)
    g = torch.Generator().manual_seed(sum(text.encode()))
    embeds, pooled = torch.randn(1, 5, 24, generator=g), torch.randn(1, 16, generator=g)
    return embeds, pooled, torch.zeros(5, 3)


def small_pipeline(*_: Any, **__: Any) -> Any:
    torch.manual_seed(0)
    transformer = denoisers.small_flux(in_channels=16, num_single_layers=0)
    pipeline = diffusers_pipelines.flux(transformer=transformer)
    pipeline.encode_prompt = encode
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def server_args(**changes: Any) -> Any:
    config = SimpleNamespace(vae_slicing=False, vae_tiling=False, diffusers_attention_backend=None)
    settings: dict[str, Any] = {
        "cache_dit_config": None, "enable_torch_compile": False, "attention_backend": None,
        "pipeline_config": config, "component_residency": None, "trust_remote_code": False,
        "revision": None, "has_requested_component_attention_backends": lambda: False,
        "should_cpu_offload_component": lambda name: False,
    }  # fmt: skip
    return SimpleNamespace(**(settings | changes))


def draw(pipeline: Any, seed: int = 3) -> Tensor:
    images: Tensor = pipeline(
        "a cat", height=32, width=48, num_inference_steps=STEPS, output_type="pt",
        generator=torch.Generator().manual_seed(seed),
    ).images  # fmt: skip
    return images


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sglang.VARIABLE, OPTIONS)


@pytest.fixture
def expected() -> tuple[Tensor, Tensor]:
    """What diffusers draws with and without toma_fx."""
    import toma_fx

    original = draw(small_pipeline())
    merged = toma_fx.optimize(small_pipeline(), min_tokens=1, destinations_every=2)
    return draw(merged), original


# -- in a stand-in --------------------------------------------------------------------------------


class Registry:
    """Stands in for `HookRegistry`: hooks that are called after their target, by its name."""

    def __init__(self) -> None:
        self.hooks: dict[str, Callable[..., Any]] = {}

    def register(self, target: str, hook: Callable[..., Any], hook_type: str) -> None:
        assert hook_type == "after"
        self.hooks[target] = hook


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    registry, name = Registry(), f"{RUNTIME}.platforms.plugins"
    known = module(name, HookRegistry=registry, HookType=SimpleNamespace(AFTER="after"))
    monkeypatch.setitem(sys.modules, name, known)
    return registry


def test_nothing_happens_unless_it_is_asked_for(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in (None, ""):
        monkeypatch.delenv(sglang.VARIABLE, raising=False)
        if text is not None:
            monkeypatch.setenv(sglang.VARIABLE, text)
        sglang.register()
    assert registry.hooks == {}


def test_a_pipeline_is_optimized_after_it_is_built(
    registry: Registry, asked: None, expected: tuple[Tensor, Tensor]
) -> None:
    sglang.register()
    (hook,) = registry.hooks.values()
    built = SimpleNamespace(diffusers_pipe=small_pipeline())
    assert hook(built, server_args()) is built
    merged, original = expected
    got = draw(built.diffusers_pipe)
    assert (got - merged).abs().max() <= 1e-5
    assert (got - original).abs().max() > 1e-3, "it merges"
    counts = built.diffusers_pipe.transformer.totals
    assert counts["refresh"] == STEPS // 2, "one call is one generation"


def test_options(registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []
    monkeypatch.setattr(OptimizedDenoiser, "compile", lambda self: calls.append("compile"))
    monkeypatch.setenv(sglang.VARIABLE, '{"ratio": 0.25, "min_tokens": 1, "compile": true}')
    built = SimpleNamespace(diffusers_pipe=small_pipeline())
    sglang.optimize_built(built, server_args())
    assert built.diffusers_pipe.transformer.config_toma.ratio == 0.25
    assert calls == ["compile"]
    for text in ("{", "[]", '{"compile": 1}', '{"recipe": 3}', '{"recipe": "a", "toma": true}'):
        with pytest.raises(ConfigError, match="holds no options"):
            sglang.read_options(text)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(RecipeError):
        sglang.read_options('{"recipe": "%s"}' % (tmp_path / "a.json"))
    monkeypatch.setenv(sglang.VARIABLE, '{"ration": 0.25}')
    with pytest.raises(ConfigError, match="ration"):
        sglang.optimize_built(built, server_args())


def test_what_can_not_be_optimized(asked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised, so that no worker draws without what was asked for."""
    with pytest.raises(ConfigError, match="--backend diffusers"):
        sglang.optimize_built(SimpleNamespace(), server_args())
    built = SimpleNamespace(diffusers_pipe=small_pipeline())
    for changes in ({"cache_dit_config": "cache.yaml"}, {"enable_torch_compile": True}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            sglang.optimize_built(built, server_args(**changes))
    monkeypatch.setitem(sys.modules, f"{RUNTIME}.platforms.plugins", None)
    with pytest.raises(MissingPackageError, match="SGLang"):
        sglang.register()


# -- with the files of the wheel ------------------------------------------------------------------


def path_of(file: str) -> Path:
    """A file of SGLang, which is not imported: that would need CUDA's libraries."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("sglang is not installed")
    return Path(spec.submodule_search_locations[0]) / file


def source(file: str) -> ast.Module:
    return ast.parse(path_of(file).read_text())


def loaded(name: str, file: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One file of SGLang as a module, without the package around it."""
    spec = importlib.util.spec_from_file_location(name, path_of(file))
    assert spec is not None
    assert spec.loader is not None
    result = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, result)
    spec.loader.exec_module(result)
    return result


class Anything(ModuleType):
    """A module that has every name: what a file imports and this test does not call."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def test_the_entry_point_and_the_target_exist() -> None:
    plugins = path_of("multimodal_gen/runtime/platforms/plugins.py").read_text()
    assert 'GENERAL_PLUGINS_GROUP = "sglang.multimodal_gen.plugins"' in plugins
    tree = source("multimodal_gen/runtime/pipelines_core/__init__.py")
    functions = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    name = sglang.TARGET.rpartition(".")[2]
    assert [a.arg for a in functions[name].args.args] == ["server_args"]
    worker = path_of("multimodal_gen/runtime/managers/gpu_worker.py").read_text()
    assert f"{name}(self.server_args)" in worker
    tree = source("multimodal_gen/runtime/server_args/server_args.py")
    fields = {n.target.id for n in ast.walk(tree) if isinstance(n, ast.AnnAssign)
              and isinstance(n.target, ast.Name)}  # fmt: skip
    assert fields >= {"cache_dit_config", "enable_torch_compile", "backend"}


def built_by_its_files(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pipeline of the diffusers back end, built by its own file, behind its own registry."""
    hooks = loaded("hook_registry_of_sglang", "srt/plugins/hook_registry.py", monkeypatch)
    known = {"HookRegistry": hooks.HookRegistry, "HookType": hooks.HookType}
    tree = source("multimodal_gen/runtime/pipelines/diffusers_pipeline.py")
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    for name in (n for n in imported if n.startswith("sglang")):
        monkeypatch.setitem(sys.modules, name, Anything(name))
    monkeypatch.setitem(sys.modules, "torchvision", Anything("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.transforms", Anything("torchvision.transforms"))
    sys.modules[f"{RUNTIME}.distributed"].get_local_torch_device = lambda: "cpu"  # type: ignore[attr-defined]
    quiet = SimpleNamespace(info=print, debug=print, warning=print)
    sys.modules[f"{RUNTIME}.utils.logging_utils"].init_logger = lambda _: quiet  # type: ignore[attr-defined]
    fetch = "maybe_download_model"
    setattr(sys.modules[f"{RUNTIME}.utils.hf_diffusers_utils"], fetch, lambda path, **_: path)
    offload = "resolve_diffusers_pipeline_offload"
    residency = f"{RUNTIME}.managers.memory_managers.component_residency"
    setattr(sys.modules[residency], offload, lambda _: False)
    precision = sys.modules[f"{RUNTIME}.utils.precision"]
    monkeypatch.setattr(precision, "resolve_precision", lambda *_, **__: torch.float32, False)
    executor = f"{RUNTIME}.pipelines_core.executors.sync_executor"
    monkeypatch.setattr(sys.modules[executor], "SyncExecutor", lambda **_: None, raising=False)
    stages = sys.modules[f"{RUNTIME}.pipelines_core.stages"]
    monkeypatch.setattr(stages, "PipelineStage", object, raising=False)
    name = f"{RUNTIME}.pipelines.diffusers_pipeline"
    file = loaded(name, "multimodal_gen/runtime/pipelines/diffusers_pipeline.py", monkeypatch)
    monkeypatch.setattr(file.DiffusionPipeline, "from_pretrained", small_pipeline)
    core = module(
        f"{RUNTIME}.pipelines_core", build_pipeline=lambda args: file.DiffusersPipeline("x", args)
    )
    for parent in ("sglang", "sglang.multimodal_gen", RUNTIME):  # that targets are found by name
        monkeypatch.setitem(sys.modules, parent, module(parent, __path__=[]))
    monkeypatch.setitem(sys.modules, f"{RUNTIME}.platforms.plugins", module("plugins", **known))
    monkeypatch.setitem(sys.modules, core.__name__, core)
    sglang.register()
    hooks.HookRegistry.apply_hooks()
    assert sglang.TARGET in hooks.HookRegistry._patched
    return file, core.build_pipeline


def test_in_its_own_files(
    asked: None, expected: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, build = built_by_its_files(monkeypatch)
    pipeline = build(server_args())
    assert isinstance(pipeline.diffusers_pipe.transformer, OptimizedDenoiser)
    stage = file.DiffusersExecutionStage(pipeline.diffusers_pipe)
    request = SimpleNamespace(
        prompt="a cat", negative_prompt=None, num_inference_steps=STEPS, guidance_scale=3.5,
        true_cfg_scale=None, height=32, width=48, num_frames=1, seed=3, image_path=None,
        generator=torch.Generator().manual_seed(3), condition_image=None, pixel_values=None,
        num_outputs_per_prompt=1, extra={"diffusers_kwargs": {"unknown": 1}},
    )  # fmt: skip
    got = stage.forward(request, server_args()).output
    merged, original = expected
    assert (got - merged).abs().max() <= 1e-5
    assert (got - original).abs().max() > 1e-3, "it merges"
    keep = lambda _, pipe, __: pipe  # noqa: E731
    monkeypatch.setattr(file.DiffusersPipeline, "_apply_torch_compile", keep)
    with pytest.raises(ConfigError, match="enable_torch_compile"):
        build(server_args(enable_torch_compile=True))

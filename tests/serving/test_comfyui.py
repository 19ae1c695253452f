"""The plug-in of ComfyUI: its wrappers and nodes, in a stand-in of ComfyUI.

`test_comfyui_itself.py` has the same with ComfyUI's own classes.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import tomllib
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toma_fx
from tests.logs import logged as warnings_of
from tests.serving.comfyui_stand_in import (
    BaseModel,
    Interrupted,
    ModelPatcher,
    UNetModel,
    WrapperExecutor,
    sample,
    sample_heun,
)
from toma_fx.errors import ConfigError, ModelTypeError, RecipeError
from toma_fx.serving import comfyui

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
MERGE: dict[str, Any] = {"min_tokens": 1, "destinations_every": 3}


def patcher() -> ModelPatcher:
    """A MODEL, its weights made as ComfyUI makes them."""
    torch.manual_seed(0)
    with torch.inference_mode():
        return ModelPatcher(BaseModel(UNetModel().eval()))


@cache
def conds() -> Any:
    g = torch.Generator().manual_seed(5)
    return tuple(
        {"c_crossattn": torch.randn(1, 7, 12, generator=g), "y": torch.randn(1, 6, generator=g)}
        for _ in range(2)
    )


def noise(seed: int = 1, rows: int = 1) -> Tensor:
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def picture(model: ModelPatcher, seed: int = 1, **options: Any) -> Tensor:
    options = {"batched": True, "steps": 5, **options}
    return sample(model, conds(), noise(seed), **options)


def acceleration(model: ModelPatcher) -> Any:
    (wrapper,) = model.wrappers[comfyui.DIFFUSION_MODEL][comfyui.KEY]
    return wrapper.__self__


def totals(model: ModelPatcher) -> dict[str, int]:
    """Steps of the optimized denoiser, by kind."""
    steps: dict[str, int] = acceleration(model).optimized(model.model.diffusion_model).totals
    return steps


def logged() -> AbstractContextManager[list[str]]:
    """What is logged of the original model that runs."""
    return warnings_of(logging.WARNING, "toma_fx.serving")


class Truth:
    """`toma_fx.optimize` by hand, with a state for each side, in place of the model's forward."""

    def __init__(self, like: Any, *, swapped: bool = False) -> None:
        self.denoiser = toma_fx.optimize(like.denoiser, **MERGE, like=like)
        self.states: dict[Any, Any] = {}
        self.swapped = swapped

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        names = ("x", "timesteps", "context", "y", "control", "transformer_options")
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        sides = call.pop("transformer_options")["cond_or_uncond"]
        own = [1 - i for i in sides] if self.swapped and len(self.states) == 2 else sides
        state = self.states.get(tuple(own), toma_fx.State())
        out, self.states[tuple(own)] = self.denoiser.step(call, state)
        return out


@pytest.mark.parametrize("batched", [True, False])
def test_a_picture(batched: bool) -> None:
    """Off it is the original's bit for bit; on it is what `optimize` gives with separate states."""
    model = patcher()
    original = picture(model, batched=batched)
    off, on = comfyui.accelerate(model, ratio=0.0), comfyui.accelerate(model, **MERGE)
    assert torch.equal(picture(off, batched=batched), original)
    assert totals(off) == {"plain": 5 if batched else 10}

    merged = picture(on, batched=batched)
    denoiser = acceleration(on).optimized(model.model.diffusion_model)
    by_hand = model.clone()
    by_hand.add_wrapper_with_key("diffusion_model", "hand", Truth(denoiser))
    assert torch.equal(merged, picture(by_hand, batched=batched))
    assert not torch.allclose(merged, original, atol=1e-2)
    kinds = totals(on)
    assert kinds["refresh"] == (2 if batched else 4)
    assert sum(kinds.values()) == (5 if batched else 10)

    if not batched:  # the comparison would notice if the sides took each other's tokens
        swapped = model.clone()
        swapped.add_wrapper_with_key("diffusion_model", "hand", Truth(denoiser, swapped=True))
        assert not torch.equal(merged, picture(swapped, batched=False))
    assert torch.equal(picture(model, batched=batched), original)


def test_every_sampling_begins_anew() -> None:
    """Also one that is interrupted, at the very step at which the next one begins."""
    model = comfyui.accelerate(patcher(), **MERGE)
    first, second = picture(model, 1), picture(model, 2)
    assert not torch.equal(first, second)
    fresh = comfyui.accelerate(patcher(), **MERGE)
    assert torch.equal(picture(fresh, 2), second)

    calls = 0

    def interrupt(sigma: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        picture(model, 3, before=interrupt)
    assert torch.equal(picture(model, 2), second)
    denoiser = acceleration(model).optimized(model.model.diffusion_model)
    assert denoiser.cache.captures == 1
    assert denoiser.unsure == 0


def test_an_interrupt_inside_a_capture_is_the_users() -> None:
    """What the model raises while it is captured or compared is no reason to run it again."""
    model = patcher()

    class Stopping(nn.Identity):
        stop = True

        def forward(self, x: Tensor) -> Tensor:
            if Stopping.stop:
                Stopping.stop = False  # ComfyUI says it once
                raise Interrupted
            return x

    unet = model.model.diffusion_model
    unet.conv_in = nn.Sequential(Stopping(), unet.conv_in)
    on = comfyui.accelerate(model, **MERGE)
    with logged() as said, pytest.raises(Interrupted):
        picture(on)
    assert not said
    assert picture(on).shape == (1, 4, 8, 8)
    assert totals(on)["refresh"] == 2


def test_clones_have_settings_of_their_own() -> None:
    model = patcher()
    original = picture(model)
    half = comfyui.accelerate(model, **MERGE)
    most = comfyui.accelerate(half, **MERGE, ratio=0.75)
    below = half.clone()
    pictures = {name: picture(m) for name, m in (("half", half), ("most", most), ("below", below))}
    assert torch.equal(pictures["half"], pictures["below"])
    assert not torch.equal(pictures["half"], pictures["most"])
    assert torch.equal(picture(half), pictures["half"])
    assert torch.equal(picture(comfyui.restore(most)), original)
    assert torch.equal(picture(model), original)
    assert model.wrappers == {}
    assert len(most.wrappers[comfyui.DIFFUSION_MODEL]) == 1


def test_patches_run_the_original_and_say_so_once() -> None:
    model = patcher()
    on = comfyui.accelerate(model, **MERGE)
    on.set_model_attn1_patch(lambda n: n * 0.5)
    plain = model.clone()
    plain.set_model_attn1_patch(lambda n: n * 0.5)
    with logged() as said:
        assert torch.equal(picture(on), picture(plain))
    (line,) = said
    assert "'patches'" in line
    assert "attn1_patch" in line
    assert totals(on) == {}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"patches_replace": {"attn1": {("input", 1): print}}}, "patches_replace"),
        ({"optimized_attention_override": print}, "optimized_attention_override"),
        ({"rope_options": {"scale_x": 2.0}}, "rope_options"),
        ({"prefetch_dynamic_vbars": True}, "--disable-dynamic-vram"),
        ({"patches": {"attn1_patch": []}, "patches_replace": {}, "block_index": 3,
          "prefetch_dynamic_vbars": False}, ""),
    ],
)  # fmt: skip
def test_options_that_no_graph_knows_of(options: dict[str, Any], reason: str) -> None:
    unet = UNetModel()
    executor = WrapperExecutor(unet._forward, unet, [print])
    got = comfyui._reason_against(executor, options)
    assert (reason in got) if reason else got == ""


def test_weights_that_are_not_whole_on_the_device() -> None:
    unet = UNetModel()
    reason = comfyui.reason_of_weights
    assert reason(unet, torch.device("cpu")) == ""
    assert "meta" in reason(unet, torch.device("meta"))
    unet.conv_in.weight_function = [print]  # type: ignore[assignment]
    assert "conv_in" in reason(unet, torch.device("cpu"))
    unet.conv_in.weight_function = []  # type: ignore[assignment]
    assert reason(unet, torch.device("cpu")) == ""


def test_weights_are_looked_at_in_every_run() -> None:
    """ComfyUI may load less of a model for the next picture."""
    model = patcher()
    on, layer = comfyui.accelerate(model, **MERGE), model.model.diffusion_model.conv_in
    picture(on)
    before = dict(totals(on))
    layer.weight_function = [print]
    with logged() as said:
        assert torch.equal(picture(on), picture(model))
    assert totals(on) == before
    assert "conv_in" in said[0]
    layer.weight_function = []
    picture(on)
    assert totals(on) == {kind: 2 * count for kind, count in before.items()}


def test_other_wrappers() -> None:
    """One outside sees merged outputs; one inside has to see the call, so the original runs."""
    model = patcher()
    seen: list[float] = []

    def doubled(executor: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return executor(*args, **kwargs) * 2

    outside = model.clone()
    outside.add_wrapper_with_key("diffusion_model", "other", doubled)
    inside = comfyui.accelerate(model, **MERGE)
    inside.add_wrapper_with_key("diffusion_model", "other", doubled)
    alone = picture(outside)
    with logged() as said:
        assert torch.equal(picture(inside), alone)
    assert len(said) == 1
    assert "another node" in said[0]
    merged = picture(comfyui.accelerate(outside, **MERGE))
    assert not torch.equal(merged, alone)
    assert len(seen) == 15


def test_a_controlnet() -> None:
    """Its residuals are inputs of the graph; its lists, which the model empties, are made anew."""
    model = patcher()

    def control(rows: int) -> Any:
        g = torch.Generator().manual_seed(3)
        return {"input": [], "middle": [torch.randn(rows, 16, 4, 4, generator=g)], "output": [None]}

    plain = picture(model, control=control)
    assert not torch.equal(plain, picture(model))
    assert torch.equal(picture(comfyui.accelerate(model, ratio=0.0), control=control), plain)
    on = comfyui.accelerate(model, **MERGE)
    assert not torch.equal(picture(on, control=control), plain)
    assert totals(on) == {"refresh": 2, "reuse": 3}


def test_the_number_of_steps_is_told_where_a_step_is_a_call() -> None:
    """A cache by a share of the steps needs it; Heun's method calls twice, so the original runs."""
    model = patcher()
    on = comfyui.accelerate(model, "balanced")
    picture(on, steps=12)
    assert totals(on) == {"plain": 4, "cached_plain": 8}
    with logged() as said:
        heun = picture(on, sampler=sample_heun)
    assert torch.equal(heun, picture(model, sampler=sample_heun))
    assert len(said) == 1
    assert "number of steps" in said[0]
    merged = comfyui.accelerate(model, **MERGE)
    assert not torch.equal(picture(merged, sampler=sample_heun), heun)
    assert sum(totals(merged).values()) == 9


def test_weights_patched_in_place_or_replaced() -> None:
    """LoRA: graphs read weights when they run, and a model with other weights is captured anew."""
    model = patcher()
    on = comfyui.accelerate(model, **MERGE)
    before = picture(on)
    layer = model.model.diffusion_model.input_attn.attn1.to_q
    old = layer.weight
    with torch.inference_mode():
        layer.weight = nn.Parameter(old * 3, requires_grad=False)
    replaced = picture(on)
    assert torch.equal(replaced, picture(comfyui.accelerate(model, **MERGE)))
    assert not torch.equal(replaced, before)
    layer.weight = old
    assert torch.equal(picture(on), before)
    with torch.inference_mode():
        old *= 3
    assert torch.equal(picture(on), replaced)


def test_what_can_not_merge_runs_as_it_is_and_is_captured_once() -> None:
    model = patcher()
    on = comfyui.accelerate(model)  # min_tokens=256, and the picture has 64
    with logged() as said:
        assert torch.equal(picture(on), picture(model))
        picture(on, 2)
    (line,) = said
    assert "min_tokens" in line


def test_a_model_whose_call_has_no_wrappers() -> None:
    """As Flux of early 2025: nothing merges, and the log says so."""
    model = patcher()
    bare = model.model.diffusion_model
    bare.forward = bare._forward
    with logged() as said:
        assert torch.equal(picture(comfyui.accelerate(model, **MERGE)), picture(model))
    assert "without a call of its wrappers" in said[0]


def test_a_compiled_call_takes_the_original() -> None:
    """ComfyUI's node for torch.compile traces the wrappers, which step aside."""
    model = patcher()
    on = comfyui.accelerate(model, **MERGE)
    unet = model.model.diffusion_model
    options = {"wrappers": on.wrappers}
    call = {"context": conds()[0]["c_crossattn"], "y": conds()[0]["y"]}
    compiled = torch.compile(
        lambda x, t: unet(x, t, transformer_options=dict(options), **call), backend="eager"
    )
    x, t = noise(), torch.ones(1)
    with torch.no_grad():
        assert torch.equal(compiled(x, t), unet(x, t, transformer_options={}, **call))
    assert totals(on) == {}


def test_dynamic_weights_are_loaded_whole() -> None:
    model = patcher()
    model.dynamic = True
    on = comfyui.accelerate(model, **MERGE)
    assert not on.dynamic
    assert on.model is not model.model
    picture(on)
    assert totals(on)["refresh"] == 2
    assert comfyui.restore(model).dynamic

    model.cached_patcher_init = None
    with pytest.raises(ConfigError, match="--disable-dynamic-vram"):
        comfyui.accelerate(model)


def test_what_is_refused() -> None:
    model = patcher()
    with pytest.raises(ConfigError, match="no MODEL"):
        comfyui.accelerate(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="ratio"):
        comfyui.accelerate(model, ratio=2)
    recipe = toma_fx.Recipe(toma_fx.ToMAConfig(), model="UNet2DConditionModel")
    with pytest.raises(RecipeError):
        comfyui.accelerate(model, recipe)

    class Older:
        def clone(self) -> Any: ...

        def get_model_object(self, name: str) -> Any: ...

    with pytest.raises(ConfigError, match="Forge"):
        comfyui.accelerate(Older())
    model.model.diffusion_model = torch.compile(model.model.diffusion_model, backend="eager")
    with pytest.raises(ModelTypeError):
        comfyui.accelerate(model)


# -- nodes ----------------------------------------------------------------------------------------


@cache
def nodes() -> ModuleType:
    """The folder, loaded as ComfyUI loads one: by its path."""
    spec = importlib.util.spec_from_file_location(
        "custom_nodes_toma", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["custom_nodes_toma"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, model: ModelPatcher, **values: Any) -> Any:
    """A node with its widgets as they come, or as given."""
    node = nodes().NODE_CLASS_MAPPINGS[name]()
    asked = {k: v for part in node.INPUT_TYPES().values() for k, v in part.items()}
    own = {k: v[1]["default"] for k, v in asked.items() if k != "model"}
    assert set(values) <= set(own)
    (out,) = getattr(node, node.FUNCTION)(model=model, **{**own, **values})
    return out


def test_every_choice_of_the_node_is_one() -> None:
    model, node = patcher(), nodes().NODE_CLASS_MAPPINGS["TomaMergeTokens"]
    assert set(nodes().NODE_DISPLAY_NAME_MAPPINGS) == set(nodes().NODE_CLASS_MAPPINGS)
    asked = {k: v for part in node.INPUT_TYPES().values() for k, v in part.items()}
    for name in ("method", "scope", "cache", "preset"):
        assert asked[name][1]["default"] in asked[name][0]
        for choice in asked[name][0]:
            out = run("TomaMergeTokens", model, **{name: choice})
            config = acceleration(out).optimized(out.model.diffusion_model).config_toma
            if name in ("method", "scope") and choice != asked[name][1]["default"]:
                assert choice in (config.name, config.scope)
            if name == "cache":
                assert config.cache == toma_fx.CACHES.get(choice)
            if name == "preset" and choice in toma_fx.PRESETS:
                assert config == toma_fx.PRESETS[choice]


def test_the_node_merges_caches_and_turns_off(tmp_path: Path) -> None:
    model = patcher()
    original = picture(model)
    recipe = tmp_path / "recipe.json"
    toma_fx.Recipe(toma_fx.ToMAConfig(**MERGE)).save(recipe)
    by_recipe = run("TomaMergeTokens", model, recipe=str(recipe))
    assert torch.equal(picture(by_recipe), picture(comfyui.accelerate(model, **MERGE)))
    assert not torch.equal(picture(by_recipe), original)
    assert torch.equal(picture(run("TomaMergeTokens", by_recipe, enabled=False)), original)
    assert torch.equal(picture(run("TomaRestoreModel", by_recipe)), original)

    node = nodes().NODE_CLASS_MAPPINGS["TomaMergeTokens"]
    assert node.IS_CHANGED(recipe=str(recipe), model=None) == recipe.stat().st_mtime_ns
    assert node.IS_CHANGED(recipe="", ratio=0.5) == ""
    with pytest.raises(ConfigError, match="preset and a recipe"):
        run("TomaMergeTokens", model, recipe=str(recipe), preset="balanced")
    with pytest.raises(RecipeError):
        run("TomaMergeTokens", model, recipe=str(tmp_path / "none.json"))


def test_the_folder_is_of_this_version() -> None:
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    assert project["project"]["version"] == toma_fx.__version__
    assert project["project"]["dependencies"] == [f"toma-fx=={toma_fx.__version__}"]
    assert set(project["tool"]["comfy"]) == {"PublisherId", "DisplayName"}
    package = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())["project"]
    assert project["project"]["requires-python"] == package["requires-python"]

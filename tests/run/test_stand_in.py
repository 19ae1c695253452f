"""The optimized denoiser as a stand-in: modules, moves, copies, hooks, restoring, summary."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, add_hook_to_module
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

import toma_fx
from tests import denoisers
from toma_fx.capture.guard import ModelGuard
from toma_fx.errors import AdapterError, ConfigError, ModelTypeError, OffloadError
from toma_fx.run.denoiser import OptimizedDenoiser

SMALL: dict[str, Any] = {"min_tokens": 60, "tile": 4}


def small_flux() -> Any:
    return denoisers.small_flux(num_single_layers=0)


def flux_call(step: int = 0, **changes: Any) -> dict[str, Any]:
    return {**denoisers.flux_inputs(8, 8, batch=1, timestep=0.9 - step / 20), **changes}


def test_modules_and_weights_are_the_originals() -> None:
    model = small_flux()
    optimized = toma_fx.optimize(model, **SMALL)
    paths = [name for name, _ in model.named_modules()]
    assert [name for name, _ in optimized.named_modules()] == paths
    assert list(optimized.state_dict()) == list(model.state_dict())
    own = dict(model.named_parameters())
    assert all(p is own[name] for name, p in optimized.named_parameters())
    assert optimized.get_submodule("transformer_blocks.0.attn") is model.transformer_blocks[0].attn
    assert repr(optimized) == (
        f"OptimizedDenoiser(method='toma', ratio={optimized.config_toma.ratio}, eager) of {model!r}"
    )
    assert {"using", "disable_merging", "step", "compile", "add_adapter"} <= set(dir(optimized))
    optimized.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()})
    assert not any(p.any() for p in model.parameters())


def test_attributes_set_on_the_stand_in_reach_the_original() -> None:
    model = denoisers.sdxl()
    optimized = toma_fx.optimize(model, **SMALL)
    assert model.encoder_hid_proj is None
    optimized.encoder_hid_proj = nn.Linear(24, 24)
    assert isinstance(model.encoder_hid_proj, nn.Linear)
    optimized.added = nn.Linear(2, 2)
    assert "added" in model._modules
    del optimized.added
    assert not hasattr(model, "added")
    optimized.note = 3
    assert not hasattr(model, "note")
    assert optimized.note == 3
    with pytest.raises(AttributeError):
        _ = optimized.nothing


@torch.no_grad()
def test_moves_and_casts_reach_the_original() -> None:
    model = small_flux()
    optimized = toma_fx.optimize(model, **SMALL)
    before = optimized(**flux_call())[0]
    assert optimized.to(torch.float64) is optimized
    assert model.dtype == optimized.dtype == torch.float64
    double = {k: v.double() if torch.is_tensor(v) else v for k, v in flux_call().items()}
    assert denoisers.relative(optimized(**double)[0].float(), before) < 1e-3
    optimized.float()
    assert model.dtype == torch.float32
    optimized.reset()
    assert torch.equal(optimized(**flux_call())[0], before)
    assert optimized.cache.captures == 2, "the first graph is still good"


@torch.no_grad()
def test_buffers_made_anew_by_a_move_are_followed() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_flux()
            self.register_buffer("shift", torch.ones(1))

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)[0] + self.shift

    model = Shifted().eval()
    optimized = toma_fx.optimize(model, **SMALL)
    one = optimized(**flux_call())
    model.shift = torch.full((1,), 3.0)
    optimized.reset()
    assert torch.allclose(optimized(**flux_call()), one + 2, atol=1e-5)
    assert optimized.cache.captures == 1


def test_training_mode_is_seen() -> None:
    optimized = toma_fx.optimize(small_flux(), **SMALL)
    optimized.train()
    with pytest.raises(toma_fx.TrainingModeError):
        optimized(**flux_call())
    optimized.eval()
    optimized(**flux_call())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@torch.no_grad()
def test_copies_have_their_own_model_and_state(how: str) -> None:
    model = small_flux()
    optimized = toma_fx.optimize(model, **SMALL, max_signatures=3)
    want = optimized(**flux_call())[0]
    if how == "deepcopy":
        other = copy.deepcopy(optimized)
    else:
        file = io.BytesIO()
        torch.save(optimized, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert type(other) is OptimizedDenoiser
    assert other.denoiser is not model
    assert other.config_toma == optimized.config_toma
    assert other.cache.capacity == 3
    assert not other.states
    assert torch.equal(other(**flux_call())[0], want)
    for parameter in model.parameters():
        parameter.zero_()
    other.reset()
    assert torch.equal(other(**flux_call())[0], want)


def test_saves_and_loads_as_the_original(tmp_path: Any) -> None:
    optimized = toma_fx.optimize(denoisers.sdxl(), **SMALL)
    optimized.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, optimized.state_dict()[name])


# -- optimize twice, restore, summary -------------------------------------------------------------


def test_optimize_twice_starts_from_the_original() -> None:
    model = small_flux()
    twice = toma_fx.optimize(toma_fx.optimize(model, ratio=0.25), ratio=0.5)
    assert twice.denoiser is model
    assert twice.config_toma.ratio == 0.5
    compiled = torch.compile(toma_fx.optimize(model, ratio=0.25))
    assert toma_fx.optimize(compiled).denoiser is model
    assert toma_fx.restore(compiled) is model
    assert toma_fx.restore(twice) is model
    assert toma_fx.restore(model) is model


def test_a_compiled_original_is_refused() -> None:
    with pytest.raises(ModelTypeError, match="compiled already"):
        toma_fx.optimize(torch.compile(small_flux()))
    in_place = small_flux()
    in_place.compile()
    with pytest.raises(ModelTypeError, match="optimize first"):
        toma_fx.optimize(in_place)


def test_max_signatures_is_checked() -> None:
    with pytest.raises(ConfigError, match="max_signatures"):
        toma_fx.optimize(small_flux(), max_signatures=0)


@torch.no_grad()
def test_summary_tells_what_ran() -> None:
    model = small_flux()
    assert "not optimized" in str(toma_fx.summary(model))
    optimized = toma_fx.optimize(model, **SMALL, destinations_every=2, last_step=3)
    assert "none yet" in str(toma_fx.summary(optimized))
    for i in range(5):
        optimized(**flux_call(i))
    optimized.reset()
    found = toma_fx.summary(torch.compile(optimized))
    assert found.active
    assert found.steps == {"refresh": 2, "reuse": 2, "plain": 1}
    assert found.captures == 1
    (live,) = found.live
    assert live.inputs["hidden_states"] == (1, 64, 4)
    assert live.tokens == ((64, 32),)
    assert live.steps == found.steps
    text = str(found)
    assert "2 refresh, 2 reuse, 1 plain" in text
    assert "64 -> 32" in text
    assert json.loads(found.to_json())["config"]["destinations_every"] == 2


# -- hooks of offloading --------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["hook", "optimize"])
@torch.no_grad()
def test_model_offload_before_or_after(first: str) -> None:
    model = small_flux()
    want = toma_fx.optimize(model, **SMALL)(**flux_call())[0]
    seen = []

    class Offload(CpuOffload):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(type(module))
            return super().pre_forward(module, *args, **kwargs)

    hook = Offload(execution_device=torch.device("cpu"))
    if first == "hook":
        add_hook_to_module(model, hook)
        optimized = toma_fx.optimize(model, **SMALL)
    else:
        optimized = toma_fx.optimize(model, **SMALL)
        add_hook_to_module(optimized, hook)
    for _ in range(2):
        assert torch.equal(optimized(**flux_call())[0], want)
        optimized.reset()
    assert len(seen) == 2
    assert optimized.totals == {"refresh": 2}, "merging is not bypassed"
    out, _ = optimized.step(flux_call(), toma_fx.State())
    assert torch.equal(out[0], want)
    restored = toma_fx.restore(optimized)
    assert restored is model
    restored(**flux_call())
    assert len(seen) >= 3, "the hook is on the original now"


@torch.no_grad()
def test_sequential_offload_is_refused() -> None:
    model = small_flux()
    optimized = toma_fx.optimize(model, **SMALL)
    optimized(**flux_call())
    block = model.transformer_blocks[0].attn.to_q
    add_hook_to_module(block, AlignDevicesHook(execution_device="cpu", offload=True))
    with pytest.raises(OffloadError) as caught:
        optimized(**flux_call(1))
    assert caught.value.where == "transformer_blocks.0.attn.to_q"
    assert "enable_model_cpu_offload" in str(caught.value)


@torch.no_grad()
def test_weights_on_meta_are_refused() -> None:
    with torch.device("meta"):
        model = small_flux()
    with pytest.raises(OffloadError, match="not loaded"):
        toma_fx.optimize(model, **SMALL)(**flux_call())


@torch.no_grad()
def test_diffusers_hooks_are_refused_by_name() -> None:
    from diffusers.hooks import FirstBlockCacheConfig

    model = denoisers.small_flux()  # the cache asks for a second block
    optimized = toma_fx.optimize(model, **SMALL)
    optimized(**flux_call())
    optimized.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(OffloadError, match="disable_cache"):
        optimized(**flux_call(1))
    optimized.disable_cache()
    optimized(**flux_call(1))


# -- changed models -------------------------------------------------------------------------------


@torch.no_grad()
def test_guard_sees_what_a_graph_depends_on() -> None:
    model = denoisers.sdxl()
    first = ModelGuard(model)
    assert first.holds()
    assert ModelGuard(model).key == first.key
    block = model.down_blocks[1].attentions[0].transformer_blocks[0]

    def changes(undo: Any) -> None:
        assert not first.holds()
        assert ModelGuard(model).key != first.key
        undo()
        assert ModelGuard(model).key == first.key

    kept = block.attn1.to_q
    block.attn1.to_q = nn.Linear(16, 16)
    changes(lambda: setattr(block.attn1, "to_q", kept))
    weight = kept.weight
    kept.weight = nn.Parameter(torch.zeros(16, 16))
    changes(lambda: setattr(kept, "weight", weight))
    scale, block.attn1.scale = block.attn1.scale, 2.0
    changes(lambda: setattr(block.attn1, "scale", scale))
    model.enable_freeu(0.9, 0.2, 1.1, 1.2)
    assert ModelGuard(model).key != first.key
    model.disable_freeu()
    handle = block.register_forward_hook(lambda *_: None)
    assert not first.holds()
    handle.remove()
    same = ModelGuard(model)
    model.set_attn_processor(AttnProcessor2_0())
    assert not same.holds()
    assert ModelGuard(model).key == same.key, "processors of one kind are alike"
    kept.weight.mul_(2)
    assert ModelGuard(model).key == same.key, "values in tensors are shared with the graph"


class Doubling:
    """A helper object with settings of its own, as processors have."""

    def __init__(self) -> None:
        self.settings = Doubling.Settings()

    class Settings:
        factor = 1.0

        def __init__(self) -> None:
            self.factor = 2.0


class Custom(nn.Module):
    """A model that reads all sorts of attributes in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.helper = Doubling()
        self.table = {"bias": torch.zeros(1)}

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Any:
        out = self.inner(hidden_states) + timestep
        out = self.norm(self.conv(out)) * self.helper.settings.factor + self.table["bias"]
        return out * getattr(self, "late", 1.0)


def custom_call() -> dict[str, Any]:
    return {"hidden_states": flux_call()["hidden_states"], "timestep": torch.full((1,), 0.9)}


def padded(model: Any) -> None:
    model.conv.padding_mode = "circular"
    model.conv._reversed_padding_repeated_twice = [1, 1]


CHANGES: dict[str, Any] = {
    "attribute of a library module": lambda m: setattr(m.norm, "eps", 10.0),
    "padding mode": padded,
    "helper of a helper": lambda m: setattr(m.helper.settings, "factor", 3.0),
    "tensor in a table": lambda m: m.table.update(bias=torch.ones(1)),
    "attribute that comes late": lambda m: setattr(m, "late", 2.0),
    "forward of a layer": lambda m: setattr(m.norm, "forward", lambda x: x),
    "hook": lambda m: m.norm.register_forward_hook(lambda module, args, out: out + 1),
    "forward of the model": lambda m: setattr(
        m, "forward", lambda **i: m.inner(i["hidden_states"]) * 5
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_whatever_changes_in_the_model_shows(name: str, when: str) -> None:
    model = Custom().eval()
    plain = model(**custom_call())
    if when == "before":
        CHANGES[name](model)
    optimized = toma_fx.optimize(model, ratio=0)
    optimized(**custom_call())
    if when == "after":
        CHANGES[name](model)
    optimized.reset()
    got = optimized(**custom_call())
    assert torch.equal(got, model(**custom_call()))
    assert not torch.equal(got, plain)


@torch.no_grad()
def test_a_hook_that_replaces_another() -> None:
    model = Custom().eval()
    optimized = toma_fx.optimize(model, ratio=0)
    for value in (1.0, 2.0, 3.0):
        handle = model.norm.register_forward_hook(lambda module, args, out, v=value: out + v)
        optimized.reset()
        assert torch.equal(optimized(**custom_call()), model(**custom_call()))
        handle.remove()


@torch.no_grad()
def test_fused_projections_are_captured_anew() -> None:
    model = small_flux()
    optimized = toma_fx.optimize(model, **SMALL)
    before = optimized(**flux_call())[0]
    optimized.fuse_qkv_projections()
    optimized.reset()
    assert denoisers.relative(optimized(**flux_call())[0], before) < 1e-5
    assert optimized.cache.captures == 2
    optimized.reset()
    optimized(**flux_call())
    assert optimized.cache.captures == 2


@torch.no_grad()
def test_a_model_that_no_longer_takes_the_call_says_so() -> None:
    model = small_flux()
    optimized = toma_fx.optimize(model, **SMALL)
    optimized(**flux_call())
    model.x_embedder = nn.Linear(8, 32).eval()
    with pytest.raises(AdapterError, match="no longer accepts"):
        optimized(**flux_call(1))
    wide = flux_call(1, hidden_states=torch.randn(1, 64, 8))
    assert torch.isfinite(optimized(**wide)[0]).all()

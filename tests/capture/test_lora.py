"""LoRA: whatever is done to the adapters, outputs are the original's with merging, never stale."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig

import toma_fx
from tests import denoisers
from toma_fx.errors import AdapterError

SMALL: dict[str, Any] = {"min_tokens": 60, "tile": 4}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def model_and_call(name: str) -> tuple[Any, Callable[[int], dict[str, Any]]]:
    if name == "flux":
        model = denoisers.small_flux(num_single_layers=0)
        return model, lambda i: denoisers.at_step(denoisers.small_flux_inputs, i, batch=1)
    return denoisers.sdxl(), lambda i: denoisers.at_step(denoisers.sdxl_inputs, i, batch=1)


def add(model: Any, name: str, seed: int, **options: Any) -> None:
    """An adapter with random weights that act."""
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS, **options), name)
    g = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if f".{name}." in path:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=g))
    model.eval()


# what is done to the adapters, and whether a new graph must be captured
SEQUENCE: list[tuple[str, Callable[[Any], Any], bool]] = [
    ("load a", lambda m: add(m, "a", 1), True),
    ("load b", lambda m: add(m, "b", 2), True),
    ("a alone", lambda m: m.set_adapters(["a"]), False),
    ("a at half", lambda m: m.set_adapters(["a"], [0.5]), True),
    ("both", lambda m: m.set_adapters(["a", "b"], [0.7, 0.3]), True),
    ("a alone again", lambda m: m.set_adapters(["a"], [1.0]), False),
    ("disable", lambda m: m.disable_lora(), True),
    ("enable", lambda m: m.enable_lora(), False),
    ("fuse", lambda m: m.fuse_lora(adapter_names=["a"]), False),
    ("unfuse", lambda m: m.unfuse_lora(), False),
    ("delete b", lambda m: m.delete_adapters(["b"]), False),
    ("unload", lambda m: m.unload_lora(), False),
]


@pytest.mark.parametrize("through", ["stand-in", "original"])
@torch.no_grad()
def test_every_operation_shows_and_is_captured_once(through: str) -> None:
    model, call = model_and_call("flux")
    optimized = toma_fx.optimize(model, **SMALL, max_signatures=16)
    plain = optimized(**call(0))[0]
    handle = model if through == "original" else optimized
    seen, last = {"start": plain}, plain
    for i, (what, act, captures) in enumerate(SEQUENCE):
        before = optimized.cache.captures
        act(handle)
        optimized.reset()
        got = optimized(**call(0))[0]
        assert optimized.cache.captures - before == captures, what
        optimized(**call(1 + i))
        assert optimized.cache.captures - before == captures, f"{what}: twice"
        want = toma_fx.optimize(copy.deepcopy(model), **SMALL)(**call(0))[0]
        assert denoisers.relative(got, want) < 1e-5, what
        if what not in ("fuse", "unfuse", "delete b"):
            assert denoisers.relative(got, last) > 1e-3, f"{what} acts"
        seen[what], last = got, got
    assert torch.equal(seen["a alone"], seen["a alone again"])
    assert denoisers.relative(seen["fuse"], seen["enable"]) < 1e-4
    assert denoisers.relative(seen["unload"], plain) < 1e-4, "fusing left rounding in the weights"
    assert len(optimized.specializations) == 1, "graphs over unloaded adapters are gone"


@torch.no_grad()
def test_sdxl() -> None:
    model, call = model_and_call("sdxl")
    optimized = toma_fx.optimize(model, **SMALL)
    plain = optimized(**call(0))[0]
    add(optimized, "a", 1)
    optimized.reset()
    loaded = optimized(**call(0))[0]
    assert denoisers.relative(loaded, plain) > 1e-3
    optimized.fuse_lora()
    optimized.reset()
    assert denoisers.relative(optimized(**call(0))[0], loaded) < 1e-4
    optimized.unfuse_lora()
    optimized.unload_lora()
    optimized.reset()
    assert denoisers.relative(optimized(**call(0))[0], plain) < 1e-4
    assert optimized.cache.captures == 3, "plain, loaded, fused"


@torch.no_grad()
def test_fused_adapters_switched_off_are_refused() -> None:
    model, call = model_and_call("flux")
    add(model, "a", 1)
    optimized = toma_fx.optimize(model, **SMALL)
    model.fuse_lora()
    model.disable_lora()
    with pytest.raises(AdapterError, match="unfuse_lora"):
        optimized(**call(0))


@torch.no_grad()
def test_a_switch_in_mid_generation_refreshes_and_keeps_the_step() -> None:
    model, call = model_and_call("flux")
    optimized = toma_fx.optimize(model, **SMALL, destinations_every=10, last_step=3)
    for i in range(2):
        optimized(**call(i))
    add(model, "a", 1)
    for i in range(2, 5):
        got = optimized(**call(i))[0]
    assert optimized.states[0].counts == {"refresh": 2, "reuse": 2, "plain": 1}
    assert optimized.states[0].last == 4
    assert torch.equal(got, model(**call(4))[0])


@torch.no_grad()
def test_scale_of_one_call() -> None:
    model, call = model_and_call("flux")
    add(model, "a", 1)
    optimized = toma_fx.optimize(model, **SMALL)
    off = toma_fx.optimize(model, ratio=0)
    whole = optimized(**call(0))[0]
    for scale in (0.0, 0.5):
        scaled = {**call(0), "joint_attention_kwargs": {"scale": scale}}
        assert denoisers.relative(optimized(**scaled)[0], whole) > 1e-3
        assert torch.equal(off(**scaled)[0], model(**scaled)[0])
    assert optimized.cache.captures == 3


@torch.no_grad()
def test_dora_and_weights_trained_further() -> None:
    model, call = model_and_call("flux")
    optimized = toma_fx.optimize(model, ratio=0)
    optimized(**call(0))
    add(model, "a", 1, use_dora=True)
    optimized.reset()
    assert torch.equal(optimized(**call(0))[0], model(**call(0))[0])
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            parameter.mul_(2)
    before = optimized.cache.captures
    optimized.reset()
    assert torch.equal(optimized(**call(0))[0], model(**call(0))[0])
    assert optimized.cache.captures == before, "values of weights are shared"


@torch.no_grad()
def test_a_hundred_switches_keep_a_bounded_number_of_graphs() -> None:
    model, call = model_and_call("flux")
    for i, name in enumerate("abc"):
        add(model, name, i)
    optimized = toma_fx.optimize(model, **SMALL)
    want = {}
    for i in range(100):
        name = "abc"[i % 3]
        model.set_adapters([name])
        optimized.reset()
        got = optimized(**call(0))[0]
        assert torch.equal(got, want.setdefault(name, got))
    assert optimized.cache.captures == 3
    assert len(optimized.states) == 1


@torch.no_grad()
def test_unloaded_adapters_are_freed() -> None:
    model, call = model_and_call("flux")
    optimized = toma_fx.optimize(model, **SMALL)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(o, torch.nn.Parameter) for o in gc.get_objects())

    optimized(**call(0))
    before = tensors()
    for i in range(3):
        add(model, f"n{i}", i)
        optimized.reset()
        optimized(**call(0))
        model.unload_lora()
        optimized.reset()
        optimized(**call(0))
    assert tensors() == before
    assert len(optimized.specializations) == 1

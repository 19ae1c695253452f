"""Pipeline x feature: each pipeline with the rewrite against the same pipeline with the independent
eager reference in its place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import toma_fx
from tests.denoisers import relative
from tests.diffusers_pipelines import CASES, Case, lora_state
from tests.reference import Settings, stand_in
from toma_fx.errors import OffloadError

TOLERANCE = 1e-4
SMALL: dict[str, Any] = {"min_tokens": 60, "tile": 4}


def reference(case: Case, pipe: Any, scope: str = "stack", **settings: Any) -> Any:
    """The pipeline with the reference in place of the denoiser."""
    how = {"tile": (4, 4), "keep": 8, "scope": scope, "whole_controls": True, **settings}
    setattr(pipe, case.component, stand_in(case.denoiser(pipe), Settings(**how)))
    return pipe


def optimized(case: Case, pipe: Any, **config: Any) -> Any:
    return toma_fx.optimize(pipe, **{**SMALL, **config})


def check(case: Case, got: Tensor, want: Tensor, plain: Tensor | None = None) -> None:
    assert relative(got, want) < TOLERANCE
    if plain is not None:
        assert relative(got, plain) > 50 * TOLERANCE, "merging acts"


@pytest.mark.parametrize("name", CASES)
def test_stack(name: str) -> None:
    """The default scope, twice in a row, and off."""
    case = CASES[name]
    pipe = case.make()
    plain = case.call(pipe)
    original = case.denoiser(pipe)
    optimized(case, pipe)
    got = case.call(pipe)
    check(case, got, case.call(reference(case, case.make())), plain)
    assert torch.equal(case.call(pipe), got), "the second generation starts anew"
    steps = toma_fx.summary(pipe).steps
    assert steps["refresh"] < steps["reuse"]
    assert toma_fx.restore(pipe) is pipe
    assert case.denoiser(pipe) is original
    assert torch.equal(case.call(pipe), plain)
    toma_fx.optimize(pipe, ratio=0)
    assert torch.equal(case.call(pipe), plain)


@pytest.mark.parametrize("scope", ["sublayer", "block"])
@pytest.mark.parametrize("name", CASES)
def test_other_scopes(name: str, scope: str) -> None:
    case = CASES[name]
    if (name, scope) == ("flux_ip_adapter", "sublayer"):
        # the adapter's attention shares its queries with the joint one: they merge together
        # (the permutation oracle of tests/zoo/test_zoo.py covers the numbers)
        pipe = optimized(case, case.make(), scope=scope)
        assert torch.isfinite(torch.as_tensor(case.call(pipe))).all()
        plan = case.denoiser(pipe).specializations[0].plan
        assert not any("outside the branch" in r.reason for r in plan.rejections)
        assert {len(s.sites) for s in plan.segments if s.sites} == {1, 2}
        return
    got = case.call(optimized(case, case.make(), scope=scope))
    check(case, got, case.call(reference(case, case.make(), scope)))


@pytest.mark.parametrize("name", CASES)
def test_lora_of_the_pipeline(name: str) -> None:
    """Load before and after, scale, switch off, fuse, unload; each against the reference."""
    case = CASES[name]
    pipe = optimized(case, case.make())
    bare = case.call(pipe)
    state = lora_state(case)
    pipe.load_lora_weights(dict(state), adapter_name="saved")
    eager = case.make()
    eager.load_lora_weights(dict(state), adapter_name="saved")

    def want() -> Tensor:
        return case.call(reference(case, copy.copy(eager)))

    loaded = case.call(pipe)
    check(case, loaded, want(), bare)
    before = case.make()
    before.load_lora_weights(dict(state), adapter_name="saved")
    assert torch.equal(case.call(optimized(case, before)), loaded), "loaded before optimizing"
    for each in (pipe, eager):
        each.set_adapters("saved", 0.5)
    check(case, case.call(pipe), want(), loaded)
    for each in (pipe, eager):
        each.disable_lora()
    check(case, case.call(pipe), bare)
    for each in (pipe, eager):
        each.enable_lora()
        each.fuse_lora()
    check(case, case.call(pipe), want(), bare)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    check(case, case.call(pipe), bare)


@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded(name: str, tmp_path: Any) -> None:
    case = CASES[name]
    pipe = optimized(case, case.make())
    want = case.call(pipe)
    pipe.save_pretrained(tmp_path)
    absent = {name: None for name, part in pipe.components.items() if part is None}
    loaded = type(pipe).from_pretrained(tmp_path, **absent)
    loaded.set_progress_bar_config(disable=True)
    assert type(case.denoiser(loaded)) is type(case.denoiser(toma_fx.restore(pipe)))
    if not name.endswith("ip_adapter"):  # the adapter is not part of a saved pipeline
        got = case.call(loaded)
        assert relative(got, want) > TOLERANCE, "the saved denoiser is the original"
        check(case, case.call(optimized(case, loaded)), want)


@pytest.mark.parametrize("name", CASES)
def test_offload_copies_inference_mode_and_components(name: str) -> None:
    case = CASES[name]
    pipe = optimized(case, case.make())
    want = case.call(pipe)
    with torch.inference_mode():
        assert torch.equal(case.call(pipe), want)
    setattr(pipe, case.component, copy.deepcopy(case.denoiser(pipe)))
    assert torch.equal(case.call(pipe), want)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(case.call(pipe), want)
    pipe.remove_all_hooks()
    assert toma_fx.summary(pipe).steps["reuse"] > 0
    again = type(pipe)(**pipe.components)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(case.call(again), want)
    pipe.to(torch.float64)
    assert case.denoiser(pipe).dtype == torch.float64
    pipe.to(torch.float32)
    assert torch.equal(case.call(pipe), want)


# the other pipelines' encoders fail under sequential offload to a CPU, optimized or not
@pytest.mark.parametrize("name", ["sdxl", "flux_true_cfg"])
def test_sequential_offload_says_what_to_do_instead(name: str) -> None:
    case = CASES[name]
    pipe = optimized(case, case.make())
    want = case.call(pipe)
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(OffloadError, match="enable_model_cpu_offload"):
        case.call(pipe)
    pipe.remove_all_hooks()
    pipe.to("cpu")
    assert torch.equal(case.call(pipe), want)


def test_ip_adapter_scale_and_unloading() -> None:
    case = CASES["sdxl_ip_adapter"]
    pipe, eager = optimized(case, case.make()), case.make()
    whole = case.call(pipe)
    for each in (pipe, eager):
        each.set_ip_adapter_scale(0.3)
    check(case, case.call(pipe), case.call(reference(case, copy.copy(eager))), whole)
    pipe.set_ip_adapter_scale(0.8)
    assert torch.equal(case.call(pipe), whole)
    assert toma_fx.summary(pipe).captures == 2
    pipe.unload_ip_adapter()
    plain = CASES["sdxl"]
    check(plain, plain.call(pipe), plain.call(optimized(plain, eager_without(eager))))


def eager_without(pipe: Any) -> Any:
    """The pipeline without its IP-Adapter."""
    pipe.unload_ip_adapter()
    return pipe


def test_perturbed_attention_comes_and_goes() -> None:
    """PAG swaps attention processors during a call and puts them back."""
    case, plain = CASES["sdxl_pag"], CASES["sdxl"]
    pipe = optimized(case, case.make())
    with_guidance = case.call(pipe)
    without = plain.call(pipe, pag_scale=0.0)
    check(case, without, plain.call(reference(case, case.make()), pag_scale=0.0), with_guidance)
    assert torch.equal(case.call(pipe), with_guidance)
    assert toma_fx.summary(pipe).captures == 2

"""The tiny pipelines and the reference stand-ins, checked without the package.

A stand-in that keeps every token, with weights so sharp that merging only permutes the tokens, must
reproduce the plain pipeline: then what it passes to the blocks is what the original passes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import denoisers, diffusers_pipelines
from tests.denoisers import relative
from tests.diffusers_pipelines import CASES, Case
from tests.reference import Schedule, Settings, stand_in, windows_of

SCOPES = ["sublayer", "block", "stack"]
HALF = {"tile": (4, 4), "keep": 8}
ALL = {"tile": (4, 4), "keep": 16, "scale": 1e6}


def standing_in(case: Case, pipe: Any, **settings: Any) -> Any:
    setattr(pipe, case.component, stand_in(case.denoiser(pipe), Settings(**settings)))
    return pipe


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", CASES)
def test_keeping_every_token_is_the_original(name: str, scope: str) -> None:
    case = CASES[name]
    plain = case.call(case.make())
    kept = case.call(standing_in(case, case.make(), scope=scope, **ALL))
    assert relative(kept, plain) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_merging_the_scope_and_the_schedule_show_in_the_latents(name: str) -> None:
    case = CASES[name]
    pipe = standing_in(case, case.make(), scope="sublayer", **HALF)
    merged = case.call(pipe)
    assert torch.equal(case.call(pipe), merged), "the second generation starts anew"
    assert relative(merged, case.call(case.make())) > 1e-2
    for other in ({"scope": "block"}, {"destinations_every": 4}, {"destinations_every": 99}):
        changed = standing_in(case, case.make(), **{"scope": "sublayer", **HALF, **other})
        assert relative(case.call(changed), merged) > 1e-3, other


def test_control_residuals_that_leave_a_stack_whole_cost_less() -> None:
    case = CASES["flux_controlnet"]
    plain = case.call(case.make())
    kept = standing_in(case, case.make(), scope="stack", whole_controls=True, **ALL)
    assert relative(case.call(kept), plain) < 1e-4
    merged, whole = (
        relative(case.call(standing_in(case, case.make(), scope="stack", **HALF, **how)), plain)
        for how in ({}, {"whole_controls": True})
    )
    assert whole < 0.1 * merged


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sdxl_img2img", {"image": diffusers_pipelines.picture(64, 64, seed=8)}),
        ("sdxl_inpaint", {"mask_image": 1 - diffusers_pipelines.mask(64, 64)}),
        ("sdxl_inpaint_9_channels", {"mask_image": 1 - diffusers_pipelines.mask(64, 64)}),
        ("sdxl_controlnet", {"image": diffusers_pipelines.picture(64, 64, seed=8)}),
        ("sdxl_pag", {"pag_scale": 1.0}),
        ("sdxl_ip_adapter", {"ip_adapter_image_embeds": [torch.ones(2, 1, 10)]}),
        ("flux_true_cfg", {"true_cfg_scale": 1.0}),
        ("flux_img2img", {"true_cfg_scale": 1.0}),
        ("flux_fill", {"guidance_scale": 3.0}),
        ("flux_controlnet", {"control_image": diffusers_pipelines.picture(32, 48, seed=8)}),
        ("flux_ip_adapter", {"ip_adapter_image_embeds": [torch.ones(1, 1, 10)]}),
        ("flux_kontext", {"image": diffusers_pipelines.picture(16, 48, seed=8)}),
    ],
)
def test_what_a_pipeline_adds_reaches_the_latents(name: str, changes: dict[str, Any]) -> None:
    case = CASES[name]
    assert relative(case.call(case.make(), **changes), case.call(case.make())) > 1e-3


@pytest.mark.parametrize("name", ["sdxl", "sdxl_ip_adapter", "flux", "flux_kontext"])
def test_lora_weights_load_into_a_stand_in(name: str) -> None:
    case = CASES[name]
    added = case.make()
    diffusers_pipelines.add_lora(case.denoiser(added), case.component)
    want = case.call(added)
    assert relative(want, case.call(case.make())) > 1e-2, "the adapter acts"

    state = diffusers_pipelines.lora_state(case)
    loaded = case.make()
    loaded.load_lora_weights(state)
    assert relative(case.call(loaded), want) < 1e-4

    pipe = standing_in(case, case.make(), **ALL)
    pipe.load_lora_weights(state)
    assert relative(case.call(pipe), want) < 1e-4
    assert relative(case.call(standing_in(case, loaded, **ALL)), want) < 1e-4


@pytest.mark.parametrize(
    ("name", "argument"), [("sdxl", "cross_attention_kwargs"), ("flux", "joint_attention_kwargs")]
)
def test_a_lora_scale_reaches_the_stand_in(name: str, argument: str) -> None:
    case = CASES[name]
    pipe = case.make()
    diffusers_pipelines.add_lora(case.denoiser(pipe), case.component)
    full, half = case.call(pipe), case.call(pipe, **{argument: {"scale": 0.5}})
    assert relative(half, full) > 1e-3
    standing_in(case, pipe, **ALL)
    assert relative(case.call(pipe, **{argument: {"scale": 0.5}}), half) < 1e-4
    assert relative(case.call(pipe), full) < 1e-4, "the scale is taken back"


@pytest.mark.parametrize("name", ["sdxl", "flux"])
@torch.no_grad()
def test_a_stand_in_is_called_and_looks_like_the_original(name: str) -> None:
    model, inputs = getattr(denoisers, name)(), getattr(denoisers, f"{name}_inputs")()
    want = model(**{**inputs, "return_dict": True})
    double = stand_in(model, Settings(**ALL))
    assert type(double) is type(model)
    assert double.config == model.config
    assert double.dtype == model.dtype
    got = double(**{**inputs, "return_dict": True})
    assert type(got) is type(want)
    double._reset_stateful_cache()
    (sample,) = double(**inputs)
    assert torch.equal(sample, got.sample)
    assert relative(sample, want.sample) < 1e-4
    assert torch.equal(model(**inputs)[0], want.sample), "the original is left as it was"


def test_each_pass_counts_its_own_steps() -> None:
    schedule = Schedule(2)
    for timestep, refresh in ((0.9, True), (0.6, False), (0.3, True)):
        for expected in (("", 0), ("", 1)):
            assert schedule.begin(timestep) == (expected, refresh)
    for label in ("cond", "uncond"):
        with schedule.labeled(label):
            assert schedule.begin(1.0) == ((label, 0), True), "a timestep that rises starts anew"
    with schedule.labeled("uncond"):
        assert schedule.begin(0.5) == (("uncond", 0), False)
    schedule.reset()
    assert schedule.begin(0.5) == (("", 0), True)


def test_windows_of_two_images_of_equal_width_are_those_of_the_joint_grid() -> None:
    assert windows_of([(8, 12), (4, 12)], (4, 4)) == windows_of([(12, 12)], (4, 4))
    assert windows_of([(2, 2), (2, 4)], (2, 2)) == [[0, 1, 2, 3], [4, 5, 8, 9], [6, 7, 10, 11]]
    with pytest.raises(AssertionError, match="does not divide"):
        windows_of([(6, 12), (6, 12)], (4, 4))

"""Whole models against an independent eager implementation, refresh and reuse steps."""

import pytest
import torch

import toma_fx
from tests import denoisers
from tests.reference import Settings, reference_flux, reference_unet

TOLERANCE = 1e-5
KEEP = {0.25: 12, 0.5: 8, 0.75: 4}


@pytest.mark.parametrize("scope", ["sublayer", "block", "stack"])
@pytest.mark.parametrize("ratio", KEEP)
@torch.no_grad()
def test_sdxl(ratio: float, scope: str) -> None:
    model = denoisers.sdxl()
    first, second = (
        denoisers.at_step(denoisers.sdxl_inputs, i, height=32, width=48) for i in (0, 1)
    )
    optimized = toma_fx.optimize(
        model, ratio=ratio, scope=scope, tile=4, min_tokens=90, example_inputs=first
    )
    s = Settings((4, 4), KEEP[ratio], scope=scope)
    reference = reference_unet(model, {16 * 24: s, 8 * 12: s})
    plain = model(**first)[0]
    got, want = optimized(**first)[0], reference(**first)[0]
    assert denoisers.relative(got, want) < TOLERANCE
    assert denoisers.relative(got, plain) > 100 * TOLERANCE
    s.refresh = False
    got, want = optimized(**second)[0], reference(**second)[0]
    assert denoisers.relative(got, want) < TOLERANCE
    assert optimized.states[0].counts == {"refresh": 1, "reuse": 1}
    s.refresh = True
    assert denoisers.relative(got, reference(**second)[0]) > 10 * TOLERANCE, "reuse equals refresh"


@pytest.mark.parametrize("scope", ["sublayer", "block", "stack"])
@pytest.mark.parametrize("ratio", KEEP)
@torch.no_grad()
def test_flux(ratio: float, scope: str) -> None:
    model = denoisers.flux()
    first, second = (
        denoisers.at_step(denoisers.flux_inputs, i, start=2, height=8, width=12) for i in (0, 1)
    )
    optimized = toma_fx.optimize(
        model, ratio=ratio, scope=scope, tile=4, min_tokens=90, example_inputs=first
    )
    s = Settings((4, 4), KEEP[ratio], scope=scope)
    plain = model(**first)[0]
    got, want = optimized(**first)[0], reference_flux(model, (8, 12), s, first)
    assert denoisers.relative(got, want) < TOLERANCE
    assert denoisers.relative(got, plain) > 100 * TOLERANCE
    s.refresh = False
    got, want = optimized(**second)[0], reference_flux(model, (8, 12), s, second)
    assert denoisers.relative(got, want) < TOLERANCE
    s.refresh = True
    fresh = reference_flux(model, (8, 12), s, second)
    assert denoisers.relative(got, fresh) > 10 * TOLERANCE, "reuse equals refresh"


@pytest.mark.parametrize("scope", ["sublayer", "block"])
@torch.no_grad()
def test_flux_with_a_pattern_per_block(scope: str) -> None:
    model, inputs = denoisers.flux(), denoisers.flux_inputs(8, 12)
    optimized = toma_fx.optimize(
        model, share="block", scope=scope, tile=4, min_tokens=90, example_inputs=inputs
    )
    s = Settings((4, 4), 8, scope=scope, share="block")
    got, want = optimized(**inputs)[0], reference_flux(model, (8, 12), s, inputs)
    assert denoisers.relative(got, want) < TOLERANCE
    assert len(optimized.specializations[0].plan.groups) == 4


@torch.no_grad()
def test_sd15_with_convolutional_projections() -> None:
    model, inputs = denoisers.sd15(), denoisers.sd15_inputs()
    optimized = toma_fx.optimize(
        model, scope="sublayer", tile=4, min_tokens=200, example_inputs=inputs
    )
    reference = reference_unet(model, {256: Settings((4, 4), 8)})
    assert denoisers.relative(optimized(**inputs)[0], reference(**inputs)[0]) < TOLERANCE
    assert denoisers.relative(optimized(**inputs)[0], model(**inputs)[0]) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["sdxl", "flux"])
@torch.no_grad()
def test_ratio_zero_is_bit_equal(name: str) -> None:
    model, make = getattr(denoisers, name)(), getattr(denoisers, f"{name}_inputs")
    optimized = toma_fx.optimize(model, ratio=0, example_inputs=make(seed=1))
    for seed in (1, 2, 3):
        assert torch.equal(optimized(**make(seed=seed))[0], model(**make(seed=seed))[0])
    assert optimized.totals == {"plain": 3}

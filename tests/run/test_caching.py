"""Steps that use kept updates, against the model, against formulas, and against an eager form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import toma_fx
from tests.denoisers import flux, flux_inputs, relative, sdxl, sdxl_inputs
from tests.reference import Settings, reference_flux, reference_unet
from tests.reference_cache import cached_blocks, newton
from toma_fx import CacheConfig, State
from toma_fx.errors import ConfigError

MODELS: dict[str, tuple[Any, Any]] = {"sdxl": (sdxl, sdxl_inputs), "flux": (flux, flux_inputs)}
MERGE: dict[str, Any] = {
    "ratio": 0.5,
    "scope": "block",
    "tile": 4,
    "min_tokens": 60,
    "destinations_every": 1,
    "weights_every": 1,
}
TIMES = (900.0, 870.0, 800.0, 790.0, 640.0, 600.0, 450.0)
"""Uneven, so that an extrapolation that counted steps would be off."""
SCOPES = [("sdxl", "stack"), ("sdxl", "block"), ("sdxl", "deep"), ("flux", "stack"),
          ("flux", "block")]  # fmt: skip


ROWS = {"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance"}
"""Arguments of Flux with a row for each picture."""


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def double(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: double(v) for k, v in value.items()}
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def calls(name: str, times: tuple[float, ...] = TIMES, **call: Any) -> list[dict[str, Any]]:
    """A call at each time: the same text, another picture."""
    make = MODELS[name][1]
    first = make(16, 16, **call)
    picture = "sample" if name == "sdxl" else "hidden_states"
    return [
        {**first, **{k: v for k, v in make(16, 16, timestep=t, seed=i, **call).items()
                     if k in (picture, "timestep")}}
        for i, t in enumerate(times)
    ]  # fmt: skip


def run(denoiser: Any, steps: list[dict[str, Any]]) -> list[Tensor]:
    """The outputs of a generation that is told."""
    outputs = []
    with denoiser.generation(steps=len(steps)) as generation:
        for i, call in enumerate(steps):
            generation.step(i)
            outputs.append(denoiser(**call)[0])
    return outputs


def flags(denoiser: Any, steps: int) -> list[bool]:
    """Which steps compute."""
    return list(denoiser.config_toma.caching.flags(steps))


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(("name", "scope"), SCOPES)
def test_equals_an_eager_implementation(name: str, scope: Any, order: int) -> None:
    model, steps = MODELS[name][0]().double(), [double(call) for call in calls(name)]
    cache = CacheConfig(every=3, order=order, scope=scope)
    denoiser = toma_fx.optimize(model, toma=False, cache=cache)
    outputs = run(denoiser, steps)
    computes = flags(denoiser, len(steps))
    with cached_blocks(model, scope=scope, order=order, computes=computes):
        expected = [model(**call)[0] for call in steps]
    for i, (a, b) in enumerate(zip(outputs, expected, strict=True)):
        assert relative(a, b) < 1e-5, i
    assert denoiser.totals == {"plain": sum(computes), "cached_plain": 7 - sum(computes)}
    off = [relative(model(**call)[0], b) for call, b in zip(steps, expected, strict=True)]
    assert max(off) > 1e-3  # a cached step is something else


def table(mask: tuple[int, ...], order: int) -> Any:
    """Weights that differ for every cached step, of the samples that there are then."""
    entries = []
    for i, time in enumerate(TIMES):
        known = min(sum(mask[:i]), order + 1)
        weights = [1.3 - 0.1 * i, -0.2 * i, 0.05 * i][:known]
        if not mask[i]:
            entries.append((time, (*weights, *[0.0] * (order + 1 - known))))
    return tuple(entries)


@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize(("name", "scope"), SCOPES)
def test_fitted_weights_equal_an_eager_implementation(name: str, scope: Any, order: int) -> None:
    model, steps = MODELS[name][0]().double(), [double(call) for call in calls(name)]
    mask = (1, 1, 0, 1, 0, 1, 0)
    fitted = table(mask, order)
    cache = CacheConfig(steps_mask=mask, order=order, scope=scope, fitted=fitted)
    denoiser = toma_fx.optimize(model, toma=False, cache=cache)
    outputs = run(denoiser, steps)
    computes = list(map(bool, mask))
    with cached_blocks(model, scope=scope, order=order, computes=computes, fitted=fitted):
        expected = [model(**call)[0] for call in steps]
    with cached_blocks(model, scope=scope, order=order, computes=computes):
        extrapolated = [model(**call)[0] for call in steps]
    for i, (a, b) in enumerate(zip(outputs, expected, strict=True)):
        assert relative(a, b) < 1e-5, i
    assert max(map(relative, outputs, extrapolated)) > 1e-3


def test_fitted_weights_of_each_row_are_those_of_its_timestep() -> None:
    model, mask = flux(), (1, 1, 0, 0, 1, 0, 0)
    cache = CacheConfig(steps_mask=mask, order=1, fitted=table(mask, 1), steps=7)
    denoiser = toma_fx.optimize(model, toma=False, cache=cache)
    steps = calls("flux")
    alone = run(denoiser, steps)
    states = [State(steps=7), State(steps=7)]
    for step in steps[:1]:  # the second request is a step behind
        _, states[0] = denoiser.step(step, states[0])
    for i in range(6):
        ahead, behind = steps[i + 1], steps[i]
        both = {k: torch.cat([ahead[k], behind[k]]) if k in ROWS else v for k, v in ahead.items()}
        output, states = denoiser.step(both, states)
        assert relative(output[0][:2], alone[i + 1]) < 1e-5, i
        assert relative(output[0][2:], alone[i]) < 1e-5, i


@pytest.mark.parametrize(
    "fields",
    [
        {"fitted": ((900.0, (1.0,)),)},  # too few weights
        {"fitted": ((900.0, (1.0, 0.0)), (800.0, (1.0, 0.0)))},  # too many entries
        {"fitted": ((900.0, (1.0, float("nan"))),)},
        {"fitted": 3},
        {"fitted": (5.0,)},
        {"fitted": ((900.0, (1.0, 0.0)),), "steps_mask": "fast"},
        {"fitted": ((900.0, (1.0, 0.0)),), "threshold": 0.1},
    ],
)
def test_fitted_weights_that_do_not_fit(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="fitted"):
        CacheConfig(**{"steps_mask": (1, 1, 0), "order": 1, **fields})


def test_fitted_weights_of_another_order_of_entries_are_the_same() -> None:
    entries = [(600.0, [1.0, 0.5]), (700.0, [2.0, -1.0])]
    cache = CacheConfig(steps_mask=[1, 1, 0, 0], order=1, fitted=entries)
    assert cache.fitted == ((700.0, (2.0, -1.0)), (600.0, (1.0, 0.5)))
    assert CacheConfig.of(cache.to_dict()) == cache
    assert hash(cache) == hash(CacheConfig.of(cache.to_dict()))


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_computing_every_step_is_no_caching(name: str) -> None:
    model, steps = MODELS[name][0](), calls(name, TIMES[:3])
    plain = [model(**call)[0] for call in steps]
    cached = run(toma_fx.optimize(model, toma=False, cache=1), steps)
    assert all(torch.equal(a, b) for a, b in zip(cached, plain, strict=True))
    merged = run(toma_fx.optimize(model, **MERGE), steps)
    both = run(toma_fx.optimize(model, cache=CacheConfig(every=1), **MERGE), steps)
    assert all(torch.equal(a, b) for a, b in zip(both, merged, strict=True))


@pytest.mark.parametrize(("name", "scope"), [*SCOPES, ("sdxl", "shallow")])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_frozen_input_gives_the_computed_step(name: str, scope: Any, ratio: float) -> None:
    model, call = MODELS[name][0]().double(), double(calls(name)[0])
    cache = CacheConfig(every=2, order=2 if name == "flux" else 0, scope=scope)
    denoiser = toma_fx.optimize(model, cache=cache, **{**MERGE, "ratio": ratio})
    *_, computed, cached = run(denoiser, [call] * (cache.most_order + 2))
    assert relative(cached, computed) < 1e-6
    assert next(k for k in denoiser.totals if k.startswith("cached"))


def test_linear_updates_are_extrapolated_exactly() -> None:
    """A block whose update is linear in the timestep and the same for all pictures."""
    model = Linear().double().eval()
    steps = [
        {"x": torch.randn(1, 16, 4, dtype=torch.double), "timestep": torch.tensor([t])}
        for t in TIMES
    ]
    for order in (1, 2):
        cache = CacheConfig(every=4, order=order, warmup_steps=order + 1)
        denoiser = toma_fx.optimize(model, toma=False, cache=cache, grid=(4, 4))
        for call, out in zip(steps, run(denoiser, [dict(s) for s in steps]), strict=True):
            torch.testing.assert_close(out, model(**call)[0], rtol=1e-5, atol=1e-5)
        assert denoiser.totals["cached_plain"] == 7 - sum(flags(denoiser, 7))


class Linear(torch.nn.Module):
    """x -> x + t * attention(constant) + constant."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(1, 16, 4))
        self.project = torch.nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor]:
        start = self.project(x)
        h = (start * 0 + self.table).unsqueeze(1)
        update = torch.nn.functional.scaled_dot_product_attention(h, h, h).squeeze(1)
        embedded = timestep + 0 * timestep.sin()
        x = start + update * embedded.view(-1, 1, 1)
        h = (x * 0 + self.table).unsqueeze(1)
        return (x + torch.nn.functional.scaled_dot_product_attention(h, h, h).squeeze(1),)


def kept_flux(
    model: Any, steps: list[dict[str, Any]], settings: Settings, computes: list[bool]
) -> Iterator[Tensor]:
    """Flux that merges in steps that compute, its whole stack extrapolated in the others."""
    entered, left = list[Tensor](), list[Tensor]()
    model.x_embedder.register_forward_hook(lambda module, args, x: entered.append(x))
    model.norm_out.register_forward_pre_hook(lambda module, args: left.append(args[0]))
    samples: list[tuple[float, Tensor]] = []
    for call, computing in zip(steps, computes, strict=True):
        time = float(call["timestep"][0])
        entered.clear(), left.clear()
        if computing:
            yield reference_flux(model, (16, 16), settings, call)
            samples.insert(0, (time, torch.cat(left) - torch.cat(entered)))
            continue
        x = model.x_embedder(call["hidden_states"])
        embedding = model.time_text_embed(call["timestep"] * 1000, call["pooled_projections"])
        yield model.proj_out(model.norm_out(x + newton(samples[:2], time), embedding))


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_merging_and_caching_equal_an_eager_implementation(name: str) -> None:
    model, steps = MODELS[name][0](), calls(name)
    denoiser = toma_fx.optimize(model, cache=CacheConfig(every=3, order=1, scope="stack"), **MERGE)
    outputs, computes = run(denoiser, steps), flags(denoiser, len(steps))
    settings = Settings((4, 4), 8, scope="block")
    if name == "flux":
        expected = list(kept_flux(model, steps, settings, computes))
    else:
        merging = reference_unet(model, {64: settings})
        with cached_blocks(merging, scope="stack", order=1, computes=computes):
            expected = [merging(**call)[0] for call in steps]
    for i, (a, b) in enumerate(zip(outputs, expected, strict=True)):
        assert relative(a, b) < 1e-5, i
    assert denoiser.totals == {"refresh": 3, "cached": 4}
    assert relative(outputs[0], model(**steps[0])[0]) > 1e-3  # it merges


@pytest.mark.parametrize("method", ["tomesd", "tofu", "todo", "ca-tome", "retom", "random"])
def test_what_still_computes_goes_on_merging(method: str) -> None:
    """The first block merges in cached steps, too, with the pattern of the step that computed."""
    model, call = flux(), calls("flux")[0]
    cache = CacheConfig(every=2, order=0, exclude="transformer_blocks.0*")
    caching = toma_fx.optimize(model, method=method, min_tokens=60, cache=cache)
    computed, cached = run(caching, [call] * 2)
    assert relative(cached, computed) < 1e-5
    assert caching.totals["cached"] == 1
    assert relative(computed, model(**call)[0]) > 1e-4
    plan = caching.specializations[0].plan
    assert 0 < len(plan.computed.segments) < len(plan.segments)

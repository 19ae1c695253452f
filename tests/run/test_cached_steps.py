"""Cached steps in all that runs: schedules, states, batches, passes, pipelines, compilers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from torch import Tensor

import toma_fx
from tests.denoisers import (
    relative,
    small_flux,
    small_flux_inputs,
    small_sdxl,
    small_sdxl_inputs,
)
from tests.diffusers_pipelines import flux as flux_pipeline
from tests.diffusers_pipelines import flux_img2img_call, flux_true_cfg_call
from tests.methods.test_methods import inputs, model
from tests.run.loops import denoiser as texted
from tests.run.loops import text_of
from toma_fx import CacheConfig, State
from toma_fx.errors import (
    CompanionError,
    ConfigError,
    DynamicError,
    GenerationError,
    GradientError,
    NoCacheSites,
    UnknownNameError,
)
from toma_fx.methods.cache import CACHES
from toma_fx.methods.cached_steps import POLICIES, Length, policy_mask
from toma_fx.run.schedule import Phase, Schedule, due


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def shown(cache: CacheConfig, steps: int | None = None, show: int = 20) -> str:
    """Steps that compute as C, the others as dots."""
    return "".join("C" if flag else "." for flag in cache.cached_steps.flags(steps)[:show])


# -- which steps compute --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "steps", "expected"),
    [
        ({"every": 1}, None, "C" * 20),
        ({"every": 3, "order": 0}, None, "C..C..C..C..C..C..C."),
        ({"every": 3, "order": 1}, None, "C..C..C..C..C..C..C."),
        ({"every": 4, "order": 2, "last_steps": 2}, 12, "C...C...C.CC"),
        ({"every": 9, "max_continuous_cached_steps": 2, "order": 0}, 8, "C..C..C."),
        ({"every": 2, "warmup_steps": 0.25, "last_steps": 0.1}, 20, "CCCCC.C.C.C.C.C.C.CC"),
        ({"every": 2, "warmup_steps": 0.25, "last_steps": 0.1, "order": 0}, 4, "C.CC"),
        ({"every": 3, "warmup_steps": 4}, 4, "CCCC"),
        ({"steps_mask": [1, 1, 0, 0, 1]}, 5, "CC..C"),
        ({"steps_mask": (1, 0, 0, 0, 0), "order": 0, "max_continuous_cached_steps": 2,
          "last_steps": 1}, 5, "C..CC"),
        ({"steps_mask": "scm-ultra"}, 28, "CCCC..C.....C......C.......C"),
        ({"steps_mask": "scm-ultra"}, 7, "C..C..C"),
        ({"steps_mask": "lossless"}, 20, "CCC.C.C..C..C...C..C"),
        ({"steps_mask": "balanced"}, 20, "CCC..C...C....C....C"),
        ({"steps_mask": "fast"}, 20, "CCC...C.....C......C"),
        ({"steps_mask": "fast"}, 4, "CCCC"),
        ({"steps_mask": "fast"}, 6, "CCC..C"),
    ],
)  # fmt: skip
def test_steps_that_compute(fields: dict[str, Any], steps: int | None, expected: str) -> None:
    assert shown(CacheConfig(**fields), steps, len(expected)) == expected
    assert steps in (None, len(expected))


def test_published_masks() -> None:
    """Counts that cache-dit publishes for its masks of 28 steps."""
    computed = {name: sum(policy_mask(name)) for name in POLICIES}
    assert computed == {"scm-slow": 18, "scm-medium": 15, "scm-fast": 11, "scm-ultra": 8}
    assert all(len(policy_mask(name)) == 28 for name in POLICIES)


def test_calls_of_a_solver_of_second_order_are_steps_together() -> None:
    """Heun's method calls 2 n - 1 times for n steps."""
    caching = CacheConfig(every=2, order=0, last_steps=1).cached_steps
    length = Length(13, order=2)
    assert length.steps == 7
    computed = [caching.computes(call, length) for call in range(13)]
    assert computed == [True, True, False, False] * 3 + [True]


def test_what_was_due_in_cached_steps_comes_in_the_next_that_computes() -> None:
    caching = CacheConfig(every=3, order=0).cached_steps
    cycle = ("refresh", "reuse", "reuse", "reuse", "reweigh")
    schedule = Schedule(0, None, (Phase(0, (), cycle, "cached"),), caching)
    kinds = [due(schedule, step) for step in range(10)]
    assert kinds == ["refresh", "cached", "cached", "reuse", "cached", "cached", "refresh",
                     "cached", "cached", "reweigh"]  # fmt: skip
    late = Schedule(4, 7, (Phase(0, (), ("refresh", "reuse"), "cached"),), caching)
    kinds = [due(late, step) for step in range(10)]
    assert kinds == ["plain", "cached_plain", "cached_plain", "plain", "cached", "cached",
                     "refresh", "cached", "cached_plain", "plain"]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "fields"),
    [
        (3, {"every": 3}),
        (True, {}),
        ("deepcache", {"every": 3, "order": 0, "scope": "deep"}),
        ({"every": 4, "order": 2}, {"every": 4, "order": 2}),
    ],
)
def test_what_cache_means(value: Any, fields: dict[str, Any]) -> None:
    config = toma_fx.optimize(model(), toma=False, cache=value).config_toma
    for name, expected in fields.items():
        assert getattr(config.cache, name) == expected
    assert json.loads(json.dumps(config.to_dict()))["cache"]["every"] == config.cache.every
    assert set(POLICIES) < set(CACHES)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: CacheConfig(every=0), ConfigError, "every"),
        (lambda: CacheConfig(order=3), ConfigError, "order"),
        (lambda: CacheConfig(scope="layer"), UnknownNameError, "scope"),  # type: ignore[arg-type]
        (lambda: CacheConfig(steps_mask="turbo"), UnknownNameError, "steps_mask"),
        (lambda: CacheConfig(steps_mask=(1, 2)), ConfigError, "steps_mask"),
        (lambda: CacheConfig(steps_mask=(1, 0, 0)), ConfigError, "order \\+ 1"),
        (lambda: CacheConfig(warmup_steps=1.5), ConfigError, "warmup_steps"),
        (lambda: CacheConfig(warmup_steps=9, steps=8), GenerationError, "longer"),
        (lambda: CacheConfig(steps_mask=(1, 1, 0), steps=4), GenerationError, "another length"),
        (lambda: CacheConfig(scope="deep", exclude="up*"), ConfigError, "deep"),
        (lambda: CacheConfig(overrides={"x": {"every": 3}}), UnknownNameError, "every"),
        (lambda: CacheConfig(threshold=0), ConfigError, "threshold"),
        (lambda: CacheConfig.of("deepcash"), UnknownNameError, "deepcache"),
        (lambda: CacheConfig.of({"evry": 3}), UnknownNameError, "every"),
        (lambda: CacheConfig.of(object()), ConfigError, "configuration"),
    ],
)
def test_bad_configurations(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


# -- running --------------------------------------------------------------------------------------


def generation(denoiser: Any, steps: int = 7, seed: int = 0) -> list[Tensor]:
    """The outputs of a generation that is told."""
    outputs = []
    with denoiser.generation(steps=steps) as run:
        for i in range(steps):
            run.step(i)
            outputs.append(denoiser(**inputs(seed=100 * seed + i, timestep=900.0 - 20 * i)))
    return outputs


def test_lengths_that_do_not_fit_are_refused_at_the_first_call() -> None:
    masked = toma_fx.optimize(model(), toma=False, cache={"steps_mask": (1, 1, 0, 1)})
    with pytest.raises(GenerationError, match="another length"):
        generation(masked)
    with pytest.raises(GenerationError, match="longer than the generation"):
        generation(toma_fx.optimize(model(), toma=False, cache={"warmup_steps": 8}))
    last = toma_fx.optimize(model(), toma=False, cache={"last_steps": 1})
    with pytest.raises(GenerationError, match="number of steps is not known"):
        last(**inputs())
    with pytest.raises(GenerationError, match="number of steps is not known"):
        last.step(inputs(), State())
    last.step(inputs(), State(steps=5))
    generation(last)


def test_what_can_not_be_cut_says_why() -> None:
    with pytest.raises(NoCacheSites, match="left out by cache include= or exclude="):
        toma_fx.explain(model(), inputs(), toma=False, cache=CacheConfig(exclude="*"))
    with pytest.raises(NoCacheSites, match="no skip connection joins"):
        toma_fx.explain(small_flux(), small_flux_inputs(), toma=False, cache="deepcache")
    with pytest.raises(UnknownNameError, match="matches nothing"):
        toma_fx.explain(model(), inputs(), toma=False, cache=CacheConfig(include="bloks.*"))


def test_it_is_not_mixed_with_the_caches_of_diffusers() -> None:
    from diffusers import FirstBlockCacheConfig

    flux = small_flux()
    flux.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(CompanionError, match="a cache skips parts of the model"):
        toma_fx.optimize(flux, toma=False, cache=2)(**small_flux_inputs())


def test_a_shallow_cut_computes_less_than_a_deep_one() -> None:
    """Of DeepCache's branches: the last skip connection, or the first of the finest level."""
    shares = {}
    for scope in ("deep", "shallow"):
        cache = {"every": 2, "order": 0, "scope": scope}
        report = toma_fx.explain(small_sdxl(), small_sdxl_inputs(), toma=False, cache=cache)
        assert report.flops_cached is not None
        shares[scope] = report.flops_cached / report.flops_before
    assert 0 < shares["shallow"] < shares["deep"] < 0.5


def test_gradients_are_refused() -> None:
    caching = toma_fx.optimize(model(), toma=False, cache=2)
    with torch.enable_grad(), pytest.raises(GradientError, match="caching off"):
        caching(**{**inputs(), "sample": inputs()["sample"].requires_grad_()})


def test_explain_and_summary_show_it() -> None:
    report = toma_fx.explain(small_flux(), small_flux_inputs(), toma=False, cache=3)
    text = str(report)
    assert "kept over steps" in text
    assert "MB are kept for each pass" in " ".join(text.split())
    assert report.kept_bytes == 2 * 2 * 64 * 32 * 4
    assert json.loads(report.to_json())["flops_cached"] < 0.1 * report.flops_before
    caching = toma_fx.optimize(model(), toma=False, cache=3)
    generation(caching)
    found = toma_fx.summary(caching)
    assert found.steps == {"plain": 3, "cached_plain": 4}
    assert "1 step in 3 computes" in str(found)


def test_states_of_the_caller_equal_a_generation() -> None:
    caching = toma_fx.optimize(
        model(), method="grid", min_tokens=1, cache=CacheConfig(every=3, order=2)
    )
    state, states = State(), []
    want = generation(caching, 8)
    for i in range(8):
        output, state = caching.step(inputs(seed=i, timestep=900.0 - 20 * i), state)
        states.append(state)
        assert torch.equal(output, want[i]), i
    assert caching.totals["cached"] == 2 * 5
    again, _ = caching.step(inputs(seed=4, timestep=820.0), states[3])
    assert torch.equal(again, want[4]), "a state may be used again"


@pytest.mark.parametrize("merges", [False, True])
def test_requests_at_different_steps_share_a_batch(merges: bool) -> None:
    """Each request in a mixed batch gets what it gets alone."""
    options: dict[str, Any] = {"method": "grid", "min_tokens": 1} if merges else {"toma": False}
    caching = toma_fx.optimize(model(), cache=CacheConfig(every=3, order=1), **options)

    def call(request: int, step: int) -> dict[str, Any]:
        return inputs(seed=10 * request + step, timestep=900.0 - 30 * step - request, batch=1)

    def together(*calls: dict[str, Any]) -> dict[str, Any]:
        return {
            "sample": torch.cat([c["sample"] for c in calls]),
            "timestep": torch.cat([c["timestep"].reshape(1) for c in calls]),
        }

    alone: dict[tuple[int, int], Tensor] = {}
    for request in (1, 2):
        state = State()
        for step in range(8):
            alone[request, step], state = caching.step(call(request, step), state)
    one, two = State(), State()
    _, one = caching.step(call(1, 0), one)
    _, one = caching.step(call(1, 1), one)
    for step in range(6):
        both = together(call(1, step + 2), call(2, step))
        out, (one, two) = caching.step(both, [one, two])
        assert relative(out[:1], alone[1, step + 2]) < 1e-5, step
        assert relative(out[1:], alone[2, step]) < 1e-5, step
    assert caching.totals["mixed" if merges else "mixed_plain"] == 4


def test_passes_keep_their_own_updates() -> None:
    caching = toma_fx.optimize(texted(), toma=False, cache=CacheConfig(every=2, order=0))
    outputs: dict[str, list[Tensor]] = {"cond": [], "uncond": []}
    for order in (("cond", "uncond"), ("cond",), ("uncond",)):
        with caching.generation(steps=4) as run:
            for i in range(4):
                for j, name in enumerate(("cond", "uncond")):
                    if name in order:
                        run.step(i, pass_=name)
                        call = inputs(seed=i, timestep=900.0 - i)
                        text = text_of(j + 1)
                        outputs[name].append(caching(**call, encoder_hidden_states=text))
    for both in outputs.values():
        assert all(torch.equal(a, b) for a, b in zip(both[:4], both[4:], strict=True))
    assert not torch.equal(outputs["cond"][1], outputs["uncond"][1])


def test_a_pass_that_missed_a_computed_step_computes() -> None:
    caching = toma_fx.optimize(model(), toma=False, cache=CacheConfig(every=2, order=0))
    with caching.generation(steps=6) as run:
        for i in (0, 1, 3):
            run.step(i, pass_="late")
            caching(**inputs(seed=i, timestep=900.0 - i))
    assert caching.totals == {"plain": 2, "cached_plain": 1}


def test_a_changed_model_and_a_new_prompt_compute() -> None:
    flux = small_flux()
    caching = toma_fx.optimize(flux, toma=False, cache=CacheConfig(every=9, order=0))
    call = small_flux_inputs()
    caching(**{**call, "timestep": call["timestep"]})
    caching(**{**call, "timestep": call["timestep"] - 0.1})
    assert caching.totals == {"plain": 1, "cached_plain": 1}
    flux.transformer_blocks[0].attn.to_q = torch.nn.Linear(32, 32).eval()
    caching(**{**call, "timestep": call["timestep"] - 0.2})
    assert caching.totals == {"plain": 2, "cached_plain": 1}
    other = {**call, "encoder_hidden_states": torch.randn_like(call["encoder_hidden_states"])}
    caching(**{**other, "timestep": call["timestep"] - 0.3})
    assert caching.totals == {"plain": 3, "cached_plain": 1}


def test_kept_tensors_stay_where_they_are() -> None:
    caching = toma_fx.optimize(model(), toma=False, cache=CacheConfig(every=2, order=1))
    generation(caching)
    with caching.generation(steps=7) as run:
        places = []
        for i in range(7):
            run.step(i)
            caching(**inputs(seed=i, timestep=900.0 - 20 * i))
            places.append({n: x.data_ptr() for n, x in caching.states[0].buffers.items()})
    assert set(places[-1]) == {"update_u0_0", "update_u0_1", "update_time_0", "update_time_1"}
    assert places[2] == places[-1]


def test_compiled_programs_are_made_once() -> None:
    caching = toma_fx.optimize(
        model(), method="grid", min_tokens=1, cache=CacheConfig(every=3, order=1)
    )
    want = generation(caching)
    caching.compile()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for got in (generation(caching), generation(caching)):
            for a, b in zip(got, want, strict=True):
                assert relative(a, b) < 1e-5


def test_the_back_end_caches() -> None:
    own = model.__wrapped__()
    compiled = torch.compile(
        own, backend="toma_fx", options={"toma": False, "cache": {"every": 2, "order": 0}}
    )
    caching = toma_fx.optimize(model(), toma=False, cache=CacheConfig(every=2, order=0))
    for i in range(4):
        call = inputs(seed=i, timestep=900.0 - i)
        assert relative(compiled(**call), caching(**call)) < 1e-5
    assert caching.totals == {"plain": 2, "cached_plain": 2}


# -- pipelines ------------------------------------------------------------------------------------


def test_a_pipeline_tells_how_many_steps_there_are() -> None:
    pipe = toma_fx.optimize(flux_pipeline(), toma=False, cache={"every": 2, "last_steps": 1})
    flux_true_cfg_call(pipe, num_inference_steps=5)
    assert pipe.transformer.totals == {"plain": 2 * 3, "cached_plain": 2 * 2}


def test_steps_of_img2img_are_those_that_run() -> None:
    from diffusers import FluxImg2ImgPipeline

    pipe = toma_fx.optimize(
        flux_pipeline(FluxImg2ImgPipeline),
        toma=False,
        cache={"every": 9, "warmup_steps": 0.5, "last_steps": 1, "order": 0},
    )
    flux_img2img_call(pipe, num_inference_steps=8, strength=0.5)
    assert pipe.transformer.totals == {"plain": 2 * 3, "cached_plain": 2 * 1}


def test_both_calls_of_a_step_of_heun_compute_or_do_not() -> None:
    from tests.diffusers_pipelines import sdxl, sdxl_call

    pipe = sdxl()
    pipe.scheduler = HeunDiscreteScheduler()
    pipe = toma_fx.optimize(pipe, toma=False, cache={"every": 2, "order": 0, "last_steps": 1})
    sdxl_call(pipe, num_inference_steps=5)
    # calls:  0 0 1 1 2 2 3 3 4
    assert pipe.unet.totals == {"plain": 5, "cached_plain": 4}


# -- thresholds -----------------------------------------------------------------------------------


def test_a_threshold_lets_steps_compute_that_need_not() -> None:
    counts = []
    for threshold in (1e-9, 1e9):
        cache = CacheConfig(every=4, order=0, threshold=threshold)
        caching = toma_fx.optimize(model(), toma=False, cache=cache)
        generation(caching, 9)
        counts.append(caching.totals)
    # nothing is known of the pace before two steps have computed
    assert counts == [{"plain": 9}, {"plain": 4, "cached_plain": 5}]
    with pytest.raises(DynamicError, match="calibrate_cache"):
        toma_fx.export.export_programs(caching, inputs())
    with pytest.raises(DynamicError, match="calibrate_cache"):
        caching.step(inputs(), State())


def test_calibration_finds_the_steps_that_need_not_compute() -> None:
    def draw(denoiser: Any, seed: int) -> None:
        """Four steps that are alike, then one that is another, and again four."""
        for i in range(9):
            sample = inputs(seed=seed if i < 4 else seed + 1, timestep=900.0)["sample"]
            with_time = {"sample": sample, "timestep": torch.tensor([900.0 - 0.01 * i] * 2)}
            denoiser(**with_time)

    def run(denoiser: Any, seed: int) -> None:
        draw(denoiser, seed)

    cache = CacheConfig(order=0)
    found = toma_fx.calibrate_cache(model(), [{"seed": 1}, {"seed": 5}], 0.05, cache=cache, run=run)
    assert found.steps_mask == (1, 0, 0, 0, 1, 0, 0, 0, 0)
    assert found.steps == 9
    with pytest.raises(ConfigError, match="nothing to calibrate with"):
        toma_fx.calibrate_cache(model(), [])
    with pytest.raises(ConfigError, match="threshold"):
        toma_fx.calibrate_cache(model(), [{}], -1.0)


def test_calibration_of_a_pipeline_leaves_it_as_it_was() -> None:
    pipe = flux_pipeline()
    before, kind = pipe.transformer, type(pipe)

    def draw(_: Any, steps: int) -> None:
        flux_true_cfg_call(pipe, num_inference_steps=steps)

    found = toma_fx.calibrate_cache(pipe, [{"steps": 6}], 1e9, run=draw)
    assert (found.steps_mask, found.order) == ((1, 0, 0, 0, 0, 0), 0)
    assert pipe.transformer is before
    assert type(pipe) is kind
    with pytest.raises(ConfigError, match="differ in length"):
        toma_fx.calibrate_cache(pipe, [{"steps": 4}, {"steps": 5}], run=draw)

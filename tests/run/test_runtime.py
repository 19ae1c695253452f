"""Running: schedule, state, compiled programs, fixed signatures, NaN."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx

import toma_fx
from tests import denoisers
from tests.logs import logged
from tests.methods.test_methods import inputs as picture
from tests.methods.test_methods import model
from toma_fx.errors import SignatureError
from toma_fx.methods.toma import ToMAConfig
from toma_fx.passes.uses import REFRESH, REUSE
from toma_fx.run.schedule import Schedule, due, runnable

SMALL: dict[str, Any] = {"min_tokens": 60, "tile": 4}


def one_block() -> Any:
    """Flux with one double block."""
    return denoisers.small_flux(num_single_layers=0)


def steps(optimized: Any, count: int, make: Any = picture, start: float = 900.0) -> list[str]:
    """Run `count` denoising steps with falling timesteps; the program of each."""
    done = []
    for i in range(count):
        before = optimized.totals
        optimized(**denoisers.at_step(make, i, start))
        done.extend(k for k, n in optimized.totals.items() if n != before.get(k, 0))
    return done


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"destinations_every": 4, "weights_every": 2},
            "refresh reuse reweigh reuse refresh reuse",
        ),
        ({"destinations_every": 3, "weights_every": 3}, "refresh reuse reuse refresh reuse reuse"),
        ({"first_step": 2}, "plain plain refresh reuse reuse reuse"),
        ({"last_step": 1}, "refresh reuse plain plain plain plain"),
        ({"ratio": 0.0}, "plain plain plain plain plain plain"),
    ],
)
@torch.no_grad()
def test_schedule(config: dict[str, Any], expected: str) -> None:
    optimized = toma_fx.optimize(model(), **SMALL, **config)
    assert steps(optimized, 6) == expected.split()


def test_first_merged_step_refreshes_even_off_the_grid() -> None:
    config = ToMAConfig(destinations_every=4, first_step=3)
    kinds = {"reuse": REUSE, "refresh": REFRESH}
    assert due(Schedule.of(config), 5) == "reuse"
    assert due(Schedule.of(config), 2) == "plain"
    optimized = toma_fx.optimize(model(), **SMALL, destinations_every=4, first_step=3)
    specialization, _ = optimized.specialized((), picture())
    assert {name: specialization.use(name) for name in kinds} == kinds
    assert runnable("reuse", specialization, set()) == "refresh"
    assert runnable("reuse", specialization, set(specialization.gives("refresh"))) == "reuse"


@torch.no_grad()
def test_resets() -> None:
    optimized = toma_fx.optimize(denoisers.small_sdxl(), **SMALL)
    make = denoisers.small_sdxl_inputs
    assert steps(optimized, 2, make) == ["refresh", "reuse"]
    optimized.reset()
    assert steps(optimized, 2, make) == ["refresh", "reuse"], "after reset()"
    optimized._reset_stateful_cache()
    assert steps(optimized, 2, make) == ["refresh", "reuse"], "at the end of a pipeline call"
    assert steps(optimized, 2, make) == ["refresh", "reuse"], "when the timestep rises"
    assert steps(optimized, 2, make, start=500) == ["reuse", "reuse"], "not while it falls"


@torch.no_grad()
def test_patterns_live_in_buffers_with_fixed_addresses() -> None:
    optimized = toma_fx.optimize(
        denoisers.small_sdxl(), **SMALL, destinations_every=2, weights_every=1
    )
    steps(optimized, 1, denoisers.small_sdxl_inputs)
    before = {k: (v.data_ptr(), v.clone()) for k, v in optimized.states[0].buffers.items()}
    steps(optimized, 3, denoisers.small_sdxl_inputs, start=800)
    after = optimized.states[0].buffers
    assert {k: v.data_ptr() for k, v in after.items()} == {k: p for k, (p, _) in before.items()}
    assert any(not torch.equal(after[k], v) for k, (_, v) in before.items())


@torch.no_grad()
def test_signatures_have_their_own_programs_and_state() -> None:
    optimized = toma_fx.optimize(denoisers.small_sd15(), **SMALL)
    for height, width, batch in ((8, 8, 2), (8, 12, 1), (13, 19, 1)):
        call = denoisers.sd15_inputs(height, width, batch)
        out = optimized(**call)[0]
        assert out.shape == call["sample"].shape
        assert torch.isfinite(out).all()
    assert len(optimized.specializations) == 3


@torch.no_grad()
def test_captures_and_evictions_are_logged() -> None:
    with logged(logging.INFO) as infos, logged(logging.WARNING) as warnings:
        optimized = toma_fx.optimize(model(), **SMALL, max_signatures=1)
        optimized(**picture())
        (first,) = [m for m in infos if "captured a graph" in m]
        assert "sample 2x4x" in first
        count = len(infos) + len(warnings)
        optimized(**picture())
        assert len(infos) + len(warnings) == count, "nothing is captured"
        optimized(**picture(batch=1))
    (_, second) = [m for m in infos if "captured a graph" in m]
    assert "; sample is (1, 4, 16, 24) torch.float32, was (2, 4, 16, 24) torch.float32" in second
    dropped = next(m for m in warnings if "dropped" in m)
    assert "sample 2x4x" in dropped
    assert "dropped (max_signatures=1); the next call" in dropped


THRASHING = {"each once": (1, False, 1), "each twice": (2, False, 0), "made ready": (1, True, 0)}


@pytest.mark.parametrize("how", THRASHING)
@torch.no_grad()
def test_thrashing_is_a_warning(how: str) -> None:
    """Calls in a row that find no graph."""
    times, ready, count = THRASHING[how]
    optimized: Any = toma_fx.optimize(model(), **SMALL)
    calls = [picture(batch=batch) for batch in range(1, 6)]
    with logged(logging.WARNING) as warnings:
        if ready:
            optimized.warmup(calls=calls)
        for call in calls:
            for _ in range(times):
                optimized(**call)
    found = [m for m in warnings if "the last 4 calls were captured one by one" in m]
    assert len(found) == count
    assert all("they differ in sample, timestep." in m for m in found)


@torch.no_grad()
def test_flux_grid_is_read_from_the_ids_of_each_generation() -> None:
    optimized = toma_fx.optimize(one_block(), **SMALL)
    optimized(**denoisers.flux_inputs(8, 16))
    wide = {**denoisers.flux_inputs(8, 16, seed=3), "img_ids": denoisers.ids(16, 8)}
    optimized.reset()
    optimized(**wide)
    grids = [s.plan.groups[0].setting.grid for s in optimized.specializations]
    assert grids == [(8, 16), (16, 8)]


@torch.no_grad()
def test_cache_contexts_keep_their_own_patterns() -> None:
    model = one_block()
    both, alone = (toma_fx.optimize(model, **SMALL) for _ in range(2))
    first, second = denoisers.flux_inputs(8, 16, seed=1), denoisers.flux_inputs(8, 16, seed=2)
    with both.cache_context("cond"):
        both(**first)
    with both.cache_context("uncond"):
        both(**second)
    alone(**first)
    other = denoisers.flux_inputs(8, 16, seed=3, timestep=0.4)
    later = {**first, **{k: other[k] for k in ("hidden_states", "timestep")}}
    with both.cache_context("cond"):
        got = both(**later)[0]
    assert torch.equal(got, alone(**later)[0])
    assert len(both.states) == 2


@pytest.mark.parametrize("how", ["torch.compile", "method"])
@torch.no_grad()
def test_one_compiled_program_per_use_and_no_recompilation(how: str) -> None:
    """With Inductor: refresh, reweigh, reuse and the unmerged program; Dynamo captures none."""
    config = {**SMALL, "destinations_every": 10, "weights_every": 5, "last_step": 44}
    optimized, eager = (toma_fx.optimize(model(), **config) for _ in range(2))
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(optimized) if how == "torch.compile" else optimized.compile()
    with logged(logging.INFO) as messages:
        for i in range(50):
            call = picture(seed=i, timestep=1000.0 - 20 * i)
            assert denoisers.relative(compiled(**call), eager(**call)) < 1e-4
    assert optimized.states[0].counts == {"refresh": 5, "reweigh": 4, "reuse": 36, "plain": 5}
    programs = [m.split()[3] for m in messages if m.startswith("compiled a program")]
    assert programs == ["(refresh)", "(reuse)", "(reweigh)", "(plain)"]
    assert not counters["stats"]
    assert not counters["graph_break"]


@torch.no_grad()
def test_nan_in_gives_nan_out() -> None:
    for name in ("small_sdxl", "small_flux"):
        model, make = getattr(denoisers, name)(), getattr(denoisers, f"{name}_inputs")
        optimized = toma_fx.optimize(model, **SMALL)
        bad = make()
        bad["sample" if name == "small_sdxl" else "hidden_states"][:] = float("nan")
        for _ in range(2):
            assert optimized(**bad)[0].isnan().all() == model(**bad)[0].isnan().all()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("sdxl", torch.bfloat16),
        ("sdxl", torch.float16),
        ("small_flux", torch.bfloat16),
        ("small_flux", torch.float16),
    ],
    ids=str,
)
@torch.no_grad()
def test_half_precision_models(name: str, dtype: torch.dtype) -> None:
    model = getattr(denoisers, name)().to(dtype)
    inputs = _cast(getattr(denoisers, f"{name}_inputs")(), dtype)
    plain = model(**inputs)[0].float()
    for scope in ("sublayer", "block", "stack"):
        optimized = toma_fx.optimize(model, **SMALL, scope=scope)
        out = optimized(**inputs)[0]
        assert out.dtype == dtype
        assert 1e-4 < (out.float() - plain).abs().mean() / plain.abs().mean() < 1
        assert len(optimized.specializations[0].plan.groups) == (1 if name == "small_flux" else 7)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {k: v if k.endswith("ids") else _cast(v, dtype) for k, v in value.items()}
    return (
        value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    )


@torch.no_grad()
def test_fixed_capture_refuses_other_shapes_by_name() -> None:
    optimized = toma_fx.optimize(
        denoisers.small_flux(), **SMALL, example_inputs=denoisers.flux_inputs(8, 8)
    )
    with pytest.raises(SignatureError) as caught:
        optimized(**denoisers.flux_inputs(8, 10))
    assert caught.value.where == "hidden_states"
    assert "(2, 64, 4)" in caught.value.expected
    assert "(2, 80, 4)" in caught.value.got
    assert optimized(**denoisers.flux_inputs(8, 8))[0].shape == (2, 64, 4)


@torch.no_grad()
def test_positional_and_keyword_calls_are_one_signature() -> None:
    optimized = toma_fx.optimize(denoisers.small_sdxl(), **SMALL)
    call = denoisers.small_sdxl_inputs()
    by_name = optimized(**call)[0]
    rest = {k: call[k] for k in ("added_cond_kwargs", "return_dict")}
    by_place = optimized(call["sample"], call["timestep"], call["encoder_hidden_states"], **rest)[0]
    assert len(optimized.specializations) == 1
    assert torch.equal(by_name, by_place)


@torch.no_grad()
def test_return_dict_and_number_timesteps() -> None:
    model = denoisers.small_sdxl()
    optimized = toma_fx.optimize(model, ratio=0)
    inputs = {**denoisers.small_sdxl_inputs(), "return_dict": True, "timestep": 7}
    assert type(optimized(**inputs)) is type(model(**inputs))
    assert torch.equal(optimized(**inputs).sample, model(**inputs).sample)
    optimized(**{**inputs, "timestep": 6})
    assert len(optimized.specializations) == 1, "a number as timestep is not baked in"


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_no_gradients_are_kept_whatever_the_mode(mode: Any) -> None:
    model = one_block().requires_grad_(True)
    optimized = toma_fx.optimize(model, **SMALL, destinations_every=2, weights_every=1)
    with mode():
        for i in range(4):
            out = optimized(**denoisers.at_step(denoisers.small_flux_inputs, i))[0]
            assert not out.requires_grad
    assert not any(p.requires_grad for p in optimized.states[0].buffers.values())
    assert optimized.states[0].last == 3


@torch.no_grad()
def test_parameters_are_shared_and_the_model_is_untouched() -> None:
    model = denoisers.small_sdxl()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    inputs = denoisers.small_sdxl_inputs()
    want = model(**inputs)[0]
    optimized = toma_fx.optimize(model, **SMALL)
    merged = optimized(**inputs)[0]
    own = {id(p) for p in model.parameters()}
    for specialization in optimized.specializations:
        for program in specialization.programs.values():
            assert {id(p) for p in program.graph_module.parameters()} <= own
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(**inputs)[0], want)
    next(iter(model.parameters())).mul_(2)
    optimized.reset()
    assert not torch.equal(optimized(**inputs)[0], merged), "a changed weight shows at once"


def test_stands_in_for_the_model() -> None:
    model = denoisers.sdxl()
    optimized = toma_fx.optimize(model)
    assert isinstance(optimized, type(model))
    assert optimized.config is model.config
    assert optimized.dtype == torch.float32
    assert toma_fx.optimize(optimized).denoiser is model, "optimize twice wraps once"
    with pytest.raises(AttributeError):
        optimized.no_such_attribute  # noqa: B018


@pytest.mark.parametrize(
    "options",
    [
        {"inverse": "pinv", "scale": 20.0},
        {"window": "stripe", "tile": 2},
        {"window": "global"},
        {"toma": "paper-flux", "tiles": 16},
    ],
)
@torch.no_grad()
def test_methods_variants_run_refresh_and_reuse(options: dict[str, Any]) -> None:
    model = one_block()
    optimized = toma_fx.optimize(model, **{"min_tokens": 60, **options})
    outs = [optimized(**denoisers.flux_inputs(8, 8, timestep=t))[0] for t in (0.9, 0.8)]
    assert all(torch.isfinite(out).all() for out in outs)
    assert optimized.states[0].counts == {"refresh": 1, "reuse": 1}
    plain = model(**denoisers.flux_inputs(8, 8, timestep=0.9))[0]
    assert 1e-3 < denoisers.relative(outs[0], plain) < 2


@pytest.mark.parametrize("how", ["torch.compile", "method"])
@torch.no_grad()
def test_weights_and_patterns_are_static_inputs_of_compiled_programs(how: str) -> None:
    """CUDA graphs copy every input that is not static at each call."""
    fresh: list[int] = []

    def backend(gm: Any, inputs: Any) -> Any:
        return compile_fx(gm, inputs, inner_compile=denoisers.counting_inner_compile(fresh))

    torch._dynamo.reset()
    optimized = toma_fx.optimize(model(), **SMALL)
    compiled: Any = (
        torch.compile(optimized, backend=backend)
        if how == "torch.compile"
        else optimized.compile(backend=backend)
    )
    with torch._functorch.config.patch(enable_autograd_cache=False):
        for i in range(2):
            compiled(**picture(timestep=900.0 - i))
    # latents and timestep
    assert fresh == [2, 2]


def test_options_of_compile_reach_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another back end than Inductor is asked for."""
    options: list[dict[str, Any]] = []

    def compile_module(module: Any, backend: Any = None, **kwargs: Any) -> Any:
        options.append({"backend": backend, **kwargs})
        return module

    monkeypatch.setattr(torch, "compile", compile_module)
    optimized = toma_fx.optimize(one_block(), **SMALL)
    optimized.compile("cudagraphs", fullgraph=True, dynamic=True)
    for timestep in (0.9, 0.8):
        optimized(**denoisers.flux_inputs(8, 8, timestep=timestep))
    assert options == 2 * [{"backend": "cudagraphs", "fullgraph": True, "dynamic": True}]

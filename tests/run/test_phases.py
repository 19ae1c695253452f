"""Configurations that change over the steps: each phase against a denoiser that has no others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import toma_fx
from tests.denoisers import relative, small_sdxl
from tests.export.in_process import InProcess, opened
from tests.methods.test_methods import inputs, model
from tests.reference import Settings, reference_unet
from tests.run.test_caching import MODELS, calls, run
from toma_fx import CacheConfig, State, ToMAConfig
from toma_fx.errors import ConfigError, GenerationError, StateError, TomaError, UnknownNameError
from toma_fx.export.builder import export
from toma_fx.methods.cached_steps import Length
from toma_fx.run.schedule import Schedule, due

EACH_STEP: dict[str, Any] = {
    "scope": "block", "tile": 4, "min_tokens": 60, "destinations_every": 1, "weights_every": 1
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_every_phase_computes_what_it_does_alone() -> None:
    net, steps = MODELS["flux"][0](), calls("flux")
    ratio = ((0, 0.5), (0.4, 0.0), (0.7, 0.25))
    outputs = run(toma_fx.optimize(net, **EACH_STEP, ratio=ratio), steps)
    alone = [run(toma_fx.optimize(net, **EACH_STEP, ratio=r), steps) for r in (0.5, 0.0, 0.25)]
    for i, phase in enumerate((0, 0, 0, 1, 1, 2, 2)):  # 0.4 and 0.7 of 7 steps, rounded up
        assert torch.equal(outputs[i], alone[phase][i]), i
    assert relative(alone[0][0], alone[2][0]) > 1e-3


def test_equals_an_eager_implementation() -> None:
    net, steps = MODELS["sdxl"][0](), calls("sdxl")[:4]
    phases = ((2, {"overrides": {"*": {"ratio": 0.75}}}),)
    denoiser = toma_fx.optimize(net, **EACH_STEP, ratio=0.5, phases=phases)
    keeps = (8, 8, 4, 4)  # of the 16 tokens of a window
    for output, call, keep in zip(run(denoiser, steps), steps, keeps, strict=True):
        settings = Settings(tile=(4, 4), keep=keep, scope="block")
        reference = reference_unet(net, dict.fromkeys((64, 256), settings))
        assert relative(output, reference(**call)[0]) < 1e-5
    assert denoiser.totals == {"refresh": 2, "refresh_1": 2}


def test_patterns_are_selected_where_a_phase_begins() -> None:
    denoiser = toma_fx.optimize(small_sdxl(), **{**EACH_STEP, "destinations_every": 4,
                                "weights_every": 2}, ratio=((0, 0.5), (3, 0.25)))  # fmt: skip
    kinds = [due(Schedule.of(denoiser.config_toma), step) for step in range(9)]
    assert kinds == ["refresh", "reuse", "reweigh", "refresh_1", "reuse_1", "reweigh_1",
                     "reuse_1", "refresh_1", "reuse_1"]  # fmt: skip


@pytest.mark.parametrize("scope", ["stack", "deep"])
def test_updates_are_kept_from_one_phase_to_the_next(scope: Any) -> None:
    """A phase that changes nothing is no phase."""
    net, steps = MODELS["sdxl"][0](), calls("sdxl")
    cache = CacheConfig(every=3, order=1, scope=scope)
    one = toma_fx.optimize(net, **EACH_STEP, ratio=0.5, cache=cache)
    two = toma_fx.optimize(net, **EACH_STEP, ratio=((0, 0.5), (3, 0.5)), cache=cache)
    for i, (a, b) in enumerate(zip(run(one, steps), run(two, steps), strict=True)):
        assert torch.equal(a, b), i
    assert one.totals["cached"] == 4
    assert {kind for kind in two.totals if kind.endswith("_1")} >= {"refresh_1"}
    programs = two.specializations[0].programs
    plans = two.specializations[0].plan.phases
    assert ("cached_1" in programs) == bool(plans[1].computed.segments)


def test_what_was_due_in_cached_steps_of_a_phase() -> None:
    fields = {"destinations_every": 4, "cache": CacheConfig(every=3, order=0)}
    config = ToMAConfig(ratio=((0, 0.5), (0.5, 0.0), (0.8, 0.25)), **fields)
    schedule = Schedule.of(config)
    kinds = [due(schedule, step, length=Length(10)) for step in range(10)]
    assert kinds == ["refresh", "cached", "cached", "reuse", "cached", "cached_plain", "plain",
                     "cached_plain", "cached_2", "refresh_2"]  # fmt: skip
    # of a solver that calls twice a step; steps between selections count calls
    twice = [due(schedule, call, length=Length(20, order=2)) for call in range(10, 20)]
    assert twice[:6] == ["cached_plain"] * 2 + ["plain"] * 2 + ["cached_plain"] * 2
    assert twice[6:] == ["cached_2", "cached_2", "refresh_2", "reuse_2"]


def test_requests_of_one_phase_share_a_batch() -> None:
    fields = {**EACH_STEP, "destinations_every": 2, "weights_every": 2}
    denoiser = toma_fx.optimize(model(), **fields, ratio=((0, 0.5), (1, 0.25)))
    early, late = State(), State()
    for seed in range(2):
        _, late = denoiser.step(inputs(seed=seed), late)
    _, early = denoiser.step(inputs(seed=2), early)
    calls = [inputs(seed=3), inputs(seed=4)]
    alone = [denoiser.step(c, s)[0] for c, s in zip(calls, (early, late), strict=True)]
    pair = {k: torch.cat([v, calls[1][k]]) if torch.is_tensor(v) and v.dim() else v
            for k, v in calls[0].items()}  # fmt: skip
    both, _ = denoiser.step(pair, [early, late])
    assert relative(both, torch.cat(alone)) < 1e-5
    counts = {"refresh": 2, "refresh_1": 2, "reuse_1": 1, "mixed_1": 1}
    assert denoiser.totals == counts


def test_requests_of_two_phases_do_not() -> None:
    denoiser = toma_fx.optimize(model(), **EACH_STEP, ratio=((0, 0.5), (1, 0.25)))
    _, state = denoiser.step(inputs(), State())
    pair = {k: torch.cat([v, v]) if torch.is_tensor(v) and v.dim() else v
            for k, v in inputs(seed=1).items()}  # fmt: skip
    with pytest.raises(StateError, match="no program serves"):
        denoiser.step(pair, [state, State()])


def test_in_an_artifact(tmp_path: Path) -> None:
    ratio = ((0, 0.5), (0.5, 0.25))
    fields = {**EACH_STEP, "destinations_every": 2, "weights_every": 2}
    cache = CacheConfig(every=2, order=1, warmup_steps=2)
    optimized = toma_fx.optimize(model(), **fields, ratio=ratio, cache=cache)
    target = InProcess()
    manifest = export(optimized, inputs(), tmp_path / "a", target)
    loaded = opened(target, tmp_path / "a")
    steps = [inputs(seed=i, timestep=900.0 - 10 * i - i**2) for i in range(8)]
    outputs = [], []
    for denoiser, found in zip((optimized, loaded), outputs, strict=True):
        with denoiser.generation(steps=8) as generation:
            for i, call in enumerate(steps):
                generation.step(i)
                found.append(denoiser(**call))
    for a, b in zip(*outputs, strict=True):
        assert relative(a, b) < 1e-5
    kinds = "refresh reuse cached refresh cached refresh_1 cached refresh_1"
    assert manifest.calls[0].kinds(8) == kinds.split()
    assert "cached_1" not in manifest.calls[0].programs, (
        "nothing merges in a cached step, in any phase"
    )


def test_in_the_back_end() -> None:
    options = {**EACH_STEP, "ratio": ((0, 0.5), (1, 0.25))}
    net = model()
    compiled = torch.compile(net, backend="toma_fx", options=options)
    merged = toma_fx.optimize(net, **options)
    for i, t in enumerate((900.0, 800.0, 700.0)):
        call = inputs(seed=i, timestep=t)
        assert relative(compiled(**call), merged(**call)) < 1e-5


def test_explain_tells_the_phases() -> None:
    report = toma_fx.explain(model(), inputs(), **EACH_STEP, ratio=((0, 0.5), (0.5, 0.25)))
    rows = {(row.phase, row.merged) for row in report.rows}
    assert {phase for phase, _ in rows} == {0, 1}
    assert ", from step 15" in str(report)
    fine = toma_fx.explain(model(), inputs(), **EACH_STEP, ratio=0.25)
    coarse = toma_fx.explain(model(), inputs(), **EACH_STEP, ratio=0.5)
    assert coarse.flops_after < report.flops_after < fine.flops_after
    assert report.flops_after == pytest.approx((coarse.flops_after + fine.flops_after) / 2)


def test_a_share_needs_the_number_of_steps() -> None:
    denoiser = toma_fx.optimize(model(), **EACH_STEP, ratio=((0, 0.5), (0.5, 0.25)))
    with pytest.raises(GenerationError, match="number of steps is not known"):
        denoiser(**inputs())
    _, state = denoiser.step(inputs(), State(steps=2))
    denoiser.step(inputs(), state)
    assert denoiser.totals == {"refresh": 1, "refresh_1": 1}


def test_both_forms_are_one() -> None:
    short = ToMAConfig(ratio=((0, 0.5), (0.6, 0.25)))
    assert short == ToMAConfig(ratio=0.5, phases=((0.6, {"ratio": 0.25}),))
    assert short.phases == ((0.6, (("ratio", 0.25),)),)
    assert hash(short) != hash(ToMAConfig(ratio=0.5))
    said = short.to_dict()
    assert toma_fx.methods.config.make_config(True, said.pop("method"), said) == short


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"ratio": ((0.5, 0.5),)}, ConfigError, "not of its form"),
        ({"ratio": ()}, ConfigError, "not of its form"),
        ({"ratio": ((0, 0.5), (0.5, 1.5))}, ConfigError, "ratio is out of range"),
        ({"ratio": ((0, 0.5), (0.5, 0.2)), "phases": ((3, {}),)}, ConfigError, "not of its form"),
        ({"phases": ((0, {"ratio": 0.1}),)}, ConfigError, "begins after 0 that rise"),
        ({"phases": ((0.5, {}), (3, {}))}, ConfigError, "begins after 0 that rise"),
        ({"phases": ((4, {}), (3, {}))}, ConfigError, "begins after 0 that rise"),
        ({"phases": ((4, {"ratoi": 0.1}),)}, UnknownNameError, "ratio"),
        ({"phases": ((4, {"cache": 2}),)}, UnknownNameError, "can't change over the steps"),
        ({"phases": 3}, ConfigError, "not of its form"),
        ({"overrides": {"*": {"ratio": ((0, 0.5), (3, 0.2))}}}, ConfigError, "overridden per path"),
    ],
)
def test_bad_phases(fields: dict[str, Any], error: type[TomaError], match: str) -> None:
    with pytest.raises(error, match=match):
        ToMAConfig(**fields)


def test_phases_of_other_scopes_keep_the_same_updates() -> None:
    cache = CacheConfig(every=2, scope="block")
    phases = ((1, {"scope": "stack", "branches": "attention"}),)
    denoiser = toma_fx.optimize(
        model(), **EACH_STEP, cache=cache, phases=phases, example_inputs=inputs()
    )
    first, second = denoiser.specializations[0].plan.phases
    assert first.cache is not None
    assert second.cache is not None
    assert first.cache.updates == second.cache.updates
    assert {s.scope for s in first.segments} != {s.scope for s in second.segments}


def test_the_ratios_of_sdtm_are_means_of_a_half_cosine() -> None:
    config = toma_fx.PRESETS["sdtm-stages"]
    assert [begin for begin, _ in config.phases] == [0.25, 0.5, 0.75]
    times = (torch.arange(4000).double() + 0.5) / 4000
    means = (0.3 + 0.2 * torch.cos(torch.pi * times)).view(4, 1000).mean(1)
    for stage, mean in zip(config.stages, means.tolist(), strict=True):
        assert stage.ratio == pytest.approx(mean, abs=0.006)  # type: ignore[attr-defined]

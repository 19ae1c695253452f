"""Configurations that change between calls: `using`, `disable_merging`, `enable_merging`."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import toma_fx
from tests import denoisers
from tests.logs import logged
from tests.methods.test_methods import ALL, CLASSES, inputs, model
from toma_fx.errors import ConfigError, DynamicError, RecipeError, UnknownNameError
from toma_fx.run.switches import VARIANTS


def optimized(*args: Any, **options: Any) -> Any:
    return toma_fx.optimize(model(), *args, min_tokens=1, **options)


@torch.no_grad()
def run(denoiser: Any, steps: int = 3) -> list[Tensor]:
    """A generation."""
    with denoiser.generation(steps):
        return [denoiser(**inputs(seed=i, timestep=900.0 - i)) for i in range(steps)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(map(torch.equal, left, right))


@pytest.mark.parametrize("name", ALL)
def test_merging_off_is_the_original_and_on_as_before(name: str) -> None:
    denoiser = optimized(method=CLASSES[name])
    merged = run(denoiser)
    assert denoiser.is_merging_enabled
    denoiser.disable_merging()
    assert not denoiser.is_merging_enabled
    assert same(run(denoiser), original())
    denoiser.enable_merging()
    assert same(run(denoiser), merged)
    assert not same(merged, original())
    assert denoiser.cache.captures == 1
    assert len(denoiser.specializations) == 2


@torch.no_grad()
def original(steps: int = 3) -> list[Tensor]:
    return [model()(**inputs(seed=i, timestep=900.0 - i)) for i in range(steps)]


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((), {"ratio": 0.25}),
        ((0.25,), {}),
        ((0.25,), {"scope": "block"}),
        ((), {"method": "tomesd"}),
        (("lossless",), {}),
        ((toma_fx.ToDoConfig(min_tokens=1),), {}),
        ((False,), {}),
        ((), {"destinations_every": 2}),
    ],
)
def test_a_configuration_for_some_calls(args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """As a denoiser that has it alone, and the one outside is as before."""
    denoiser = optimized(ratio=0.5)
    before = run(denoiser)
    with denoiser.using(*args, **options):
        inside = run(denoiser)
        config = denoiser.config_toma
    assert same(run(denoiser), before)
    alone: Any = toma_fx.optimize(model(), config)
    assert same(inside, run(alone))
    assert not same(inside, before) or "destinations_every" in options
    assert denoiser.cache.captures == 1


def test_every_configuration_is_compiled_once() -> None:
    compiled: list[fx.GraphModule] = []

    def count(graph_module: fx.GraphModule, _: Any) -> Any:
        compiled.append(graph_module)
        return graph_module.forward

    denoiser = optimized(ratio=0.5).compile(backend=count)
    merged, counts = run(denoiser), []
    for _ in range(2):
        for ratio in (0.25, 0.75):
            with denoiser.using(ratio):
                run(denoiser)
            counts.append(len(compiled))
        denoiser.disable_merging()
        assert torch.allclose(run(denoiser)[0], original()[0], atol=1e-6)
        denoiser.enable_merging()
        assert same(run(denoiser), merged)
        counts.append(len(compiled))
    assert counts[0] > 0
    assert counts[2:] == counts[2:3] * 4
    denoiser.compile(backend="eager")
    with denoiser.using(0.25):
        run(denoiser)
    assert len(compiled) == counts[-1], "all of them are compiled as was said last"


def test_a_schedule_of_its_own_shares_programs() -> None:
    denoiser = optimized(ratio=0.5)
    run(denoiser)
    with denoiser.using(destinations_every=1, weights_every=1):
        run(denoiser)
    outer, inner = denoiser.specializations
    assert outer.programs is inner.programs
    assert (outer.counts, inner.counts) == ({"refresh": 1, "reuse": 2}, {"refresh": 3})


def test_inside_a_generation_it_selects_anew() -> None:
    denoiser = optimized(ratio=0.5)
    with torch.no_grad(), denoiser.generation(steps=5) as told:
        results = []
        for i in range(5):
            told.step(i)
            call = inputs(seed=i, timestep=900.0 - i)
            if i in (1, 2):
                with denoiser.using(ratio=0.25):
                    results.append(denoiser(**call))
            else:
                results.append(denoiser(**call))
    assert denoiser.totals == {"refresh": 3, "reuse": 2}
    other = optimized(ratio=0.25)
    with torch.no_grad():
        assert torch.equal(results[1], other(**inputs(seed=1, timestep=899.0)))


def test_states_of_callers_switch_too() -> None:
    denoiser = optimized(ratio=0.5)
    state = toma_fx.State()
    with torch.no_grad():
        for i in range(3):
            denoiser.disable_merging() if i == 1 else denoiser.enable_merging()
            call = inputs(seed=i, timestep=900.0 - i)
            found, state = denoiser.step(call, state)
            assert torch.equal(found, model()(**call)) == (i == 1)


def test_other_threads_keep_theirs() -> None:
    denoiser = optimized(ratio=0.5)
    seen: list[float] = []
    with denoiser.using(ratio=0.25), denoiser.using(ratio=0.75):
        thread = threading.Thread(target=lambda: seen.append(denoiser.config_toma.ratio))
        thread.start()
        thread.join()
        seen.append(denoiser.config_toma.ratio)
    seen.append(denoiser.config_toma.ratio)
    assert seen == [0.5, 0.75, 0.5]
    denoiser.disable_merging()
    with denoiser.using(ratio=0.75):
        assert denoiser.is_merging_enabled, "what is nearer goes first"
    with denoiser.using():
        assert denoiser.config_toma.ratio == 0.5
    assert not denoiser.is_merging_enabled


def test_what_is_wrong_is_said_at_once() -> None:
    denoiser = optimized()
    for arguments, error, message in (
        ({"ration": 0.3}, UnknownNameError, "ratio"),
        ({"ratio": 3.0}, ConfigError, "ratio"),
        ({"toma": "fats"}, UnknownNameError, "fast"),
        ({"toma": False, "ratio": 0.3}, ConfigError, "toma=False"),
        ({"toma": toma_fx.Recipe(toma_fx.ToMAConfig(), model="Other")}, RecipeError, "Other"),
    ):
        with pytest.raises(error, match=message):
            denoiser.using(**arguments)
    denoiser.compile()
    with pytest.raises(DynamicError):
        denoiser.using(method="ca-tome", threshold=0.9, min_tokens=1)
    assert not len(denoiser.cache)


def test_merging_that_there_is_none_of() -> None:
    denoiser = optimized("lossless")
    with logged(logging.WARNING) as messages:
        denoiser.enable_merging()
    assert "no merging to enable" in messages[0]
    denoiser.disable_merging()
    assert denoiser.config_toma.caching is not None


def test_copies_merge_as_it_does() -> None:
    denoiser = optimized(ratio=0.5)
    for copied in (copy.deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser))):
        assert copied.is_merging_enabled
    denoiser.disable_merging()
    for copied in (copy.deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser))):
        assert not copied.is_merging_enabled
        copied.enable_merging()
        assert copied.config_toma == optimized(ratio=0.5).config_toma
    assert not denoiser.is_merging_enabled, "copies are apart"


def test_many_configurations_are_bounded() -> None:
    denoiser = optimized(ratio=0.5)
    for i in range(2 * VARIANTS):
        denoiser.using(ratio=0.1 + i / 1000)
    assert len(denoiser._variants) == VARIANTS
    before = run(denoiser)
    assert same(run(denoiser), before)
    assert denoiser.cache.captures == 1


@torch.no_grad()
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_whole_models_need_one_capture(family: str) -> None:
    module: Any = getattr(denoisers, family)()
    call = denoisers.sdxl_inputs() if family == "sdxl" else denoisers.flux_inputs(8, 8)
    denoiser: Any = toma_fx.optimize(module, min_tokens=1)
    plain, merged = module(**call)[0], denoiser(**call)[0]
    denoiser.disable_merging()
    assert torch.equal(denoiser(**call)[0], plain)
    with denoiser.using(ratio=0.25):
        less = denoiser(**call)[0]
    alone: Any = toma_fx.optimize(module, ratio=0.25, min_tokens=1)
    assert torch.equal(less, alone(**call)[0])
    assert not torch.equal(merged, less)
    assert denoiser.cache.captures == 1


def test_a_pipeline_whose_class_gets_another_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its generations are told as before, and run what the class has now."""

    class Pipeline:
        def __init__(self) -> None:
            self.unet = model()

        def __call__(self, steps: int = 2) -> list[Tensor]:
            calls = (inputs(seed=i, timestep=900.0 - i) for i in range(steps))
            with torch.no_grad():
                return [self.unet(**call) for call in calls]

    for steps in (2, 3):
        call = Pipeline.__call__
        monkeypatch.setattr(Pipeline, "__call__", lambda self, call=call, n=steps: call(self, n))
        pipe: Any = toma_fx.optimize(Pipeline(), min_tokens=1)
        assert len(pipe()) == steps
        assert pipe.unet.totals == {"refresh": 1, "reuse": steps - 1}
        monkeypatch.undo()

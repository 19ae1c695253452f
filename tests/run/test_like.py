"""Denoisers that share programs, and differ in when which one runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import toma_fx
from tests.methods.test_methods import inputs, model
from tests.run.test_caching import run
from toma_fx import CacheConfig, MethodConfig, ToMAConfig
from toma_fx.errors import ConfigError
from toma_fx.methods.planning import plan_key

SMALL: dict[str, Any] = {"min_tokens": 1}
SCHEDULES: tuple[dict[str, Any], ...] = (
    {"destinations_every": 2, "weights_every": 1},
    {"first_step": 1, "last_step": 2},
    {"select_at": (0, 2)},
    {"cache": CacheConfig(steps_mask=(1, 0, 0, 1))},
    {"cache": CacheConfig(every=3, last_steps=1)},
)


@torch.no_grad()
@pytest.mark.parametrize("fields", SCHEDULES)
def test_another_schedule_needs_no_other_programs(fields: dict[str, Any]) -> None:
    net, steps = model(), [inputs(seed=i, timestep=900.0 - 70 * i) for i in range(4)]
    cache = {"cache": 2} if "cache" in fields else {}
    first = toma_fx.optimize(net, **SMALL, **cache)
    run(first, steps)
    second = toma_fx.optimize(net, **SMALL, **fields, like=first)
    outputs = run(second, steps)
    own, other = second.specializations[0], first.specializations[0]
    assert own.captured is other.captured
    assert own.programs is other.programs
    assert sum(own.counts.values()) == 4, "they count for themselves"
    alone = run(toma_fx.optimize(net, **SMALL, **fields), steps)
    assert all(torch.equal(a, b) for a, b in zip(outputs, alone, strict=True))


@torch.no_grad()
def test_another_plan_has_its_own_programs() -> None:
    net = model()
    first = toma_fx.optimize(net, **SMALL, example_inputs=inputs())
    second = toma_fx.optimize(net, **SMALL, ratio=0.25, like=first, example_inputs=inputs())
    assert second.specializations[0].captured is first.specializations[0].captured
    assert second.specializations[0].programs is not first.specializations[0].programs
    alone = toma_fx.optimize(net, **SMALL, ratio=0.25)
    assert torch.equal(second(**inputs()), alone(**inputs()))
    assert (first.cache.captures, second.cache.captures, alone.cache.captures) == (1, 0, 1)
    compiled = toma_fx.optimize(net, **SMALL, like=first).compile(backend="eager")
    compiled(**inputs())
    assert compiled.specializations[0].runners is not first.specializations[0].runners


def test_like_is_of_the_same_model() -> None:
    other = toma_fx.optimize(model(), **SMALL)
    with pytest.raises(ConfigError, match="not of this model"):
        toma_fx.optimize(copy.deepcopy(model()), **SMALL, like=other)
    with pytest.raises(ConfigError, match="not of this model"):
        toma_fx.optimize(model(), **SMALL, like=model())


def test_what_a_plan_depends_on() -> None:
    base: MethodConfig = ToMAConfig(ratio=((0, 0.5), (4, 0.25)), cache=2)
    alike = ToMAConfig(ratio=((0, 0.5), (0.5, 0.25)), cache=CacheConfig(steps_mask="fast"))
    assert plan_key(base) == plan_key(alike)
    for other in (
        ToMAConfig(ratio=((0, 0.5), (4, 0.3)), cache=2),
        ToMAConfig(ratio=0.5, cache=2),
        ToMAConfig(ratio=((0, 0.5), (4, 0.25))),
        ToMAConfig(ratio=((0, 0.5), (4, 0.25)), cache=CacheConfig(order=2)),
    ):
        assert plan_key(base) != plan_key(other)

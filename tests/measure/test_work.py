"""Counted work and times taken in turn."""

from __future__ import annotations

import pytest

import toma_fx
from toma_fx.measure.cases import Case
from toma_fx.measure.subjects import EmbeddedSubject, Settings
from toma_fx.measure.work import Times, count_work, time_generations, time_in_turn
from toma_fx.models import tiny
from toma_fx.models.named import example

CASES = [Case("cat", 1)]


def test_a_generation_of_every_kind_of_step_is_counted() -> None:
    subject = EmbeddedSubject(tiny.load("tiny-sdxl"), Settings(steps=5))
    config = toma_fx.ToMAConfig(ratio=0.5, destinations_every=2, last_step=3)
    work = count_work(subject, CASES, config)
    assert work.steps == {"refresh": 2, "reuse": 2, "plain": 1}
    model, inputs = example("tiny-sdxl", batch=1)
    report = toma_fx.explain(model, inputs, config)
    assert work.flops_before == 5 * report.flops_before
    assert work.flops_after == (
        2 * report.flops_refresh + 2 * report.flops_after + report.flops_before
    )
    assert work.ideal_speedup > 1
    assert count_work(subject, CASES, config) == work, "only its own steps count"


def test_kept_bytes_are_those_of_the_report() -> None:
    subject = EmbeddedSubject(tiny.load("tiny-sdxl"), Settings(steps=6))
    work = count_work(subject, CASES, "balanced")
    model, inputs = example("tiny-sdxl", batch=1)
    report = toma_fx.explain(model, inputs, "balanced")
    # the report leaves out the few bytes of timesteps
    assert report.kept_bytes <= work.kept_bytes < report.kept_bytes * 1.01
    assert work.flops_after < work.flops_before


def test_times_are_taken_in_turn() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = time_in_turn(runs, rounds=3)
    assert order[:6] == list("abcabc")
    assert order[6:] == list("abcbcacab")
    assert all(len(t.seconds) == 3 for t in times.values())


def test_times_say_when_they_are_noisy() -> None:
    steady = Times(3.0, (1.0, 1.01, 0.99, 1.0, 1.02))
    assert steady.compile_s == pytest.approx(2.0)
    assert not steady.noisy
    assert Times(3.0, (1.0, 2.0, 0.5, 1.0, 3.0)).noisy
    assert Times(3.0, (1.0,)).spread == 0


def test_generations_are_timed_by_configuration() -> None:
    subject = EmbeddedSubject(tiny.load("tiny-flux"), Settings(steps=2))
    times = time_generations(subject, CASES, {"original": None, "balanced": "balanced"}, 1)
    assert list(times) == ["original", "balanced"]
    assert times["balanced"].first_s > times["balanced"].median_s > 0

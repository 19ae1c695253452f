"""Where the tuner lets tokens merge: levels, patterns of paths, and the best amounts."""

from __future__ import annotations

import itertools
from fnmatch import fnmatchcase

import pytest

import toma_fx
from tests.denoisers import sdxl, sdxl_inputs
from toma_fx.measure.merging import (
    Amounts,
    Spot,
    Trial,
    best_amounts,
    config_of,
    levels_of,
    patterns_of,
    saved_by_part,
)
from toma_fx.run.denoiser import OptimizedDenoiser

LEVELS = {64: ("down.0.*", "up.1.*"), 16: ("mid.*",)}


def test_patterns_match_these_paths_alone() -> None:
    paths = ["down.0.a.attn1", "down.0.b.attn1", "up.2.c.attn1", "mid"]
    others = ["down.1.a.attn1", "up.2.d.attn1"]
    patterns = patterns_of(paths, others)
    assert patterns == ("down.0.*", "mid", "up.2.c.*")
    assert all(any(fnmatchcase(p, pattern) for pattern in patterns) for p in paths)
    assert not any(fnmatchcase(p, pattern) for pattern in patterns for p in others)


def test_levels_of_a_unet_merge_alone() -> None:
    base = toma_fx.ToMAConfig(ratio=0.5, min_tokens=1)
    call = sdxl_inputs(16, 16)
    denoiser = toma_fx.optimize(sdxl(), base)
    denoiser(**call)
    assert isinstance(denoiser, OptimizedDenoiser)
    levels = levels_of(denoiser.specializations[-1].plan)
    assert len(levels) > 1
    for tokens in levels:
        config = config_of(base, (((tokens, 0), 0.5),), levels, 2)
        report = toma_fx.explain(sdxl(), call, config)
        assert {row.tokens for row in report.rows} == {tokens}
        assert {row.phase for row in report.rows} == {0}


def test_amounts_become_a_configuration() -> None:
    base = toma_fx.ToMAConfig(ratio=0.9)
    nothing = config_of(base, (), LEVELS, 2)
    assert (nothing.merges, nothing.phases) == (False, ())
    everywhere = config_of(base, tuple(((t, p), 0.5) for t in LEVELS for p in (0, 1)), LEVELS, 2)
    assert (everywhere.ratio, everywhere.overrides, everywhere.phases) == (0.5, (), ())  # type: ignore[attr-defined]
    late = config_of(base, (((64, 1), 0.25),), LEVELS, 2)
    assert not late.stages[0].merges
    ((begin, _),) = late.phases
    assert begin == 0.5
    assert late.stages[1].at("up.1.attn1").ratio == 0.25  # type: ignore[attr-defined]
    assert late.stages[1].at("mid.attn1").ratio == 0  # type: ignore[attr-defined]


def test_best_amounts_are_on_the_hull_of_all() -> None:
    trials: dict[Spot, list[Trial]] = {
        (64, 0): [Trial(0.25, 1.0, 0.1), Trial(0.5, 5.0, 0.2)],
        (64, 1): [Trial(0.25, 4.0, 0.1), Trial(0.5, 4.5, 0.2)],  # a half costs hardly more
        (16, 0): [Trial(0.25, 0.1, 0.02), Trial(0.5, 0.1, 0.04)],
    }
    found = best_amounts(trials)

    def known(amounts: Amounts) -> tuple[float, float]:
        error = sum(next(t.error for t in trials[s] if t.ratio == r) for s, r in amounts)
        return sum(saved_by_part(amounts, trials, 2)), error

    everything = []
    for ratios in itertools.product((0, 0.25, 0.5), repeat=len(trials)):
        pairs = zip(trials, ratios, strict=True)
        everything.append(known(tuple((s, r) for s, r in pairs if r)))
    assert found[0] == ((), 0.0)
    for amounts, error in found:
        saved, own = known(amounts)
        assert error == pytest.approx(own)
        assert not any(s >= saved - 1e-9 and e < own - 1e-9 for s, e in everything)
    savings = [known(amounts)[0] for amounts, _ in found]
    assert savings == sorted(savings)
    assert not any(((64, 1), 0.25) in amounts for amounts, _ in found)


def test_what_saves_nothing_is_never_chosen() -> None:
    assert best_amounts({(64, 0): [Trial(0.25, 0.0, 0.0), Trial(0.5, 1.0, -0.1)]}) == [((), 0.0)]

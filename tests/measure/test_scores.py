"""Scores against plain formulas, and what may be claimed of paired ones."""

from __future__ import annotations

import math
import random

import pytest
import torch

from toma_fx.errors import ConfigError, UnknownNameError
from toma_fx.measure.intervals import LEAST_PICTURES, paired_interval
from toma_fx.measure.scores import METRICS, PLAIN, mean_abs, metric_of, psnr, score_pairs, ssim


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    want = torch.rand(2, 3, 16, 24, generator=g)
    return (want + 0.1 * torch.randn(want.shape, generator=g)).clamp(0, 1), want


def test_psnr_and_mean_abs_follow_their_formulas() -> None:
    got, want = pictures()
    mse = float((got[1] - want[1]).pow(2).sum() / want[1].numel())
    assert psnr(got, want)[1] == pytest.approx(-10 * math.log10(mse), rel=1e-5)
    assert mean_abs(got, want)[0] == pytest.approx(
        255 * float((got[0] - want[0]).abs().sum()) / want[0].numel(), rel=1e-5
    )
    assert mean_abs(want + 1 / 255, want) == pytest.approx([1.0, 1.0], rel=1e-4)
    assert psnr(want, want) == [math.inf, math.inf]


def test_ssim_is_that_of_every_window() -> None:
    got, want = (x.double() for x in pictures())
    values = []
    for c in range(3):
        for y in range(16 - 6):
            for x in range(24 - 6):
                a, b = (p[0, c, y : y + 7, x : x + 7].flatten() for p in (got, want))
                both = float(((a - a.mean()) * (b - b.mean())).sum() / 48)
                top = (2 * float(a.mean() * b.mean()) + 1e-4) * (2 * both + 9e-4)
                means = float(a.mean() ** 2 + b.mean() ** 2) + 1e-4
                values.append(top / (means * (float(a.var() + b.var()) + 9e-4)))
    assert ssim(got, want)[0] == pytest.approx(sum(values) / len(values), rel=1e-9)
    assert ssim(want, want) == pytest.approx([1.0, 1.0])


def test_the_range_of_values_does_not_matter() -> None:
    got, want = pictures()
    assert psnr(2 * got - 1, 2 * want - 1, peak=2.0) == pytest.approx(psnr(got, want), rel=1e-4)


def test_equal_pictures_have_the_perfect_score_of_each_metric() -> None:
    _, want = pictures()
    for name, values in score_pairs(want, want).items():
        assert values == pytest.approx([METRICS[name].perfect] * 2)


def test_better_pictures_score_better() -> None:
    got, want = pictures()
    near = score_pairs((got + want) / 2, want)
    for name, values in score_pairs(got, want).items():
        assert METRICS[name].sign * (near[name][0] - values[0]) > 0, name


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="ssim"):
        metric_of("sim")
    assert set(PLAIN) < set(METRICS)


def test_paired_intervals_ignore_what_both_share() -> None:
    random.seed(0)
    base = [random.gauss(30, 5) for _ in range(50)]
    a = [x + 0.5 + random.gauss(0, 0.2) for x in base]
    found = paired_interval(a, base)
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.2
    assert found.differs
    assert found == paired_interval(a, base)
    turned = paired_interval(base, a)
    assert turned.mean == pytest.approx(-found.mean)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    random.seed(1)
    held = 0
    for _ in range(200):
        differences = [random.gauss(1.0, 2.0) for _ in range(36)]
        found = paired_interval(differences, [0.0] * 36, samples=500)
        held += found.low <= 1.0 <= found.high
    assert 0.90 <= held / 200 <= 0.99


def test_too_few_pictures_claim_nothing() -> None:
    few = paired_interval([1.0, 1.1, 0.9], [0.0, 0.0, 0.0])
    assert few.low > 0
    assert few.count < LEAST_PICTURES
    assert not few.differs
    with pytest.raises(ConfigError, match="no pairs"):
        paired_interval([1.0], [1.0])
    with pytest.raises(ConfigError, match="no pairs"):
        paired_interval([1.0, 2.0], [1.0])

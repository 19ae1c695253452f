"""Rewritten denoisers with linear attention against an independent eager reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.zoo.check import FRESH, difference, trace
from tests.zoo.linear_references import LINEAR, WeighedSum
from tests.zoo.test_references import TOLERANCE, VISIBLE, case_of, planned, run


@pytest.mark.parametrize("scope", ["sublayer", "block"])
@pytest.mark.parametrize("name", LINEAR)
@torch.no_grad()
def test_linear_attention(name: str, scope: str) -> None:
    case = case_of(name)
    traced, inputs = trace(case), case.inputs(FRESH)
    plan, settings = planned(traced, scope)
    got, _ = run(traced, plan, "refresh", inputs)
    want = LINEAR[name](traced.model, inputs, settings)
    assert difference(got, want) < TOLERANCE
    assert difference(got, traced.expected) > VISIBLE
    other = replace(settings, scope="block" if scope == "sublayer" else "sublayer", patterns={})
    assert difference(got, LINEAR[name](traced.model, inputs, other)) > 10 * TOLERANCE


@torch.no_grad()
def test_sizes_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference whose merged tokens count once each gives something else."""
    case = case_of("sana")
    traced, inputs = trace(case), case.inputs(FRESH)
    _, settings = planned(traced, "block")
    right = LINEAR["sana"](traced.model, inputs, settings)
    original = WeighedSum.__call__

    def once(self: WeighedSum, *args: Any, **kwargs: Any) -> torch.Tensor:
        return original(replace(self, sizes=torch.ones_like(self.sizes)), *args, **kwargs)

    monkeypatch.setattr(WeighedSum, "__call__", once)
    wrong = LINEAR["sana"](traced.model, inputs, settings)
    assert difference(wrong, right) > 10 * TOLERANCE

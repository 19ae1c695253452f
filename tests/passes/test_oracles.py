"""Oracles that need no reference implementation: permuted tokens, cropped pictures."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import denoisers
from tests.zoo.check import keep_all, permutations
from toma_fx.analysis.propagate import analyze
from toma_fx.capture.model import capture, flatten_call
from toma_fx.methods.toma import ToMAConfig
from toma_fx.passes.pipeline import rewrite
from toma_fx.passes.uses import REUSE
from toma_fx.plan.plan import MergePlan
from toma_fx.plan.planner import make_plan


@cache
def analyzed(name: str, height: int, width: int) -> tuple[Any, dict[str, Any], Any, Any, Any]:
    """A model, its inputs, and what is known of it: nothing of it is changed by a rewrite."""
    model, inputs = getattr(denoisers, name)(), getattr(denoisers, f"{name}_inputs")(height, width)
    captured = capture(model, (), inputs)
    return model, inputs, captured, *analyze(captured)


def run_reuse(
    name: str, size: tuple[int, int], config: ToMAConfig, patterns: Any, edit: Any
) -> Tensor:
    """Output of the reuse program with hand-made patterns, after `edit` of the plan."""
    _, inputs, captured, analysis, flow = analyzed(name, *size)
    plan = edit(make_plan(analysis, flow, config))
    program = rewrite(captured, analysis, flow, plan, REUSE)
    leaves = flatten_call((), inputs)[0]
    return program.graph_module(*leaves, *patterns(plan))[0]


@pytest.mark.parametrize("scope", ["sublayer", "block", "stack"])
@pytest.mark.parametrize("window", ["tile", "stripe", "global"])
@pytest.mark.parametrize("name", ["sdxl", "flux"])
@torch.no_grad()
def test_permuted_tokens_give_the_original_output(name: str, window: str, scope: str) -> None:
    model, inputs, *_ = analyzed(name, 16, 24)
    config = ToMAConfig(scope=scope, window=window, min_tokens=20)
    got = run_reuse(name, (16, 24), config, permutations, keep_all)
    assert denoisers.relative(got, model(**inputs)[0]) < 1e-5


@pytest.mark.parametrize("scope", ["sublayer", "block", "stack"])
@torch.no_grad()
def test_kept_rectangle_equals_the_cropped_input(scope: str) -> None:
    (height, width), (h, w) = (8, 10), (4, 6)
    model, inputs, *_ = analyzed("flux", height, width)
    kept = torch.tensor([r * width + c for r in range(h) for c in range(w)])
    cropped = {**inputs, "img_ids": denoisers.ids(h, w)}
    cropped["hidden_states"] = inputs["hidden_states"][:, kept]

    def rectangle(plan: MergePlan) -> list[Tensor]:
        matrix = torch.nn.functional.one_hot(kept, height * width).float().expand(2, 1, -1, -1)
        pattern = [kept.expand(2, 1, -1), matrix, matrix.transpose(-1, -2).contiguous()]
        return len(plan.groups) * pattern

    config = ToMAConfig(
        scope=scope, window="global", ratio=1 - h * w / (height * width), min_tokens=1
    )
    got = run_reuse("flux", (height, width), config, rectangle, lambda plan: plan)
    assert denoisers.relative(got[:, kept], model(**cropped)[0]) < 1e-5
    assert denoisers.relative(got, model(**inputs)[0]) > 1e-3

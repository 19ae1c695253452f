"""Oracles that need no reference implementation: permuted tokens, cropped pictures."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import denoisers
from toma_fx.analysis.propagate import analyze
from toma_fx.capture.model import capture, flatten_call
from toma_fx.methods.toma import ToMAConfig
from toma_fx.passes.pipeline import rewrite
from toma_fx.passes.uses import REUSE
from toma_fx.plan.plan import MergePlan
from toma_fx.plan.planner import make_plan


def keep_all(plan: MergePlan) -> MergePlan:
    """The plan with every window keeping all of its tokens."""

    def whole(item: Any) -> Any:
        setting = item.setting
        full = dataclasses.replace(setting, keep=setting.tile[0] * setting.tile[1])
        return dataclasses.replace(item, setting=full)

    segments, groups = map(whole, plan.segments), map(whole, plan.groups)
    return dataclasses.replace(plan, segments=tuple(segments), groups=tuple(groups))


def run_reuse(
    model: torch.nn.Module, inputs: dict[str, Any], config: ToMAConfig, patterns: Any, edit: Any
) -> Tensor:
    """Output of the reuse program with hand-made patterns, after `edit` of the plan."""
    captured = capture(model, (), inputs)
    analysis, flow = analyze(captured)
    plan = edit(make_plan(analysis, flow, config))
    program = rewrite(captured, analysis, flow, plan, REUSE)
    given = [tensor for group in plan.groups for tensor in patterns(group)]
    leaves = flatten_call((), inputs)[0]
    return program.graph_module(*leaves, *given)[0]


def permutation(group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A pattern that permutes the tokens of each window: merge = P, unmerge = P transposed."""
    s = group.setting
    tokens = s.tile[0] * s.tile[1]
    g = torch.Generator().manual_seed(7)
    order = torch.rand(group.batch, s.windows, tokens, generator=g).argsort(-1)
    matrix = torch.nn.functional.one_hot(order, tokens).float()
    return order, matrix, matrix.transpose(-1, -2).contiguous()


@pytest.mark.parametrize("scope", ["sublayer", "block", "stack"])
@pytest.mark.parametrize("window", ["tile", "stripe", "global"])
@pytest.mark.parametrize("name", ["sdxl", "flux"])
@torch.no_grad()
def test_permuted_tokens_give_the_original_output(name: str, window: str, scope: str) -> None:
    model, make = getattr(denoisers, name)(), getattr(denoisers, f"{name}_inputs")
    inputs = make(16, 24)
    config = ToMAConfig(scope=scope, window=window, min_tokens=20)
    got = run_reuse(model, inputs, config, permutation, keep_all)
    assert denoisers.relative(got, model(**inputs)[0]) < 1e-5


@pytest.mark.parametrize("scope", ["sublayer", "block", "stack"])
@torch.no_grad()
def test_kept_rectangle_equals_the_cropped_input(scope: str) -> None:
    model, (height, width), (h, w) = denoisers.flux(), (8, 10), (4, 6)
    inputs = denoisers.flux_inputs(height, width)
    kept = torch.tensor([r * width + c for r in range(h) for c in range(w)])
    cropped = {**inputs, "img_ids": denoisers.ids(h, w)}
    cropped["hidden_states"] = inputs["hidden_states"][:, kept]

    def rectangle(group: Any) -> tuple[Tensor, Tensor, Tensor]:
        matrix = torch.nn.functional.one_hot(kept, height * width).float().expand(2, 1, -1, -1)
        return kept.expand(2, 1, -1), matrix, matrix.transpose(-1, -2).contiguous()

    config = ToMAConfig(
        scope=scope, window="global", ratio=1 - h * w / (height * width), min_tokens=1
    )
    got = run_reuse(model, inputs, config, rectangle, lambda plan: plan)
    assert denoisers.relative(got[:, kept], model(**cropped)[0]) < 1e-5
    assert denoisers.relative(got, model(**inputs)[0]) > 1e-3

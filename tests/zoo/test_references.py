"""Rewritten denoisers of many families against independent eager references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import Settings
from tests.zoo import CASES, references
from tests.zoo.base import Case, Inputs
from tests.zoo.check import FRESH, Traced, difference, tensors, trace
from tests.zoo.references import FAMILIES, REFERENCES, Places
from toma_fx.capture.model import flatten_call
from toma_fx.passes.pipeline import rewrite
from toma_fx.passes.uses import uses_of
from toma_fx.plan.plan import MergePlan

TOLERANCE = 1e-5
"""Largest difference, relative to the largest value of an output."""
VISIBLE = 1e-3
"""What merging must change at least, so that equal outputs say something."""
BLOCKS = (
    "chroma", "cogvideox_5b", "cosmos", "ernie_image", "flux2", "hunyuan_video_i2v", "motif",
    "pixart_sigma", "wan_ti2v",
)  # fmt: skip
"""Some families, for scope "block" too."""
SCALE = 2.0
"""Soft weights: at the default scale nearly every token goes to one destination, where scopes
"block" and "stack" are almost equal."""
LATER = 3
"""Seed of the inputs of a step that keeps its patterns."""
PLAN: dict[str, dict[str, Any]] = {"animatediff": {"tile": (2, 4)}}
"""What a plan needs to have one tile for all token grids."""


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def planned(traced: Traced, scope: str) -> tuple[MergePlan, Settings]:
    """A plan that merges half of the tokens, and the same for a reference."""
    plan = traced.plan(scope=scope, ratio=0.5, scale=SCALE, **PLAN.get(traced.case.name, {}))
    (tile,) = {group.setting.tile for group in plan.groups}
    (keep,) = {group.setting.keep for group in plan.groups}
    assert {segment.scope for segment in plan.segments} <= {scope}, "falls apart"
    *frames, height, width = tile
    assert all(side == 1 for side in frames)
    return plan, Settings((height, width), keep, SCALE, scope)


def run(
    traced: Traced, plan: MergePlan, use: str, inputs: Inputs, *given: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and patterns of a program of the plan."""
    program = rewrite(
        traced.captured, traced.analysis, traced.flow, plan, uses_of(plan.config)[use]
    )
    results = program.graph_module(*flatten_call((), inputs)[0], *given)
    count = len(results) - len(program.gives)
    return tensors(results[:count]), list(results[count:])


def check_refresh(case: Case, scope: str) -> None:
    """A step that computes its patterns is that of the reference; it merges, in this scope."""
    traced, inputs = trace(case), case.inputs(FRESH)
    plan, settings = planned(traced, scope)
    got, _ = run(traced, plan, "refresh", inputs)
    want = REFERENCES[case.name](traced.model, inputs, settings)
    assert difference(got, want) < TOLERANCE
    assert difference(got, traced.expected) > VISIBLE
    if scope == "block":
        settings.scope = "stack"
        stack = REFERENCES[case.name](traced.model, inputs, settings)
        assert difference(got, stack) > 10 * TOLERANCE, "the reference of another scope would pass"


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_stack(name: str) -> None:
    check_refresh(case_of(name), "stack")


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_block(name: str) -> None:
    check_refresh(case_of(name), "block")


@pytest.mark.parametrize("name", ["qwen_image", "wan_ti2v"])
@torch.no_grad()
def test_reuse(name: str) -> None:
    """A later step on other inputs keeps the patterns of the step before."""
    case = case_of(name)
    traced, later = trace(case), case.inputs(LATER)
    plan, settings = planned(traced, "stack")
    _, patterns = run(traced, plan, "refresh", case.inputs(FRESH))
    got, _ = run(traced, plan, "reuse", later, *patterns)
    reference = REFERENCES[name]
    reference(traced.model, case.inputs(FRESH), settings)
    settings.refresh = False
    assert difference(got, reference(traced.model, later, settings)) < TOLERANCE
    settings.refresh = True
    assert difference(got, reference(traced.model, later, settings)) > VISIBLE, "it refreshes"
    assert difference(got, tensors(traced.model(**later))) > VISIBLE


@pytest.mark.parametrize("scope", ["block", "stack"])
@torch.no_grad()
def test_mask_over_the_image(scope: str) -> None:
    """Each prompt leaves other image tokens out: the mask is taken at the destinations too."""
    case = case_of("chroma")

    def inputs(seed: int) -> Inputs:
        values = case.inputs(seed)
        mask = values["attention_mask"].clone()
        mask[0, -20:], mask[1, -60:-45:2] = False, False
        return {**values, "attention_mask": mask}

    check_refresh(replace(case, inputs=inputs), scope)


@pytest.mark.parametrize("name", ["allegro", "cogview4", "hunyuan_video", "ltx_condition"])
@torch.no_grad()
def test_tables_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference that takes its tables at the next tokens gives something else."""
    case = case_of(name)
    traced, inputs = trace(case), case.inputs(FRESH)
    _, settings = planned(traced, "stack")
    right = REFERENCES[name](traced.model, inputs, settings)

    class Shifted(Places):
        def __call__(self, table: Any, dim: int, *, last: bool = False) -> Any:
            index = (self.index + 1) % self.tokens
            return Places(index, self.tokens)(table, dim, last=last)

    monkeypatch.setattr(references, "Places", Shifted)
    wrong = REFERENCES[name](traced.model, inputs, settings)
    assert difference(wrong, right) > 100 * TOLERANCE

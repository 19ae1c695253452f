"""The checks that every denoiser of the matrix passes, and what they found."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import toma_fx
from tests.zoo.base import Case, Crop
from tests.zoo.twins import Twinned, one_of_two
from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.facts import Analysis
from toma_fx.analysis.propagate import analyze
from toma_fx.analysis.roles import find_roles
from toma_fx.capture.model import Captured, capture, flatten_call
from toma_fx.graph.flops import graph_flops
from toma_fx.methods.cache import CacheConfig
from toma_fx.methods.toma import ToMAConfig
from toma_fx.passes.pipeline import Program, rewrite
from toma_fx.passes.uses import uses_of
from toma_fx.plan.plan import MergePlan
from toma_fx.plan.planner import make_plan
from toma_fx.run.program_set import split_outputs
from toma_fx.run.schedule import aged

CAPTURED, FRESH = 1, 2
"""Seeds of the inputs that a graph is captured with, and of those that it is checked on."""
EXACT = 2e-5
"""Largest relative difference that float32 allows an oracle."""
Edit = Callable[[MergePlan], MergePlan]


@dataclass(frozen=True)
class Found:
    """What the checks of a case established.

    Attributes:
        sites: attentions by kind. attention, mlp: branches that merge. grids: of the segments.
        segments: merged segments in scope "stack". permuted, cropped, twinned, cached: largest
            relative difference to the oracle (None where there is none). changed: relative
            difference that merging half of the tokens makes. share: of the FLOPs that a cached
            step has left. refused: the error, if the model can't be merged.
    """

    sites: dict[str, int]
    attention: int = 0
    mlp: int = 0
    grids: tuple[tuple[int, ...], ...] = ()
    segments: int = 0
    permuted: float | None = None
    cropped: float | None = None
    twinned: float | None = None
    changed: float | None = None
    cached: float | None = None
    share: float | None = None
    refused: str = ""


@dataclass(frozen=True)
class Traced:
    """A captured and analyzed model, and what it makes of fresh inputs."""

    case: Case
    model: nn.Module
    captured: Captured
    analysis: Analysis
    flow: Flow
    expected: list[Tensor]

    def plan(self, **fields: Any) -> MergePlan:
        """The plan for these fields of the configuration."""
        config = {"min_tokens": 16, **self.case.config, **fields}
        return make_plan(self.analysis, self.flow, ToMAConfig(**config), self.timestep)

    @property
    def timestep(self) -> str:
        """The input that is the timestep; "" if none is."""
        place = find_roles(self.captured).timestep
        return "" if place is None else self.captured.inputs[place].name

    def program(self, plan: MergePlan, use: str) -> Program:
        """A program of the plan."""
        return rewrite(self.captured, self.analysis, self.flow, plan, uses_of(plan.config)[use])

    def step(
        self, plan: MergePlan, use: str, kept: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """What a program gives on fresh inputs: the model's outputs, and kept tensors."""
        program = self.program(plan, use)
        leaves = flatten_call((), self.case.inputs(FRESH))[0]
        results = program.graph_module(*leaves, *(kept[name] for name in program.takes))
        outputs, given = split_outputs(results, program.gives)
        return tensors(outputs), given

    def run(self, plan: MergePlan, use: str, *given: Tensor) -> list[Tensor]:
        """The model's outputs by a program of the plan, on fresh inputs.

        Patterns are cast to the dtypes that the program takes.
        """
        program = self.program(plan, use)
        leaves = flatten_call((), self.case.inputs(FRESH))[0]
        nodes = {n.name: n for n in program.graph_module.graph.nodes}
        likes = [nodes[name].meta["val"] for name in program.takes]
        cast = [x.to(like.dtype) for x, like in zip(given, likes, strict=True)]
        results = program.graph_module(*leaves, *cast)
        return tensors(results[: len(results) - len(program.gives)])


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors among the outputs of a model."""
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]


def difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, relative to the largest value of each output."""
    assert [x.shape for x in got] == [x.shape for x in expected]
    pairs = zip(got, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@torch.no_grad()
def check(case: Case) -> Found:
    """Run every check of a case; raises AssertionError at the first that fails."""
    if case.refused is not None:
        return _refused(case)
    traced = trace(case)
    found = _counts(traced)
    moved = max(permuted(traced, scope) for scope in ("sublayer", "stack"))
    twins = max(twinned(traced, scope) for scope in ("sublayer", "stack"))
    cropped = None
    if case.crop is not None:
        cropped = max(_cropped(traced, case.crop, scope) for scope in ("sublayer", "stack"))
    cached, share = _cached(traced)
    return dataclasses.replace(
        found,
        permuted=moved,
        cropped=cropped,
        twinned=twins,
        changed=_changed(traced),
        cached=cached,
        share=share,
    )


def trace(case: Case, *, exact: bool = True) -> Traced:
    """Capture a case; with merging off, its graph equals the model bit by bit on fresh inputs.

    Not `exact` is for PyTorch modules that take another path in eager mode than in an export.
    """
    model = case.build()
    expected = tensors(model(**case.inputs(FRESH)))
    captured = capture(model, (), case.inputs(CAPTURED))
    leaves = flatten_call((), case.inputs(FRESH))[0]
    got = tensors(captured.graph_module(*leaves))
    assert len(got) == len(expected) > 0
    same = all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert same or (not exact and difference(got, expected) < EXACT), "export is wrong"
    analysis, flow = analyze(captured, case.config.get("grid"))
    return Traced(case, model, captured, analysis, flow, expected)


def _refused(case: Case) -> Found:
    assert case.refused is not None
    name, part = case.refused
    with pytest.raises(getattr(toma_fx, name)) as error:
        toma_fx.explain(case.build(), case.inputs(CAPTURED), **{"min_tokens": 16, **case.config})
    assert part in str(error.value), error.value
    return Found({}, refused=f"{name}: {part}")


def _counts(traced: Traced) -> Found:
    """Sites and merged branches are those that the model's code lets expect."""
    case = traced.case
    sites = dict(Counter(site.kind for site in traced.analysis.sites))
    assert sites == dict(case.sites), f"{sites} instead of {case.sites}: {case.why}"
    plan = traced.plan(scope="sublayer")
    branches = {stream.name: stream.branches for stream in traced.analysis.streams}
    merged = [branches[s.stream][i].kinds for s in plan.segments for i in s.branches]
    attention = sum(not {"attention", "cross"}.isdisjoint(kinds) for kinds in merged)
    mlp = len(merged) - attention
    assert (attention, mlp) == (case.attention, case.mlp), (case.why, plan.rejections)
    grids = {s.image.name: s.image.grid for s in plan.segments}
    found = tuple(sorted(g for g in grids.values() if g is not None))
    assert found == tuple(sorted(case.grids)), f"{found} instead of {case.grids}"
    return Found(sites, attention, mlp, case.grids, len(traced.plan().segments))


def keep_all(plan: MergePlan) -> MergePlan:
    """The plan with every window keeping all of its tokens."""

    def whole(item: Any) -> Any:
        setting = dataclasses.replace(item.setting, keep=math.prod(item.setting.tile))
        return dataclasses.replace(item, setting=setting)

    segments, groups = map(whole, plan.segments), map(whole, plan.groups)
    return dataclasses.replace(plan, segments=tuple(segments), groups=tuple(groups))


def permutations(plan: MergePlan) -> Iterator[Tensor]:
    """For every group, a pattern that permutes the tokens of each window."""
    g = torch.Generator().manual_seed(7)
    for group in plan.groups:
        s = group.setting
        order = torch.rand(group.batch, s.windows, s.keep, generator=g).argsort(-1)
        matrix = torch.nn.functional.one_hot(order, s.keep).float()
        yield from (order, matrix, matrix.transpose(-1, -2).contiguous())


def permuted(traced: Traced, scope: str, exact: float = EXACT) -> float:
    """Computing on all tokens in another order gives the original output."""
    plan = keep_all(traced.plan(scope=scope))
    found = difference(traced.run(plan, "reuse", *permutations(plan)), traced.expected)
    assert found < exact, f"permuted tokens differ by {found:.1e} in scope {scope}"
    return found


def twinned(traced: Traced, scope: str, exact: float = EXACT) -> float:
    """Tokens that come in twins: merging each with its twin gives what computing all of them gives.

    Attention to merged keys counts them twice.
    """
    plan = traced.plan(scope=scope, window="global", ratio=0.5, proportional=True)
    program = traced.program(plan, "reuse")
    nodes = {n.name: n for n in program.graph_module.graph.nodes}
    dtypes = [nodes[name].meta["val"].dtype for name in program.takes]
    kept = [x.to(dtype) for x, dtype in zip(one_of_two(plan), dtypes, strict=True)]
    expected, got = (
        tensors(
            Twinned(module, traced.analysis, traced.flow).run(
                *flatten_call((), traced.case.inputs(FRESH))[0], *more
            )
        )
        for module, more in ((traced.captured.graph_module, ()), (program.graph_module, kept))
    )
    found = difference(got[: len(expected)], expected)
    assert found < exact, f"one of two twins differs by {found:.1e} in scope {scope}"
    return found


def _cropped(traced: Traced, crop: Crop, scope: str) -> float:
    """Keeping only a corner of the picture gives what the model makes of that corner."""
    grid = traced.case.grids[0]
    share = math.prod(crop.size) / math.prod(grid)
    plan = traced.plan(scope=scope, window="global", ratio=1 - share)
    index = torch.arange(math.prod(grid)).view(grid)
    kept = index[tuple(slice(side) for side in crop.size)].flatten()
    matrix = torch.nn.functional.one_hot(kept, math.prod(grid)).float()
    patterns = []
    for group in plan.groups:
        merge = matrix.expand(group.batch, 1, -1, -1)
        patterns += [kept.expand(group.batch, 1, -1), merge, merge.transpose(-1, -2).contiguous()]
    got = [crop.output(x) for x in traced.run(plan, "reuse", *patterns)[:1]]
    alone = tensors(traced.model(**crop.inputs(traced.case.inputs(FRESH))))[:1]
    found = difference(got, alone)
    assert found < EXACT, f"the cropped picture differs by {found:.1e} in scope {scope}"
    assert difference(got, [crop.output(x) for x in traced.expected[:1]]) > 1e-3
    return found


def _cached(traced: Traced) -> tuple[float, float]:
    """On the same inputs again, steps that use what is kept give what those that computed gave.

    Of whole streams, unmerged; of single blocks that merge; and of all blocks but those at the end,
    which merge, and need what the cached ones leave to them: text, say.

    Returns:
        (largest difference, share of the FLOPs of a step that one with cached streams has left).
    """
    order = 1 if traced.timestep else 0
    last = {s.branches[-1].module for s in traced.analysis.streams if len(s.values) > 3}
    merged = {"scope": "block"}
    found = [
        _compare_cached(traced, CacheConfig(order=order, scope="stack"), "plain", {"ratio": 0.0}),
        _compare_cached(traced, CacheConfig(order=order, scope="block"), "refresh", merged),
    ]
    if any(last):
        cache = CacheConfig(order=order, exclude=tuple(filter(None, last)))
        found.append(_compare_cached(traced, cache, "refresh", merged))
    return max(difference for difference, _ in found), found[0][1]


def _compare_cached(
    traced: Traced, cache: CacheConfig, use: str, fields: dict[str, Any]
) -> tuple[float, float]:
    """(difference between a step that computes and a cached one, share of FLOPs of the latter)"""
    plan, cached = traced.plan(cache=cache, **fields), {"plain": "cached_plain"}.get(use, "cached")
    outputs, given = traced.step(plan, use, {})
    got, _ = traced.step(plan, cached, aged({}, given, plan.older))
    found = difference(got, outputs)
    assert found < EXACT, f"a cached step differs by {found:.1e} ({cache})"
    if use == "plain":
        assert all(torch.equal(a, b) for a, b in zip(outputs, traced.expected, strict=True))
    whole, left = (
        graph_flops(graph_module.graph)
        for graph_module in (
            traced.captured.graph_module,
            traced.program(plan, cached).graph_module,
        )
    )
    assert left < whole, f"a cached step saves nothing ({cache})"
    return found, left / whole


def _changed(traced: Traced) -> float:
    """Merging half of the tokens gives a finite output that is another."""
    got = traced.run(traced.plan(), "refresh")
    assert all(torch.isfinite(x).all() for x in got)
    found = difference(got, traced.expected)
    assert found > 1e-4, f"merging changes the output by {found:.1e} only"
    return found

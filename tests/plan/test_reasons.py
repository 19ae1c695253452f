"""Reasons are read by their fields: texts may be reworded."""

from __future__ import annotations

from dataclasses import replace

from tests.analysis.test_rules import find, residual
from toma_fx.analysis.facts import Analysis, Rejected
from toma_fx.methods.toma import ToMAConfig
from toma_fx.plan.planner import make_plan
from toma_fx.plan.reasons import hint_no_sites


def hint(op: str) -> str:
    refusals = {"n": Rejected("n", "reworded", "no_rule", op)}
    return hint_no_sites(Analysis({}, {}, refusals, (), ()), ToMAConfig())


def test_the_hint_for_a_custom_operator_needs_no_wording() -> None:
    assert hint("own.gemm").startswith("n: reworded for own.gemm; toma_fx.tokenwise(...)")
    assert "tokenwise" not in hint("aten.cummax"), "users can't declare operators of torch"
    assert "tokenwise" not in hint("gemm"), "nor functions that are no operators"


def test_an_update_is_not_rejected_twice_for_one_refusal() -> None:
    """The attention names the refusal that its output ran into; the lost update would repeat it."""
    found = find(residual(lambda m, n: m.attention(n, n).cummax(1).values))
    (name,) = found.analysis.refusals
    reworded = {name: replace(found.analysis.refusals[name], reason="reworded")}
    analysis, flow = (replace(x, refusals=reworded) for x in (found.analysis, found.flow))
    rejections = make_plan(analysis, flow, ToMAConfig(min_tokens=1)).rejections
    assert [r.cause for r in rejections] == [name], rejections
    assert rejections[0].reason.endswith(f"; {name}: reworded for aten.{name}")

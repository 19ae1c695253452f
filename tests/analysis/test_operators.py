"""Every operator with a rule, on drawn shapes, layouts and arguments: right, or refused.

Each row's tokens are put in another order: then the result must have them in that order. Tokens
that come in twins are halved, each row keeping others, and literals get their new values: then the
result must be that of the tokens kept. (Keys that are not all of the image have other shares after
halving: softmax over them is tested with another order alone.)
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

import tests.analysis.product_cases  # noqa: F401  (registers generators)
from tests.analysis.draws import Case, Draw, draw_world
from tests.analysis.operator_cases import GENERATORS
from tests.analysis.token_oracles import (
    Tensors,
    check_fold,
    check_order,
    check_rows,
    check_twins,
    compute,
    derive,
    describe,
    knows_rows,
    result_layouts,
)
from tests.analysis.tokens_of_rows import has_segment
from toma_fx.analysis.facts import Rejected
from toma_fx.analysis.rules.base import RULES, carries_positions
from toma_fx.analysis.rules.views import ROWS_SEPARATED
from toma_fx.graph.nodes import LINEAR_LAYERS, RESHAPES

CUDA_ALONE = {"aten._weight_int4pack_mm": "aten._weight_int4pack_mm_for_cpu"}
"""Operators that no CPU can run, and one that has their rule."""
DROPPED = "other tokens draw other numbers; without dropout it is gone before the analysis"
REFUSED = {
    "aten.dropout": DROPPED,
    "aten.feature_dropout": DROPPED,
    "aten.alpha_dropout": DROPPED,
    "aten.feature_alpha_dropout": DROPPED,
    "aten.conv1d": "its result is no picture, and tokens are refused",
}
"""Operators that no tokens pass, and why."""
ORDERLESS = (ROWS_SEPARATED, "rows are made a batch", "normalization statistics over")
"""Reasons to need all tokens with which another order of them is fine."""
PICTURES = ("conv", "_pool", "pixel_", "upsample_")
"""In names of operators on pictures: no tokens pass, but rows of the batch do."""

RESHAPED = RESHAPES | {"aten.flatten"}
"""Operators that may make tokens of a picture."""


def draw_case(op: str, seed: int) -> tuple[Case, Draw, Tensors]:
    """A call that torch accepts, with what it gives."""
    rng = random.Random(f"{op}/{seed}")
    for _ in range(100):
        case = Case(draw_world(rng))
        draw = Draw(rng, case)
        try:
            GENERATORS[op](draw)
            outputs = compute(case, case.values)
        except (RuntimeError, IndexError, ValueError, AssertionError):
            continue
        if case.layouts:
            return case, draw, outputs
    raise AssertionError(f"{op}: its generator draws nothing that torch accepts")


def check(op: str, seed: int) -> str:
    """The oracles on one call; returns how it went."""
    case, draw, outputs = draw_case(op, seed)
    try:
        transfer = derive(case, outputs)
    except Exception as error:
        raise AssertionError(f"its rule fails: {error!r}\n{describe(case)}") from error
    if isinstance(transfer, Rejected):
        return "refused"
    try:
        if any(word in op for word in PICTURES):
            return "accepted" if check_rows(case, transfer, outputs) else "nothing known"
        if transfer.needs_all_tokens and not transfer.needs_all_tokens.startswith(ORDERLESS):
            return "needs all tokens"
        if not any(carries_positions(x) for x in case.layouts.values()):
            folded = op in RESHAPED and check_fold(case, transfer, outputs, seed)
            return "accepted" if folded else "nothing known"
        layouts, tested = result_layouts(transfer, outputs), False
        for target in (draw.image, draw.other):
            held = any(has_segment(x, target.name) for x in case.layouts.values())
            kept = any(has_segment(x, target.name) for x in layouts)
            others = not kept and any(carries_positions(x) for x in layouts if x)
            if not held or others or not knows_rows(case, target):
                continue  # where other tokens are followed, none of these are merged
            check_order(case, transfer, target, outputs, seed)
            if not transfer.needs_all_tokens:
                check_twins(case, transfer, target, outputs, seed)
            tested = True
    except Exception as error:
        raise AssertionError(f"{error}\nseed {seed}: {describe(case, transfer)}") from error
    return "accepted" if tested else "nothing known"


@pytest.mark.parametrize("op", GENERATORS)
@pytest.mark.parametrize("count", [5, 90])
@torch.no_grad()
def test_right_or_refused(op: str, count: int) -> None:
    results: Counter[str] = Counter()
    for seed in range(200):
        results[check(op, seed)] += 1
        if seed + 1 >= count and (results["accepted"] or op in REFUSED):
            break
    assert bool(results["accepted"]) != (op in REFUSED), results


def test_every_rule_has_a_generator() -> None:
    torchao = {name for name in RULES if name.startswith("torchao.")}
    # no operators of torch; tests/capture/test_opaque.py has models with them
    assert RULES.keys() > LINEAR_LAYERS
    untested = RULES.keys() - GENERATORS.keys() - CUDA_ALONE.keys() - LINEAR_LAYERS
    assert untested in (set(), torchao), "those of torchao need it to be installed"
    assert all(RULES[name] is RULES[other] for name, other in CUDA_ALONE.items())
    assert GENERATORS.keys() - RULES.keys(), "some that have the rule of all element-wise ones"
    assert REFUSED.keys() <= GENERATORS.keys()

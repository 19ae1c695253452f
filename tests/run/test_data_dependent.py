"""Texts cut by a mask: a length that the data says, in one graph for all masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toma_fx
from tests.zoo.check import keep_all, permutations
from toma_fx.analysis.propagate import analyze
from toma_fx.capture.model import capture, flatten_call
from toma_fx.errors import NoMergeSites
from toma_fx.methods.toma import ToMAConfig
from toma_fx.passes.pipeline import rewrite
from toma_fx.passes.uses import REUSE
from toma_fx.plan.planner import make_plan

MASKS = ([1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 1, 1, 1, 1])


class Net(nn.Module):
    """Joint attention with a text without its padding, then an MLP."""

    def __init__(self, joint: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.joint = joint

    def forward(self, hidden_states: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        text = text[:, mask[0].nonzero().flatten()]
        x, image = hidden_states, self.norm(hidden_states)
        both = torch.cat([image, text], 1) if self.joint else text
        query = self.q(both if self.joint else image)
        out = F.scaled_dot_product_attention(query, self.k(both), self.v(both))[:, : x.shape[1]]
        x = x + self.o(out)
        return x + self.b(F.gelu(self.a(self.norm(x))))


def call(mask: list[int]) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(sum(mask))
    image, text = (torch.randn(1, n, 8, generator=made) for n in (16, 5))
    return {"hidden_states": image, "text": text, "mask": torch.tensor([mask])}


FIELDS: dict[str, Any] = {"grid": (4, 4), "min_tokens": 1}


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("scope", ["stack", "block", "sublayer"])
@torch.no_grad()
def test_keeping_all_tokens_gives_the_original_output(scope: Any, joint: bool) -> None:
    model = Net(joint).eval()
    captured = capture(model, (), call(MASKS[0]))
    analysis, flow = analyze(captured, (4, 4))
    plan = keep_all(make_plan(analysis, flow, ToMAConfig(scope=scope, **FIELDS)))
    program = rewrite(captured, analysis, flow, plan, REUSE)
    assert set(plan.segments[0].sites), "attention merges"
    for mask in MASKS:
        inputs = call(mask)
        leaves = flatten_call((), inputs)[0]
        got = program.graph_module(*leaves, *permutations(plan))[0]
        torch.testing.assert_close(got, model(**inputs))


@torch.no_grad()
def test_merged_tokens_see_the_text_that_is_left() -> None:
    """The stack on merged tokens, in eager PyTorch, by the program's own pattern."""
    model = Net().eval()
    found = toma_fx.optimize(model, **FIELDS).specialized((), call(MASKS[0]))[0]
    program = found.program("refresh").graph_module
    for mask in MASKS:
        inputs = call(mask)
        got, _, merge, unmerge = program(*flatten_call((), inputs)[0])
        x = inputs["hidden_states"]
        merged = merge[:, 0] @ x
        update = model(**{**inputs, "hidden_states": merged}) - merged
        torch.testing.assert_close(got, x + unmerge[:, 0] @ update)
        assert not torch.allclose(got, model(**inputs), atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{}, {"scope": "sublayer"}, {"method": "tomesd"}, {"method": "ca-tome", "threshold": 0.1}],
)
@torch.no_grad()
def test_all_masks_have_one_graph(options: dict[str, Any]) -> None:
    model = Net().eval()
    toma_fx.explain(model, call(MASKS[0]), **FIELDS, **options)
    denoiser = toma_fx.optimize(model, **FIELDS, **options)
    for mask in MASKS:
        got, want = denoiser(**call(mask)), model(**call(mask))
        assert 1e-3 < (got - want).norm() / want.norm() < 1
        fresh = toma_fx.optimize(model, **FIELDS, **options)
        assert torch.equal(got, fresh(**call(mask)))
        denoiser.reset()
    assert len(denoiser.specializations) == 1


@torch.no_grad()
def test_kept_updates_and_nothing_merged() -> None:
    model, first = Net().eval(), call(MASKS[0])
    second = {**first, "hidden_states": call(MASKS[1])["hidden_states"]}
    denoiser = toma_fx.optimize(model, toma=False, grid=(4, 4), cache={"every": 2, "order": 0})
    with denoiser.generation(steps=2) as run:
        run.step(0)
        kept = denoiser(**first).clone()
        assert torch.equal(kept, model(**first))
        run.step(1)
        update = kept - first["hidden_states"]
        torch.testing.assert_close(denoiser(**second), second["hidden_states"] + update)
    assert denoiser.totals == {"plain": 1, "cached_plain": 1}


def test_a_report_counts_the_text_with_its_padding() -> None:
    report = toma_fx.explain(Net().eval(), call(MASKS[0]), **FIELDS)
    linear = 2 * 8 * 8 * (3 * 21 + 16) + 2 * 2 * 8 * 16 * 16
    attention = 2 * 2 * 21 * 21 * 8
    assert report.flops_before == linear + attention
    assert report.flops_after < report.flops_before


def test_keys_in_a_sequence_of_unknown_length_are_refused() -> None:
    """The plan says so; no rewrite fails half-way."""
    with pytest.raises(NoMergeSites) as caught:
        toma_fx.explain(Net().eval(), call(MASKS[0]), method="todo", **FIELDS)
    assert any("one axis of tokens whose number is known" in r for r in caught.value.reasons)

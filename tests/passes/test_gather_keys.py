"""Which values processes exchange, in the graph of one of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from toma_fx.analysis.propagate import analyze
from toma_fx.capture.model import capture
from toma_fx.compat.collectives import is_wait
from toma_fx.graph.nodes import ATTENTION, is_dead, op_name
from toma_fx.methods.sharded import Rank
from toma_fx.methods.toma import ToMAConfig
from toma_fx.passes.pipeline import rewrite
from toma_fx.passes.uses import REUSE
from toma_fx.plan.planner import make_plan
from toma_fx.plan.sharding import shard_plan

TEXT, TOKENS, WIDTH, COUNT = 5, 64, 8, 4


class Both(nn.Module):
    """Attention among 8x8 image tokens, and from them to a text."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = (
            nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4)) for _ in range(2)
        )

    def forward(self, sample: Tensor, text: Tensor) -> Tensor:
        x = sample.flatten(2).mT
        for q, k, v, out in (self.own, self.other):
            y = x if q is self.own[0] else text
            heads = (z.unflatten(-1, (2, -1)).transpose(1, 2) for z in (q(x), k(y), v(y)))
            x = x + out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x.mT.unflatten(2, sample.shape[2:])


def programs(scope: Any = "stack") -> tuple[fx.Graph, fx.Graph]:
    """The graphs of a step for one process alone, and for one of four."""
    inputs = {"sample": torch.randn(2, WIDTH, 8, 8), "text": torch.randn(2, TEXT, WIDTH)}
    captured = capture(Both().eval(), (), inputs)
    analysis, flow = analyze(captured)
    whole = make_plan(analysis, flow, ToMAConfig(min_tokens=16, tile=4, scope=scope))
    shared = shard_plan(whole, analysis, flow, Rank(1, COUNT, "0"))
    plans = (whole, shared)
    graphs = [rewrite(captured, analysis, flow, p, REUSE).graph_module.graph for p in plans]
    return graphs[0], graphs[1]


def exchanges(graph: fx.Graph) -> list[tuple[int, ...]]:
    """Shapes of what is sent, in order."""
    waits = [n for n in graph.nodes if is_wait(n.target)]
    return [tuple(n.args[0].args[0].meta["val"].shape) for n in waits]


@pytest.mark.parametrize(("scope", "updates"), [("stack", 1), ("sublayer", 2)])
def test_keys_of_the_image_and_updates_are_exchanged(scope: str, updates: int) -> None:
    alone, shared = programs(scope)
    assert not exchanges(alone)
    own, merged = TOKENS // COUNT, TOKENS // COUNT // 2
    keys_and_values = (2, 2, merged, 2 * WIDTH // 2)
    sent = exchanges(shared)
    assert sent[0] == keys_and_values
    assert sent.count(keys_and_values) == 1, "text has no other keys elsewhere"
    assert sent[1:] == [(2, own, WIDTH)] * updates


def test_queries_are_those_of_one_process_and_keys_those_of_all() -> None:
    for graph, queries in zip(programs(), (TOKENS // 2, TOKENS // 2 // COUNT), strict=True):
        sites = [n for n in graph.nodes if op_name(n.target) == ATTENTION]
        tokens = [[x.meta["val"].shape[-2] for x in site.args[:3]] for site in sites]
        assert tokens == [[queries, TOKENS // 2, TOKENS // 2], [queries, TEXT, TEXT]]


def test_an_exchange_that_nothing_reads_goes() -> None:
    _, shared = programs()
    wait = next(n for n in shared.nodes if is_wait(n.target))
    assert wait.is_impure()
    assert not is_dead(wait)
    for user in list(wait.users):
        user.replace_input_with(wait, wait.args[0])
    assert is_dead(wait)

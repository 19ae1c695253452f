"""Text that attention joins to the image: which part a process computes, and what is exchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.propagate import analyze
from toma_fx.capture.model import capture
from toma_fx.compat.collectives import is_gather
from toma_fx.graph.nodes import ATTENTION, op_name
from toma_fx.methods.sharded import Rank
from toma_fx.methods.toma import ToMAConfig
from toma_fx.passes.pipeline import Program, rewrite
from toma_fx.passes.uses import CACHED, REFRESH, REUSE
from toma_fx.plan.plan import MergePlan
from toma_fx.plan.planner import make_plan
from toma_fx.plan.sharding import shard_plan

TEXT, TOKENS, WIDTH, COUNT = 9, 64, 8, 4
OWN = TEXT // COUNT + TEXT % COUNT
MERGED = TOKENS // COUNT // 2


class Block(nn.Module):
    """Joint attention, an update of image tokens and one of text."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.words = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.out_words = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, C], [B, L, C], [L + N, C / 2] -> both."""
        both, length = torch.cat([self.words(text), self.image(x)], 1), text.shape[1]
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in both.chunk(3, -1))
        y = F.scaled_dot_product_attention(q * table, k * table, v).transpose(1, 2).flatten(2)
        return x + self.out(y[:, length:]), text + self.out_words(y[:, :length])


class Joint(nn.Module):
    """Two blocks of joint attention over 8x8 image tokens and a text.

    Args:
        end: what becomes of the text: "" nothing, "output" it is one, "pooled" its mean is added,
            "summed" it goes through a sum over its tokens before the blocks.
    """

    def __init__(self, end: str = "") -> None:
        super().__init__()
        self.end, self.blocks = end, nn.ModuleList(Block() for _ in range(2))

    def forward(self, sample: Tensor, text: Tensor, table: Tensor, timestep: Tensor) -> Any:
        """[B, C, 8, 8], [B, L, C], [L + 64, C / 2], [B] -> [B, C, 8, 8]."""
        x = sample.flatten(2).mT
        if self.end == "summed":
            text = text + text.cumsum(1)
        for block in self.blocks:
            x, text = block(x, text, table)
        if self.end == "pooled":
            x = x + text.mean(1, keepdim=True)
        picture = x.mT.unflatten(2, sample.shape[2:]) * timestep.view(-1, 1, 1, 1)
        return (picture, text) if self.end == "output" else picture


def programs(
    end: str = "", uses: Any = (REUSE,), **options: Any
) -> tuple[MergePlan, Flow, list[Program]]:
    """The plan and the programs of the second of four processes."""
    torch.manual_seed(0)
    inputs = {
        "sample": torch.randn(2, WIDTH, 8, 8),
        "text": torch.randn(2, TEXT, WIDTH),
        "table": torch.randn(TEXT + TOKENS, WIDTH // 2),
        "timestep": torch.rand(2),
    }
    captured = capture(Joint(end).eval(), (), inputs)
    analysis, flow = analyze(captured)
    config = ToMAConfig(min_tokens=16, tile=4, **{"scope": "stack", **options})
    plan = make_plan(analysis, flow, config, "timestep")
    plan = shard_plan(plan, analysis, flow, Rank(1, COUNT, "0"))
    return plan, flow, [rewrite(captured, analysis, flow, plan, use) for use in uses]


def exchanges(graph: fx.Graph) -> list[tuple[int, ...]]:
    """Shapes of what is sent, in order."""
    return [tuple(n.args[0].meta["val"].shape) for n in graph.nodes if is_gather(n.target)]


KEYS = (2, 2, TEXT // COUNT + MERGED, WIDTH)
"""Keys and values of one exchange: 2 heads, as many channels each."""
UPDATE = (2, TOKENS // COUNT, WIDTH)
PART = (2, TEXT // COUNT, WIDTH)


@pytest.mark.parametrize(
    ("end", "sent"),
    [
        ("", [KEYS, KEYS, UPDATE]),
        ("output", [KEYS, KEYS, PART, UPDATE]),
        ("pooled", [KEYS, KEYS, PART, UPDATE]),
    ],
)
def test_text_is_sent_with_the_keys_and_where_it_is_read(end: str, sent: Any) -> None:
    plan, _, (program,) = programs(end)
    assert plan.text is not None
    assert plan.text.lengths == {"text": OWN}
    assert sorted(exchanges(program.graph_module.graph)) == sorted(sent)


@pytest.mark.parametrize("scope", ["stack", "block", "sublayer"])
def test_attention_has_own_queries_and_all_keys(scope: Any) -> None:
    plan, _, (program,) = programs(scope=scope)
    assert plan.text is not None
    graph = program.graph_module.graph
    sites = [n for n in graph.nodes if op_name(n.target) == ATTENTION]
    tokens = [tuple(x.meta["val"].shape[-2] for x in site.args[:3]) for site in sites]
    assert tokens == [(OWN + MERGED, TEXT + TOKENS // 2, TEXT + TOKENS // 2)] * 2
    linear = [n for n in graph.nodes if op_name(n.target) == "aten.linear"]
    assert {n.meta["val"].shape[1] for n in linear} >= {OWN}
    assert TEXT not in {n.meta["val"].shape[1] for n in linear}


def test_a_sum_over_the_text_sees_all_of_it() -> None:
    plan, flow, (program,) = programs("summed")
    assert plan.text is not None
    (total,) = (n for n in flow.order if flow.ops[n] == "aten.cumsum")
    assert total not in plan.text.inner
    shapes = {n.name: tuple(n.meta["val"].shape) for n in program.graph_module.graph.nodes
              if isinstance(n.meta.get("val"), Tensor)}  # fmt: skip
    assert shapes[total] == (2, TEXT, WIDTH)
    assert exchanges(program.graph_module.graph) == [KEYS, KEYS, UPDATE]


def test_what_is_kept_over_steps_has_all_of_the_text() -> None:
    cache = {"every": 2, "order": 0, "scope": "block", "include": ("blocks.0*",)}
    plan, _, (refresh, cached) = programs(uses=(REFRESH, CACHED), scope="block", cache=cache)
    assert plan.text is not None
    assert plan.cache is not None
    texts = [u for u in plan.cache.updates if u.shape[1] == TEXT]
    assert texts, "the second block reads the text that the first one leaves to it"
    assert {u.node for u in texts} <= set(plan.text.whole)
    kept = refresh.graph_module.graph.output_node().args[0]
    assert (2, TEXT, WIDTH) in {tuple(n.meta["val"].shape) for n in kept}
    assert exchanges(cached.graph_module.graph) == [KEYS, UPDATE]

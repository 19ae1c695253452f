"""Models whose residual stream is the input itself: what merges it goes behind all inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toma_fx


class Net(nn.Module):
    """Two MLPs; the stream is the input, or the input through a layer that changes nothing."""

    def __init__(self, direct: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        self.a, self.b = (nn.ModuleList(nn.Linear(*s) for _ in "12") for s in ((8, 16), (16, 8)))
        self.entry = nn.Linear(8, 8, bias=False)
        nn.init.eye_(self.entry.weight)
        self.direct = direct

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = hidden_states if self.direct else self.entry(hidden_states)
        for a, b in zip(self.a, self.b, strict=True):
            x = x + b(F.gelu(a(self.norm(x)))) * timestep.view(-1, 1, 1) / 1000
        return x


CONFIGS: dict[str, dict[str, Any]] = {
    "toma": {"destinations_every": 4, "weights_every": 2},
    "by block": {"destinations_every": 4, "weights_every": 2, "scope": "block"},
    "lagged": {"method": "dito", "destinations_every": 4, "weights_every": 2},
    "cached": {"destinations_every": 2, "weights_every": 1, "cache": {"every": 2, "order": 1}},
    "lagged and cached": {"method": "dito", "cache": {"every": 2, "order": 0}},
    "late": {"first_step": 1, "weights_every": 1, "cache": {"every": 2, "order": 0}},
    "phases": {"phases": ((2, {"ratio": 0.25}),), "weights_every": 1},
}


def denoisers(name: str) -> tuple[Any, Any]:
    """Of the input as a stream, and of its twin."""
    fields = {"grid": (4, 4), "min_tokens": 1, "branches": "mlp", **CONFIGS[name]}
    direct, twin = (toma_fx.optimize(Net(direct).eval(), **fields) for direct in (True, False))
    return direct, twin


def call(step: int, rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(10 * seed + step)
    return {
        "hidden_states": torch.randn(rows, 16, 8, generator=made),
        "timestep": torch.full((rows,), 1000.0 - 100 * step),
    }


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_kind_has_its_inputs_first(name: str) -> None:
    """A program that reads an input before it comes is refused when it is verified."""
    found = denoisers(name)[0].specialized((), call(0))[0]
    names = {i.name for i in found.captured.inputs}
    assert not names.isdisjoint(g.feature for g in found.plan.groups), "it selects on an input"
    for kind in found.uses:
        graph = found.program(kind).graph_module.graph
        ops = [n.op for n in graph.nodes if n.op != "get_attr"]
        count = ops.count("placeholder")
        assert ops[:count] == ["placeholder"] * count
        assert count == len(found.captured.inputs) + len(found.takes(kind))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_steps_are_those_of_a_twin_whose_stream_is_no_input(name: str) -> None:
    direct, twin = denoisers(name)
    with direct.generation(steps=6), twin.generation(steps=6):
        for step in range(6):
            torch.testing.assert_close(direct(**call(step)), twin(**call(step)))
    assert direct.totals == twin.totals
    assert len(direct.totals) > 1


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("phases", "late")])
@torch.no_grad()
def test_requests_at_different_steps_share_a_batch(name: str) -> None:
    """Rows of one batch are due different kinds."""
    results = []
    for denoiser in denoisers(name):
        _, early = denoiser.step(call(0, 1), toma_fx.State(steps=6))
        both = {k: torch.cat([v, call(0, 1, seed=1)[k]]) for k, v in call(1, 1).items()}
        results.append(denoiser.step(both, [early, toma_fx.State(steps=6)])[0])
    torch.testing.assert_close(*results)

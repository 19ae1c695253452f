"""A stream [tokens, batch, channels] merges as one with the batch first does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toma_fx

N, C, TEXT = 16, 8, 3


class Net(nn.Module):
    """Two blocks on [picture | text] with a table of tokens; something is added between them."""

    def __init__(self, leading: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.qkv = nn.LayerNorm(C), nn.Linear(C, 3 * C)
        self.up, self.down = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.entry, self.gate = nn.Linear(C, C), nn.Parameter(torch.rand(N + TEXT, 1, C))
        self.place, self.leading = nn.Parameter(torch.randn(N + TEXT, 1, C)), leading

    def stream(self, x: Tensor) -> Tensor:
        """Of a value with the batch first."""
        return x.transpose(0, 1).contiguous() if self.leading else x

    def table(self, x: Tensor) -> Tensor:
        return x if self.leading else x.transpose(0, 1)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, text: Tensor, extra: Tensor
    ) -> Tensor:
        picture, words = self.stream(self.entry(hidden_states)), self.stream(text)
        x = torch.cat([picture, words], 0 if self.leading else 1)
        times = self.stream(timestep.view(-1, 1, 1)) / 1000
        for block in range(2):
            n = self.norm(x) + self.table(self.place)
            q, k, v = (y.unflatten(2, (2, -1)) for y in self.stream(self.qkv(n)).chunk(3, 2))
            y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)))
            x = x + self.table(self.gate) * self.stream(y.transpose(1, 2).flatten(2)) * times
            x = x + self.down(F.gelu(self.up(self.norm(x))))
            if block == 0:
                x = x + self.stream(F.pad(extra, (0, 0, 0, TEXT)))
        return (self.stream(x) if self.leading else x)[:, :N]


CONFIGS: dict[str, dict[str, Any]] = {
    "stack": {"weights_every": 2},
    "block": {"scope": "block"},
    "sublayer": {"scope": "sublayer", "share": "block"},
    "keys": {"scope": "keys", "method": "todo", "min_tokens": 1},
    "proportional": {"proportional": True},
    "tomesd": {"method": "tomesd"},
    "tofu": {"method": "tofu"},
    "lagged": {"method": "dito", "destinations_every": 4, "weights_every": 2},
    "cached": {"destinations_every": 2, "weights_every": 1, "cache": {"every": 2, "order": 1}},
    "cached blocks": {"scope": "block", "cache": {"every": 2, "order": 0, "scope": "block"}},
    "cached, unmerged": {"ratio": 0.0, "cache": {"every": 2, "order": 1}},
}


def denoisers(name: str) -> tuple[Any, Any]:
    """With the tokens first, and with the batch first."""
    fields = {"grid": (4, 4), "min_tokens": 1, **CONFIGS[name]}
    leading, other = (toma_fx.optimize(Net(leading).eval(), **fields) for leading in (True, False))
    return leading, other


def call(step: int, rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(10 * seed + step)
    return {
        "hidden_states": torch.randn(rows, N, C, generator=made),
        "timestep": torch.full((rows,), 1000.0 - 100 * step),
        "text": torch.randn(rows, TEXT, C, generator=made),
        "extra": torch.randn(rows, N, C, generator=made),
    }


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_steps_are_those_with_the_batch_first(name: str) -> None:
    leading, other = denoisers(name)
    with leading.generation(steps=4), other.generation(steps=4):
        for step in range(4):
            got = leading(**call(step))
            torch.testing.assert_close(got, other(**call(step)), rtol=0, atol=2e-5)
    assert leading.totals == other.totals
    changed = float((got - Net(True).eval()(**call(3))).abs().max())
    assert changed > 1e-3, "nothing merges, and nothing is cached"
    rows, others = (d.specialized((), call(0))[0].plan.segments for d in (leading, other))
    assert [s.modules for s in rows] == [s.modules for s in others]


@pytest.mark.parametrize("name", ["stack", "lagged", "cached", "cached blocks"])
@torch.no_grad()
def test_requests_at_different_steps_share_a_batch(name: str) -> None:
    """Rows of one batch are due different kinds."""
    results = []
    for denoiser in denoisers(name):
        _, early = denoiser.step(call(0, 1), toma_fx.State(steps=4))
        both = {k: torch.cat([v, call(0, 1, seed=1)[k]]) for k, v in call(1, 1).items()}
        results.append(denoiser.step(both, [early, toma_fx.State(steps=4)])[0])
    torch.testing.assert_close(*results, rtol=0, atol=2e-5)

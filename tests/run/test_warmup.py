"""Warm-up: after it, nothing is captured or compiled."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import toma_fx
from tests import denoisers
from tests.logs import logged
from tests.methods.test_methods import inputs, model
from toma_fx.errors import ConfigError, ModelTypeError
from toma_fx.models.named import example_inputs
from toma_fx.run import compiled
from toma_fx.run.batching import State

SMALL: dict[str, Any] = {"min_tokens": 1, "scope": "stack"}


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    run_as_it_is = lambda gm, *_: calls.append(gm) or gm.forward  # noqa: E731
    monkeypatch.setattr(compiled, "compile_graph", run_as_it_is)
    return calls


@torch.no_grad()
def test_sizes(compiling: list[Any]) -> None:
    flux = denoisers.small_flux(num_single_layers=0)
    optimized: Any = toma_fx.optimize(flux, **SMALL, weights_every=2).compile()
    with logged(logging.INFO) as messages:
        optimized.warmup([(64, 64), (64, 128)], batch=(1, 2), text=5)
    shown = [m for m in messages if m.startswith("warm-up")]
    assert [m.split(" in ")[0] for m in shown] == [
        "warm-up 1 of 4: 64x64, batch 1", "warm-up 2 of 4: 64x64, batch 2",
        "warm-up 3 of 4: 64x128, batch 1", "warm-up 4 of 4: 64x128, batch 2",
    ]  # fmt: skip
    assert all(m.endswith("(refresh, reuse, reweigh)") for m in shown)
    assert len(compiling) == 12
    assert not optimized.states, "it is no generation"
    assert not optimized.totals
    eager: Any = toma_fx.optimize(flux, **SMALL, weights_every=2)
    for _ in range(3):
        call = example_inputs(flux, 64, 128, 2, text=5)
        assert denoisers.relative(optimized(**call)[0], eager(**call)[0]) < 1e-5
    assert optimized.cache.captures == 4
    assert len(compiling) == 12


@torch.no_grad()
def test_calls_and_mixed_batches(compiling: list[Any]) -> None:
    optimized: Any = toma_fx.optimize(model(), **SMALL, cache="balanced").compile()
    optimized.warmup(calls=[inputs()], mixed=True)
    count = len(compiling)
    states = [State(steps=4), State(steps=4)]
    rows = [inputs(timestep=t) for t in (900.0, 800.0)]
    _, states[0] = optimized.step({k: v[:1] for k, v in rows[0].items()}, states[0])
    before = len(compiling)
    _, states = optimized.step(rows[0], states)
    assert before > count, "half a batch is another signature"
    assert len(compiling) == before, "a batch of two kinds is not"


def test_what_is_refused() -> None:
    optimized: Any = toma_fx.optimize(denoisers.flux(), **SMALL, max_signatures=2)
    with pytest.raises(ConfigError, match="too many signatures"):
        optimized.warmup([(64, 64)], batch=(1, 2, 3))
    with pytest.raises(ConfigError, match="for nothing"):
        optimized.warmup()
    assert optimized.cache.captures == 0
    other: Any = toma_fx.optimize(model(), **SMALL)
    with pytest.raises(ModelTypeError, match="no example inputs"):
        other.warmup([(64, 64)])


PROCESS = """
import sys, torch, toma_fx
from pathlib import Path
from torch._dynamo.utils import counters
from tests import denoisers
torch.set_num_threads(1)
model = denoisers.flux(num_layers=1, num_single_layers=3)
optimized = toma_fx.optimize(model, min_tokens=1, scope="stack").compile()
bundle = Path(sys.argv[1])
if bundle.exists():
    torch.compiler.load_cache_artifacts(bundle.read_bytes())
with torch.no_grad():
    optimized.warmup([(64, 64)], text=5)
if not bundle.exists():
    bundle.write_bytes(torch.compiler.save_cache_artifacts()[0])
print(counters["inductor"]["fxgraph_cache_miss"], counters["aot_autograd"]["autograd_cache_hit"])
"""


def test_another_process_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the caches of the first as a bundle."""
    results = []
    for name in ("first", "second"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / name))
        out = subprocess.run(
            [sys.executable, "-c", PROCESS, str(tmp_path / "bundle")],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        results.append(tuple(map(int, out.stdout.splitlines()[-1].split())))
    assert results[0][0] >= 2, "refresh and reuse"
    assert results[1] == (0, 2)

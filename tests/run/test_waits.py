"""How often a step reads a tensor, as if tensors lay on a GPU: each time, the host would wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor
from torch.overrides import TorchFunctionMode

import toma_fx
from tests import denoisers
from tests.methods.test_methods import inputs, model
from toma_fx.errors import TomaError
from toma_fx.models.named import example_inputs
from toma_fx.run import marks, timesteps
from toma_fx.run.batching import State
from toma_fx.run.marks import SEEN, PositionIds
from toma_fx.run.timesteps import TimestepValue, entry_of_table

READS = {
    "item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__",
    "equal", "allclose",
}  # fmt: skip
STEPS = 6


class Reads(TorchFunctionMode):
    """Counts what reads the contents of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in READS
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (marks, timesteps):
        monkeypatch.setattr(module, "is_computed_elsewhere", lambda tensor: True)


def sdxl_calls() -> Iterator[dict[str, Any]]:
    """As a pipeline makes them: one text, the scheduler's own timesteps."""
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    call = denoisers.sdxl_inputs()
    for t in scheduler.timesteps:
        yield {**call, "sample": torch.randn_like(call["sample"]), "timestep": t}


def flux_calls() -> Iterator[dict[str, Any]]:
    """As a pipeline makes them: each timestep is a tensor of its own."""
    call = example_inputs(denoisers.flux(), 64, 64, 1, text=5)
    for t in torch.linspace(1000, 100, STEPS):
        latents = torch.randn_like(call["hidden_states"])
        yield {**call, "hidden_states": latents, "timestep": t.expand(1).clone() / 1000}


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Iterator[dict[str, Any]]]]] = {
    "sdxl": (denoisers.sdxl, sdxl_calls),
    "flux": (denoisers.flux, flux_calls),
}


def reads_of(name: str, *, told: bool) -> list[int]:
    """Reads at each step."""
    make, calls = CASES[name]
    optimized: Any = toma_fx.optimize(make(), min_tokens=1, destinations_every=10, weights_every=10)
    counts = []
    with torch.no_grad(), optimized.generation(STEPS if told else None) as run:
        for i, call in enumerate(calls()):
            if told:
                run.step(i)
            with Reads() as reads:
                optimized(**call)
            counts.append(reads.count)
    assert optimized.totals == {"refresh": 1, "reuse": STEPS - 1}
    return counts


@pytest.mark.parametrize("name", CASES)
def test_told_steps_read_nothing(name: str) -> None:
    assert not any(reads_of(name, told=True)[1:])


def guessed(name: str) -> list[int]:
    """The same where nobody tells which step it is."""
    make, calls = CASES[name]
    optimized: Any = toma_fx.optimize(make(), min_tokens=1, destinations_every=10, weights_every=10)
    counts = []
    with torch.no_grad():
        for call in calls():
            with Reads() as reads:
                optimized(**call)
            counts.append(reads.count)
    assert optimized.totals == {"refresh": 1, "reuse": STEPS - 1}
    return counts


def test_a_table_of_timesteps_is_read_once() -> None:
    assert not any(guessed("sdxl")[1:])


def test_a_timestep_of_its_own_is_read_at_each_step() -> None:
    """There is nothing else that tells a new picture from the next step."""
    assert guessed("flux")[1:] == [1] * (STEPS - 1)


@torch.no_grad()
def test_entries_of_tables() -> None:
    table = torch.linspace(999.0, 0.0, 5)
    values = table.tolist()
    assert [entry_of_table(t) for t in table] == values
    assert [entry_of_table(table[i].expand(3)) for i in range(5)] == values
    assert [entry_of_table(t) for t in table[2:]] == values[2:], "an image to start from"
    table[1] = 7.0
    assert entry_of_table(table[1]) == 7.0, "read again when it was written to"
    assert entry_of_table(table.clone()) is None, "no view"
    assert entry_of_table(table[1:3]) is None, "two numbers"
    assert entry_of_table(torch.tensor(3.0)) is None
    assert entry_of_table(torch.zeros(2, 3)[0, 1]) is None, "no list of timesteps"
    conjugate = torch.view_as_complex(torch.arange(6.0).view(3, 2)).conj().imag
    assert entry_of_table(conjugate[1]) is None, "a view that changes the sign"
    assert TimestepValue(conjugate[1]).read() == -3.0
    with torch.inference_mode():
        assert entry_of_table(torch.linspace(9.0, 0.0, 5)[1]) is None, "views are not told there"
    steps = torch.arange(3, 40_000)[5:9]
    assert TimestepValue(steps[0]).read() == 8.0
    for i in range(50):  # tables that are gone
        assert TimestepValue(torch.full((4,), float(i))[2]).read() == float(i)
    assert len(timesteps._tables) <= timesteps.TABLES


@torch.no_grad()
def test_waiting_changes_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def outputs() -> list[Tensor]:
        optimized: Any = toma_fx.optimize(model(), min_tokens=1)
        return [optimized(**inputs(seed=i, timestep=900.0 - i)) for i in range(3)]

    there = outputs()
    monkeypatch.undo()
    assert all(map(torch.equal, there, outputs()))


@torch.no_grad()
def test_states_of_callers_read_nothing() -> None:
    """Two requests of one size that take turns, each with position ids of its own."""
    optimized: Any = toma_fx.optimize(
        denoisers.small_flux(), min_tokens=1, destinations_every=10, weights_every=10
    )
    requests = [list(flux_calls()) for _ in range(2)]
    states, counts = [State(), State()], []
    for i in range(STEPS):
        for j, calls in enumerate(requests):
            with Reads() as reads:
                _, states[j] = optimized.step(calls[i], states[j])
            counts.append(reads.count)
    assert counts[0]
    assert not any(counts[2:])
    assert optimized.totals == {"refresh": 2, "reuse": 2 * (STEPS - 1)}


@torch.no_grad()
def test_position_ids_of_a_call_that_failed_are_forgotten() -> None:
    """Ids of no grid are refused; calls of the same shapes on two grids come next."""
    call = denoisers.small_flux_inputs(8, 8)
    scattered = {**call, "img_ids": torch.rand_like(call["img_ids"])}
    grids = [{**call, "img_ids": denoisers.ids(*size)} for size in ((8, 8), (2, 32))]
    for scope in ("method", "step"):
        optimized: Any = toma_fx.optimize(denoisers.small_flux(), min_tokens=1)

        def run(denoiser: Any, inputs: dict[str, Any], scope: str = scope) -> Tensor:
            if scope == "step":
                return denoiser.step(inputs, State())[0][0]
            return denoiser(**inputs)[0]

        with pytest.raises(TomaError):
            run(optimized, scattered)
        for each in grids:
            alone = toma_fx.optimize(denoisers.small_flux(), min_tokens=1)
            assert torch.equal(run(optimized, each), run(alone, each))


@torch.no_grad()
def test_position_ids_are_read_once() -> None:
    grids = [denoisers.ids(8, 8), denoisers.ids(4, 16)]
    seen = PositionIds([grids[0], torch.rand(1, 64, 4)])
    for _ in range(3):  # two requests that take turns
        found = [seen.read([grid, torch.rand(1, 64, 4)])[0] for grid in grids]
    with Reads() as reads:
        assert [seen.read([grid, torch.rand(1, 64, 4)]) for grid in grids] == [
            (raster, None) for raster in found
        ]
    assert not reads.count
    assert [raster.grid for raster in found if raster] == [(8, 8), (4, 16)]
    grids[0].copy_(grids[1])
    assert seen.read([grids[0], None]) == (found[1], None), "it was written to"
    for i in range(2 * SEEN):
        seen.read([denoisers.ids(8, 8) + i, None])
    assert len(seen._seen[0]) == SEEN

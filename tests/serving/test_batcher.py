"""Requests that share batches get what each gets alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toma_fx
from tests import denoisers
from tests.logs import logged
from toma_fx.errors import ConfigError, SignatureError, StateError
from toma_fx.run import batching
from toma_fx.run.rows import Splitter, cut, join
from toma_fx.serving import StepBatcher

STEPS = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "merged": {"destinations_every": 4, "weights_every": 2},
    "cached": {"toma": False, "cache": {"every": 2, "warmup_steps": 2}},
    "both": {"destinations_every": 4, "cache": {"every": 3, "last_steps": 1}},
    "later": {"first_step": 2},
}


def flux_call(request: int, step: int, rows: int = 1, size: tuple[int, int] = (8, 8)) -> Any:
    """A call of a request; each brings position ids of its own, and a number of its own."""
    call = denoisers.flux_inputs(*size, seed=request, batch=rows, timestep=0.9 - 0.1 * step)
    torch.manual_seed(100 * request + step)
    call["hidden_states"] = torch.randn_like(call["hidden_states"])
    return call


def sdxl_call(request: int, step: int, rows: int = 2) -> Any:
    """With guidance; the timestep is one number for both rows."""
    call = denoisers.sdxl_inputs()
    torch.manual_seed(100 * request + step)
    call["sample"] = torch.randn_like(call["sample"])
    call["encoder_hidden_states"] = torch.randn_like(call["encoder_hidden_states"])
    return {**call, "timestep": torch.tensor(900.0 - 100 * step)}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "flux": (lambda: denoisers.small_flux(num_single_layers=0), flux_call),
    "sdxl": (denoisers.sdxl, sdxl_call),
}


def optimized(name: str = "flux", what: str = "merged") -> Any:
    return toma_fx.optimize(MODELS[name][0](), min_tokens=16, **OPTIONS[what])


def alone(denoiser: Any, call: Callable[..., Any], request: int) -> list[Tensor]:
    """What a request gets by itself."""
    state, outputs = toma_fx.State(steps=STEPS), []
    for i in range(STEPS):
        out, state = denoiser.step(call(request, i), state)
        outputs.append(out[0])
    return outputs


SCHEDULE = [(1,), (1, 2), (1, 2, 3), (2, 3), (1, 2, 3), (1, 3), (1, 2, 3), (1, 2), (2, 3), (3,)]
"""Which requests step together: they come and go at different times."""


def served(batcher: StepBatcher, call: Callable[..., Any]) -> dict[int, list[Tensor]]:
    """The same requests, batched."""
    outputs: dict[int, list[Tensor]] = {1: [], 2: [], 3: []}
    for requests in SCHEDULE:
        for request in requests:
            if request not in batcher.requests and not outputs[request]:
                batcher.join(request, steps=STEPS)
        calls = {r: call(r, len(outputs[r])) for r in requests if len(outputs[r]) < STEPS}
        for request, result in batcher.step(calls).items():
            outputs[request].append(result.unwrap()[0])
            if len(outputs[request]) == STEPS:
                batcher.leave(request)
    assert all(len(outs) >= STEPS - 1 for outs in outputs.values())
    return outputs


def same(got: dict[int, list[Tensor]], want: dict[int, list[Tensor]]) -> bool:
    return all(
        denoisers.relative(a, b) < 1e-5
        for request, outputs in got.items()
        for a, b in zip(outputs, want[request], strict=False)
    )


@pytest.mark.parametrize("mix", ["none", "computed", "all"])
@pytest.mark.parametrize("what", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_each_request_gets_what_it_gets_alone(name: str, what: str, mix: Any) -> None:
    denoiser, call = optimized(name, what), MODELS[name][1]
    want = {request: alone(denoiser, call, request) for request in (1, 2, 3)}
    batcher = StepBatcher(denoiser, buckets=(4, 6), mix=mix)
    with logged(logging.WARNING, "toma_fx.serving") as warnings:
        assert same(served(batcher, call), want)
    assert not warnings, "no batch failed"


@torch.no_grad()
def test_swapped_states_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: here two requests get each other's state."""
    denoiser = optimized()
    want = {request: alone(denoiser, flux_call, request) for request in (1, 2, 3)}
    monkeypatch.setattr(
        batching, "_cut", lambda given, rows, cut=batching._cut: cut(given, rows)[::-1]
    )
    assert not same(served(StepBatcher(denoiser, buckets=(1, 2, 3)), flux_call), want)


@torch.no_grad()
def test_batches_are_filled_up() -> None:
    denoiser = optimized()
    batcher = StepBatcher(denoiser, buckets=(4,))
    for request in range(3):
        batcher.join(request)
    for i in range(2):
        batcher.step({r: flux_call(r, i) for r in range(3)})
    assert denoiser.cache.captures == 1
    assert denoiser.totals == {"refresh": 1, "reuse": 1}
    batcher.join("two rows")
    batcher.step({0: flux_call(0, 2), "two rows": flux_call(7, 0, rows=2)})
    assert denoiser.totals["mixed"] == 1
    assert denoiser.cache.captures == 1


@torch.no_grad()
def test_sizes_and_large_batches_are_batches_of_their_own() -> None:
    denoiser = optimized()
    batcher = StepBatcher(denoiser, buckets=(1, 2))
    calls = {r: flux_call(r, 0, size=(8, 8) if r % 2 else (8, 12)) for r in range(6)}
    for request in calls:
        batcher.join(request)
    results = batcher.step(calls)
    assert denoiser.totals == {"refresh": 4}, "three of each size, two at a time"
    for request, result in results.items():
        want, _ = denoiser.step(calls[request], toma_fx.State())
        assert denoisers.relative(result.unwrap()[0], want[0]) < 1e-5


def broken(what: str) -> Any:
    call = flux_call(2, 1)
    if what == "nan":
        call["hidden_states"][0, 3] = torch.nan
    elif what == "shape":
        call["encoder_hidden_states"] = call["encoder_hidden_states"][..., :-1]
    elif what == "nothing":
        del call["hidden_states"]
    elif what == "argument":
        call["colour"] = 3
    return call


BROKEN: dict[str, Any] = {
    "nan": StateError, "shape": Exception, "nothing": SignatureError, "argument": SignatureError,
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
@torch.no_grad()
def test_an_error_belongs_to_one_request(what: str) -> None:
    denoiser = optimized()
    want = {request: alone(denoiser, flux_call, request) for request in (1, 2, 3)}
    batcher = StepBatcher(denoiser, buckets=(1, 2, 4))
    for request in (1, 2, 3):
        batcher.join(request, steps=STEPS)
    batcher.step({r: flux_call(r, 0) for r in (1, 2, 3)})
    results = batcher.step({1: flux_call(1, 1), 2: broken(what), 3: flux_call(3, 1)})
    with pytest.raises(BROKEN[what]):
        results[2].unwrap()
    for request in (1, 3):
        assert denoisers.relative(results[request].unwrap()[0], want[request][1]) < 1e-5
    assert [batcher.leave(r).step for r in (1, 2, 3)] == [2, 1, 2], "it stays at its step"


@torch.no_grad()
def test_a_request_goes_on_elsewhere() -> None:
    """Suspended, resumed, and handed to another batcher."""
    denoiser = optimized()
    want = alone(denoiser, flux_call, 1)
    one, other = StepBatcher(denoiser), StepBatcher(denoiser)
    one.join("r", steps=STEPS)
    outputs = [one.step({"r": flux_call(1, 0)})["r"].unwrap()[0]]
    one.suspend("r")
    outputs.append(one.step({"r": flux_call(1, 1)})["r"].unwrap()[0])
    other.join("r", state=one.leave("r"))
    outputs += [other.step({"r": flux_call(1, i)})["r"].unwrap()[0] for i in range(2, STEPS)]
    assert all(denoisers.relative(a, b) < 1e-5 for a, b in zip(outputs, want, strict=True))


@torch.no_grad()
def test_who_comes_and_goes() -> None:
    batcher = StepBatcher(optimized())
    batcher.join("a")
    with pytest.raises(StateError, match="joined already"):
        batcher.join("a")
    results = batcher.step({"b": flux_call(1, 0)})
    with pytest.raises(StateError, match="no such request"):
        results["b"].unwrap()
    with pytest.raises(ConfigError, match="more rows than a batch"):
        batcher.step({"a": flux_call(1, 0, rows=9)})["a"].unwrap()
    batcher.leave("a")
    with pytest.raises(StateError, match="no such request"):
        batcher.leave("a")
    assert batcher.step({}) == {}


@pytest.mark.parametrize(
    "options", [{"buckets": ()}, {"buckets": (0,)}, {"buckets": (1.0,)}, {"mix": "some"}]
)
def test_settings_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        StepBatcher(optimized(), **options)


def test_rows_of_calls() -> None:
    splitter = Splitter("hidden_states")
    calls = [splitter.split(flux_call(r, r, rows=r)) for r in (1, 2)]
    assert calls[0].key == calls[1].key, "position ids are equal tensors"
    assert splitter.split(flux_call(1, 0, size=(8, 12))).key != calls[0].key
    joined = join(calls)
    assert joined["hidden_states"].shape == (3, 64, 4)
    assert joined["img_ids"].shape == (64, 3)
    assert joined["timestep"].tolist() == pytest.approx([0.8, 0.7, 0.7])
    pieces = cut((joined["hidden_states"], 3), [1, 2])
    for piece, call in zip(pieces, (flux_call(1, 1), flux_call(2, 2, rows=2)), strict=True):
        assert torch.equal(piece[0], call["hidden_states"])
        assert piece[1] == 3


def scalars() -> Iterator[Any]:
    yield from (500, 500.0, torch.tensor(500), torch.tensor(500.0))


def test_a_number_as_timestep_becomes_one_for_each_row() -> None:
    for value in scalars():
        call = Splitter("sample").split({"sample": torch.rand(2, 4, 8, 8), "timestep": value})
        assert join([call, call])["timestep"].tolist() == [500] * 4

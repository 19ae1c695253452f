"""State: which step of which generation a call is, states held by the caller, threads."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

import toma_fx
from tests import denoisers
from toma_fx.errors import SignatureError, StateError
from toma_fx.run.batching import State, share_rows
from toma_fx.run.generation import PassState

SMALL: dict[str, Any] = {"min_tokens": 60, "tile": 4}


def small_flux() -> Any:
    return denoisers.small_flux(num_single_layers=0)


def test_share_rows_states() -> None:
    two = State(1, {"p": torch.zeros(2, 3)})
    assert share_rows([two, State(), State()], 4) == [2, 1, 1]
    assert share_rows([State()], 3) == [3]
    for states, batch in (([two], 3), ([two, State()], 2), ([State(), State()], 3)):
        with pytest.raises(StateError, match="do not fill the batch"):
            share_rows(states, batch)


# -- states held by the caller --------------------------------------------------------------------


def call(seed: int, step: int, batch: int = 1) -> dict[str, Any]:
    return denoisers.flux_inputs(8, 8, batch=batch, seed=seed, timestep=0.9 - step / 20)


def together(*calls: dict[str, Any]) -> dict[str, Any]:
    """Calls of several requests as one batch."""
    shared = ("img_ids", "txt_ids", "return_dict")
    return {k: v if k in shared else torch.cat([c[k] for c in calls]) for k, v in calls[0].items()}


@torch.no_grad()
def test_step_equals_the_stand_in_and_changes_no_state() -> None:
    config = {"destinations_every": 4, "weights_every": 2, "last_step": 4}
    optimized, stand_in = (toma_fx.optimize(small_flux(), **SMALL, **config) for _ in range(2))
    state, states = State(), [State()]
    for i in range(6):
        got, state = optimized.step(call(1, i), state)
        assert torch.equal(got[0], stand_in(**call(1, i))[0])
        states.append(state)
    assert optimized.totals == {"refresh": 2, "reuse": 2, "reweigh": 1, "plain": 1}
    assert optimized.totals == stand_in.totals
    assert not optimized.states
    kept = {k: v.clone() for k, v in states[2].kept.items()}
    first = optimized.step(call(7, 2), states[2])
    again = optimized.step(call(7, 2), states[2])
    assert torch.equal(first[0][0], again[0][0]), "a state may be used again"
    assert all(torch.equal(v, kept[k]) for k, v in states[2].kept.items())
    assert [s.step for s in states] == list(range(7))


@torch.no_grad()
def test_requests_at_different_steps_share_a_batch() -> None:
    """Each request in a mixed batch gets what it gets alone."""
    config = {"destinations_every": 4, "weights_every": 2}
    optimized = toma_fx.optimize(small_flux(), **SMALL, **config)
    alone: dict[int, list[torch.Tensor]] = {}
    for request in (1, 2, 3):
        state = State()
        for i in range(6):
            out, state = optimized.step(call(request, i), state)
            alone.setdefault(request, []).append(out[0])
    one, two, three = State(), State(), State()
    _, one = optimized.step(call(1, 0), one)
    _, one = optimized.step(call(1, 1), one)
    out, (one, two) = optimized.step(together(call(1, 2), call(2, 0)), [one, two])
    results = {(1, 2): out[0][0], (2, 0): out[0][1]}
    for i in (1, 2, 3):
        batch = together(call(1, 2 + i), call(2, i), call(3, i - 1))
        out, (one, two, three) = optimized.step(batch, [one, two, three])
        results |= {(1, 2 + i): out[0][0], (2, i): out[0][1], (3, i - 1): out[0][2]}
    for (request, i), got in results.items():
        want = alone[request][i][0]
        assert denoisers.relative(got, want) < 1e-5, (request, i)
    assert optimized.totals["mixed"] >= 3
    assert (one.step, two.step, three.step) == (6, 4, 3)


@torch.no_grad()
def test_a_request_may_have_several_rows() -> None:
    optimized = toma_fx.optimize(small_flux(), **SMALL)
    (alone,), state = optimized.step(call(1, 0, batch=2), State())
    assert state.rows == 2
    (both,), (first, second) = optimized.step(
        together(call(1, 1, batch=2), call(2, 0)), [state, State()]
    )
    assert (first.rows, second.rows) == (2, 1)
    (want,), _ = optimized.step(call(1, 1, batch=2), state)
    assert denoisers.relative(both[:2], want) < 1e-5
    assert not torch.equal(both[:2], alone)


@torch.no_grad()
def test_states_that_do_not_fit_are_refused() -> None:
    optimized = toma_fx.optimize(small_flux(), **SMALL, first_step=1)
    _, begun = optimized.step(call(1, 0), State())
    _, begun = optimized.step(call(1, 1), begun)
    with pytest.raises(StateError, match="belongs to another call"):
        optimized.step(denoisers.flux_inputs(8, 12, batch=1), begun)
    with pytest.raises(StateError, match="do not fill the batch"):
        optimized.step(call(1, 2, batch=2), begun)
    with pytest.raises(StateError, match="no program serves requests"):
        optimized.step(together(call(1, 2), call(2, 0)), [begun, State()])


@torch.no_grad()
def test_a_changed_model_refreshes_the_states_of_callers() -> None:
    model = small_flux()
    optimized = toma_fx.optimize(model, **SMALL)
    _, state = optimized.step(call(1, 0), State())
    block = model.transformer_blocks[0]
    block.attn.to_q = torch.nn.Linear(32, 32).eval()
    optimized.step(call(1, 1), state)
    assert optimized.totals == {"refresh": 2}


# -- threads --------------------------------------------------------------------------------------


def run_thread(work: Any) -> list[BaseException]:
    """Run `work` in a thread; what it raised."""
    raised: list[BaseException] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return raised


@torch.no_grad()
def test_threads_that_take_turns_get_what_each_gets_alone() -> None:
    optimized, alone = (toma_fx.optimize(small_flux(), **SMALL) for _ in range(2))
    want = {}
    for seed in (1, 2):
        want[seed] = [alone(**call(seed, i))[0] for i in range(4)]
        alone.reset()
    for i in range(4):
        assert torch.equal(optimized(**call(1, i))[0], want[1][i])
        other: list[torch.Tensor] = []
        assert not run_thread(lambda i=i, other=other: other.append(optimized(**call(2, i))[0]))
        assert i > 0 or torch.equal(other[0], want[2][i]), "each call is a thread of its own"


@torch.no_grad()
def test_a_call_during_a_call_is_another_generation() -> None:
    optimized = toma_fx.optimize(small_flux(), **SMALL)
    want = optimized(**call(2, 0))[0]
    optimized.reset()
    seen: list[torch.Tensor] = []
    run = optimized.specializations[0].runners["refresh"]

    def slow(*args: Any) -> Any:
        if not seen:
            seen.append(want)
            assert not run_thread(lambda: seen.append(optimized(**call(2, 0))[0]))
        return run(*args)

    optimized.specializations[0].runners["refresh"] = slow
    optimized(**call(1, 0))
    assert torch.equal(seen[1], want)
    optimized(**call(1, 1))
    assert optimized.totals == {"refresh": 3, "reuse": 1}


def test_threads_with_their_own_state_do_not_mix() -> None:
    model = small_flux()
    optimized, alone = (toma_fx.optimize(model, **SMALL, destinations_every=3) for _ in range(2))
    want = {}
    for seed in (1, 2, 3):
        want[seed] = [alone(**call(seed, i))[0] for i in range(6)]
        alone.reset()
    got: dict[int, list[torch.Tensor]] = {}
    errors: list[BaseException] = []
    barrier = threading.Barrier(3)

    def generation(seed: int) -> None:
        try:
            with optimized.own_state():
                for i in range(6):
                    barrier.wait(timeout=60)
                    got.setdefault(seed, []).append(optimized(**call(seed, i))[0])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=generation, args=(seed,)) for seed in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for seed, steps in want.items():
        assert all(torch.equal(a, b) for a, b in zip(got[seed], steps, strict=True))
    assert not optimized.states, "the shared implicit state was not used"
    assert optimized.cache.captures == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_threads_step_while_another_captures(compiled: bool) -> None:
    """torch's flags for tracing hold for the whole process; programs that run must not see them."""
    optimized = toma_fx.optimize(small_flux(), **SMALL)
    if compiled:
        optimized.compile(backend="eager")
    errors: list[BaseException] = []
    captured = threading.Event()
    done = []

    def stepping() -> None:
        try:
            state, step = State(), 0
            while not captured.is_set() or step < 4:
                out, state = optimized.step(call(1, step), state)
                assert type(out[0]) is torch.Tensor
                step += 1
                with optimized.own_state():
                    optimized(**call(1, 0))
            done.append(step)
        except BaseException as error:
            errors.append(error)

    with torch.no_grad():
        _, state = optimized.step(call(1, 0), State())
        optimized.step(call(1, 1), state)
        thread = threading.Thread(target=stepping)
        thread.start()
        try:
            for width in (12, 16):
                optimized.step(denoisers.flux_inputs(8, width, batch=1), State())
        finally:
            captured.set()
            thread.join()
    assert not errors
    assert done
    assert optimized.cache.captures == 3


@torch.no_grad()
def test_an_exception_after_a_step_leaves_the_state_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    optimized = toma_fx.optimize(small_flux(), **SMALL)

    def fails(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(PassState, "keep", fails)
        with pytest.raises(KeyboardInterrupt):
            optimized(**call(1, 0))
    optimized(**call(1, 0))
    optimized(**call(1, 1))
    assert optimized.totals == {"refresh": 1, "reuse": 1}


@torch.no_grad()
def test_guidance_that_ends_in_mid_run_keeps_the_step() -> None:
    """The batch halves: another signature, the same generation."""
    optimized = toma_fx.optimize(small_flux(), **SMALL, destinations_every=9, last_step=4)
    for i in range(8):
        optimized(**call(1, i, batch=2 if i < 3 else 1))
    assert optimized.totals == {"refresh": 2, "reuse": 3, "plain": 3}
    optimized(**call(1, 0, batch=2))
    assert optimized.totals["refresh"] == 3


@torch.no_grad()
def test_without_a_timestep_every_picture_is_its_own() -> None:
    class Picture(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_flux()

        def forward(self, **inputs: Any) -> Any:
            return self.inner(timestep=torch.full((1,), 0.5), **inputs)[0]

    model = Picture().eval()
    optimized = toma_fx.optimize(model, **SMALL)
    for seed in (1, 2):
        inputs = {k: v for k, v in call(seed, 0).items() if k != "timestep"}
        want = toma_fx.optimize(model, **SMALL)(**inputs)
        assert torch.equal(optimized(**inputs), want)
    assert optimized.totals == {"refresh": 2}


@torch.no_grad()
def test_position_ids_of_another_grid_at_the_same_timestep() -> None:
    optimized = toma_fx.optimize(small_flux(), **SMALL)
    wide, square = denoisers.flux_inputs(4, 16, batch=1), denoisers.flux_inputs(8, 8, batch=1)
    optimized(**wide)
    assert torch.equal(optimized(**square)[0], toma_fx.optimize(
        optimized.denoiser, **SMALL)(**square)[0])  # fmt: skip
    assert optimized.cache.captures == 2


@torch.no_grad()
def test_states_do_not_survive_a_cast() -> None:
    optimized = toma_fx.optimize(small_flux(), **SMALL)
    _, state = optimized.step(call(1, 0), State())
    optimized.to(torch.float64)
    double = {k: v.double() if torch.is_tensor(v) else v for k, v in call(1, 1).items()}
    optimized.step(double, state)
    assert optimized.totals == {"refresh": 2}


@pytest.mark.parametrize("state", [None, [], [None], "state"])
def test_what_is_not_a_state(state: Any) -> None:
    with pytest.raises(StateError, match="not a state"):
        toma_fx.optimize(small_flux(), **SMALL).step(call(1, 0), state)


@pytest.mark.parametrize("inputs", [None, torch.zeros(1), ((), {}, ())])
def test_what_is_not_a_call(inputs: Any) -> None:
    with pytest.raises(SignatureError, match="not a call"):
        toma_fx.optimize(small_flux(), **SMALL).step(inputs, State())


@torch.no_grad()
def test_an_exception_inside_a_step_starts_anew() -> None:
    optimized = toma_fx.optimize(small_flux(), **SMALL)
    optimized(**call(1, 0))
    optimized(**call(1, 1))
    specialization = optimized.specializations[0]
    run = specialization.runners["reuse"]

    def fails(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    specialization.runners["reuse"] = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        optimized(**call(1, 2))
    specialization.runners["reuse"] = run
    optimized(**call(2, 5))
    assert optimized.totals == {"refresh": 2, "reuse": 1}


# -- bounds ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_graphs_used_last_are_kept() -> None:
    optimized = toma_fx.optimize(small_flux(), **SMALL, max_signatures=2)
    for width in (8, 12, 8, 16, 8):
        optimized(**denoisers.flux_inputs(8, width, batch=1))
        optimized.reset()
    assert len(optimized.specializations) == 2
    assert optimized.cache.captures == 3, "8 was used again before 16 came"
    optimized(**denoisers.flux_inputs(8, 12, batch=1))
    assert optimized.cache.captures == 4, "12 had made room for 16"


@torch.no_grad()
def test_states_wait_on_the_host() -> None:
    """Kept tensors go and come back; a step that finds them elsewhere says so."""
    optimized: Any = toma_fx.optimize(small_flux(), **SMALL)
    _, state = optimized.step(call(1, 0), State())
    away = state.to("meta")  # there is no other device here
    assert all(x.is_meta for x in away.kept.values())
    assert not any(x.is_meta for x in state.kept.values())
    with pytest.raises(StateError, match="another device") as caught:
        optimized.step(call(1, 1), away)
    assert "state.to(device)" in str(caught.value)
    back = replace(away, kept=state.kept).to("cpu", non_blocking=True)
    want, _ = optimized.step(call(1, 1), state)
    got, _ = optimized.step(call(1, 1), back)
    assert torch.equal(got[0], want[0])

"""Generations that are told: by the caller, by a pipeline, by ComfyUI's options."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from uuid import uuid4

import pytest
import torch
from torch import Tensor

import toma_fx
from tests.run.loops import CONFIG, call, optimized, same, text_of, truth
from tests.run.loops import denoiser as texted
from toma_fx.errors import GenerationError


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_named_tiles() -> None:
    """Any number of them, in any order, with the same text or another one at every call."""
    denoiser, order = optimized(), [[0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [2, 0], [0, 1, 2]]
    calls = [
        (tile, call(tile, step, text_of(step))) for step, row in enumerate(order) for tile in row
    ]
    got = []
    with denoiser.generation(steps=4) as run:
        steps = [step for step, row in enumerate(order) for _ in row]
        for step, (tile, each) in zip(steps, calls, strict=True):
            run.step(step, pass_=f"tile {tile}")
            got.append(denoiser(**each))
    assert same(got, truth(denoiser, calls))
    assert denoiser.unsure == 0


def test_steps_are_counted_where_nothing_is_announced() -> None:
    denoiser = optimized(first_step=1, last_step=2)
    for _ in range(2):
        before = denoiser.totals
        with denoiser.generation(steps=4):
            for step in range(4):
                denoiser(**call(1, step))
        counted = {k: n - before.get(k, 0) for k, n in denoiser.totals.items()}
        assert counted == {"plain": 2, "refresh": 1, "reuse": 1}


@pytest.mark.parametrize("anew", [True, False])
def test_tiles_in_another_number_select_anew(anew: bool) -> None:
    """Also where inputs are made anew at every call: order alone tells these passes."""
    denoiser, text = optimized(), text_of(0)
    want = truth(denoiser, [("", call(tile, 2, text)) for tile in (2,)])
    with denoiser.generation(steps=3) as run:
        for step, tiles in enumerate(((0, 1, 2), (0, 1, 2), (0, 2))):
            run.step(step)
            for tile in tiles:
                denoiser(**call(tile, step, text.clone() if anew else text))
        assert denoiser.unsure == 0
    with denoiser.generation(steps=4) as run:
        for step, tiles in enumerate(((0, 1, 2), (0, 2), (2,))):
            run.step(step)
            for tile in tiles:
                got = denoiser(**call(tile, step, text.clone() if anew else text))
    assert torch.equal(got, want[0])
    assert denoiser.unsure == 1


def test_a_generation_that_is_broken_off_leaves_nothing() -> None:
    denoiser = optimized()
    want = truth(denoiser, [("", call(1, step)) for step in (2, 3)])

    def broken() -> None:
        with denoiser.generation():
            for step in range(2):
                denoiser(**call(1, step))
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    with denoiser.generation():
        assert same([denoiser(**call(1, step)) for step in (2, 3)], want)


def test_passes_beside_each_other() -> None:
    """Two threads, one pass each, announce for themselves."""
    denoiser = optimized()
    got: dict[str, list[Tensor]] = {"cond": [], "uncond": []}
    barrier = threading.Barrier(2)
    seeds = {"cond": 1, "uncond": 2}

    def work(run: Any, name: str) -> None:
        with torch.no_grad():
            for step in range(4):
                barrier.wait(60)
                with run.step(step, pass_=name):
                    barrier.wait(60)
                    got[name].append(denoiser(**call(seeds[name], step)))

    with denoiser.generation(steps=4) as run:
        threads = []
        for name in got:
            context = contextvars.copy_context()
            threads.append(threading.Thread(target=context.run, args=(work, run, name)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for name, seed in seeds.items():
        assert same(got[name], truth(denoiser, [("", call(seed, step)) for step in range(4)]))


def test_what_contradicts_itself_is_refused() -> None:
    denoiser = optimized()
    with denoiser.generation(steps=3) as run:
        run.step(1)
        denoiser(**call(1, 1))
        for wrong, match in ((0, "steps go on"), (3, "no such step"), (-1, "out of range")):
            with pytest.raises(GenerationError, match=match):
                run.step(wrong)
        with pytest.raises(GenerationError, match="timestep changed within a step"):
            denoiser(**call(1, 2))
        run.step(2, pass_="a")
        denoiser(**call(1, 2))
        with pytest.raises(GenerationError, match="called twice in one step"):
            denoiser(**call(1, 2))
        with pytest.raises(GenerationError, match="inside another"):
            denoiser.generation().__enter__()
        with denoiser.own_state(), denoiser.generation():
            denoiser(**call(2, 0))
    with pytest.raises(GenerationError, match="is over"):
        run.step(2)
    with denoiser.generation(steps=1):
        denoiser(**call(1, 0))
        with pytest.raises(GenerationError, match="more steps than were told"):
            denoiser(**call(1, 1))
    for wrong in (0, 1.5, True, "3"):
        with (
            pytest.raises(GenerationError, match="steps is out of range"),
            denoiser.generation(steps=wrong),
        ):
            pass
    assert torch.equal(denoiser(**call(1, 0)), truth(denoiser, [("", call(1, 0))])[0])


def test_a_call_with_a_generation_that_is_over() -> None:
    """A task that was started inside goes on outside."""
    denoiser = optimized()

    async def late(go: asyncio.Event) -> None:
        await go.wait()
        denoiser(**call(1, 1))

    async def main() -> None:
        go = asyncio.Event()
        with denoiser.generation():
            denoiser(**call(1, 0))
            task = asyncio.create_task(late(go))
            await asyncio.sleep(0)
        go.set()
        with pytest.raises(GenerationError, match="is over"):
            await task

    asyncio.run(main())


def test_an_error_inside_a_step_leaves_the_others() -> None:
    denoiser = optimized()
    with denoiser.generation(steps=3) as run:
        for name, seed in (("a", 1), ("b", 2)):
            run.step(0, pass_=name)
            denoiser(**call(seed, 0))
        runners = denoiser.specializations[0].runners

        def broken(*_: Any) -> Any:
            raise MemoryError

        denoiser.specializations[0].runner("reuse")
        real, runners["reuse"] = runners["reuse"], broken
        run.step(1, pass_="a")
        with pytest.raises(MemoryError):
            denoiser(**call(1, 1))
        runners["reuse"] = real
        assert torch.equal(denoiser(**call(1, 1)), truth(denoiser, [("", call(1, 1))])[0])
        run.step(1, pass_="b")
        want = truth(denoiser, [("", call(2, step)) for step in (0, 1)])[1]
        assert torch.equal(denoiser(**call(2, 1)), want)


def test_cache_contexts_may_tell_the_step() -> None:
    denoiser = optimized(last_step=1)
    with denoiser.generation():
        for step in (0, 5):
            with denoiser.cache_context("cond", step_index=step):
                denoiser(**call(1, 0))
    assert denoiser.totals == {"refresh": 1, "plain": 1}


# -- who calls ------------------------------------------------------------------------------------


def own_state(denoiser: Any) -> Any:
    return denoiser.own_state()


def told(denoiser: Any) -> Any:
    return denoiser.generation(steps=4)


@pytest.mark.parametrize("enter", [own_state, told])
def test_coroutines(enter: Callable[[Any], Any]) -> None:
    """Requests of one thread, with one text, that take turns in any order."""
    denoiser = optimized()
    got: dict[int, list[Tensor]] = {1: [], 2: []}

    async def request(seed: int, pauses: int) -> None:
        for _ in range(pauses):
            await asyncio.sleep(0)
        with enter(denoiser):
            for step in range(4):
                got[seed].append(denoiser(**call(seed, step, text_of(0))))
                for _ in range(seed):
                    await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(request(1, 0), request(2, 3))

    asyncio.run(main())
    for seed, outputs in got.items():
        assert same(outputs, truth(denoiser, [("", call(seed, s, text_of(0))) for s in range(4)]))
    assert not denoiser.states, "nothing is left behind in the thread"
    assert denoiser._stepper.told is None


def stream(denoiser: Any, seed: int, enter: Callable[[Any], Any]) -> Iterator[Tensor]:
    with enter(denoiser):
        for step in range(4):
            yield denoiser(**call(seed, step, text_of(0)))


@pytest.mark.parametrize("enter", [own_state, told])
def test_generators_that_take_turns(enter: Callable[[Any], Any]) -> None:
    denoiser = optimized()
    one, two = stream(denoiser, 1, enter), stream(denoiser, 2, enter)
    got: dict[int, list[Tensor]] = {1: [], 2: []}
    for seed, each in ((1, one), (1, one), (2, two), (1, one), (2, two), (2, two), (1, one)):
        got[seed].append(next(each))
        assert denoiser._stepper.told is None, "the caller has no part in it"
    two.close()
    assert denoiser(**call(3, 0)).isfinite().all()
    for seed, outputs in got.items():
        want = truth(denoiser, [("", call(seed, s, text_of(0))) for s in range(len(outputs))])
        assert same(outputs, want)


@pytest.mark.parametrize("enter", [own_state, told, lambda _: threading.Lock()])
def test_a_generator_that_other_threads_resume(enter: Callable[[Any], Any]) -> None:
    denoiser = optimized()
    each, got = stream(denoiser, 1, enter), list[Tensor]()
    idle = threading.Event()  # the threads live on, as in a pool: no identity comes again

    def advance(done: threading.Event) -> None:
        with torch.no_grad():
            got.append(next(each))
        done.set()
        idle.wait(60)

    for _ in range(4):
        done = threading.Event()
        threading.Thread(target=advance, args=(done,), daemon=True).start()
        assert done.wait(60)
    idle.set()
    assert same(got, truth(denoiser, [("", call(1, step, text_of(0))) for step in range(4)]))
    assert denoiser.unsure == 0


def test_a_context_manager_of_the_users() -> None:
    """What a helper enters holds for the function that uses the helper."""
    denoiser = optimized()

    @contextmanager
    def request() -> Iterator[None]:
        with denoiser.generation(steps=2) as run:
            run.step(1)
            yield

    with request():
        assert denoiser._stepper.told is not None
    with ExitStack() as stack:
        stack.enter_context(request())
        assert denoiser._stepper.told is not None
    assert denoiser._stepper.told is None


# -- ComfyUI --------------------------------------------------------------------------------------


class Comfy(torch.nn.Module):
    """A denoiser with the arguments of ComfyUI's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = texted()

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, transformer_options: Any = None
    ) -> Tensor:
        assert not (transformer_options or {}).get("patches")
        return self.inner(x, timesteps, context)


def test_the_options_of_comfyui_tell_generation_and_pass() -> None:
    """Text tensors are made anew at every call; the list of noise levels is the generation's."""
    denoiser = toma_fx.optimize(Comfy().eval(), **CONFIG)
    calls, got = [], []
    for picture in (1, 2):
        levels = torch.linspace(1, 0, 5)
        names = [uuid4(), uuid4()]
        for step in range(4):
            for side in (0, 1):
                each = call(10 * picture + side, step)
                options = {
                    "cond_or_uncond": [side], "sample_sigmas": levels, "uuids": [names[side]]
                }  # fmt: skip
                arguments = {
                    "x": each["sample"],
                    "timesteps": each["timestep"],
                    "context": each["encoder_hidden_states"].clone() + step,
                }
                got.append(denoiser(**arguments, transformer_options=options))
                calls.append(((picture, side), {**arguments, "transformer_options": {}}))
    assert same(got, truth(denoiser, calls))
    assert denoiser.unsure == 0
    assert denoiser.cache.captures == 1


def test_the_options_of_comfyui_tell_conditions_of_one_side_apart() -> None:
    """Regions of a picture, all of them on the conditional side, in an order that changes."""
    denoiser = toma_fx.optimize(Comfy().eval(), **CONFIG)
    levels, names = torch.linspace(1, 0, 5), [uuid4(), uuid4()]
    calls, got = [], []
    for step, order in enumerate(((0, 1), (1, 0), (0, 1), (1, 0))):
        for region in order:
            each = call(region, step)
            options = {"cond_or_uncond": [0], "sample_sigmas": levels, "uuids": [names[region]]}
            arguments = {
                "x": each["sample"],
                "timesteps": each["timestep"],
                "context": each["encoder_hidden_states"].clone() + step,
            }
            got.append(denoiser(**arguments, transformer_options=options))
            calls.append((region, {**arguments, "transformer_options": {}}))
    assert same(got, truth(denoiser, calls))
    assert denoiser.unsure == 0

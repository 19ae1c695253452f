"""The turn of a step, written once: for the denoiser, the back end and loaded artifacts.

    call -> generation starts or goes on? -> position ids -> programs -> state of the pass
         -> kind that runs -> inputs and kept tensors -> RUN -> keep what it gives -> outputs

What differs between the three is behind two things: a `StepCall`, the call in canonical form, and
a `ProgramSet`, the programs of its signature. An exception after the state has been asked restarts
the generation: its kept tensors can't be trusted. One before that (a call that does not fit, a
second thread) changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from toma_fx.capture.grids import Raster
from toma_fx.compat import disable_dynamo, skip_frame
from toma_fx.errors import SharedStateError
from toma_fx.run.generation import (
    Generation,
    Implicit,
    PassState,
    Rasters,
    shared_state_error,
)
from toma_fx.run.programs import beside_tracing
from toma_fx.run.schedule import Scheduled, due, runnable

GENERATIONS = 4
"""Implicit states that are kept for each set of programs that may live."""
OWN_STATE = (
    "run each thread inside `with denoiser.own_state():`, or hold the state yourself: "
    "denoiser.step(inputs, state); denoiser.reset() ends a generation that was broken off"
)
"""What a second thread can do."""


class ProgramSet(Protocol):
    """The programs of one signature, by kind."""

    @property
    def schedule(self) -> Scheduled:
        """Which kind is due when."""

    @property
    def settings(self) -> Hashable:
        """What kept tensors must agree on to fit."""

    @property
    def batch_sizes(self) -> frozenset[int]:
        """Rows of the batch, as the kept tensors see them."""

    def takes(self, kind: str) -> tuple[str, ...]:
        """Names of the masks and kept tensors that follow the model's own inputs."""

    def gives(self, kind: str) -> tuple[str, ...]:
        """Names of the kept tensors that follow the model's own outputs."""

    def instead(self, kind: str) -> str:
        """The kind that runs while something that `kind` takes is not kept."""

    def mixed(self, kinds: Collection[str]) -> str | None:
        """The kind that serves a batch of requests that are due these kinds, if there is one."""

    def runner(self, kind: str) -> Callable[..., Sequence[Any]]:
        """The program: (inputs, kept tensors) -> (outputs, kept tensors), flat."""

    def count(self, kind: str) -> None:
        """Count a step."""


@dataclass(frozen=True)
class StepCall:
    """One call in canonical form.

    Attributes:
        signature: what the programs depend on, but for the values of position ids.
        leaves: inputs of the programs, in order. ids: those that may be position ids, at the same
            places. timestep: as a number. conditioning: the text tokens, if the model has them.
        context: whose generation it is, beside `cache_context`.
        kernel: makes the context that the program runs under.
    """

    signature: Hashable
    leaves: Sequence[Any]
    ids: Sequence[Any]
    timestep: float | None
    conditioning: Tensor | None
    context: Hashable = None
    kernel: Callable[[], AbstractContextManager[Any]] = nullcontext


Find = Callable[[tuple[Raster | None, ...]], tuple[Hashable, ProgramSet]]
"""(what kept tensors depend on, programs) for what the position ids of a call enumerate."""


@dataclass(frozen=True)
class Turn:
    """What a call runs: a program on inputs, for a pass of a generation."""

    programs: ProgramSet
    kind: str
    run: Callable[..., Sequence[Any]]
    inputs: Sequence[Any]
    kernel: Callable[[], AbstractContextManager[Any]]
    generation: Generation
    state: PassState
    implicit: Implicit


class Stepper:
    """Runs steps and keeps their state for whoever calls.

    Attributes:
        capacity: generations that are kept. totals: steps run, by kind.
        where, hint: of the error for a second thread.
    """

    def __init__(self, capacity: int, where: str, hint: str) -> None:
        for function in (Stepper.step, run_program):  # disabled, they could not run beside a trace
            skip_frame(function)
        self.capacity = capacity
        self.totals: dict[str, int] = {}
        self.where, self.hint = where, hint
        self._implicit = Implicit()
        self._local = threading.local()
        self._counting = threading.Lock()

    # -- whose state ----------------------------------------------------------------------------

    @contextmanager
    def own_state(self) -> Iterator[None]:
        """Calls of this thread inside keep their state to themselves."""
        previous = getattr(self._local, "implicit", None)
        self._local.implicit = Implicit()
        try:
            yield
        finally:
            self._local.implicit = previous

    @property
    def context(self) -> str:
        """The name that `cache_context` set in this thread."""
        name: str = getattr(self._local, "context", "")
        return name

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Calls of this thread inside are a pass of their own ("cond", "uncond" of true CFG)."""
        previous, self._local.context = self.context, name
        try:
            yield
        finally:
            self._local.context = previous

    def reset(self) -> None:
        """Forget what is kept; the next call is step 0 of a new generation."""
        for generation in self.generations():
            generation.restart()

    def generations(self) -> tuple[Generation, ...]:
        """Those of this thread's state, the one used last at the end."""
        return tuple(self._state().generations.values())

    def _state(self) -> Implicit:
        implicit: Implicit = getattr(self._local, "implicit", None) or self._implicit
        return implicit

    def _shared(self, got: str) -> SharedStateError:
        return shared_state_error(self.where, got, self.hint)

    # -- a step ---------------------------------------------------------------------------------

    def step(self, prepare: Callable[[], StepCall], find: Find) -> list[Any]:
        """One step; `prepare` makes the call when the state is this thread's.

        Returns:
            The model's own outputs, flat.

        Raises:
            SharedStateError: another thread is in a step, or in the middle of the generation.
            Whatever `prepare` and `find` raise.
        """
        turn = self.begin(prepare, find)
        done = False
        try:
            results = run_program(turn.run, turn.inputs, turn.kernel)
            outputs: list[Any] = self.finish(turn, results)
            done = True
        finally:
            self.leave(turn, done)
        return outputs

    @disable_dynamo
    def begin(self, prepare: Callable[[], StepCall], find: Find) -> Turn:
        """Take the state and say what runs; `leave` must follow."""
        implicit = self._state()
        if not implicit.busy.acquire(blocking=False):
            raise self._shared("another thread is in a step with it")
        try:
            return self._turn(implicit, prepare(), find)
        except BaseException:
            implicit.busy.release()
            raise

    def _turn(self, implicit: Implicit, call: StepCall, find: Find) -> Turn:
        context = (self.context, call.context)
        key = (context, call.signature)
        generation = implicit.generation(key, self.capacity)
        starts = generation.starts(call.timestep, call.conditioning)
        rasters = implicit.rasters.get(key)
        if rasters is None or starts or not rasters.are_of(call.ids):
            # position ids are read once a generation: on a GPU reading waits for it
            rasters = implicit.rasters[key] = Rasters.read(call.ids)
        before = implicit.running(context, call.timestep) if starts else None
        owner, programs = find(rasters.values)
        state = generation.advance(call.timestep, call.conditioning)
        if state is None:
            raise self._shared("another thread is in the middle of a generation with it")
        try:
            if before is not None and before is not generation:
                generation.follow(before)
            state.bind(owner)
            kind = runnable(due(programs.schedule, state.step), programs, state.kept)
            kept = [state.buffers[name] for name in programs.takes(kind)]
            run = programs.runner(kind)
        except BaseException:
            generation.restart()
            raise
        inputs = [*call.leaves, *kept]
        return Turn(programs, kind, run, inputs, call.kernel, generation, state, implicit)

    @disable_dynamo
    def finish(self, turn: Turn, results: Sequence[Any]) -> list[Any]:
        """Keep what the program gives; returns the model's own outputs."""
        outputs, given = split_outputs(results, turn.programs.gives(turn.kind))
        if given:
            turn.state.keep(given)
        turn.state.count(turn.kind)
        self.count(turn.programs, turn.kind)
        return clone_graph_outputs(outputs)

    @disable_dynamo
    def leave(self, turn: Turn, done: bool) -> None:
        """Release the state; after an exception the next call starts a generation."""
        if not done:
            turn.generation.restart()
        turn.implicit.busy.release()

    def count(self, programs: ProgramSet, kind: str) -> None:
        """Count a step."""
        with self._counting:
            programs.count(kind)
            self.totals[kind] = self.totals.get(kind, 0) + 1


def run_program(
    run: Callable[..., Sequence[Any]],
    inputs: Sequence[Any],
    kernel: Callable[[], AbstractContextManager[Any]],
) -> Sequence[Any]:
    """Run a program, which may be compiled, without gradients."""
    with torch.no_grad(), beside_tracing(), kernel():
        return run(*inputs)


def split_outputs(results: Sequence[Any], gives: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """What a program gives: the model's own outputs, and the kept tensors after them by name."""
    own = len(results) - len(gives)
    return list(results[:own]), dict(zip(gives, results[own:], strict=True))


def clone_graph_outputs(results: Sequence[Any]) -> list[Any]:
    """Results that stay as they are: a CUDA graph writes its outputs to the same place again."""
    return [r.clone() if isinstance(r, Tensor) and r.is_cuda else r for r in results]

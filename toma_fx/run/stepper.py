"""The turn of a step, written once: for the denoiser, the back end and loaded artifacts.

    call -> position ids -> programs -> whose generation, step, pass -> kind that runs
         -> inputs and kept tensors -> RUN -> keep what it gives -> outputs

What differs between the three is behind two things: a `StepCall`, the call in canonical form, and
a `ProgramSet`, the programs of its signature.

An error before the state is asked (a call that does not fit) changes nothing. After one that comes
later, and after an interrupt at any point, nothing is trusted that the call may have touched: its
thread is noted when it begins and crossed off when it is done, and who finds itself noted was
broken off. No lock is held, so none can be left behind.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from toma_fx.capture.grids import Raster
from toma_fx.compat.compilers import disable_dynamo, skip_frame
from toma_fx.errors import GenerationError, TomaError
from toma_fx.methods.cached_steps import UNKNOWN_LENGTH, Length
from toma_fx.methods.kinds import is_cached, merges
from toma_fx.run.generation import PASSES, Buffers, Generation, PassState
from toma_fx.run.guess import Facts, Guesses
from toma_fx.run.marks import Mark, PositionIds
from toma_fx.run.program_set import (
    Find,
    ProgramSet,
    StepCall,
    own_outputs,
    run_program,
    split_outputs,
)
from toma_fx.run.schedule import counts_steps, due, runnable
from toma_fx.run.scopes import Entered, Flow, Scopes
from toma_fx.run.timesteps import TimestepValue
from toma_fx.run.told import Run

SIGNATURES = 1024
"""Signatures that are known by number; when there are more, all get new ones."""

T = TypeVar("T")
Rasters = tuple[Raster | None, ...]

_log = logging.getLogger("toma_fx.run")


@dataclass(frozen=True)
class Turn:
    """What a call runs: a program on inputs, for a pass of a generation."""

    programs: ProgramSet
    kind: str
    run: Callable[..., Sequence[Any]]
    inputs: Sequence[Any]
    kernel: Callable[[], AbstractContextManager[Any]]
    state: PassState
    calling: Hashable


class Stepper:
    """Runs steps and keeps their state for whoever calls.

    Attributes:
        where: of its errors. buffers: of passes that are over.
    """

    def __init__(self, where: str) -> None:
        for function in (Stepper.step, run_program):  # disabled, they could not run beside a trace
            skip_frame(function)
        self.where = where
        self.buffers = Buffers()
        self._states: Scopes[Guesses | Run] = Scopes(Guesses(self.buffers))
        self._labels: Scopes[str] = Scopes("")
        self._counter = itertools.count()
        self._numbers: dict[Hashable, int] = {}
        self._ids: dict[int, PositionIds] = {}
        self._calling: set[Hashable] = set()
        self._counts: dict[tuple[int, str], int] = {}  # by thread: it alone adds to its own
        self._unsure: dict[int, int] = {}

    # -- whose state ----------------------------------------------------------------------------

    def own_state(self) -> AbstractContextManager[Any]:
        """Calls inside keep their state apart from all others."""
        return self._states.enter(Guesses(self.buffers))

    def _current(self) -> Guesses | Run:
        """The state that holds here."""
        states = self._states.current()
        if isinstance(states, Run) and states.ended and states.flow == Flow.current():
            # no late task, but who opened it: an interrupt came while its `with` was left
            self._states.forget(states)
            return self._current()
        return states

    @property
    def told(self) -> Run | None:
        """The generation that calls here belong to, if it was told and is not over."""
        states = self._current()
        return states if isinstance(states, Run) and not states.ended else None

    @contextmanager
    def generation(self, steps: int | None = None, passes: int = PASSES) -> Iterator[Run]:
        """Calls inside are the steps of one generation.

        Args:
            steps: how many there will be, if that is known. passes: those of a step that are kept.

        Raises:
            GenerationError: inside another generation of the same denoiser, or wrong numbers.
        """
        if self.told is not None:
            raise GenerationError(
                "a generation inside another one",
                where=self.where,
                expected="one generation at a time in each thread, coroutine or generator",
                got="generation() inside another one",
                hint="own_state() inside it keeps a second one apart",
            )
        with self.enter(Run(steps, passes, self.buffers)) as run:
            yield run

    @contextmanager
    def enter(self, run: Run) -> Iterator[Run]:
        """Calls inside are those of a generation, which ends with it."""
        try:
            with self._states.enter(run):
                yield run
        finally:
            run.end()

    @property
    def context(self) -> str:
        """The name that `cache_context` set here."""
        return self._labels.current()

    def cache_context(
        self, name: str, *, step_index: int | None = None, **about: Any
    ) -> Entered[str]:
        """Calls inside are a pass of their own ("cond", "uncond" of true CFG).

        Args:
            name: of the pass. step_index: of the step, for a generation that was told.
            about: anything else that diffusers tells its caches.

        Raises:
            GenerationError: such a step can't come next.
        """
        states = self._current()
        if step_index is not None and isinstance(states, Run):
            states.step(step_index)
        return self._labels.enter(name)

    def reset(self) -> None:
        """Forget what is kept for this thread or coroutine: its next call begins a generation."""
        states = self._current()
        if isinstance(states, Guesses):
            states.drop_those_of(Flow.current())

    def generations(self) -> tuple[Generation, ...]:
        """Those of this thread, the one used last at the end; or the one that was told."""
        states = self._current()
        if isinstance(states, Run):
            return (states.generation,)
        return tuple(states.of(threading.get_ident()))

    @property
    def totals(self) -> dict[str, int]:
        """Steps run, by kind."""
        totals: dict[str, int] = {}
        for (_, kind), count in list(self._counts.items()):
            totals[kind] = totals.get(kind, 0) + count
        return totals

    # -- a step ---------------------------------------------------------------------------------

    def step(
        self,
        prepare: Callable[[], StepCall],
        find: Find,
        unflatten: Callable[[list[Any]], T],
    ) -> T:
        """One step; `prepare` makes the call.

        Returns:
            The model's own outputs, as `unflatten` makes them of the flat ones.

        Raises:
            GenerationError: the call contradicts what was told, or its steps can't be counted.
            SharedStateError: another thread is in the same pass of a generation that was told.
            Whatever `prepare` and `find` raise.
        """
        turn = self.begin(prepare, find)
        try:
            results = run_program(turn.run, turn.inputs, turn.kernel)
            outputs = unflatten(self.finish(turn, results))
            self._calling.discard(turn.calling)
            return outputs
        except BaseException:
            self.abandon()
            raise

    @disable_dynamo
    def begin(self, prepare: Callable[[], StepCall], find: Find) -> Turn:
        """Take the state and say what runs; `finish` or `abandon` must follow."""
        states = self._current()
        calling = (id(states), threading.get_ident())
        if calling in self._calling:
            self.abandon()
        self._calling.add(calling)
        try:
            call = prepare()
            shapes, (owner, programs) = self.find(call.signature, call.ids, find)
        except TomaError:  # the call does not fit: nothing has changed
            self._calling.discard(calling)
            raise
        except BaseException:
            self.abandon()
            raise
        try:
            return self._turn(states, call, shapes, owner, programs, calling)
        except BaseException:
            self.abandon()
            raise

    def _turn(
        self,
        states: Guesses | Run,
        call: StepCall,
        shapes: int,
        owner: Hashable,
        programs: ProgramSet,
        calling: Hashable,
    ) -> Turn:
        generation, state, length = self._place(states, call, shapes, programs)
        state.bind(owner, self.buffers)
        kind = _kind_of(state, generation.step, programs, length)
        kept = [state.buffers[name] for name in programs.takes(kind)]
        run = programs.runner(kind)
        if state.unsure and programs.gives(kind):
            self._note_unsure()
        state.unsure = False
        return Turn(programs, kind, run, [*call.leaves, *kept], call.kernel, state, calling)

    @disable_dynamo
    def finish(self, turn: Turn, results: Sequence[Any]) -> list[Any]:
        """Keep what the program gives; returns the model's own outputs."""
        outputs, given = split_outputs(results, turn.programs.gives(turn.kind))
        if given:
            if turn.programs.watched in given:
                turn.state.watch(turn.programs.watched, given[turn.programs.watched])
            turn.state.keep(given, turn.programs.older)
        turn.state.count(turn.kind)
        self.count(turn.programs, turn.kind)
        outputs = own_outputs(turn.run, outputs)
        turn.state.caller = None
        return outputs

    @disable_dynamo
    def abandon(self) -> None:
        """End what a call that was broken off may have touched: the next one begins anew.

        A generation that was told goes on; its passes that this thread was in select anew.
        """
        states, me = self._states.current(), threading.get_ident()
        if isinstance(states, Run):
            states.abandon(me)
        else:
            states.drop_those_of(Flow.current(), broken_off=True)
        self._calling.discard((id(states), me))

    # -- which step -----------------------------------------------------------------------------

    def _place(
        self, states: Guesses | Run, call: StepCall, shapes: int, programs: ProgramSet
    ) -> tuple[Generation, PassState, Length]:
        roles = programs.roles
        marks = [Mark.of(call.leaves[i]) for i in roles.compared]
        value = TimestepValue(None if roles.timestep is None else call.leaves[roles.timestep])
        label = (self.context, call.label)
        run = states if isinstance(states, Run) else states.run_of(call.token)
        if run is not None:
            state = run.place(label, shapes, marks, value)
            return run.generation, state, Length(run.steps, run.order)
        assert isinstance(states, Guesses)
        timestep = value.read()
        if timestep is None and counts_steps(programs.schedule):
            raise GenerationError(
                "the steps of this model can't be counted",
                where=self.where,
                expected="a timestep among the arguments, or a generation that is told",
                got="no argument that is a timestep, and first_step, last_step, phases or cache=",
                hint="with denoiser.generation(steps=30) as run: run.step(i) before the calls "
                "of step i",
            )
        key = (label, shapes)
        facts = Facts(call.context, key, marks, roles.conditioning, timestep, Flow.current())
        return *states.place(facts), UNKNOWN_LENGTH

    def find(
        self, signature: Hashable, ids: Sequence[Any], find: Callable[[Rasters], T]
    ) -> tuple[int, T]:
        """(number of the signature, what `find` makes of what the position ids enumerate)

        On a GPU, reading new ones waits for it. A number is compared faster than a signature.

        Raises:
            Whatever `find` raises; of a call that does not fit, nothing is remembered.
        """
        if len(self._numbers) > SIGNATURES:
            self._numbers, self._ids = {}, {}
        number = self._numbers.setdefault(signature, next(self._counter))  # at once, for all
        known = self._ids.get(number)
        if known is None:
            known = self._ids.setdefault(number, PositionIds(ids))
        try:
            return number, find(known.read(ids))
        except TomaError:
            self._ids.pop(number, None)
            raise

    # -- counting -------------------------------------------------------------------------------

    def count(self, programs: ProgramSet, kind: str) -> None:
        """Count a step."""
        programs.count(kind)
        key = (threading.get_ident(), kind)
        self._counts[key] = self._counts.get(key, 0) + 1

    @property
    def unsure(self) -> int:
        """Steps that selected anew because it was not clear what they belong to."""
        return sum(list(self._unsure.values()))

    def _note_unsure(self) -> None:
        level, me = logging.DEBUG if self._unsure else logging.WARNING, threading.get_ident()
        self._unsure[me] = self._unsure.get(me, 0) + 1
        _log.log(
            level,
            "%s: it is not clear which generation, step or pass a call belongs to, so that it "
            "selects anew; toma_fx.optimize(pipe) tells it for a pipeline, `with "
            "denoiser.generation(steps=...)` for a loop (docs/generations.md)",
            self.where,
        )


def _kind_of(state: PassState, step: int, programs: ProgramSet, length: Length) -> str:
    """The kind that a pass runs at a step.

    Renewals count from the step at which the pass selected first. One that it missed makes out of
    date what would have been renewed.
    """
    schedule = programs.schedule
    for missed in state.skipped if state.kept else ():
        kind = due(schedule, missed, missed if state.first is None else state.first, length)
        state.kept.difference_update(programs.gives(kind))
    first = step if state.first is None else state.first
    kind = due(schedule, step, first, length)
    limit = None if schedule.caching is None else schedule.caching.threshold
    if is_cached(kind) and limit is not None and state.change_until(step) > limit:
        kind = due(schedule, step, first, length, computes=True)
    kind = runnable(kind, programs, state.kept)
    if state.first is None and merges(kind):
        state.first = step
    return kind

"""Which generation, step and pass a call is, where nobody tells.

A call goes on with a generation only if all that can be compared says so: the same thread, or the
same generators and coroutines around it; inputs that are the same tensors with the same contents
(apart from the picture and the timestep); a timestep that moves on in the known direction; the
passes of the step before. Otherwise it selects anew, which costs little and is never wrong.

What nothing tells: pictures that are made one after the other from the very same tensors, where the
second starts later than the first was broken off, or both are broken off after the first step.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from torch import Tensor

from toma_fx.run.generation import (
    PASSES,
    Buffers,
    Generation,
    Marks,
    PassState,
    living_threads,
)
from toma_fx.run.marks import Likeness, Mark
from toma_fx.run.scopes import Flow
from toma_fx.run.told import Run

GENERATIONS = 4
"""Generations that are kept beside each other for one caller: requests that take turns."""
CALLERS = 16
"""Callers in one thread (coroutines, generators) whose generations are kept."""
THREADS = 32
"""Threads whose generations are kept when they have ended."""


@dataclass(frozen=True)
class Facts:
    """What is known of a call.

    Attributes:
        context: whose generation it may be. key: name and shapes of its pass.
        marks: of its inputs. conditioning: which of them is the text, if it is known.
        timestep: as a number; None if there is none. flow: who calls.
    """

    context: Hashable
    key: Hashable
    marks: Marks
    conditioning: int | None
    timestep: float | None
    flow: Flow


class Guessed(Generation):
    """A generation that was read off its calls.

    Attributes:
        context, flow: of its last call. direction: of its timesteps, 1 or -1.
        turned: whether it began because the timestep turned back, and all else stayed the same.
    """

    def __init__(self, buffers: Buffers, facts: Facts, direction: int) -> None:
        super().__init__(buffers)
        self.context, self.flow, self.direction = facts.context, facts.flow, direction
        self.turned = False
        self.step = 0

    def way(self, timestep: float | None) -> int | None:
        """0: at the timestep of the last call; 1: onward from it; -1: back; None: not known."""
        if timestep is None or self.timestep is None:
            return None
        if timestep == self.timestep:
            return 0
        return self.direction * (1 if timestep > self.timestep else -1)

    def match(self, facts: Facts) -> PassState | None:
        """The first pass with such inputs, called in this step or not."""
        alike = (p for p in self.passes if p.key == facts.key)
        return next((p for p in alike if self.fits(p, facts.marks)), None)


class Guesses:
    """The generations of all who call without telling. Each thread changes but its own list.

    Attributes:
        direction: of timesteps, as the last generations had it.
    """

    def __init__(self, buffers: Buffers) -> None:
        self.direction = -1
        self._pool = buffers
        self._by_thread: dict[int, list[Guessed]] = {}
        self._dropped: dict[int, deque[tuple[float | None, PassState]]] = {}
        self._by_token: list[tuple[Mark, Run]] = []

    def of(self, thread: int) -> list[Guessed]:
        """The generations of a thread, the one used last at the end."""
        if thread not in self._by_thread and len(self._by_thread) >= THREADS:
            alive = living_threads()
            for other in [t for t in list(self._by_thread) if t not in alive]:
                self._by_thread.pop(other, None)
        return self._by_thread.setdefault(thread, [])

    def place(self, facts: Facts) -> tuple[Guessed, PassState]:
        """The generation and the pass of a call, at its step. The pass may be new.

        A pass that selects anew for want of knowledge is marked as unsure.
        """
        placed = next(self._continuations(facts), None) or self._begin(facts)
        generation, state = placed
        if generation.flow.thread != facts.flow.thread:
            _remove(self.of(generation.flow.thread), generation)
        generation.flow = facts.flow
        own = self.of(facts.flow.thread)
        _remove(own, generation)
        own.append(generation)
        mine = [g for g in own if g.flow == facts.flow]
        for old in (*mine[:-GENERATIONS], *own[: -GENERATIONS * CALLERS]):
            self._break_off(old)
        generation.call(state, facts.marks, facts.timestep)
        return placed

    def run_of(self, token: Tensor | None) -> Run | None:
        """The generation whose calls have this tensor; begun at its first."""
        if token is None:
            return None
        mark = Mark.of(token)
        for known, run in self._by_token:
            if known.compare(mark) is Likeness.SAME:
                return run
        run = Run(None, PASSES, self._pool)
        self._by_token = [*self._by_token[1 - GENERATIONS :], (mark, run)]
        return run

    def drop_those_of(self, flow: Flow, *, broken_off: bool = False) -> None:
        """End the generations of whoever calls; of a whole thread where no coroutine calls.

        Args:
            broken_off: whether calls may go on as if nothing had happened.
        """
        for _, run in self._by_token:
            run.abandon(flow.thread)
        for generation in list(self.of(flow.thread)):
            if not flow.frames or flow.may_continue(generation.flow):
                (self._break_off if broken_off else self._drop)(generation)

    def _drop(self, generation: Guessed) -> None:
        _remove(self.of(generation.flow.thread), generation)
        generation.end(reuse=generation.flow.thread == threading.get_ident())

    def _break_off(self, generation: Guessed) -> None:
        """Drop a generation that may go on, perhaps in the middle of its step.

        That matters where calls of the step are done and others may come that only their order
        tells apart. A call that was itself broken off is not done.
        """
        me = threading.get_ident()
        if any(state.caller != me for state in generation.called):
            dropped = self._dropped.setdefault(generation.flow.thread, deque(maxlen=PASSES))
            dropped.extend((generation.timestep, p) for p in generation.passes_in_order())
        self._drop(generation)

    def _begins_in_the_middle(self, facts: Facts) -> bool:
        """Whether a call may belong to the step at which a generation was dropped."""
        dropped = self._dropped.get(facts.flow.thread, ())
        alike = (p for t, p in dropped if t == facts.timestep and p.key == facts.key)
        return any(not p.differences(facts.marks, ()) for p in alike)

    def _candidates(self, facts: Facts) -> Iterator[Guessed]:
        """Generations that a call may go on with, the one used last first."""
        yield from reversed(self.of(facts.flow.thread))
        if facts.flow.frames:  # a generator may go on in another thread
            others = [g for t, g in list(self._by_thread.items()) if t != facts.flow.thread]
            for generation in [g for own in others for g in reversed(own)]:
                if facts.flow.may_continue(generation.flow):
                    yield generation

    # -- going on -------------------------------------------------------------------------------

    def _continuations(self, facts: Facts) -> Iterator[tuple[Guessed, PassState]]:
        """Generations that all evidence says the call goes on with, the one used last first.

        To one that was not used last a call leads back only as the first of a step: a text that
        pictures share (a negative prompt) would fit the others of all of them.
        """
        last: Guessed | None = None
        for generation in self._candidates(facts):
            if generation.context != facts.context:
                continue
            way, own = generation.way(facts.timestep), facts.flow.is_that_of(generation.flow)
            if last is None and own:
                last = generation
            if way == 0 and own:
                if generation is not last and last is not None and last.way(facts.timestep) == 0:
                    continue  # rather a new pass of the last one
                state = generation.find_pass(facts.key, facts.marks)
                if state is not None:
                    yield generation, state
            elif way == 1 and facts.flow.may_continue(generation.flow):
                state = generation.match(facts)
                if state is not None and (generation is last or state in generation.called[:1]):
                    generation.move_to(generation.step + 1)
                    yield generation, state
            elif way == -1 and own and generation.turned and generation.step == 0:
                # the second turn in a row: timesteps go the other way
                state = generation.match(facts)
                if state is not None:
                    generation.direction = self.direction = -generation.direction
                    generation.move_to(1)
                    yield generation, state

    # -- beginning ------------------------------------------------------------------------------

    def _begin(self, facts: Facts) -> tuple[Guessed, PassState]:
        """A new pass of the generation that ran last, or a new generation."""
        own = [g for g in self._candidates(facts) if g.context == facts.context]
        own = [g for g in own if facts.flow.is_that_of(g.flow)]
        last = own[0] if own else None
        way = None if last is None else last.way(facts.timestep)
        if last is not None and way == 0:
            return last, last.add_pass(facts.key, facts.marks)
        known = [] if last is None else [p for p in last.passes if p.key == facts.key]
        if last is not None and way == 1 and not known:  # guidance that ends halves the batch
            last.move_to(last.step + 1)
            state = last.add_pass(facts.key, facts.marks)
            state.unsure = True
            return last, state
        generation = Guessed(self._pool, facts, self.direction)
        generation.incomplete = self._begins_in_the_middle(facts)
        unsure = facts.timestep is None or way == 1
        if last is not None and known:
            match = last.match(facts)
            if way == 1:
                generation.varying |= _learn_varying(last, known, facts)
            generation.turned = way == -1 and match is not None
            if way == 1:
                self._drop(last)
        for old in own:
            # another picture of the same text is over; those of other texts go on, in turns
            if old.match(facts) is not None:
                self._drop(old)
        state = generation.add_pass(facts.key, facts.marks)
        state.unsure = unsure
        return generation, state


def _learn_varying(last: Generation, known: list[PassState], facts: Facts) -> set[int]:
    """Inputs that may be ones that change at every step: all that changed, if the text did not."""
    changes = [p.differences(facts.marks, ()) for p in known]
    fewest = min(changes, key=len)
    text = fewest.get(-1 if facts.conditioning is None else facts.conditioning, Likeness.SAME)
    return set(fewest) if text is not Likeness.DIFFERENT else set()


def _remove(generations: list[Guessed], generation: Guessed) -> None:
    if generation in generations:
        generations.remove(generation)

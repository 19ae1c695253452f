"""Generations that are told: `with denoiser.generation(steps=30) as run`.

run.step(3, pass_="tile 7")      from here on, calls are pass "tile 7" of step 3
with run.step(3, pass_="cond"):  calls inside are, whatever other threads and tasks announce
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from toma_fx.errors import GenerationError
from toma_fx.run.generation import Buffers, Generation, Marks, PassState
from toma_fx.run.scopes import Entered, Flow, Scopes


@dataclass(frozen=True)
class Announcement:
    """What a caller says of its calls.

    Attributes:
        step: index of the step, from 0; None: read it off the timesteps. name: of the pass.
    """

    step: int | None = None
    name: str | None = None


UNLABELED = ("", None)
"""Label of calls of which neither `cache_context` nor options tell the pass."""


class Timestep(Protocol):
    """The timestep of a call."""

    def peek(self) -> float | None:
        """It as a number; None where there is none, or a GPU would have to be waited for."""

    def read(self) -> float | None:
        """It as a number; None where there is none."""


class Run:
    """A generation that the caller tells begin and end of. Made by `denoiser.generation()`.

    Attributes:
        ended: whether its `with` is over. generation: its state. flow: who opened it.
    """

    def __init__(self, steps: int | None, passes: int, buffers: Buffers) -> None:
        self._steps = None if steps is None else whole_number("steps", steps, 1)
        self.generation = Generation(buffers, whole_number("passes", passes, 1), told=True)
        self.ended, self.flow = False, Flow.current()
        self._announced = Announcement()
        self._inside: Scopes[Announcement | None] = Scopes(None)

    @property
    def steps(self) -> int | None:
        """How many steps there are; None if that is not known."""
        return self._steps

    @property
    def order(self) -> int:
        """Calls of the denoiser for one step of the solver: 2 for Heun's method."""
        return 1

    def step(self, index: int, *, pass_: str | None = None) -> Entered[Announcement | None]:
        """Announce that calls are at a step, from here on.

        Used as a context manager, it holds for the calls inside, whatever threads and tasks beside
        them announce.

        Args:
            index: of the step, from 0; it may skip steps, but not go back.
            pass_: name of the pass that the next call is: one side of guidance, a tile. It must be
                named again for the next call. None: passes are told apart by shapes, inputs, order.

        Raises:
            GenerationError: the generation is over, or the step is not one of it.
        """
        self.check_running()
        index = whole_number("index", index, 0)
        if self.steps is not None and index >= self.steps:
            self._refuse(
                "no such step", f"an index below {self.steps}: steps={self.steps}", str(index)
            )
        self._check_order(index)
        self._announced = Announcement(index, pass_)
        return self._inside.enter(self._announced)

    def end(self) -> None:
        """Forget everything; what is still called with it is refused."""
        self.ended = True
        self.generation.end()

    def abandon(self, thread: int) -> None:
        """A call of a thread was broken off: its passes select anew, and may be called again."""
        generation = self.generation
        for state in [p for p in generation.passes if p.caller == thread]:
            state.forget()
            state.caller = None
            generation.called = [p for p in generation.called if p is not state]

    # -- placing calls --------------------------------------------------------------------------

    def place(
        self, label: Hashable, shapes: Hashable, marks: Marks, timestep: Timestep
    ) -> PassState:
        """The pass of a call, at its step; it may be new.

        Args:
            label: of the context that the call is in. shapes: of its inputs. marks: of these.
            timestep: of the call; it is read only where nothing else tells the step.

        Raises:
            GenerationError: the call contradicts what was announced.
        """
        self.check_running()
        said = self._inside.current() or self._announced
        generation, key = self.generation, (label, shapes)
        step, number = said.step, timestep.peek()
        if step is None:
            step = self._next_step(key, marks, timestep)
            number = timestep.peek()
        elif said.name is None and step == generation.step:
            self._check_timestep(number)
        self._check_order(step)
        generation.move_to(step)
        if said.name is not None:
            state = self._find_named(said.name, shapes, marks)
        else:
            labeled = label != UNLABELED
            found = generation.find_pass(key, marks)
            found = found or generation.find_in_order(key, labeled=labeled)
            state = found or generation.add_pass(key, marks)
        generation.call(state, marks, number)
        return state

    def _find_named(self, name: str, shapes: Hashable, marks: Marks) -> PassState:
        generation, label = self.generation, ("pass", name)
        if any(isinstance(p.key, tuple) and p.key[0] == label for p in generation.called):
            self._refuse(
                "a pass was called twice in one step",
                "each name once a step: run.step(i, pass_=...) before every call",
                f"pass {name!r} again in step {generation.step}",
            )
        known = [p for p in generation.passes if p.key == (label, shapes)]
        return known[0] if known else generation.add_pass((label, shapes), marks)

    def _next_step(self, key: Hashable, marks: Marks, timestep: Timestep) -> int:
        """The step of a call of which no step was announced."""
        generation, number = self.generation, timestep.read()
        if generation.step < 0:
            return 0
        if number is not None and generation.timestep is not None:
            return generation.step + (number != generation.timestep)
        alike = (p for p in generation.called if p.key == key)
        again = any(generation.fits(p, marks) for p in alike)
        return generation.step + again

    # -- what can't be --------------------------------------------------------------------------

    def check_running(self) -> None:
        """Refuse what comes after the end.

        Raises:
            GenerationError: the generation is over.
        """
        if self.ended:
            self._refuse("the generation is over", "calls inside its `with`", "a later one")

    def _check_order(self, step: int) -> None:
        last = self.generation.step
        if step < last:
            self._refuse("steps go on", f"step {last} or a later one", f"step {step}")
        if self.steps is not None and step >= self.steps:
            self._refuse(
                "there are more steps than were told", f"{self.steps} steps", f"step {step}"
            )

    def _check_timestep(self, timestep: float | None) -> None:
        known = self.generation.timestep
        if timestep is not None and known is not None and timestep != known:
            self._refuse(
                "the timestep changed within a step",
                f"timestep {known:g}, as the calls before it in step {self.generation.step}",
                f"timestep {timestep:g}",
            )

    def _refuse(self, what: str, expected: str, got: str) -> NoReturn:
        raise GenerationError(
            what,
            where="denoiser.generation()",
            expected=expected,
            got=got,
            hint="announce every step: run.step(i), or run.step(i, pass_=name) before every call",
        )


def whole_number(name: str, value: Any, least: int) -> int:
    """A whole number of at least `least`.

    Raises:
        GenerationError: something else.
    """
    number = None if isinstance(value, bool) else getattr(value, "__index__", lambda: None)()
    if number is None or number < least:
        raise GenerationError(
            f"{name} is out of range",
            where=name,
            expected=f"a whole number of at least {least}",
            got=repr(value),
        )
    return int(number)

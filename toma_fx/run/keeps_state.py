"""What a caller may do with the state that a denoiser keeps."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from toma_fx.methods.cached_steps import Length
from toma_fx.run.batching import State
from toma_fx.run.generation import PASSES
from toma_fx.run.schedule import Schedule, due
from toma_fx.run.stepper import Stepper
from toma_fx.run.told import Run


class KeepsState:
    """State kept for whoever calls; for subclasses that step by a `Stepper`."""

    _stepper: Stepper

    def _schedule(self, state: State) -> Schedule:
        raise NotImplementedError

    def generation(
        self, steps: int | None = None, *, passes: int = PASSES
    ) -> AbstractContextManager[Run]:
        """Tell which calls are the steps of one generation: those inside, in any thread or task.

            with denoiser.generation(steps=30) as run:
                for i, t in enumerate(timesteps):
                    run.step(i)
                    noise = denoiser(latents, t, ...)

        Args:
            steps: how many there will be, if that is known.
            passes: passes of a step (sides of guidance, tiles) whose patterns are kept; more of
                them take turns, and select anew each time.

        Raises:
            GenerationError: inside another generation of this denoiser, or numbers out of range.
        """
        return self._stepper.generation(steps, passes)

    def own_state(self) -> AbstractContextManager[Any]:
        """Calls inside keep their state apart from everybody else's.

        Inside means: in this function, coroutine or generator and what it calls, in whatever thread
        that runs, and in tasks and threads with a copy of its context.
        """
        return self._stepper.own_state()

    def due(self, state: State) -> str:
        """The kind of program that a request is due at its next step ("refresh", "cached", ...).

        A batch of requests that are due one kind runs that; a batch of several kinds runs a program
        that computes for all, and so saves nothing by what some keep. A server that has the choice
        batches by this (docs/caching.md).

        Raises:
            GenerationError: which steps compute can't be told without `State(steps=...)`, or does
                not fit it.
        """
        return due(self._schedule(state), state.step, length=Length(state.steps))

    def reset(self) -> None:
        """Forget what is kept for this thread or coroutine: its next call begins a generation."""
        self._stepper.reset()

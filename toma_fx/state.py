"""Which step of which generation a call is.

    one context and signature: Generation ---- pass 0: PassState (step, pattern buffers)
                                          \--- pass 1: PassState (true CFG without labels)

Nobody tells a denoiser that a generation starts, or that guidance calls it twice a step. Both are
read off the calls: a timestep that turns back starts a generation; so does a new conditioning
tensor after steps that shared one (a generation that was broken off); calls at one timestep are the
passes of one step, as many as the first step had.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from toma_fx.errors import SharedStateError, StateError
from toma_fx.methods.base import Renewal

Call = Literal["plain", "refresh", "reweigh", "reuse", "mixed"]
MAX_PASSES = 4
"""Calls at one timestep that count as passes of one step; more start over at the first."""


class Scheduled(Protocol):
    """What decides which program runs: a method's configuration, or the schedule of an artifact."""

    @property
    def first_step(self) -> int: ...  # noqa: D102

    @property
    def last_step(self) -> int | None: ...  # noqa: D102

    @property
    def patterned(self) -> bool: ...  # noqa: D102

    def renewal(self, since: int) -> Renewal: ...  # noqa: D102


def call_at(config: Scheduled, step: int, has_pattern: bool) -> Call:
    """Which program runs at `step` (from 0) of a generation."""
    if step < config.first_step or (config.last_step is not None and step > config.last_step):
        return "plain"
    if not config.patterned:
        return "reuse"
    return config.renewal(step - config.first_step) if has_pattern else "refresh"


@dataclass
class PassState:
    """State of one pass of a generation.

    Attributes:
        owner: identifies what the patterns were made for; None before the first step.
        step: steps done. patterns: fixed-address buffers by name. has_pattern: whether they are
            filled. counts: steps done per kind of program.
    """

    owner: Hashable = None
    step: int = 0
    patterns: dict[str, Tensor] = field(default_factory=dict)
    has_pattern: bool = False
    counts: dict[Call, int] = field(default_factory=dict)
    _conditioning: weakref.ref[Tensor] | None = None
    _steady: bool = False

    def restart(self) -> None:
        """Back to before the first step; buffers keep their addresses."""
        self.step, self.has_pattern = 0, False
        self.counts = {}
        self._conditioning, self._steady = None, False

    def bind(self, owner: Hashable) -> None:
        """Forget the patterns if they were made for something else (another graph, say)."""
        if self.owner != owner:
            self.owner, self.has_pattern = owner, False
            self.patterns = {}

    def store(self, names: Sequence[str], values: Sequence[Tensor]) -> None:
        """Copy pattern outputs into the buffers."""
        with torch.inference_mode(False), torch.no_grad():
            for name, value in zip(names, values, strict=True):
                shape = tuple(value.shape)
                if name not in self.patterns or self.patterns[name].shape != shape:
                    buffer = torch.empty(shape, dtype=value.dtype, device=value.device)
                    torch._dynamo.mark_static_address(buffer, guard=False)
                    self.patterns[name] = buffer
                self.patterns[name].copy_(value)
        self.has_pattern = True

    def done(self, call: Call) -> None:
        """Count a step."""
        self.step += 1
        self.counts[call] = self.counts.get(call, 0) + 1

    def follows(self, conditioning: Tensor | None) -> bool:
        """Whether the last call had this very conditioning tensor."""
        last = None if self._conditioning is None else self._conditioning()
        return last is not None and last is conditioning

    def alike(self, conditioning: Tensor | None) -> bool:
        """Whether nothing of the conditioning says that another generation begins."""
        return self.follows(conditioning) or (conditioning is None and self._conditioning is None)

    def breaks_off(self, conditioning: Tensor | None) -> bool:
        """Whether a conditioning tensor that earlier steps shared is replaced."""
        return self._steady and not self.follows(conditioning)

    def see(self, conditioning: Tensor | None) -> None:
        """Remember the conditioning of a call."""
        self._steady = conditioning is not None and self.follows(conditioning)
        self._conditioning = None if conditioning is None else weakref.ref(conditioning)


class Generation:
    """The generation that runs under one context and signature.

    Attributes:
        passes: their states; buffers outlive the generation. thread: who runs it.
    """

    def __init__(self) -> None:
        self.passes: list[PassState] = [PassState()]
        self.thread: int | None = None
        self._timestep: float | None = None
        self._direction = 0
        self._risen = False
        self._at = -1
        self._opened = 0
        self._count: int | None = None

    @property
    def running(self) -> bool:
        """Whether a step was done since the last restart."""
        return self._at >= 0

    def restart(self) -> None:
        """The next call is step 0."""
        for state in self.passes:
            state.restart()
        self._timestep, self._at, self._opened, self._count = None, -1, 0, None
        self._direction, self._risen = 0, False
        self.thread = None

    def starts(self, timestep: float | None, conditioning: Tensor | None) -> bool:
        """Whether a call with these begins a new generation.

        Timesteps fall. Models that count the other way are known by their second rise in a row with
        one conditioning tensor; their first two steps both are the first of a generation.
        """
        if not self.running:
            return True
        first = self.passes[0]
        if timestep is None or self._timestep is None:
            return not first.follows(conditioning)
        if timestep == self._timestep:
            return False
        direction = 1 if timestep > self._timestep else -1
        if self._direction == 0:
            return direction > 0 and not (self._risen and first.alike(conditioning))
        return direction != self._direction or first.breaks_off(conditioning)

    def follow(self, other: Generation) -> None:
        """Go on from the step of a generation that this one takes over from, with no pattern."""
        self.passes[0].step = other.passes[0].step
        other.restart()

    def behind(self, timestep: float | None) -> bool:
        """Whether this generation runs and a call at `timestep` would be a later step of it."""
        if not self.running or timestep is None or self._timestep is None:
            return False
        return (timestep - self._timestep) * (self._direction or -1) > 0

    def turn(self, timestep: float | None, conditioning: Tensor | None) -> PassState:
        """The state of this call; restarts when a new generation begins.

        Raises:
            SharedStateError: another thread is in the middle of this generation.
        """
        me = threading.get_ident()
        if self.starts(timestep, conditioning):
            again = self.running and self.passes[0].alike(conditioning)
            risen = again and None not in (timestep, self._timestep)
            self.restart()
            self._risen = risen
        elif self.thread != me:
            raise shared_state("another thread is in the middle of a generation with it")
        self.thread = me
        if self.running and timestep is not None and timestep == self._timestep:
            self._at = self._next_pass(conditioning)
        else:
            if self.running and self._count is None:
                self._count = self._opened
            if None not in (timestep, self._timestep):
                self._direction = 1 if timestep > self._timestep else -1  # type: ignore[operator]
            self._at = 0
        self._opened = max(self._opened, self._at + 1)
        self._timestep = timestep
        if self._at == len(self.passes):
            self.passes.append(PassState())
        state = self.passes[self._at]
        state.see(conditioning)
        return state

    def _next_pass(self, conditioning: Tensor | None) -> int:
        if self._count is not None:
            return (self._at + 1) % self._count
        for i in range(self._opened):
            if self.passes[i].follows(conditioning):
                return i
        return self._at + 1 if self._at + 1 < MAX_PASSES else 0


@dataclass(frozen=True)
class State:
    """Merging state of one request, held by the caller of `OptimizedDenoiser.step`.

    A value: `step` returns the next one and changes none, so that a server may keep, copy, drop or
    replay it.

    Attributes:
        step: steps done.
        patterns: tensors by name, first dimension the request's rows of the batch; empty before the
            first merged step.
        settings: groups and settings that the patterns fit. model: identifies the model's state,
            dtype and device.
    """

    step: int = 0
    patterns: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Hashable = None
    model: Hashable = None

    @property
    def rows(self) -> int | None:
        """Rows of the batch that are this request's; None while there is no pattern."""
        return next((len(p) for p in self.patterns.values()), None)


def rows_of(states: Sequence[State], batch: int) -> list[int]:
    """Rows of the batch that belong to each state; states without patterns share the rest evenly.

    Raises:
        StateError: the rows do not add up to `batch`.
    """
    known = [s.rows for s in states]
    open_ = known.count(None)
    left = batch - sum(r or 0 for r in known)
    if (left % open_ or left < open_) if open_ else left:
        raise StateError(
            "the states do not fill the batch",
            where="step(inputs, state)",
            expected=f"states for {batch} rows",
            got=f"{len(states)} states of {[r or 'any' for r in known]} rows",
            hint="one state per request, in batch order; a request with guidance has two rows, "
            "or two states where its rows do not lie side by side",
        )
    return [left // open_ if r is None else r for r in known]


def shared_state(got: str) -> SharedStateError:
    """The error for two threads on one implicit state."""
    return SharedStateError(
        "the implicit state of an optimized denoiser can't be shared by threads",
        where="the optimized denoiser",
        expected="one generation at a time",
        got=got,
        hint="run each thread inside `with denoiser.own_state():`, or hold the state yourself: "
        "denoiser.step(inputs, state); denoiser.reset() ends a generation that was broken off",
    )

"""Which step of which generation a call is.

    one context and signature: Generation ---- pass 0: PassState (step, kept tensors)
                                          \--- pass 1: PassState (true CFG without labels)

Nobody tells a denoiser that a generation starts, or that guidance calls it twice a step. Both are
read off the calls: a timestep that turns back starts a generation; so does a new conditioning
tensor after steps that shared one (a generation that was broken off); calls at one timestep are the
passes of one step, as many as the first step had.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from toma_fx.capture.grids import Raster, find_raster
from toma_fx.compat import mark_static_address
from toma_fx.errors import SharedStateError

MAX_PASSES = 4
"""Calls at one timestep that count as passes of one step; more start over at the first."""


@dataclass
class PassState:
    """State of one pass of a generation.

    Attributes:
        owner: identifies what the kept tensors were made for; None before the first step.
        step: steps done. kept: names of the tensors that are valid now.
        buffers: kept tensors by name, at fixed addresses; they outlive the generation.
        counts: steps done per kind of program.
    """

    owner: Hashable = None
    step: int = 0
    kept: set[str] = field(default_factory=set)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    _conditioning: weakref.ref[Tensor] | None = None
    _steady: bool = False

    def restart(self) -> None:
        """Back to before the first step; buffers keep their addresses."""
        self.step, self.kept, self.counts = 0, set(), {}
        self._conditioning, self._steady = None, False

    def bind(self, owner: Hashable) -> None:
        """Forget the kept tensors if they were made for something else (another graph, say)."""
        if self.owner != owner:
            self.owner, self.kept, self.buffers = owner, set(), {}

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy outputs into the buffers."""
        with torch.inference_mode(False), torch.no_grad():
            for name, value in tensors.items():
                shape = tuple(value.shape)
                if name not in self.buffers or self.buffers[name].shape != shape:
                    buffer = torch.empty(shape, dtype=value.dtype, device=value.device)
                    mark_static_address(buffer)
                    self.buffers[name] = buffer
                self.buffers[name].copy_(value)
        self.kept.update(tensors)

    def count(self, kind: str) -> None:
        """Count a step."""
        self.step += 1
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def follows(self, conditioning: Tensor | None) -> bool:
        """Whether the last call had this very conditioning tensor."""
        last = None if self._conditioning is None else self._conditioning()
        return last is not None and last is conditioning

    def is_like(self, conditioning: Tensor | None) -> bool:
        """Whether nothing of the conditioning says that another generation begins."""
        return self.follows(conditioning) or (conditioning is None and self._conditioning is None)

    def breaks_off(self, conditioning: Tensor | None) -> bool:
        """Whether a conditioning tensor that earlier steps shared is replaced."""
        return self._steady and not self.follows(conditioning)

    def note(self, conditioning: Tensor | None) -> None:
        """Remember the conditioning of a call."""
        self._steady = conditioning is not None and self.follows(conditioning)
        self._conditioning = None if conditioning is None else weakref.ref(conditioning)


class Generation:
    """The generation that runs under one context and signature.

    Attributes:
        passes: their states. thread: who runs it.
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

        Timesteps fall, so one that rises begins a generation: 999, 500, 1 | 999, ... A model that
        counts upwards (0.1, 0.2, 0.3, ...) looks like that at every step. It is known by its second
        rise in a row with one conditioning tensor: from then on its direction is up, and a fall
        begins a generation. So its steps are 0, 0, 1, 2, ...: the second begins once more.
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
            return direction > 0 and not (self._risen and first.is_like(conditioning))
        return direction != self._direction or first.breaks_off(conditioning)

    def follow(self, other: Generation) -> None:
        """Go on from the step of a generation that this one takes over from, with nothing kept."""
        self.passes[0].step = other.passes[0].step
        other.restart()

    def precedes(self, timestep: float | None) -> bool:
        """Whether this generation runs and a call at `timestep` would be a later step of it."""
        if not self.running or timestep is None or self._timestep is None:
            return False
        return (timestep - self._timestep) * (self._direction or -1) > 0

    def advance(self, timestep: float | None, conditioning: Tensor | None) -> PassState | None:
        """The state of this call; restarts when a new generation begins.

        None if another thread is in the middle of this generation: nothing has changed then.
        """
        me = threading.get_ident()
        if self.starts(timestep, conditioning):
            again = self.running and self.passes[0].is_like(conditioning)
            risen = again and None not in (timestep, self._timestep)
            self.restart()
            self._risen = risen
        elif self.thread != me:
            return None
        self.thread = me
        if self.running and timestep is not None and timestep == self._timestep:
            self._at = self._next_pass(conditioning)
        else:
            if self.running and self._count is None:
                self._count = self._opened
            if timestep is not None and self._timestep is not None:
                self._direction = 1 if timestep > self._timestep else -1
            self._at = 0
        self._opened = max(self._opened, self._at + 1)
        self._timestep = timestep
        if self._at == len(self.passes):
            self.passes.append(PassState())
        state = self.passes[self._at]
        state.note(conditioning)
        return state

    def _next_pass(self, conditioning: Tensor | None) -> int:
        if self._count is not None:
            return (self._at + 1) % self._count
        for i in range(self._opened):
            if self.passes[i].follows(conditioning):
                return i
        return self._at + 1 if self._at + 1 < MAX_PASSES else 0


@dataclass(frozen=True)
class Rasters:
    """What the inputs of a call enumerate, and the tensors that told it."""

    values: tuple[Raster | None, ...]
    ids: tuple[tuple[int, weakref.ref[Tensor]], ...]

    @classmethod
    def read(cls, leaves: Sequence[Any]) -> Rasters:
        """Read the position ids among the leaves of a call; on a GPU this waits for it."""
        values = tuple(find_raster(leaf) for leaf in leaves)
        ids = [(i, weakref.ref(leaves[i])) for i, found in enumerate(values) if found is not None]
        return cls(values, tuple(ids))

    def are_of(self, leaves: Sequence[Any]) -> bool:
        """Whether these leaves hold the very tensors that were read."""
        return all(ref() is leaves[i] for i, ref in self.ids)


Key = tuple[Hashable, Hashable]
"""Context and signature of a call."""


@dataclass
class Implicit:
    """The state that is kept for whoever calls a denoiser.

    Attributes:
        generations: by context and signature, used last at the end. rasters: what their inputs
            enumerate. busy: held during a call.
    """

    generations: OrderedDict[Key, Generation] = field(default_factory=OrderedDict)
    rasters: dict[Key, Rasters] = field(default_factory=dict)
    busy: threading.Lock = field(default_factory=threading.Lock)

    def running(self, context: Hashable, timestep: float | None) -> Generation | None:
        """The generation of a context that a call at `timestep` goes on with.

        Its inputs may have changed shape: guidance that ends in mid-run halves the batch.
        """
        me = threading.get_ident()
        for (other, _), generation in reversed(self.generations.items()):
            if other == context and generation.thread == me and generation.precedes(timestep):
                return generation
        return None

    def generation(self, key: Key, capacity: int) -> Generation:
        """The generation of a context and signature; the one unused longest is dropped."""
        generation = self.generations.setdefault(key, Generation())
        self.generations.move_to_end(key)
        while len(self.generations) > capacity:
            self.rasters.pop(self.generations.popitem(last=False)[0], None)
        return generation


def shared_state_error(where: str, got: str, hint: str) -> SharedStateError:
    """The error for two threads on one implicit state."""
    return SharedStateError(
        "implicit state can't be shared by threads",
        where=where,
        expected="one generation at a time",
        got=got,
        hint=hint,
    )

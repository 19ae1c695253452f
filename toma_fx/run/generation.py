r"""A generation: the steps of one picture (or batch of pictures), and the passes of each step.

    Generation ---- pass "cond":   PassState (marks of its inputs, kept tensors)
      step, timestep \--- pass "uncond": PassState

A pass is what is called once a step: one side of guidance, a tile. Passes of one name and shape are
told apart by their inputs (marks), and where these are alike, by the order of the calls.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from toma_fx.compat.compilers import mark_static_address
from toma_fx.errors import SharedStateError
from toma_fx.run.marks import Likeness, Mark
from toma_fx.run.schedule import aging

PASSES = 64
"""Passes of a generation whose tensors are kept, if nothing else is asked for."""

CALLS = 4
"""How many times the kept passes may be called in a step before calls of others are forgotten."""

OWNERS = 8
"""Graphs whose buffers are kept for the next generation."""

_log = logging.getLogger("toma_fx.run")

Marks = Sequence[Mark]
"""Marks of the inputs that tell a pass."""


@dataclass(eq=False)
class PassState:
    """State of one pass of a generation.

    Attributes:
        key: its name and the shapes of its inputs. marks: of its last call.
        steady: inputs that were the very same tensors in its last two calls.
        family: a number that the passes share which only their order tells apart.
        owner: identifies what the kept tensors were made for; None before the first step.
        kept: names of the tensors that are valid now.
        buffers: kept tensors by name, at fixed addresses.
        born, last: steps of the generation at which it was called first, and last.
        first: step at which what is kept was first selected. skipped: steps since its last call.
        counts: steps done per kind of program.
        caller: the thread that is in a step with it.
        unsure: whether its next step selects anew for want of knowledge.
        computed: step that gave the updates that are kept. pace: by how much, relative to their
            size, they changed in a step; None if that is not known.
    """

    key: Hashable = None
    marks: Marks = ()
    steady: frozenset[int] = frozenset()
    family: int = 0
    owner: Hashable = None
    kept: set[str] = field(default_factory=set)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    born: int = 0
    last: int = -1
    first: int | None = None
    skipped: range = range(0)
    counts: dict[str, int] = field(default_factory=dict)
    caller: int | None = None
    unsure: bool = False
    computed: int = -1
    pace: Tensor | float | None = None

    def forget(self) -> None:
        """Trust nothing that is kept; buffers keep their addresses."""
        self.kept, self.first, self.pace = set(), None, None

    def change_until(self, step: int) -> float:
        """By how much updates will have changed at a step; on a GPU, this waits for it."""
        if self.pace is None:
            return math.inf
        self.pace = float(self.pace)
        return self.pace * (step - self.computed)

    def watch(self, name: str, value: Tensor) -> None:
        """Note how an update changes, before it is kept."""
        pace = None
        if name in self.kept:
            with torch.no_grad():
                change = (value - self.buffers[name]).abs().sum() / value.abs().sum()
            pace = change / max(self.last - self.computed, 1)
        self.computed, self.pace = self.last, pace

    def bind(self, owner: Hashable, buffers: Buffers) -> None:
        """Forget the kept tensors if they were made for something else (another graph, say)."""
        if self.owner != owner:
            self.forget()
            self.owner, self.buffers = owner, buffers.take(owner)

    def keep(self, tensors: Mapping[str, Tensor], older: Mapping[str, str]) -> None:
        """Copy outputs into the buffers; `older` says where what these hold goes first."""
        changes = aging(self.kept, tensors, older)
        kept = self.kept | changes.names
        self.kept -= changes.names  # an interrupt may come between two copies
        with torch.inference_mode(False), torch.no_grad():
            for source, target in changes.moves:
                self._copy(target, self.buffers[source])
            for name, value in tensors.items():
                self._copy(name, value)
            for source, target in changes.fills:
                self._copy(target, self.buffers[source])
        self.kept = kept

    def _copy(self, name: str, value: Tensor) -> None:
        shape = tuple(value.shape)
        if name not in self.buffers or self.buffers[name].shape != shape:
            buffer = torch.empty(shape, dtype=value.dtype, device=value.device)
            mark_static_address(buffer)
            self.buffers[name] = buffer
        self.buffers[name].copy_(value)

    def count(self, kind: str) -> None:
        """Count a step."""
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def note(self, marks: Marks) -> None:
        """Remember the inputs of a call."""
        if marks is not self.marks:
            pairs = enumerate(zip(self.marks, marks, strict=True))
            same = (i for i, (a, b) in pairs if a.compare(b) is Likeness.SAME)
            self.steady = frozenset(same)
        self.marks = marks

    def differences(
        self, marks: Marks, varying: Collection[int], *, told: bool = False
    ) -> dict[int, Likeness]:
        """Inputs that speak against a call being the next one of this pass.

        An equal tensor in the place of the same one counts: something was made anew. Not so where
        all inputs are made anew at every call.

        Args:
            marks: of the call. varying: inputs that change at every step.
            told: whether the call is known to be of the generation: then equal tensors will do.
        """
        likeness = {
            i: a.compare(b)
            for i, (a, b) in enumerate(zip(self.marks, marks, strict=True))
            if i not in varying
        }
        anew = Likeness.SAME not in likeness.values() and not self.steady
        enough = Likeness.EQUAL if anew or told else Likeness.SAME
        return {i: found for i, found in likeness.items() if found < enough}


def living_threads() -> set[int | None]:
    """Identities of the threads that have not ended."""
    return {each.ident for each in threading.enumerate()}


class Buffers:
    """Buffers of passes that are over, for the next ones: their addresses do not change then.

    Only what the thread itself was done with may be given back: elsewhere a program may still run.
    """

    def __init__(self) -> None:
        self._free: OrderedDict[Hashable, list[dict[str, Tensor]]] = OrderedDict()

    def take(self, owner: Hashable) -> dict[str, Tensor]:
        """Buffers that were made for the same owner, the first given back first."""
        try:
            return self._free[owner].pop(0)
        except (KeyError, IndexError):
            return {}

    def give_back(self, passes: Sequence[PassState]) -> None:
        """Take over the buffers of passes that are over."""
        for state in passes:
            if state.buffers:
                free = self._free.setdefault(state.owner, [])
                free.append(state.buffers)
                del free[:-PASSES]
            state.forget()
            state.owner, state.buffers = None, {}
        while len(self._free) > OWNERS:
            self._free.popitem(last=False)


class Generation:
    """Steps that belong together.

    Attributes:
        passes: their states, in the order of their first calls.
        step: index of the step that the last call was at; -1 before the first.
        timestep: of the last call, where it is known. called: passes of this step, in order.
        varying: inputs that change at every step. capacity: passes that are kept.
        told: whether its limits are known, so that the order of calls tells more.
        incomplete: whether calls of its first step may be missing.
    """

    def __init__(self, buffers: Buffers, capacity: int = PASSES, *, told: bool = False) -> None:
        self.passes: list[PassState] = []
        self.step = -1
        self.timestep: float | None = None
        self.called: list[PassState] = []
        self.varying: set[int] = set()
        self.capacity, self.told = capacity, told
        self._pool = buffers
        self.incomplete = False
        self._previous = -1
        self._families = 0
        self._counts: dict[int, int] = {}  # calls of a step by family, at the last one with any
        self._scattered: set[int] = set()  # families that lost a pass: their order tells nothing
        self._in_order: set[Hashable] = set()  # keys whose inputs are made anew at every call
        self._warned = False

    def end(self, *, reuse: bool = True) -> None:
        """Forget everything.

        Args:
            reuse: whether buffers go to the next generation; not if a program may still run.
        """
        if reuse:
            self._pool.give_back(self.passes)
        self.passes, self.called, self.step, self.timestep = [], [], -1, None
        self._counts, self._scattered, self._in_order = {}, set(), set()

    def move_to(self, step: int) -> None:
        """Go on to a later step."""
        if step != self.step:
            self._close_step()
            self._previous, self.step, self.timestep = self.step, step, None

    def fits(self, state: PassState, marks: Marks) -> bool:
        """Whether nothing speaks against a call being one of this pass."""
        return not state.differences(marks, self.varying, told=self.told)

    def find_pass(self, key: Hashable, marks: Marks) -> PassState | None:
        """The pass of this name and shape, with these inputs, that was not called in this step."""
        return self._first(key, lambda state: self.fits(state, marks))

    def find_in_order(self, key: Hashable, *, labeled: bool) -> PassState | None:
        """The next pass of a key whose calls may bring new inputs every time, but come in order.

        Args:
            labeled: whether the caller gave the pass its name; else it must have been noticed.
        """
        known = labeled or key in self._in_order
        return self._first(key, lambda _: True) if known else None

    def _first(self, key: Hashable, fits: Callable[[PassState], bool]) -> PassState | None:
        free = (p for p in self.passes if p.key == key and p not in self.called)
        return next(filter(fits, free), None)

    def add_pass(self, key: Hashable, marks: Marks) -> PassState:
        """A new pass of this step."""
        alike = (p.family for p in self.called if p.key == key and self.fits(p, marks))
        family = next(alike, None)
        if family is None:
            family = self._families = self._families + 1
        state = PassState(key, marks, family=family, born=self.step)
        self.passes.append(state)
        if len(self.passes) > self.capacity:
            self._drop(min(self.passes[:-1], key=lambda p: (p.last, self.passes.index(p))))
        return state

    def _drop(self, state: PassState) -> None:
        """Make room; what is left of its family can't be told apart any more."""
        self.passes.remove(state)
        self._scattered.add(state.family)
        self._pool.give_back([state])
        (_log.debug if self._warned else _log.warning)(
            "more than %d passes a step: the one unused longest was dropped, and selects anew when "
            "it comes back; generation(passes=...) keeps more",
            self.capacity,
        )
        self._warned = True

    def passes_in_order(self) -> list[PassState]:
        """One pass of each family that has several, or may have: before the first step is over."""
        first = {
            p.family: p for p in self.passes if not self._counts or self._counts.get(p.family) != 1
        }
        return list(first.values())

    def call(self, state: PassState, marks: Marks, timestep: float | None) -> None:
        """Note a call of a pass at this step.

        Raises:
            SharedStateError: another thread is in a call of the pass.
        """
        me = threading.get_ident()
        if state.caller not in (None, me) and state.caller in living_threads():
            raise SharedStateError(
                "two threads are in one pass of a generation",
                where=f"step {self.step}",
                expected="one call at a time for each pass",
                got="a second one while the first still runs",
                hint="name what runs at once: with run.step(i, pass_=name)",
            )
        state.caller = me
        if state.last >= 0:
            changed = state.differences(marks, ())
            self.varying &= changed.keys()
            state.skipped = range(state.last + 1, self.step)
        state.note(marks)
        state.last = self.step
        self.called.append(state)
        if len(self.called) > CALLS * self.capacity:
            self._forget_calls()
        self.timestep = timestep

    def _forget_calls(self) -> None:
        """Forget calls of passes that were dropped: a step may never end (models of one step)."""
        self.called = [p for p in self.called if p in self.passes]
        self._scattered &= {p.family for p in self.passes}
        self.incomplete = True  # so that nothing is told by the order of calls

    def _close_step(self) -> None:
        """Passes that only order tells apart are trusted where a step had as many as the last.

        Where another number was called, nobody knows which were left out, or whose they are.
        """
        if self.told:
            self._learn_order()
        counts = Counter(state.family for state in self.called)
        for family, count in counts.items():
            before = self._counts.get(family, count)
            lost = self.incomplete or family in self._scattered
            if lost or (before != count and max(before, count) > 1):
                own = [p for p in self.passes if p.family == family]
                for state in own:
                    state.forget()
                    state.unsure = True
                late = [p for p in own if p not in self.called]
                self._pool.give_back(late)
                self.passes = [p for p in self.passes if p not in late]
        self._counts |= counts
        self.called, self.incomplete = [], False

    def _learn_order(self) -> None:
        """Notice passes that come in the same number, and with new inputs every time."""
        for key in {p.key for p in self.called} - self._in_order:
            new = [p for p in self.called if p.key == key]
            old = [p for p in self.passes if p.key == key and p not in new]
            before = [p for p in old if p.last == self._previous]
            if len(before) == len(new) and all(p.born == self.step for p in new):
                self._in_order.add(key)
                self._pool.give_back(old)
                self.passes = [p for p in self.passes if p not in old]

"""States held by the caller, and several requests in one batch: which program serves them, and the
kept tensors it takes and gives."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from toma_fx.capture.fingerprint import CHANGED, Fingerprint
from toma_fx.capture.guard import ModelGuard
from toma_fx.errors import StateError
from toma_fx.methods.cached_steps import Length
from toma_fx.methods.checks import is_count
from toma_fx.methods.kinds import is_cached, role_of
from toma_fx.passes.uses import MASKS
from toma_fx.run.program_set import (
    ProgramSet,
    own_outputs,
    run_program,
    split_outputs,
)
from toma_fx.run.schedule import aged, due, runnable
from toma_fx.run.stepper import Stepper

LOGGER = logging.getLogger("toma_fx.run")


class ModelKey:
    """Which state of which model, and which plan of merging, kept tensors belong to.

    In its process by the guard's key, which is free. One that went through a pickle knows the model
    by content, which is read when a state is pickled, and when one from elsewhere is first used.
    """

    __hash__ = None  # type: ignore[assignment]  # one model has keys of both sorts

    def __init__(self, guard: ModelGuard, environment: Hashable, plan: Hashable) -> None:
        self.environment, self.plan = environment, plan
        self.local: str | None = guard.key
        self._guard: weakref.ref[ModelGuard] | None = weakref.ref(guard)
        self._fingerprint = Fingerprint(unknown=CHANGED)

    @property
    def fingerprint(self) -> Fingerprint:
        """The model by content."""
        guard = None if self._guard is None else self._guard()
        return self._fingerprint if guard is None else guard.fingerprint

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelKey) and not self.difference(other)

    def difference(self, other: ModelKey) -> str:
        """What tells two apart, in words; "" for equal ones."""
        if self.environment != other.environment:
            return f"it was made for {self.environment}, and the model runs in {other.environment}"
        if self.plan != other.plan:
            return "it was made under another configuration"
        if self.local is not None and other.local is not None:
            return "" if self.local == other.local else "the model has changed since"
        return self.fingerprint.difference(other.fingerprint)

    def __reduce__(self) -> Any:
        return _unpickle_key, (self.environment, self.plan, self.fingerprint)

    def __deepcopy__(self, memo: Any) -> ModelKey:
        return self


def _unpickle_key(environment: Hashable, plan: Hashable, fingerprint: Fingerprint) -> ModelKey:
    key = ModelKey.__new__(ModelKey)
    key.environment, key.plan, key.local = environment, plan, None
    key._guard, key._fingerprint = None, fingerprint
    return key


@dataclass(frozen=True)
class State:
    """State of one request, held by the caller of `step(inputs, state)`.

    A value: `step` returns the next one and changes none, so that a server may keep, copy, drop or
    replay it.

    Attributes:
        step: steps done.
        kept: kept tensors by name, first dimension the request's rows of the batch; empty before
            the first merged step.
        settings: groups and settings that they fit. model: identifies the model's state, dtype and
            device, in other processes too.
        steps: of the request in all, where that is known; a cache may ask for it.
    """

    step: int = 0
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Hashable = None
    model: Any = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if not is_count(self.step, 0) or not (self.steps is None or is_count(self.steps)):
            raise StateError(
                "a state of no step",
                where="State",
                expected="whole numbers: step done so far, steps=None or at least 1",
                got=f"step={self.step!r}, steps={self.steps!r}",
            )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> State:
        """The state with what it keeps on a device: to the host while a request has to wait.

        Args:
            device: of the kept tensors; `step` wants them where the model is.
            non_blocking: as of `Tensor.to`.
        """
        kept = {k: x.to(device, non_blocking=non_blocking) for k, x in self.kept.items()}
        return replace(self, kept=kept)

    @property
    def rows(self) -> int | None:
        """Rows of the batch that are this request's; None while nothing is kept."""
        return max((len(p) for p in self.kept.values()), default=None)


def step_states(
    stepper: Stepper,
    programs: ProgramSet,
    leaves: Sequence[Any],
    state: Any,
    model: Any,
    kernel: Any,
    rows: Sequence[int] | None = None,
) -> tuple[list[Any], Any]:
    """One step of the requests of a batch.

    Args:
        stepper: counts the step. programs: of the call's signature. leaves: inputs of the programs.
        state: a state, or a list of one for each request. model: identifies the model.
        kernel: makes the context that the program runs under. rows: of each state, where what they
            keep does not tell it, and they differ.

    Returns:
        (the model's own outputs, the next state or list of states).

    Raises:
        StateError: no states, or they fit neither the call nor each other.
    """
    states = [_check_fits(s, programs, model) for s in _as_list(state)]
    _check_device(states, leaves)
    counts = _rows_of(states, programs, rows)
    kinds = [_kind_due(s, programs) for s in states]
    kind, masks = _kind_for(states, kinds, counts, programs)
    kept = _join(states, counts)
    tensors = {**kept, **masks}
    inputs = [*leaves, *(tensors[name] for name in programs.takes(kind))]
    run = programs.runner(kind)
    results = run_program(run, inputs, kernel)
    stepper.count(programs, kind)
    outputs, updates = split_outputs(own_outputs(run, results), programs.gives(kind))
    following = [replace(s, step=s.step + 1) for s in states]
    if updates:
        pieces = _cut(updates, counts)
        for i, (own, kind) in enumerate(zip(pieces, kinds, strict=True)):
            if not is_cached(kind):
                following[i] = _keep(following[i], own, programs, model)
    return outputs, following[0] if isinstance(state, State) else following


def _as_list(state: Any) -> list[State]:
    states = [state] if isinstance(state, State) else state
    if isinstance(states, (list, tuple)) and states and all(isinstance(s, State) for s in states):
        return list(states)
    raise StateError(
        "not a state",
        where="step(inputs, state)",
        expected="a toma_fx.State, or a list of them in batch order",
        got=repr(state) if not isinstance(state, (list, tuple)) else f"{[type(s) for s in state]}",
        hint="begin a request with toma_fx.State()",
    )


def _check_fits(state: State, programs: ProgramSet, model: Any) -> State:
    """The state, without its kept tensors if the model or configuration has changed since.

    Raises:
        StateError: they were made for another size, or in another process by another model or under
            another configuration.
    """
    if not state.kept:
        return state
    if state.model != model:
        _check_origin(state.model, model)
        _log_difference(state, model)
        return State(state.step, steps=state.steps)
    if state.settings != programs.settings:
        raise StateError(
            "the state belongs to another call",
            where="step(inputs, state)",
            expected=f"kept tensors for {programs.settings}",
            got=f"kept tensors for {state.settings}",
            hint="keep one state per request; start with State() when its size changes",
        )
    if isinstance(state.model, ModelKey) and state.model.local is None:
        return replace(state, model=model)  # need not be compared by content again
    return state


def _check_origin(known: Any, model: Any) -> None:
    """Refuse a state that another process made with another model: here nothing has changed."""
    if not (isinstance(known, ModelKey) and isinstance(model, ModelKey)) or known.local is not None:
        return
    if known.plan != model.plan:
        raise StateError(
            "the state was made under another configuration",
            where="step(inputs, state)",
            expected=str(model.plan),
            got=str(known.plan),
            hint="give the same configuration to all processes that exchange states; or begin "
            "anew with State()",
        )
    own, other = model.fingerprint, known.fingerprint
    if not (own.unknown or other.unknown) and own != other:
        raise StateError(
            "the state was made by another model",
            where="step(inputs, state)",
            expected="a model with the same weights, adapters and attributes",
            got=other.difference(own),
            hint="give the same model to all processes that exchange states; or begin anew "
            "with State()",
        )


def _check_device(states: Sequence[State], leaves: Sequence[Any]) -> None:
    """Refuse kept tensors that lie elsewhere than the inputs of the call."""
    places = {x.device for x in leaves if isinstance(x, Tensor)}
    for state in states:
        kept = next(iter(state.kept.values()), None)
        if kept is not None and places and kept.device not in places:
            raise StateError(
                "what a state keeps is on another device than the call",
                where="step(inputs, state)",
                expected=" or ".join(sorted(map(str, places))),
                got=str(kept.device),
                hint="state.to(device) moves it",
            )


def _log_difference(state: State, model: Any) -> None:
    """Say why a state starts anew: a warning, unless the model changed in its own process."""
    known = isinstance(state.model, ModelKey) and isinstance(model, ModelKey)
    reason = state.model.difference(model) if known else "it belongs to another model"
    level = logging.INFO if known and state.model.local is not None else logging.WARNING
    text = "a state at step %d selects its tokens anew, without what it kept: %s"
    LOGGER.log(level, text, state.step, reason)


def _rows_of(
    states: Sequence[State], programs: ProgramSet, rows: Sequence[int] | None
) -> list[int]:
    """Rows of the batch of each state.

    Raises:
        StateError: the rows do not fill the batch, or the requests can't be told apart.
    """
    sizes = programs.batch_sizes
    if not sizes:
        return [1] * len(states)
    if len(sizes) > 1 and len(states) > 1:
        raise StateError(
            "the requests of this batch can't be told apart",
            where="step(inputs, state)",
            expected="one batch size throughout the model",
            got=f"parts of the model that work on {sorted(sizes)} rows",
            hint="one request per call",
        )
    return share_rows(states, max(sizes), rows)


def share_rows(states: Sequence[State], batch: int, rows: Sequence[int] | None = None) -> list[int]:
    """Rows of the batch of each state; states that keep nothing share the rest evenly.

    Args:
        rows: of each state, if the caller knows them.

    Raises:
        StateError: the rows do not add up to `batch`.
    """
    known = [s.rows for s in states]
    if rows is not None:
        fitting = len(rows) == len(known) and all(type(n) is int and n > 0 for n in rows)
        if not fitting or any(k not in (None, n) for k, n in zip(known, rows, strict=True)):
            raise StateError(
                "rows that are not those of the states",
                where="step(inputs, states, rows=...)",
                expected=f"a number for each of {len(known)} states: {[k or 'any' for k in known]}",
                got=repr(rows),
            )
        known = list(rows)
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


def _kind_due(state: State, programs: ProgramSet) -> str:
    """The kind of program that a request is due, and can run."""
    length = Length(state.steps)
    return runnable(due(programs.schedule, state.step, length=length), programs, state.kept)


def _kind_for(
    states: Sequence[State], kinds: Sequence[str], rows: Sequence[int], programs: ProgramSet
) -> tuple[str, dict[str, Tensor]]:
    """The kind of program that serves all states, and its masks by name.

    Raises:
        StateError: no kind does.
    """
    if len(set(kinds)) == 1:
        return kinds[0], {}
    serving = programs.mixed(set(kinds))
    if serving is None:
        raise StateError(
            "no program serves requests that are due these kinds in one batch",
            where="step(inputs, state)",
            expected="steps of one phase, all inside or all outside first_step to last_step; "
            "of an artifact, steps that are due one kind",
            got=", ".join(f"step {s.step}: {kind}" for s, kind in zip(states, kinds, strict=True)),
            hint="batch requests of the same phase together",
        )
    device = next(iter(next(s.kept for s in states if s.kept).values())).device
    masks = {
        name: torch.tensor(
            [role_of(kind) in true for kind, n in zip(kinds, rows, strict=True) for _ in range(n)],
            device=device,
        )
        for name, true in MASKS.items()
    }
    return serving, masks


def _join(states: Sequence[State], rows: Sequence[int]) -> dict[str, Tensor]:
    """The kept tensors of a batch; rows of requests that do not keep one yet are zeros."""
    if len(states) == 1:
        return dict(states[0].kept)
    like = {name: x for s in reversed(states) for name, x in s.kept.items()}
    pairs = list(zip(states, rows, strict=True))
    return {
        name: torch.cat(
            [s.kept[name] if name in s.kept else x.new_zeros((n, *x.shape[1:])) for s, n in pairs]
        )
        for name, x in like.items()
    }


def _cut(given: Mapping[str, Tensor], rows: Sequence[int]) -> list[dict[str, Tensor]]:
    """What a program gave, by request."""
    if len(rows) == 1:
        return [dict(given)]
    pieces = {name: torch.split(value, list(rows)) for name, value in given.items()}
    # a piece must not keep the memory of the batch
    return [{name: cut[i].clone() for name, cut in pieces.items()} for i in range(len(rows))]


def _keep(state: State, given: Mapping[str, Tensor], programs: ProgramSet, model: Any) -> State:
    """The state with what a program gave; what that replaces may move to where older values are."""
    kept = aged(state.kept, given, programs.older)
    return replace(state, kept=kept, settings=programs.settings, model=model)

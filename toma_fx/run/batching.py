"""States held by the caller, several requests in one batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from toma_fx.errors import StateError
from toma_fx.passes.provide_patterns import MASKS
from toma_fx.run.programs import Specialization
from toma_fx.run.schedule import Call, call_at


def checked_states(state: Any) -> list[State]:
    """The state or states given to `step`, as a list.

    Raises:
        StateError: something else.
    """
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


def fitting(state: State, specialization: Specialization, model: Hashable) -> State:
    """The state, without its patterns if the model has changed since.

    Raises:
        StateError: the patterns were made for another size or configuration.
    """
    if not state.patterns:
        return state
    if state.model != model:
        return State(state.step)
    if state.settings != specialization.settings:
        raise StateError(
            "the state belongs to another call",
            where="step(inputs, state)",
            expected=f"patterns for {specialization.settings}",
            got=f"patterns for {state.settings}",
            hint="keep one state per request; start with State() when its size changes",
        )
    return state


def batched(
    states: Sequence[State], specialization: Specialization
) -> tuple[Call, dict[str, Tensor]]:
    """The program that serves all states, and the patterns and masks it takes, by name.

    Raises:
        StateError: the states do not fill the batch, or only some of them merge at their step.
    """
    plan = specialization.plan
    if not plan.segments:
        return "plain", {}
    rows = rows_of(states, _batch(specialization, len(states)))
    calls = [call_at(plan.config, s.step, bool(s.patterns)) for s in states]
    kinds = set(calls)
    if kinds == {"plain"} or kinds == {"refresh"}:
        return calls[0], {}
    if "plain" in kinds:
        raise StateError(
            "a batch can't hold requests that merge and requests that do not",
            where="step(inputs, state)",
            expected="steps that all lie inside, or all outside, first_step to last_step",
            got=", ".join(f"step {s.step}: {c}" for s, c in zip(states, calls, strict=True)),
            hint="batch requests of the same phase together",
        )
    if len(kinds) == 1:
        return calls[0], _joined(states)
    plan.config.check_static("step(inputs, states) with states at different steps")
    like = next(s.patterns for s in states if s.patterns)
    device = next(iter(like.values())).device
    masks = {
        name: torch.tensor(
            [call in due for call, n in zip(calls, rows, strict=True) for _ in range(n)],
            device=device,
        )
        for name, due in zip(MASKS, (("refresh",), ("refresh", "reweigh")), strict=True)
    }
    filled = [s if s.patterns else _blank(s, like, n) for s, n in zip(states, rows, strict=True)]
    return "mixed", {**masks, **_joined(filled)}


def following(
    states: Sequence[State],
    patterns: Mapping[str, Tensor],
    call: Call,
    specialization: Specialization,
    model: Hashable,
) -> list[State]:
    """The next state of each request: its rows of the patterns that the step used."""
    if call == "plain":
        return [State(s.step + 1, s.patterns, s.settings, s.model) for s in states]
    kept = {name: value for name, value in patterns.items() if name not in MASKS}
    rows = rows_of(states, _batch(specialization, len(states)))
    cut = {name: torch.split(value, rows) for name, value in kept.items()}
    if len(states) > 1:  # a piece must not keep the whole batch alive
        cut = {name: tuple(p.clone() for p in pieces) for name, pieces in cut.items()}
    settings = specialization.settings
    return [
        State(s.step + 1, {name: parts[i] for name, parts in cut.items()}, settings, model)
        for i, s in enumerate(states)
    ]


def _batch(specialization: Specialization, requests: int) -> int:
    """Rows of the batch, as the patterns see them."""
    sizes = {g.batch for g in specialization.plan.groups}
    if len(sizes) > 1 and requests > 1:
        raise StateError(
            "the requests of this batch can't be told apart",
            where="step(inputs, state)",
            expected="one batch size throughout the model",
            got=f"parts of the model that work on {sorted(sizes)} rows",
            hint="one request per call",
        )
    return max(sizes)


def _blank(state: State, like: Mapping[str, Tensor], rows: int) -> State:
    """The state with zeros where its first patterns will be."""
    zeros = {name: p.new_zeros((rows, *p.shape[1:])) for name, p in like.items()}
    return State(state.step, zeros)


def _joined(states: Sequence[State]) -> dict[str, Tensor]:
    if len(states) == 1:
        return dict(states[0].patterns)
    return {name: torch.cat([s.patterns[name] for s in states]) for name in states[0].patterns}


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

"""Steps of many requests: the engine says which requests step, this says how they share batches.

    engine: join("a"), join("b") ... step({"a": call, "b": call}) ... leave("a")
                                       |
    calls --size, phase--> batches --bucket--> padded --denoiser.step--> outputs by request

Requests keep their own `State`; what one does wrong is the error of that one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from toma_fx.compat.pytorch import tree_leaves
from toma_fx.errors import ConfigError, StateError, TomaError
from toma_fx.methods.kinds import is_cached, merges, phase_of
from toma_fx.run.batching import State
from toma_fx.run.rows import Rows, Splitter, cut, join

_log = logging.getLogger("toma_fx.serving")
Mix = Literal["none", "computed", "all"]
MIXES = ("none", "computed", "all")


class Denoiser(Protocol):
    """An optimized denoiser or a loaded artifact."""

    @property
    def can_mix(self) -> bool: ...  # noqa: D102

    @property
    def parameter_names(self) -> Sequence[str]: ...  # noqa: D102

    def step(self, inputs: Any, state: Any, *, rows: Sequence[int] | None = None) -> Any: ...  # noqa: D102

    def due(self, state: State) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class StepResult:
    """What a step gave a request.

    Attributes:
        outputs: as the denoiser returns them, of its rows. error: instead of them.
    """

    outputs: Any = None
    error: Exception | None = None

    def unwrap(self) -> Any:
        """The outputs; raises the error."""
        if self.error is not None:
            raise self.error
        return self.outputs


@dataclass(frozen=True)
class _Turn:
    """A request in this step."""

    request: Hashable
    rows: Rows
    state: State
    kind: str


class StepBatcher:
    """Batches the steps of requests, whatever step each is at.

    Args:
        denoiser: an optimized denoiser, or a loaded artifact.
        buckets: numbers of rows that a batch may have. A batch is filled up to the next one, by
            copies of a row of its own, so that there are few signatures: `warmup` compiles them.
        mix: which requests may share a batch: "none", those due the same kind of program (all that
            artifacts can do); "computed" (the default elsewhere), those that compute; "all", those
            that use kept updates as well: then these compute, too.
        check_finite: fail requests whose outputs hold NaN or infinity; on a GPU this waits for each
            batch.

    Raises:
        ConfigError: buckets that are no sizes, or a mix that the denoiser can't do.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        buckets: Sequence[int] = (1, 2, 4, 8),
        *,
        mix: Mix | None = None,
        check_finite: bool = True,
    ) -> None:
        sizes = sorted(set(buckets))
        if not sizes or any(type(size) is not int or size < 1 for size in sizes):
            raise ConfigError(
                "buckets are out of range", where="buckets",
                expected="numbers of rows, from 1", got=repr(buckets),
            )  # fmt: skip
        possible = MIXES if denoiser.can_mix else MIXES[:1]
        self.mix = mix or possible[:2][-1]
        if self.mix not in possible:
            raise ConfigError(
                "mix is out of range", where="mix", expected=" or ".join(possible), got=repr(mix)
            )
        self.denoiser, self.buckets = denoiser, tuple(sizes)
        self.check_finite = check_finite
        self._splitter = Splitter(denoiser.parameter_names[0])
        self._states: dict[Hashable, State] = {}
        self._lock = threading.Lock()

    # -- requests -------------------------------------------------------------------------------

    @property
    def requests(self) -> tuple[Hashable, ...]:
        """Those that have joined, in their order."""
        return tuple(self._states)

    def join(
        self, request: Hashable, *, steps: int | None = None, state: State | None = None
    ) -> None:
        """Begin a request, or go on with one that another process began.

        Args:
            request: its name. steps: of the request in all, where it is known; a cache may ask for
                it. state: what `leave` gave.

        Raises:
            StateError: it has joined already.
        """
        if request in self._states:
            raise StateError(
                "a request that has joined already", where="join", expected="a new name",
                got=repr(request), hint="leave(request) ends it",
            )  # fmt: skip
        self._states[request] = state if state is not None else State(steps=steps)

    def leave(self, request: Hashable) -> State:
        """End a request, whatever step it is at; returns its state.

        Raises:
            StateError: there is no such request.
        """
        state = self._state(request)
        del self._states[request]
        return state

    def suspend(self, request: Hashable, device: torch.device | str = "cpu") -> None:
        """Move what a request keeps to another device; its next step moves it back."""
        self._states[request] = self._state(request).to(device)

    def _state(self, request: Hashable) -> State:
        if request not in self._states:
            raise StateError(
                "no such request", where="request",
                expected=f"one of {len(self._states)} that have joined", got=repr(request),
                hint="join(request) begins one",
            )  # fmt: skip
        return self._states[request]

    # -- steps ----------------------------------------------------------------------------------

    def step(self, calls: Mapping[Hashable, Mapping[str, Any]]) -> dict[Hashable, StepResult]:
        """One step of each of these requests.

        Args:
            calls: by request, the keyword arguments of its call. Its rows come first in all tensors
                that have them, the picture (the first argument) among them; other tensors are
                shared by the batch if their contents are equal.

        Returns:
            By request, what its call alone would have given, or why it gave nothing. A request
            that failed stays at its step.
        """
        with self._lock:
            results: dict[Hashable, StepResult] = {}
            turns = [t for t in (self._turn(r, c, results) for r, c in calls.items()) if t]
            for batch in self._batches(turns):
                self._run(batch, results)
            return {request: results[request] for request in calls}

    def _turn(
        self, request: Hashable, call: Mapping[str, Any], results: dict[Hashable, StepResult]
    ) -> _Turn | None:
        """What a request asks for; None if it can't be done, which is its result."""
        try:
            state = self._state(request)
            rows = self._splitter.split(call)
            if rows.count > self.buckets[-1]:
                raise ConfigError(
                    "a request with more rows than a batch", where="buckets",
                    expected=f"at most {self.buckets[-1]} rows", got=str(rows.count),
                    hint="StepBatcher(denoiser, buckets=...)",
                )  # fmt: skip
            place = rows.leaves[min(rows.own)].device
            return _Turn(request, rows, state.to(place), self.denoiser.due(state))
        except TomaError as error:
            results[request] = StepResult(error=error)
            return None

    def _batches(self, turns: Sequence[_Turn]) -> Iterator[list[_Turn]]:
        """Turns that run together: of one size, in one phase, at most the largest bucket."""
        groups: dict[Hashable, list[_Turn]] = {}
        for turn in turns:
            groups.setdefault((turn.rows.key, self._phase(turn.kind)), []).append(turn)
        for group in groups.values():
            batch: list[_Turn] = []
            for turn in sorted(group, key=lambda t: t.kind):  # those of one kind side by side
                if batch and _count(batch) + turn.rows.count > self.buckets[-1]:
                    yield batch
                    batch = []
                batch.append(turn)
            yield batch

    def _phase(self, kind: str) -> Hashable:
        """Equal for kinds that may share a batch."""
        if self.mix == "none":
            return kind
        return merges(kind), phase_of(kind), self.mix == "computed" and is_cached(kind)

    def _run(self, batch: Sequence[_Turn], results: dict[Hashable, StepResult]) -> None:
        """Run a batch; where it fails, each of its requests alone, so that one fails alone."""
        try:
            outputs, states = self._call(batch)
        except Exception as error:  # whatever it is, it ends requests, not the loop that serves
            if len(batch) > 1:
                _log.warning("a batch of %d requests runs one by one: %s", len(batch), error)
                for turn in batch:
                    self._run([turn], results)
            else:
                results[batch[0].request] = StepResult(error=error)
            return
        finite = [True] * len(batch)
        if self.check_finite:
            finite = torch.stack([_is_finite(x) for x in outputs]).tolist()
        for turn, own, state, good in zip(batch, outputs, states, finite, strict=True):
            if good:
                self._states[turn.request] = state
                results[turn.request] = StepResult(own)
            else:
                results[turn.request] = StepResult(error=_not_finite(turn))

    def _call(self, batch: Sequence[_Turn]) -> tuple[list[Any], list[State]]:
        """(outputs, next states) of the requests of a batch."""
        count = _count(batch)
        bucket = next(size for size in self.buckets if size >= count)
        # a copy of a row in the batch is due nothing that the batch is not, and as finite as that
        filler = replace(batch[0], rows=batch[0].rows.part(0, 1), state=_first_row(batch[0].state))
        padded = [*batch, *[filler] * (bucket - count)]
        counts = [turn.rows.count for turn in padded]
        outputs, states = self.denoiser.step(
            join([turn.rows for turn in padded]), [turn.state for turn in padded], rows=counts
        )
        return cut(outputs, counts)[: len(batch)], list(states[: len(batch)])


def _count(batch: Sequence[_Turn]) -> int:
    return sum(turn.rows.count for turn in batch)


def _first_row(state: State) -> State:
    return replace(state, kept={name: x[:1] for name, x in state.kept.items()})


def _is_finite(outputs: Any) -> Tensor:
    """Whether all numbers of the outputs are finite, as a tensor: reading it waits."""
    tensors = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
    return torch.stack([torch.isfinite(x).all() for x in tensors]).all()


def _not_finite(turn: _Turn) -> StateError:
    return StateError(
        "a step gave numbers that are not finite",
        where=f"request {turn.request!r}, step {turn.state.step}",
        expected="finite numbers",
        got="NaN or infinity",
        hint="its inputs hold such numbers, or overflow the model's dtype",
    )

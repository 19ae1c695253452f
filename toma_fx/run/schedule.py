r"""Which kind of program is due at a step, and which one runs.

schedule --step--> kind that is due --what it takes is kept?--> that kind
                                    \--else----------------> the kind that runs instead

Where updates are kept over steps, those that do not compute are due "cached", and what was to be
selected in them is selected in the next one that computes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

from toma_fx.errors import ConfigError
from toma_fx.methods.cached_steps import LONGEST, UNKNOWN_LENGTH, CachedSteps, Length

T = TypeVar("T")
USING = {"cached", "cached_plain"}
"""Kinds that use kept updates for all rows."""


class Scheduled(Protocol):
    """What decides which kind is due: a method's configuration, or the schedule of an artifact."""

    @property
    def first_step(self) -> int: ...  # noqa: D102

    @property
    def last_step(self) -> int | None: ...  # noqa: D102

    @property
    def caching(self) -> CachedSteps | None: ...  # noqa: D102

    def renewal(self, since: int) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Schedule:
    """A schedule as plain data.

    Attributes:
        first_step, last_step: the steps that merge, from 0; others run "plain".
        begin: kinds of the first merged steps. cycle: what follows them, over and over.
        caching: which steps compute; None: all.
    """

    first_step: int
    last_step: int | None
    begin: tuple[str, ...]
    cycle: tuple[str, ...]
    caching: CachedSteps | None = None

    @classmethod
    def of(cls, config: Scheduled, replacing: Callable[[str], str] = str) -> Self:
        """The schedule of a configuration; `replacing` gives the kind that stands for a kind."""
        kinds = [replacing(config.renewal(i)) for i in range(LONGEST)]
        return cls(config.first_step, config.last_step, *_shortest_cycle(kinds), config.caching)

    @classmethod
    def plain(cls, caching: CachedSteps | None = None) -> Self:
        """That of a model of which nothing merges: every step comes after the last that would."""
        return cls(0, -1, (), ("reuse",), caching)

    def renewal(self, since: int) -> str:
        """The kind that is due `since` steps after the first that merges."""
        if since < len(self.begin):
            return self.begin[since]
        return self.cycle[(since - len(self.begin)) % len(self.cycle)]


def _shortest_cycle(kinds: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The shortest (begin, cycle) that continue to give `kinds`.

    For each period, shortest first, walk back from the end while every kind equals the one a period
    earlier: what is left in front is the beginning. A cycle counts only if it was seen twice and
    begins in the first half, so that a list that never repeats isn't taken for a long cycle. Of
    a b c b c b c: period 1 fails at once, period 2 walks back to a: begin (a,), cycle (b, c).
    """
    for period in range(1, len(kinds) // 2):
        start = len(kinds)
        while start > period and kinds[start - 1] == kinds[start - 1 - period]:
            start -= 1
        start -= period
        if start + 2 * period <= len(kinds) and start <= len(kinds) // 2:
            return tuple(kinds[:start]), tuple(kinds[start : start + period])
    return tuple(kinds[:-1]), (kinds[-1],)


def due(
    schedule: Scheduled,
    step: int,
    first: int = 0,
    length: Length = UNKNOWN_LENGTH,
    *,
    computes: bool = False,
) -> str:
    """The kind of program that is due.

    Args:
        step: of the generation, from 0. first: step at which the pass selected first.
        length: of the generation. computes: whether it computes, whatever the schedule says.

    Raises:
        GenerationError: which steps compute can't be told without the length, or does not fit it.
    """
    kind, caching = _merging_kind(schedule, step, first), schedule.caching
    if caching is None:
        return kind
    if not (computes or caching.computes(step, length)):
        return "cached_plain" if kind == "plain" else "cached"
    if kind in ("plain", "refresh"):
        return kind
    while step > first and not caching.computes(step - 1, length):
        step -= 1
        missed = _merging_kind(schedule, step, first)
        if missed == "refresh":
            return missed
        if kind == "reuse" and missed != "plain":
            kind = missed
    return kind


def _merging_kind(schedule: Scheduled, step: int, first: int) -> str:
    """The kind that is due where every step computes."""
    last = schedule.last_step
    if step < schedule.first_step or (last is not None and step > last):
        return "plain"
    return schedule.renewal(step - max(first, schedule.first_step))


def counts_steps(schedule: Scheduled) -> bool:
    """Whether steps differ by more than what they select, so that it matters which a call is."""
    last = schedule.last_step
    some_merge = (last is None and schedule.first_step > 0) or (last is not None and last >= 0)
    return some_merge or schedule.caching is not None


@dataclass(frozen=True)
class Aging:
    """What becomes of kept values when some are given anew.

    Attributes:
        moves: (from, to) before the new values are stored, the oldest first. fills: (from, to)
            after it, the newest first: where there is no older value yet, the new one stands for
            it. names: all kept tensors that change.
    """

    moves: tuple[tuple[str, str], ...]
    fills: tuple[tuple[str, str], ...]
    names: frozenset[str]


def aging(kept: Collection[str], given: Collection[str], older: Mapping[str, str]) -> Aging:
    """What becomes of kept values when some are given anew.

    Args:
        kept: names of what is kept. given: of what is given anew. older: by name, where its value
            goes then, newer names first.

    >>> aging({"u_0"}, ["u_0"], {"u_0": "u_1", "u_1": "u_2"})
    Aging(moves=(('u_0', 'u_1'),), fills=(('u_1', 'u_2'),), names=frozenset({...}))
    """
    changing, moves, fills = set(given), list[tuple[str, str]](), list[tuple[str, str]]()
    for source, target in older.items():
        if source not in changing:
            continue
        if source in kept:
            moves.append((source, target))
        elif target not in kept:
            fills.append((source, target))
        else:
            continue
        changing.add(target)
    return Aging(tuple(moves[::-1]), tuple(fills), frozenset(changing))


def aged(kept: Mapping[str, T], given: Mapping[str, T], older: Mapping[str, str]) -> dict[str, T]:
    """What is kept once a program gave some values anew."""
    values, changes = dict(kept), aging(kept, given, older)
    for source, target in changes.moves:
        values[target] = values[source]
    values.update(given)
    for source, target in changes.fills:
        values[target] = values[source]
    return values


class Kinds(Protocol):
    """Kinds of programs by name: what each takes and gives, and what runs instead of it."""

    @property
    def older(self) -> Mapping[str, str]: ...  # noqa: D102

    def takes(self, kind: str) -> tuple[str, ...]: ...  # noqa: D102

    def gives(self, kind: str) -> tuple[str, ...]: ...  # noqa: D102

    def instead(self, kind: str) -> str: ...  # noqa: D102


def runnable(kind: str, kinds: Kinds, kept: Collection[str]) -> str:
    """The kind itself if all that it takes is kept, else what runs instead.

    Raises:
        ConfigError: neither it nor what runs instead can run: the kinds of a method are wrong.
    """
    tried = [kind]
    while not all(name in kept for name in kinds.takes(tried[-1])):
        other = kinds.instead(tried[-1])
        if other in tried:
            raise ConfigError(
                "no program can run without kept tensors",
                where=f"kind {kind!r}",
                expected="a kind that takes nothing, among those that run instead",
                got=" -> ".join(tried),
            )
        tried.append(other)
    return tried[-1]


def kinds_of(kinds: Kinds, schedule: Scheduled, length: Length, steps: int) -> list[str]:
    """The kinds that run in the first steps of a generation.

    Raises:
        GenerationError: which steps compute can't be told without the length, or does not fit it.
    """
    kept, ran = set[str](), list[str]()
    for step in range(steps):
        ran.append(runnable(due(schedule, step, length=length), kinds, kept))
        kept |= aging(kept, kinds.gives(ran[-1]), kinds.older).names
    return ran

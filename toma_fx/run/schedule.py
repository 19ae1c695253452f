r"""Which kind of program is due at a step, and which one runs.

schedule --step--> kind that is due --what it takes is kept?--> that kind
                                    \--else----------------> the kind that runs instead

Where updates are kept over steps, those that do not compute are due "cached", and what was to be
selected in them is selected in the next one that computes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self, TypeVar

from toma_fx.errors import ConfigError
from toma_fx.methods.cached_steps import LONGEST, UNKNOWN_LENGTH, CachedSteps, Length, count_steps
from toma_fx.methods.kinds import (
    CACHED,
    CACHED_PLAIN,
    PLAIN,
    REUSE,
    SELECTING,
    kind_in,
    merges,
    role_of,
)

T = TypeVar("T")


class Stage(Protocol):
    """What holds in one phase."""

    @property
    def merges(self) -> bool: ...  # noqa: D102

    def renewal(self, since: int) -> str: ...  # noqa: D102


class Configuration(Protocol):
    """What a schedule is made of: the configuration of a method."""

    @property
    def first_step(self) -> int: ...  # noqa: D102

    @property
    def last_step(self) -> int | None: ...  # noqa: D102

    @property
    def caching(self) -> CachedSteps | None: ...  # noqa: D102

    @property
    def phases(self) -> Sequence[tuple[int | float, object]]: ...  # noqa: D102

    @property
    def stages(self) -> Sequence[Stage]: ...  # noqa: D102


@dataclass(frozen=True)
class Phase:
    """A part of a generation with programs of its own.

    Attributes:
        begin: its first step: a number, or as a float a share of all steps, rounded up.
        first: kinds of its first steps. cycle: what follows them, over and over.
        cached: the kind of its steps that use kept updates.
    """

    begin: int | float
    first: tuple[str, ...]
    cycle: tuple[str, ...]
    cached: str

    @classmethod
    def of(cls, begin: int | float, number: int, stage: Stage) -> Self:
        """The phase of this number, counted from 0."""
        if not stage.merges:
            return cls.unmerged(begin)
        kinds = [kind_in(stage.renewal(i), number) for i in range(LONGEST)]
        return cls(begin, *_shortest_cycle(kinds), kind_in(CACHED, number))

    @classmethod
    def unmerged(cls, begin: int | float = 0) -> Self:
        """One that merges nothing."""
        return cls(begin, (), (PLAIN,), CACHED_PLAIN)

    def renewal(self, since: int) -> str:
        """The kind that is due so many steps after the first of the phase that merges."""
        if since < len(self.first):
            return self.first[since]
        return self.cycle[(since - len(self.first)) % len(self.cycle)]

    def replacing(self, kind_instead: Callable[[str], str]) -> Phase:
        """The phase with other kinds for some, in the shortest form of what is now alike."""
        first, cycle = (tuple(map(kind_instead, names)) for names in (self.first, self.cycle))
        if (first, cycle) != (self.first, self.cycle):
            first, cycle = _shortest_cycle([*first, *cycle * (2 + LONGEST // len(cycle))])
        return Phase(self.begin, first, cycle, kind_instead(self.cached))

    @property
    def kinds(self) -> set[str]:
        """All that it names."""
        return {*self.first, *self.cycle, self.cached}


@dataclass(frozen=True)
class Schedule:
    """Which kind is due when, as plain data.

    Attributes:
        first_step, last_step: the steps that merge, from 0; others run "plain".
        phases: what differs over the steps; the first begins at 0.
        caching: which steps compute; None: all.
    """

    first_step: int
    last_step: int | None
    phases: tuple[Phase, ...]
    caching: CachedSteps | None = None

    @classmethod
    def of(cls, config: Configuration) -> Self:
        """The schedule of a configuration."""
        begins = [0, *(begin for begin, _ in config.phases)]
        stages = enumerate(zip(begins, config.stages, strict=True))
        phases = tuple(Phase.of(begin, i, stage) for i, (begin, stage) in stages)
        return cls(config.first_step, config.last_step, phases, config.caching)

    @classmethod
    def plain(cls, caching: CachedSteps | None = None) -> Self:
        """That of a model of which nothing merges."""
        return cls(0, None, (Phase.unmerged(),), caching)

    def replacing(self, kind_instead: Callable[[str], str]) -> Schedule:
        """The schedule with other kinds for some: `kind_instead` gives what stands for a kind."""
        return replace(self, phases=tuple(p.replacing(kind_instead) for p in self.phases))

    def phase_at(self, step: int, length: Length) -> tuple[Phase, int]:
        """The phase of a step, and its first step.

        Raises:
            GenerationError: phases begin at shares of a length that is not known.
        """
        known = length.steps or (self.caching.steps if self.caching else None)
        found, begin = self.phases[0], 0
        for i, phase in enumerate(self.phases[1:], start=1):
            start = length.order * count_steps(phase.begin, known, f"phases[{i}].begin")
            if start <= step:
                found, begin = phase, start
        return found, begin

    def merging(self, step: int, first: int, length: Length) -> tuple[str, Phase]:
        """The kind that is due where every step computes, and the phase."""
        phase, begin = self.phase_at(step, length)
        last = self.last_step
        if step < self.first_step or (last is not None and step > last):
            return PLAIN, phase
        return phase.renewal(step - max(first, self.first_step, begin)), phase


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
    schedule: Schedule,
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
        GenerationError: which steps compute, or which phase they are in, can't be told without the
            length, or does not fit it.
    """
    (kind, phase), caching = schedule.merging(step, first, length), schedule.caching
    if caching is None:
        return kind
    if not (computes or caching.computes(step, length)):
        return phase.cached if merges(kind) else CACHED_PLAIN
    if not merges(kind) or role_of(kind) in SELECTING:
        return kind
    while step > first and not caching.computes(step - 1, length):
        step -= 1
        missed, other = schedule.merging(step, first, length)
        if other is not phase:
            break
        if role_of(missed) in SELECTING:
            return missed
        if role_of(kind) == REUSE and merges(missed):
            kind = missed
    return kind


def counts_steps(schedule: Schedule) -> bool:
    """Whether steps differ by more than what they select, so that it matters which a call is."""
    last = schedule.last_step
    some_merge = (last is None and schedule.first_step > 0) or last is not None
    return some_merge or len(schedule.phases) > 1 or schedule.caching is not None


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


def kinds_of(kinds: Kinds, schedule: Schedule, length: Length, steps: int) -> list[str]:
    """The kinds that run in the first steps of a generation.

    Raises:
        GenerationError: which steps compute can't be told without the length, or does not fit it.
    """
    kept, ran = set[str](), list[str]()
    for step in range(steps):
        ran.append(runnable(due(schedule, step, length=length), kinds, kept))
        kept |= aging(kept, kinds.gives(ran[-1]), kinds.older).names
    return ran


def kinds_that_run(kinds: Kinds, schedule: Schedule) -> set[str]:
    """The kinds of programs that some step of a generation runs.

    Which steps compute may depend on the length of a generation, so that any kind may be due there.

    Raises:
        KeyError: there is no kind of that name. ConfigError: a kind that can't run.
        GenerationError: steps that contradict each other.
    """
    begins = [p.begin for p in schedule.phases if isinstance(p.begin, int)]
    steps = max(LONGEST, (schedule.last_step or 0) + 2, *(begin + LONGEST for begin in begins))
    every = replace(schedule, caching=None)
    ran = set(kinds_of(kinds, every, Length(steps), steps))
    caching = schedule.caching
    if caching is not None and not all(caching.flags(caching.horizon)):
        ran |= {p.cached for p in schedule.phases if not ran.isdisjoint((*p.first, *p.cycle))}
        ran |= {CACHED_PLAIN} if PLAIN in ran else set()
    return ran

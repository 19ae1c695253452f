"""Which kind of program is due at a step, and which one runs.

schedule --step--> kind that is due --what it takes is kept?--> that kind
                                    \--else----------------> the kind that runs instead
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from toma_fx.errors import ConfigError

if TYPE_CHECKING:  # `toma-fx info` reads schedules without torch
    from toma_fx.methods.base import MethodConfig

LONGEST = 1000
"""Steps of a generation that a schedule is written down for, and that are exported."""


class Scheduled(Protocol):
    """What decides which kind is due: a method's configuration, or the schedule of an artifact."""

    @property
    def first_step(self) -> int: ...  # noqa: D102

    @property
    def last_step(self) -> int | None: ...  # noqa: D102

    def renewal(self, since: int) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Schedule:
    """A schedule as plain data.

    Attributes:
        first_step, last_step: the steps that merge, from 0; others run "plain".
        begin: kinds of the first merged steps. cycle: what follows them, over and over.
    """

    first_step: int
    last_step: int | None
    begin: tuple[str, ...]
    cycle: tuple[str, ...]

    @classmethod
    def of(cls, config: MethodConfig, replacing: Callable[[str], str] = str) -> Self:
        """The schedule of a configuration; `replacing` gives the kind that stands for a kind."""
        kinds = [replacing(config.renewal(i)) for i in range(LONGEST)]
        return cls(config.first_step, config.last_step, *_shortest_cycle(kinds))

    @classmethod
    def plain(cls) -> Self:
        """That of a model of which nothing merges: every step comes after the last that would."""
        return cls(0, -1, (), ("reuse",))

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


def due(schedule: Scheduled, step: int, first: int = 0) -> str:
    """The kind of program that is due.

    Args:
        step: of the generation, from 0. first: step at which the pass selected first.
    """
    last = schedule.last_step
    if step < schedule.first_step or (last is not None and step > last):
        return "plain"
    return schedule.renewal(step - max(first, schedule.first_step))


def counts_steps(schedule: Scheduled) -> bool:
    """Whether some steps merge and others do not, so that it matters which step a call is."""
    last = schedule.last_step
    return (last is None and schedule.first_step > 0) or (last is not None and last >= 0)


class Kinds(Protocol):
    """Kinds of programs by name: what each takes, and what runs instead of it."""

    def takes(self, kind: str) -> tuple[str, ...]: ...  # noqa: D102

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

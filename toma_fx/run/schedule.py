"""Which program a step runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from toma_fx.methods.base import MethodConfig, Renewal

LONGEST = 1000
"""Steps of a generation that a schedule is written down for, and that are exported."""


@dataclass(frozen=True)
class Schedule:
    """Which program runs when.

    Attributes:
        first_step, last_step: the steps that merge, from 0; others run "plain".
        patterned: whether there are patterns at all; if not, merged steps run "reuse".
        begin: programs of the first merged steps. cycle: what follows them, over and over. A step
            without a pattern refreshes in any case.
    """

    first_step: int
    last_step: int | None
    patterned: bool
    begin: tuple[Renewal, ...]
    cycle: tuple[Renewal, ...]

    @classmethod
    def of(cls, config: MethodConfig) -> Self:
        """The schedule of a configuration."""
        calls: list[Renewal] = ["reuse"]
        if config.patterned:
            calls = [config.renewal(i) for i in range(LONGEST)]
        begin, cycle = _periodic(calls)
        return cls(config.first_step, config.last_step, config.patterned, begin, cycle)

    @classmethod
    def plain(cls) -> Self:
        """That of a model of which nothing merges: every step comes after the last that would."""
        return cls(0, -1, False, (), ("reuse",))

    def call(self, step: int, has_pattern: bool) -> Call:
        """The program of a step (from 0): the same as `state.call_at` of the configuration."""
        return call_at(self, step, has_pattern)

    def renewal(self, since: int) -> Renewal:
        """What a step does with the pattern, `since` steps after the first that merges."""
        if since < len(self.begin):
            return self.begin[since]
        return self.cycle[(since - len(self.begin)) % len(self.cycle)]


def _periodic(calls: Sequence[Renewal]) -> tuple[tuple[Renewal, ...], tuple[Renewal, ...]]:
    """The shortest (begin, cycle) that continue to give `calls`."""
    for period in range(1, len(calls) // 2):
        start = len(calls)
        while start > period and calls[start - 1] == calls[start - 1 - period]:
            start -= 1
        start -= period
        if start + 2 * period <= len(calls) and start <= len(calls) // 2:
            return tuple(calls[:start]), tuple(calls[start : start + period])
    return tuple(calls[:-1]), (calls[-1],)


Call = Literal["plain", "refresh", "reweigh", "reuse", "mixed"]


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

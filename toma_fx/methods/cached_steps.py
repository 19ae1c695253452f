"""Which steps of a generation compute, and which use what an earlier step kept.

    step      0  1  2  3  4  5  6  7
    every=3   C  C  .  .  C  .  .  C      warmup_steps=2, last_steps=1

Plain data: a manifest holds it, and any runtime can follow it (docs/caching.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from toma_fx.errors import GenerationError
from toma_fx.methods.checks import is_count

LONGEST = 1000
"""Steps that are looked at where nobody says how many there are."""
POLICIES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "scm-slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "scm-medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "scm-fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "scm-ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
}
"""Masks of 28 steps that cache-dit publishes as step computation masks: lengths of the runs of
steps that compute, and of the runs between them that do not."""
SHARES = {"lossless": 0.45, "balanced": 0.35, "fast": 0.3}
"""Masks of this project: the share of the steps that compute, see `spread`. Chosen by the error of
pictures, see docs/caching.md."""
DENSE, GROWTH = 3, 1.25
"""Of `spread`: steps at the begin that all compute, and how fast the gaps between later ones grow.
What a picture shows is decided early: where two are as likely, a small error makes another."""


@dataclass(frozen=True)
class Length:
    """How long a generation is.

    Attributes:
        calls: of the denoiser in one pass; None if that is not known.
        order: calls for one step of the solver: 2 for Heun's method.
    """

    calls: int | None = None
    order: int = 1

    @property
    def steps(self) -> int | None:
        """Steps of the solver."""
        return None if self.calls is None else math.ceil(self.calls / self.order)


UNKNOWN_LENGTH = Length()


@dataclass(frozen=True)
class CachedSteps:
    """Which steps compute; the others use kept updates.

    Attributes:
        every: the first step after the warm-up that computes is this many steps after its last; and
            so on. mask: 1 for every step that computes, 0 for the others, instead of `every`.
        policy: a name in `POLICIES` instead of `every`; its 28 steps are stretched.
        share: of the steps that compute, instead of `every`, as `spread` lays them out.
        warmup_steps, last_steps: steps at the begin and at the end: a number, or a share of all.
            warmup_interval: of the first, those that are a multiple of it compute; of the last, all
            do. most: cached steps in a row. steps: of a generation, where nothing tells.
        threshold: relative change of the updates beyond which a step computes that would not.
    """

    every: int
    mask: tuple[int, ...] | None = None
    policy: str | None = None
    share: float | None = None
    warmup_steps: int | float = 1
    last_steps: int | float = 0
    warmup_interval: int = 1
    most: int | None = None
    steps: int | None = None
    threshold: float | None = None

    def computes(self, call: int, length: Length = UNKNOWN_LENGTH) -> bool:
        """Whether a call of the denoiser, counted from 0 in a generation, computes.

        Raises:
            GenerationError: the schedule does not fit the length, or needs one.
        """
        flags = self.flags(length.steps)
        step = call // length.order
        return step >= len(flags) or flags[step]

    @property
    def horizon(self) -> int:
        """Steps after which nothing new comes."""
        return self.steps or (len(self.mask) if self.mask else LONGEST)

    def flags(self, steps: int | None = None) -> tuple[bool, ...]:
        """Whether each step of a generation computes; of the first 1000, if it may be any length.

        Raises:
            GenerationError: the schedule does not fit the length, or needs one.
        """
        return _flags(self, steps)


@lru_cache(maxsize=256)
def _flags(caching: CachedSteps, steps: int | None) -> tuple[bool, ...]:
    known = caching.steps if steps is None else steps
    if caching.mask is not None:
        known = len(caching.mask) if known is None else known
        if known != len(caching.mask):
            raise GenerationError(
                "steps_mask is of another length than the generation",
                where="cache.steps_mask",
                expected=f"one entry for each of {known} steps",
                got=f"{len(caching.mask)} entries",
                hint="every=, or a named mask, fits any number of steps",
            )
    warmup = _count(caching, "warmup_steps", known)
    last = _count(caching, "last_steps", known)
    if known is not None and warmup > known:
        raise GenerationError(
            "the warm-up is longer than the generation",
            where="cache.warmup_steps",
            expected=f"at most {known}, the number of steps",
            got=str(warmup),
            hint="a share, warmup_steps=0.2, fits any number of steps; or leave cache= out",
        )
    if last and known is None:
        raise _unknown("cache.last_steps", caching.last_steps)
    wanted = list(_wanted(caching, known, known or LONGEST))
    for i in range(len(wanted)):
        kept_back = known is not None and i >= known - last
        warms_up = i < max(warmup, 1) and i % caching.warmup_interval == 0
        wanted[i] = wanted[i] or warms_up or kept_back
    return tuple(_break_up(wanted, caching))


def _count(caching: CachedSteps, name: str, steps: int | None) -> int:
    return count_steps(getattr(caching, name), steps, f"cache.{name}")


def count_steps(value: int | float, steps: int | None, where: str) -> int:
    """A number of steps that may be given as a share of all, which is rounded up.

    Raises:
        GenerationError: a share, and it is not known of how many.
    """
    if isinstance(value, int):
        return value
    if steps is None:
        raise _unknown(where, value)
    return math.ceil(value * steps)


def is_step_count(value: object) -> bool:
    """Whether a value is a number of steps: whole, or as a float in [0, 1) a share of all."""
    return (isinstance(value, float) and 0 <= value < 1) or is_count(value, 0)


def _unknown(where: str, value: float | str) -> GenerationError:
    return GenerationError(
        "the number of steps is not known",
        where=where,
        expected="a generation whose number of steps is told",
        got=f"{where.rpartition('.')[2]}={value}",
        hint="toma_fx.optimize(pipe) tells it for a pipeline, denoiser.generation(steps=30) for a "
        "loop, State(steps=30) for step(inputs, state); for a cache also CacheConfig(steps=30)",
    )


def _wanted(caching: CachedSteps, steps: int | None, length: int) -> Iterator[bool]:
    """What mask or policy say of each step; nothing where steps are counted by `every`."""
    if caching.mask is not None:
        yield from map(bool, caching.mask)
    elif caching.policy is not None or caching.share is not None:
        if steps is None:
            raise _unknown("cache.steps_mask", "a named mask")
        if caching.policy is not None:
            yield from stretch(policy_mask(caching.policy), steps)
        else:
            yield from spread(caching.share or 0.0, steps)
    else:
        yield from [False] * length


def _break_up(wanted: Sequence[bool], caching: CachedSteps) -> Iterator[bool]:
    """Let steps compute where too many cached ones would follow each other."""
    counted = all(x is None for x in (caching.mask, caching.policy, caching.share))
    limits = [caching.every - 1] if counted else []
    limits += [] if caching.most is None else [caching.most]
    row = 0
    for computes in wanted:
        computed = computes or (bool(limits) and row >= min(limits))
        row = 0 if computed else row + 1
        yield computed


def policy_mask(name: str) -> tuple[bool, ...]:
    """The 28 steps of a named mask."""
    compute, cache = POLICIES[name]
    runs = zip(compute, (*cache, 0), strict=True)
    return tuple(flag for n, m in runs for flag in (*[True] * n, *[False] * m))


def spread(share: float, steps: int) -> list[bool]:
    """A mask by the share of the steps that compute: the first three, then ever fewer, the last.

    Of K = round(share * steps) steps, at least 4, the j-th after the first three is step
    2 + round((steps - 3) (j / (K - 3)) ** 1.25).
    """
    count = min(max(math.floor(share * steps + 0.5), DENSE + 1), steps)
    chosen, rest = set(range(DENSE)), count - DENSE
    for j in range(1, rest + 1):
        far = (steps - DENSE) * (j / rest) ** GROWTH
        chosen.add(DENSE - 1 + math.floor(far + 0.5))
    return [step in chosen for step in range(steps)]


def stretch(mask: Sequence[bool], steps: int) -> list[bool]:
    """A mask for another number of steps; the first and the last compute."""
    if steps == len(mask):
        return list(mask)
    flags = [mask[i * len(mask) // steps] for i in range(steps)]
    flags[0] = flags[-1] = True
    return flags

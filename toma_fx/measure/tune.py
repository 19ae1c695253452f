"""`toma_fx.tune`: the cache that makes least of a difference at a speed, for a model and prompts.

    record generations in which every step computes     -> errors of updates for any mask
    cache one step at a time                            -> what the pictures show of them
    predict all masks, keep the best of each length     -> a front of error against speed
    draw pictures with the few that may be it           -> the recipe, checked on other seeds

What a cached step keeps ("scope") and how it is extrapolated ("order") is tried in all forms that
the model has. Merging is not searched: `base=` says what merges beside, and is tuned around.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from toma_fx.calibration import Recorded
from toma_fx.capture.architecture import architecture_of
from toma_fx.errors import ConfigError, NoCacheSites, TuneError
from toma_fx.measure.environment import environment
from toma_fx.measure.masks import Mask, MaskErrors, UpdateErrors, weights_of
from toma_fx.measure.prompts import read_cases
from toma_fx.measure.quality import Progress
from toma_fx.measure.scores import score_pairs
from toma_fx.measure.subjects import Case, Subject, subject_of
from toma_fx.measure.work import time_generations
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.cache import CacheConfig, CacheScope
from toma_fx.methods.cached_steps import Length
from toma_fx.methods.checks import is_number
from toma_fx.methods.config import make_config
from toma_fx.methods.recipe import Recipe
from toma_fx.run.programs import Specialization
from toma_fx.run.schedule import kinds_of

SCOPES: tuple[CacheScope, ...] = ("deep", "shallow", "stack")
ORDERS = (0, 1)
TRIED = 3
"""Candidates whose pictures are drawn before one is chosen."""
OTHER_SEEDS = 100_003
"""How far the seeds of the check lie from those of the search."""
_log = logging.getLogger("toma_fx.measure")


@dataclass(frozen=True)
class Candidate:
    """A configuration, with what is known of it.

    Attributes:
        config: it. speedup: by counted FLOPs of the denoiser. error: predicted squared error of
            pictures in [0, 1], mean over the cases.
    """

    config: MethodConfig
    speedup: float
    error: float


def tune(
    model: Any,
    prompts: Any,
    *,
    speedup: float | None = None,
    psnr: float | None = None,
    base: Any = False,
    scopes: Sequence[CacheScope] = SCOPES,
    orders: Sequence[int] = ORDERS,
    probes: int = 30,
    rounds: int = 3,
    seed: int = 0,
    seeds: int = 1,
    limit: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Recipe:
    """Find the steps that need not compute, and what they use instead.

    Args:
        model, prompts, seed, seeds, limit, settings: as for `toma_fx.quality`. A few pictures do.
        speedup: to reach, of the denoiser by counted FLOPs; with the least error.
        psnr: in dB, to reach in the mean over the pictures; with the most speed. One of the two.
        base: what `optimize(model, X)` takes: what merges beside; nothing if not given.
        scopes, orders: that are tried, of `CacheConfig`.
        probes: steps that are cached alone, to see what it does to the pictures; all of them, or
            so many spread over the generation.
        rounds: generations that are timed of the result and the original; 0 for none.
        progress: is told what goes on.

    Returns:
        The recipe; `measured` has its figures on pictures of other seeds than it was found with.

    Raises:
        TuneError: the target can't be reached; says what can.
        ConfigError: no target or two, or values out of their domain. NoCacheSites: nothing of the
            model can be cached. As `toma_fx.quality`.
    """
    _check_target(speedup, psnr)
    merging = make_config(base)
    cases = read_cases(prompts, seed=seed, seeds=seeds, limit=limit)
    subject = subject_of(model, settings)
    search = _Search(subject, cases, merging, progress or (lambda what, count: None))
    front = search.front(scopes, orders, probes)
    found = search.at_speed(front, speedup) if speedup else search.at_quality(front, psnr or 0.0)
    target = {"speedup": speedup} if speedup else {"psnr": psnr or 0.0}
    return search.recipe(found, target, rounds)


def _check_target(speedup: float | None, wanted: float | None) -> None:
    if (speedup is None) == (wanted is None):
        raise ConfigError(
            "tune needs one target",
            where="tune",
            expected="speedup= or psnr=",
            got=f"speedup={speedup}, psnr={wanted}",
        )
    for name, value, least in (("speedup", speedup, 1), ("psnr", wanted, 0)):
        if value is not None and not (is_number(value) and least < value < math.inf):
            raise ConfigError(
                f"{name} is out of range",
                where=name,
                expected=f"a number over {least}",
                got=repr(value),
            )


@dataclass
class _Search:
    """Draws pictures of the cases and says how they differ from the original's."""

    subject: Subject
    cases: Sequence[Case]
    base: MethodConfig
    progress: Progress

    # -- predicting -----------------------------------------------------------------------------

    def front(
        self, scopes: Sequence[CacheScope], orders: Sequence[int], probes: int
    ) -> list[Candidate]:
        """Candidates of which no other is faster and predicted to be better, the fastest first.

        Raises:
            NoCacheSites: no scope caches anything.
        """
        found: list[Candidate] = []
        refused: NoCacheSites | None = None
        for scope in scopes:
            try:
                found += self._candidates(scope, orders, probes)
            except NoCacheSites as error:
                _log.info("scope %r is left out: %s", scope, error)
                refused = error
        if not found and refused is not None:
            raise refused
        return _front(found)

    def _candidates(self, scope: CacheScope, orders: Sequence[int], probes: int) -> list[Candidate]:
        """The best mask of each number of steps, for one scope."""
        steps, order = self.subject.settings.steps, max(orders)
        every = self._config(scope, order, (1,) * steps)
        updates = self._record(every)
        probed = {}
        chosen = sorted({1 + round(i * (steps - 2) / max(1, min(probes, steps - 1) - 1))
                         for i in range(min(probes, steps - 1))})  # fmt: skip
        self.progress(f"{scope}: one step at a time", len(chosen))
        for step in chosen:
            mask = tuple(int(i != step) for i in range(steps))
            probed[step] = self.error(self._config(scope, order, mask))
            self.progress("", 1)
        (denoiser, *_) = self.subject.optimized(every).values()
        programs = denoiser.specializations[-1]
        weights, out = weights_of(updates, order, probed), []
        for own in orders:
            for error, mask in MaskErrors(updates, own, weights).best().values():
                if not all(mask):
                    config = self._config(scope, own, mask)
                    # an extrapolation counts nothing: programs of the other order cost the same
                    out.append(Candidate(config, _speedup(programs.under(config), steps), error))
        return out

    def _config(self, scope: CacheScope, order: int, mask: Mask) -> MethodConfig:
        cache = CacheConfig(scope=scope, order=order, steps_mask=mask)
        return dataclasses.replace(self.base, cache=cache)

    def _record(self, config: MethodConfig) -> UpdateErrors:
        """Updates of all steps, of every batch of the cases."""
        recorded, size = [], self.subject.settings.batch
        (denoiser, *_) = self.subject.optimized(config).values()
        self.progress("record", math.ceil(len(self.cases) / size))
        for start in range(0, len(self.cases), size):
            recorded.append(Recorded())
            with recorded[-1].recording(denoiser):
                self.subject.draw(self.cases[start : start + size], config)
            self.progress("", 1)
        return UpdateErrors.of(recorded)

    # -- drawing --------------------------------------------------------------------------------

    def error(self, config: MethodConfig) -> float:
        """Mean squared difference from the original's pictures, which are in [0, 1]."""
        got, want = self.subject.draw(self.cases, config), self.subject.reference(self.cases)
        return float((got - want).square().mean())

    def at_speed(self, front: Sequence[Candidate], speedup: float) -> Candidate:
        """Of those that are fast enough, the one with the least error.

        Raises:
            TuneError: none is.
        """
        fast = [c for c in front if c.speedup >= speedup]
        if not fast:
            best = front[0]
            raise TuneError(
                "no cache of this model is as fast as that",
                where="speedup",
                expected=f"at most {best.speedup:.2f} with {self.subject.settings.steps} steps",
                got=f"{speedup:g}",
                hint="base='default', or another configuration that merges tokens, adds to it",
            )
        tried = sorted(fast, key=lambda c: c.error)[:TRIED]
        self.progress("draw what may be it", len(tried))
        errors = []
        for candidate in tried:
            errors.append(self.error(candidate.config))
            self.progress("", 1)
        return tried[errors.index(min(errors))]

    def at_quality(self, front: Sequence[Candidate], wanted: float) -> Candidate:
        """The fastest whose pictures have this PSNR in the mean, searched by halving the front.

        Raises:
            TuneError: none has.
        """
        low, high, best = 0, len(front), 0.0
        self.progress("draw what may be it", math.ceil(math.log2(len(front) + 1)))
        while low < high:  # the front falls in error: all from `high` on are good enough
            middle = (low + high) // 2
            reached = self.decibels(self.cases, front[middle].config)
            best = max(best, reached)
            low, high = (low, middle) if reached >= wanted else (middle + 1, high)
            self.progress("", 1)
        if high == len(front):
            raise TuneError(
                "no cache of this model keeps pictures as near as that",
                where="psnr",
                expected=f"at most {best:.1f} dB",
                got=f"{wanted:g}",
                hint="more steps of the generation leave more that need not compute",
            )
        return front[high]

    def decibels(self, cases: Sequence[Case], config: MethodConfig) -> float:
        """Mean PSNR of pictures beside the original's."""
        got, want = self.subject.draw(cases, config), self.subject.reference(cases)
        return fmean(score_pairs(got, want, ["psnr"])["psnr"])

    # -- the result -----------------------------------------------------------------------------

    def recipe(self, found: Candidate, target: Mapping[str, float], rounds: int) -> Recipe:
        """The recipe, measured on pictures of other seeds."""
        others = [dataclasses.replace(c, seed=c.seed + OTHER_SEEDS) for c in self.cases]
        (original, *_) = self.subject.denoisers.values()
        settings = self.subject.settings
        measured: dict[str, Any] = {
            "target": dict(target),
            "speedup_counted": round(found.speedup, 4),
            "psnr": round(self.decibels(self.cases, found.config), 2),
            "psnr_other_seeds": round(self.decibels(others, found.config), 2),
            "pictures": len(self.cases),
            "steps": settings.steps,
            "guidance": settings.guidance,
            "size": [settings.height, settings.width],
            "environment": environment(self.subject.device),
        }
        if rounds:
            batch = list(self.cases[: settings.batch])
            self.progress("time", rounds)
            times = time_generations(
                self.subject, batch, {"original": None, "recipe": found.config}, rounds
            )
            ratio = times["original"].median_s / times["recipe"].median_s
            measured["speedup_measured"] = round(ratio, 3)
        return Recipe(found.config, *architecture_of(original), measured)


def _speedup(programs: Specialization, steps: int) -> float:
    """By FLOPs of the programs that the schedule runs."""
    counts = Counter(kinds_of(programs, programs.schedule, Length(steps), steps))
    return steps * programs.flops / sum(n * programs.program(k).flops for k, n in counts.items())


def _front(found: Sequence[Candidate]) -> list[Candidate]:
    """Those of which no other is as fast and predicted to be better, the fastest first."""
    front: list[Candidate] = []
    for candidate in sorted(found, key=lambda c: (-c.speedup, c.error)):
        if not front or candidate.error < front[-1].error:
            front.append(candidate)
    return front

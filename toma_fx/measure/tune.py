"""`toma_fx.tune`: what makes least of a difference at a speed, for a model and prompts.

record generations in which every step computes     -> errors of updates for any mask
cache one step at a time                            -> what the pictures show of them
merge at one spot at a time                         -> what the pictures show of that
predict all masks beside all amounts of merging     -> error against speed
draw pictures with the few that may be it           -> the recipe, checked on other seeds
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from toma_fx.capture.architecture import architecture_of
from toma_fx.errors import ConfigError, TuneError
from toma_fx.measure.environment import environment
from toma_fx.measure.measurements import Measurements
from toma_fx.measure.prompts import read_cases
from toma_fx.measure.quality import Progress, describe_run
from toma_fx.measure.search import DRAWN, Candidate, Options, Search
from toma_fx.measure.subjects import Subject, subject_of
from toma_fx.measure.work import time_generations
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.cache import CacheScope
from toma_fx.methods.checks import check_choice, is_count, is_number
from toma_fx.methods.config import make_config, with_options
from toma_fx.methods.recipe import Recipe

Clock = Literal["flops", "time"]
SCOPES: tuple[CacheScope, ...] = ("deep", "shallow", "stack")
TRIED = 6
"""Candidates whose pictures are drawn before one is chosen."""
WORSE = 30.0
"""Predicted error over the least, from which a candidate is not worth a picture."""
ATTEMPTS = 4
"""Recipes that are timed before one is as fast as was asked."""
MOST_STEPS = 100
"""Of a generation; the search through masks takes a few minutes then, and grows fast."""
OTHER_SEEDS = 100_003
"""How far the seeds of the check lie from those of the search."""


def tune(
    model: Any,
    prompts: Any,
    *,
    speedup: float | None = None,
    psnr: float | None = None,
    clock: Clock = "flops",
    merging: Any = True,
    ratios: Sequence[float] = (0.25, 0.5),
    parts: int = 2,
    scopes: Sequence[CacheScope] = SCOPES,
    orders: Sequence[int] = (1, 2),
    fitted: bool = True,
    probes: int = 30,
    programs: int = 4,
    budget: int | None = None,
    out: str | Path | None = None,
    rounds: int = 3,
    seed: int = 0,
    seeds: int = 1,
    limit: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Recipe:
    """Find where tokens merge, which steps need not compute, and what they use instead.

    Args:
        model, prompts, seed, seeds, limit, settings: as for `toma_fx.quality`. A few pictures do.
        speedup: to reach, with the least error. psnr: in dB, to reach in the mean over the
            pictures, with the most speed. One of the two.
        clock: what `speedup` is of: the counted "flops" of the denoiser, or the measured "time" of
            a whole generation.
        merging: what `optimize(model, X)` takes: the method whose amounts are searched; False
            merges nothing. With `ratios=()` it merges always, as it says.
        ratios: that are tried for each level of the model in each part of the generation.
        parts: of a generation, as many as may merge differently.
        scopes, orders: that are tried, of `CacheConfig`.
        fitted: whether kept updates are combined as was measured (`CacheConfig.fitted`), instead of
            extrapolated in the timestep.
        probes: steps that are cached alone, to see what it does to the pictures; all of them, or
            so many spread over the generation.
        programs: that a recipe may need at most.
        budget: pictures that the search may draw; fewer steps are cached alone then.
        out: folder of what was measured. A search that broke off goes on there, and one for
            another target needs little more.
        rounds: generations that are timed of the result and the original; 0 for none.
        progress: is told what goes on.

    Returns:
        The recipe; `measured` has its figures on pictures of other seeds than it was found with.

    Raises:
        TuneError: the target can't be reached; says what can. The model has several denoisers.
        ConfigError: no target or two, or values out of their domain. NoCacheSites: nothing of the
            model can be cached, nor merged. ResultsError: `out` holds something else. As
            `toma_fx.quality`.
    """
    _check_target(speedup, psnr)
    options = Options(
        _mergeable(merging, tuple(ratios)),
        tuple(scopes),
        tuple(orders),
        fitted,
        tuple(ratios) if merging is not False else (),
        parts,
        probes,
        programs,
        budget,
    )
    _check_options(options, clock, rounds)
    cases = read_cases(prompts, seed=seed, seeds=seeds, limit=limit)
    subject = subject_of(model, settings)
    _check_subject(subject)
    # more parts than steps can't differ
    options = dataclasses.replace(options, parts=min(parts, subject.settings.steps))
    known = Measurements(None if out is None else Path(out), describe_run(subject, cases))
    search = Search(subject, cases, options, known, progress or (lambda what, count: None))
    target = _Target(search, clock, rounds)
    found = target.at_speed(speedup) if speedup else target.at_quality(psnr or 0.0)
    return target.recipe(found, {"speedup": speedup} if speedup else {"psnr": psnr or 0.0})


def _mergeable(merging: Any, ratios: tuple[float, ...]) -> MethodConfig:
    """The configuration whose amounts are searched, or that holds always.

    Raises:
        ConfigError: there is nothing to search about it.
    """
    config = make_config(merging)
    if merging is True:
        # steps that compute lie apart, so that old destinations would not fit; and fewer programs
        config = with_options(config, {"destinations_every": 1, "weights_every": 1})
    names = {field.name for field in dataclasses.fields(config)}
    if merging is not False and ratios and not ("ratio" in names and "ratio" in config.overridable):
        raise ConfigError(
            f"method {config.name!r} has no ratio to search",
            where="merging",
            expected="a method with one; or ratios=(), which keeps the method as it is",
            got=type(config).__name__,
        )
    if config.cache is not None or (ratios and merging is not False and config.phases):
        raise ConfigError(
            "tune finds the cache and the phases itself",
            where="merging",
            expected="a configuration without cache= and, unless ratios=(), without phases=",
            got=repr(merging)[:200],
        )
    return config


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


def _check_options(options: Options, clock: str, rounds: int) -> None:
    """Raise unless the options are in their domains.

    Raises:
        ConfigError: one is not.
    """
    check_choice("clock", clock, get_args(Clock))
    for scope in options.scopes:
        check_choice("scopes", scope, get_args(CacheScope))
    checks = {
        "orders": bool(options.orders) and set(options.orders) <= {0, 1, 2},
        "ratios": all(is_number(r) and 0 < r < 1 for r in options.ratios),
        "parts": is_count(options.parts, 1),
        "probes": is_count(options.probes, 1),
        "programs": is_count(options.programs, 1),
        "budget": options.budget is None or is_count(options.budget, 1),
        "rounds": is_count(rounds, 1 if clock == "time" else 0),
    }
    for name, valid in checks.items():
        if not valid:
            got = rounds if name == "rounds" else getattr(options, name)
            raise ConfigError(
                f"{name} is out of range",
                where=name,
                expected=_DOMAINS.get(name, "a whole number of at least 1"),
                got=repr(got),
            )


_DOMAINS = {
    "orders": "some of 0, 1 and 2",
    "ratios": "numbers between 0 and 1",
    "rounds": "a whole number; with clock='time' at least 1",
}


def _check_subject(subject: Subject) -> None:
    """Raise unless there is one denoiser, and masks are few enough to be looked through.

    Raises:
        TuneError: there are several, whose updates don't continue each other, or too many steps.
    """
    if subject.settings.steps > MOST_STEPS:
        raise TuneError(
            "the generation is too long to tune",
            where="steps",
            expected=f"at most {MOST_STEPS}",
            got=str(subject.settings.steps),
            hint="of so many steps most can be left out: tune fewer, or take cache='fast'",
        )
    if len(subject.denoisers) > 1:
        raise TuneError(
            "tune knows models with one denoiser",
            where=subject.name,
            expected="one denoiser",
            got=", ".join(subject.denoisers),
            hint="optimize them by a preset, and compare with toma_fx.quality",
        )


@dataclasses.dataclass
class _Target:
    """Finds the answer among the candidates of a search.

    Attributes:
        search: it. clock, rounds: as the arguments of `tune`. timed: measured speed-ups.
    """

    search: Search
    clock: Clock
    rounds: int
    timed: dict[MethodConfig, float] = dataclasses.field(default_factory=dict)

    def at_speed(self, wanted: float) -> Candidate:
        """Of those that are fast enough, the one with the least error.

        Raises:
            TuneError: none is.
        """
        candidates, counted, best = self.search.candidates(), wanted, 0.0
        for _ in range(ATTEMPTS if self.clock == "time" else 1):
            found = self._best(candidates, counted)
            if found is None:
                break
            if self.clock == "flops":
                return found
            reached = self.time(found.config)
            if reached >= wanted:
                return found
            best = max(best, reached)
            counted *= 1.01 * wanted / reached
        if self.clock == "flops":
            best = max(c.speedup for c in candidates)
        raise TuneError(
            "no recipe for this model is as fast as that",
            where="speedup",
            expected=f"at most about {best:.2f} with {self.search.steps} steps",
            got=f"{wanted:g}",
            hint="more orders=, scopes= or ratios=, or merging= with another method, may reach it",
        )

    def _best(self, candidates: Sequence[Candidate], speedup: float) -> Candidate | None:
        """The one whose pictures are nearest of those that may be it; None if none is fast."""
        tried: dict[str, Candidate] = {}
        least = math.inf
        for candidate in sorted(candidates, key=lambda c: c.error):
            if candidate.error > WORSE * least or len(tried) == TRIED:
                break
            # what is predicted may be a little off
            if candidate.speedup < 0.98 * speedup or candidate.kind in tried:
                continue
            exact, programs = self.search.counted(candidate.config)
            if exact >= speedup and programs <= self.search.options.programs:
                tried[candidate.kind] = dataclasses.replace(candidate, speedup=exact)
                least = min(least, candidate.error)
        if not tried:
            return None
        self.search.progress("draw what may be it", len(tried))
        return min(self._drawn(tried.values()), key=lambda pair: pair[0])[1]

    def _drawn(self, candidates: Any) -> Iterator[tuple[float, Candidate]]:
        """With the error of their pictures."""
        for candidate in candidates:
            yield self.search.error(candidate.config), candidate
            self.search.progress("", 1)

    def at_quality(self, wanted: float) -> Candidate:
        """The fastest whose pictures have this PSNR in the mean, searched by halving the front.

        Raises:
            TuneError: none has.
        """
        front = self._front()
        low, high, best = 0, len(front), 0.0
        self.search.progress("draw what may be it", math.ceil(math.log2(len(front) + 1)))
        while low < high:  # the front falls in error: all from `high` on are good enough
            middle = (low + high) // 2
            _, programs = self.search.counted(front[middle].config)
            if programs > self.search.options.programs:
                del front[middle]
                high -= 1
                continue
            reached = self.search.decibels(self.search.cases, front[middle].config)
            best = max(best, reached)
            low, high = (low, middle) if reached >= wanted else (middle + 1, high)
            self.search.progress("", 1)
        if high == len(front):
            raise TuneError(
                "no recipe for this model keeps pictures as near as that",
                where="psnr",
                expected=f"at most about {best:.1f} dB",
                got=f"{wanted:g}",
                hint="more steps of the generation leave more that need not compute",
            )
        speedup, _ = self.search.counted(front[high].config)
        return dataclasses.replace(front[high], speedup=speedup)

    def _front(self) -> list[Candidate]:
        """Those of which no other is as fast and predicted to be better, the fastest first."""
        front: list[Candidate] = []
        least = math.inf
        for candidate in sorted(self.search.candidates(), key=lambda c: (-c.speedup, c.error)):
            if candidate.error < least:
                least = candidate.error
                front.append(candidate)
        # it is halved, a drawing each time, so that it can't be long; the last is the nearest
        step = max(1, math.ceil(len(front) / 2 ** (DRAWN - 5)))
        return front[::-step][::-1]

    def time(self, config: MethodConfig) -> float:
        """Speed-up of whole generations, measured in turn."""
        if config not in self.timed:
            search = self.search
            batch = list(search.cases[: search.subject.settings.batch])
            search.progress("time", 2 * (self.rounds + 2))
            times = time_generations(
                search.subject,
                batch,
                {"original": None, "recipe": config},
                self.rounds,
                lambda name: search.progress("", 1),
            )
            self.timed[config] = times["original"].median_s / times["recipe"].median_s
        return self.timed[config]

    def recipe(self, found: Candidate, target: Mapping[str, float]) -> Recipe:
        """The recipe, measured on pictures of other seeds."""
        search, subject = self.search, self.search.subject
        others = [dataclasses.replace(c, seed=c.seed + OTHER_SEEDS) for c in search.cases]
        (original,) = subject.denoisers.values()
        settings = subject.settings
        search.progress("check on other seeds", 1)
        measured: dict[str, Any] = {
            "target": {**target, "clock": self.clock},
            "speedup_counted": round(found.speedup, 4),
            "psnr": round(search.decibels(search.cases, found.config), 2),
            "psnr_other_seeds": round(search.decibels(others, found.config), 2),
            "pictures": len(search.cases),
            "steps": settings.steps,
            "guidance": settings.guidance,
            "size": [settings.height, settings.width],
            "environment": environment(subject.device),
        }
        search.progress("", 1)
        if self.rounds:
            measured["speedup_measured"] = round(self.time(found.config), 3)
        return Recipe(found.config, *architecture_of(original), measured)

"""What the tuner knows of configurations before it draws them: predicted error, counted speed."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from toma_fx.calibration import Recorded
from toma_fx.capture.model import Captured
from toma_fx.errors import ConfigError, NoCacheSites, NoMergeSites
from toma_fx.measure.cases import Case
from toma_fx.measure.configs import config_json
from toma_fx.measure.masks import Mask, MaskErrors, UpdateErrors, weights_of
from toma_fx.measure.measurements import Measurements
from toma_fx.measure.merging import (
    Amounts,
    Spot,
    Trial,
    best_amounts,
    config_of,
    levels_of,
    saved_by_part,
)
from toma_fx.measure.quality import Progress
from toma_fx.measure.scores import score_pairs
from toma_fx.measure.subjects import Subject
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.cache import CacheConfig, CacheScope, Fitted
from toma_fx.methods.cached_steps import CachedSteps, Length
from toma_fx.methods.config import with_options
from toma_fx.run.programs import Specialization
from toma_fx.run.schedule import kinds_of

FEW = 5
"""Steps that are cached alone for scopes after the first, whose weights have nearly its shape."""
INTERVALS = range(2, 7)
"""Of plain interval caches, which stand beside the masks that are found."""
DRAWN = 14
"""Drawings of all cases that a search makes at most, beside the probes and the trials of merging:
the original's, those of the candidates, those that check the result."""
_log = logging.getLogger("toma_fx.measure")


@dataclass(frozen=True)
class Options:
    """What is searched; fields as the arguments of `toma_fx.tune`."""

    merging: MethodConfig
    scopes: tuple[CacheScope, ...]
    orders: tuple[int, ...]
    fitted: bool
    ratios: tuple[float, ...]
    parts: int
    probes: int
    programs: int
    budget: int | None


@dataclass(frozen=True)
class Candidate:
    """A configuration, with what is known of it.

    Attributes:
        config: it. speedup: by counted FLOPs of the denoiser. error: predicted squared error of
            pictures in [0, 1], mean over the cases. kind: what it has in common with others, of
            which the best by prediction is drawn.
    """

    config: MethodConfig
    speedup: float
    error: float
    kind: str


@dataclass(frozen=True)
class _Caching:
    """One scope: errors of masks, and what a cached step costs.

    Attributes:
        scope: it. updates, weights: what errors are predicted from. share: FLOPs of a cached step
            over those of the model.
    """

    scope: CacheScope
    updates: UpdateErrors
    weights: Mapping[int, float]
    share: float


class Search:
    """Draws pictures of the cases, and predicts those of all candidates.

    Attributes:
        subject, cases, options: what is drawn, and what is searched. progress: is told.
    """

    def __init__(
        self,
        subject: Subject,
        cases: Sequence[Case],
        options: Options,
        known: Measurements,
        progress: Progress,
    ) -> None:
        self.subject, self.cases, self.options = subject, cases, options
        self.progress, self._known = progress, known
        self._trials: dict[Spot, list[Trial]] = {}
        self._levels: dict[int, tuple[str, ...]] = {}
        self._captured: Captured | None = None

    @property
    def steps(self) -> int:
        """Of a generation."""
        return self.subject.settings.steps

    # -- measuring ------------------------------------------------------------------------------

    def error(self, config: MethodConfig) -> float:
        """Mean squared difference from the original's pictures, which are in [0, 1].

        Infinite where the pictures are not finite.
        """

        def draw() -> float:
            got = self.subject.draw(self.cases, config)
            self.subject.forget(config)  # there are many
            error = float((got - self.subject.reference(self.cases)).square().mean())
            return error if math.isfinite(error) else math.inf

        return self._known.get({"error": config_json(config)}, draw)

    def decibels(self, cases: Sequence[Case], config: MethodConfig) -> float:
        """Mean PSNR of pictures beside the original's."""

        def draw() -> float:
            got, want = self.subject.draw(cases, config), self.subject.reference(cases)
            return fmean(score_pairs(got, want, ["psnr"])["psnr"])

        of = {"psnr": config_json(config), "seeds": [case.seed for case in cases]}
        return self._known.get(of, draw)

    def counted(self, config: MethodConfig) -> tuple[float, int]:
        """(speed-up by FLOPs of the denoiser, programs that run)"""

        def count() -> tuple[float, int]:
            programs = self._programs(config)
            steps, length = self.steps, Length(self.steps)
            counts = Counter(kinds_of(programs, programs.schedule, length, steps))
            spent = sum(n * programs.program(kind).flops for kind, n in counts.items())
            return steps * programs.flops / spent, len(counts)

        speedup, programs = self._known.get({"counted": config_json(config)}, count)
        return speedup, programs

    def _programs(self, config: MethodConfig) -> Specialization:
        """What the denoiser runs; for a graph that is captured already nothing is drawn."""
        if self._captured is None:
            (denoiser, *_) = self.subject.optimized(config).values()
            self.subject.draw(self.cases[: self.subject.settings.batch], config)
            self._captured = denoiser.specializations[-1].captured
        return Specialization.of(self._captured, config)

    # -- predicting -----------------------------------------------------------------------------

    def candidates(self) -> list[Candidate]:
        """Everything that may be the answer.

        Raises:
            NoCacheSites, NoMergeSites: nothing of the model can be cached, nor merged.
            ConfigError: the budget is too small.
        """
        records, refused = self._records()
        merges = self._try_merging(refused if not records else None)
        first, more = self._shares_of_budget(len(records), merges)
        if merges:
            self._try_spots()
        caching: list[_Caching] = []
        for scope, updates in records.items():
            like = caching[0].weights if caching else None
            caching.append(self._weigh(scope, updates, more if caching else first, like))
        return list(self._combined(caching))

    def _records(self) -> tuple[dict[CacheScope, UpdateErrors], NoCacheSites | None]:
        """Updates by scope, of those that the model has."""
        found: dict[CacheScope, UpdateErrors] = {}
        refused = None
        for scope in self.options.scopes:
            try:
                found[scope] = self._record(scope)
            except NoCacheSites as error:
                _log.info("scope %r is left out: %s", scope, error)
                refused = error
        return found, refused

    def _record(self, scope: CacheScope) -> UpdateErrors:
        """Updates of all steps, of every batch of the cases."""
        every = self._config((1,) * self.steps, scope, self.order)
        (denoiser, *_) = self.subject.optimized(every).values()  # others share its graphs

        def record() -> dict[str, Any]:
            recorded, size = [], self.subject.settings.batch
            self.progress(f"{scope}: record", math.ceil(len(self.cases) / size))
            for start in range(0, len(self.cases), size):
                recorded.append(Recorded())
                with recorded[-1].recording(denoiser):
                    self.subject.draw(self.cases[start : start + size], every)
                self.progress("", 1)
            self._captured = denoiser.specializations[-1].captured
            return UpdateErrors.of(recorded).to_dict()

        return UpdateErrors.of_json(self._known.get({"updates": config_json(every)}, record))

    def _try_merging(self, refused: NoCacheSites | None) -> bool:
        """Whether merging is searched; finds the levels of the model.

        Raises:
            NoMergeSites: it can't merge, nor cache (`refused`).
        """
        if not self.options.ratios:
            return False
        config = with_options(self.options.merging, {"ratio": self.options.ratios[0]})

        def find() -> list[tuple[int, tuple[str, ...]]]:
            return list(levels_of(self._programs(config).plan).items())

        try:
            found = self._known.get({"levels": config_json(config)}, find)
            self._levels = {tokens: tuple(patterns) for tokens, patterns in found}
        except NoMergeSites as error:
            if refused is not None:
                raise refused from error
            _log.info("merging is left out: %s", error)
        return bool(self._levels)

    def _shares_of_budget(self, scopes: int, merges: bool) -> tuple[int, int]:
        """Steps that are cached alone: for the first scope, and for each further one.

        Raises:
            ConfigError: the budget does not go so far.
        """
        options, most = self.options, max(1, self.steps - 1)
        if not scopes:
            return 0, 0
        first, more = min(options.probes, most), min(options.probes, FEW, most)
        if options.budget is None:
            return first, more
        spots = len(self._levels) * options.parts if merges else 0
        fixed = DRAWN + scopes + spots * len(options.ratios)
        left = options.budget // len(self.cases) - fixed - more * (scopes - 1)
        least = min(FEW, most)
        if left < least:
            needed = (fixed + more * (scopes - 1) + least) * len(self.cases)
            raise ConfigError(
                "the budget is too small for this search",
                where="budget",
                expected=f"at least {needed} pictures",
                got=str(options.budget),
                hint="fewer prompts, scopes= or ratios= need fewer pictures",
            )
        return min(first, left), more

    def _weigh(
        self,
        scope: CacheScope,
        updates: UpdateErrors,
        probes: int,
        like: Mapping[int, float] | None,
    ) -> _Caching:
        """Cache one step at a time, to see what a picture shows of it."""
        steps, order = self.steps, self.order
        chosen = sorted({
            1 + round(i * (steps - 2) / max(1, probes - 1)) for i in range(probes)
        })  # fmt: skip
        self.progress(f"{scope}: one step at a time", len(chosen))
        probed = {}
        for step in chosen:
            mask = tuple(int(i != step) for i in range(steps))
            probed[step] = self.error(self._config(mask, scope, order))
            self.progress("", 1)
        speedup, _ = self.counted(self._config(mask, scope, order))
        share = steps / speedup - (steps - 1) * (1 - self._always_saved())
        weights = weights_of(updates, order, probed, like)
        return _Caching(scope, updates, weights, share)

    def _try_spots(self) -> None:
        """Let one spot merge at a time."""
        options = self.options
        spots = [(tokens, part) for tokens in self._levels for part in range(options.parts)]
        steps = Counter(self._part(step, options.parts) for step in range(self.steps))
        self.progress("merge at one spot at a time", len(spots) * len(options.ratios))
        for spot in spots:
            self._trials[spot] = []
            for ratio in options.ratios:
                config = self._merging(((spot, ratio),))
                speedup, _ = self.counted(config)
                saved = (1 - 1 / speedup) * self.steps / steps[spot[1]]
                self._trials[spot].append(Trial(ratio, self.error(config), saved))
                self.progress("", 1)

    # -- combining ------------------------------------------------------------------------------

    def _combined(self, caching: Sequence[_Caching]) -> Iterator[Candidate]:
        """Every mask of every scope beside every amount of merging."""
        everything, always = (1,) * self.steps, self._always_saved()
        masks = {own.scope: list(self._masks(own)) for own in caching}
        for amounts, error in best_amounts(self._trials):
            own_saved = saved_by_part(amounts, self._trials, self.options.parts)
            saved = tuple(share + always for share in own_saved)
            base = self._merging(amounts)
            kind = "merging, " if amounts else ""
            if any(saved):
                yield Candidate(base, self._speedup(everything, 1.0, saved), error, "merging")
            for own in caching:
                for found, order, predicted, mask, fitted in masks[own.scope]:
                    cache = CacheConfig(
                        scope=own.scope, order=order, steps_mask=mask, fitted=fitted
                    )
                    yield Candidate(
                        dataclasses.replace(base, cache=cache),
                        self._speedup(mask, own.share, saved),
                        error + predicted,
                        f"{kind}{found}",
                    )

    def _masks(self, own: _Caching) -> Iterator[tuple[str, int, float, Mask, Fitted]]:
        """(kind, order, predicted error, mask, weights) of the best masks, and of intervals."""
        guide = MaskErrors(own.updates, self.order, own.weights)
        orders = self.options.orders if self.options.fitted else ()
        fits = [dataclasses.replace(guide, order=order) for order in orders]
        masks = [("", mask) for mask in guide.best().values() if not all(mask)]
        for every in INTERVALS:
            flags = CachedSteps(every, warmup_steps=min(3, self.steps), warmup_interval=2)
            mask = tuple(map(int, flags.flags(self.steps)))
            if sum(mask) > self.order and not all(mask):
                masks.append(("interval, ", mask))
        for kind, mask in masks:
            yield f"{kind}extrapolated", self.order, guide.predict(mask), mask, ()
            for errors in fits:
                if sum(mask) > errors.order:
                    table, error = errors.fit(mask)
                    yield f"{kind}fitted {errors.order}", errors.order, error, mask, table

    @property
    def order(self) -> int:
        """Of what is extrapolated. A second order is never better, fitted ones apart."""
        return 1 if 1 in self.options.orders else min(self.options.orders)

    def _always_saved(self) -> float:
        """Share of the FLOPs of a step that merging saves which is not searched."""
        options = self.options
        if options.ratios or not options.merging.merges:
            return 0.0
        return 1 - 1 / self.counted(options.merging)[0]

    def _speedup(self, mask: Mask, share: float, saved: Sequence[float]) -> float:
        """Predicted, by FLOPs: of the mask, cached steps and merging in each part."""
        spent = 0.0
        for step, computes in enumerate(mask):
            spent += 1 - saved[self._part(step, len(saved))] if computes else share
        return len(mask) / spent

    def _part(self, step: int, parts: int) -> int:
        """The part of the generation that a step is in."""
        return sum(step >= math.ceil(p / parts * self.steps) for p in range(1, parts))

    def _merging(self, amounts: Amounts) -> MethodConfig:
        """What merges so much at each spot; as the options say where nothing is searched."""
        if not self.options.ratios:
            return self.options.merging
        return config_of(self.options.merging, amounts, self._levels, self.options.parts)

    def _config(self, mask: Mask, scope: CacheScope, order: int) -> MethodConfig:
        """A cache beside what merges always."""
        cache = CacheConfig(scope=scope, order=order, steps_mask=mask)
        return dataclasses.replace(self._merging(()), cache=cache)

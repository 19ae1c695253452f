"""What users write: which block updates are kept over steps, and which steps use them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, Literal, get_args

from toma_fx.errors import ConfigError, UnknownNameError, nearest
from toma_fx.methods.cached_steps import POLICIES, SHARES, CachedSteps, is_step_count
from toma_fx.methods.checks import (
    check_choice,
    check_fields,
    freeze_sequences,
    is_count,
    is_number,
)
from toma_fx.methods.paths import ByPath, Overrides

CacheScope = Literal["auto", "stack", "block", "deep", "shallow"]
"""What one kept tensor stands for: all blocks of a residual stream, one block, or all of a UNet
below its finest level, or below its last layers; "auto" is "deep" for a UNet, "stack" for others.
"""
ORDERS = (0, 1, 2)
MOST_STEPS = 1_000_000
"""Steps of a generation; there is a flag for each."""
Fitted = tuple[tuple[float, tuple[float, ...]], ...]
"""((timestep, weights of the kept updates, the newest first), ...)"""


@dataclass(frozen=True, kw_only=True)
class CacheConfig(ByPath):
    """Which steps compute, and what the others use instead: updates that those kept.

    Given as `toma_fx.optimize(model, cache=CacheConfig(...))`; `cache=3` means `every=3`. A cached
    step replaces a stretch x_b = f(x_a) by x_b = x_a + u, where u = x_b - x_a of the steps that
    computed last, held or extrapolated.

    Attributes:
        every: of so many steps in a row, one computes.
        steps_mask: instead of `every`, 1 for each step that computes and 0 for each that does not;
            or a named mask: "lossless", "balanced", "fast", chosen by the error of pictures
            (docs/caching.md), or those that cache-dit publishes, "scm-slow",
            "scm-medium", "scm-fast", "scm-ultra".
        warmup_steps: steps at the begin that compute: a number, or as a float below 1 a share of
            all steps.
        warmup_interval: of the warm-up, one step in so many computes.
        last_steps: steps that compute at the end, as `warmup_steps`.
        order: 0 holds the update; 1 and 2 extrapolate it in the timestep through the last two or
            three that were computed (TaylorSeer, arXiv 2503.06923, in divided differences).
        scope: what one kept tensor stands for: "stack", all consecutive blocks of a residual
            stream; "block", each; "deep", all of a UNet that is not at its finest level (DeepCache,
            arXiv 2312.00858), kept as a value; "shallow", all but what the last skip connection
            leads around (DeepCache's branch 0); "auto", "deep" where a model has such a part and no
            paths are given, else "stack".
        include: module path patterns (shell wildcards) of what may be cached; empty for all.
        exclude: module path patterns of what always computes.
        overrides: {module path pattern: {field: value}} for `order` and `scope`; of several
            patterns that match, the later wins.
        max_continuous_cached_steps: cached steps that may follow each other; None: any number.
        steps: of a generation, where nothing tells how many there are.
        threshold: of the steps that need not compute, those do for which the updates would have
            changed by more than this share, going on as between the two steps that computed last.
            The host waits for one number after a step that computed. Not for artifacts and
            `step(inputs, state)`; `toma_fx.calibrate_cache` turns a threshold into a mask for them.
        fitted: instead of the extrapolation in the timestep, measured weights of the kept updates:
            ((timestep, (newest, next, ...)), ...), one entry for each step of `steps_mask` that
            does not compute, with order + 1 weights. A cached step uses the entry with the nearest
            timestep. `toma_fx.tune` fits them.

    Raises:
        ConfigError: a value outside its domain, or fields that contradict each other.
        UnknownNameError: an unknown choice or field.
    """

    every: int = 2
    steps_mask: tuple[int, ...] | str | None = None
    warmup_steps: int | float = 1
    warmup_interval: int = 1
    last_steps: int | float = 0
    order: int = 1
    scope: CacheScope = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: Overrides = ()
    max_continuous_cached_steps: int | None = None
    steps: int | None = None
    threshold: float | None = None
    fitted: Fitted = ()

    overridable: ClassVar[tuple[str, ...]] = ("order", "scope")
    prefix: ClassVar[str] = "cache."

    def __post_init__(self) -> None:
        freeze_sequences(self, "include", "exclude")
        if isinstance(self.steps_mask, tuple):
            flags = tuple(int(x) if isinstance(x, Integral) else x for x in self.steps_mask)
            object.__setattr__(self, "steps_mask", flags)
        check_fields(self, self._check, self.prefix)
        object.__setattr__(self, "overrides", self._freeze_overrides())
        self._freeze_fitted()
        self._check_order()
        if self.steps is not None:
            self.cached_steps.flags()  # what does not fit the number of steps is refused now

    @classmethod
    def of(cls, value: Any) -> CacheConfig | None:
        """What `cache=` means: a configuration, a number for `every`, a name in `CACHES`, a mapping
        of fields, True for the defaults, None or False for no caching.

        Raises:
            ConfigError, UnknownNameError: something else, or a field out of its domain.
        """
        if value is None or value is False:
            return None
        if isinstance(value, cls):
            return value
        if value is True:
            return cls()
        if isinstance(value, str):
            if value not in CACHES:
                raise UnknownNameError(
                    f"unknown cache {value!r}", where="cache", hint=nearest(value, CACHES)
                )
            return CACHES[value]
        if isinstance(value, Mapping):
            known = [field.name for field in dataclasses.fields(cls)]
            for name in value:
                if name not in known:
                    raise UnknownNameError(
                        f"unknown option {name!r}", where="cache", hint=nearest(name, known)
                    )
            return cls(**value)
        if is_number(value):
            return cls(every=value)
        raise ConfigError(
            "cache= is not a configuration",
            where="cache",
            expected="a CacheConfig, a number of steps, a name of CACHES, a mapping of fields, or "
            "None",
            got=type(value).__name__,
        )

    @property
    def cached_steps(self) -> CachedSteps:
        """Which steps compute."""
        mask, policy, share = None, None, None
        if isinstance(self.steps_mask, str):
            share = SHARES.get(self.steps_mask)
            policy = None if share is not None else self.steps_mask
        elif self.steps_mask is not None:
            mask = tuple(int(flag) for flag in self.steps_mask)
        return CachedSteps(
            every=self.every,
            mask=mask,
            policy=policy,
            share=share,
            warmup_steps=self.warmup_steps,
            last_steps=self.last_steps,
            warmup_interval=self.warmup_interval,
            most=self.max_continuous_cached_steps,
            steps=self.steps,
            threshold=self.threshold,
        )

    @property
    def most_order(self) -> int:
        """The highest order of any place."""
        orders = [int(dict(values).get("order", 0)) for _, values in self._overrides()]
        return max(self.order, *orders, 0)

    # -- checking -------------------------------------------------------------------------------

    def _check(self) -> None:
        for name in ("every", "warmup_interval"):
            self.require(is_count(getattr(self, name)), name, "a whole number of at least 1")
        check_choice("scope", self.scope, get_args(CacheScope))
        self.require(self.order in ORDERS and is_count(self.order, 0), "order", "0, 1 or 2")
        for name in ("max_continuous_cached_steps", "steps"):
            value = getattr(self, name)
            valid = value is None or (is_count(value) and value <= MOST_STEPS)
            self.require(valid, name, f"a whole number from 1 to {MOST_STEPS}, or None")
        positive = is_number(self.threshold) and (self.threshold or 0) > 0
        self.require(self.threshold is None or positive, "threshold", "a number over 0, or None")
        for name in ("warmup_steps", "last_steps"):
            expected = "a whole number of steps, or a share of them in [0, 1)"
            self.require(is_step_count(getattr(self, name)), name, expected)
        if self.scope in ("deep", "shallow") and (self.include or self.exclude or self.overrides):
            raise ConfigError(
                f"scope={self.scope!r} cuts the model once, whatever its modules are called",
                where="cache.scope",
                expected="scope='stack' or 'block' beside include=, exclude= or overrides=",
                got=f"scope={self.scope!r}",
            )
        if isinstance(self.steps_mask, str):
            check_choice("steps_mask", self.steps_mask, (*SHARES, *POLICIES))
        elif self.steps_mask is not None:
            flags = self.steps_mask
            valid = isinstance(flags, tuple) and bool(flags) and set(flags) <= {0, 1}
            self.require(valid, "steps_mask", "a 1 or 0 for each step, or the name of a mask")

    def _freeze_fitted(self) -> None:
        """Make `fitted` nested tuples of floats, by falling timesteps."""
        form = f"((timestep, {self.most_order + 1} weights), ...), as many as the order and 1"
        self.require(isinstance(self.fitted, (tuple, list)), "fitted", form)
        entries = []
        for entry in self.fitted:
            valid = isinstance(entry, (tuple, list)) and len(entry) == 2
            self.require(valid and _is_finite(entry[0]), "fitted", form)
            valid = isinstance(entry[1], (tuple, list)) and len(entry[1]) == self.most_order + 1
            self.require(valid and all(map(_is_finite, entry[1])), "fitted", form)
            entries.append((float(entry[0]), tuple(map(float, entry[1]))))
        entries.sort(reverse=True)
        object.__setattr__(self, "fitted", tuple(entries))
        flags = self.steps_mask
        if entries and not (isinstance(flags, tuple) and flags.count(0) == len(entries)):
            raise ConfigError(
                "fitted weights are those of one mask",
                where="cache.fitted",
                expected="steps_mask= with as many zeros as there are entries",
                got=f"{len(entries)} entries, steps_mask={flags}",
            )
        if entries and (self.threshold is not None or self.overrides):
            raise ConfigError(
                "fitted weights are those of one mask and one order",
                where="cache.fitted",
                expected="neither threshold= nor overrides= beside fitted=",
                got=f"threshold={self.threshold}, overrides={self.overrides}",
            )

    def _check_order(self) -> None:
        """Raise unless enough steps compute for the order to be reached."""
        needed, flags = self.most_order + 1, self.steps_mask
        if not isinstance(flags, tuple) or sum(flags) >= needed or 0 not in flags:
            return
        raise ConfigError(
            "the order needs more steps that compute",
            where="cache.steps_mask",
            expected=f"at least {needed} steps that compute: order + 1",
            got=f"{sum(flags)}",
            hint="order=0 holds what one step computed",
        )


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


CACHES: dict[str, CacheConfig] = {
    "interval": CacheConfig(every=3, order=0),
    "deepcache": CacheConfig(every=3, order=0, scope="deep"),
    **{name: CacheConfig(steps_mask=name) for name in (*SHARES, *POLICIES)},
}
"""Named configurations: a fixed interval that holds every update (as most caches do), DeepCache
with its interval, and the named masks, extrapolated linearly."""

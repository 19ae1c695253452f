"""What users write: the options of a merging method, and how they become a setting.

    MethodConfig --setting(place)--> Setting     options and a token grid become tensor functions

docs/methods.md shows how to write a method.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Self, get_args

from toma_fx.errors import ConfigError, DynamicError, TileError
from toma_fx.methods.cache import CacheConfig
from toma_fx.methods.cached_steps import CachedSteps
from toma_fx.methods.checks import (
    check_choice,
    check_fields,
    freeze_sequences,
    is_count,
    is_number,
    is_size,
)
from toma_fx.methods.paths import ByPath, Overrides
from toma_fx.methods.phases import Phases, freeze_phases, split_amount
from toma_fx.methods.setting import Place, Setting

Scope = Literal["sublayer", "block", "stack", "keys"]
"""Residual adds that a merged segment spans: one, those of a block, or those of the whole stack;
"keys" spans none: keys and values of self-attention merge, queries and all else do not."""
Share = Literal["stream", "block", "branch"]
"""Branches that have one pattern: all of a residual stream, those of a block, or one."""
BRANCHES = ("attention", "cross", "mlp")
"""Kinds of branches of a residual stream."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig(ByPath, ABC):
    """Options that every merging method has. Each may be given to `toma_fx.optimize` by name.

    Attributes:
        scope: residual adds a merged segment spans: one "sublayer", one "block", the whole "stack".
            "keys" merges keys and values of self-attention alone, and unmerges nothing.
        share: branches that have one pattern: all of a residual "stream", those of a "block", or
            each its own ("branch").
        branches: what to merge: "attention" (self and joint), "cross" (cross-attention), "mlp". Not
            used with scope "keys".
        proportional: whether attention weighs a merged key by the number of tokens it stands for
            (proportional attention of ToMe, arXiv 2210.09461): its logarithm is added to the
            scores.
        destinations_every: steps between selections of destinations.
        select_at: steps (from 0, the first that merges) that select destinations, instead of
            `destinations_every`; the first merged step always does.
        first_step: first step (from 0) that merges.
        last_step: last step that merges; None for the last of the generation.
        min_tokens: image tokens below which a stream is left alone.
        include: module path patterns (shell wildcards) to consider; empty for all.
        exclude: module path patterns to leave alone.
        overrides: {module path pattern: {field: value}} for the fields in `overridable`; of several
            patterns that match, the later wins.
        grid: token grid (H, W) or (T, H, W) of a packed input, where neither position ids nor sizes
            among the arguments tell it.
        phases: (begin, {field: value}) of later parts of a generation: from there on, these fields
            replace the ones above. A begin is a step, or as a float below 1 a share of all steps.
            `ratio=((0, 0.5), (0.6, 0.25))` is short for `ratio=0.5, phases=((0.6, {"ratio":
            0.25}),)`. Steps between selections count from the begin of a phase.
        cache: which steps compute the blocks, and what the others use instead: a `CacheConfig`, a
            number n for one step in n, a name in `toma_fx.CACHES`; None: every step computes. It
            works without merging, too.

    Class attributes:
        name: of the method in reports, plans and messages; methods of this package are also asked
            for by it.
        overridable: fields that `overrides` may set.
        patterned: whether there is a pattern; if not, nothing is ever selected.
        scheduling: fields that say when which program runs, and change none.
        uses: kinds of programs (`toma_fx.passes.uses.Use`) that `renewal` names beside the
            package's own.

    Raises:
        ConfigError: a value outside its domain. UnknownNameError: an unknown choice or field.
    """

    scope: Scope = "sublayer"
    share: Share = "block"
    branches: tuple[str, ...] = ("attention",)
    proportional: bool = False
    destinations_every: int = 1
    select_at: tuple[int, ...] | None = None
    first_step: int = 0
    last_step: int | None = None
    min_tokens: int = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: Overrides = ()
    grid: tuple[int, ...] | None = None
    phases: Phases = ()
    cache: CacheConfig | int | str | Mapping[str, Any] | None = None

    name: ClassVar[str] = ""
    overridable: ClassVar[tuple[str, ...]] = ("min_tokens",)
    patterned: ClassVar[bool] = True
    scheduling: ClassVar[frozenset[str]] = frozenset(
        {"destinations_every", "select_at", "first_step", "last_step"}
    )
    uses: ClassVar[tuple[Any, ...]] = ()

    def __post_init__(self) -> None:
        split_amount(self, "ratio")
        freeze_sequences(self, "branches", "include", "exclude")
        object.__setattr__(self, "cache", CacheConfig.of(self.cache))
        check_fields(self, self.check)
        object.__setattr__(self, "overrides", self._freeze_overrides())
        object.__setattr__(self, "phases", freeze_phases(self, self.phases))

    def check(self) -> None:
        """Check every field; a method with fields of its own extends it.

        Annotations are checked, too: that a field is an int need not be said here.

        Raises:
            ConfigError: a value outside its domain.
        """
        self.check_choice("scope", get_args(Scope))
        self.check_choice("share", get_args(Share))
        for branch in self.branches:
            check_choice("branches", branch, BRANCHES)
        self.require(bool(self.branches), "branches", f"some of {BRANCHES}")
        self.require(isinstance(self.proportional, bool), "proportional", "True or False")
        self.check_count("destinations_every", "min_tokens")
        self.check_count("first_step", least=0)
        if self.last_step is not None:
            self.check_count("last_step", least=0)
            first = f"at least first_step ({self.first_step})"
            self.require(self.last_step >= self.first_step, "last_step", first)
        steps = self.select_at
        if steps is not None:
            valid = isinstance(steps, tuple) and all(is_count(step, 0) for step in steps)
            self.require(valid, "select_at", "whole numbers of at least 0")
        self.require(
            self.grid is None or is_size(self.grid),
            "grid",
            "(height, width) or (frames, height, width), whole numbers of at least 1",
            TileError,
        )

    @abstractmethod
    def setting(self, place: Place) -> Setting | str:
        """The method at a place, or the reason why it leaves the place alone."""

    @property
    def is_off(self) -> bool:
        """Whether these fields, without their overrides, merge nothing anywhere."""
        return False

    @property
    def static_form(self) -> str:
        """How to get a form of the method whose shapes are static; "" if this one's are."""
        return ""

    def check_static(self, purpose: str) -> None:
        """Raise unless the method's shapes are static, as `purpose` needs.

        Raises:
            DynamicError: the number of merged tokens depends on the data; names the static form.
        """
        hint = next(filter(None, (stage.static_form for stage in self.stages)), "")
        if hint:
            raise DynamicError(
                f"method {self.name!r} can't be used here in its dynamic form",
                where=purpose,
                expected="static shapes",
                got="a number of merged tokens that depends on the data",
                hint=hint,
            )

    def check_fixed_steps(self, purpose: str) -> None:
        """Raise unless it is known beforehand which steps compute, as `purpose` needs.

        Raises:
            DynamicError: it depends on the data; names the static form.
        """
        if self.caching is not None and self.caching.threshold is not None:
            raise DynamicError(
                "steps that compute by what is read from the GPU can't be used here",
                where=purpose,
                expected="a cache without threshold=",
                got=f"threshold={self.caching.threshold}",
                hint="cache=toma_fx.calibrate_cache(pipe, calls, threshold=...) gives a mask",
            )

    def renewal(self, since: int) -> str:
        """The kind of program that is due `since` steps after the first that merges."""
        if not self.patterned:
            return "reuse"
        if self.select_at is not None:
            return "refresh" if since in self.select_at else "reuse"
        return "refresh" if since % self.destinations_every == 0 else "reuse"

    # -- what holds where -----------------------------------------------------------------------

    @cached_property
    def stages(self) -> tuple[Self, ...]:
        """What holds in each phase of a generation, the first included."""
        first = self._with({"overrides": self.overrides}) if self.phases else self
        return (first, *(dataclasses.replace(first, **dict(fields)) for _, fields in self.phases))

    def merges_attention(self, path: str) -> bool:
        """Whether attention at the module `path` may merge, in any phase."""
        return any(
            not {"attention", "cross"}.isdisjoint(stage.branches)
            and stage.admits(path)
            and not stage.at(path).is_off
            for stage in self.stages
        )

    @property
    def merges(self) -> bool:
        """Whether anything may merge, overrides and phases included."""
        return any(
            not variant.is_off
            for stage in self.stages
            for variant in (stage, *(stage._with(dict(v)) for _, v in stage._overrides()))
        )

    @cached_property
    def caching(self) -> CachedSteps | None:
        """Which steps compute; None: all."""
        cache = CacheConfig.of(self.cache)
        return None if cache is None else cache.cached_steps

    @property
    def changes_outputs(self) -> bool:
        """Whether the model computes something else with it: it merges, or keeps updates."""
        return self.merges or self.caching is not None

    def to_dict(self) -> dict[str, Any]:
        """The method and its fields as JSON-able values."""
        out = super().to_dict()
        cache = CacheConfig.of(self.cache)
        out["cache"] = None if cache is None else cache.to_dict()
        out["phases"] = [[begin, dict(fields)] for begin, fields in self.phases]
        return {"method": self.name, **out}

    def _with(self, fields: Mapping[str, Any]) -> Self:
        copy = super()._with({"phases": (), **fields})
        if copy.phases:
            raise ConfigError(
                "an amount that changes over the steps can't be overridden per path",
                where="overrides",
                expected="one value for each path",
                got=f"phases {copy.phases}",
                hint='phases=((0.5, {"overrides": {...}}),) changes it for all paths it names',
            )
        return copy

    # -- checking -------------------------------------------------------------------------------

    def check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        """Check that a field is one of `choices`."""
        check_choice(name, getattr(self, name), choices)

    def check_count(self, *names: str, least: int = 1) -> None:
        """Check that fields are whole numbers of at least `least`."""
        for name in names:
            valid = is_count(getattr(self, name), least)
            self.require(valid, name, f"a whole number of at least {least}")

    def check_ratio(self, name: str = "ratio") -> None:
        """Check a share of tokens."""
        value = getattr(self, name)
        valid = is_number(value) and 0 <= value < 1
        self.require(valid, name, "a number in [0, 1), the share of tokens merged away")

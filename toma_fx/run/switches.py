"""Other configurations for a denoiser, without losing what was made for those before.

Every configuration is planned and compiled once and kept, as long as its graphs live; the graph
that was captured of a call serves them all.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from toma_fx.capture.architecture import architecture_of
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.checks import is_number
from toma_fx.methods.config import make_config, with_options, without_merging
from toma_fx.methods.planning import plan_key
from toma_fx.methods.recipe import Recipe
from toma_fx.run.batching import State
from toma_fx.run.compiled import Compilation
from toma_fx.run.schedule import Schedule
from toma_fx.run.scopes import Scopes

_log = logging.getLogger("toma_fx.run")
VARIANTS = 64
"""Configurations that are known by number; of more, the one made first is forgotten."""
_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class Variant:
    """A configuration that a denoiser runs with.

    Attributes:
        number: no other one has it. config: what merges. schedule: which kind is due when.
        plan: what programs depend on.
    """

    number: int
    config: MethodConfig
    schedule: Schedule
    plan: Hashable


class Switches:
    """Configurations that change between calls; for subclasses that look at `variant`."""

    denoiser: nn.Module
    _compile: Compilation | None
    _own: MethodConfig
    _standing: Variant
    _variants: dict[int, Variant]
    _entered: Scopes[Variant | None]

    def _set_up(self, config: MethodConfig) -> None:
        own = self.__dict__
        own["_own"], own["_variants"] = config, {}
        own["_variants_lock"] = threading.Lock()
        own["_entered"] = Scopes[Variant | None](None)
        own["_standing"] = self._variant_of(config)

    @property
    def variant(self) -> Variant:
        """The configuration that holds here."""
        return self._entered.current() or self._standing

    @property
    def config_toma(self) -> MethodConfig:
        """The configuration that holds here."""
        return self.variant.config

    def _schedule(self, state: State) -> Schedule:
        return self.variant.schedule

    def using(
        self,
        toma: bool | float | str | MethodConfig | Recipe | Mapping[str, Any] = True,
        *,
        method: str | MethodConfig | type[MethodConfig] | None = None,
        **options: Any,
    ) -> AbstractContextManager[Any]:
        """Calls inside run with another configuration; those of other threads do not.

            with pipe.unet.using(ratio=0.3):
                image = pipe(prompt).images[0]

        A generation that is under way selects anew at its next call.

        Args:
            toma: True for the configuration that `optimize` was given, a ratio, or as `optimize`
                takes it: a preset, a configuration, a mapping of fields, a recipe, False.
            method: as `optimize` takes it. options: fields of the configuration to replace.

        Raises:
            ConfigError, RecipeError: as `optimize`.
            DynamicError: the number of merged tokens depends on the data, and programs are
                compiled.
        """
        return self._entered.enter(self._variant_of(self._config(toma, method, options)))

    def disable_merging(self) -> None:
        """Merge nothing in calls to come, in all threads; steps that are cached still are.

        Graphs and compiled programs are kept for `enable_merging`. `using(...)` goes before it.
        """
        self.__dict__["_standing"] = self._variant_of(without_merging(self._own))

    def enable_merging(self) -> None:
        """Merge again, as `optimize` was told."""
        if not self._own.merges:
            _log.warning("there is no merging to enable: toma_fx.optimize was told of none")
        self.__dict__["_standing"] = self._variant_of(self._own)

    @property
    def is_merging_enabled(self) -> bool:
        """Whether calls that are made here merge tokens."""
        return self.config_toma.merges

    def _config(self, toma: Any, method: Any, options: Mapping[str, Any]) -> MethodConfig:
        if isinstance(toma, Recipe):
            toma.check_model(*architecture_of(self.denoiser))
            toma = toma.config
        if toma is True and method is None:
            toma = self._own
        elif is_number(toma):
            toma, options = self._own, {"ratio": toma, **options}
        if isinstance(toma, MethodConfig) and method is None:
            config = with_options(toma, options)
        else:
            config = make_config(toma, method, options)
        if self._compile is not None:
            config.check_static("compile")
        return config

    def _variant_of(self, config: MethodConfig) -> Variant:
        """That of a configuration: the same one as before, if it was asked for already."""
        variants = self._variants
        with self.__dict__["_variants_lock"]:
            for known in variants.values():
                if type(known.config) is type(config) and known.config == config:
                    return known
            variant = Variant(next(_numbers), config, Schedule.of(config), plan_key(config))
            variants[variant.number] = variant
            if len(variants) > VARIANTS:
                del variants[next(iter(variants))]
        return variant

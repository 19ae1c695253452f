"""What is made for the calls of a denoiser: captured once, planned for each configuration.

call -> key -> known? under another configuration? -> capture | plan anew | as it is
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any, Self

from toma_fx.capture.grids import Raster
from toma_fx.capture.guard import ModelGuard
from toma_fx.compat.compilers import compile_lock
from toma_fx.errors import AdapterError, CaptureError, StatefulModelError
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.planning import merging, plan_key
from toma_fx.run.calls import Arguments
from toma_fx.run.compiled import make_program
from toma_fx.run.programs import Runner, Specialization
from toma_fx.run.ranks import Ranks
from toma_fx.run.specializations import SpecializationCache
from toma_fx.run.stepper import Stepper
from toma_fx.run.switches import Switches

ACCEPTED = 4
"""Signatures that are remembered as accepted, for each graph that is kept."""


class Specializes(Switches):
    """Finds or makes what runs a call; for subclasses that are called as a denoiser."""

    cache: SpecializationCache
    _stepper: Stepper
    _guard: ModelGuard | None
    _like: Self | None
    _ranks: Ranks | None
    _accepted: OrderedDict[Hashable, None]

    def _current_guard(self) -> ModelGuard:
        """What the model is now; the cache follows a change of modules, adapters or buffers."""
        guard = self._guard
        if guard is None or not guard.holds():
            with compile_lock():
                guard = ModelGuard(self.denoiser)
                self.__dict__["_guard"] = guard
                self.cache.refresh(self.denoiser)
        return guard

    def _specialization(
        self, arguments: Arguments, rasters: tuple[Raster | None, ...]
    ) -> tuple[Hashable, Specialization]:
        """(its key, what is captured for a call), made when first asked for."""
        variant = self.variant
        call = (arguments.guard.key, arguments.signature, rasters)
        key = (*call, variant.number)

        def make() -> Specialization:
            arguments.guard.companions.check_merging(merging(variant.config))
            found = self._share(call, variant.config) or self._specialize(arguments, variant.config)
            return found.agree(arguments.leaves, self.denoiser)

        def describe() -> Mapping[str, str]:
            fields = {k: str(v) for k, v in variant.config.to_dict().items()}
            return {**arguments.describe(rasters), **fields}

        return key, self.cache.get(key, make, describe)

    def _specialization_of(self, arguments: Arguments) -> Specialization:
        """What is captured for a call of nobody's generation."""
        find = functools.partial(self._specialization, arguments)
        _, (_, found) = self._stepper.find(arguments.signature, arguments.leaves, find)
        return found

    def _share(self, call: tuple[Any, ...], config: MethodConfig) -> Specialization | None:
        """What is known of a call under another configuration, here or in the denoiser that this
        one is like: the programs, where they do the same, or else the graph."""
        known: list[Specialization] = []
        for owner in (self, self._like):
            found = [] if owner is None else owner.cache.find(call)
            if owner and (owner._compile, owner._ranks) == (self._compile, self._ranks):
                for each in found:
                    if plan_key(each.plan.config) == plan_key(config):
                        return each.under(config)
            known += found
        return known[0].replan(config, self._make_runner, self._ranks) if known else None

    def _specialize(self, arguments: Arguments, config: MethodConfig) -> Specialization:
        call = arguments.call
        try:
            with arguments.guard.companions.kernel():
                specialization = Specialization.make(
                    self.denoiser,
                    call.args,
                    call.kwargs,
                    config,
                    self._make_runner,
                    self._ranks,
                )
        except CaptureError as error:
            refused = arguments.signature not in self._accepted
            if refused or isinstance(error, StatefulModelError):
                raise
            raise AdapterError(
                "the model no longer accepts a call that it accepted before",
                where=error.where,
                expected="adapters that leave the shapes of inputs and layers as they are",
                got=error.got,
                hint="unload the adapter that changes shapes, or call the model "
                "with the inputs it needs now",
            ) from error
        self._accepted[arguments.signature] = None
        if len(self._accepted) > ACCEPTED * self.cache.capacity:
            self._accepted.popitem(last=False)
        return specialization

    def _make_runner(self, specialization: Specialization, kind: str) -> Runner:
        """A program to call, compiled if `compile` was called."""
        sizes_vary = specialization.dynamic
        return make_program(specialization.program(kind), self._compile, dynamic=sizes_vary)

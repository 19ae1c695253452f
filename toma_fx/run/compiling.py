"""How a denoiser is told to compile its programs."""

from __future__ import annotations

from typing import Any, Self

from toma_fx.run.compiled import Compilation
from toma_fx.run.specializations import SpecializationCache
from toma_fx.run.switches import Switches


class Compiles(Switches):
    """Programs that are compiled when they first run; for subclasses with specializations."""

    cache: SpecializationCache
    _compile: Compilation | None

    def compile(self, *args: Any, outline: bool = True, **kwargs: Any) -> Self:
        """Compile every program, as `torch.compile(program, *args, **kwargs)`, when it first runs.

        One program per kind: refresh, reuse, reweigh if weights are recomputed between refreshes,
        and the unmerged one if the schedule has unmerged steps. They go to Inductor as they are;
        to other back ends through Dynamo. Returns self.

        Args:
            outline: compile blocks that repeat once, so that the time to compile does not grow with
                the depth of the model; by Inductor alone.

        Raises:
            DynamicError: the method's number of merged tokens depends on the data.
            ConfigError: a mode or options that Inductor doesn't have.
        """
        self.config_toma.check_static("compile")
        return self._set_compilation(Compilation.make(args, kwargs, outline=outline))

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile nothing but blocks that repeat, each sort once, as diffusers' method does.

        It takes the least time until the first picture; `compile` makes faster steps.

        Raises:
            DynamicError, ConfigError: as `compile`; a mode with CUDA graphs, too.
        """
        self.config_toma.check_static("compile_repeated_blocks")
        self._set_compilation(Compilation.make(args, kwargs, blocks_only=True))

    def _set_compilation(self, compilation: Compilation) -> Self:
        self.__dict__["_compile"] = compilation
        for specialization in self.cache.values():
            specialization.runners.clear()
        return self

    @property
    def compiled(self) -> bool:
        """Whether `compile` was called."""
        return self._compile is not None

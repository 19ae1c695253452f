"""Pipelines that tell: a call of the pipeline is one generation of each of its denoisers.

Begin and end are those of the call, be it broken off by an exception or a closed generator. The
step is the scheduler's own index, and the number of steps is the pipeline's: both are on the host.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from toma_fx.compat.compilers import compiled_original
from toma_fx.compat.libraries import STEPS_MADE
from toma_fx.run.generation import PASSES, Marks
from toma_fx.run.stepper import Stepper
from toma_fx.run.told import Run, Timestep

_log = logging.getLogger("toma_fx.run")
COMPONENTS = ("unet", "transformer", "transformer_2")
"""Names under which diffusers pipelines hold their denoisers; Wan 2.2 has one for early steps and
one for late steps."""
_BASE = "toma_fx_base"
"""Attribute of a subclass that tells: the class that the pipeline had."""


class SchedulerSteps:
    """Which step of a call of a pipeline its scheduler is at.

    Most schedulers have an index, None until their first step, that begins where the pipeline
    enters the list of timesteps (img2img). Others have none.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._first: int | None = None
        self._waited = False

    def __call__(self) -> int | None:
        """The step, from 0; None if the scheduler does not say."""
        index = getattr(getattr(self._pipeline, "scheduler", None), "step_index", None)
        if type(index) is not int:
            self._waited = True
            return None
        if self._first is None:
            self._first = index - self._waited
        return index - self._first


class PipelineRun(Run):
    """The generation that a call of a pipeline is. It refuses nothing: the pipeline is right."""

    def __init__(self, pipeline: Any, read_step: SchedulerSteps, stepper: Stepper) -> None:
        super().__init__(None, PASSES, stepper.buffers)
        self._pipeline, self._read_step = pipeline, read_step

    @property
    def steps(self) -> int | None:
        """As many as the pipeline said it makes, once it did."""
        steps: int | None = vars(self._pipeline).get(STEPS_MADE)
        return steps

    @property
    def order(self) -> int:
        """Of the scheduler: calls of the denoiser for one step of the solver."""
        order: int = getattr(getattr(self._pipeline, "scheduler", None), "order", 1)
        return order

    def _next_step(self, key: Hashable, marks: Marks, timestep: Timestep) -> int:
        index, last = self._read_step(), self.generation.step
        if index is None or index < last:
            return super()._next_step(key, marks, timestep)
        return index

    def _check_order(self, step: int) -> None:
        """Nothing: some pipelines go over parts of a picture again."""


def tell_generations(pipeline: Any) -> None:
    """Make every call of a pipeline a generation of its denoisers. Its class becomes a subclass."""
    kind: Any = type(pipeline)
    if hasattr(kind, _BASE) or not callable(pipeline):
        return
    try:
        pipeline.__class__ = _telling(kind)
    except TypeError:
        _log.warning(
            "%s: its class can't be extended, so generations are guessed from calls", kind.__name__
        )


def leave_generations(pipeline: Any) -> None:
    """Undo `tell_generations`."""
    base = getattr(type(pipeline), _BASE, None)
    if base is not None:
        pipeline.__class__ = base


@contextmanager
def replace_components(pipeline: Any, denoisers: Mapping[str, Any]) -> Iterator[None]:
    """Put denoisers into a pipeline, by component; its calls inside are generations of them."""
    before = {name: getattr(pipeline, name) for name in denoisers}
    kind = type(pipeline)
    try:
        for name, denoiser in denoisers.items():
            setattr(pipeline, name, denoiser)
        tell_generations(pipeline)
        yield
    finally:
        for name, denoiser in before.items():
            setattr(pipeline, name, denoiser)
        pipeline.__class__ = kind


@contextmanager
def told_by(pipeline: Any) -> Iterator[None]:
    """Calls of the pipeline's denoisers inside are those of one generation of each."""
    before = vars(pipeline).pop(STEPS_MADE, None)
    read_step = SchedulerSteps(pipeline)
    with ExitStack() as stack:
        for name in COMPONENTS:
            stepper = getattr(compiled_original(getattr(pipeline, name, None)), "_stepper", None)
            if not isinstance(stepper, Stepper):
                continue
            outer = stepper.told  # a generation of the caller's own goes on
            if outer is None or isinstance(outer, PipelineRun):
                stack.enter_context(stepper.enter(PipelineRun(pipeline, read_step, stepper)))
        try:
            yield
        finally:
            if before is not None:
                vars(pipeline).setdefault(STEPS_MADE, before)


@functools.cache
def _telling(base: Any) -> Any:
    """A subclass of a pipeline's class that looks like it, and whose calls are generations.

    What they run is asked of the class at each call: somebody may write another one into it.
    """
    call: Any = base.__call__

    @functools.wraps(call)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with told_by(self):
            return base.__call__(self, *args, **kwargs)

    @functools.wraps(call)
    def stream(self: Any, *args: Any, **kwargs: Any) -> Any:
        with told_by(self):
            return (yield from base.__call__(self, *args, **kwargs))

    @functools.wraps(call)
    async def run_async(self: Any, *args: Any, **kwargs: Any) -> Any:
        with told_by(self):
            return await base.__call__(self, *args, **kwargs)

    @functools.wraps(call)
    async def stream_async(self: Any, *args: Any, **kwargs: Any) -> Any:
        with told_by(self):
            async for item in base.__call__(self, *args, **kwargs):
                yield item

    def reduce(self: Any, protocol: Any) -> Any:
        make, args, *rest = base.__reduce_ex__(self, protocol)
        own = tuple(base if arg is type(self) else arg for arg in args)
        return _rebuild, (base, make, own), *rest

    forms = {
        inspect.isgeneratorfunction: stream,
        inspect.iscoroutinefunction: run_async,
        inspect.isasyncgenfunction: stream_async,
    }
    wrapper = next((form for is_form, form in forms.items() if is_form(call)), run)
    names = ("__module__", "__qualname__", "__doc__")
    body = {name: getattr(base, name) for name in names}
    body |= {"__call__": wrapper, "__reduce_ex__": reduce, _BASE: base}
    return type(base)(base.__name__, (base,), body)


def _rebuild(base: Any, make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """A copy of a pipeline that tells."""
    pipeline = make(*args)
    pipeline.__class__ = _telling(base)
    return pipeline

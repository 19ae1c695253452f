"""Thresholds turned into what is static: `calibrate` into the ratio of every place that merges,
`calibrate_cache` into a mask of the steps that compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from toma_fx.api import denoiser_of, find_components, optimize, restore
from toma_fx.errors import ConfigError
from toma_fx.methods.ca_tome import CAToMeConfig
from toma_fx.methods.cache import CacheConfig
from toma_fx.methods.checks import check_choice, is_number
from toma_fx.methods.config import with_options
from toma_fx.passes.cache_updates import extrapolate, factors_of
from toma_fx.plan.places import places_of
from toma_fx.run.batching import State
from toma_fx.run.calls import call_of
from toma_fx.run.denoiser import OptimizedDenoiser, optimized_of
from toma_fx.run.pipelines import replace_components
from toma_fx.run.programs import Specialization

Call = tuple[tuple[Any, ...], dict[str, Any]]
_STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": fmean, "min": min, "max": max
}  # fmt: skip


def calibrate(
    model: Any,
    inputs: Any,
    threshold: float = 0.7,
    *,
    statistic: Literal["mean", "min", "max"] = "mean",
    **options: Any,
) -> CAToMeConfig:
    """CA-ToMe with static ratios: those that `threshold` gives on these inputs.

    Runs CA-ToMe in its dynamic form (arXiv 2501.00946), counts for every transformer block the
    tokens it merges, and returns the configuration that merges as many always. So the method
    compiles and exports.

    Args:
        model: a denoiser, or a pipeline: its first denoiser.
        inputs: a call of the denoiser, as for `optimize(example_inputs=...)`, or a list of calls:
            several steps of a generation say more than one (`record_calls` collects them). In a
            call with several pictures the one with the most similar tokens decides, as published.
        threshold: cosine similarity in [-1, 1] from which tokens merge.
        statistic: of the shares that the calls give for a block.
        options: other fields of `CAToMeConfig`.

    Returns:
        The calibrated configuration: `toma_fx.optimize(model, method=configuration)`.

    Raises:
        ConfigError: a field out of its domain, no inputs, or no tokens as similar as that.
        SignatureError, CaptureError: inputs that are no call of the denoiser.
    """
    check_choice("statistic", statistic, tuple(_STATISTICS))
    config = with_options(CAToMeConfig(threshold=threshold), options)
    # a new state selects at its first step, whatever the checkpoints
    every = dataclasses.replace(config, first_step=0, phases=())
    calls = inputs if isinstance(inputs, list) else [inputs]
    if not calls:
        raise ConfigError(
            "nothing to calibrate with", where="inputs", expected="at least one call", got="none"
        )
    denoiser = optimized_of(optimize(denoiser_of(model), method=every))
    assert denoiser is not None
    shares: dict[str, list[float]] = {}
    for call in calls:
        _, state = denoiser.step(call_of(call), State())
        for path, share in _measure_shares(denoiser.specializations[-1], state):
            shares.setdefault(path, []).append(share)
    ratios = {path: _STATISTICS[statistic](values) for path, values in shares.items()}
    if not any(ratios.values()):
        raise ConfigError(
            "no tokens are as similar as that",
            where="threshold",
            expected="a threshold that pairs of tokens of the inputs reach",
            got=repr(threshold),
            hint="lower threshold=",
        )
    return dataclasses.replace(config, ratios=ratios)


def _measure_shares(specialization: Specialization, state: State) -> Iterator[tuple[str, float]]:
    """(path of a block, share of tokens merged away) of every block of a dynamic step.

    Blocks with one pattern get one share, so that they share it in the calibrated form, too.
    """
    plan = specialization.plan
    places = places_of(specialization.analysis, specialization.flow)
    for group in plan.groups:
        pattern = {part: state.kept[group.tensor(part)] for part in group.setting.parts}
        merged_count = group.setting.count_merged(pattern)
        members = (
            (s.stream, i) for s in plan.segments if s.group == group.name for i in s.branches
        )
        for path in sorted({places[member].group for member in members}):
            yield path, 1 - merged_count / group.image.length


def calibrate_cache(
    model: Any,
    calls: Sequence[Any],
    threshold: float = 0.1,
    *,
    cache: CacheConfig | Mapping[str, Any] | None = None,
    run: Callable[..., Any] | None = None,
) -> CacheConfig:
    """A cache with a static mask: the steps that need not compute at this threshold.

    Runs generations in which every step computes, and keeps all updates. Then a step need not
    compute if what the cache would use there, held or extrapolated from the steps that compute
    before it, is nearer to its update than `threshold`, in all generations and passes. (The
    criterion of first-block caches and TeaCache, arXiv 2411.19108, applied to the update itself
    instead of to a stand-in for it, since here it is known.)

    Args:
        model: a pipeline, or a denoiser.
        calls: keyword arguments of every generation, for `run`; all of one number of steps.
        threshold: relative difference, |predicted - u| / |u|, summed over the elements of all
            updates that are kept.
        cache: what is kept, and the order, warm-up and last steps; the defaults if not given.
        run: draws a picture with a denoiser, `run(denoiser, **call)`; the pipeline itself if not
            given.

    Returns:
        The configuration, with `steps_mask`: `toma_fx.optimize(pipe, cache=configuration)`.

    Raises:
        ConfigError: no calls, generations of different length, or a threshold out of its domain.
        NoCacheSites: nothing of the model can be cached.
    """
    if not calls:
        raise ConfigError(
            "nothing to calibrate with", where="calls", expected="at least one call", got="none"
        )
    if not (is_number(threshold) and threshold > 0):
        raise ConfigError(
            "threshold is out of range",
            where="threshold",
            expected="a number over 0",
            got=repr(threshold),
        )
    config = CacheConfig.of(cache) or CacheConfig()
    every = dataclasses.replace(
        config, every=1, steps_mask=None, threshold=None, fitted=(), warmup_steps=1, last_steps=0
    )
    denoiser = optimized_of(optimize(restore(denoiser_of(model)), toma=False, cache=every))
    assert denoiser is not None
    recorded: list[Recorded] = []
    with _in_place_of(model, denoiser):
        for call in calls:
            recorded.append(Recorded())
            with recorded[-1].recording(denoiser):
                if run is None:
                    model(**call)
                else:
                    run(denoiser, **call)
    return _masked(config, recorded, threshold)


def _masked(config: CacheConfig, recorded: Sequence[Recorded], threshold: float) -> CacheConfig:
    """The configuration with the mask that recorded generations allow at a threshold.

    Raises:
        ConfigError: they are of different length.
    """
    lengths = sorted({r.steps for r in recorded})
    if len(lengths) > 1:
        raise ConfigError(
            "the generations differ in length",
            where="calls",
            expected="one number of steps",
            got=", ".join(map(str, lengths)),
            hint="calibrate once for each number of steps",
        )
    steps = lengths[0]
    forced = dataclasses.replace(
        config, every=steps + 1, steps_mask=None, threshold=None, fitted=(), steps=steps
    )
    flags = list(forced.cached_steps.flags(steps))
    for step in range(steps):
        if not flags[step]:
            known = [s for s in range(step) if flags[s]][-config.most_order - 1 :]
            worst = max(r.error(step, known) for r in recorded)
            flags[step] = worst > threshold
    order = min(config.order, sum(flags) - 1)
    return dataclasses.replace(
        config,
        order=order,
        fitted=(),
        steps_mask=tuple(map(int, flags)),
        warmup_steps=1,
        last_steps=0,
        steps=steps,
    )


Sample = tuple[float, list[Tensor]]
"""(timestep, updates) of a step."""


class Recorded:
    """The updates of a generation, of which every step computes.

    Attributes:
        passes: (timestep, updates) by step, of every pass.
    """

    def __init__(self) -> None:
        self.passes: dict[int, dict[int, Sample]] = {}

    @property
    def steps(self) -> int:
        """How many there were."""
        return 1 + max((step for own in self.passes.values() for step in own), default=-1)

    @contextmanager
    def recording(self, denoiser: OptimizedDenoiser) -> Iterator[None]:
        """Note the updates of every call inside."""

        def note(_: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
            stepper = denoiser._stepper
            generation, told = stepper.generations()[-1], stepper.told
            step = generation.step // (1 if told is None else told.order)
            state, cache = generation.called[-1], denoiser.specializations[-1].plan.cache
            assert cache is not None
            newest = [state.buffers[update.tensors[0]] for update in cache.updates]
            updates = [update.detach().to("cpu", copy=True) for update in newest]
            time = float(state.buffers[cache.times[0]].amax()) if cache.times else float(step)
            self.passes.setdefault(generation.passes.index(state), {})[step] = time, updates

        handle = denoiser.register_forward_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def error(self, step: int, known: Sequence[int]) -> float:
        """Relative difference of what steps that compute tell of another, in the worst pass."""
        return max(
            (_error([own[s] for s in known], own[step]) for own in self.passes.values()
             if step in own and all(s in own for s in known)),
            default=0.0,
        )  # fmt: skip


def _error(known: Sequence[Sample], actual: Sample) -> float:
    """|predicted - u| / |u| over all updates; `known` in the order of the steps."""
    newest_first = known[::-1]
    times = torch.tensor([time for time, _ in newest_first])
    factors = factors_of(torch.tensor([actual[0]]), *times.split(1)) if len(known) > 1 else ()
    difference = size = 0.0
    for i, update in enumerate(actual[1]):
        tensors = tuple(updates[i] for _, updates in newest_first)
        difference += float((extrapolate(factors, tensors) - update).abs().sum())
        size += float(update.abs().sum())
    return difference / size if size else 0.0


def _in_place_of(model: Any, denoiser: OptimizedDenoiser) -> AbstractContextManager[None]:
    """Put a denoiser into a pipeline, whose calls tell their generations."""
    if isinstance(model, nn.Module):
        return nullcontext()
    return replace_components(model, {next(iter(find_components(model))): denoiser})


@contextmanager
def record_calls(model: Any) -> Iterator[list[Call]]:
    """The calls that a denoiser, or a pipeline's first denoiser, gets inside the block.

        with toma_fx.record_calls(pipe) as calls:
            pipe("a lighthouse in a storm")
        pipe = toma_fx.optimize(pipe, method=toma_fx.calibrate(pipe, calls, threshold=0.7))

    Every call is a pair (args, kwargs) of the tensors themselves; the list keeps them alive.

    Raises:
        ModelTypeError: neither a module nor a pipeline with a denoiser.
    """
    calls: list[Call] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        calls.append((args, dict(kwargs)))

    handle = denoiser_of(model).register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()

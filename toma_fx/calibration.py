"""`calibrate`: a similarity threshold turned into a static ratio for every place that merges."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any, Literal

from torch import nn

from toma_fx.api import denoiser_of, optimize
from toma_fx.errors import ConfigError
from toma_fx.methods.ca_tome import CAToMeConfig
from toma_fx.methods.checks import check_choice
from toma_fx.methods.config import with_options
from toma_fx.plan.places import places_of
from toma_fx.run.batching import State
from toma_fx.run.calls import call_of
from toma_fx.run.denoiser import optimized_of
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
    every = dataclasses.replace(config, first_step=0)
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

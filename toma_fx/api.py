"""Public entry points: `optimize` and `explain`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from torch import nn

from toma_fx.capture import check_model
from toma_fx.config import ToMAConfig
from toma_fx.errors import ConfigError, ModelTypeError
from toma_fx.report import Report, make_report
from toma_fx.runtime import OptimizedDenoiser, Specialization

T = TypeVar("T")
COMPONENTS = ("unet", "transformer")
"""Names under which diffusers pipelines hold their denoiser."""


def optimize(
    model: T,
    toma: bool | str | ToMAConfig | Mapping[str, Any] = True,
    *,
    example_inputs: Any = None,
    **options: Any,
) -> T:
    """Token merging for a denoiser, or for the denoiser of a diffusers pipeline.

    Args:
        model: a `UNet2DConditionModel`, `FluxTransformer2DModel` or pipeline that holds one.
        toma: True for the default preset, a preset name ("default", "paper-sdxl", "paper-flux"), a
            `ToMAConfig`, a mapping of its fields, or False to turn merging off (ratio 0).
        example_inputs: keyword arguments of a call (a dict), positional ones (a tuple), or a pair
            (args, kwargs). Given, the model is captured now and for this signature alone; else at
            the first call of each signature.
        options: fields of `ToMAConfig`, replacing those of `toma`.

    Returns:
        The optimized denoiser (a stand-in for the original, which is not modified); or the same
        pipeline, holding the optimized denoiser.

    Raises:
        ConfigError: a field out of its domain (`UnknownNameError`, `TileError` are kinds of it).
        ModelTypeError: no denoiser found. TrainingModeError: the model is in training mode.
        CaptureError, NoMergeSites: with example inputs; otherwise they come at the first call.
    """
    config = _config(toma, options)
    if not isinstance(model, nn.Module):
        name, inner = _component(model)
        replacement = _optimized(inner, config, example_inputs)
        setattr(model, name, replacement)
        return model
    return cast(T, _optimized(model, config, example_inputs))


def explain(
    model: Any,
    example_inputs: Any,
    toma: bool | str | ToMAConfig | Mapping[str, Any] = True,
    **options: Any,
) -> Report:
    """What `optimize` would do for these inputs, without running the model.

    Args as for `optimize`. The result prints as a table and converts with `to_json()`.

    Raises:
        NoMergeSites: nothing can be merged; its message lists every reason.
    """
    config = _config(toma, options)
    denoiser = model if isinstance(model, nn.Module) else _component(model)[1]
    denoiser = _original(denoiser)
    check_model(denoiser)
    args, kwargs = call_of(example_inputs)
    return make_report(Specialization.make(denoiser, args, kwargs, config))


def _config(toma: Any, options: Mapping[str, Any]) -> ToMAConfig:
    if toma is True:
        return ToMAConfig.make("default", **options)
    if toma is False:
        return ToMAConfig.make("default", **{**options, "ratio": 0.0, "overrides": ()})
    if isinstance(toma, (str, ToMAConfig, Mapping)):
        return ToMAConfig.make(toma, **options)
    raise ConfigError(
        "toma= is not a configuration",
        where="toma",
        expected="True, False, a preset name, a ToMAConfig or a mapping of its fields",
        got=type(toma).__name__,
    )


def _component(pipeline: Any) -> tuple[str, nn.Module]:
    """The denoiser of a pipeline and the attribute that holds it."""
    for name in COMPONENTS:
        found = getattr(pipeline, name, None)
        if isinstance(found, nn.Module):
            return name, found
    raise ModelTypeError(
        "no denoiser found",
        where=type(pipeline).__name__,
        expected="a torch.nn.Module, or a pipeline with " + " or ".join(COMPONENTS),
        got=type(pipeline).__name__,
    )


def _original(model: nn.Module) -> nn.Module:
    """The model itself if it was optimized already (optimizing twice replaces the first)."""
    if type(model) is OptimizedDenoiser:
        return model.denoiser
    return model


def _optimized(model: nn.Module, config: ToMAConfig, example_inputs: Any) -> OptimizedDenoiser:
    model = _original(model)
    check_model(model)
    optimized = OptimizedDenoiser(model, config)
    if example_inputs is not None:
        args, kwargs = call_of(example_inputs)
        optimized.fix(args, kwargs)
    return optimized


def call_of(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of example inputs given as dict, tuple, or pair of both."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        pair = len(example_inputs) == 2 and isinstance(example_inputs[0], (tuple, list))
        if pair and isinstance(example_inputs[1], Mapping):
            return tuple(example_inputs[0]), dict(example_inputs[1])
        return tuple(example_inputs), {}
    raise ConfigError(
        "example_inputs= is not a call",
        where="example_inputs",
        expected="a dict of keyword arguments, a tuple of positional ones, or a pair of both",
        got=type(example_inputs).__name__,
    )

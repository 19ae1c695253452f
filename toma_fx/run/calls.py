"""Calls of a denoiser in canonical form."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from toma_fx.capture.grids import Raster
from toma_fx.capture.guard import ModelGuard
from toma_fx.compat.libraries import own_forward
from toma_fx.compat.pytorch import hook_tables, tree_paths
from toma_fx.errors import ConfigError, SignatureError
from toma_fx.graph.nodes import TIMESTEPS


def call_of(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of example inputs given as dict, tuple, or pair of both.

    Raises:
        ConfigError: something else.
    """
    if isinstance(example_inputs, (tuple, list)) and not _is_pair(example_inputs):
        return tuple(example_inputs), {}
    call = _keyword_call(example_inputs)
    if call is None:
        raise ConfigError(
            "example_inputs= is not a call",
            where="example_inputs",
            expected="a dict of keyword arguments, a tuple of positional ones, or a pair of both",
            got=type(example_inputs).__name__,
        )
    return call


def calls_of(inputs: Any) -> list[Any]:
    """Calls given as one, or as a list of dicts, tuples and pairs, each of which is a call.

    Raises:
        ConfigError: a list of none.
    """
    if not isinstance(inputs, list) or _is_pair(inputs):
        return [inputs]
    if not inputs:
        raise ConfigError(
            "no call", where="inputs", expected="a call, or a list of calls", got="an empty list"
        )
    return inputs if all(isinstance(x, (Mapping, tuple)) for x in inputs) else [inputs]


def call_of_step(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of the inputs of `step`.

    Raises:
        SignatureError: neither a dict nor a pair.
    """
    call = _keyword_call(inputs)
    if call is None:
        raise SignatureError(
            "the inputs are not a call",
            where="step(inputs, state)",
            expected="a dict of keyword arguments, or a pair (args, kwargs)",
            got=type(inputs).__name__,
        )
    return call


def _is_pair(inputs: Sequence[Any]) -> bool:
    pair = len(inputs) == 2 and isinstance(inputs[0], (tuple, list))
    return pair and isinstance(inputs[1], Mapping)


def _keyword_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)) and _is_pair(inputs):
        return tuple(inputs[0]), dict(inputs[1])
    return None


@dataclass(frozen=True)
class NamedCall:
    """One call, by keyword where the forward signature names the argument.

    Attributes:
        args, kwargs: of the call. label, token: see `StepCall`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    label: Hashable = None
    token: Tensor | None = None


class CallSignature:
    """What the arguments of a model's call are named, as its `forward` is now."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._forward: Any = None
        self.now()

    def now(self) -> inspect.Signature:
        """The signature of what runs when the model is called.

        A function on the model itself that takes anything stands around the class's `forward`.
        """
        own = own_forward(self._model)
        forward = type(self._model).forward if own is None else own
        if forward is not self._forward:
            self._forward, self._signature = forward, self._find(own)
        return self._signature

    @property
    def is_wrapped(self) -> bool:
        """Whether hooks or a function around see which arguments have a position."""
        return any(hook_tables(self._model)) or own_forward(self._model) is not None

    def _find(self, own: Any) -> inspect.Signature:
        inner = inspect.signature(MethodType(type(self._model).forward, self._model))
        if own is None:
            return inner
        # `update_wrapper` may name what is wrapped before it is bound
        signature = inspect.signature(own, follow_wrapped=False)
        kinds = {p.kind for p in signature.parameters.values()}
        if kinds != {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            return signature
        # the function may give what the call leaves out, and take away what is new
        named = [p.replace(default=None) for p in inner.parameters.values() if _has_name(p)]
        rest = [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
        return inspect.Signature([*named, *rest])


def _has_name(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def name_arguments(
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    where: str,
    keep: int = 0,
) -> NamedCall:
    """A call in canonical form; a Python number as timestep becomes a tensor.

    The denoisers themselves make it one, and a graph takes tensors. A call with more positional
    arguments than the signature names stays as it is.

    Args:
        keep: how many arguments stay positional.

    Raises:
        SignatureError: it does not fit the signature.
    """
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise SignatureError(
            "the call does not fit the denoiser's forward",
            where=where,
            expected=str(signature),
            got=str(error),
        ) from error
    named: dict[str, Any] = {}
    rest: tuple[Any, ...] = ()
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            rest = value
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    if rest:
        return NamedCall(args, kwargs)
    for name in TIMESTEPS:
        value = named.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            dtype = torch.float64 if isinstance(value, float) else torch.int64
            named[name] = torch.tensor(value, dtype=dtype)
    options = _split_options(named)
    positional = [named.pop(name) for name in list(named)[:keep]]
    return NamedCall(tuple(positional), named, *options)


OPTIONS = "transformer_options"
"""The argument by which ComfyUI tells its models about the call."""
_BOOKKEEPING = ("cond_or_uncond", "uuids", "sigmas", "sample_sigmas")
"""What is in it of the sampler alone: other values at every call."""


def _split_options(named: dict[str, Any]) -> tuple[Hashable, Tensor | None]:
    """Take out of ComfyUI's options what no model reads.

    Returns:
        What it says of the pass, and the list of noise levels, which is one of the generation.
    """
    options = named.get(OPTIONS)
    if not isinstance(options, Mapping):
        return None, None
    named[OPTIONS] = {k: v for k, v in options.items() if k not in _BOOKKEEPING}
    levels = options.get("sample_sigmas")
    label = tuple(tuple(options.get(name) or ()) for name in ("cond_or_uncond", "uuids"))
    return label, levels if isinstance(levels, Tensor) else None


def leaf_key(leaf: Any) -> Any:
    """What a graph depends on of a leaf of a call: shape, dtype and device, or type and value."""
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.dtype, leaf.device)
    return (type(leaf).__name__, repr(leaf))


def describe_leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(name, shape and dtype or value) of every leaf of a call."""
    out = []
    for path, leaf in tree_paths((tuple(args), dict(sorted(kwargs.items())))):
        name = ".".join(path[1:])
        shown = f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else repr(leaf)
        out.append((name, shown))
    return out


def first_difference(
    captured: Sequence[tuple[str, Any]], call: Sequence[tuple[str, Any]], where: str
) -> SignatureError:
    """The error for a call that does not fit a captured one: names the first difference."""
    known, own = dict(captured), dict(call)
    hint = "call optimize() without example_inputs to capture each signature when it first occurs"
    what = "the call does not fit the captured signature"
    for name in [*known, *own]:
        want, got = known.get(name, "nothing"), own.get(name, "nothing")
        if want != got:
            return SignatureError(what, where=name, expected=str(want), got=str(got), hint=hint)
    return SignatureError(
        what,
        where=where,
        expected="the captured structure, with the model on the same device and in the same dtype, "
        "in the same autocast region and with the same attention backend",
        got="another",
        hint=hint,
    )


@dataclass(frozen=True)
class Arguments:
    """One call in canonical form.

    Attributes:
        call: by keyword. leaves: flattened. guard: the model's state.
        signature: what the graph is specialized to, but for the values of position ids.
    """

    call: NamedCall
    leaves: list[Any]
    guard: ModelGuard
    signature: tuple[Any, ...]

    def describe(self, rasters: Sequence[Raster | None]) -> Mapping[str, str]:
        """What makes up the key of its graph, by name."""
        environment, inputs = self.signature[1], describe_leaves(self.call.args, self.call.kwargs)
        enumerated = [f"a grid {raster.grid}" for raster in rasters if raster is not None]
        return {
            **{name or "the input": str(shown) for name, shown in inputs},
            "position ids": ", ".join(enumerated),
            "the model": f"state {self.guard.key[:8]} (modules, adapters, attributes)",
            "dtype, device, autocast, attention": str(environment),
        }

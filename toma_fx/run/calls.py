"""Calls of a denoiser in canonical form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from toma_fx.capture.grids import Raster, raster
from toma_fx.capture.guard import ModelGuard
from toma_fx.errors import ConfigError, SignatureError


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


Signature = tuple[Any, ...]


@dataclass(frozen=True)
class Arguments:
    """One call in canonical form.

    Attributes:
        args, kwargs: keywords where the forward signature names them. leaves: flattened.
        guard: the model's state.
        signature: what the graph is specialized to, but for the values of position ids.
        timestep: as a number. conditioning: the text tokens, if the model has them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any]
    guard: ModelGuard
    signature: Signature
    timestep: float | None
    conditioning: Tensor | None

    @property
    def rasters(self) -> tuple[Raster | None, ...]:
        """What the position ids among the leaves enumerate; on a GPU reading waits for it."""
        return tuple(raster(leaf) for leaf in self.leaves)


def _call_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of the inputs of `step`."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    pair = isinstance(inputs, (tuple, list)) and len(inputs) == 2
    if pair and isinstance(inputs[0], (tuple, list)) and isinstance(inputs[1], Mapping):
        return tuple(inputs[0]), dict(inputs[1])
    raise SignatureError(
        "the inputs are not a call",
        where="step(inputs, state)",
        expected="a dict of keyword arguments, or a pair (args, kwargs)",
        got=type(inputs).__name__,
    )


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.dtype, leaf.device)
    return (type(leaf).__name__, repr(leaf))


def _named_leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(name, shape and dtype or value) of every leaf of a call."""
    leaves = pytree.tree_flatten_with_path((tuple(args), dict(sorted(kwargs.items()))))[0]
    out = []
    for path, leaf in leaves:
        name = ".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path[1:])
        shown = f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else repr(leaf)
        out.append((name, shown))
    return out

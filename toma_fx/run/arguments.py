"""Arguments of a call that a graph can take."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from toma_fx.compat.pytorch import tree_leaves, tree_map, tree_paths
from toma_fx.errors import SignatureError

_TAKEN = (Tensor, bool, int, float, str, NoneType, Enum, torch.ScriptObject)
"""Types of the leaves of a call that `torch.export` takes as inputs, or holds as constants."""


def are_taken(leaves: Sequence[Any]) -> bool:
    """Whether a graph takes all of these leaves of a call as they are."""
    return all(type(leaf) in _PLAIN or _is_taken(leaf) for leaf in leaves)


_PLAIN = frozenset({Tensor, bool, int, float, str, NoneType})


def _is_taken(leaf: Any) -> bool:
    numpy = sys.modules.get("numpy")  # its float64 is a Python float as well
    return isinstance(leaf, _TAKEN) and (numpy is None or not isinstance(leaf, numpy.generic))


def plain_numbers(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with Python's numbers in place of NumPy's; arrays stay as they are."""
    numpy = sys.modules.get("numpy")
    call = (tuple(args), dict(kwargs))
    if numpy is None or not any(isinstance(leaf, numpy.generic) for leaf in tree_leaves(call)):
        return call
    plain: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(
        lambda leaf: leaf.item() if isinstance(leaf, numpy.generic) else leaf, call
    )
    return plain


def check_leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that no graph can take: arrays, callables, objects.

    Raises:
        SignatureError: names the first such argument by its path, and its type.
    """
    call = (tuple(args), dict(kwargs))
    if all(isinstance(leaf, _TAKEN) for leaf in tree_leaves(call)):
        return
    path, leaf = next((p, v) for p, v in tree_paths(call) if not isinstance(v, _TAKEN))
    kind = type(leaf)
    hint = (
        "leave it out of the call, or keep it as an attribute of the model if the forward pass "
        "reads it; toma_fx.restore(model) gives the original, which takes it"
    )
    if kind.__module__ == "numpy":
        hint = "give a tensor: torch.from_numpy(...)"
    raise SignatureError(
        "an argument is nothing that a graph can take",
        where=".".join(path[1:]),
        expected="tensors, numbers, texts and None, in lists, tuples and dicts",
        got=f"{kind.__module__}.{kind.__qualname__}",
        hint=hint,
    )

"""Which attributes of a model's modules, and of the objects that these hold, a graph depends on."""

from __future__ import annotations

import marshal
from collections.abc import Mapping
from functools import cache
from types import ModuleType, NoneType
from typing import Any

from torch import Tensor, nn

from toma_fx.compat.libraries import HISTORY, HOOKS, WRAPPING, own_forward
from toma_fx.compat.pytorch import module_fields, module_tables

ATOMS = frozenset({NoneType, bool, int, float, complex, str, bytes})
"""Types of values that never change and whose `repr` tells them apart."""
HELPER_DEPTH = 2
"""How far helpers are followed: those of modules, and those that these hold."""
_CONTAINERS = (nn.ModuleDict, nn.ParameterDict, nn.ModuleList, nn.Sequential, nn.Identity)
_CONTAINER_FIELDS = frozenset({"training", "_keys"})
"""Fields that the containers of `nn` do not read when they are called."""


_OPAQUE_FIELDS = frozenset({"compute_dtype", "in_features", "out_features"})
"""What a graph depends on of a layer that is one operator in it."""


def tracked_attributes(owner: Any, *, root: bool = False) -> dict[str, Any]:
    """Attributes of a module or helper that the forward pass may read, by name.

    Left out are children, parameters, buffers and hooks, the history of a model, what removed hooks
    leave behind, and, if the owner is the denoiser itself (`root`), what others wrapped around it.
    """
    if is_opaque(owner):
        return {name: vars(owner)[name] for name in _OPAQUE_FIELDS & vars(owner).keys()}
    ignored = _ignored(isinstance(owner, nn.Module), type(owner) in _CONTAINERS)
    if root:
        ignored |= WRAPPING
    values = {
        name: value
        for name, value in list(vars(owner).items())
        if name not in ignored and not (name in WRAPPING and _is_leftover(owner, name, value))
    }
    forward = own_forward(owner) if root else None
    return values if forward is None else {**values, "forward": forward}


def is_opaque(owner: Any) -> bool:
    """Whether an owner is a linear layer with parameters of a class that tracing would lose.

    It runs as it is, and may write what it likes (see `opaque`).
    """
    return isinstance(owner, nn.Linear) and any(
        type(p) is not nn.Parameter and p is not None and not hasattr(p, "__tensor_flatten__")
        for p in module_tables(owner)[1].values()
    )


@cache
def _ignored(module: bool, container: bool) -> frozenset[str]:
    """Attributes that never count, of modules, of containers among them, or of helpers."""
    own = module_fields() if module else frozenset()
    return HISTORY | own | (_CONTAINER_FIELDS if container else frozenset())


def _is_leftover(owner: Any, name: str, value: Any) -> bool:
    """Whether a removed hook left this: an empty registry, or the class's own forward put back."""
    if name == HOOKS:
        return not getattr(value, "hooks", None)
    forward = getattr(type(owner), "forward", None)
    own = name == "forward" and getattr(value, "__func__", None) is forward
    return own and getattr(value, "__self__", None) is owner


def code_of(cls: type) -> tuple[Any, Any]:
    """The functions that run a module of a class; others may write them into it."""
    return cls.forward, cls.__call__  # type: ignore[attr-defined]


def is_helper(value: Any) -> bool:
    """Whether a value may act in the forward pass by attributes of its own, as processors do."""
    known = isinstance(value, (nn.Module, Tensor, Mapping, type, ModuleType))
    own = isinstance(getattr(value, "__dict__", None), dict)
    return own and not known and not hasattr(value, "__get__")


def as_bytes(value: Any) -> bytes | None:
    """The contents of plain data (numbers, texts, containers of these, arrays of NumPy).

    None for anything else. Types of numbers and the sign of zero tell; equal texts may differ.
    """
    try:
        return marshal.dumps(value, 2)
    except ValueError:
        return None

"""The state of a model as a key: equal where two states have the same graphs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from toma_fx.capture.attributes import (
    ATOMS,
    HELPER_DEPTH,
    as_bytes,
    code_of,
    is_helper,
    tracked_attributes,
)
from toma_fx.compat.libraries import ADAPTER_SWITCHES, NOTES
from toma_fx.compat.pytorch import hook_tables, module_tables
from toma_fx.errors import AdapterError

Adapters = tuple[set[str], tuple[str, ...]]


class Opaque(Exception):
    """The model holds an object that only its own process can tell from others."""


Name = Callable[[Any], Any]
"""What an object without plain contents is called in a key."""


def _by_content(value: Any) -> Any:
    """A name that means the same in another process."""
    if value is None or isinstance(value, nn.Module):
        return _kind(value)
    if isinstance(value, Tensor):
        return str((tuple(value.shape), value.dtype))
    name = getattr(value, "__qualname__", "<")
    if "<" in name:  # no function or class of a module
        raise Opaque(f"the model holds a {_kind(value)}, which other processes can't compare")
    return f"{value.__module__}.{name}"


def state_key(model: nn.Module, *, local: bool = True) -> str:
    """Digest of types, attributes, parameters by identity, and buffers by shape, dtype and device.

    Of adapters (tuner layers of peft) only those that act count.

    Args:
        local: whether the key is for this process alone. Otherwise parameters count by shape and
            dtype, functions by their names, and modules that attributes hold by their classes.

    Raises:
        AdapterError: adapters are fused and switched off. Opaque: an object can't be named.
    """
    name: Name = id if local else _by_content
    digest = hashlib.sha256()
    idle: set[str] = set()
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        if path in idle or parent in idle:
            idle.add(path)
            continue
        children, parameters, buffers = module_tables(module)
        adapters = _adapters(module, path)
        if adapters is not None:
            names, acting = adapters
            idle.update(f"{path}.{k}.{n}" for k in children for n in names - set(acting))
        described = (
            path,
            (id(type(module)), *map(id, code_of(type(module)))) if local else (),
            _describe_owner(module, HELPER_DEPTH, name, root=not path, adapters=adapters),
            [(key, name(p)) for key, p in parameters.items()],
            [(key, str(_shape(b)) if local else name(b)) for key, b in buffers.items()],
            # numbers never come again
            [n if local else name(h) for table in hook_tables(module) for n, h in table.items()],
        )
        digest.update(repr(described).encode())
    return digest.hexdigest()


def _adapters(module: nn.Module, path: str) -> Adapters | None:
    """(names of the adapters of a tuner layer, those that act now in order), None for others."""
    own = vars(module)
    scaling = own.get("scaling")
    if not isinstance(scaling, dict) or not own.keys() >= ADAPTER_SWITCHES:
        return None
    layer: Any = module
    if layer.disable_adapters and layer.merged:
        raise AdapterError(
            "fused adapters are switched off",
            where=path,
            expected="adapters that are fused, or switched off",
            got="both; the model itself would unfuse them in its next forward pass",
            hint="unfuse_lora() first",
        )
    acting = () if layer.disable_adapters or layer.merged else tuple(layer.active_adapters)
    return set(scaling), tuple(name for name in acting if name in scaling)


def _shape(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.device)


def _describe_owner(
    owner: Any, depth: int, name: Name, *, root: bool = False, adapters: Adapters | None = None
) -> Any:
    """Type and attributes of a module or helper."""
    values = tracked_attributes(owner, root=root)
    acting: tuple[str, ...] = ()
    if adapters is not None:
        names, acting = adapters
        values = {
            key: _only_acting(value, names, acting)
            for key, value in values.items()
            if key not in ADAPTER_SWITCHES
        }
    return _kind(owner), acting, [(n, _describe(values[n], depth, name)) for n in sorted(values)]


def _describe(value: Any, depth: int, name: Name, around: tuple[int, ...] = ()) -> Any:
    """A structure of texts and numbers that is the same for two values that act alike.

    Args:
        depth: how far to follow helpers. name: of what has no contents.
        around: ids of the containers that the value is in.
    """
    kind = type(value)
    if kind in ATOMS:
        return repr(value)
    if isinstance(value, (Tensor, nn.Module)):
        return name(value)
    if id(value) in around:
        return "the container", around.index(id(value))
    around = (*around, id(value))
    if isinstance(value, Mapping):
        items = [(k, v) for k, v in value.items() if k not in NOTES]
        return _kind(value), [(repr(k), _describe(v, depth, name, around)) for k, v in items]
    if isinstance(value, (set, frozenset)):
        return _kind(value), sorted(map(repr, value))
    if isinstance(value, (list, tuple)):
        return _kind(value), [_describe(v, depth, name, around) for v in value]
    if isinstance(value, partial):
        parts = value.func, value.args, value.keywords
        return _kind(value), _describe(parts, depth, name, around)
    if is_helper(value):
        return _describe_owner(value, depth - 1, name) if depth else _kind(value)
    if kind.__module__ == "torch":
        return repr(value)
    return _kind(value), as_bytes(value) or name(value)


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _only_acting(value: Any, names: set[str], acting: tuple[str, ...]) -> Any:
    """A table by adapter name without the adapters that don't act; any other value as it is."""
    if isinstance(value, dict) and value.keys() <= names:
        return {name: value[name] for name in acting if name in value}
    return value

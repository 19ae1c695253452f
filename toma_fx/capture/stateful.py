"""What a forward pass writes in Python: features that hooks store, step caches, counters.

A graph does not write it, and holds as a constant what it read of it. So a model is run twice, on
other inputs, and what differs between the two runs is named. What only the first run writes is no
state: tables that a model makes when it first needs them.

Looked at are attributes of modules and of their helpers (processors, controllers), closures,
defaults and attributes of functions that are set on modules or registered as hooks, and of code
that belongs to no library also classes and globals. Objects without Python attributes are opaque.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from toma_fx.capture.attributes import ATOMS, as_bytes, is_helper, is_opaque, tracked_attributes
from toma_fx.compat.pytorch import hook_tables
from toma_fx.errors import StatefulModelError

DEPTH = 4
"""How far helpers and functions are followed from a module."""
_LIBRARIES = sys.stdlib_module_names | {
    "accelerate", "diffusers", "numpy", "peft", "toma_fx", "torch", "torchao", "transformers",
}  # fmt: skip
"""Packages whose globals and classes are not looked at."""


class _Identity:
    """An object that is compared as the very same one."""

    def __init__(self, value: Any) -> None:
        self.value = value


class PythonState:
    """What the forward pass of a model may have written, remembered by value."""

    def __init__(self, model: nn.Module) -> None:
        self._values: dict[str, list[Any]] = {}
        self._alive: list[Any] = []  # so that no address is used again
        modules = dict(model.named_modules())
        self._seen = set(map(id, modules.values()))
        for path, module in modules.items():
            self._add_module(module, path)

    def changes(self, later: PythonState) -> tuple[str, ...]:
        """Names of what is not what it was."""
        names = dict.fromkeys((*self._values, *later._values))
        return tuple(n for n in names if not _same(self._values.get(n), later._values.get(n)))

    def _add_module(self, module: nn.Module, path: str) -> None:
        dot = f"{path}." if path else ""
        for name, buffer in module.named_buffers(recurse=False):
            # by content: some models put an equal buffer in its place at each call
            self._note(f"{dot}{name}", None if buffer.is_meta else buffer.detach().clone())
        if is_opaque(module):  # runs at each step as it does in the model
            return
        self._add_attributes(module, dot, 0, root=not path)
        for table in hook_tables(module):
            for hook in list(table.values()):
                name = getattr(hook, "__name__", type(hook).__name__)
                self._add(f"hook {name} of {path or 'the model'}", hook, 1)

    def _add_attributes(self, owner: Any, prefix: str, depth: int, *, root: bool = False) -> None:
        for name, value in tracked_attributes(owner, root=root).items():
            self._add(f"{prefix}{name}", value, depth)
        self._add_class(type(owner), prefix, depth)

    def _add_class(self, cls: type, prefix: str, depth: int) -> None:
        """Values and methods of a class, of those above it too, that belong to no library."""
        for each in cls.__mro__:
            if _is_library(each) or not self._enter(each):
                continue
            for name, value in list(vars(each).items()):
                if isinstance(value, FunctionType):
                    if name == "__call__" or not name.startswith("__"):
                        self._add_function(f"{prefix}{name}", value, depth + 1)
                elif not name.startswith(("__", "_abc_")) and not hasattr(value, "__get__"):
                    self._add(f"{each.__qualname__}.{name}", value, depth + 1)

    def _add(self, name: str, value: Any, depth: int) -> None:
        kind = type(value)
        if kind in ATOMS:
            self._note(name, kind, repr(value))
        elif isinstance(value, Tensor):
            copied = kind is Tensor and not value.is_meta
            self._note(name, _Identity(value), value.detach().clone() if copied else None)
        elif isinstance(value, (Mapping, list, tuple, set, frozenset, deque)):
            self._add_items(name, value, depth)
        elif isinstance(value, (FunctionType, MethodType, partial)):
            self._add_callable(name, value, depth)
        elif isinstance(value, type):
            self._note(name, value)
            self._add_class(value, "", depth)
        elif not isinstance(value, ModuleType):
            data = None if isinstance(value, nn.Module) else as_bytes(value)
            self._note(name, value if data is None else kind, data)
            if depth < DEPTH and is_helper(value) and self._enter(value):
                self._add_attributes(value, f"{name}.", depth + 1)

    def _add_items(self, name: str, items: Any, depth: int) -> None:
        self._note(name, type(items), len(items))
        if not self._enter(items):  # a container may hold itself
            return
        if isinstance(items, (set, frozenset)):
            self._note(name, sorted(map(repr, items)))
            return
        values: Iterable[Any] = items
        if isinstance(items, Mapping):
            self._note(name, list(map(repr, items)))
            values = list(items.values())
        for value in list(values):
            self._add(name, value, depth)

    def _add_callable(self, name: str, value: Any, depth: int) -> None:
        """A function, a bound method with what it is bound to, or a partial with its arguments."""
        if isinstance(value, partial):
            self._add(name, (value.func, value.args, value.keywords), depth)
        elif isinstance(value, MethodType):
            owner = value.__self__
            self._note(name, owner)
            follow = isinstance(owner, nn.Module) or (depth < DEPTH and is_helper(owner))
            if follow and self._enter(owner):
                self._add_attributes(owner, f"{name}: ", depth + 1)
            self._add_function(name, value.__func__, depth)
        else:
            self._note(name, value)
            self._add_function(name, value, depth)

    def _add_function(self, name: str, function: Any, depth: int) -> None:
        """Closure, defaults, attributes and, of code that belongs to no library, globals."""
        if depth > DEPTH or not isinstance(function, FunctionType) or not self._enter(function):
            return
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for variable, cell in cells:
            if variable != "__class__":
                label = f"closure variable {variable!r} of {name}"
                self._add(label, _contents(cell), depth + 1)
        self._add(
            f"defaults of {name}", (function.__defaults__, function.__kwdefaults__), depth + 1
        )
        for attribute, value in list(vars(function).items()):
            self._add(f"{name}.{attribute}", value, depth + 1)
        if _is_library(function):
            return
        for variable in sorted(_names(function.__code__) & function.__globals__.keys()):
            self._add(f"global {variable!r} of {name}", function.__globals__[variable], depth + 1)

    def _enter(self, value: Any) -> bool:
        """Whether a value is met for the first time."""
        new = id(value) not in self._seen
        self._seen.add(id(value))
        self._alive.append(value)
        return new

    def _note(self, name: str, *facts: Any) -> None:
        self._values.setdefault(name, []).append(facts)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _names(code: CodeType) -> set[str]:
    """Names that a piece of code, or code inside it, looks up."""
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _is_library(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] in _LIBRARIES


def _same(before: list[Any] | None, after: list[Any] | None) -> bool:
    """Whether two notes under one name agree: objects by identity, contents by value."""
    if before is None or after is None or len(before) != len(after):
        return False
    pairs = zip(before, after, strict=True)
    return all(len(a) == len(b) and all(map(_same_fact, a, b)) for a, b in pairs)


def _same_fact(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, _Identity) and isinstance(b, _Identity):
        return a.value is b.value
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return False if a.shape != b.shape else _equal(a, b)
    plain = (str, bytes, int, list)
    return isinstance(a, plain) and isinstance(b, plain) and a == b


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num())


def stateful_error(
    model: nn.Module, names: Iterable[str] = (), difference: str = ""
) -> StatefulModelError:
    """The refusal of a model that keeps state.

    Args:
        names: of what changed. difference: of two calls that should be equal, where no name is
            known.
    """
    listed = list(names)
    shown = ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
    return StatefulModelError(
        "the model keeps state in Python from call to call, which a captured graph can't do",
        where=listed[0] if listed else type(model).__name__,
        expected="a forward pass that leaves the model, its hooks and processors as they were",
        got=f"{shown} changed during a call"
        if listed
        else f"two calls with equal inputs and random seed: {difference}",
        hint="remove the hook, processor or function that keeps it, or return it as an output; or "
        "call the original model where it is needed: toma_fx.restore(model)",
    )

"""Code that other packages put in the place of a model's: who did it, and what becomes of it.

A model's work is in the `forward` of its modules. A package may set another one on a module
(cache-dit), give a module another class (tomesd), or write into a class. What stands there is
captured like any other code, and whatever of it can't be is refused with its origin. Packages that
merge tokens or skip steps themselves are refused at once: what they do and what is done here would
act on each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from toma_fx.compat.libraries import covers_hook, own_forward
from toma_fx.errors import CaptureError, CompanionError

_KNOWN: Mapping[str, tuple[str, str]] = {
    "cache_dit": (
        "cache-dit skips blocks of the model, by what it saw in earlier steps",
        "cache_dit.disable_cache(pipe or denoiser); or toma_fx.restore(...), to go on with it; "
        "toma_fx.optimize(model, cache=...) keeps updates over steps in the graph "
        "(docs/caching.md)",
    ),
    "tomesd": (
        "tomesd merges the tokens of the model already",
        "tomesd.remove_patch(model); the same method in the graph is "
        'toma_fx.optimize(model, method="tomesd")',
    ),
}
"""Package -> what it does to a model, and what to do instead."""
_OWN = frozenset({"torch", "toma_fx", "contextlib", "functools"})
"""Packages whose functions stand around those of any other."""


@dataclass(frozen=True)
class Replacement:
    """Code that stands in the place of a module's own.

    Attributes:
        path: of the module, "" for the model itself.
        name: of the function or class. module: the Python module that holds the code.
    """

    path: str
    name: str
    module: str

    @property
    def package(self) -> str:
        """The package that the code belongs to."""
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.name} of {self.module} (in {self.path or 'the denoiser'})"


def check_replaced(modules: Mapping[str, nn.Module]) -> None:
    """Refuse a model in which a package merges tokens or skips steps itself.

    Raises:
        CompanionError: there is one; names it, where it acts and how to take it off.
    """
    for found in find_replaced(modules):
        refuse_known(found)
    for path, module in modules.items():
        if covers_hook(module):
            raise CompanionError(
                "another forward was set over a hook of accelerate",
                where=path or "the denoiser",
                expected="the hook outside, where a call can pass it by",
                got=str(replacement(path, vars(module).get("forward"))),
                hint="pipe.remove_all_hooks(), set forward, then pipe.enable_model_cpu_offload()",
            )


def refuse_known(found: Replacement) -> None:
    """Raise `CompanionError` for code of a package that can't act beside merging."""
    if found.package not in _KNOWN:
        return
    what, hint = _KNOWN[found.package]
    raise CompanionError(
        what,
        where=found.path or "the denoiser",
        expected="the model's own forward pass",
        got=f"{found.name} of {found.module}",
        hint=hint,
    )


def find_replaced(modules: Mapping[str, nn.Module]) -> Iterator[Replacement]:
    """What stands in the place of the modules' own code, from the outside in."""
    for path, module in modules.items():
        own = own_forward(module)
        if own is not None:
            yield replacement(path, own)
        cls = next(c for c in type(module).__mro__ if "forward" in vars(c))
        forward = vars(cls)["forward"]
        packages = {_package(module_of(f)) for f in _layers(forward)}
        home = _home(cls)
        if home in _KNOWN or (home not in _OWN and not packages & {home, *_OWN}):
            yield replacement(path, forward)


def replacement(path: str, function: Any) -> Replacement:
    """The code that a function runs, by its origin."""
    inner = _unbound(function)
    code = getattr(inner, "__code__", None)  # which `functools.wraps` can't rename
    name = type(inner).__qualname__ if code is None else code.co_qualname
    return Replacement(path, name, module_of(inner))


def module_of(function: Any) -> str:
    """The Python module in which a function, or the class of a callable object, was written.

    `functools.wraps` copies `__module__` of what is wrapped; the globals can't be copied.
    """
    inner = _unbound(function)
    written = getattr(inner, "__globals__", {}).get("__name__")
    return str(written or type(inner).__module__)


def with_origin(error: CaptureError, model: nn.Module) -> CaptureError:
    """An error of a capture that names, in its hint, the code in the place of the model's own."""
    found = list(dict.fromkeys(str(each) for each in find_replaced(dict(model.named_modules()))))
    if not found:
        return error
    shown = ", ".join(found[:2]) + (f" and {len(found) - 2} more" if len(found) > 2 else "")
    return type(error)(
        error.what,
        where=error.where,
        expected=error.expected,
        got=error.got,
        hint=f"take off what stands in the place of the model's own forward: {shown}",
    )


def _home(cls: type) -> str:
    """The package of the nearest class in a file: one made at run time belongs to its base."""
    written = (c for c in cls.__mro__ if "<locals>" not in c.__qualname__)
    return _package(next(written).__module__)


def _package(module: str) -> str:
    return module.partition(".")[0]


def _layers(function: Any) -> Iterator[Any]:
    """A function and what its decorators wrap."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _unbound(function: Any) -> Any:
    """The function in partials and bound methods."""
    while isinstance(function, (partial, MethodType)):
        function = function.func if isinstance(function, partial) else function.__func__
    return function

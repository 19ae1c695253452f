"""Looking up a private name."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, TypeVar

from toma_fx.errors import CompatError

if TYPE_CHECKING:
    from torch.utils._pytree import TreeSpec as TreeSpec

F = TypeVar("F", bound=Callable[..., Any])


def lookup(module: str, name: str) -> Any:
    """The object `name` of `module`; raises `CompatError` if there is none."""
    try:
        found: Any = sys.modules.get(module) or import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise missing(module.partition(".")[0], f"{module}.{name}") from error
    return found


def attribute(package: str, owner: Any, name: str) -> Any:
    """The attribute `name` of an object of `package`; raises `CompatError` if it has none."""
    try:
        return getattr(owner, name)
    except AttributeError as error:
        kind = owner if isinstance(owner, type) else type(owner)
        raise missing(package, f"{kind.__name__}.{name}") from error


def missing(package: str, name: str) -> CompatError:
    """The error for a name that this version of a package does not have."""
    required = metadata.requires("toma-fx") or ()
    tested = [r.partition(";")[0].strip() for r in required if re.match(rf"{package}[^\w-]", r)]
    return CompatError(
        f"this version of {package} has no {name}",
        where=f"{package} {metadata.version(package)}",
        expected=f"a version that was tested: {', '.join(tested) or package}",
        hint="install such a version; to support another, see the function of toma_fx/compat/ "
        "that asks for this name",
    )

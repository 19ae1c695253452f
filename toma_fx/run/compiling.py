"""Programs for `torch.compile`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from toma_fx.errors import ConfigError
from toma_fx.graph.outline import outline

OUTLINE = "outline"
"""Option: whether Inductor compiles blocks that repeat once."""


def check_outline(value: object) -> bool:
    """The value of the option.

    Raises:
        ConfigError: neither True nor False.
    """
    if not isinstance(value, bool):
        raise ConfigError(
            f"{OUTLINE} is out of range", where=OUTLINE, expected="True or False", got=repr(value)
        )
    return value


def compile_options(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, from the arguments of `torch.compile` after its first, and "outline".

    Raises:
        ConfigError: "outline" is neither True nor False.
    """
    names = list(inspect.signature(torch.compile).parameters)[1:]
    options = {"dynamic": False, OUTLINE: True, **dict(zip(names, args, strict=False)), **kwargs}
    check_outline(options[OUTLINE])
    return options


def compile_program(graph_module: fx.GraphModule, options: Mapping[str, Any]) -> Callable[..., Any]:
    """A program, compiled at its first call.

    Args:
        graph_module: flat inputs -> flat outputs.
        options: of `torch.compile`, and "outline".
    """
    given = dict(options)
    outlined = given.pop(OUTLINE) and given.get("backend", "inductor") == "inductor"
    compiled: Callable[..., Any] = torch.compile(
        outline(graph_module) if outlined else graph_module, **given
    )
    return compiled

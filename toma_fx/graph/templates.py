"""Snippets of torch code, traced once per shape of their inputs and inserted many times."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from toma_fx.errors import RewriteError
from toma_fx.graph.verify import strides_of

Templates = dict[tuple[Hashable, Any], fx.GraphModule]
"""Traced snippets by key and input shapes."""


class Opaque:
    """A function as the target of one node: graphs with it run eagerly and can't be exported."""

    __name__ = "opaque"
    __module__ = __name__
    __qualname__ = "Opaque"

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self.function(*args)


def _empty_like(
    shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: torch.dtype, device: Any
) -> Tensor:
    """A tensor to trace with; dense where strides depend on the data, as those of a part do."""
    if strides is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def trace_snippet(
    templates: Templates,
    key: Hashable,
    function: Callable[..., Any],
    fakes: Sequence[Tensor],
    where: str,
) -> fx.GraphModule:
    """The graph of `function` on inputs like `fakes`, from `templates` or traced and kept there.

    Raises:
        RewriteError: the function can't be traced, or a size of an input depends on the data, and
            with it where its image begins or ends; `where` says for which pass.
    """
    for fake in fakes:
        if not all(isinstance(size, int) for size in fake.shape):
            raise RewriteError(
                "tokens can't be merged in a sequence whose length depends on the data",
                where=f"{where}: {key}",
                expected="lengths that the shapes of the inputs tell: a padded text, and a mask",
                got=f"a shape of {list(fake.shape)}",
                hint='scope="stack" or "block" merges outside of it, where it is no part of the '
                "residual stream; exclude= leaves the module alone",
            )
    like = tuple((tuple(f.shape), strides_of(f)[0], f.dtype, f.device) for f in fakes)
    if (key, like) not in templates:
        mode: Any = next(f.fake_mode for f in fakes if hasattr(f, "fake_mode"))
        try:
            with torch.no_grad(), mode:
                # spliced nodes share fake values, and tracing takes one value for one input
                own = [_empty_like(s, t, d, v) for s, t, d, v in like]
                templates[key, like] = make_fx(function, pre_dispatch=True)(*own)
        except Exception as error:  # a method's functions are anybody's code
            raise RewriteError(
                "tokens can't be merged here",
                where=f"{where}: {key}",
                got=f"{type(error).__name__}: {error}",
                hint="exclude= the module, and please report this model",
            ) from error
    return templates[key, like]

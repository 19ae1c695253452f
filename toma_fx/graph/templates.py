"""Snippets of torch code, traced once per shape of their inputs and inserted many times."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from toma_fx.errors import RewriteError

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


def trace_snippet(
    templates: Templates,
    key: Hashable,
    function: Callable[..., Any],
    fakes: Sequence[Tensor],
    where: str,
) -> fx.GraphModule:
    """The graph of `function` on inputs like `fakes`, from `templates` or traced and kept there.

    Raises:
        RewriteError: the function can't be traced; `where` says for which pass.
    """
    like = tuple((tuple(f.shape), f.stride(), f.dtype, f.device) for f in fakes)
    if (key, like) not in templates:
        mode: Any = next(f.fake_mode for f in fakes if hasattr(f, "fake_mode"))
        try:
            with torch.no_grad(), mode:
                # spliced nodes share fake values, and tracing takes one value for one input
                own = [torch.empty_strided(*shape, dtype=d, device=v) for *shape, d, v in like]
                templates[key, like] = make_fx(function, pre_dispatch=True)(*own)
        except Exception as error:  # a method's functions are anybody's code
            raise RewriteError(
                "tokens can't be merged here",
                where=f"{where}: {key}",
                got=f"{type(error).__name__}: {error}",
                hint="exclude= the module, and please report this model",
            ) from error
    return templates[key, like]

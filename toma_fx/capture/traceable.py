"""Forms that torch.export does not follow, traced as equal ones that it does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_DATA: Any = Tensor.data


class TraceableForms(TorchFunctionMode):
    """Replaces, while it is entered:

    x.data         by x.detach(), which shares its memory too
    x[i, :n] = v   by x[i, :] = where(arange < n, v, x[i, :]), n being a tensor and v a number
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function, or what replaces it."""
        if func == _DATA.__get__:
            return args[0].detach()
        if func == Tensor.__setitem__ and _fill_to_length(*args):
            return None
        return func(*args, **(kwargs or {}))


def _fill_to_length(x: Tensor, index: Any, value: Any) -> bool:
    """Write a number up to a length that a tensor tells; whether the write is one of that form."""
    parts = index if isinstance(index, tuple) else (index,)
    if not isinstance(value, (bool, int, float)) or not all(
        isinstance(part, (int, slice)) and not isinstance(part, bool) for part in parts
    ):
        return False
    by_data = [i for i, p in enumerate(parts) if isinstance(p, slice) and _is_length(p.stop)]
    if len(by_data) != 1:
        return False
    (at,) = by_data
    if parts[at].start not in (None, 0) or parts[at].step not in (None, 1):
        return False
    every = (*parts[:at], slice(None), *parts[at + 1 :])
    region = x[every]
    dim = sum(isinstance(part, slice) for part in parts[:at])
    size, length = region.shape[dim], parts[at].stop
    length = torch.where(length < 0, length + size, length)
    inside = torch.arange(size, device=x.device) < length.to(x.device)
    x[every] = torch.where(inside.view(-1, *[1] * (region.dim() - dim - 1)), value, region)
    return True


def _is_length(value: Any) -> bool:
    """Whether a bound is one whole number in a tensor."""
    return isinstance(value, Tensor) and value.dim() == 0 and not value.is_floating_point()

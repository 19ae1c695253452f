"""Weights of tensor subclasses, such as quantized ones, in captured graphs.

torch.export takes such a weight apart: for `to_q.weight` the graph holds the plain tensors that it
is made of, as `to_q.parametrizations.weight.original0` and so on. When the model moves, the weight
stays the same object and gets other parts. Graphs follow at once, and hold no memory that the model
gave up: an offloaded model leaves its device.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, fx

from toma_fx.compat.pytorch import inner_tensors

_TAKEN_APART = re.compile(r"(?:.+\.)?parametrizations\.\w+\.original(\d*)")


def plain_parts(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors that a weight is made of, in torch's order; none of a plain weight."""
    for inner in inner_tensors(tensor):
        yield from list(plain_parts(inner)) or [inner]


class Parts:
    """The tensors of a captured graph that are parts of its model's weights.

    Attributes:
        lost: paths in the graph of those whose weights have other parts now (on another device, of
            another dtype); until they are back the graph can't run.
    """

    def __init__(self, graph_module: fx.GraphModule | None = None, model: Any = None) -> None:
        self.lost: set[str] = set()
        self._weights: dict[int, Any] = {}  # by the ids of the graph's tensors
        self._references: dict[str, weakref.ref[Tensor]] = {}
        if graph_module is None:
            return
        own = dict(model.named_parameters())
        for path, parameter in graph_module.named_parameters():
            match = _TAKEN_APART.fullmatch(path)
            weight = own.get(re.sub(r"parametrizations\.(\w+)\.original\d*$", r"\1", path))
            if match is None or weight is None:
                continue
            self._weights[id(parameter)] = weight
            self._follow(path, parameter, weight, int(match[1] or 0), parameter.shape)

    def of(self, weights: Collection[int]) -> set[int]:
        """Ids of the graph's tensors that are parts of the weights with these ids."""
        return {key for key, weight in self._weights.items() if id(weight) in weights}

    def _follow(self, path: str, own: Any, weight: Any, index: int, shape: Any) -> None:
        """Let the graph's tensor lie where the part of the weight does, now and after moves."""
        part = next((p for i, p in enumerate(plain_parts(weight)) if i == index), None)
        form = shape, own.dtype, own.device
        fits = part is not None and (part.shape, part.dtype, part.device) == form
        if part is None or not fits:
            self.lost.add(path)
            own.data = own.data.new_empty(0)
        else:
            self.lost.discard(path)
            own.data = part.detach()
        if part is not None:

            def follow(_: Any) -> None:
                self._follow(path, own, weight, index, shape)

            self._references[path] = weakref.ref(part, follow)

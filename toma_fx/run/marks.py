"""Whether a tensor of one call is that of another: the very tensor, unchanged, or an equal one.

Nothing here waits for a GPU. There a tensor that was written to is told by its version, and equal
contents in another tensor are not seen; on the CPU contents are compared by a fingerprint.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from toma_fx.capture.grids import Raster, find_raster
from toma_fx.devices import is_computed_elsewhere


class Likeness(IntEnum):
    """How a tensor compares with one of an earlier call."""

    DIFFERENT = 0
    EQUAL = 1
    SAME = 2


@dataclass(frozen=True)
class Mark:
    """A tensor that a call had.

    Attributes:
        tensor: it, while it lives. content: fingerprint on the CPU, elsewhere the number of writes.
    """

    tensor: weakref.ref[Tensor]
    content: Hashable

    @classmethod
    def of(cls, tensor: Tensor) -> Mark:
        """The mark of a tensor."""
        return cls(weakref.ref(tensor), _content(tensor))

    def compare(self, other: Mark) -> Likeness:
        """How the tensor of `other` compares with this one."""
        tensor = other.tensor()
        if self.content != other.content:
            return Likeness.DIFFERENT
        if tensor is not None and self.tensor() is tensor:
            return Likeness.SAME
        return Likeness.EQUAL if isinstance(self.content, tuple) else Likeness.DIFFERENT


def _content(tensor: Tensor) -> Hashable:
    """A fingerprint on the CPU; elsewhere the number of writes, or None where none are counted."""
    strided = type(tensor) is Tensor and tensor.layout is torch.strided
    if strided and not is_computed_elsewhere(tensor):
        return _fingerprint(tensor.detach())
    return None if tensor.is_inference() else tensor._version


def _fingerprint(tensor: Tensor) -> tuple[Hashable, ...]:
    """(shape, dtype, checksum of the values)"""
    with torch.no_grad():
        values = tensor.resolve_conj().resolve_neg().reshape(-1)
        content: Any = values.view(torch.uint8).numpy() if values.numel() else b""
    return tuple(tensor.shape), tensor.dtype, zlib.crc32(content)


@dataclass(frozen=True)
class Rasters:
    """What the inputs of a call enumerate, and the tensors that told it."""

    values: tuple[Raster | None, ...]
    ids: tuple[tuple[int, Mark], ...]

    @classmethod
    def read(cls, leaves: Sequence[Any]) -> Rasters:
        """Read the position ids among the leaves of a call; on a GPU this waits for it."""
        values = tuple(find_raster(leaf) for leaf in leaves)
        ids = [(i, Mark.of(leaves[i])) for i, found in enumerate(values) if found is not None]
        return cls(values, tuple(ids))

    def are_of(self, leaves: Sequence[Any]) -> bool:
        """Whether these leaves hold what was read."""
        return all(mark.compare(Mark.of(leaves[i])) > Likeness.DIFFERENT for i, mark in self.ids)

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

SEEN = 8
"""Tensors at one place of a call whose contents are remembered."""


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


class PositionIds:
    """Which leaves of a signature's calls hold position ids, and what those enumerate.

    Every tensor is read once, as long as it is not written to. A leaf that enumerates nothing in
    the first call is no position ids, and is not read again.
    """

    def __init__(self, leaves: Sequence[Any]) -> None:
        found = {i: (leaf, find_raster(leaf)) for i, leaf in enumerate(leaves)}
        self._count = len(leaves)
        self._seen: dict[int, list[tuple[Mark, Raster | None]]] = {
            i: [(Mark.of(leaf), raster)] for i, (leaf, raster) in found.items() if raster
        }

    def read(self, leaves: Sequence[Any]) -> tuple[Raster | None, ...]:
        """What each leaf enumerates; on a GPU reading a new one waits for it."""
        values: list[Raster | None] = [None] * self._count
        for i, seen in self._seen.items():
            values[i] = self._raster(seen, leaves[i])
        return tuple(values)

    def _raster(self, seen: list[tuple[Mark, Raster | None]], leaf: Tensor) -> Raster | None:
        mark = Mark.of(leaf)
        for known, raster in reversed(seen):
            if known.compare(mark) > Likeness.DIFFERENT:
                return raster
        raster = find_raster(leaf)
        seen.append((mark, raster))
        del seen[:-SEEN]
        return raster

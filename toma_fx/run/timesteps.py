"""Timesteps as numbers, with as few waits for a GPU as can be."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from toma_fx.compat.pytorch import viewed_tensor
from toma_fx.devices import is_computed_elsewhere

TABLES = 16
"""Tables of timesteps whose values are kept."""
LONGEST = 4096
"""Entries of a tensor that may be such a table."""


class TimestepValue:
    """A timestep, as the call has it: on a GPU, reading it waits for all that was asked before.

    A step of a scheduler's table (`for t in scheduler.timesteps`) is a view of it: then the table
    is read, once, before anything of the generation is asked.
    """

    def __init__(self, value: Any) -> None:
        self._value = value
        self._waits = isinstance(value, Tensor) and is_computed_elsewhere(value)

    def peek(self) -> float | None:
        """It as a number, if that is known without waiting."""
        return None if self._waits else self.read()

    def read(self) -> float | None:
        """It as a number; None where there is none."""
        number = entry_of_table(self._value) if self._waits else None
        if number is None:
            number = number_of(self._value)
        self._value, self._waits = number, False
        return number


def number_of(timestep: Any) -> float | None:
    """A timestep as a number: the largest where rows or tokens have their own; None if none."""
    if isinstance(timestep, Tensor):
        count = timestep.numel()
        return float(timestep.detach().max() if count > 1 else timestep) if count else None
    return float(timestep) if isinstance(timestep, (int, float)) else None


_tables: dict[int, tuple[weakref.ref[Tensor], int, list[float]]] = {}


def entry_of_table(value: Tensor) -> float | None:
    """A number that is an entry of a table, or one repeated; None if it is no view of a table.

    The values of a table are read once for each time that it was written to.
    """
    table = None if value.is_neg() else viewed_tensor(value)  # a view with the sign to change
    if table is None or table.dim() != 1 or table.numel() > LONGEST or value.numel() < 1:
        return None
    layout = zip(value.shape, value.stride(), strict=True)
    if value.dtype != table.dtype or any(size > 1 and stride for size, stride in layout):
        return None
    known = _tables.get(id(table))
    if known is None or known[0]() is not table or known[1] != table._version:
        known = weakref.ref(table), table._version, table.detach().tolist()
        if len(_tables) >= TABLES:
            _tables.clear()
        _tables[id(table)] = known
    place = (value.storage_offset() - table.storage_offset()) // (table.stride(0) or 1)
    return float(known[2][place])

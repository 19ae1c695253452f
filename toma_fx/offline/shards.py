"""Shards: which share of the pictures a process draws."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Self

from toma_fx.errors import ConfigError
from toma_fx.measure.processes import rank_and_count
from toma_fx.methods.checks import is_count


@dataclass(frozen=True)
class Shard:
    """One of several processes that share the pictures.

    Attributes:
        index: from 0. count: of all shards.

    Raises:
        ConfigError: no such shard.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not (is_count(self.count, 1) and is_count(self.index, 0) and self.index < self.count):
            raise _malformed(f"{self.index}/{self.count}")

    @classmethod
    def of(cls, value: Any) -> Self:
        """A shard from "I/N", (I, N) or a shard; None: that of the process, by its launcher.

        Raises:
            ConfigError: none of these.
        """
        if isinstance(value, cls):
            return value
        if value is None:
            return cls(*rank_and_count())
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}/[0-9]{1,9}", value):
            value = tuple(map(int, value.split("/")))
        if not (isinstance(value, tuple) and len(value) == 2):
            raise _malformed(repr(value))
        return cls(*value)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def _malformed(got: str) -> ConfigError:
    return ConfigError(
        "no shard",
        where="shard",
        expected='"I/N", with I from 0 to N - 1: 0/2 and 1/2 are both shards of two',
        got=got,
    )

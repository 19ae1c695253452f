"""Several processes that share the pictures: who draws which, and failing together.

Started by `torchrun` or `accelerate launch`, the processes find each other by the environment. What
they exchange is small and goes through gloo, whatever the model's own group uses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed

from toma_fx.errors import ResultsError

T = TypeVar("T")
PATIENCE = timedelta(days=2)
"""How long a process waits for the others, which may have more pictures to draw."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        rank: this one's. count: how many. group: how they exchange; None for a single one.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this one writes what there is once."""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> T:
        """Do something in every process, and wait until all have.

        Raises:
            ResultsError: another process failed. What `work` raised here, whatever it is: the
                others must not wait for this process.
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        words = "" if failure is None else f"{type(failure).__name__}: {failure}"
        everyone = self.gathered(words)
        if failure is not None:
            raise failure
        others = [f"process {i}: {words}" for i, words in enumerate(everyone) if words]
        if others:
            raise ResultsError("another process failed", got="; ".join(others))
        return result  # type: ignore[return-value]

    def alone(self, work: Callable[[], Any]) -> None:
        """Do something in the first process, while the others wait."""
        self.together(work if self.first else lambda: None)

    def gathered(self, value: T) -> list[T]:
        """The value of every process."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value, group=self.group)
        return values

    def told(self, value: T) -> T:
        """The first process's value, in every process."""
        if self.group is None:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0, group=self.group)
        return values[0]


def rank_and_count() -> tuple[int, int]:
    """This process's rank and the number of processes, by a group or by the launcher."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of this run: those of a group that there is, or that a launcher started."""
    rank, count = rank_and_count()
    if count < 2:
        yield Processes()
        return
    inside = distributed.is_initialized()
    if not inside:
        distributed.init_process_group("gloo", timeout=PATIENCE)
    group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield Processes(rank, count, group)
    finally:
        if not inside:
            distributed.destroy_process_group()

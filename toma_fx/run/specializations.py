"""The bounded cache of specializations."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress

from torch import nn

from toma_fx.events import emit
from toma_fx.run.programs import Specialization
from toma_fx.run.tracing import tracing

_log = logging.getLogger("toma_fx.run")
THRASHING = 4
"""Captures in a row that are worth a warning."""


def _shapes(specialization: Specialization) -> str:
    """The shapes of the inputs, for a log: "sample 1x4x64x64, timestep scalar"."""
    tensors = [(i.name, i.tensor) for i in specialization.captured.inputs if i.tensor is not None]
    return ", ".join(f"{name} {'x'.join(map(str, t.shape)) or 'scalar'}" for name, t in tensors)


def _differences(about: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Names under which two calls say different things."""
    return [name for name in {**other, **about} if about.get(name) != other.get(name)]


def _reason(about: Mapping[str, str], known: Collection[Mapping[str, str]]) -> str:
    """Why no graph that there is serves a call, against the one that differs least; for a log."""
    if not known:
        return ""
    nearest = min(known, key=lambda other: len(_differences(about, other)))
    changes = (
        f"{name} is {about.get(name, 'not given')[:80]}, was {nearest.get(name, 'not given')[:80]}"
        for name in _differences(about, nearest)
    )
    return "; " + "; ".join(changes)


class SpecializationCache:
    """The specializations used last, at most `capacity`; safe to share between threads.

    Args:
        capacity: how many. limit: the name of the option or constant that says so.
    """

    def __init__(self, capacity: int, limit: str = "max_signatures") -> None:
        self.capacity, self.limit = capacity, limit
        self.captures = 0
        self._misses: list[Mapping[str, str]] = []
        self._about: dict[Hashable, Mapping[str, str]] = {}
        self._entries: OrderedDict[Hashable, Specialization] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, call: tuple[Hashable, ...]) -> list[Specialization]:
        """Those that live of keys which begin with this; the one used last at the end."""
        with self._lock:
            entries = list(self._entries.items())
        size = len(call)
        return [
            found
            for key, found in entries
            if isinstance(key, tuple) and key[:size] == call and not found.parts.lost
        ]

    def values(self) -> tuple[Specialization, ...]:
        """Those alive, the one used last at the end."""
        with self._lock:
            return tuple(self._entries.values())

    def get(
        self,
        key: Hashable,
        make: Callable[[], Specialization],
        describe: Callable[[], Mapping[str, str]],
    ) -> Specialization:
        """The specialization of a key, made if need be; drops the one unused longest.

        Args:
            make: makes it. describe: says of what makes up the key, by name, for the log.
        """
        known = self._entries.get(key)  # without the lock: a step holds none
        if known is not None and not known.parts.lost:
            with suppress(KeyError):  # another thread dropped it just now
                self._entries.move_to_end(key)
            self._misses.clear()
            return known
        with tracing():
            if key not in self._entries or self._entries[key].parts.lost:
                start = time.perf_counter()
                found = make()
                about, seconds = describe(), time.perf_counter() - start
                reason = _reason(about, self._about.values())
                emit(
                    _log,
                    logging.INFO,
                    "plan" if found.derived else "capture",
                    "%s a graph for %s in %.1f s%s",
                    "planned anew" if found.derived else "captured",
                    _shapes(found),
                    seconds,
                    reason,
                    seconds=seconds,
                    inputs=_shapes(found),
                    reason=reason.lstrip("; "),
                    kept=len(self._entries) + 1,
                )
                with self._lock:
                    self._entries[key], self._about[key] = found, about
                    self.captures += not found.derived
                    self._note_miss(about)
                    while len(self._entries) > self.capacity:
                        self._log_dropped(self._drop(next(iter(self._entries))))
            return self._entries[key]

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Calls inside are known to be new."""
        yield
        self._misses.clear()

    def _drop(self, key: Hashable) -> Specialization:
        self._about.pop(key, None)
        return self._entries.pop(key)

    def _note_miss(self, about: Mapping[str, str]) -> None:
        """Warn where no call finds a graph that an earlier one left."""
        self._misses.append(about)
        if len(self._misses) < THRASHING:
            return
        differing = [_differences(about, other) for other in self._misses]
        names = sorted({name for names in differing for name in names})
        emit(
            _log,
            logging.WARNING,
            "thrash",
            "the last %d calls were captured one by one; they differ in %s. Each capture costs "
            "seconds, and its programs are compiled anew: call with few sizes (`warmup` makes them "
            "ready), and give numbers that change as tensors",
            THRASHING,
            ", ".join(names),
            calls=THRASHING,
            differing=names,
        )
        self._misses.clear()

    def _log_dropped(self, dropped: Specialization) -> None:
        emit(
            _log,
            logging.WARNING,
            "drop",
            "the graph for %s is dropped (%s=%d); the next call with its shapes is captured anew",
            _shapes(dropped),
            self.limit,
            self.capacity,
            inputs=_shapes(dropped),
            reason=self.limit,
        )

    def refresh(self, model: nn.Module) -> None:
        """Follow a changed model: drop graphs over parameters that are gone, rebind buffers."""
        buffers = dict(model.named_buffers())
        with self._lock:
            for key, found in list(self._entries.items()):
                if found.fits(model):
                    found.rebind(buffers)
                else:
                    emit(
                        _log,
                        logging.INFO,
                        "drop",
                        "the graph for %s is dropped: other parameters",
                        _shapes(found),
                        inputs=_shapes(found),
                        reason="other parameters",
                    )
                    self._drop(key)

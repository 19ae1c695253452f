"""A file of measurements that a later run goes on with, and the time that is left for them."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import save

NO_TIME = "no time left"


class OutOfTime(BaseException):
    """Raised in what runs when the time is over; compilers that catch `Exception` don't stop it."""


class Deadline:
    """The time that measurements have together.

    Args:
        minutes: in all, None for no limit. start: when it began, by `clock`, in seconds.
    """

    def __init__(
        self, minutes: float | None, start: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._end = None if minutes is None else start + 60 * minutes
        self._clock = clock

    def left(self) -> float:
        """Seconds that are left, infinity without a limit."""
        return float("inf") if self._end is None else self._end - self._clock()

    @contextmanager
    def enforce(self) -> Iterator[None]:
        """Raise `OutOfTime` inside as soon as the time is over; for the main thread."""
        if self._end is None:
            yield
            return

        def stop(*_: Any) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, stop)
        # repeated: Python drops what is raised in a finalizer
        signal.setitimer(signal.ITIMER_REAL, max(self.left(), 1e-3), 1.0)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class Ledger:
    """Measurements by name in a JSON file, written after each.

    Each is {"command", "versions", "seconds", "result"}, or has "error" instead of "result", or is
    {"skipped": why}.

    Args:
        path: of the file; None keeps all in memory. about: facts of this run. same: the facts in
            which the file must agree with this run for it to go on with it.

    Raises:
        SystemExit: the file is of another device, say.
    """

    def __init__(self, path: Path | None, about: dict[str, Any], same: tuple[str, ...]) -> None:
        self.path = path
        measurements: dict[str, Any] = {}
        if path is not None and path.exists():
            found = json.loads(path.read_text())
            for name in same:
                if found[name] != about[name]:
                    raise SystemExit(
                        f"{path}: {name} is {found[name]!r} there, {about[name]!r} here"
                    )
            measurements = found["measurements"]
        self.results = {**about, "measurements": measurements}

    def has(self, name: str, command: str, versions: dict[str, str]) -> bool:
        """Whether there is a result of the same command and versions."""
        entry = self.results["measurements"].get(name, {})
        return "result" in entry and (entry["command"], entry["versions"]) == (command, versions)

    def add(self, name: str, **entry: Any) -> None:
        """Note a measurement, or why there is none, and write the file."""
        self.results["measurements"][name] = entry
        save(self.results, self.path)


def measure_all(
    ledger: Ledger,
    deadline: Deadline,
    names: dict[str, str],
    versions: dict[str, str],
    measure: Callable[[str], Any],
) -> list[str]:
    """Measure what the file does not hold yet, in order, until the time is over.

    Args:
        names: of measurements, with the command of each. measure: makes the result of a name.

    Returns:
        The names of those that failed.
    """
    failed = []
    for name, command in names.items():
        if ledger.has(name, command, versions):
            print(f"{name}: measured before", flush=True)
            continue
        if deadline.left() <= 0:
            ledger.add(name, skipped=NO_TIME)
            print(f"{name}: skipped: {NO_TIME}", flush=True)
            continue
        start = time.monotonic()
        about = {"command": command, "versions": versions}
        try:
            with deadline.enforce():
                result = measure(name)
        except OutOfTime:
            ledger.add(name, skipped=NO_TIME)
            print(f"{name}: skipped: {NO_TIME}", flush=True)
        except Exception as error:  # whatever a compiler or a device raises: the others still count
            first = (str(error).strip().splitlines() or [""])[0]
            ledger.add(name, **about, error=f"{type(error).__name__}: {first}")
            print(f"{name}: failed: {type(error).__name__}: {error}", flush=True)
            failed.append(name)
        else:
            seconds = time.monotonic() - start
            ledger.add(name, **about, seconds=seconds, result=result)
            print(f"{name}: {seconds:.0f} s", flush=True)
    return failed

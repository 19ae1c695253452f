"""What happens to a model, said once: a line in the log, and a value for whoever listens.

    toma_fx.on_event(lambda event: metrics.count(event.name))

The log is that of the standard library, under the name "toma_fx". The environment variable
`TOMA_FX_LOG` shows it on stderr, from a level on ("info", "debug", ...).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from toma_fx.errors import ConfigError

VARIABLE = "TOMA_FX_LOG"
LEVELS = ("debug", "info", "warning", "error")
Name = Literal["parity", "capture", "plan", "outline", "compile", "warmup", "drop", "thrash"]
NAMES: tuple[str, ...] = get_args(Name)
"""What happens: a graph was compared with its model, was captured, planned again for another
configuration, had its blocks outlined; a program was compiled; a call was made ready; a graph was
dropped; calls find no graph again and again."""

_listeners: list[Callable[[Event], Any]] = []
_lock = threading.Lock()
_log = logging.getLogger("toma_fx.events")


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        name: one of `NAMES`. message: the line in the log. seconds: that it took, if it took time.
        about: its figures and reasons, by name.
    """

    name: str
    message: str
    seconds: float | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


def on_event(listener: Callable[[Event], Any]) -> Callable[[], None]:
    """Call `listener` with every `Event` from here on, in the thread where it happens.

    What it raises is logged and goes no further.

    Returns:
        A function that ends it.

    Raises:
        ConfigError: it can't be called.
    """
    if not callable(listener):
        raise ConfigError(
            "a listener can't be called",
            where="on_event",
            expected="a function of one event",
            got=type(listener).__name__,
        )
    with _lock:
        _listeners.append(listener)

    def remove() -> None:
        with _lock:
            if listener in _listeners:
                _listeners.remove(listener)

    return remove


def emit(
    log: logging.Logger,
    level: int,
    name: Name,
    message: str,
    *args: Any,
    seconds: float | None = None,
    **about: Any,
) -> None:
    """Log a line, and tell those who listen.

    Args:
        log, level, message, args: of the line. name, seconds, about: of the event.
    """
    log.log(level, message, *args, stacklevel=2)
    if not _listeners:
        return
    event = Event(name, message % args if args else message, seconds, about)
    for listener in tuple(_listeners):
        try:
            listener(event)
        except Exception:  # metrics must not end a generation
            _log.exception("a listener of events failed")


def show_log() -> None:
    """Show the log on stderr, if the environment asks for it."""
    asked = os.environ.get(VARIABLE, "").strip().lower()
    if not asked:
        return
    logger = logging.getLogger("toma_fx")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False  # once is enough
    if asked in LEVELS:
        logger.setLevel(asked.upper())
    else:
        logger.warning("%s=%r is not a level: %s", VARIABLE, asked, ", ".join(LEVELS))

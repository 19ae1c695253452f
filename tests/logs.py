"""What the package logs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def logged(level: int, name: str = "toma_fx.run") -> Iterator[list[str]]:
    """Messages of a level, of a logger and those below it, while the `with` lasts."""
    messages: list[str] = []
    handler = logging.Handler()
    keep = lambda r: messages.append(r.getMessage()) if r.levelno == level else None  # noqa: E731
    handler.emit = keep  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(min(level, before or level))  # one inside another hears both
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)

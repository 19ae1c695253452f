"""Printing what models and artifacts say: nothing in it steers the terminal, or is markup."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co"})
"""Categories of characters that are no text: control codes, changes of direction, half pairs."""


def printable(text: str) -> str:
    """A text with what is none of it written out, as `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in HIDDEN else ascii(c)[1:-1] for c in text
    )


class Terminal(Console):
    """A console that prints text as it is."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """The pieces of what is printed, with their own control codes alone."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


def prepare_streams() -> None:
    """Write out what the encoding of a stream lacks, where it would raise."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def leave_closed_pipe() -> None:
    """Nobody reads the output any more: let nothing be said of it when the process ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)

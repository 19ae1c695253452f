"""Values that print as rich tables."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult


class Printed:
    """Prints what `_parts` gives."""

    def _parts(self) -> list[Any]:
        raise NotImplementedError

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(*self._parts())

    def __str__(self) -> str:
        out = StringIO()
        Console(file=out, width=140, color_system=None).print(self)
        return out.getvalue()

"""Values that print as rich tables."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


class Printable:
    """Prints `_renderables` one below the other."""

    def _renderables(self) -> list[Any]:
        raise NotImplementedError

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.console import Group

        yield Group(*self._renderables())

    def __str__(self) -> str:
        from rich.console import Console

        out = StringIO()
        Console(file=out, width=140, color_system=None).print(self)
        return out.getvalue()

"""Values that print as rich tables."""

from __future__ import annotations

import shutil
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

WIDTH = 100
"""Columns where no terminal and no `COLUMNS` in the environment says how many."""


class Printable:
    """Prints `_renderables` one below the other, as wide as the terminal; as HTML in a notebook."""

    def _renderables(self) -> list[Any]:
        raise NotImplementedError

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.console import Group

        yield Group(*self._renderables())

    def __str__(self) -> str:
        out = StringIO()
        width = shutil.get_terminal_size((WIDTH, 24)).columns
        _console(file=out, width=width, color_system=None).print(self)
        return out.getvalue()

    def _repr_html_(self) -> str:
        console = _console(file=StringIO(), width=WIDTH, record=True)
        console.print(self)
        form = '<pre style="font-family: monospace; line-height: 1.3">{code}</pre>'
        return console.export_html(inline_styles=True, code_format=form)


def _console(**options: Any) -> Console:
    """A console that writes to its file; in a notebook rich would show all it prints there, too."""
    from rich.console import Console

    return Console(force_jupyter=False, **options)

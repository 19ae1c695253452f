"""Graphs between passes as text files, for whoever looks for the pass that did it.

`TOMA_FX_DUMP=folder`, or `with dumping(folder):` around the work, writes one folder per run of
passes, numbered in the order of the runs:

    folder/000_UNet2DConditionModel_capture/    00_input.txt  01_flatten_signature.txt  ...
    folder/001_UNet2DConditionModel_refresh/    00_input.txt  01_provide_patterns.txt  ...

A file holds the graph after its pass, so that the file before it is the graph before the pass.
`passes.txt` lists every pass with the number of its changes; one that changed nothing has no file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

from torch import fx

from toma_fx.errors import ConfigError
from toma_fx.graph.printing import print_graph

VARIABLE = "TOMA_FX_DUMP"
_folder: ContextVar[str | Path | None] = ContextVar("toma_fx_dump", default=None)


@contextmanager
def dumping(folder: str | Path | None) -> Iterator[None]:
    """Dump the graphs of all passes that run inside into `folder`; None leaves it to the variable.

    It holds for this thread (or task) alone.

    Raises:
        ConfigError: no path.
    """
    if not isinstance(folder, (str, os.PathLike, NoneType)):
        raise ConfigError(
            "dump= is no folder", where="dump", expected="a path", got=type(folder).__name__
        )
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


@dataclass(frozen=True)
class Dump:
    """The folder of one run of passes; None writes nothing."""

    folder: Path | None

    @classmethod
    def of(cls, title: str) -> Dump:
        """A new numbered folder below the one to dump into, if there is one.

        Raises:
            ConfigError: the folder can't be made.
        """
        parent = _folder.get() or os.environ.get(VARIABLE)
        if not parent:
            return cls(None)
        try:
            Path(parent).mkdir(parents=True, exist_ok=True)
            number = len(list(Path(parent).iterdir()))
            while (folder := Path(parent) / f"{number:03d}_{title}").exists():
                number += 1
            folder.mkdir()
        except OSError as error:
            raise ConfigError(
                "graphs can't be written there", where=f"dump, or {VARIABLE}", got=str(error)
            ) from error
        return cls(folder)

    def graph(self, number: int, name: str, graph: fx.Graph) -> None:
        """Write a graph as `<number>_<name>.txt`."""
        if self.folder is not None:
            (self.folder / f"{number:02d}_{name}.txt").write_text(print_graph(graph))

    def line(self, text: str) -> None:
        """Append a line to `passes.txt`."""
        if self.folder is not None:
            with (self.folder / "passes.txt").open("a") as file:
                file.write(f"{text}\n")

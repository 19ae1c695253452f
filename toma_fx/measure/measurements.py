"""What a search has measured, in a folder: it goes on after a kill, and serves other targets.

run.json          what is measured; another run may not write here
measured.jsonl    a line for each measurement: what it is of, and its value
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from toma_fx.errors import ResultsError
from toma_fx.measure.records import append_lines, open_folder, read_lines

Value = TypeVar("Value")
MEASURED = "measured.jsonl"


class Measurements:
    """Values by what they are of, each measured once.

    Args:
        folder: where they are kept; None keeps them in memory.
        settings: what all of them depend on.

    Raises:
        ResultsError: the folder holds results of other settings, something else, or damaged lines.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self._path = None if folder is None else folder / MEASURED
        self._known: dict[str, Any] = {}
        if folder is not None and self._path is not None:
            open_folder(folder, settings)
            if self._path.exists():
                self._read(self._path)

    def _read(self, path: Path) -> None:
        for number, line in read_lines(path):
            try:
                content = json.loads(line)
                self._known[_text(content["of"])] = content["value"]
            except (ValueError, KeyError, TypeError) as error:
                raise ResultsError(
                    "a measurement is damaged",
                    where=f"{path}, line {number}",
                    expected='{"of": ..., "value": ...}',
                    got=f"{type(error).__name__}: {line[:60].decode(errors='replace')!r}",
                    hint="delete the line: it is measured again",
                ) from error

    def get(self, of: Mapping[str, Any], measure: Callable[[], Value]) -> Value:
        """The value of something, JSON-able: the known one, or what `measure` returns."""
        key = _text(of)
        if key not in self._known:
            self._known[key] = json.loads(json.dumps(measure()))
            if self._path is not None:
                line = json.dumps({"of": of, "value": self._known[key]})
                append_lines(self._path, [line + "\n"])
        value: Value = self._known[key]
        return value


def _text(of: Mapping[str, Any]) -> str:
    return json.dumps(of, sort_keys=True)

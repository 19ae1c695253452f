"""Records of pictures in a folder: JSON Lines that survive a kill.

run.json             what is measured; another run may not write here
images.jsonl         a line for each picture and configuration
images-1.jsonl       the same, of process 1, until the run is complete
pictures/0-original/00000.png
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toma_fx.errors import ResultsError
from toma_fx.files import is_part, write_file, write_new_file
from toma_fx.methods.checks import is_count, is_number

RUN, IMAGES = "run.json", "images.jsonl"
ABSENT = object()
"""Stands for a setting that only the other run has."""


@dataclass(frozen=True)
class Record:
    """Scores of one picture with one configuration.

    Attributes:
        index: of the case. config: name. prompt, seed: of the case. scores: by metric.
    """

    index: int
    config: str
    prompt: str
    seed: int
    scores: Mapping[str, float]

    def __post_init__(self) -> None:
        numbers = isinstance(self.scores, Mapping) and all(map(is_number, self.scores.values()))
        if not (is_count(self.index, 0) and isinstance(self.config, str) and numbers):
            raise ValueError("not a record")

    def line(self) -> str:
        """It as a line."""
        fields = {**vars(self), "scores": dict(self.scores)}
        return json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n"


class Records:
    """The records of a folder, and the file that this process adds to.

    Attributes:
        folder: of the run. names: of the configurations, in order. known: records by (index,
            configuration).
    """

    def __init__(self, folder: Path, names: Sequence[str], rank: int = 0) -> None:
        self.folder, self.names = folder, tuple(names)
        self.known: dict[tuple[int, str], Record] = {}
        self._path = folder / (f"images-{rank}.jsonl" if rank else IMAGES)

    def open(self, settings: Mapping[str, Any]) -> None:
        """Make the folder, or check that it holds a run of these settings; as `open_folder`."""
        open_folder(self.folder, settings)

    def read(self) -> None:
        """Read what all processes have written. A last line that a kill broke off is cut away.

        Raises:
            ResultsError: another line is damaged, or is of another run.
        """
        self.known.clear()
        for path in sorted(self.folder.glob("images*.jsonl")):
            for record in self._read_file(path):
                key = record.index, record.config
                if key in self.known:  # a later line adds scores
                    scores = {**self.known[key].scores, **record.scores}
                    record = Record(*key, record.prompt, record.seed, scores)
                self.known[key] = record

    def _read_file(self, path: Path) -> list[Record]:
        records = []
        for number, line in read_lines(path):
            try:
                record = Record(**json.loads(line))
                if record.config not in self.names:
                    raise ValueError(f"unknown configuration {record.config!r}")
            except (ValueError, TypeError) as error:
                raise ResultsError(
                    "a record is damaged",
                    where=f"{path}, line {number}",
                    expected="a picture's scores as JSON",
                    got=f"{error}: {line[:60].decode(errors='replace')!r}",
                    hint="delete the line: its picture is scored again",
                ) from error
            records.append(record)
        return records

    def add(self, records: Sequence[Record]) -> None:
        """Append records, at once on the disk."""
        for record in records:
            self.known[record.index, record.config] = record
        append_lines(self._path, (record.line() for record in records))

    def merge(self) -> None:
        """Make one sorted file of those of all processes."""
        self.read()
        order = {name: i for i, name in enumerate(self.names)}
        ordered = sorted(self.known.values(), key=lambda r: (r.index, order[r.config]))
        write_file(self.folder / IMAGES, "".join(record.line() for record in ordered))
        for path in self.folder.glob("images-*.jsonl"):
            path.unlink()

    # -- pictures -------------------------------------------------------------------------------

    def picture(self, index: int, config: str) -> Path:
        """Where a picture is kept."""
        word = re.sub(r"[^A-Za-z0-9.=-]+", "_", config)[:40]
        folder = f"{self.names.index(config)}-{word}"
        return self.folder / "pictures" / folder / f"{index:05}.png"

    def save_picture(self, index: int, config: str, picture: Tensor) -> None:
        """Keep a picture [3, H, W] in [0, 1], in 8 bits; all or nothing."""
        path = self.picture(index, config)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, png(picture))

    def load_picture(self, index: int, config: str) -> Tensor | None:
        """A kept picture [3, H, W] in [0, 1]; None if it is not there or damaged."""
        import numpy as np
        from PIL import Image

        try:
            with Image.open(self.picture(index, config)) as image:
                pixels = np.array(image.convert("RGB"))
        except (OSError, SyntaxError):  # the latter of a damaged PNG
            return None
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def open_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make a folder of results, or check that it holds those of a run with these settings.

    Several processes may do so at once.

    Raises:
        ResultsError: another run's results, or something else. OSError: it can't be written.
    """
    path = folder / RUN
    present: list[str] = []
    if folder.is_dir():
        present = sorted(p.name for p in folder.iterdir() if not is_part(p))
    elif folder.exists():
        present = ["a file"]
    if present and RUN not in present:
        raise ResultsError(
            "the output folder holds something else",
            where=str(folder),
            expected=f"a new or empty folder, or one with {RUN}",
            got=", ".join(present[:5]),
            hint="give another folder",
        )
    if not present:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"fingerprint": fingerprint(settings), "settings": settings}
        try:
            write_new_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
            return
        except FileExistsError:
            pass  # another process made it meanwhile
    _check_run(path, settings)


def _check_run(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise unless the file is of a run with these settings."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        own, known = content["fingerprint"], content["settings"]
        intact = own == fingerprint(known)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(
            f"{RUN} can't be read", where=str(path), got=f"{type(error).__name__}: {error}"
        ) from error
    if not intact:
        raise ResultsError(f"{RUN} was changed", where=str(path), expected=f"fingerprint {own}")
    if own == fingerprint(settings):
        return
    differences = list(_differences(known, settings))
    raise ResultsError(
        "the output folder holds results of other settings",
        where=str(path.parent),
        expected="; ".join(f"{name} {before}" for name, before, _ in differences[:8]),
        got="; ".join(f"{name} {now}" for name, _, now in differences[:8]),
        hint="give another folder, or the same settings to go on with that run",
    )


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """(name such as "settings.steps", text before, text now) of each setting that differs."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in {**before, **now}:
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(before.get(key, ABSENT), now.get(key, ABSENT), inner)
    elif before != now:
        yield name, _brief(before), _brief(now)


def _brief(value: Any) -> str:
    return "not there" if value is ABSENT else json.dumps(value, ensure_ascii=False)[:120]


def read_lines(path: Path) -> list[tuple[int, bytes]]:
    """The lines of a file that is only added to, with their numbers, from 1.

    A last line that a kill broke off is cut away.
    """
    cut_broken_line(path)
    return list(enumerate(path.read_bytes().split(b"\n")[:-1], 1))


def cut_broken_line(path: Path) -> None:
    """Cut away the last line of a file that is only added to, if a kill broke it off."""
    data = path.read_bytes()
    if broken := data.rpartition(b"\n")[2]:
        with open(path, "r+b") as file:
            file.truncate(len(data) - len(broken))


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Add lines to a file, at once on the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Digest of settings."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def png(picture: Tensor) -> bytes:
    """A picture [3, H, W] in [0, 1] as a PNG file, in 8 bits."""
    from PIL import Image

    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(data := BytesIO(), format="PNG")
    return data.getvalue()

"""A folder of pictures that several processes fill, without talking to each other.

run.json                every setting of the run; one with other settings may not write here
pictures/00000.png      by the index of the picture
ledger-0-of-2.jsonl     a line for each picture that shard 0 of 2 has drawn
pictures.jsonl          the lines of all ledgers in order, once every picture is there

A picture counts once its line is in a ledger, and the line is written after the picture. Every
process reads all ledgers and adds to its own alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout
from torch import Tensor

from toma_fx.errors import ResultsError
from toma_fx.files import write_file
from toma_fx.measure.cases import Case
from toma_fx.measure.records import append_lines, cut_broken_line, png
from toma_fx.methods.checks import is_count
from toma_fx.offline.shards import Shard

PICTURES, INDEX = "pictures", "pictures.jsonl"


@dataclass(frozen=True)
class Picture:
    """One picture of a run, as its ledger says.

    Attributes:
        index: of its prompt, and of the picture among all. prompt, seed: of its case. file: inside
            the folder. bytes, sha256: of the file. finite: whether all values were numbers; those
            that were not are black.
    """

    index: int
    prompt: str
    seed: int
    file: str
    bytes: int
    sha256: str
    finite: bool = True

    def __post_init__(self) -> None:
        counts = is_count(self.index, 0) and is_count(self.bytes, 1)
        if not (counts and self.file == file_of(self.index) and isinstance(self.sha256, str)):
            raise ValueError("not a picture")

    def line(self) -> str:
        """It as a line."""
        return json.dumps(vars(self), ensure_ascii=False) + "\n"


def file_of(index: int) -> str:
    """Where a picture is, inside the folder."""
    return f"{PICTURES}/{index:05}.png"


class Ledger:
    """The pictures that a folder holds.

    Attributes:
        folder: of the run. known: pictures by their index.
    """

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.known = folder, dict[int, Picture]()
        self._total = total
        self._read: dict[Path, tuple[int, int]] = {}

    @classmethod
    @contextmanager
    def held(cls, folder: Path, total: int, shard: Shard) -> Iterator[tuple[Self, Path]]:
        """What the folder holds, and the ledger that this process alone adds to.

        Raises:
            ResultsError: another process draws this shard, or a ledger is damaged.
        """
        path = folder / f"ledger-{shard.index}-of-{shard.count}.jsonl"
        lock = FileLock(folder / f".{path.name}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise ResultsError(
                "another process draws this shard",
                where=str(folder),
                expected="one process for each shard",
                got=f"shard {shard} twice",
                hint="--shard I/N with another I for each process, or wait until it ends",
            ) from error
        try:
            if path.exists():
                cut_broken_line(path)
            ledger = cls(folder, total)
            ledger.refresh()
            ledger._drop_lost()
            yield ledger, path
        finally:
            lock.release()

    def refresh(self) -> int:
        """Read what any process has added, and return how many pictures are new.

        Raises:
            ResultsError: a line is damaged.
        """
        before = len(self.known)
        for path in sorted(self.folder.glob("ledger-*.jsonl")):
            self._read_more(path)
        return len(self.known) - before

    def _read_more(self, path: Path) -> None:
        """Read the finished lines of a file after those that were read before."""
        start, count = self._read.get(path, (0, 0))
        with open(path, "rb") as file:
            file.seek(start)
            *lines, broken = file.read().split(b"\n")
            self._read[path] = file.tell() - len(broken), count + len(lines)
        for number, line in enumerate(lines, count + 1):
            try:
                picture = Picture(**json.loads(line))
                if picture.index >= self._total:
                    raise ValueError(f"picture {picture.index} of {self._total}")
            except (ValueError, TypeError) as error:
                raise ResultsError(
                    "a line of a ledger is damaged",
                    where=f"{path}, line {number}",
                    expected="a picture as JSON",
                    got=f"{error}: {line[:60].decode(errors='replace')!r}",
                    hint="delete the line: its picture is drawn again",
                ) from error
            self._learn(picture)

    def _learn(self, picture: Picture) -> None:
        """Note a picture. Of two that differ, from machines that compute otherwise, that of the
        file counts."""
        other = self.known.get(picture.index)
        if other is None or other.sha256 == picture.sha256 or self._is_file(picture):
            self.known[picture.index] = picture

    def _is_file(self, picture: Picture) -> bool:
        path = self.folder / picture.file
        return path.is_file() and _digest(path.read_bytes()) == picture.sha256

    def _drop_lost(self) -> None:
        """Forget pictures whose files are gone, or of another size."""
        for index, picture in list(self.known.items()):
            path = self.folder / picture.file
            if not path.is_file() or path.stat().st_size != picture.bytes:
                del self.known[index]

    def save(self, path: Path, pictures: Mapping[int, Tensor], cases: Sequence[Case]) -> None:
        """Write pictures [3, H, W] in [0, 1] by index, in 8 bits, then their lines to a ledger."""
        (self.folder / PICTURES).mkdir(exist_ok=True)
        lines = []
        for index, pixels in pictures.items():
            finite, data = bool(pixels.isfinite().all()), png(pixels.nan_to_num())
            write_file(self.folder / file_of(index), data)
            case, own = cases[index], (file_of(index), len(data), _digest(data), finite)
            lines.append(Picture(index, case.prompt, case.seed, *own).line())
        append_lines(path, lines)

    def finish(self) -> str:
        """Write `pictures.jsonl` if every picture is there.

        Returns:
            The digest of that file, which is that of all pictures; "" while some lack.
        """
        if len(self.known) < self._total:
            return ""
        text = "".join(picture.line() for _, picture in sorted(self.known.items()))
        write_file(self.folder / INDEX, text)
        return _digest(text.encode())

    def lacking(self, indices: Iterable[int]) -> list[int]:
        """Which of the pictures are not there."""
        return [index for index in indices if index not in self.known]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

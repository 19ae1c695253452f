"""Cases from prompts: files, prompt sets by name, and what Python code gives."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from toma_fx.errors import ConfigError, MissingPackageError
from toma_fx.measure.subjects import Case

SETS = {"drawbench": "sayakpaul/drawbench", "partiprompts": "nateraw/parti-prompts"}
"""Prompt sets by name, and where the hub has them. DrawBench: arXiv 2205.11487; PartiPrompts: arXiv
2206.10789."""
COLUMNS = ("prompt", "prompts")
"""What the column of a table is called that holds prompts, in any case."""
LEAST = 2
"""Pictures without which nothing can be said about spread."""


def read_cases(
    source: Any, *, seed: int = 0, seeds: int = 1, limit: int | None = None
) -> list[Case]:
    """The pictures to draw.

    Args:
        source: a file (a prompt a line, "#" begins a comment; `.jsonl`: an object with "prompt" and
            perhaps "seed" a line, other keys are arguments of the pipeline's call; `.csv`, `.tsv`:
            a table with a column "Prompt"), the name of a prompt set (`SETS`), or a sequence of
            prompts, mappings as in a `.jsonl`, or cases.
        seed: of the first picture that has none of its own; the next ones count on.
        seeds: pictures of each prompt. limit: prompts to take, from the start.

    Raises:
        ConfigError: a file that can't be read, is no UTF-8 or holds no prompts, or fewer than two
            pictures. MissingPackageError: a prompt set needs `datasets`.
    """
    if isinstance(source, (str, PathLike)):
        where = str(source)
        rows = _read_set(where) if where in SETS else _read_file(Path(source))
    else:
        where, rows = "prompts", list(source)
    items = [_item(row, where) for row in rows[:limit]]
    cases = []
    for turn in range(seeds):
        for i, (prompt, own, options) in enumerate(items):
            first = seed + i if own is None else own
            cases.append(Case(prompt, first + turn * len(items), options))
    if len(cases) < LEAST:
        raise ConfigError(
            "too few pictures",
            where=where,
            expected=f"at least {LEAST} pictures; 36 to claim a difference",
            got=str(len(cases)),
            hint="more prompts, or several seeds of each",
        )
    return cases


def _item(row: Any, where: str) -> tuple[str, int | None, dict[str, Any]]:
    """(prompt, seed, options) of what one picture is given as."""
    if isinstance(row, str):
        return row, None, {}
    if isinstance(row, Case):
        return row.prompt, row.seed, dict(row.options)
    if isinstance(row, Mapping):
        rest = dict(row)
        prompt, seed = rest.pop("prompt", ""), rest.pop("seed", None)
        known = isinstance(prompt, str) and (prompt or "prompt_embeds" in rest)
        if known and (seed is None or type(seed) is int):
            return prompt, seed, rest
    raise ConfigError(
        "not a prompt",
        where=where,
        expected='a text, or {"prompt": text, "seed": whole number, ...}',
        got=repr(row)[:100],
    )


def _read_file(path: Path) -> list[Any]:
    """What a file says of each picture."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            "the prompts are no UTF-8",
            where=str(path),
            expected="UTF-8 text",
            got=f"byte {error.object[error.start]:#04x} at {error.start}",
        ) from error
    except OSError as error:
        raise ConfigError(
            "the prompts can't be read",
            where=str(path),
            expected="a file, or " + " or ".join(SETS),
            got=f"{type(error).__name__}: {error.strerror}",
        ) from error
    rows: list[Any]
    if path.suffix in (".csv", ".tsv"):
        rows = _read_table(text, path)
    elif path.suffix in (".jsonl", ".ndjson"):
        rows = list(_read_objects(text, path))
    else:
        lines = (line.strip() for line in text.splitlines())
        rows = [line for line in lines if line and not line.startswith("#")]
    if not rows:
        raise ConfigError("no prompts", where=str(path), expected="a prompt a line", got="none")
    return rows


def _read_objects(text: str, path: Path) -> Iterable[Any]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ConfigError(
                "a line is no JSON", where=f"{path}, line {number}", got=str(error)
            ) from error


def _read_table(text: str, path: Path) -> list[str]:
    dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
    table = csv.DictReader(io.StringIO(text, newline=""), dialect=dialect)
    column = _column(table.fieldnames or (), str(path))
    return [row[column].strip() for row in table if (row[column] or "").strip()]


def _column(names: Sequence[str], where: str) -> str:
    for name in names:
        if name.strip().lower() in COLUMNS:
            return name
    raise ConfigError(
        "no column holds prompts",
        where=where,
        expected="a column " + " or ".join(map(repr, COLUMNS)),
        got=", ".join(names) or "none",
    )


def _read_set(name: str) -> list[str]:
    """The prompts of a set, from the hub or its cache."""
    hint = f"download {SETS[name]} and give the file itself (.csv, .tsv or a prompt a line)"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingPackageError(
            "prompt sets by name need a package",
            where=name,
            expected="datasets",
            got=str(error),
            hint=f"pip install datasets, or {hint}",
        ) from error
    try:
        table = load_dataset(SETS[name], split="train")
    except Exception as error:  # whatever the hub, its cache or the format raises
        raise ConfigError(
            "the prompt set can't be had",
            where=name,
            expected=SETS[name],
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            hint=hint,
        ) from error
    return [str(text) for text in table[_column(table.column_names, name)]]

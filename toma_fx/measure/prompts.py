"""Cases from prompts: files, prompt sets by name, and what Python code gives."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from toma_fx.errors import ConfigError, MissingPackageError
from toma_fx.measure.cases import Case
from toma_fx.methods.checks import is_count

SETS = {"drawbench": "sayakpaul/drawbench", "partiprompts": "nateraw/parti-prompts"}
"""Prompt sets by name, and where the hub has them. DrawBench: arXiv 2205.11487; PartiPrompts: arXiv
2206.10789."""
COLUMNS = ("prompt", "prompts")
"""What the column of a table is called that holds prompts, in any case."""
LEAST = 2
"""Pictures without which nothing can be said about spread."""
SEEDS = range(-(2**63), 2**64)
"""Seeds that torch takes."""


def read_cases(
    source: Any, *, seed: int = 0, seeds: int = 1, limit: int | None = None, least: int = LEAST
) -> list[Case]:
    """The pictures to draw.

    Args:
        source: a file (a prompt a line, "#" begins a comment; `.jsonl`: an object with "prompt" and
            perhaps "seed" a line, other keys are arguments of the pipeline's call; `.csv`, `.tsv`:
            a table with a column "Prompt"), the name of a prompt set (`SETS`), or a sequence of
            prompts, mappings as in a `.jsonl`, or cases.
        seed: of the first picture that has none of its own; the next ones count on.
        seeds: pictures of each prompt. limit: prompts to take, from the start. least: pictures that
            there must be.

    Raises:
        ConfigError: a file that can't be read, is no UTF-8 or holds no prompts, a line that is no
            prompt, or too few pictures. MissingPackageError: a prompt set needs `datasets`.
    """
    if isinstance(source, (str, PathLike)):
        where = str(source)
        rows = _read_set(where) if where in SETS else _read_file(Path(source))
    else:
        where, rows = "prompts", [(f"prompts, item {i}", row) for i, row in enumerate(source)]
    items = [parse_item(row, place) for place, row in rows[:limit]]
    cases = []
    for turn in range(seeds):
        for i, (prompt, own, options, place) in enumerate(items):
            first = seed + i if own is None else own
            cases.append(Case(prompt, first + turn * len(items), options, place))
    for case in cases:
        if case.seed not in SEEDS:
            raise ConfigError(
                "a seed is out of range",
                where=case.where,
                expected="a whole number from -2**63 to 2**64 - 1",
                got=str(case.seed),
            )
    if len(cases) < least:
        raise ConfigError(
            "too few pictures",
            where=where,
            expected=f"at least {least} pictures; 36 to claim a difference"
            if least > 1
            else "a prompt",
            got=str(len(cases)),
            hint="more prompts, or several seeds of each",
        )
    return cases


def parse_item(row: Any, where: str) -> tuple[str, int | None, dict[str, Any], str]:
    """(prompt, seed, options, where) of what one picture is given as.

    Raises:
        ConfigError: no prompt, or a field of another kind than it must be.
    """
    if isinstance(row, str):
        return row, None, {}, where
    if isinstance(row, Case):
        return row.prompt, row.seed, dict(row.options), row.where or where
    if isinstance(row, Mapping):
        rest = dict(row)
        prompt, seed = rest.pop("prompt", ""), rest.pop("seed", None)
        known = isinstance(prompt, str) and (prompt or "prompt_embeds" in rest)
        if known and (seed is None or type(seed) is int):
            _check_fields(rest, where)
            return prompt, seed, rest, where
    raise ConfigError(
        "not a prompt",
        where=where,
        expected='a text, or {"prompt": text, "seed": whole number, ...}',
        got=repr(row)[:100],
    )


def _check_fields(options: Mapping[str, Any], where: str) -> None:
    for name, value in options.items():
        if name == "negative_prompt" and not isinstance(value, str):
            expected = "a text"
        elif name in ("height", "width") and not is_count(value, 1):
            expected = "a whole number of at least 1"
        else:
            continue
        raise ConfigError(
            f"{name} of a prompt is of another kind",
            where=where,
            expected=expected,
            got=repr(value)[:100],
        )


def _read_file(path: Path) -> list[tuple[str, Any]]:
    """What a file says of each picture, and where: the file and the line."""
    try:
        text = (data := path.read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data[: error.start].count(b"\n")
        raise ConfigError(
            "the prompts are no UTF-8",
            where=f"{path}, line {line}",
            expected="UTF-8 text",
            got=f"byte {error.object[error.start]:#04x}",
        ) from error
    except OSError as error:
        raise ConfigError(
            "the prompts can't be read",
            where=str(path),
            expected="a file, or " + " or ".join(SETS),
            got=f"{type(error).__name__}: {error.strerror}",
        ) from error
    rows: Iterable[tuple[int, Any]]
    if path.suffix in (".csv", ".tsv"):
        rows = _read_table(text, path)
    elif path.suffix in (".jsonl", ".ndjson"):
        rows = _read_objects(text, path)
    else:
        rows = ((n, line) for n, line in _lines(text) if not line.startswith("#"))
    found = [(f"{path}, line {number}", row) for number, row in rows]
    if not found:
        raise ConfigError("no prompts", where=str(path), expected="a prompt a line", got="none")
    return found


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, and their numbers, from 1, as editors count them.

    Not `splitlines`: it also breaks at characters that stand inside texts, as U+2028.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if stripped := line.strip():
            yield number, stripped


def _read_objects(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(text):
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise ConfigError(
                "a line is no JSON", where=f"{path}, line {number}", got=str(error)
            ) from error


def _read_table(text: str, path: Path) -> Iterator[tuple[int, str]]:
    dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
    table = csv.DictReader(io.StringIO(text, newline=""), dialect=dialect)
    column = _column(table.fieldnames or (), str(path))
    for row in table:
        if cell := (row[column] or "").strip():
            yield table.line_num, cell


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


def _read_set(name: str) -> list[tuple[str, Any]]:
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
    texts = table[_column(table.column_names, name)]
    return [(f"{name}, item {i}", str(text)) for i, text in enumerate(texts)]

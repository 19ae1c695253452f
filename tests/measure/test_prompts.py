"""Prompts from files, tables, sets and Python; configurations from words."""

from __future__ import annotations

import builtins
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import toma_fx
from toma_fx.errors import ConfigError, MissingPackageError, RecipeError
from toma_fx.measure.cases import Case, batches_of
from toma_fx.measure.configs import name_configs, parse_config
from toma_fx.measure.fields import split_fields
from toma_fx.measure.prompts import read_cases


def test_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# a comment\n\n a cat \nein Ätna\n".encode())
    assert read_cases(path) == [Case("a cat", 0), Case("ein Ätna", 1)]
    assert read_cases(str(path), seed=7, seeds=2) == [
        Case("a cat", 7), Case("ein Ätna", 8), Case("a cat", 9), Case("ein Ätna", 10)
    ]  # fmt: skip


def test_objects_bring_seeds_and_arguments(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a", "seed": 5, "negative_prompt": "blur"}, {"prompt": "b"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_cases(path) == [Case("a", 5, {"negative_prompt": "blur"}), Case("b", 1)]
    assert read_cases(rows) == read_cases(path)
    assert len({case.key for case in read_cases(path, seeds=3)}) == 6


@pytest.mark.parametrize("ending", ["tsv", "csv"])
def test_tables_by_their_column(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"parti.{ending}"
    mark = "\t" if ending == "tsv" else ","
    path.write_text(f'Prompt{mark}Category\na cat{mark}Animals\n"a, b"{mark}x\n')
    assert [case.prompt for case in read_cases(path)] == ["a cat", "a, b"]
    path.write_text(f"Text{mark}Category\na{mark}b\n")
    with pytest.raises(ConfigError, match="no column"):
        read_cases(path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"caf\xe9\nb\n", "UTF-8"),
        (b"\n# nothing\n", "no prompts"),
        (b"one\n", "too few"),
        (None, "can't be read"),
    ],
)
def test_files_that_are_no_prompts(tmp_path: Path, content: bytes | None, match: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=match):
        read_cases(path)


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": 3}',
        '{"seed": 1}',
        "{",
        '{"prompt": "a", "seed": "x"}',
        '{"prompt": "a", "seed": true}',
        '{"prompt": "a", "seed": 18446744073709551616}',
        '{"prompt": "a", "width": "64"}',
        '{"prompt": "a", "height": 0}',
        '{"prompt": "a", "negative_prompt": null}',
        '["a"]',
    ],
)
def test_lines_that_are_no_prompts_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n' + line)
    with pytest.raises(ConfigError) as caught:
        read_cases(path)
    assert caught.value.where == f"{path}, line 3"


def test_lines_are_those_of_an_editor(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\r\n{"prompt": "c"}\r\n', encoding="utf-8")
    assert [(c.prompt, c.where) for c in read_cases(path)] == [
        ("a\u2028b", f"{path}, line 1"), ("c", f"{path}, line 2")
    ]  # fmt: skip
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(ConfigError, match="line 3"):
        read_cases(path)


def test_pictures_of_one_call_are_of_one_size() -> None:
    sizes = [{}, {"width": 96}, {}, {"width": 96}, {}, {"negative_prompt": "x"}, {"width": 32}]
    cases = [Case("a", i, options) for i, options in enumerate(sizes)]
    assert batches_of(cases, 2) == [[0, 2], [1, 3], [4], [5], [6]]
    assert batches_of(cases, 1) == [[i] for i in range(7)]


def test_sets_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ModuleNotFoundError("No module named 'datasets'")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackageError, match="sayakpaul/drawbench"):
        read_cases("drawbench")


def test_sets_are_read_by_their_column(monkeypatch: pytest.MonkeyPatch) -> None:
    class Table(dict[str, list[str]]):
        column_names = ("Prompts", "Category")

    def load(name: str, split: str) -> Table:
        if name != "sayakpaul/drawbench":
            raise OSError("no connection")
        return Table(Prompts=["a", "b", "c"], Category=["x", "y", "z"])

    module: Any = types.ModuleType("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert [case.prompt for case in read_cases("drawbench", limit=2)] == ["a", "b"]
    with pytest.raises(ConfigError, match="no connection"):
        read_cases("partiprompts")


def test_configurations_from_words(tmp_path: Path) -> None:
    assert parse_config("balanced") == toma_fx.PRESETS["balanced"]
    assert parse_config("balanced:ratio=0.25").ratio == 0.25
    assert parse_config("tomesd") == toma_fx.ToMeSDConfig()
    config = parse_config("toma:scope=stack,grid=(4, 4),include=('up*','mid*')")
    assert (config.scope, config.grid, config.include) == ("stack", (4, 4), ("up*", "mid*"))
    assert split_fields("a='x,y',b={'c': (1, 2)},") == ["a='x,y'", "b={'c': (1, 2)}"]
    toma_fx.Recipe(config).save(tmp_path / "own.json")
    assert parse_config(str(tmp_path / "own.json")).config == config
    with pytest.raises(RecipeError):
        parse_config(str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="not a setting"):
        parse_config("toma:ratio")


def test_configurations_of_python_have_names() -> None:
    named = name_configs([True, "fast", toma_fx.ToMeSDConfig(ratio=0.75), {"ratio": 0.3}])
    assert list(named) == ["toma", "fast", "tomesd:ratio=0.75", "toma:ratio=0.3"]
    assert list(name_configs({"mine": {"ratio": 0.3}, "b": "fast"})) == ["mine", "b"]
    assert list(name_configs({"ratio": 0.3})) == ["toma:ratio=0.3"]

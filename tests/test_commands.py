"""Commands of README and docs/: all are taken by their parsers; some on embedded models run."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from toma_fx.cli.main import main, make_parser
from toma_fx.methods.recipe import Recipe
from toma_fx.methods.toma import ToMAConfig

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
SHELLS = ("", "sh", "bash", "console")
PLACEHOLDER = re.compile(r"^[A-Z_/]+$|^\.\.\.$|^…$")
"""Words that stand for the reader's own: they need not be there."""
RUN = (
    "toma-fx explain tiny-flux",
    "toma-fx explain tiny-flux --scope stack --html page.html",
)
"""Commands that the quick run executes; a test of its own runs the demo, and the rest need a model,
a GPU or minutes."""


def commands() -> list[tuple[str, str]]:
    """Page and command, of blocks in shell's language or in none."""
    found = []
    for page in PAGES:
        # every block, so that the end of one is not taken for the begin of another
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.S | re.M):
            if language not in SHELLS:
                continue
            for line in block.replace("\\\n", " ").splitlines():
                words = (
                    shlex.split(re.sub(r"^\$ ", "", line), comments=True)
                    if is_command(line)
                    else []
                )
                if words:
                    found.append((page.name, shlex.join(words)))
    return found


def is_command(line: str) -> bool:
    return re.match(r"(\$ )?(\w+=\S+ )*(toma-fx|python|make|torchrun|pip) \S", line) is not None


def test_there_are_commands() -> None:
    firsts = [text.split()[0] for _, text in commands()]
    assert firsts.count("toma-fx") > 20
    assert {"make", "pip", "python"} <= set(firsts)
    assert set(RUN) <= {text for _, text in commands()}


@pytest.mark.parametrize(
    "text", sorted({text for _, text in commands() if text.startswith("toma-fx")})
)
def test_the_command_line_takes_it(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recipe, "load", lambda path: Recipe(ToMAConfig()))
    args = make_parser().parse_args(shlex.split(text)[1:])
    assert args.command


def test_scripts_targets_and_extras_are_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for page, text in commands():
        words = [w for w in shlex.split(text) if not re.match(r"\w+=", w)]
        where = f"{page}: {text}"
        if words[0] == "make":
            assert set(words[1:]) <= targets, where
        for extra in re.findall(r"\[([\w,-]+)\]", text if words[0] == "pip" else ""):
            assert set(extra.split(",")) <= {*project["optional-dependencies"]}, where
        for word in words[1:] if words[0] in ("python", "torchrun") else ():
            if word.endswith(".py") and not PLACEHOLDER.match(word):
                assert (ROOT / word).is_file(), where
                break


@pytest.mark.parametrize("text", RUN)
def test_it_runs(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(text)[1:]) == 0
    assert "1024 -> 512" in capsys.readouterr().out
    assert ("--html" not in text) or "<svg" in (tmp_path / "page.html").read_text()

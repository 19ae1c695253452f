"""Mistakes at the command line: a status and a reason, never a traceback; text is text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from toma_fx.cli import build
from toma_fx.cli import main as command_line
from toma_fx.cli.main import main
from toma_fx.cli.status import DONE, FAILED, FAULT, MISUSED, PIPE_CLOSED, STATUS
from toma_fx.cli.terminal import Terminal, printable
from toma_fx.errors import MissingPackageError
from toma_fx.export.to_onnx.target import ONNXTarget

BUILD = ("build", "--model", "tiny-flux", "--target", "onnx")
MISTAKES: dict[str, tuple[tuple[str, ...], int, str]] = {
    "an unknown device": (("run", "ARTIFACT", "--device", "foo"), FAILED, "no such device"),
    "a second CPU": (("run", "ARTIFACT", "--device", "cpu:3"), FAILED, "no such device"),
    "many threads": (("run", "ARTIFACT", "--threads", "99999999999"), MISUSED, "--threads"),
    "an empty npz": (("run", "ARTIFACT", "--inputs", "empty.npz"), FAILED, "can't be read"),
    "a cut npz": (("run", "ARTIFACT", "--inputs", "cut.npz"), FAILED, "can't be read"),
    "outputs into no folder": (
        ("run", "ARTIFACT", "--steps", "1", "--outputs", "none/o.safetensors"),
        FAILED,
        "can't be written",
    ),
    "no steps": (("run", "ARTIFACT", "--steps", "0"), MISUSED, "--steps"),
    "outputs of another kind": (("run", "ARTIFACT", "--outputs", "o.txt"), FAILED, "unknown kind"),
    "an empty batch": ((*BUILD, "--out", "b", "--batch", "0"), MISUSED, "--batch"),
    "a negative height": ((*BUILD, "--out", "b", "--height", "-64"), MISUSED, "--height"),
    "an odd height": ((*BUILD, "--out", "b", "--height", "63"), FAILED, "multiple of 2"),
    "no GPU": ((*BUILD, "--out", "b", "--device", "cuda:77"), FAILED, "no such device"),
    "a long name": ((*BUILD, "--out", "x" * 300), FAILED, "can be put there"),
    "no folder for pictures": (("demo", "--out", "/proc/x"), FAILED, "/proc/x"),
    "no artifact": (("info", "nowhere"), FAILED, "no artifact"),
    "a field that is none": (("explain", "tiny-flux", "--ratoi", "1"), FAILED, "ratio"),
    "no command": ((), MISUSED, "required"),
}


@pytest.mark.parametrize(("arguments", "status", "reason"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(
    arguments: tuple[str, ...], status: int, reason: str, artifact: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("empty.npz").touch()
    Path("cut.npz").write_bytes(b"PK\3\4" + bytes(50))
    try:
        found = main([a.replace("ARTIFACT", str(artifact)) for a in arguments])
    except SystemExit as error:  # of the parser
        found = int(str(error.code))
    said = capsys.readouterr().err
    assert found == status, said
    assert reason in said
    assert "Traceback" not in said
    assert not Path("b").exists()


def test_a_fault_of_ours_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], artifact: Path
) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("of ours")

    monkeypatch.setattr("toma_fx.cli.info.show_manifest", fail)
    assert main(["info", str(artifact)]) == FAULT
    said = capsys.readouterr().err
    assert "AssertionError: of ours" in said
    assert command_line.TRACEBACK in said
    monkeypatch.setenv(command_line.TRACEBACK, "1")
    with pytest.raises(AssertionError, match="of ours"):
        main(["info", str(artifact)])


@pytest.mark.parametrize("text", ["a [/] b", "see [notes]", "[red]x", ":smile:"])
def test_what_looks_like_markup_is_text(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().print(text)
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize(
    "text", ["\x1b[2J", "\x1b]0;title\x07", "\u202e", "\ud800", "\x9b1m", "\r"]
)
def test_nothing_steers_the_terminal(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(force_terminal=True, color_system=None).print(f"a{text}b")
    said = capsys.readouterr().out.rstrip("\n")  # rich leaves out some of them itself
    assert said.isprintable()
    assert said.startswith("a")
    assert printable(f"a{text}b") == f"a{ascii(text)[1:-1]}b"
    assert printable("grüße\t漢字\n") == "grüße\t漢字\n"


def test_folders_with_brackets(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "[" / "red]"
    shutil.copytree(artifact, folder)
    assert main(["verify", str(folder)]) == DONE
    assert "[/red]" in capsys.readouterr().out


def test_nobody_reads_any_more(artifact: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "toma_fx.cli.main", "info", str(artifact), "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (PIPE_CLOSED, b"")


def test_commands_that_read_print_json(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(artifact), "--json"]) == DONE
    assert json.loads(capsys.readouterr().out)["bytes"] > 0
    assert main(["run", str(artifact), "--steps", "3", "--json"]) == DONE
    found = json.loads(capsys.readouterr().out)
    assert sum(map(len, found["step_ms"].values())) == 3
    assert found["device"] == str(torch.device("cpu"))


def test_statuses_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{number} {text}" in said for number, text in STATUS.items())


def test_a_missing_tool_is_said_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacks(self: ONNXTarget) -> None:
        raise MissingPackageError("no onnx here", where="target onnx", hint="pip install")

    monkeypatch.setattr(ONNXTarget, "check_installed", lacks)
    monkeypatch.setattr(build, "load_examples", lambda *_, **__: pytest.fail("a model is loaded"))
    assert main([*BUILD, "--out", str(tmp_path / "a")]) == FAILED
    assert "no onnx here" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())

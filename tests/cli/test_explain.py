"""`toma-fx explain`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import toma_fx
from tests import denoisers
from toma_fx.cli import explain as command
from toma_fx.cli.main import main
from toma_fx.cli.status import DONE, FAILED
from toma_fx.models.named import from_config

SMALL = ("--min_tokens", "4", "--height", "64")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    denoisers.flux().save_config(folder)
    return folder / "config.json"


def model_of(config: Path) -> tuple[nn.Module, dict[str, Any]]:
    model = from_config("FluxTransformer2DModel", config)
    return model, toma_fx.example_inputs(model, 64, 64)


def explain(*words: str) -> int:
    return main(["explain", *words, *SMALL])


def test_from_a_configuration_alone(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (config, config.parent):
        assert explain("--class", "FluxTransformer2DModel", "--config", str(path)) == DONE
        assert "4x4: 16 -> 8" in capsys.readouterr().out


def test_forms(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of one report."""
    made = [toma_fx.explain(*model_of(config), min_tokens=4)]
    monkeypatch.setattr(command, "explain", lambda *_, **__: made[0])
    model = ("--class", "FluxTransformer2DModel", "--config", str(config))
    outputs = []
    for form in ((), ("--full",), ("--tree",), ("--json",)):
        assert explain(*model, *form, "--html", str(tmp_path / "page.html")) == DONE
        outputs.append(capsys.readouterr().out)
    grouped, full, tree, machine = outputs
    assert "transformer_blocks.*.attn" in grouped
    assert "transformer_blocks.1.attn" in full
    assert "└──" in tree
    assert len(json.loads(machine)["rows"]) == 6
    assert "<svg" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "neither"),
        (("tiny-flux", "--class", "FluxTransformer2DModel"), "a model; --class"),
        (("--class", "FluxTransformer2DModel"), "got: --class"),
        (("--class", "FluxTransfomer2DModel", "--config", "CONFIG"), "FluxTransformer2DModel"),
        (("--class", "UNet2DConditionModel", "--config", "nowhere"), "nowhere"),
        (("--class", "FluxTransformer2DModel", "--config", __file__), "JSONDecodeError"),
        (("--class", "SanaTransformer2DModel", "--config", "CONFIG"), "example inputs"),
    ],
)
def test_mistakes(
    words: tuple[str, ...], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(config) if word == "CONFIG" else word for word in words]
    assert explain(*given) == FAILED
    assert message in capsys.readouterr().err


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "toma_fx", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"toma-fx {toma_fx.__version__}\n"

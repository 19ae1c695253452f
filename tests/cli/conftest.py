"""What tests of the command line share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import denoisers
from toma_fx.cli.main import main

CARD = "---\nlicense: other\nlicense_name: flux-1-dev\n---\n# A model\n"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    denoisers.flux(num_layers=1, num_single_layers=0).save_pretrained(folder / "transformer")
    (folder / "README.md").write_text(CARD)
    return folder


def build(*args: Any) -> int:
    given: list[Any] = ["--height", 128, "--batch", 1, "--text", 8, "--method", "grid"]
    given += ["--min_tokens", "16", "--destinations_every", "5"]
    return main(["build", *map(str, given), *map(str, args)])


@pytest.fixture(scope="session")
def artifact(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript")
    out = tmp_path_factory.mktemp("artifact") / "a"
    assert build("--model", model_folder, "--target", "onnx", "--form", "cached", "--out", out) == 0
    return out

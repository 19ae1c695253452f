"""Names of models: a folder, a repository, or neither, said at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from toma_fx.cli.main import main
from toma_fx.errors import ModelTypeError
from toma_fx.inputs import load_example
from toma_fx.models import named
from toma_fx.models.hub import _ask_hub, check_model_name


class Hub:
    """Stands in for the hub: counts what it is asked, and knows one repository."""

    asked = 0

    def model_info(self, name: str, timeout: float) -> None:
        Hub.asked += 1
        assert timeout > 0
        if name != "owner/known":
            raise ConnectionError("no route\nto the hub")


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub.asked = 0
    _ask_hub.cache_clear()
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: None)


@pytest.mark.parametrize("name", ["tiny-fluxx", "./none", "/none", "a/b/c", "owner/", "", "a b/c"])
def test_what_can_be_no_repository_is_not_asked_for(name: str) -> None:
    with pytest.raises(ModelTypeError, match="no such folder") as caught:
        check_model_name(name, ("tiny-sdxl", "tiny-flux"))
    assert "tiny-flux" in str(caught.value)
    assert not Hub.asked


def test_repositories(tmp_path: Path) -> None:
    for _ in range(2):  # by what looks at the pipeline, and by what loads it
        check_model_name("owner/known")
    check_model_name(str(tmp_path))
    assert Hub.asked == 1
    with pytest.raises(ModelTypeError, match=r"ConnectionError: no route\n"):
        check_model_name("owner/unknown")


def test_what_was_downloaded_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(name: str, file: str) -> Any:
        return "/cache/unet/config.json" if file == "unet/config.json" else object()

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    check_model_name("owner/unknown")
    assert not Hub.asked


@pytest.mark.parametrize(
    "load",
    [
        lambda name: load_example(name, 64, 64, 1),
        lambda name: named.example(name, 64, 64, 1),
        named.load_pipeline,
    ],
    ids=["load_example", "example", "load_pipeline"],
)
def test_a_hub_out_of_reach_is_asked_once(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is loaded from it: every file would be tried for most of a minute."""
    monkeypatch.setattr("diffusers.AutoModel.from_pretrained", None)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", None)
    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", None)
    with pytest.raises(ModelTypeError, match="can't be had"):
        load("owner/unknown")
    assert Hub.asked == 1


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "tiny-fluxx"]) == 1
    assert "nearest: tiny-flux" in capsys.readouterr().err
    assert not Hub.asked

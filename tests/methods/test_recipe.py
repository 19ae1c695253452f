"""Recipes: files that say what was found for a model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import toma_fx
from tests.denoisers import small_sdxl
from tests.methods.test_methods import inputs, model
from toma_fx import CacheConfig, MethodConfig, Recipe, ToMAConfig
from toma_fx.capture.architecture import architecture_of
from toma_fx.errors import ConfigError, RecipeError, TomaError, UnknownNameError
from toma_fx.methods.config import METHODS

CONFIGS: tuple[MethodConfig, ...] = (
    ToMAConfig(
        ratio=((0, 0.5), (0.4, 0.25)),
        overrides={"mid*": {"tile": (4, 4), "ratio": 0.3}},
        grid=(8, 8),
        select_at=(0, 3),
        cache=CacheConfig(steps_mask=(1, 1, 0, 1), order=2, overrides={"*attn*": {"order": 0}}),
    ),
    toma_fx.CAToMeConfig(ratios={"a": 0.5}, cache="balanced"),
    toma_fx.ToDoConfig(factor=(2, 1)),
    *(cls() for cls in METHODS),
)


@pytest.mark.parametrize("name", ["recipe.json", "recipe.yaml"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_file_is_the_recipe(tmp_path: Path, config: MethodConfig, name: str) -> None:
    recipe = Recipe(config, "UNet", "abc", {"speedup": 1.5, "seeds": [1, 2]})
    recipe.save(tmp_path / name)
    loaded = Recipe.load(tmp_path / name)
    assert loaded == recipe
    assert hash(loaded) == hash(recipe)
    assert loaded.measured == recipe.measured
    assert [p.name for p in tmp_path.iterdir()] == [name]


class OwnConfig(ToMAConfig):
    name = "own"


def test_methods_of_ones_own(tmp_path: Path) -> None:
    recipe = Recipe(OwnConfig(ratio=0.3))
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path, methods=(OwnConfig,)) == recipe
    with pytest.raises(UnknownNameError, match="unknown method 'own'"):
        Recipe.load(tmp_path)


@torch.no_grad()
def test_a_model_takes_its_recipe() -> None:
    net = model()
    recipe = Recipe(ToMAConfig(ratio=0.25, min_tokens=1), *architecture_of(net))
    merged = toma_fx.optimize(net, recipe)
    assert torch.equal(merged(**inputs()), toma_fx.optimize(net, recipe.config)(**inputs()))
    assert toma_fx.explain(net, inputs(), recipe).rows
    options = {"toma": recipe}
    compiled = torch.compile(net, backend="toma_fx", options=options)
    torch.testing.assert_close(compiled(**inputs()), merged(**inputs()), rtol=1e-4, atol=1e-4)
    coarser = toma_fx.optimize(net, recipe, ratio=0.5)
    assert coarser.config_toma == dataclasses.replace(recipe.config, ratio=0.5)


def test_another_model_does_not() -> None:
    recipe = Recipe(ToMAConfig(), *architecture_of(model()))
    for call in (toma_fx.optimize, toma_fx.explain):
        with pytest.raises(RecipeError, match="for another model"):
            call(small_sdxl(), *([{}] if call is toma_fx.explain else []), toma=recipe)
    toma_fx.optimize(small_sdxl(), Recipe(ToMAConfig()))


def test_an_architecture_is_no_matter_of_weights() -> None:
    net = small_sdxl()
    before = architecture_of(net)
    torch.nn.init.normal_(next(net.parameters()))
    assert architecture_of(net.half()) == before
    other = small_sdxl()
    other.register_to_config(flip_sin_to_cos=False)
    assert architecture_of(other) != before


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("{", RecipeError, "not a recipe"),
        ("[]", RecipeError, "version 1"),
        ('{"version": 2, "config": {}}', RecipeError, "version 1"),
        ('{"version": 1}', RecipeError, "the fields"),
        ('{"version": 1, "config": {}, "more": 1}', RecipeError, "the fields"),
        ('{"version": 1, "config": 3}', RecipeError, "config as dict"),
        ('{"version": 1, "config": {"method": "tome"}}', UnknownNameError, "tomesd"),
        ('{"version": 1, "config": {"method": 7}}', TomaError, "method"),
        ('{"version": 1, "config": {"ratio": 2}}', ConfigError, "ratio is out of range"),
        ('{"version": 1, "config": {"ratoi": 2}}', UnknownNameError, "ratio"),
        ('{"version": 1, "config": {}, "model": 3}', RecipeError, "model as str"),
        ("\ud800", RecipeError, "not a recipe"),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, text: str, error: Any, match: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(error, match=match):
        Recipe.load(path)


def test_files_of_other_names(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"\.json, \.yaml"):
        Recipe(ToMAConfig()).save(tmp_path / "recipe.txt")
    with pytest.raises(RecipeError, match="a file that can be read"):
        Recipe.load(tmp_path)


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the mixin, with the transfer replaced: there is no hub here."""
    from huggingface_hub import HfApi

    seen: dict[str, Any] = {}

    def upload(self: Any, *, repo_id: str, folder_path: Any, **options: Any) -> str:
        seen.update({p.name: p.read_text() for p in Path(folder_path).iterdir()})
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    created = type("RepoUrl", (), {"repo_id": "me/fast-sdxl"})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: created)
    recipe = Recipe(ToMAConfig(ratio=0.3), "UNet", "abc")
    assert recipe.push_to_hub("me/fast-sdxl") == "https://hub/me/fast-sdxl"
    assert json.loads(seen["recipe.json"])["config"]["ratio"] == 0.3
    (tmp_path / "recipe.json").write_text(seen["recipe.json"])
    assert Recipe.from_pretrained(tmp_path) == recipe
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: tmp_path / "recipe.json")
    assert Recipe.from_pretrained("me/fast-sdxl", revision="main") == recipe

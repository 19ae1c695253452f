"""The tuner: its recipe against pictures, what it keeps in a folder, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import toma_fx
from tests.measure.fake import FakeSubject
from toma_fx.cli.main import main
from toma_fx.errors import ConfigError, ResultsError, TuneError
from toma_fx.measure.measurements import Measurements
from toma_fx.measure.prompts import read_cases
from toma_fx.measure.subjects import EmbeddedSubject, Settings
from toma_fx.models import tiny

SMALL: dict[str, Any] = {"scopes": ("stack",), "ratios": (0.5,), "probes": 3, "rounds": 0}


def subject(steps: int = 6) -> EmbeddedSubject:
    return EmbeddedSubject(tiny.load("tiny-flux"), Settings(steps=steps, batch=2))


def drawn(own: EmbeddedSubject, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Configurations, as they are drawn."""
    seen: list[Any] = []
    draw = own.draw
    monkeypatch.setattr(
        own, "draw", lambda c, config=None: (seen.append(config), draw(c, config))[1]
    )
    return seen


def test_a_recipe_for_a_speed_and_then_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, told = subject(), list[str]()
    calls = drawn(own, monkeypatch)
    search: dict[str, Any] = {**SMALL, "out": tmp_path / "search"}
    recipe = toma_fx.tune(
        own,
        ["cat", "coffee"],
        speedup=1.5,
        progress=lambda what, count: told.append(what),
        **search,
    )
    assert recipe.measured["speedup_counted"] >= 1.5
    assert {"stack: record", "stack: one step at a time", "merge at one spot at a time",
            "draw what may be it"} <= set(told)  # fmt: skip
    cases = read_cases(["cat", "coffee"])
    error = (own.draw(cases, recipe) - own.reference(cases)).square().mean()
    cache = recipe.config.cache
    assert isinstance(cache, toma_fx.CacheConfig)
    # the same number of steps, cached where it hurts: right after the first two
    count = sum(cache.steps_mask)  # type: ignore[arg-type]
    worst = (1, 1, *(0,) * (6 - count), *(1,) * (count - 2))
    other = toma_fx.ToMAConfig(ratio=0.0, cache={"steps_mask": worst, "order": 1, "scope": "stack"})
    assert error < (own.draw(cases, other) - own.reference(cases)).square().mean()

    calls.clear()
    again = toma_fx.tune(own, ["cat", "coffee"], speedup=1.5, **search)
    assert (again, again.measured) == (recipe, recipe.measured)
    with pytest.raises(TuneError, match="at most about"):
        toma_fx.tune(own, ["cat", "coffee"], speedup=50, **search)
    assert calls == []  # all of it was known
    with pytest.raises(ResultsError, match="other settings"):
        toma_fx.tune(own, ["cat", "dog"], speedup=1.5, **search)


def test_a_recipe_for_a_quality() -> None:
    own = subject()
    recipe = toma_fx.tune(own, ["cat", "coffee"], psnr=30, **SMALL)
    assert recipe.measured["psnr"] >= 30
    with pytest.raises(TuneError, match="at most"):
        toma_fx.tune(own, ["cat", "coffee"], psnr=99.5, **SMALL)


def test_a_recipe_for_a_measured_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    own = subject()
    monkeypatch.setattr("toma_fx.measure.tune._Target.time", lambda target, config: 1.3)
    options = {**SMALL, "clock": "time", "rounds": 1}
    with pytest.raises(TuneError, match=r"at most about 1\.30"):
        toma_fx.tune(own, ["cat", "coffee"], speedup=1.4, **options)
    recipe = toma_fx.tune(own, ["cat", "coffee"], speedup=1.2, **options)
    assert recipe.measured["speedup_measured"] == 1.3


def test_merging_alone_where_it_is_all_there_is() -> None:
    # of two steps none can be cached that is worth it; and merging holds always with ratios=()
    own = subject(2)
    merging = toma_fx.ToMAConfig(ratio=0.5)
    search: dict[str, Any] = {"speedup": 1.2, "scopes": ("deep",), "rounds": 0}
    recipe = toma_fx.tune(own, ["cat", "coffee"], merging=merging, ratios=(), **search)
    assert recipe.config == merging
    searched = toma_fx.tune(own, ["cat", "coffee"], **search)
    assert searched.config.cache is None
    assert searched.config.merges


def test_the_command_writes_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat\ncoffee\n")
    command = ["tune", "--model", "tiny-flux", "--prompts", str(prompts), "--steps", "4", "--batch",
               "2", "--speedup", "1.3", "--merging", "none", "--rounds", "0"]  # fmt: skip
    recipe = tmp_path / "recipe.json"
    assert main([*command, "--out", str(tmp_path / "out"), "--recipe", str(recipe)]) == 0
    found = toma_fx.Recipe.load(recipe)
    assert found.measured["speedup_counted"] >= 1.3
    assert "steps that compute: 1" in capsys.readouterr().out
    for wrong in (tmp_path / "recipe.txt", tmp_path / "nowhere" / "recipe.json"):
        assert main([*command, "--out", str(tmp_path / "out"), "--recipe", str(wrong)]) == 1


def test_measurements_go_on_after_a_kill(tmp_path: Path) -> None:
    folder, settings = tmp_path / "a", {"model": "x"}
    known = Measurements(folder, settings)
    assert known.get({"error": 1}, lambda: 0.1 + 0.2) == 0.1 + 0.2
    assert known.get({"error": 2}, lambda: [1, (2.0, float("inf"))]) == [1, [2.0, float("inf")]]
    path = folder / "measured.jsonl"
    with open(path, "a") as file:
        file.write('{"of": {"error": 3}, "val')  # a kill
    again = Measurements(folder, settings)
    assert again.get({"error": 1}, lambda: pytest.fail("measured twice")) == 0.1 + 0.2
    assert again.get({"error": 3}, lambda: 5) == 5
    assert [json.loads(line)["value"] for line in path.read_text().splitlines()][-1] == 5
    with pytest.raises(ResultsError, match="other settings"):
        Measurements(folder, {"model": "y"})
    path.write_text("{}\n")
    with pytest.raises(ResultsError, match="line 1"):
        Measurements(folder, settings)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"speedup": 2, "psnr": 30},
        {"speedup": 0.5},
        {"psnr": -1},
        {"speedup": "2"},
        {"speedup": 2, "clock": "sundial"},
        {"speedup": 2, "clock": "time", "rounds": 0},
        {"speedup": 2, "scopes": ("deepest",)},
        {"speedup": 2, "orders": ()},
        {"speedup": 2, "ratios": (1.5,)},
        {"speedup": 2, "parts": 0},
        {"speedup": 2, "budget": 0},
        {"speedup": 2, "merging": toma_fx.ToMAConfig(cache=3)},
        {"speedup": 2, "merging": toma_fx.ToMAConfig(ratio=((0, 0.5), (0.5, 0.1)))},
        {"speedup": 2, "merging": toma_fx.ToDoConfig()},
    ],
)
def test_options_out_of_their_domain(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        toma_fx.tune(subject(), ["cat", "coffee"], **options)


def test_a_budget_that_is_too_small_says_what_is_enough() -> None:
    with pytest.raises(ConfigError, match="at least"):
        toma_fx.tune(subject(4), ["cat", "coffee"], speedup=2, **{**SMALL, "ratios": ()}, budget=3)


def test_models_with_two_denoisers_are_refused() -> None:
    own = FakeSubject()
    own.denoisers["second"] = next(iter(own.denoisers.values()))
    with pytest.raises(TuneError, match="one denoiser"):
        toma_fx.tune(own, ["a", "b"], speedup=2)


def test_too_many_steps_are_refused() -> None:
    with pytest.raises(TuneError, match="at most 100"):
        toma_fx.tune(FakeSubject(steps=101), ["a", "b"], speedup=2)

"""Fields of configurations and of targets as options of the command line."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from toma_fx.cli.fields import FieldParser
from toma_fx.cli.main import main, make_parser
from toma_fx.errors import ConfigError, RecipeError, UnknownNameError
from toma_fx.export.registry import TARGETS, target_class
from toma_fx.methods.cache import CacheConfig
from toma_fx.methods.config import METHODS, make_config
from toma_fx.methods.recipe import Recipe
from toma_fx.methods.tomesd import ToMeSDConfig

EXPLAIN = ("explain", "tiny-flux")
BUILD = ("build", "--model", "tiny-flux", "--out", "o", "--target")


def parse(*args: str) -> Any:
    return make_parser().parse_args([*map(str, args)])


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (("--ratio", "0.4"), {"ratio": 0.4}),
        (("--ratio=0.4", "--scope", "block"), {"ratio": 0.4, "scope": "block"}),
        (("--weights-every", "3", "--first_step", "2"), {"weights_every": 3, "first_step": 2}),
        (("--proportional", "--ratio", "0.4"), {"proportional": True, "ratio": 0.4}),
        (("--proportional", "false"), {"proportional": False}),
        (("--last_step", "null"), {"last_step": None}),
        (("--tile", "[4, 8]"), {"tile": (4, 8)}),
        (("--grid", "[8, 8]", "--tile", "2"), {"grid": (8, 8), "tile": 2}),
        (("--scale", "-1"), {"scale": -1.0}),
        (("--exclude", '["*.attn", "a=b"]'), {"exclude": ("*.attn", "a=b")}),
        (("--overrides", '{"*.0": {"ratio": 0.25}}'), {"overrides": {"*.0": {"ratio": 0.25}}}),
        (("--phases", '[[0.5, {"ratio": 0.25}]]'), {"phases": ((0.5, {"ratio": 0.25}),)}),
        (("--ratio", "[[0, 0.5], [0.6, 0.25]]"), {"ratio": [[0, 0.5], [0.6, 0.25]]}),
        (("--cache", "fast"), {"cache": "fast"}),
        (("--cache", "3"), {"cache": 3}),
        (("--cache.every", "3", "--cache.order", "2"), {"cache": {"every": 3, "order": 2}}),
        ((), {}),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_fields_that_were_given(
    words: tuple[str, ...], fields: dict[str, Any], before: bool
) -> None:
    """On either side of the model, which is an argument without a name."""
    args = parse("explain", *words, "tiny-flux") if before else parse(*EXPLAIN, *words)
    assert args.fields == fields
    assert args.model == "tiny-flux"
    if fields.get("scale") != -1:
        make_config(True, None, args.fields)


def test_a_nested_configuration_is_one() -> None:
    args = parse(*EXPLAIN, "--cache.every", "3", "--cache.scope", "block")
    assert make_config(True, None, args.fields).cache == CacheConfig(every=3, scope="block")


def test_the_method_says_which_fields_there_are(tmp_path: Path) -> None:
    assert parse(*EXPLAIN, "--method", "tomesd", "--sx", "4").fields == {"sx": 4}
    assert parse(*EXPLAIN, "--sx=4", "--method=tomesd").fields == {"sx": 4}
    with pytest.raises(UnknownNameError, match=r"an option of .*tomesd"):
        parse(*EXPLAIN, "--sx", "4")
    file = tmp_path / "r.json"
    Recipe(ToMeSDConfig(ratio=0.25)).save(file)
    assert parse(*EXPLAIN, "--recipe", str(file), "--sx", "4").fields == {"sx": 4}
    with pytest.raises(RecipeError):
        parse(*EXPLAIN, "--recipe", str(tmp_path / "none.json"))
    with pytest.raises(UnknownNameError, match="nearest: tomesd"):
        parse(*EXPLAIN, "--method", "tomsd")


def test_a_recipe_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a pipe; a preset beside it is refused."""
    reads, load, file = list[Path](), Recipe.load, tmp_path / "r.json"
    Recipe(ToMeSDConfig(ratio=0.25)).save(file)
    monkeypatch.setattr(Recipe, "load", lambda path: [reads.append(path), load(path)][1])
    monkeypatch.setattr("toma_fx.cli.explain.explain_model", lambda args, options, console: None)
    assert main([*EXPLAIN, "--recipe", str(file), "--sx", "4"]) == 0
    assert reads == [file]
    with pytest.raises(ConfigError, match="a preset and a recipe"):
        parse(*EXPLAIN, "--recipe", str(file), "--preset", "fast")


def test_the_target_says_which_options_there_are() -> None:
    given = ("--route", "onnx", "--optimization-level", "5", "--workspace", "7", "--ratio", "0.4")
    args = parse(*BUILD, "tensorrt", *given)
    assert args.target_fields == {"route": "onnx", "optimization_level": 5, "workspace": 7}
    assert args.fields == {"ratio": 0.4}
    assert parse(*BUILD, "tensorrt").target_fields == {}, "others keep their defaults"
    assert parse(*BUILD, "aoti", "--max-autotune").target_fields == {"max_autotune": True}
    with pytest.raises(ConfigError, match="--target onnx"):
        parse(*BUILD, "tensorrt", "--opset", "20")
    with pytest.raises(UnknownNameError, match="nearest: ratio"):
        parse(*BUILD, "onnx", "--ratoi", "0.4")
    with pytest.raises(UnknownNameError, match="nearest: --height"):
        parse(*BUILD, "onnx", "--heigth", "64")
    with pytest.raises(UnknownNameError, match="nearest: --overwrite"):
        parse(*BUILD, "onnx", "--overwite")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ratio", "x"), "a number in [0, 1)"),
        (("--scope", "bloc"), "nearest: block"),
        (("--cache.evry", "3"), "nearest: every"),
        (("--cache", "fats"), "nearest: fast"),
        (("--first_step", "1.5"), "first_step"),
        (("--last_step", "2", "--first_step", "4"), "at least first_step"),
    ],
)
def test_values_that_can_not_be(
    words: tuple[str, ...], said: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In the words of the class, before a model is loaded."""
    monkeypatch.setattr("toma_fx.cli.explain.load_example", None)
    assert main([*EXPLAIN, *words]) == 1
    assert said in capsys.readouterr().err


def test_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*EXPLAIN, "--ratio")
    assert "--ratio: expected one argument" in capsys.readouterr().err


def test_other_commands_take_no_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("info", "a", "--ratio", "0.4")
    assert "unrecognized arguments: --ratio" in capsys.readouterr().err


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.name)
def test_every_field_of_a_method_is_described(
    kind: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse("explain", "--help", "--method", kind.name)
    check_described(kind, capsys.readouterr().out)


@pytest.mark.parametrize("target", TARGETS)
def test_every_option_of_a_target_is_described(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse("build", "--target", target, "--help")
    check_described(target_class(target), capsys.readouterr().out)


def check_described(kind: Any, text: str) -> None:
    """The help has words on every field beside its type, from the docstring."""
    words = " ".join(text.split())
    for field in dataclasses.fields(kind):
        _, found, after = words.rpartition(f" --{field.name} ")
        assert found, field.name
        description = after.partition("(type: ")[0].split()
        assert len([word for word in description if word.islower()]) >= 2, (field.name, description)


def test_no_two_options_have_one_name() -> None:
    """Fields come before the command's own options: one of the same name would hide it."""
    own = set[str]()
    for command in ("explain", "build", "demo"):
        commands: Any = make_parser()._subparsers
        parser: FieldParser = commands._group_actions[0].choices[command]
        own |= {text.removeprefix("--").replace("-", "_") for text in parser._option_string_actions}
    fields = [{field.name for field in dataclasses.fields(kind)} for kind in METHODS]
    options = [{f.name for f in dataclasses.fields(target_class(t))} for t in TARGETS]
    assert "method" in own
    assert not own & set.union(*fields, *options)
    assert not set.union(*fields) & set.union(*options)
    for a, b in combinations(options, 2):
        assert not a & b, "the message that names another target names one"

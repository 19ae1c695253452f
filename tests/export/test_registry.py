"""The table of targets: what `export`, its short names and the command line make of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

import toma_fx
from toma_fx.errors import ConfigError, UnknownNameError
from toma_fx.export.registry import TARGETS, make_target, target_class
from toma_fx.export.targets import Target
from toma_fx.export.to_onnx.target import ONNXTarget


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_can_be_made(name: str) -> None:
    target = make_target(name, {})
    assert isinstance(target, Target)
    assert type(target) is target_class(name)
    short = getattr(toma_fx.export, name)
    assert isinstance(short, partial)
    assert short.func is toma_fx.export.export
    assert short.keywords == {"target": name}


def test_options_are_fields() -> None:
    assert make_target("onnx", {"opset": 20}) == ONNXTarget(opset=20)
    given = ONNXTarget("stateless")
    assert make_target(given, {}) is given


@pytest.mark.parametrize(
    ("target", "options", "error", "words"),
    [
        ("onxx", {}, UnknownNameError, "nearest: onnx"),
        ("onnx", {"opest": 20}, UnknownNameError, "expected: form, opset\n  got: opest"),
        ("onnx", {"opest": 20}, UnknownNameError, "nearest: opset"),
        ("onnx", {"max_autotune": True}, UnknownNameError, "no such option"),
        ("onnx", {"form": "statless"}, UnknownNameError, "nearest: stateless"),
        ("aoti", {"opset": 20}, UnknownNameError, "expected: max_autotune, inductor"),
        (ONNXTarget(), {"opset": 20}, ConfigError, "has its options already"),
    ],
)
def test_refusals(
    tmp_path: Path, target: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    """Before the model, or the folder, is looked at."""
    with pytest.raises(error, match=words):
        toma_fx.export.export(None, None, tmp_path / "a", target, **options)
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_of_the_package() -> None:
    with pytest.raises(AttributeError, match="build"):
        toma_fx.export.build  # type: ignore[attr-defined]  # noqa: B018

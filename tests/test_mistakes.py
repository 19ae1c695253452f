"""Mistakes in Python: a typed error that says what, where, what was expected, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import toma_fx
from tests.methods.test_methods import inputs, model
from toma_fx.errors import (
    ArtifactError,
    BuildError,
    ConfigError,
    ModelTypeError,
    StateError,
    TomaError,
    UnknownNameError,
)
from toma_fx.export.builder import export


def optimized(**options: Any) -> Any:
    return toma_fx.optimize(model(), min_tokens=1, **options)


def pipeline() -> Any:
    return SimpleNamespace(unet=optimized())


MISTAKES: dict[str, tuple[Callable[[], Any], type[TomaError], str]] = {
    "percent": (lambda: optimized(ratio=50), ConfigError, "try: 50 % is ratio=0.5"),
    "a quoted number": (lambda: optimized(ratio="0.5"), ConfigError, "without quotes: 0.5"),
    "no number": (lambda: optimized(ratio="half"), ConfigError, "got: 'half'"),
    "a regular expression": (
        lambda: optimized(include=r"blocks\.\d+\..*", example_inputs=inputs()),
        UnknownNameError,
        "shell wildcards",
    ),
    "another model exported": (
        lambda: export(model(), inputs(), "out"),
        ModelTypeError,
        r"try: toma_fx.optimize\(model\) before",
    ),
    "a pipeline exported": (
        lambda: export(pipeline(), inputs(), "out"),
        ModelTypeError,
        "try: give pipe.unet",
    ),
    "export the wrong way round": (
        lambda: export(optimized(), "out", inputs()),
        BuildError,
        r"expected: export\(model, inputs, folder\)\n  got: dict as the folder",
    ),
    "compile of what there is not": (
        lambda: optimized().compile(mod="default"),
        UnknownNameError,
        "nearest: mode",
    ),
    "a listener that is none": (lambda: toma_fx.on_event(3), ConfigError, "got: int"),  # type: ignore[arg-type]
    "one size, not a list": (
        lambda: optimized().warmup((512, 512)),
        ConfigError,
        r"try: warmup\(\[\(512, 512\)\]\)",
    ),
    "a path that is none": (lambda: toma_fx.load(3), ArtifactError, "got: int"),  # type: ignore[arg-type]
    "no rows": (lambda: toma_fx.example_inputs(nn.Linear(2, 2), batch=0), ConfigError, "batch"),
    "steps that are none": (lambda: toma_fx.State(steps="x"), StateError, "steps='x'"),  # type: ignore[arg-type]
    "a step before the first": (lambda: toma_fx.State(-1), StateError, "step=-1"),
    "fields that are none": (
        lambda: toma_fx.ToMAConfig.from_dict(3),  # type: ignore[arg-type]
        ConfigError,
        "got: int",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    make, error, message = MISTAKES[name]
    with pytest.raises(error, match=message) as found:
        make()
    assert found.value.where
    assert not any(tmp_path.iterdir())

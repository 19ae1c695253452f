"""Events: what happens is told to whoever listens, in the words of the log."""

from __future__ import annotations

import logging
import os
import py_compile
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import toma_fx
from tests.logs import logged
from tests.methods.test_methods import inputs, model
from toma_fx.events import NAMES, Event
from toma_fx.run import compiled as compiled_programs

PACKAGE = Path(__file__).parent.parent / "toma_fx"


@pytest.fixture
def events() -> Iterator[list[Event]]:
    heard: list[Event] = []
    remove = toma_fx.on_event(heard.append)
    yield heard
    remove()


def optimized(**options: Any) -> Any:
    return toma_fx.optimize(model(), min_tokens=1, **options)


@torch.no_grad()
def test_what_a_model_goes_through(events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_programs, "compile_graph", lambda program, *_: program.forward)
    denoiser = optimized(max_signatures=2).compile()
    with logged(logging.INFO, "toma_fx") as messages:
        denoiser(**inputs())
        assert [e.name for e in events] == ["parity", "capture", "compile"]
        with denoiser.using(ratio=0.25):
            denoiser(**inputs())
        denoiser(**inputs(batch=1))
    names = [e.name for e in events]
    assert names == [
        "parity", "capture", "compile", "plan", "compile", "parity", "capture", "drop", "compile",
    ]  # fmt: skip
    assert set(names) <= set(NAMES)
    parity, capture, compiled, plan, *_ = events
    assert parity.about["difference"] < 1e-5
    assert parity.about["model"] == type(model()).__name__
    assert capture.seconds is not None
    assert capture.seconds > 0
    assert capture.about["inputs"] in capture.message
    assert capture.about["reason"] == ""
    assert (compiled.about["kind"], compiled.about["again"]) == ("refresh", False)
    assert plan.about["reason"] == "ratio is 0.25, was 0.5"
    assert "sample is" in events[6].about["reason"]
    assert events[7].about["reason"] == "max_signatures"
    assert {e.message for e in events if e.name != "drop"} <= set(messages)


@torch.no_grad()
def test_ready_and_thrashing(events: list[Event]) -> None:
    denoiser = optimized(max_signatures=1)
    denoiser.warmup(calls=[inputs()])
    (ready,) = (e for e in events if e.name == "warmup")
    assert ready.about["kinds"] == ("refresh", "reuse")
    for batch in range(3, 7):
        denoiser(**inputs(batch=batch))
    (thrash,) = (e for e in events if e.name == "thrash")
    assert set(thrash.about["differing"]) >= {"sample"}


@torch.no_grad()
def test_listeners_harm_nobody(events: list[Event]) -> None:
    def fail(event: Event) -> None:
        raise ValueError("no metrics today")

    remove = toma_fx.on_event(fail)
    try:
        with logged(logging.ERROR, "toma_fx.events") as messages:
            optimized()(**inputs())
    finally:
        remove()
    assert messages == ["a listener of events failed"] * len(events)
    assert events
    heard = len(events)
    remove()  # again
    with logged(logging.ERROR, "toma_fx.events") as messages:
        optimized()(**inputs())
    assert not messages
    assert len(events) == 2 * heard


@pytest.mark.parametrize(
    ("level", "shown"),
    [("info", True), ("INFO", True), ("warning", False), ("", False), ("loud", False)],
)
def test_the_environment_shows_the_log(level: str, shown: bool) -> None:
    code = (
        "import logging, toma_fx, sys\n"
        "assert 'torch' not in sys.modules\n"
        "logging.getLogger('toma_fx.run').info('a graph is captured')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TOMA_FX_LOG": level},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("toma_fx.run INFO: a graph is captured" in done.stderr) == shown
    assert ("'loud' is not a level: debug, info" in done.stderr) == (level == "loud")
    assert shown or level == "loud" or not done.stderr


def test_no_file_makes_python_warn(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in PACKAGE.rglob("*.py"):
            py_compile.compile(str(path), str(tmp_path / "compiled"), doraise=True)


def test_warnings_of_the_package_fail_tests() -> None:
    module = compile("import warnings\nwarnings.warn('old', FutureWarning)", "<it>", "exec")
    with pytest.raises(FutureWarning, match="old"):
        exec(module, {"__name__": "toma_fx.run.old"})
    with pytest.raises(FutureWarning, match="old"):
        exec(module, {"__name__": "toma_fx"})

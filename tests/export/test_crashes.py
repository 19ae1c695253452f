"""Builds that are ended at any call that changes a file, that find the disk full, that meet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.export.in_process import InProcess
from tests.methods.test_methods import inputs
from toma_fx.export.builder import export

HOOKS = Path(__file__).with_name("crash.c")


@pytest.fixture(scope="module")
def hooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that is preloaded."""
    library = tmp_path_factory.mktemp("hooks") / "crash.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, HOOKS, "-ldl"]
    subprocess.run(command, check=True)
    return library


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, optimized: Any) -> Path:
    folder = tmp_path_factory.mktemp("template") / "a"
    export(optimized, inputs(), folder, InProcess())
    return folder


@pytest.fixture
def try_builds(hooks: Path, template: Path, tmp_path: Path) -> Any:
    def run(*arguments: str, seconds: int = 600) -> dict[str, int]:
        what, *more = arguments
        module = [sys.executable, "-m", "tests.export.crash_points"]
        environment = {**os.environ, "LD_PRELOAD": str(hooks), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*module, what, template, tmp_path, *more],
            env=environment, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        print(done.stdout)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    return run


def test_a_build_that_is_ended_or_finds_the_disk_full(try_builds: Any) -> None:
    """A sample of the calls; all of them in the slow tests."""
    counts = try_builds("copy", "10")
    assert counts["killed, replacing"] == counts["full disk, first"] == 10


def test_at_every_call(try_builds: Any) -> None:
    counts = try_builds("copy")
    for name in ("first", "replacing"):
        assert counts[f"killed, {name}"] == counts[f"full disk, {name}"] == counts[f"calls, {name}"]
        assert counts[f"calls, {name}"] > 40


def test_two_builds_at_once(try_builds: Any) -> None:
    assert sum(try_builds("pairs", "400").values()) == 400


@pytest.mark.parametrize(("target", "points"), [("onnx", 10), ("aoti", 3)])
def test_real_builds(try_builds: Any, target: str, points: int) -> None:
    counts = try_builds(target, str(points), seconds=1800)
    assert counts["killed, replacing"] == counts["full disk, replacing"] == points

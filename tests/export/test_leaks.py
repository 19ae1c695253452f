"""Servers load artifacts again and again, and run them for weeks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.methods.test_methods import inputs
from toma_fx.export.builder import export

LOADS, STEPS = 200, 10_000
KEPT_BY_A_LOAD = {"onnx": 0.05, "aoti": 2.0}
"""MiB that a load may leave: torch's `load_pt2` leaves 1.5 MiB by itself."""


@pytest.mark.parametrize("target", KEPT_BY_A_LOAD)
def test_nothing_grows(tmp_path: Path, optimized: Any, target: str) -> None:
    export(optimized, inputs(), tmp_path / "a", target)
    command = [sys.executable, "-m", "tests.export.leaks", tmp_path / "a", str(LOADS), str(STEPS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    print(target, done.stdout)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loads"]["descriptors"] == found["warm"]["descriptors"]
    assert found["steps"]["descriptors"] == found["before steps"]["descriptors"]
    assert found["loads"]["MiB"] - found["warm"]["MiB"] <= LOADS * KEPT_BY_A_LOAD[target] + 5
    assert found["steps"]["MiB"] - found["before steps"]["MiB"] <= 5

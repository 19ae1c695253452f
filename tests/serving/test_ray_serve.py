"""The example for Ray Serve: `ray_serve_checks.py`, in a network that has the loopback alone."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples import ROOT
from tests.network import without_network

LIFE = 400
"""Seconds after which everything is ended."""


def test_replicas_under_faults() -> None:
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("ray.serve") is None:
        pytest.skip("ray[serve] is not installed")
    checks = Path(__file__).with_name("ray_serve_checks.py")
    options = ["-x", "-p", "no:cacheprovider", "-n", "0", "-m", ""]
    command = [sys.executable, "-m", "pytest", *options, str(checks)]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        ["timeout", "-k", "5", str(LIFE), *without_network(), *command],
        cwd=ROOT, env={**os.environ, **quiet}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "9 passed" in done.stdout, done.stdout[-3000:]

"""Commands that only read a folder start without torch."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import toma_fx
from tests.export.in_process import InProcess
from tests.methods.test_methods import inputs, model

CODE = """
import sys
from toma_fx.cli.main import main
try:
    status = main(sys.argv[1:])
except SystemExit as error:
    status = error.code
heavy = ("torch", "diffusers", "numpy", "onnx", "torch._dynamo", "torch._inductor")
print("status", status, [name for name in heavy if name in sys.modules])
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "a"
    optimized: Any = toma_fx.optimize(model(), method="tomesd", min_tokens=1)
    toma_fx.export.export(optimized, inputs(), out, InProcess())
    return out


@pytest.mark.parametrize(
    "command", ["--help", "--version", "run --help", "info", "info --json", "verify"]
)
def test_no_torch(command: str, artifact: Path) -> None:
    words = command.split()
    words += [] if words[-1] in ("--help", "--version") else [str(artifact)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = subprocess.run([sys.executable, "-c", CODE, *words], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"toma-fx {command}: {seconds:.2f} s of processor time")
    assert out.stdout.splitlines()[-1] == "status 0 []", out.stdout + out.stderr

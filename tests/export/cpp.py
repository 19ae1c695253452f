"""The C++ example, built and run."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"


def run_example(
    folder: Path, artifact: Path, calls: Sequence[dict[str, Any]]
) -> list[tuple[str, str, str, str]]:
    """Build the example in `folder` and run an artifact on calls; it writes `folder / "out.0"`, ...

    Returns:
        What it says of each step: (index, kind of program, shape, mean of magnitudes).
    """
    given = {f"{i}/{name}": x for i, call in enumerate(calls) for name, x in call.items()}
    save_file(given, folder / "inputs.safetensors")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    folders = ["-S", str(EXAMPLE), "-B", str(folder / "build")]
    subprocess.run(["cmake", prefix, *folders], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", folder / "build"], check=True, capture_output=True)
    run = subprocess.run(
        [folder / "build" / "denoise", artifact, folder / "inputs.safetensors", folder / "out"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return re.findall(r"step (\d+) (\w+) \[(.*?)\] mean of magnitudes (\S+)", run.stdout)

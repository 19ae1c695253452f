"""Loads of an artifact and steps of one: what stays of them. `leaks FOLDER LOADS STEPS`

Prints descriptors and resident memory, in MiB, when warm and at the end of each.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch

import toma_fx
from tests.methods.test_methods import inputs


def held() -> dict[str, float]:
    """Descriptors and memory of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
    }


def main() -> None:
    folder, loads, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    found = {}
    for name, times in (("warm", 20), ("loads", loads)):
        for _ in range(times):
            toma_fx.load(folder)(**inputs())
        found[name] = held()
    denoiser, call = toma_fx.load(folder), inputs()
    for name, times in (("before steps", 500), ("steps", steps)):
        for _ in range(times):
            denoiser(**call)
        found[name] = held()
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Check every denoiser of the matrix and write the table: `python -m tests.zoo`."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

import diffusers
import torch

from tests.zoo import CASES
from tests.zoo.check import Found
from tests.zoo.table import outcome, page

DOCS = Path(__file__).parents[2] / "docs" / "denoisers.md"


def main() -> int:
    """Run the checks in processes; the page is written only if all pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    start, results, failed = time.perf_counter(), {}, 0
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for index, kind, found, seconds in pool.imap_unordered(outcome, range(len(CASES))):
            good = isinstance(found, Found)
            failed += not good
            results[index] = (kind, found)
            print(f"{'ok  ' if good else 'FAIL'} {CASES[index].name} {seconds:.1f} s", flush=True)
            if not good:
                print(found)
    minutes = (time.perf_counter() - start) / 60
    print(f"{len(CASES) - failed} of {len(CASES)} passed in {minutes:.1f} minutes")
    if failed:
        return 1
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    found_all = [(CASES[i], *results[i]) for i in sorted(results)]
    DOCS.write_text(page(found_all, versions))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The matrix as a page of the documentation."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence

import torch

from tests.zoo import CASES
from tests.zoo.base import Case
from tests.zoo.check import Found, check
from tests.zoo.linear_references import LINEAR
from tests.zoo.references import FAMILIES

HEADER = """# Denoisers

Tested: every row is a tiny configuration of the real diffusers class, called as its pipeline calls
it (`tests/zoo/`). For each, on inputs it was not captured with,

- the captured graph with merging off equals the model bit by bit;
- the attention sites are of the kinds that the model's code lets expect, and as many branches merge
  in scope `sublayer` (*attention*: with attention; *MLP*: with a feed-forward alone);
- computing on all tokens in another order gives the original output, in the scopes `sublayer` and
  `stack`;
- where tokens come in pairs that are alike, as their places are, merging each pair into one changes
  nothing, in the same scopes (merged keys count twice; attention that can't count them stays);
- merging half of the tokens changes the output, which stays finite;
- on the same inputs again, a cached step gives what the step that computed gave, and computes
  less: of whole streams,
  of single blocks that merge, and of all blocks but the last ones.

*crop*: keeping only a corner of the picture equals the model on that corner, where its positions
allow that. *eager*: with merging on, the program equals an eager implementation written for that
family (`tests/zoo/references.py`, `tests/zoo/linear_references.py`). Grids are height x width, or
frames x height x width, in tokens of the tiny configuration. What is not listed has not been
tested; the analysis knows no model by name.

"""


def outcome(index: int) -> tuple[int, str, Found | str, float]:
    """(case, class of the model, what was found or why it failed, seconds)."""
    torch.set_num_threads(1)
    case, start = CASES[index], time.perf_counter()
    try:
        found: Found | str = check(case)
    except Exception:
        found = traceback.format_exc()
    return index, type(case.build()).__name__, found, time.perf_counter() - start


def size_text(size: tuple[int, ...]) -> str:
    """ "6x10" for (6, 10)."""
    return "x".join(map(str, size))


def row(case: Case, kind: str) -> str:
    """A line of the table of what merges."""
    sites = ", ".join(f"{n} {name}" for name, n in sorted(case.sites.items()))
    grids = ", ".join(size_text(g) for g in dict.fromkeys(case.grids))
    oracles = ["crop"] if case.crop else []
    oracles += ["eager"] if case.name in {*FAMILIES, *LINEAR} else []
    cells = (case.title, f"`{kind}`", sites, case.attention, case.mlp, grids, ", ".join(oracles))
    return f"| {' | '.join(map(str, cells))} |"


def refused_row(case: Case, kind: str) -> str:
    """A line of the table of what is refused."""
    assert case.refused is not None
    error, part = case.refused
    return f"| {case.title} | `{kind}` | `{error}`: {part} | {case.why} |"


def page(found: Sequence[tuple[Case, str, Found]], versions: str) -> str:
    """The whole page, from the outcome of every case."""
    exact = max(max(f.permuted or 0, f.cropped or 0, f.twinned or 0) for _, _, f in found)
    merged = [row(case, kind) for case, kind, _ in found if case.refused is None]
    refused = [refused_row(case, kind) for case, kind, _ in found if case.refused is not None]
    return HEADER + "\n".join(
        [
            f"Written by `python -m tests.zoo` with {versions}, float32 on a CPU; the largest",
            f"difference to an oracle was {exact:.1e} of the largest value.",
            "",
            "| model | class | attention sites | attention | MLP | grids | further oracles |",
            "|---|---|---|---|---|---|---|",
            *merged,
            "",
            "Refused, with a typed error that says why:",
            "",
            "| model | class | error | why |",
            "|---|---|---|---|",
            *refused,
            "",
        ]
    )

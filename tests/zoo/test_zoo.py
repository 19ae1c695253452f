"""The denoisers of diffusers: each merges where it should and passes the oracles, or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.zoo import CASES
from tests.zoo.base import Case
from tests.zoo.check import EXACT, check, trace, twinned
from tests.zoo.table import refused_row, row
from toma_fx.methods.toma import ToMA


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_denoiser(case: Case) -> None:
    check(case)


@torch.no_grad()
def test_twins_have_to_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without that, joint attention would look at the text too much."""
    traced = trace(next(case for case in CASES if case.name == "sd3"))
    assert twinned(traced, "stack") < EXACT
    monkeypatch.setattr(ToMA, "sizes", lambda *args: torch.ones(2, 30))
    with pytest.raises(AssertionError, match="one of two twins differs"):
        twinned(traced, "stack")


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_page_lists_what_is_tested_and_nothing_else() -> None:
    text = (Path(__file__).parents[2] / "docs" / "denoisers.md").read_text()
    listed = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    listed = [cells for cells in listed if cells[0] != "| model"]
    wanted = [row(case, "") if case.refused is None else refused_row(case, "") for case in CASES]
    # all but the second column, the class of a model that would have to be built
    expected = sorted([cells[0], *cells[2:]] for cells in (line.split(" | ") for line in wanted))
    assert sorted([cells[0], *cells[2:]] for cells in listed) == expected

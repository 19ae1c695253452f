"""The denoisers of diffusers: each merges where it should and passes the oracles, or is refused."""

from __future__ import annotations

import pytest

from tests.zoo import CASES
from tests.zoo.check import check

NAMES = [
    pytest.param(case.name, marks=[] if case.quick else [pytest.mark.slow]) for case in CASES
]


@pytest.mark.parametrize("name", NAMES)
def test_denoiser(name: str) -> None:
    check(next(case for case in CASES if case.name == name))


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)

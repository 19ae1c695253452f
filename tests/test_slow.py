"""The list of slow tests does what it says, and is the only one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slow import SLOW, Slow, slow_tests

IDS = ("a/test_a.py::test_one[x-1]", "a/test_a.py::test_one[y-1]", "a/test_a.py::test_two")


def test_entries_match_by_node_id_and_keep_what_is_quick() -> None:
    entries = (Slow("a/test_a.py::test_one[*]", "whole", quick=("y-*",)),)
    assert slow_tests(IDS, entries) == ({IDS[0]: "whole"}, set())


@pytest.mark.parametrize(
    ("entry", "unused"),
    [
        (Slow("a/test_a.py::test_three", "gone"), {"a/test_a.py::test_three"}),
        (Slow("a/test_a.py::test_one[x]", "renamed"), {"a/test_a.py::test_one[x]"}),
        (
            Slow("a/test_a.py::test_one[*]", "whole", quick=("z-*",)),
            {"a/test_a.py::test_one[*], quick z-*"},
        ),
        (Slow("a/test_a.py::test_two", "all are quick", quick=("*",)), {"a/test_a.py::test_two"}),
        (Slow("b/test_b.py::test_three", "a file that is not collected"), set()),
    ],
)
def test_entries_that_match_nothing_are_told(entry: Slow, unused: set[str]) -> None:
    assert slow_tests(IDS, (entry,))[1] == unused


def test_files_of_the_list_are_there() -> None:
    here = Path(__file__).parent
    assert not [e.tests for e in SLOW if not (here / e.tests.partition("::")[0]).is_file()]


def test_no_other_file_marks_a_test_slow() -> None:
    here = Path(__file__).parent
    files = [f for f in here.rglob("*.py") if f.name not in ("slow.py", "conftest.py")]
    assert not [f.name for f in files if "mark." + "slow" in f.read_text()]

"""The pages that describe names describe all of them, and nothing else; every page has a place."""

from __future__ import annotations

import re
from pathlib import Path

import toma_fx
from toma_fx import errors

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def error_types() -> set[str]:
    """Every class of toma_fx/errors.py."""
    return {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__
    }


def test_the_error_index_has_every_error_and_no_other() -> None:
    page = (DOCS / "errors.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", page, re.M)
    names = [name for name, _ in rows]
    assert len(names) == len(set(names))
    assert set(names) == error_types()
    for name, row in rows:
        cells = [cell.strip() for cell in row.split("|")]
        assert len(cells) == 3, name
        assert all(cells) or name == "TomaError", f"{name}: what, why, what to do"


def test_every_error_is_public() -> None:
    assert error_types() <= set(toma_fx.__all__)


def test_the_reference_has_every_public_name_but_errors() -> None:
    names = re.findall(r"^::: toma_fx\.(\w+)$", (DOCS / "api.md").read_text(), re.M)
    assert len(names) == len(set(names))
    assert set(names) == set(toma_fx.__all__) - error_types()


def test_every_page_is_in_the_navigation_once() -> None:
    listed = re.findall(
        r"^ +- (?!repository/)([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M
    )
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md"))


def test_links_of_pages_lead_to_files() -> None:
    pages = [*DOCS.glob("*.md"), *ROOT.glob("*.md")]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
        if "://" not in link
    ]
    assert len(links) > 100
    assert [f"{p.name}: {link}" for p, link in links if not (p.parent / link).exists()] == []

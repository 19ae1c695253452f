"""A hook of MkDocs: files that pages link to outside `docs/` come along into the site.

The pages are read in the repository, too, where `../examples/own_model.py` is a link that works.
In the site such a file lies at `repository/examples/own_model.py`. A folder has no page there: its
link becomes plain text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
"""Files of the repository that are pages of their own."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def target(link: str, page: str) -> Path | None:
    """The path below the repository that a relative link of a page means, outside `docs/` alone."""
    if "://" in link:
        return None
    here = ROOT / page.removeprefix("repository/") if is_copied(page) else ROOT / "docs" / page
    path = Path(os.path.normpath(here.parent / link))
    if not path.is_relative_to(ROOT) or not path.exists():
        return None
    return path.relative_to(ROOT)


def is_copied(page: str) -> bool:
    """Is it a page of the repository that lies outside `docs/`?"""
    return page.startswith("repository/")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the repository, and every file that a page links to."""
    for name in PAGES:
        files.append(File.generated(config, f"repository/{name}", abs_src_path=str(ROOT / name)))
    for page in list(files.documentation_pages()):
        for link in LINK.finditer(page.content_string):
            path = target(link[3], page.src_uri)
            if path is None or path.parts[0] == "docs" or not (ROOT / path).is_file():
                continue
            uri = f"repository/{path.as_posix()}"
            if uri not in files.src_uris:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to the repository become links to what was copied."""
    source = page.file.src_uri

    def replace(link: re.Match[str]) -> str:
        mark, text, address, anchor = link[1], link[2], link[3], link[4] or ""
        path = target(address, source)
        if path is None or (path.parts[0] == "docs" and not is_copied(source)):
            return link[0]
        inside = path.parts[0] == "docs"
        uri = path.relative_to("docs").as_posix() if inside else f"repository/{path.as_posix()}"
        if uri not in files.src_uris:
            return text
        up = os.path.relpath(uri, PurePosixPath(source).parent)
        return f"{mark}[{text}]({Path(up).as_posix()}{anchor})"

    return LINK.sub(replace, markdown)

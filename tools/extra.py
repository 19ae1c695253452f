"""Print the requirements of an extra of pyproject.toml: `python tools/extra.py docs`."""

import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"

if __name__ == "__main__":
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    print(" ".join(extras[sys.argv[1]]))

"""Values as text."""

from __future__ import annotations

import json
import sys
from typing import Any


def print_json(value: Any) -> None:
    """Print a value as JSON, in ASCII."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def bytes_text(size: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"

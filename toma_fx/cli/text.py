"""Values as text."""

from __future__ import annotations


def bytes_text(size: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"

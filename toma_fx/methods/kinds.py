"""Names of the kinds of programs: what a schedule says is due, and artifacts call their programs.

Where the configuration differs over the steps (`MethodConfig.phases`), each later phase has kinds
of its own: "refresh_1" selects as the second phase does. What merges nothing is the same in all.
"""

from __future__ import annotations

REFRESH, MATCH, REWEIGH, REUSE, PLAIN = "refresh", "match", "reweigh", "reuse", "plain"
SELECTING = (REFRESH, MATCH)
"""What selects destinations: on what comes in, or on what went out in the step before."""
CACHED, CACHED_PLAIN = "cached", "cached_plain"
MIXED, MIXED_PLAIN = "mixed", "mixed_plain"
UNMERGED = frozenset({PLAIN, CACHED_PLAIN, MIXED_PLAIN})
"""Kinds that merge nothing, in whatever phase."""


def kind_in(kind: str, phase: int) -> str:
    """The kind of a phase that does what `kind` does in the first.

    >>> kind_in("refresh", 1), kind_in("plain", 1)
    ('refresh_1', 'plain')
    """
    return kind if phase == 0 or kind in UNMERGED else f"{kind}_{phase}"


def role_of(kind: str) -> str:
    """What a kind does, whichever phase it is of.

    >>> role_of("refresh_1"), role_of("cached_plain")
    ('refresh', 'cached_plain')
    """
    role, _, phase = kind.rpartition("_")
    return role if role and phase.isdecimal() else kind


def phase_of(kind: str) -> int:
    """The phase that a kind is of, from 0."""
    return int(kind[len(role_of(kind)) + 1 :] or 0)


def is_cached(kind: str) -> bool:
    """Whether a kind uses kept updates for all rows."""
    return role_of(kind) in (CACHED, CACHED_PLAIN)


def merges(kind: str) -> bool:
    """Whether a kind merges anything."""
    return kind not in UNMERGED

"""What is alike said once: patterns of module paths, and rejections by reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toma_fx.plan.plan import Rejection

LONGEST = 28
"""Characters of a pattern."""


def pattern_of(paths: Sequence[str]) -> str:
    """A pattern that fits all module paths, of their ends alone if it is long.

    `blocks.0.attn` and `blocks.7.attn` give `blocks.*.attn`; with `mid.attn` it is `*.attn`.
    """
    split = [path.split(".")[::-1] for path in paths]
    ends = [set(column) for column in zip(*split, strict=False)]
    parts = [each.pop() if len(each) == 1 else "*" for each in ends][::-1]
    if len(set(map(len, split))) > 1:
        parts.insert(0, "*")
    while parts[:2] == ["*", "*"] or (len(".".join(parts)) > LONGEST and len(parts) > 2):
        parts[:2] = ["*"]
    return ".".join(parts)


def leaf_of(path: str) -> str:
    """The last name of a module path that is no number."""
    return next((p for p in reversed(path.split(".")) if not p.isdigit()), path)


@dataclass(frozen=True)
class LeftAlone:
    """Branches and attentions that are left alone for one reason.

    Attributes:
        where: pattern of their modules. count: how many. kind, reason: of each.
    """

    where: str
    count: int
    kind: str
    reason: str

    def __str__(self) -> str:
        many = f", {self.count}x" if self.count > 1 else ""
        return f"{self.where} ({self.kind}{many}): {self.reason}"


def group_rejections(rejections: Sequence[Rejection]) -> list[LeftAlone]:
    """What is left alone, for the same reason together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for r in rejections:
        path = r.module or r.node
        reason = r.reason.removeprefix(f"{r.cause}: ") if r.refusal else r.reason
        groups.setdefault((leaf_of(path), r.kind, reason), []).append(path)
    return [
        LeftAlone(pattern_of(paths), len(paths), kind, reason)
        for (_, kind, reason), paths in groups.items()
    ]

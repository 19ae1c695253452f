"""Calls of single requests as one call: rows side by side, one tensor of what all share."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toma_fx.compat.pytorch import tree_flatten, tree_map, tree_unflatten
from toma_fx.errors import SignatureError
from toma_fx.graph.nodes import TIMESTEPS
from toma_fx.run.marks import Likeness, Mark

if TYPE_CHECKING:
    from toma_fx.compat.pytorch import TreeSpec

KNOWN = 64
"""Shared tensors (position ids, say) whose contents are remembered."""


@dataclass(frozen=True)
class Rows:
    """The call of one request, taken apart.

    Attributes:
        count: rows of the batch that are its own. leaves: of the call. structure: of the leaves.
        own: places of the leaves that have its rows; the others are shared.
        key: equal for calls that fit into one batch.
    """

    count: int
    leaves: tuple[Any, ...]
    structure: TreeSpec
    own: frozenset[int]
    key: Hashable

    def part(self, begin: int, end: int) -> Rows:
        """Some of its rows, as a call."""
        picked = (x[begin:end] if i in self.own else x for i, x in enumerate(self.leaves))
        return replace(self, count=end - begin, leaves=tuple(picked))


class Splitter:
    """Takes calls apart; remembers shared tensors, so that equal ones are read once.

    Args:
        first: name of the argument whose first dimension is the rows: the picture.
    """

    def __init__(self, first: str) -> None:
        self._first = first
        self._known: list[tuple[Mark, Tensor]] = []

    def split(self, call: Mapping[str, Any]) -> Rows:
        """Take a call apart.

        A timestep of no dimensions becomes one for each row: requests are at different ones.

        Raises:
            SignatureError: there is no picture.
        """
        picture = call.get(self._first)
        if not isinstance(picture, Tensor) or not picture.dim() or not len(picture):
            raise SignatureError(
                "a call without a picture",
                where=self._first,
                expected="a tensor whose first dimension is the rows of the request",
                got=f"{tuple(picture.shape)}" if isinstance(picture, Tensor) else repr(picture),
                hint=f"give every argument by name, {self._first} among them",
            )
        count, named = len(picture), dict(sorted(call.items()))
        for name in TIMESTEPS:
            if name in named and named[name] is not None:
                named[name] = _by_row(named[name], count, picture.device)
        leaves, structure = tree_flatten(named)
        own = frozenset(
            i for i, x in enumerate(leaves)
            if isinstance(x, Tensor) and x.dim() and len(x) == count
        )  # fmt: skip
        shared = [x if i in own else self._shared(x) for i, x in enumerate(leaves)]
        key = (structure, own, *(_key(x, i in own) for i, x in enumerate(shared)))
        return Rows(count, tuple(shared), structure, own, key)

    def _shared(self, leaf: Any) -> Any:
        """The first tensor that had this content; reading a new one waits for its device."""
        if not isinstance(leaf, Tensor):
            return leaf
        mark = Mark.of(leaf)
        for known, tensor in self._known:
            if known.compare(mark) > Likeness.DIFFERENT:
                return tensor
        alike = (t for _, t in self._known if _key(t, False)[1:] == _key(leaf, False)[1:])
        found = next((t for t in alike if torch.equal(t, leaf)), leaf)
        self._known = [*self._known[1 - KNOWN :], (mark, found)]
        return found


def _by_row(timestep: Any, count: int, device: torch.device) -> Tensor:
    """A timestep of each row."""
    if isinstance(timestep, Tensor):
        return timestep.expand(count) if timestep.dim() == 0 else timestep
    dtype = torch.float32 if isinstance(timestep, float) else torch.int64
    return torch.full((count,), timestep, dtype=dtype, device=device)


def _key(leaf: Any, own: bool) -> tuple[Hashable, ...]:
    """What leaves of one batch must agree on."""
    if isinstance(leaf, Tensor):
        shape = tuple(leaf.shape[1:] if own else leaf.shape)
        return (None if own else id(leaf), shape, leaf.dtype, leaf.device)
    return (type(leaf).__name__, repr(leaf))


def join(calls: Sequence[Rows]) -> dict[str, Any]:
    """Calls of one key as one call."""
    first = calls[0]
    leaves = [
        torch.cat([call.leaves[i] for call in calls]) if i in first.own else leaf
        for i, leaf in enumerate(first.leaves)
    ]
    joined: dict[str, Any] = tree_unflatten(leaves, first.structure)
    return joined


def cut(outputs: Any, counts: Sequence[int]) -> list[Any]:
    """The outputs of a batch, by call; nothing of one keeps the memory of the batch."""
    total, pieces, begin = sum(counts), [], 0
    for count in counts:
        part = slice(begin, begin + count)
        own = lambda x, part=part: (  # noqa: E731
            x[part].clone() if isinstance(x, Tensor) and x.dim() and len(x) == total else x
        )
        pieces.append(tree_map(own, outputs))
        begin += count
    return pieces

"""Passes: what is computed piece by piece along a dimension is computed at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from toma_fx.graph.nodes import CASTS, JOINS, argument, op_name
from toma_fx.graph.rewriter import Rewriter

aten = torch.ops.aten
EXACT = CASTS | {f"aten.{op}" for op in ("add", "sub", "rsub", "mul", "div", "neg")}
"""Element-wise ops that give an element the same value wherever it lies, to the last bit; kernels
of others (exp, say) may compute the rest of a division into vectors by another formula."""


@dataclass(frozen=True)
class FoldSlices:
    """cat([x[:a], x[a:]], dim)  becomes  x"""

    name: ClassVar[str] = "fold_slices"

    def apply(self, rewriter: Rewriter) -> None:
        """Replace joins of slices that begin where the one before ends, and leave nothing out."""
        for node in rewriter.calls(*JOINS):
            pieces, dim = _joined(node)
            if (source := _sliced_source(pieces, dim)) is not None:
                rewriter.replace(node, source)


@dataclass(frozen=True)
class JoinPieces:
    """cat([f(x[:a], u), f(x[a:], v)], dim)  becomes  f(x, cat([u, v], dim))

    f is an op of `EXACT`, or several. A model that modulates the tokens of a first frame by
    vectors of their own so gets a table of tokens, [B, N, C], and its stream stays in one piece. u
    and v are expanded to the sizes of the pieces if they broadcast. Features, which the last
    dimension holds, stay in pieces.
    """

    name: ClassVar[str] = "join_pieces"

    def apply(self, rewriter: Rewriter) -> None:
        """Replace joins in graph order, so that what pieces are cut from is joined before."""
        for node in rewriter.calls(*JOINS):
            pieces, dim = _joined(node)
            if dim == -1 or _sliced_source(pieces, dim) is not None:
                continue
            if _follows_slices(pieces, dim):
                sizes = [p.meta["val"].shape[dim] for p in pieces]
                with rewriter.before(node):
                    rewriter.replace(node, _join(rewriter, pieces, dim, sizes))


def _joined(node: fx.Node) -> tuple[list[fx.Node], int]:
    """What is joined, and along which dimension, counted from the last."""
    arguments: Any = node.args
    rank = node.meta["val"].dim()
    return list(arguments[0]), argument(node, 1, "dim", 0) % rank - rank


def _sliced_source(pieces: Sequence[fx.Node], dim: int) -> fx.Node | None:
    """The value that the pieces are slices of, if they are all of it in order."""
    if any(op_name(p.target) != "aten.slice" for p in pieces):
        return None
    first: Any = pieces[0].args
    source, at = first[0], 0
    shape = source.meta["val"].shape
    for piece in pieces:
        args: Any = piece.args
        aligned = args[0] is source and len(args) == 4
        if not aligned or args[1] % len(shape) - len(shape) != dim or args[2] != at:
            return None
        at = args[3]
    return source if isinstance(at, int) and at >= shape[dim] else None


def _follows_slices(pieces: Sequence[fx.Node], dim: int) -> bool:
    """Whether pieces are made alike, by ops of `EXACT`, of slices that are all of a value."""
    if _sliced_source(pieces, dim) is not None:
        return True
    columns = _columns(pieces, dim)
    return any(isinstance(c[0], fx.Node) and _follows_slices(c, dim) for c in columns)


def _columns(pieces: Sequence[fx.Node], dim: int) -> list[Any]:
    """The arguments of the op that made all pieces, each once for every piece; [] if others did."""
    same = {(p.target, len(p.args), repr(p.kwargs), len(p.users)) for p in pieces}
    if op_name(pieces[0].target) not in EXACT or len(same) > 1 or len(pieces[0].users) > 1:
        return []
    columns = list(zip(*(p.args for p in pieces), strict=True))
    return columns if all(_may_join(column, dim) for column in columns) else []


def _may_join(column: Sequence[Any], dim: int) -> bool:
    """Whether arguments are one literal, or tensors that differ along `dim` alone."""
    if not all(isinstance(x, fx.Node) for x in column):
        return len({repr(x) for x in column}) == 1
    values = [x.meta["val"] for x in column]
    if not all(isinstance(v, Tensor) for v in values):
        return False
    return len({(v.dtype, v.device, tuple(_with_size(v, dim, 1))) for v in values}) == 1


def _with_size(value: Tensor, dim: int, size: int) -> list[int]:
    """The shape of a value, with another size along `dim` (counted from the last)."""
    shape = [1] * (-dim - value.dim()) + list(value.shape)
    shape[dim] = size
    return shape


def _join(rewriter: Rewriter, pieces: Sequence[fx.Node], dim: int, sizes: Sequence[int]) -> fx.Node:
    """One value for all pieces, at the cursor."""
    if (source := _sliced_source(pieces, dim)) is not None:
        return source
    if _follows_slices(pieces, dim):
        columns = _columns(pieces, dim)
        args = [
            _join(rewriter, c, dim, sizes) if isinstance(c[0], fx.Node) else c[0] for c in columns
        ]
        target: Any = pieces[0].target
        return rewriter.insert(target, *args, **pieces[0].kwargs)
    if len(set(pieces)) == 1 and _broadcasts(pieces[0], dim):
        return pieces[0]
    parts = []
    for piece, size in zip(pieces, sizes, strict=True):
        shape = _with_size(piece.meta["val"], dim, size)
        wide = _broadcasts(piece, dim)
        parts.append(rewriter.insert(aten.expand.default, piece, shape) if wide else piece)
    return rewriter.insert(aten.cat.default, parts, dim)


def _broadcasts(node: fx.Node, dim: int) -> bool:
    """Whether a value is alike all along `dim` (counted from the last)."""
    value: Tensor = node.meta["val"]
    return value.dim() < -dim or value.shape[dim] == 1

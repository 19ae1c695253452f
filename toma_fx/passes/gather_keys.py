"""Snippet: attention over the keys of all processes that share the tokens.

    q of this process ------------------> attention
    k, v of this process --> gather ------/

Each process has the merged tokens of its own windows, and its part of the text. What is exchanged
are merged tokens: at a ratio of 0.5 half the bytes of the original's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from toma_fx.analysis.factors import Tokens
from toma_fx.graph.rewriter import Rewriter
from toma_fx.methods.sharded import Rank
from toma_fx.plan.plan import SharedText


@dataclass(frozen=True)
class KeyRun:
    """Consecutive keys.

    Attributes:
        length: as many as this process has. shared: whether the other processes have others.
    """

    length: int
    shared: bool


def key_runs(
    tokens: Tokens, text: SharedText | None, lengths: Mapping[str, int]
) -> tuple[KeyRun, ...]:
    """The keys of an attention in this process.

    Args:
        text: that is shared among them, if any is. lengths: of images that are, by name.
    """
    runs: list[KeyRun] = []
    for segment in tokens.segments:
        if text is not None and segment.name in text.lengths:
            part, rest = divmod(segment.length, text.rank.count)
            runs += [KeyRun(part, True), *([KeyRun(rest, False)] if rest else [])]
        else:
            own = lengths.get(segment.name)
            runs.append(KeyRun(segment.length if own is None else own, own is not None))
    return tuple(runs)


def gather_keys(
    rewriter: Rewriter, site: fx.Node, runs: Sequence[KeyRun], rank: Rank, *, ordered: bool
) -> None:
    """Let one attention see the keys and values of all processes.

    Args:
        site: the fused attention, its keys merged already. runs: all keys that it has here.
        ordered: whether keys must come in the order of runs, as a mask has them. Otherwise they
            come as they are received where that saves a copy: the sum over keys is the same.
    """
    key, value = site.args[1:3]
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
    lengths, as_sent = [run.length for run in runs], not ordered and all(r.shared for r in runs)

    def gather(x: Tensor) -> Tensor:
        """Shared keys of all processes, behind each other or run by run."""
        dim = x.dim() - 2
        pieces = x.split(lengths, dim)
        shared = [piece for piece, run in zip(pieces, runs, strict=True) if run.shared]
        sent = x if len(shared) == len(pieces) else _join(shared, dim)
        received = rank.gather(sent, dim)
        if as_sent or len(pieces) == 1:
            return received
        parts = received.unflatten(dim, (rank.count, -1))
        every = iter(parts.split([piece.shape[dim] for piece in shared], dim + 1))
        whole = [
            next(every).flatten(dim, dim + 1) if run.shared else piece
            for piece, run in zip(pieces, runs, strict=True)
        ]
        return _join(whole, dim)

    def both(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if k.shape[:-1] != v.shape[:-1]:
            return gather(k), gather(v)
        joined = gather(torch.cat([k, v], -1))  # one exchange instead of two
        keys, values = joined.split([k.shape[-1], v.shape[-1]], -1)
        return keys, values

    with rewriter.before(site):
        trace = ("gather_keys", tuple(runs), rank, ordered)
        gathered = rewriter.splice(trace, both, [key, value])
    for index, node in enumerate(gathered, 1):
        rewriter.set_operand(site, index, ("key", "value")[index - 1], node)


def _join(pieces: Sequence[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim)

"""Snippet: attention over the keys of all processes that share the tokens.

    q of this process ------------------> attention
    k, v of this process --> gather ------/

Each process has the merged tokens of its own windows; text, which all have, stays as it is. What is
exchanged are merged tokens: at a ratio of 0.5 half the bytes of the original's.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from toma_fx.graph.rewriter import Rewriter
from toma_fx.methods.sharded import Rank
from toma_fx.passes.snippets import Span


def gather_keys(rewriter: Rewriter, site: fx.Node, span: Span, rank: Rank) -> None:
    """Let one attention see the keys and values of all processes.

    Args:
        site: the fused attention, its keys merged already. span: where the image lies among them.
    """
    key, value = site.args[1:3]
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)

    def both(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        image = [span.part(x, -2) for x in (k, v)]
        if image[0].shape[:-1] == image[1].shape[:-1]:  # one exchange instead of two
            joined = rank.gather(torch.cat(image, -1), image[0].dim() - 2)
            parts = joined.split([x.shape[-1] for x in image], -1)
        else:
            parts = tuple(rank.gather(x, x.dim() - 2) for x in image)
        return span.with_part(k, parts[0], -2), span.with_part(v, parts[1], -2)

    with rewriter.before(site):
        gathered = rewriter.splice(("gather_keys", span, rank), both, [key, value])
    for index, node in enumerate(gathered, 1):
        rewriter.set_operand(site, index, ("key", "value")[index - 1], node)

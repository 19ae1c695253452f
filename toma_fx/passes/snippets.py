"""Graph snippets on token sequences: the image part, merge, unmerge, gather at the destinations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.facts import Positional
from toma_fx.analysis.labels import Segment, Tokens, tokens_of
from toma_fx.errors import RewriteError
from toma_fx.graph.rewriter import Rewriter
from toma_fx.methods.setting import Pattern, Setting
from toma_fx.methods.windows import cast


@dataclass(frozen=True)
class PatternNodes:
    """Graph nodes of one pattern: the setting's parts, in order."""

    setting: Setting
    nodes: tuple[fx.Node, ...]

    def named(self, parts: Sequence[Tensor]) -> Pattern:
        """The values of the nodes, by name."""
        return dict(zip(self.setting.parts, parts, strict=True))


@dataclass(frozen=True)
class Span:
    """Where the image lies in a sequence: `before` tokens, the image, `after` tokens."""

    before: int
    after: int

    def image(self, x: Tensor, dim: int = 1) -> Tensor:
        """The image part of `x` along `dim`."""
        if not self.before and not self.after:
            return x
        return x.narrow(dim, self.before, x.shape[dim] - self.before - self.after)

    def with_image(self, x: Tensor, image: Tensor, dim: int = 1) -> Tensor:
        """`x` with its image part replaced by `image`."""
        if not self.before and not self.after:
            return image
        head = [x.narrow(dim, 0, self.before)] if self.before else []
        tail = [x.narrow(dim, x.shape[dim] - self.after, self.after)] if self.after else []
        return torch.cat([*head, image, *tail], dim)


def span_of(tokens: Tokens, image: Segment) -> Span:
    """Position of `image` in a token axis."""
    names = [s.name for s in tokens.segments]
    at = names.index(image.name)
    lengths = [s.length for s in tokens.segments]
    return Span(sum(lengths[:at]), sum(lengths[at + 1 :]))


def span_at(name: str, image: Segment, flow: Flow) -> Span:
    """Position of `image` in the sequence that a node holds.

    Raises:
        RewriteError: it holds none.
    """
    label = tokens_of(flow.layout(name))
    if label is None:
        raise RewriteError("no token axis", where=image.name, got=name)
    return span_of(label, image)


def splice_image(rewriter: Rewriter, node: fx.Node, span: Span) -> fx.Node:
    """The image tokens of a sequence, at the cursor."""
    if span == Span(0, 0):
        return node
    return rewriter.splice(("image", span), lambda x: span.image(x), [node])[0]


def splice_merge(
    rewriter: Rewriter,
    node: fx.Node,
    span: Span,
    pattern: PatternNodes,
    *,
    dim: int = 1,
    lead: bool = False,
) -> fx.Node:
    """A sequence with its image tokens merged: [B, a + N + b, C] -> [B, a + M + b, C].

    `dim` is the dimension of the tokens, the batch being the first. `lead` says that it isn't: all
    batch elements share a sequence [N, C].
    """
    setting = pattern.setting

    def merge(x: Tensor, *parts: Tensor) -> Tensor:
        if lead:
            x = x.unsqueeze(0)
        if parts and x.shape[0] == 1 != parts[0].shape[0]:
            x = x.expand(parts[0].shape[0], *x.shape[1:])
        rows = x if dim == 1 else x.movedim(dim, 1)
        flat = rows if rows.dim() == 3 else rows.flatten(2)
        image = setting.merge(span.image(flat), pattern.named(parts))
        out = span.with_image(flat, image)
        out = out if rows.dim() == 3 else out.unflatten(2, rows.shape[2:])
        return out if dim == 1 else out.movedim(1, dim)

    key = ("merge", span, setting, dim, lead)
    return rewriter.splice(key, merge, [node, *pattern.nodes], as_call=setting.dynamic)[0]


def splice_unmerge(rewriter: Rewriter, node: fx.Node, span: Span, pattern: PatternNodes) -> fx.Node:
    """Inverse of `splice_merge`: every image token receives its share of the merged update."""
    setting = pattern.setting

    def unmerge(y: Tensor, *parts: Tensor) -> Tensor:
        return span.with_image(y, setting.unmerge(span.image(y), pattern.named(parts)))

    key = ("unmerge", span, setting)
    return rewriter.splice(key, unmerge, [node, *pattern.nodes], as_call=setting.dynamic)[0]


def splice_update(
    rewriter: Rewriter,
    base: tuple[fx.Node, Span],
    merged_base: fx.Node,
    end: tuple[fx.Node, Span],
    pattern: PatternNodes,
    additions: Sequence[tuple[fx.Node, fx.Node, Span]] = (),
) -> fx.Node:
    """x_b = x_a + unmerge(x_b' - merge(x_a)): every token keeps its own detail.

    `base` is x_a, `merged_base` is x_a with its image merged, `end` is x_b'; spans tell where the
    image lies in x_a and x_b'. Text tokens of x_b' pass unchanged. `additions` are (unmerged,
    merged, span) of what was added to the stream from outside; it counts to x_a.
    """
    (base_node, base_span), (end_node, end_span) = base, end
    spans = [span for _, _, span in additions]

    def image_of(x: Tensor, span: Span) -> Tensor:
        # what has no token axis is added to every token alike
        has_tokens = x.dim() > 1 and x.shape[-2] > 1
        return span.image(x, x.dim() - 2) if has_tokens else x

    setting, count = pattern.setting, 2 * len(additions)

    def update(x: Tensor, merged_x: Tensor, y: Tensor, *rest: Tensor) -> Tensor:
        added, parts = rest[:count], rest[count:]
        start, entry = base_span.image(x), base_span.image(merged_x)
        for full, merged, span in zip(added[::2], added[1::2], spans, strict=True):
            start, entry = start + image_of(full, span), entry + image_of(merged, span)
        change = end_span.image(y) - entry
        image = start + setting.unmerge(change, pattern.named(parts))
        # a stream may be summed in a higher precision than it is handed on in
        return end_span.with_image(y, cast(image, y))

    key = ("update", base_span, end_span, setting, tuple(spans))
    pairs = [node for full, merged, _ in additions for node in (full, merged)]
    nodes = [base_node, merged_base, end_node, *pairs, *pattern.nodes]
    return rewriter.splice(key, update, nodes, as_call=setting.dynamic)[0]


def splice_gather(
    rewriter: Rewriter,
    operand: fx.Node,
    positional: Positional,
    span: Span,
    pattern: PatternNodes,
) -> fx.Node:
    """A positional operand (rotary table, mask, gate) at the tokens that stay.

    Each batch element has its own, so the result has a batch dimension of full size.
    """
    setting, lead = pattern.setting, positional.lead
    at = positional.dim + lead

    def gather(table: Tensor, *parts: Tensor) -> Tensor:
        for _ in range(lead):
            table = table.unsqueeze(0)
        positions = setting.positions(pattern.named(parts)).to(table.device)
        if positions.shape[0] == 1 != table.shape[0]:
            positions = positions.expand(table.shape[0], -1)
        table = table.expand(positions.shape[0], *table.shape[1:])
        sizes = [1] * table.dim()
        sizes[0], sizes[at] = positions.shape[0], positions.shape[1]
        image = torch.take_along_dim(span.image(table, at), positions.view(sizes), at)
        return span.with_image(table, image, at)

    key = ("gather", lead, at, span, setting)
    return rewriter.splice(key, gather, [operand, *pattern.nodes], as_call=setting.dynamic)[0]

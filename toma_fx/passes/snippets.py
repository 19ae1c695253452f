"""Graph snippets on token sequences: the image part, merge, unmerge, gather at the destinations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, fx

from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.factors import Axis, Keys, Segment, Tokens
from toma_fx.analysis.facts import Positional
from toma_fx.analysis.labels import Label, Layout, rows_of, sort_axes, tokens_of
from toma_fx.errors import RewriteError
from toma_fx.graph.rewriter import Rewriter
from toma_fx.methods.setting import Pattern, Setting
from toma_fx.methods.windows import cast

ALL: Mapping[str, int] = {}
"""No segment has other lengths than its own."""


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
    """Where the image lies in a sequence: `before` tokens, the image, `after` tokens.

    `leading` says that the tokens come before the batch.
    """

    before: int
    after: int
    leading: bool = False

    def rows(self, x: Tensor) -> Tensor:
        """[batch, tokens, channels] of a sequence, and back."""
        return x.transpose(0, 1) if self.leading else x

    def image(self, x: Tensor) -> Tensor:
        """The image part of a sequence, [batch, tokens, channels]."""
        return self.part(self.rows(x), 1)

    def with_image(self, x: Tensor, image: Tensor) -> Tensor:
        """A sequence with its image part replaced by `image` [batch, tokens, channels]."""
        return self.rows(self.with_part(self.rows(x), image, 1))

    def part(self, x: Tensor, dim: int) -> Tensor:
        """The image part of `x` along `dim`."""
        if not self.before and not self.after:
            return x
        return x.narrow(dim, self.before, x.shape[dim] - self.before - self.after)

    def with_part(self, x: Tensor, image: Tensor, dim: int) -> Tensor:
        """`x` with its image part along `dim` replaced by `image`."""
        if not self.before and not self.after:
            return image
        head = [x.narrow(dim, 0, self.before)] if self.before else []
        tail = [x.narrow(dim, x.shape[dim] - self.after, self.after)] if self.after else []
        return torch.cat([*head, image, *tail], dim)


def span_of(tokens: Tokens, image: Segment, lengths: Mapping[str, int] = ALL) -> Span:
    """Position of `image` in a token axis.

    Args:
        lengths: of segments of which this process has not all tokens, by name.
    """
    names = [s.name for s in tokens.segments]
    at = names.index(image.name)
    sizes = [lengths.get(s.name, s.length) for s in tokens.segments]
    return Span(sum(sizes[:at]), sum(sizes[at + 1 :]))


def span_at(name: str, image: Segment, flow: Flow, lengths: Mapping[str, int] = ALL) -> Span:
    """Position of `image` in the sequence that a node holds; `lengths` as in `span_of`.

    Raises:
        RewriteError: it holds none.
    """
    label = tokens_of(flow.layout(name))
    if label is None:
        raise RewriteError("no token axis", where=image.name, got=name)
    return replace(span_of(label, image, lengths), leading=flow.leads_with_tokens(name))


def splice_image(rewriter: Rewriter, node: fx.Node, span: Span) -> fx.Node:
    """The image tokens of a sequence, the batch first, at the cursor."""
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

    `dim` is the dimension of the tokens; the batch is the first of the others. `lead` says that it
    isn't: all batch elements share a sequence [N, C].
    """
    setting = pattern.setting

    def merge(x: Tensor, *parts: Tensor) -> Tensor:
        if lead:
            x = x.unsqueeze(0)
        rows = x if dim == 1 else x.movedim(dim, 1)
        if parts and rows.shape[0] == 1 != parts[0].shape[0]:
            rows = rows.expand(parts[0].shape[0], *rows.shape[1:])
        flat = rows if rows.dim() == 3 else rows.flatten(2)
        image = setting.merge(span.part(flat, 1), pattern.named(parts))
        out = span.with_part(flat, image, 1)
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
        x = span.rows(x) if x.dim() == 3 else x
        has_tokens = x.dim() > 1 and x.shape[-2] > 1
        return span.part(x, x.dim() - 2) if has_tokens else x

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
    located: fx.Node | None = None,
) -> fx.Node:
    """A positional operand (rotary table, mask, gate) at the tokens that stay.

    Each row of the batch has its own, so the result has all rows. `located` is where they are, if
    that is more than the pattern of this process says.
    """
    setting, layout, dim = pattern.setting, positional.layout, positional.dim
    lead = len(layout) - operand.meta["val"].dim()

    def gather(table: Tensor, *parts: Tensor) -> Tensor:
        for _ in range(lead):
            table = table.unsqueeze(0)
        table, at = open_factors(table, layout, dim)
        positions = parts[0] if located else setting.positions(pattern.named(parts))
        positions = positions.to(table.device)
        index = place_rows(positions, layout, dim)
        shape = [max(pair) for pair in zip(table.shape, index.shape, strict=True)]
        table = table.expand([*shape[:at], table.shape[at], *shape[at + 1 :]])
        image = torch.take_along_dim(span.part(table, at), index, at)
        out = span.with_part(table, image, at)
        return close_factors(out, layout)

    key = ("gather", lead, layout, dim, span, setting, located is None)
    nodes = [operand, *(pattern.nodes if located is None else [located])]
    return rewriter.splice(key, gather, nodes, as_call=setting.dynamic)[0]


def splice_counts(
    rewriter: Rewriter,
    operand: fx.Node,
    counted: Positional,
    span: Span,
    pattern: PatternNodes,
) -> fx.Node:
    """An operand that is summed over its tokens, each times the number of those it stands for."""
    setting, layout, dim = pattern.setting, counted.layout, counted.dim

    def weigh(x: Tensor, *parts: Tensor) -> Tensor:
        sizes = setting.sizes(pattern.named(parts)).to(x.device)
        sizes = torch.nn.functional.pad(sizes, (span.before, span.after), value=1.0)
        opened, _ = open_factors(x, layout, dim)
        weighed = opened * place_rows(sizes, layout, dim).to(x.dtype)
        return close_factors(weighed, layout)

    key = ("counts", layout, dim, span, setting)
    return rewriter.splice(key, weigh, [operand, *pattern.nodes], as_call=setting.dynamic)[0]


def open_factors(x: Tensor, layout: Layout, dim: int) -> tuple[Tensor, int]:
    """`x` with a dimension for each factor of its layout, and which one `dim`'s tokens have.

    A dimension of size 1 that lines up with several factors becomes as many of size 1.
    """
    at, d = 0, 0
    for i, label in enumerate(layout):
        sizes = _factor_sizes(label)
        if i == dim:
            at = d + sizes.index(-1)
        if len(sizes) > 1:
            x = x.unflatten(d, [1] * len(sizes) if x.shape[d] == 1 else sizes)
        d += len(sizes)
    return x, at


def close_factors(x: Tensor, layout: Layout) -> Tensor:
    """Inverse of `open_factors`; where some factors of a dimension broadcast, and some don't, all
    are written out."""
    for d, label in enumerate(layout):
        sizes = _factor_sizes(label)
        count = len(sizes)
        if count > 1:
            if any(size > 1 for size in x.shape[d : d + count]):
                x = x.expand(*x.shape[:d], *sizes, *x.shape[d + count :])
            x = x.flatten(d, d + count - 1)
    return x


def _factor_sizes(label: Label) -> list[int]:
    """Sizes of the factors of a dimension, -1 for tokens, of which fewer may be left."""
    factors = label.factors
    return [-1 if isinstance(f, (Tokens, Keys)) else f.size for f in factors] or [1]


def place_rows(positions: Tensor, layout: Layout, dim: int) -> Tensor:
    """Positions [rows, M] as an index of a value whose factors have a dimension each."""
    tokens = layout[dim].positions
    assert tokens is not None
    axes, count = sort_axes((*rows_of(layout), *tokens.fixed)), positions.shape[1]
    if positions.shape[0] == 1 != (rows := prod(a.base for a in axes)):
        positions = positions.expand(rows, -1)
    index = positions if len(axes) == 1 else positions.reshape([*(a.base for a in axes), count])
    for i, a in reversed(list(enumerate(axes))):
        if a in tokens.fixed:
            index = index.select(i, a.start)
        elif not a.is_whole:
            index = index.narrow(i, a.start, a.size)
    places = [a for a in axes if a not in tokens.fixed]
    # the rows in the order of the value's dimensions, and the tokens where they stand among them
    order, sizes = [], []
    for d, label in enumerate(layout):
        for factor in label.factors or (None,):
            row = places.index(factor) if isinstance(factor, Axis) and factor in places else None
            here = d == dim and isinstance(factor, (Tokens, Keys))
            order += [len(places)] if here else [row] if row is not None else []
            sizes.append(count if here else places[row].size if row is not None else 1)
    if order != sorted(order):
        index = index.permute(order)
    return index.reshape(sizes)

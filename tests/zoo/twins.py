"""The twin oracle on whole denoisers: tokens come in pairs that are alike; one of each pair goes.

A denoiser tells two tokens apart by their places. So where a picture becomes tokens, and where a
table lines up with them, one token of each pair is made equal to the other, in the captured graph
and in the one that merges. Attention to merged keys has to count them twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from tests.analysis.tokens_of_rows import reindex
from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.factors import Segment
from toma_fx.analysis.facts import Analysis
from toma_fx.analysis.labels import Layout
from toma_fx.plan.plan import MergePlan


def twins_of(image: Segment) -> tuple[Tensor, Tensor]:
    """Places of the first and of the second of each pair: [windows, pairs] in a window each.

    An image is one window; of several below each other, as many rows as divide each. The last of
    an odd number of tokens has no twin.
    """
    assert image.grid is not None
    stacked = image.heights and len(image.grid) == 2
    size = math.gcd(*image.heights) * image.grid[1] if stacked else image.length
    generator = torch.Generator().manual_seed(image.length)
    order = torch.rand(image.length // size, size, generator=generator).argsort(-1)
    order = order + torch.arange(0, image.length, size)[:, None]
    half = size // 2
    return order[:, :half], order[:, half : 2 * half]


class Twinned(fx.Interpreter):
    """Runs a graph of a denoiser on tokens that come in twins."""

    def __init__(self, graph_module: fx.GraphModule, analysis: Analysis, flow: Flow) -> None:
        super().__init__(graph_module)
        self.shapes, self.places = flow.shapes, _places(analysis, flow)

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node, with twins where tokens, or tables of tokens, come from."""
        value = super().run_node(n)
        for layout, dim, image in self.places.get(n.name, ()):
            if tuple(value.shape) != self.shapes[n.name]:
                continue
            first, second = (x.flatten() for x in twins_of(image))
            table = torch.arange(image.length).scatter(0, second, first)[None, None]
            lead = len(layout) - value.dim()
            twins = reindex(value[(None,) * lead], layout, image, table, only=dim)
            value = value.clone().copy_(twins.flatten(0, lead))  # views need the same strides
        return value


Place = tuple[Layout, int | None, Segment]


def _places(analysis: Analysis, flow: Flow) -> dict[str, list[Place]]:
    """By node: its layout, a dimension if it is a table along that, and the image."""
    places: dict[str, list[Place]] = {}
    for name in flow.order:
        layout = flow.layout(name)
        for image in flow.segments(name) if layout is not None else ():
            if image.grid and not any(flow.carries(o, image.name) for o in flow.operands[name]):
                assert layout is not None
                places.setdefault(name, []).append((layout, None, image))
    for transfer in analysis.transfers.values():
        for p in transfer.positionals:
            images = [s for s in p.tokens.segments if s.grid]
            places.setdefault(p.operand, []).extend((p.layout, p.dim, s) for s in images)
    return places


def one_of_two(plan: MergePlan) -> Iterator[Tensor]:
    """For every group a pattern that keeps one of each pair, another one in another row."""
    generator = torch.Generator().manual_seed(3)
    for group in plan.groups:
        setting, pairs = group.setting, torch.stack(twins_of(group.image))
        windows, size = pairs.shape[1], group.image.length // pairs.shape[1]
        assert (setting.windows, setting.keep) == (windows, pairs.shape[2] + size % 2)
        shape = (group.batch, *pairs.shape[1:])
        order = torch.rand(shape, generator=generator).argsort(-1)
        own = pairs[:, None].expand(2, *shape).gather(-1, order.expand(2, *shape))
        own = own - torch.arange(0, group.image.length, size)[:, None]
        swap = torch.rand(shape, generator=generator) < 0.5
        own = torch.where(swap, own.flip(0), own)
        if size % 2:  # the one without a twin stays
            alone = size * (size - 1) // 2 - own.sum((0, -1), keepdim=True)
            own = torch.cat([own, alone.expand(2, -1, -1, -1)], -1)
        kept, gone = own
        both = sum(torch.nn.functional.one_hot(x, size).float() for x in (kept, gone))
        yield from (kept, both / 2, both.mT.clamp(max=1).contiguous())

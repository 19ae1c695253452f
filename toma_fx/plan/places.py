"""Position of each branch in the model: grid, level, depth. Methods choose settings by it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.factors import Segment
from toma_fx.analysis.facts import Analysis, Stream
from toma_fx.methods.setting import Place
from toma_fx.methods.windows import Size


def places_of(analysis: Analysis, flow: Flow) -> Mapping[tuple[str, int], Place]:
    """The place of every branch that has a grid, by stream and index."""
    sizes = {s.segment.length for s in analysis.streams if _attends(s)}
    levels = sorted(sizes or {s.segment.length for s in analysis.streams}, reverse=True)
    depths = _depths(analysis, flow)
    places = {}
    for stream in analysis.streams:
        image = stream.segment
        if image.grid is None:
            continue
        for i, branch in enumerate(stream.branches):
            first = next(b for b in stream.branches if b.block == branch.block)
            places[stream.name, i] = Place(
                grid=image.grid,
                unit=_unit(image),
                level=sum(image.length < size for size in levels),
                downsample=math.ceil(math.sqrt(max(1, levels[0] // image.length))),
                depth=depths[stream.name, branch.block],
                module=branch.module,
                group=first.module,
                heights=image.heights,
            )
    return places


def _attends(stream: Stream) -> bool:
    return any("attention" in b.kinds for b in stream.branches)


def _depths(analysis: Analysis, flow: Flow) -> dict[tuple[str, int], float]:
    """Share of the model's blocks that come before each, by stream and block."""
    starts: dict[tuple[str, int], int] = {}
    for stream in analysis.streams:
        for branch in stream.branches:
            starts.setdefault((stream.name, branch.block), flow.position[branch.out])
    order = sorted(starts, key=starts.__getitem__)
    return {block: i / len(order) for i, block in enumerate(order)}


def _unit(image: Segment) -> Size:
    """The grid that windows must divide: of several images below each other, a common part."""
    assert image.grid is not None
    if len(image.grid) > 2 or not image.heights:
        return image.grid
    return math.gcd(*image.heights), image.grid[1]

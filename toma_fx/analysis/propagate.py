r"""Token-axis analysis: where image tokens flow, which attention is which, where residuals add up.

    captured graph --seeds, transfer rules--> facts --> attention sites
                                                    \-> residual streams x0..xL with branches

Forward data flow over the graph, no matching on model classes or parameter names. Image segments
are seeded where spatial dimensions fold into one, and at packed inputs; a packed input's grid comes
from position ids that line up with it, from sizes among the arguments, or from the user. (Only
where two inputs fit that grid does the name of one decide, see `graph.nodes.LATENTS`.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx

from toma_fx.analysis.dataflow import Flow, is_embedding
from toma_fx.analysis.factors import BATCH, FRAMES, HEIGHT, WIDTH, Segment, Tokens
from toma_fx.analysis.facts import Analysis, Rejected, Site, Transfer
from toma_fx.analysis.labels import (
    ONE,
    Fact,
    Label,
    Layout,
    axis,
    layout_of,
    plain,
    tokens,
    tokens_of,
)
from toma_fx.analysis.make_flow import make_flow
from toma_fx.analysis.rules.apply import apply_rule
from toma_fx.analysis.rules.base import reject
from toma_fx.analysis.streams import find_streams
from toma_fx.capture.grids import Raster, ids_dim
from toma_fx.capture.model import Captured
from toma_fx.graph.nodes import ATTENTION, LATENTS, int_size, module_path
from toma_fx.methods.windows import Size


def analyze(captured: Captured, grid: Size | None = None) -> tuple[Analysis, Flow]:
    """Facts, attention sites and residual streams of a captured graph.

    Args:
        captured: the graph; it is not changed.
        grid: token grid (H, W) or (T, H, W) of a packed input, if ids and sizes don't give it.

    Returns:
        The analysis and the plain-data view of the graph that planning works on.
    """
    nodes = list(captured.graph_module.graph.nodes)
    best: _Found | None = None
    for order in _picture_orders(captured):
        found = _follow(captured, nodes, order, grid)
        best = found if best is None or found.images > best.images else best
        if best.images:
            break
    assert best is not None
    facts, transfers, refusals, rasters = best.facts, best.transfers, best.refusals, best.rasters
    needs_all_tokens = {
        n.name: reject(n, t.needs_all_tokens, "needs_all_tokens")
        for n in nodes
        if (t := transfers.get(n.name)) and t.needs_all_tokens
    }
    flow = make_flow(nodes, facts, transfers, refusals, needs_all_tokens)
    lost = _find_lost(flow)
    sites = tuple(_classify_site(n, flow, lost) for n in nodes if n.name in flow.attention)
    streams = find_streams(flow, sites)
    packed = _packed_lengths(captured)
    return Analysis(facts, transfers, refusals, sites, streams, rasters, packed), flow


Order = Mapping[int, tuple[str, ...]]
"""What the dimensions of inputs enumerate, by their number; "" are channels."""
PICTURES = {
    4: (
        (BATCH, "", HEIGHT, WIDTH),
        ("", FRAMES, HEIGHT, WIDTH),
        (BATCH, HEIGHT, WIDTH, ""),
    ),
    5: (
        (BATCH, "", FRAMES, HEIGHT, WIDTH),
        (BATCH, FRAMES, "", HEIGHT, WIDTH),
        (BATCH, FRAMES, HEIGHT, WIDTH, ""),
    ),
}
"""How pictures and videos are laid out, the commonest first."""


def _picture_orders(captured: Captured) -> list[Order]:
    """Ways to read inputs that are pictures or videos."""
    ranks = {i.tensor.dim() for i in captured.inputs if i.tensor is not None}
    choices = [PICTURES[rank] for rank in sorted(ranks & PICTURES.keys())]
    orders = itertools.product(*choices)
    return [{len(one): one for one in order} for order in orders]


@dataclass(frozen=True)
class _Found:
    """What following the tokens gave.

    Attributes:
        images: attentions and products that see image tokens [batch, tokens, channels].
    """

    facts: dict[str, Fact]
    transfers: dict[str, Transfer]
    refusals: dict[str, Rejected]
    rasters: dict[str, Raster]
    images: int


def _follow(captured: Captured, nodes: list[fx.Node], order: Order, grid: Size | None) -> _Found:
    """Facts of all nodes, the inputs read in one way."""
    facts, transfers, refusals = _propagate(nodes, _seed_layouts(captured, order, {}))
    rasters = _find_rasters(captured, facts, transfers, grid)
    if rasters:
        seeds = _seed_layouts(captured, order, rasters)
        facts, transfers, refusals = _propagate(nodes, seeds)
    images = sum(is_embedding(layout_of(fact), image=True) for fact in facts.values())
    return _Found(facts, transfers, refusals, rasters, images)


def _seed_layouts(
    captured: Captured, order: Order, rasters: Mapping[str, Raster]
) -> dict[str, Layout]:
    """Layouts of the model inputs: packed or text sequences, pictures, and position ids."""
    seeds: dict[str, Layout] = {}
    for spec in captured.inputs:
        value = spec.tensor
        if value is None:
            continue
        shape = [int_size(size) for size in value.shape]
        if spec.raster is not None:
            dim = ids_dim(value) or 0
            raster = spec.raster if rasters else None
            labels = [plain(size) for size in shape]
            labels[dim] = _label_input(spec.name, shape[dim], raster, "ids")
            if len(shape) == 3:
                labels[0] = axis(BATCH, shape[0])
            seeds[spec.name] = tuple(labels)
        elif len(shape) == 3 and value.is_floating_point():
            packed = _label_input(spec.name, shape[1], rasters.get(spec.name), "sequence")
            seeds[spec.name] = (axis(BATCH, shape[0]), packed, plain(shape[2]))
        elif len(shape) in order and value.is_floating_point():
            names = zip(order[len(shape)], shape, strict=True)
            seeds[spec.name] = tuple(axis(*x) if x[0] else plain(x[1]) for x in names)
    return seeds


def _label_input(
    name: str, length: int, raster: Raster | None, role: Literal["ids", "sequence"]
) -> Label:
    """The tokens of an input: the images of its raster, and what is around them."""
    if raster is None:
        return tokens(Segment(name, length, None, role))
    image = Segment(name, raster.images, raster.grid, role, raster.heights)
    before = Segment(f"{name}/before", raster.before, None, role)
    rest = Segment(f"{name}/rest", raster.rest, None, role)
    return tokens(*(s for s in (before, image, rest) if s.length))


def _propagate(
    nodes: list[fx.Node], seeds: Mapping[str, Layout]
) -> tuple[dict[str, Fact], dict[str, Transfer], dict[str, Rejected]]:
    facts: dict[str, Fact] = dict(seeds)
    transfers: dict[str, Transfer] = {}
    refusals: dict[str, Rejected] = {}
    for node in nodes:
        if node.op != "call_function":
            continue
        outcome = apply_rule(node, facts)
        if isinstance(outcome, Rejected):
            refusals[node.name] = outcome
            continue
        if outcome.fact is not None:
            facts[node.name] = outcome.fact
        if outcome != Transfer(outcome.fact):
            transfers[node.name] = outcome
    return facts, transfers, refusals


def _find_rasters(
    captured: Captured,
    facts: Mapping[str, Fact],
    transfers: Mapping[str, Transfer],
    grid: Size | None,
) -> dict[str, Raster]:
    """What packed inputs enumerate, by ids that line up with them, by `grid`, or by hints."""
    rasters: dict[str, Raster] = {}
    ids_of = {i.name: i.raster for i in captured.inputs if i.raster is not None}
    for transfer in transfers.values():
        for positional in transfer.positionals:
            layout = layout_of(facts.get(positional.operand))
            own = positional.dim - len(positional.layout) + len(layout or ())
            found = layout[own].tokens if layout else None
            if found is None:
                continue
            at = 0
            for ids in found.segments:
                if (of_ids := ids_of.get(ids.name)) is not None:
                    rasters.update(_locate_raster(of_ids, at, positional.tokens))
                at += ids.length
    if grid:
        *frames, height, width = grid
        known = [Raster((height,) * math.prod(frames), width)]
    else:
        known = list(ids_of.values()) or list(captured.hints)
    lengths = _packed_lengths(captured)
    for raster in known if grid or not rasters else []:
        candidates = [name for name, length in lengths.items() if length == raster.length]
        if len(candidates) > 1:  # text of as many tokens
            candidates = [name for name in candidates if name == LATENTS]
        if len(candidates) == 1:
            rasters[candidates[0]] = raster
    return rasters


def _packed_lengths(captured: Captured) -> dict[str, int]:
    """Tokens of every input [batch, tokens, channels]."""
    inputs = ((i.name, i.tensor) for i in captured.inputs if i.raster is None)
    return {name: x.shape[1] for name, x in inputs if x is not None and x.dim() == 3}


def _locate_raster(raster: Raster, at: int, tokens: Tokens) -> dict[str, Raster]:
    """The raster of the segment that holds the images of ids that begin at token `at`."""
    start, begin = at + raster.before, 0
    for segment in tokens.segments:
        end = begin + segment.length
        if begin <= start and start + raster.images <= end:
            rest = end - start - raster.images
            return {segment.name: replace(raster, before=start - begin, rest=rest)}
        begin = end
    return {}


def _find_lost(flow: Flow) -> set[str]:
    """Values that may hold image tokens which were no longer followed after a refusal."""
    lost: set[str] = set()
    for name in flow.order:
        operands = flow.operands[name]
        ended = name in flow.refusals and any(flow.is_spatial(o) for o in operands)
        if ended or not (flow.is_spatial(name) or lost.isdisjoint(operands)):
            lost.add(name)
    return lost


def _classify_site(node: fx.Node, flow: Flow, lost: set[str]) -> Site:
    """Classify one attention by the tokens of its queries and keys."""
    if node.name in flow.sums_of_tokens:
        return _classify_sum(node, flow)
    layout, keys = _score_layouts(node, flow)
    rows = layout[-2] if layout is not None else ONE
    q = rows.tokens or tokens_of(layout)
    k = tokens_of(keys) or next((x.positions for x in keys or () if x.positions), None)
    images = [s for s in q.segments if s.grid] if q else []
    if any(a.name == FRAMES for a in rows.axes) or (q and rows.tokens is None):
        kind = "temporal"
    elif not images and str(node.args[0]) in lost:
        kind = "unknown"
    elif q is None or not images:
        kind = "text"
    elif k is None or not any(s in images for s in k.segments):
        kind = "cross"
    else:
        kind = "self" if set(q.segments) == set(k.segments) == set(images) else "joint"
    segment = images[0].name if images else ""
    fused = flow.ops[node.name] == ATTENTION
    operands = tuple(str(a) for a in node.args[:3]) if fused else ()
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    masked = isinstance(mask, fx.Node) and flow.shapes[mask.name][-1] != 1
    return Site(
        node.name, module_path(node), kind, str(q or ""), str(k or ""), segment, operands, masked
    )


def _classify_sum(node: fx.Node, flow: Flow) -> Site:
    """The sum over tokens of attention without softmax."""
    operands = (tokens_of(flow.layout(o)) for o in flow.operands[node.name])
    found = next(x for x in operands if x and x.names)
    segment = next(s.name for s in found.segments if s.grid)
    return Site(node.name, module_path(node), "linear", str(found), str(found), segment)


def _score_layouts(node: fx.Node, flow: Flow) -> tuple[Layout | None, Layout | None]:
    """Layouts of the queries and keys; scores carry both."""
    if flow.ops[node.name] == ATTENTION:
        query, key = (str(a) for a in node.args[:2])
        return flow.layout(query), flow.layout(key)
    scores = flow.layout(node.name)
    return scores, None if scores is None else (scores[-1],)

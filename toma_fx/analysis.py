"""Token-axis analysis: where image tokens flow, which attention is which, where residuals add up.

    captured graph --seeds, transfer rules--> facts --> attention sites
                                                    \-> residual streams x0..xL with branches

Forward data flow over the graph, no matching on model classes or parameter names. Image segments
are seeded where two spatial dimensions fold into one, and at packed inputs; a packed input's grid
comes from position ids that line up with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import fx

from toma_fx.axis import (
    BATCH,
    Analysis,
    Branch,
    Fact,
    Layout,
    Raster,
    Rejected,
    Segment,
    Site,
    Stream,
    Tokens,
    Transfer,
    layout_of,
    layouts_of,
    tokens_of,
)
from toma_fx.capture import Captured
from toma_fx.rules import apply_rule, op_name

PROLOGUE = {
    "aten.layer_norm", "aten.rms_norm", "aten.slice", "aten.cat", "aten.concat", "aten.contiguous",
    "aten.clone", "aten.to", "aten.dropout", "aten.split_with_sizes", "getitem",
}  # fmt: skip
"""Ops besides element-wise ones that may stand between a stream and the point of merging."""
COPIES = {"aten.contiguous", "aten.clone", "aten.alias", "aten.detach", "aten.dropout"}


@dataclass(frozen=True)
class Flow:
    """The graph as plain data: names, edges, shapes, facts. Plans are made from this alone.

    Attributes:
        order: node names in graph order. operands: inputs of each. ops: op name of each.
        shapes: static shape of each tensor. modules: module path of each.
        facts, refusals: from the analysis. passes: {node: source} for nodes that hand on the image
            tokens of their source unchanged. pointwise: element-wise ops. sums: plain a + b.
    """

    order: tuple[str, ...]
    operands: Mapping[str, tuple[str, ...]]
    ops: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    modules: Mapping[str, str]
    facts: Mapping[str, Fact]
    refusals: Mapping[str, Rejected]
    passes: Mapping[str, str]
    pointwise: frozenset[str]
    sums: frozenset[str]

    @cached_property
    def users(self) -> Mapping[str, tuple[str, ...]]:
        """Nodes that use each node, in graph order."""
        out: dict[str, list[str]] = {name: [] for name in self.order}
        for name in self.order:
            for operand in dict.fromkeys(self.operands[name]):
                out[operand].append(name)
        return {name: tuple(found) for name, found in out.items()}

    @cached_property
    def position(self) -> Mapping[str, int]:
        """Index of each node in graph order."""
        return {name: i for i, name in enumerate(self.order)}

    def layout(self, name: str) -> Layout | None:
        """Layout of a tensor-valued node."""
        return layout_of(self.facts.get(name))

    def carries(self, name: str, segment: str) -> bool:
        """Whether the node's value (or one of its values) holds the tokens of `segment`."""
        return any(s.name == segment for s in self.segments(name))

    def segments(self, name: str) -> tuple[Segment, ...]:
        """Token segments of the node's value or values."""
        found = (tokens_of(layout) for layout in layouts_of(self.facts.get(name)))
        return tuple(s for tokens in found if tokens is not None for s in tokens.segments)

    def is_embedding(self, name: str) -> bool:
        """Whether the value is laid out [batch, tokens, channels]."""
        layout = self.layout(name)
        return (
            layout is not None
            and len(layout) == 3
            and layout[0] == BATCH
            and isinstance(layout[1], Tokens)
        )

    def carriers(self, segment: str) -> tuple[str, ...]:
        """Nodes that hold the tokens of `segment`, in graph order."""
        return tuple(n for n in self.order if self.carries(n, segment))

    def root(self, name: str) -> str:
        """The node whose image tokens `name` hands on unchanged."""
        while name in self.passes:
            name = self.passes[name]
        return name

    def region(self, segment: str, start: str, end: str) -> tuple[str, ...]:
        """Carriers of `segment` after `start` and up to `end`: those on a path between the two."""
        first, last = self.position[start], self.position[end]
        after = {start}
        for name in self.order[first + 1 : last + 1]:
            if self.carries(name, segment) and not after.isdisjoint(self.operands[name]):
                after.add(name)
        before = {end}
        for name in reversed(self.order[first + 1 : last + 1]):
            if name in before:
                before.update(o for o in self.operands[name] if o in after)
        return tuple(n for n in self.order[first + 1 : last + 1] if n in after and n in before)

    def entries(self, segment: str, inner: Iterable[str]) -> tuple[str, ...]:
        """Values with the tokens of `segment` that flow into `inner` from outside, in order."""
        inside = set(inner)
        found = {
            o
            for n in inside
            for o in self.operands[n]
            if o not in inside and self.carries(o, segment)
        }
        return tuple(sorted(found, key=self.position.__getitem__))

    def leak(self, segment: str, inner: Iterable[str], end: str) -> Rejected | None:
        """A use of the region's values that merging would break, if there is one."""
        inside = dict.fromkeys(inner)
        for name in inside:
            for user in self.users[name] if name != end else ():
                if user in self.refusals:
                    return self.refusals[user]
                if user not in inside and self.carries(user, segment):
                    return Rejected(user, f"uses {name} outside the branch")
                if self.ops[user] == "output":
                    return Rejected(name, "is an output of the model")
        return None


def analyse(captured: Captured, grid: tuple[int, int] | None = None) -> tuple[Analysis, Flow]:
    """Facts, attention sites and residual streams of a captured graph.

    Args:
        captured: the graph; it is not changed.
        grid: token grid (H, W) of packed inputs whose ids do not tell it.

    Returns:
        The analysis and the plain-data view of the graph that planning works on.
    """
    nodes = list(captured.graph_module.graph.nodes)
    seeds = _seeds(captured, {})
    facts, transfers, refusals = _propagate(nodes, seeds)
    rasters = _rasters(captured, facts, transfers, grid)
    if rasters:
        facts, transfers, refusals = _propagate(nodes, _seeds(captured, rasters))
    flow = _flow(nodes, facts, refusals)
    sites = tuple(_site(n, flow) for n in nodes if op_name(n.target) == ATTENTION)
    streams = _streams(flow, sites)
    return Analysis(facts, transfers, refusals, sites, streams, rasters), flow


ATTENTION = "aten.scaled_dot_product_attention"


def _seeds(captured: Captured, rasters: Mapping[str, Raster]) -> dict[str, Layout]:
    """Layouts of the model inputs: packed or text sequences, and position ids."""
    seeds: dict[str, Layout] = {}
    for spec in captured.inputs:
        value = spec.tensor
        if value is None:
            continue
        if spec.raster is not None:
            ids = _cut(spec.name, value.shape[-2], spec.raster if rasters else None, "ids")
            seeds[spec.name] = (ids, None) if value.dim() == 2 else (BATCH, ids, None)
        elif value.dim() == 3 and value.is_floating_point():
            packed = _cut(spec.name, value.shape[1], rasters.get(spec.name), "sequence")
            seeds[spec.name] = (BATCH, packed, None)
        elif value.dim() == 4 and value.is_floating_point():
            seeds[spec.name] = (BATCH, None, "height", "width")
    return seeds


def _cut(name: str, length: int, raster: Raster | None, role: Literal["ids", "sequence"]) -> Tokens:
    """The tokens of an input: the images of its raster, then the rest."""
    if raster is None:
        return Tokens((Segment(name, length, None, role),))
    image = Segment(name, length - raster.rest, raster.grid, role, raster.heights)
    rest = Segment(f"{name}/rest", raster.rest, None, role)
    return Tokens((image, rest) if raster.rest else (image,))


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
        if outcome.patches or outcome.positionals:
            transfers[node.name] = outcome
    return facts, transfers, refusals


def _rasters(
    captured: Captured,
    facts: Mapping[str, Fact],
    transfers: Mapping[str, Transfer],
    given: tuple[int, int] | None,
) -> dict[str, Raster]:
    """What packed inputs enumerate: from ids that line up with them, from their length, or given"""
    rasters: dict[str, Raster] = {}
    ids_of = {i.name: i.raster for i in captured.inputs if i.raster is not None}
    for transfer in transfers.values():
        for positional in transfer.positionals:
            layout = layout_of(facts.get(positional.operand))
            label = None if layout is None else layout[positional.dim]
            if not isinstance(label, Tokens):
                continue
            for ids, content in zip(label.segments, positional.tokens.segments, strict=False):
                found = ids_of.get(ids.name)
                if found and ids.length == content.length:
                    rasters[content.name] = found
    packed = [
        (i.name, i.tensor.shape[1])
        for i in captured.inputs
        if i.tensor is not None and i.tensor.dim() == 3 and i.raster is None
    ]
    known = [Raster((given[0],), given[1])] if given else list(ids_of.values())
    for one in known if given or not rasters else []:
        fitting = [name for name, length in packed if length == one.length]
        if len(fitting) == 1:
            rasters[fitting[0]] = one
    return rasters


def module_path(node: fx.Node) -> str:
    """Path of the module that produced a node ("" for the root)."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    return str(entries[-1][0]) if entries else ""


def _flow(
    nodes: list[fx.Node], facts: Mapping[str, Fact], refusals: Mapping[str, Rejected]
) -> Flow:
    tensors = [n for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    flow = Flow(
        order=tuple(n.name for n in nodes),
        operands={n.name: tuple(i.name for i in n.all_input_nodes) for n in nodes},
        ops={n.name: op_name(n.target) if n.op == "call_function" else n.op for n in nodes},
        shapes={n.name: tuple(n.meta["val"].shape) for n in tensors},
        modules={n.name: module_path(n) for n in nodes},
        facts=facts,
        refusals=refusals,
        passes={},
        pointwise=frozenset(
            n.name for n in nodes if torch.Tag.pointwise in getattr(n.target, "tags", ())
        ),
        sums=frozenset(n.name for n in nodes if _is_sum(n)),
    )
    passes = {n.name: source for n in nodes if (source := _passed(n, flow)) is not None}
    return replace(flow, passes=passes)


def _is_sum(node: fx.Node) -> bool:
    """Whether a node is a + b of two tensors, neither scaled."""
    if node.op != "call_function" or op_name(node.target) != "aten.add":
        return False
    return len(node.all_input_nodes) == 2 and node.kwargs.get("alpha") in (None, 1)


def _passed(node: fx.Node, flow: Flow) -> str | None:
    """Source whose image tokens the node hands on verbatim, as [batch, tokens, channels]."""
    op, name = flow.ops[node.name], node.name
    images = {s.name for s in flow.segments(name) if s.grid}
    if not images or not flow.is_embedding(name):
        return None
    if op == "getitem":
        split = node.args[0]
        assert isinstance(split, fx.Node)
        source = str(split.args[0])
        return source if flow.ops[split.name] == "aten.split_with_sizes" else None
    carrying = [
        o for o in flow.operands[name] if not images.isdisjoint(s.name for s in flow.segments(o))
    ]
    if len(carrying) != 1 or not flow.is_embedding(carrying[0]):
        return None
    same_channels = flow.shapes[name][2] == flow.shapes[carrying[0]][2]
    if op in COPIES or (op in ("aten.slice", "aten.cat", "aten.concat") and same_channels):
        return carrying[0]
    if op in ("aten.clip", "aten.clamp"):
        return carrying[0] if _only_clips_infinities(node) else None
    if op == "aten.to":
        source_node = node.args[0]
        assert isinstance(source_node, fx.Node)
        return carrying[0] if source_node.meta["val"].dtype == node.meta["val"].dtype else None
    return None


def _only_clips_infinities(node: fx.Node) -> bool:
    """clip(x, -65504, 65504) in half precision (Flux): the identity on finite values."""
    limit = torch.finfo(node.meta["val"].dtype).max
    low, high = (*node.args[1:3], None, None)[:2]
    return (
        isinstance(low, (int, float))
        and isinstance(high, (int, float))
        and (low <= -limit and high >= limit)
    )


def _site(node: fx.Node, flow: Flow) -> Site:
    """Classify one attention by the tokens of its queries and keys."""
    operands: Any = node.args[:2]
    query, key = (a.name for a in operands)
    q, k = tokens_of(flow.layout(query)), tokens_of(flow.layout(key))
    layout = flow.layout(query)
    images = [s for s in q.segments if s.grid] if q else []
    if q is None:
        kind = "unknown"
    elif layout is not None and not isinstance(layout[-2], Tokens):
        kind = "temporal"
    elif not images:
        kind = "text"
    elif k is None or not any(s in images for s in k.segments):
        kind = "cross"
    else:
        kind = "self" if set(q.segments) == set(k.segments) == set(images) else "joint"
    segment = images[0].name if images else ""
    return Site(node.name, module_path(node), kind, str(q or ""), str(k or ""), segment)


# -- residual streams -----------------------------------------------------------------------------


def _streams(flow: Flow, sites: tuple[Site, ...]) -> tuple[Stream, ...]:
    images: dict[str, Segment] = {}
    for name in flow.order:
        images.update({s.name: s for s in flow.segments(name) if s.grid and s.role != "ids"})
    by_node = {s.node: s for s in sites}
    return tuple(stream for s in images.values() for stream in _streams_of(s, flow, by_node))


def _streams_of(segment: Segment, flow: Flow, sites: Mapping[str, Site]) -> list[Stream]:
    """Streams of one segment: adds whose one operand is an ancestor of the other."""
    carriers = flow.carriers(segment.name)
    bit = {name: 1 << i for i, name in enumerate(carriers)}
    above: dict[str, int] = {}
    for name in carriers:
        mask = 0
        for operand in flow.operands[name]:
            if operand in bit:
                mask |= above[operand] | bit[operand]
        above[name] = mask
    chains: list[_Chain] = []
    for name in carriers:
        found = _residual(name, flow, bit, above, chains)
        if found is None:
            _pass_addition(name, flow, bit, chains)
            continue
        chain, base, out = found
        chain.values.append(name)
        chain.parts.append((base, out, name))
    return [
        Stream(
            f"{segment.name}/{chain.values[0]}",
            segment,
            tuple(chain.values),
            _branches(segment, flow, sites, chain.parts),
            tuple(chain.additions),
        )
        for chain in chains
    ]


@dataclass
class _Chain:
    """A stream while it is found: values, (base, out, add) of each branch, additions."""

    values: list[str]
    parts: list[tuple[str, str, str]] = field(default_factory=list)
    additions: list[tuple[int, str]] = field(default_factory=list)


def _pass_addition(name: str, flow: Flow, bit: Mapping[str, int], chains: list[_Chain]) -> None:
    """A stream goes on behind an addition from outside (a ControlNet's residual)."""
    inside = [o for o in flow.operands[name] if o in bit]
    if name not in flow.sums or len(inside) != 1 or not flow.is_embedding(name):
        return
    for chain in chains:
        if chain.values[-1] == flow.root(inside[0]):
            chain.values[-1] = name
            chain.additions.append((len(chain.parts), name))


def _residual(
    name: str,
    flow: Flow,
    bit: Mapping[str, int],
    above: Mapping[str, int],
    chains: list[_Chain],
) -> tuple[_Chain, str, str] | None:
    """(chain, stream value the branch starts from, branch output) if `name` is a residual add."""
    operands = flow.operands[name]
    if name not in flow.sums or not flow.is_embedding(name):
        return None
    if any(o not in bit or flow.shapes[o] != flow.shapes[name] for o in operands):
        return None
    for main, out in (operands, operands[::-1]):
        root = flow.root(main)
        chain = next((c for c in chains if c.values[-1] == root), None)
        known = chain.values if chain else [root]
        base = next((v for v in reversed(known) if above[out] & bit[v]), None)
        if base is None:
            continue
        if chain is None:
            chain = _Chain([root])
            chains.append(chain)
        return chain, base, out
    return None


def _branches(
    segment: Segment,
    flow: Flow,
    sites: Mapping[str, Site],
    parts: list[tuple[str, str, str]],
) -> tuple[Branch, ...]:
    branches: list[Branch] = []
    block = 0
    for base, out, add in parts:
        region = flow.region(segment.name, base, out)
        inner = _inner(segment.name, flow, base, region)
        inside = tuple(n for n in inner if flow.ops[n] == ATTENTION)
        # a branch may reuse what an earlier attention computed (an IP-Adapter its queries)
        inside = tuple(n for n in inside if all(n not in b.sites for b in branches)) or inside
        kinds = _kinds(flow, inner, inside, sites)
        if "attention" in kinds and any("attention" in b.kinds for b in branches):
            block += 1
        entries = flow.entries(segment.name, inner)
        module = _branch_module(flow, inner, inside)
        problem = _branch_problem(flow, inner, entries, out, kinds)
        leak = flow.leak(segment.name, inner, out)
        if leak is not None and leak.node in flow.refusals:
            problem, leak = problem or leak, None
        branches.append(
            Branch(base, out, add, kinds, module, inside, block, entries, inner, problem, leak)
        )
    return tuple(branches)


def _inner(segment: str, flow: Flow, base: str, region: tuple[str, ...]) -> tuple[str, ...]:
    """The region without its prologue (norms and modulation on whole tokens)."""
    prologue = {base}
    for name in region:
        tokens = [o for o in flow.operands[name] if flow.carries(o, segment)]
        whole = name in flow.pointwise or flow.ops[name] in PROLOGUE
        if whole and all(o in prologue for o in tokens):
            prologue.add(name)
    return tuple(n for n in region if n not in prologue)


def _kinds(
    flow: Flow, inner: tuple[str, ...], inside: tuple[str, ...], sites: Mapping[str, Site]
) -> tuple[str, ...]:
    """What a branch computes; a linear path around the attention makes it an MLP as well."""
    kinds = {"cross" if sites[n].kind == "cross" else "attention" for n in inside}
    if any(sites[n].kind in ("temporal", "unknown") for n in inside):
        kinds = {"other"}
    reached: set[str] = set()
    for name in inner:
        from_outside = all(o not in inner for o in flow.operands[name])
        if name not in inside and (from_outside or not reached.isdisjoint(flow.operands[name])):
            reached.add(name)
    if inner and inner[-1] in reached:
        linear = any(flow.ops[n] == "aten.linear" for n in inner)
        kinds.add("mlp" if linear else "other")
    return tuple(sorted(kinds)) or ("other",)


def _branch_module(flow: Flow, inner: tuple[str, ...], inside: tuple[str, ...]) -> str:
    """Module path of a branch: its attention's, or what its linear maps have in common."""
    if len(inside) == 1:
        linears = [n for n in inner if flow.ops[n] == "aten.linear"]
        paths = [flow.modules[inside[0]], *(flow.modules[n] for n in linears)]
    else:
        paths = [flow.modules[n] for n in inner if flow.ops[n] == "aten.linear"]
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


def _branch_problem(
    flow: Flow,
    inner: tuple[str, ...],
    entries: tuple[str, ...],
    out: str,
    kinds: tuple[str, ...],
) -> Rejected | None:
    """Why the branch can't be merged, or None."""
    if not inner or "other" in kinds:
        return Rejected(out, "holds neither attention nor MLP")
    for name in (*entries, out):
        if not flow.is_embedding(name):
            return Rejected(name, "is not laid out [batch, tokens, channels]")
    return None

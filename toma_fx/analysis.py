"""Token-axis analysis: where image tokens flow, which attention is which, where residuals add up.

    captured graph --seeds, transfer rules--> facts --> attention sites
                                                    \-> residual streams x0..xL with branches

Forward data flow over the graph, no matching on model classes or parameter names. Image segments
are seeded where spatial dimensions fold into one, and at packed inputs; a packed input's grid comes
from position ids that line up with it, from sizes among the arguments, or from the user.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Literal

from torch import fx

from toma_fx.axis import (
    BATCH,
    FRAMES,
    HEIGHT,
    WIDTH,
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
    tokens_of,
)
from toma_fx.capture import Captured, ids_dim
from toma_fx.flow import ATTENTION, Flow, flow_of, module_path
from toma_fx.methods.windows import Size
from toma_fx.rules import apply_rule

PROLOGUE = {
    "aten.layer_norm", "aten.rms_norm", "aten.slice", "aten.cat", "aten.concat", "aten.contiguous",
    "aten.clone", "aten.to", "aten.dropout", "aten.split_with_sizes", "getitem", "aten.group_norm",
    "aten.transpose", "aten.permute", "aten.mean", "aten.var", "aten.linalg_vector_norm",
}  # fmt: skip
"""Ops besides element-wise ones that may stand between a stream and the point of merging."""
UNFOLD = {"aten.view", "aten.reshape", "aten.unflatten", "aten.unsqueeze", "aten.squeeze"}
"""Ops that lay an update out as a picture."""
CONSTANTS = {"aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.empty_like"}
BLOCK = 3
"""Branches that one block has at most: self-attention, cross-attention, MLP."""


def analyse(captured: Captured, grid: Size | None = None) -> tuple[Analysis, Flow]:
    """Facts, attention sites and residual streams of a captured graph.

    Args:
        captured: the graph; it is not changed.
        grid: token grid (H, W) or (T, H, W) of a packed input, if nothing else tells it.

    Returns:
        The analysis and the plain-data view of the graph that planning works on.
    """
    nodes = list(captured.graph_module.graph.nodes)
    seeds = _seeds(captured, {})
    facts, transfers, refusals = _propagate(nodes, seeds)
    rasters = _rasters(captured, facts, transfers, grid)
    if rasters:
        facts, transfers, refusals = _propagate(nodes, _seeds(captured, rasters))
    whole = {name: t.whole for name, t in transfers.items() if t.whole}
    flow = flow_of(nodes, facts, refusals, whole)
    lost = _lost(flow)
    sites = tuple(_site(n, flow, lost) for n in nodes if n.name in flow.attention)
    streams = _streams(flow, sites)
    packed = _packed(captured)
    return Analysis(facts, transfers, refusals, sites, streams, rasters, packed), flow


def _seeds(captured: Captured, rasters: Mapping[str, Raster]) -> dict[str, Layout]:
    """Layouts of the model inputs: packed or text sequences, and position ids."""
    seeds: dict[str, Layout] = {}
    for spec in captured.inputs:
        value = spec.tensor
        if value is None:
            continue
        if spec.raster is not None:
            dim = ids_dim(value) or 0
            ids = _cut(spec.name, value.shape[dim], spec.raster if rasters else None, "ids")
            batch = (BATCH, None, None)[: value.dim() - 2]
            seeds[spec.name] = (*batch, *((None, ids) if dim == 2 else (ids, None)))
        elif value.dim() == 3 and value.is_floating_point():
            packed = _cut(spec.name, value.shape[1], rasters.get(spec.name), "sequence")
            seeds[spec.name] = (BATCH, packed, None)
        elif value.dim() == 4 and value.is_floating_point():
            seeds[spec.name] = (BATCH, None, HEIGHT, WIDTH)
        elif value.dim() == 5 and value.is_floating_point():
            # frames may come before the channels or after; only frames fold with height and width
            seeds[spec.name] = (BATCH, FRAMES, FRAMES, HEIGHT, WIDTH)
    return seeds


def _cut(name: str, length: int, raster: Raster | None, role: Literal["ids", "sequence"]) -> Tokens:
    """The tokens of an input: the images of its raster, and what is around them."""
    if raster is None:
        return Tokens((Segment(name, length, None, role),))
    image = Segment(name, raster.images, raster.grid, role, raster.heights)
    before = Segment(f"{name}/before", raster.before, None, role)
    rest = Segment(f"{name}/rest", raster.rest, None, role)
    return Tokens(tuple(s for s in (before, image, rest) if s.length))


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
        if outcome.patches or outcome.positionals or outcome.whole:
            transfers[node.name] = outcome
    return facts, transfers, refusals


def _rasters(
    captured: Captured,
    facts: Mapping[str, Fact],
    transfers: Mapping[str, Transfer],
    given: Size | None,
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
            at = 0
            for ids in label.segments:
                if (raster := ids_of.get(ids.name)) is not None:
                    rasters.update(_aligned(raster, at, positional.tokens))
                at += ids.length
    if given:
        *frames, height, width = given
        known = [Raster((height,) * math.prod(frames), width)]
    else:
        known = list(ids_of.values()) or list(captured.hints)
    for one in known if given or not rasters else []:
        fitting = [name for name, length in _packed(captured).items() if length == one.length]
        if len(fitting) > 1:  # text of as many tokens
            fitting = [name for name in fitting if name == "hidden_states"]
        if len(fitting) == 1:
            rasters[fitting[0]] = one
    return rasters


def _packed(captured: Captured) -> dict[str, int]:
    """Tokens of every input [batch, tokens, channels]."""
    inputs = ((i.name, i.tensor) for i in captured.inputs if i.raster is None)
    return {name: x.shape[1] for name, x in inputs if x is not None and x.dim() == 3}


def _aligned(raster: Raster, at: int, tokens: Tokens) -> dict[str, Raster]:
    """The raster of the segment that holds the images of ids that begin at token `at`."""
    start, begin = at + raster.before, 0
    for segment in tokens.segments:
        end = begin + segment.length
        if begin <= start and start + raster.images <= end:
            rest = end - start - raster.images
            return {segment.name: replace(raster, before=start - begin, rest=rest)}
        begin = end
    return {}


def _lost(flow: Flow) -> set[str]:
    """Values that may hold image tokens which the analysis lost sight of at a refusal."""
    lost: set[str] = set()
    for name in flow.order:
        operands = flow.operands[name]
        ended = name in flow.refusals and any(flow.is_spatial(o) for o in operands)
        if ended or not (flow.is_spatial(name) or lost.isdisjoint(operands)):
            lost.add(name)
    return lost


def _site(node: fx.Node, flow: Flow, lost: set[str]) -> Site:
    """Classify one attention by the tokens of its queries and keys."""
    layout, keys = _query_and_key(node, flow)
    q = layout[-2] if layout is not None and isinstance(layout[-2], Tokens) else tokens_of(layout)
    k = tokens_of(keys)
    images = [s for s in q.segments if s.grid] if q else []
    if layout is not None and (layout[-2] == FRAMES or (q and layout[-2] != q)):
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


def _query_and_key(node: fx.Node, flow: Flow) -> tuple[Layout | None, Layout | None]:
    """Layouts of the queries and keys; scores carry both."""
    if flow.ops[node.name] == ATTENTION:
        query, key = (str(a) for a in node.args[:2])
        return flow.layout(query), flow.layout(key)
    scores = flow.layout(node.name)
    return scores, None if scores is None else (scores[-1],)


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
    if not chains:
        chains = _added_on_the_grid(segment, flow)
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


def _added_on_the_grid(segment: Segment, flow: Flow) -> list[_Chain]:
    """The one branch of tokens that are added to the picture they were folded from:

    x [B, C, H, W] --fold--> norm -> attention -> unfold --> x + update
    """
    embeddings = [n for n in flow.carriers(segment.name) if flow.is_embedding(n)]
    if not embeddings:
        return []
    start, ends = embeddings[0], [n for n in embeddings if _unfolds(n, flow)]
    if not ends or start == ends[-1]:
        return []
    return [_Chain([start, ends[-1]], [(start, ends[-1], "")])]


def _unfolds(name: str, flow: Flow) -> bool:
    """Whether a value is laid out as a picture and added to one."""
    seen, front = {name}, [name]
    while front:
        front = [u for f in front for u in flow.users[f] if u not in seen and u in flow.facts]
        seen.update(front)
        for user in front:
            if user in flow.sums and HEIGHT in (flow.layout(user) or ()):
                return True
        front = [u for u in front if flow.ops[u] in PROLOGUE | UNFOLD or u in flow.pointwise]
    return False


@dataclass
class _Chain:
    """A stream while it is found: values, (base, out, add) of each branch, additions."""

    values: list[str]
    parts: list[tuple[str, str, str]] = field(default_factory=list)
    additions: list[tuple[int, str]] = field(default_factory=list)

    def swallow(self, value: str) -> bool:
        """Go back to an earlier value: what was added since is inside the branch to come.

        AuraFlow's blocks are x + mlp(norm(x + attention(x))). A sum over more branches than a block
        has is no branch of this stream.
        """
        at = self.values.index(value)
        if len(self.parts) - at > BLOCK:
            return False
        del self.values[at + 1 :], self.parts[at:]
        self.additions = [(i, add) for i, add in self.additions if i <= at]
        return True


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
        if chain is None:
            chain = next((c for c in chains if root in c.values[:-1]), None)
            if chain is not None and above[out] & bit[chain.values[-1]]:
                if not chain.swallow(root):
                    continue
            else:
                chain = None
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
        inside = tuple(n for n in inner if n in flow.attention)
        # a branch may reuse what an earlier attention computed (an IP-Adapter its queries)
        inside = tuple(n for n in inside if all(n not in b.sites for b in branches)) or inside
        kinds = _kinds(segment.name, flow, inner, inside, sites)
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
    # tokens merge where they are laid out [batch, tokens, channels]
    inside = set(region)
    for name in reversed(region):
        enters = any(u in inside and u not in prologue for u in flow.users[name])
        if name in prologue and enters and not flow.is_embedding(name):
            prologue.discard(name)
    return tuple(n for n in region if n not in prologue)


def _kinds(
    segment: str,
    flow: Flow,
    inner: tuple[str, ...],
    inside: tuple[str, ...],
    sites: Mapping[str, Site],
) -> tuple[str, ...]:
    """What a branch computes; a linear path around the attention makes it an MLP as well."""
    kinds = {"cross" if sites[n].kind == "cross" else "attention" for n in inside}
    if any(sites[n].kind in ("temporal", "unknown") for n in inside):
        kinds = {"other"}
    reached: set[str] = set()
    inside = (*inside, *(p for n in inside for p in flow.weighted(n)))
    for name in inner:
        outside = [o for o in flow.operands[name] if o not in inner]
        from_outside = any(flow.carries(o, segment) for o in outside)
        if flow.ops[name] in CONSTANTS:
            continue
        if name not in inside and (from_outside or not reached.isdisjoint(flow.operands[name])):
            reached.add(name)
    if inner and inner[-1] in reached:
        linear = any(n in flow.linears for n in inner)
        kinds.add("mlp" if linear else "other")
    return tuple(sorted(kinds)) or ("other",)


def _branch_module(flow: Flow, inner: tuple[str, ...], inside: tuple[str, ...]) -> str:
    """Module path of a branch: its attention's, or what its linear maps have in common."""
    if len(inside) == 1:
        linears = [n for n in inner if n in flow.linears]
        paths = [flow.modules[inside[0]], *(flow.modules[n] for n in linears)]
    else:
        paths = [flow.modules[n] for n in inner if n in flow.linears]
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

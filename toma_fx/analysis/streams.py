"""Residual streams: chains of additions whose one operand is an ancestor of the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile

from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.factors import HEIGHT, Segment
from toma_fx.analysis.facts import Branch, Rejected, Site, Stream
from toma_fx.analysis.labels import names_axis
from toma_fx.graph.nodes import CASTS, COPIES, JOINS, REDUCTIONS, RESHAPES

PROLOGUE = CASTS | COPIES | JOINS | REDUCTIONS | {
    "aten.layer_norm", "aten.rms_norm", "aten.group_norm", "aten.slice", "aten.split_with_sizes",
    "getitem", "aten.transpose", "aten.permute",
}  # fmt: skip
"""Ops besides element-wise ones that may stand between a stream and the point of merging."""
UNFOLD = RESHAPES | {"aten.unflatten", "aten.unsqueeze", "aten.squeeze", "aten.roll"}
"""Ops that lay an update out as a picture."""
CONSTANTS = {"aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.empty_like"}
BLOCK = 3
"""Branches that one block has at most: self-attention, cross-attention, MLP."""


# -- residual streams -----------------------------------------------------------------------------


def find_streams(flow: Flow, sites: tuple[Site, ...]) -> tuple[Stream, ...]:
    """The residual streams of every image segment."""
    images: dict[str, Segment] = {}
    for name in flow.order:
        images.update({s.name: s for s in flow.segments(name) if s.grid and s.role != "ids"})
    by_node = {s.node: s for s in sites}
    return tuple(
        stream for s in images.values() for stream in _find_segment_streams(s, flow, by_node)
    )


def find_text_streams(flow: Flow, sites: tuple[Site, ...]) -> tuple[Stream, ...]:
    """The residual streams of tokens that are no image, as far as they run by themselves."""
    texts: dict[str, Segment] = {}
    for name in flow.order:
        segments = flow.segments(name)
        if len(segments) == 1 and segments[0].grid is None and segments[0].role != "ids":
            texts[segments[0].name] = segments[0]
    by_node = {s.node: s for s in sites}
    return tuple(
        stream
        for segment in texts.values()
        for stream in _find_segment_streams(segment, flow, by_node)
        if stream.branches[0].add
    )


def _find_segment_streams(segment: Segment, flow: Flow, sites: Mapping[str, Site]) -> list[Stream]:
    """Streams of one segment: adds whose one operand is an ancestor of the other."""
    carriers = flow.carriers(segment.name)
    # sets of ancestors as integers, one bit for each carrier
    bits = {name: 1 << i for i, name in enumerate(carriers)}
    ancestors: dict[str, int] = {}
    for name in carriers:
        mask = 0
        for operand in flow.operands[name]:
            if operand in bits:
                mask |= ancestors[operand] | bits[operand]
        ancestors[name] = mask
    chains: list[_Chain] = []
    for name in carriers:
        if _extend_past_skip(name, flow, chains):
            continue
        residual = _match_residual(name, flow, bits, ancestors, chains)
        if residual is None:
            _extend_past_addition(name, flow, bits, chains)
            continue
        chain, base, out = residual
        chain.values.append(name)
        chain.parts.append((base, out, name))
    if not chains:
        chains = _find_grid_update(segment, flow)
    return [
        Stream(
            _name_stream(segment, chain, chains[:i]),
            segment,
            tuple(chain.values),
            _make_branches(segment, flow, sites, chain),
            tuple(chain.additions),
        )
        for i, chain in enumerate(chains)
    ]


def _name_stream(segment: Segment, chain: _Chain, others: list[_Chain]) -> str:
    """A name of its own, though two heads of one trunk begin at one value."""
    name, same = f"{segment.name}/{chain.first}", sum(c.first == chain.first for c in others)
    return f"{name}/{same}" if same else name


def _find_grid_update(segment: Segment, flow: Flow) -> list[_Chain]:
    """The one branch of tokens that are added to the picture they were folded from:

    x [B, C, H, W] --fold--> norm -> attention -> unfold --> x + update
    """
    embeddings = [n for n in flow.carriers(segment.name) if flow.is_embedding(n)]
    if not embeddings:
        return []
    start, ends = embeddings[0], [n for n in embeddings if _is_added_on_grid(n, segment, flow)]
    if not ends or start == ends[-1]:
        return []
    return [_Chain([start, ends[-1]], [(start, ends[-1], "")])]


def _is_added_on_grid(name: str, segment: Segment, flow: Flow) -> bool:
    """Whether a value is laid out as a picture, and then added to one or to the tokens of one."""
    pictures, front = {name: False}, [name]  # whether what is reached was laid out so
    while front:
        front = [u for f in front for u in flow.users[f] if u not in pictures and u in flow.facts]
        for user in front:
            picture = any(pictures.get(o) for o in flow.operands[user])
            if picture and user in flow.sums and flow.is_spatial(user):
                return True
            grid = names_axis(flow.layout(user), HEIGHT) and not flow.carries(user, segment.name)
            pictures[user] = picture or grid
        linear = {u for u in front if u in flow.linears and not flow.segments(u)}
        front = [
            u for u in front if flow.ops[u] in PROLOGUE | UNFOLD or u in flow.pointwise | linear
        ]
    return False


@dataclass
class _Chain:
    """A stream while it is found: values, (base, out, add) of each branch, additions.

    Adds are met in graph order; one continues the chain whose last value it adds to. So
    x1 = x0 + f(x0), x2 = x1 + g(x1) give values [x0, x1, x2] and parts [(x0, f, x1), (x1, g, x2)].
    An add to an earlier value has a branch that holds all parts since then: see `rewind`.
    """

    values: list[str]
    parts: list[tuple[str, str, str]] = field(default_factory=list)
    additions: list[tuple[int, str]] = field(default_factory=list)

    @property
    def first(self) -> str:
        """The value that the stream begins with."""
        return self.values[0]

    def rewind(self, value: str) -> bool:
        """Go back to an earlier value: what was added since is inside the branch to come.

        AuraFlow's block x0 + mlp(norm(x1)) with x1 = x0 + attention(x0) first gives [x0, x1]; its
        second add returns the chain to [x0], for one branch that holds both. False if more would
        be dropped than a block has: a long skip connection is no branch of this stream.
        """
        at = self.values.index(value)
        if len(self.parts) - at > BLOCK:
            return False
        del self.values[at + 1 :], self.parts[at:]
        self.additions = [(i, add) for i, add in self.additions if i <= at]
        return True


def _extend_past_addition(
    name: str, flow: Flow, bits: Mapping[str, int], chains: list[_Chain]
) -> None:
    """Continue a stream behind an addition from outside (a ControlNet's residual)."""
    inside = [o for o in flow.operands[name] if o in bits]
    if name not in flow.sums or len(inside) != 1 or not flow.is_embedding(name):
        return
    for chain in chains:
        if chain.values[-1] == flow.root(inside[0]):
            chain.values[-1] = name
            chain.additions.append((len(chain.parts), name))


def _extend_past_skip(name: str, flow: Flow, chains: list[_Chain]) -> bool:
    """Continue a stream behind the sum with an earlier value of its own: a long skip."""
    operands = [flow.root(o) for o in flow.operands[name]]
    if name not in flow.sums or not flow.is_embedding(name) or len(operands) != 2:
        return False
    for chain in chains:
        for main, other in (operands, operands[::-1]):
            if chain.values[-1] == main and other in chain.values[:-1]:
                chain.values[-1] = name
                chain.additions.append((len(chain.parts), name))
                return True
    return False


def _match_residual(
    name: str,
    flow: Flow,
    bits: Mapping[str, int],
    ancestors: Mapping[str, int],
    chains: list[_Chain],
) -> tuple[_Chain, str, str] | None:
    """(chain, stream value the branch starts from, branch output) if `name` is a residual add."""
    operands = flow.operands[name]
    if name not in flow.sums or not flow.is_embedding(name):
        return None
    if any(o not in bits or flow.shapes[o] != flow.shapes[name] for o in operands):
        return None
    for main, out in (operands, operands[::-1]):
        root = flow.root(main)
        root = flow.root(flow.scaled.get(root, root))
        if root not in bits:  # text that follows an image into a joint sequence
            continue
        chain = next((c for c in chains if c.values[-1] == root), None)
        if chain is None:
            chain = next((c for c in chains if root in c.values[:-1]), None)
            if chain is not None and ancestors[out] & bits[chain.values[-1]]:
                if not chain.rewind(root):
                    continue
            else:
                chain = None
        known = chain.values if chain else [root]
        base = next((v for v in reversed(known) if ancestors[out] & bits[v]), None)
        if base is None:
            continue
        if chain is None:
            chain = _Chain([root])
            chains.append(chain)
        return chain, base, out
    return None


def _make_branches(
    segment: Segment,
    flow: Flow,
    sites: Mapping[str, Site],
    chain: _Chain,
) -> tuple[Branch, ...]:
    branches: list[Branch] = []
    block = 0
    for i, (base, out, add) in enumerate(chain.parts):
        region = flow.region(segment.name, base, out)
        inner = _trim_prologue(segment.name, flow, base, region)
        inside = tuple(n for n in inner if n in flow.attention)
        # a branch may reuse what an earlier attention computed (an IP-Adapter its queries)
        inside = tuple(n for n in inside if all(n not in b.sites for b in branches)) or inside
        kinds = _classify_branch(segment.name, flow, inner, inside, sites)
        # a branch from an earlier value than the last belongs to the block that begins there
        begins = "attention" in kinds and any("attention" in b.kinds for b in branches)
        if begins and base not in chain.values[:i]:
            block += 1
        entries = flow.entries(segment.name, inner)
        module = _common_module(flow, inner, inside)
        problem = _check_branch(flow, inner, entries, out, kinds)
        leak = flow.find_leak(segment.name, inner, out)
        if leak is not None and leak.node in flow.refusals:
            problem, leak = problem or leak, None
        alone = None
        if add and any(flow.root(o) in flow.scaled for o in flow.operands[add] if o != out):
            alone = flow.reject(add, "the stream is scaled where the branch is added", "use")
        branches.append(
            Branch(
                base, out, add, kinds, module, inside, block, entries, inner, problem, leak, alone
            )
        )
    return tuple(branches)


def _trim_prologue(segment: str, flow: Flow, base: str, region: tuple[str, ...]) -> tuple[str, ...]:
    """The region without its prologue (norms and modulation of all tokens)."""
    prologue = {base}
    for name in region:
        tokens = [o for o in flow.operands[name] if flow.carries(o, segment)]
        may_precede = name in flow.pointwise or flow.ops[name] in PROLOGUE
        if may_precede and all(o in prologue for o in tokens):
            prologue.add(name)
    # tokens merge where they are laid out [batch, tokens, channels]
    inside = set(region)
    for name in reversed(region):
        enters = any(u in inside and u not in prologue for u in flow.users[name])
        if name in prologue and enters and not flow.is_embedding(name):
            prologue.discard(name)
    return tuple(n for n in region if n not in prologue)


def _classify_branch(
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
    inside = (*inside, *(p for n in inside for p in flow.attention_products(n)))
    sums = {n for n in inner if not flow.carries(n, segment)}
    inside = (*inside, *(n for n in inner if not sums.isdisjoint(flow.operands[n])))
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


def _common_module(flow: Flow, inner: tuple[str, ...], inside: tuple[str, ...]) -> str:
    """Module path of a branch: its attention's, or what its linear maps have in common."""
    if len(inside) == 1:
        linears = [n for n in inner if n in flow.linears]
        paths = [flow.modules[inside[0]], *(flow.modules[n] for n in linears)]
    else:
        paths = [flow.modules[n] for n in inner if n in flow.linears]
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


def _check_branch(
    flow: Flow,
    inner: tuple[str, ...],
    entries: tuple[str, ...],
    out: str,
    kinds: tuple[str, ...],
) -> Rejected | None:
    """Why the branch can't be merged, or None."""
    if not inner or "other" in kinds:
        return flow.reject(out, "holds neither attention nor MLP", "content")
    for name in (*entries, out):
        if not flow.is_embedding(name):
            return flow.reject(name, "is not laid out [batch, tokens, channels]", "layout")
    return None

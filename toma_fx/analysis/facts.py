"""What the analysis finds: patches, positional operands, attention sites, residual streams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from toma_fx.analysis.factors import Segment, Tokens
from toma_fx.analysis.labels import Fact, Layout
from toma_fx.capture.grids import Raster


@dataclass(frozen=True)
class Patch:
    """A literal argument that carries a token count: `args[path]`.

    It is the length of `segments`, `times` as much where the batch is folded in.
    """

    path: tuple[int, ...]
    segments: tuple[Segment, ...]
    times: int = 1

    def value(self, lengths: Mapping[str, int]) -> int:
        """The literal when the segments named in `lengths` have those lengths."""
        return self.times * sum(lengths.get(s.name, s.length) for s in self.segments)


@dataclass(frozen=True)
class Positional:
    """An operand from outside the token flow that lines up with a token axis of the result.

    Attributes:
        operand: its node.
        layout: what its dimensions line up with; those that the result has before its first are
            included, so that the operand's are the last of them.
        dim: the dimension of `layout` whose tokens it follows.
        additive: whether it may be merged like tokens; others (rotary tables, masks, gates) are
            gathered at the destinations.
    """

    operand: str
    layout: Layout
    dim: int
    additive: bool = False

    @property
    def tokens(self) -> Tokens:
        """The tokens that it lines up with."""
        found = self.layout[self.dim].positions
        assert found is not None
        return found


@dataclass(frozen=True)
class Transfer:
    """What a rule derives.

    Attributes:
        fact: of the output. patches: literals that are token counts. positionals: operands that
            line up with tokens.
        counted: operands that are summed over their tokens, of which each merged one counts as
            often as the tokens it stands for (linear attention).
        needs_all_tokens: why the op must see all tokens, if it must: labels go on behind it,
            merging doesn't reach across it.
    """

    fact: Fact
    patches: tuple[Patch, ...] = ()
    positionals: tuple[Positional, ...] = ()
    counted: tuple[Positional, ...] = ()
    needs_all_tokens: str = ""


Kind = Literal["no_rule", "rule", "needs_all_tokens", "use", "layout", "content"]
ADVICE: Mapping[Kind, str] = {
    "no_rule": (
        "toma_fx.tokenwise(op) declares that it treats every token alike; else it needs a rule "
        "(CONTRIBUTING, A new operator)"
    ),
    "rule": "merging stops there: what must see all tokens, or rows, belongs outside the branch",
    "needs_all_tokens": "a smaller scope= unmerges before it",
    "use": "a smaller scope= unmerges before the other use",
    "layout": "a stream [batch, tokens, channels], or [tokens, batch, channels], merges",
    "content": "attention and MLPs merge, by branches=",
}
"""What would make it merge, by what refuses."""


@dataclass(frozen=True)
class Rejected:
    """A "no" with its reason and the node to blame.

    Attributes:
        node: graph node. reason: what is the matter, without names.
        kind: what refuses: "no_rule", there is none for the op; "rule", the rule of the op;
            "needs_all_tokens", the op must see all tokens; "use", the value is used elsewhere;
            "layout", tokens are on a dimension where they can't merge; "content", the branch or
            attention is of a kind that can't.
        op: op name, such as "aten.view", if an op refuses. dim: what the dimension that is to
            blame enumerates. module: path of the module. line: of Python.
    """

    node: str
    reason: str
    kind: Kind
    op: str = ""
    dim: str = ""
    module: str = ""
    line: str = ""

    @property
    def advice(self) -> str:
        """What would make it merge."""
        return ADVICE[self.kind]

    def __str__(self) -> str:
        if self.kind == "no_rule":
            return f"{self.node}: {self.reason} for {self.op}"
        return f"{self.node}: {self.reason}{f' ({self.op})' if self.op else ''}"


@dataclass(frozen=True)
class Site:
    """One scaled-dot-product attention and what its tokens are.

    Attributes:
        node: graph node. module: module path.
        kind: "self", "joint", "cross", "temporal", "text", "linear" (a sum over tokens without
            softmax) or "unknown".
        query, key: token labels of q and k, printed.
        segment: the image segment that its queries carry ("" if none).
        operands: nodes of queries, keys and values; none if the attention is written out.
        masked: whether it has a mask that differs from key to key.
    """

    node: str
    module: str
    kind: str
    query: str
    key: str
    segment: str
    operands: tuple[str, ...] = ()
    masked: bool = False


@dataclass(frozen=True)
class Branch:
    """One update `x_next = x + out` of a residual stream.

    Attributes:
        x, out, add: nodes of the stream value, of the update, and of the add; no add if the update
            is added after it was laid out as a picture again.
        kinds: what the branch holds: "attention", "cross", "mlp", "other".
        module: module path. sites: attention nodes inside. block: index of its block.
        entries: normalized values that enter the branch (where a sublayer merges).
        nodes: nodes between entries and `out`, in graph order.
        rejected: why the branch can't be merged, if it can't. leak: a use of its inner values by
            others, for which it can't be merged by itself. alone: why it can merge by itself only.
    """

    x: str
    out: str
    add: str
    kinds: tuple[str, ...]
    module: str
    sites: tuple[str, ...]
    block: int
    entries: tuple[str, ...]
    nodes: tuple[str, ...]
    rejected: Rejected | None = None
    leak: Rejected | None = None
    alone: Rejected | None = None


@dataclass(frozen=True)
class Stream:
    """A residual stream x0..xL of one image segment, with its branches in order.

    Branch i starts from values[i]; what is added from outside before it (`additions`: index of the
    branch, node of the add) counts to that value.
    """

    name: str
    segment: Segment
    values: tuple[str, ...]
    branches: tuple[Branch, ...]
    additions: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Analysis:
    """Result of the analysis: plain data about a captured graph.

    Attributes:
        facts: layout of every labeled node. transfers: the rule results that rewriting needs.
        refusals: nodes where token flow ended, with the reason.
        sites: every attention. streams: every residual stream of an image segment.
        rasters: what packed inputs enumerate. packed: tokens of every input that may be packed.
    """

    facts: Mapping[str, Fact]
    transfers: Mapping[str, Transfer]
    refusals: Mapping[str, Rejected]
    sites: tuple[Site, ...]
    streams: tuple[Stream, ...]
    rasters: Mapping[str, Raster] = field(default_factory=dict)
    packed: Mapping[str, int] = field(default_factory=dict)

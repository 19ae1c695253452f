"""Facts of the token-axis analysis: what each dimension of a value enumerates.

A fact is a `Layout`, one label per dimension: a `Batch`, `FRAMES`, `HEIGHT`, `WIDTH`, `Tokens` (of
which `Keys`, `Flat` and `Row` are kinds), or None. Facts name graph nodes by string and hold no
graph objects, so they can be printed, compared and saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeGuard, cast

from toma_fx.methods.windows import Size, size_text

FRAMES, HEIGHT, WIDTH = "frames", "height", "width"
SPATIAL = (FRAMES, HEIGHT, WIDTH)
UNKNOWN = 2**40
"""Sizes from here on stand for what depends on the data (text without its padding, say)."""


@dataclass(frozen=True)
class Raster:
    """What a packed sequence holds: images of equal width one below the other, among other tokens.

    Attributes:
        heights: rows of each image, or frame of a video. width: columns. rest: tokens after them.
        before: tokens before them.
    """

    heights: tuple[int, ...]
    width: int
    rest: int = 0
    before: int = 0

    @property
    def grid(self) -> Size:
        """(H, W) of the images together; (T, H, W) if there are several of one size."""
        if len(set(self.heights)) == 1 < len(self.heights):
            return len(self.heights), self.heights[0], self.width
        return sum(self.heights), self.width

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.before + self.images + self.rest

    @property
    def images(self) -> int:
        """Tokens of the images."""
        return sum(self.heights) * self.width


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one origin inside a token axis.

    Attributes:
        name: node that created it (a spatial fold, or an input).
        length: number of tokens.
        grid: (H, W) if the tokens are a raster of an image, or of several of one width; (T, H, W)
            if they are a video, or several images of one size.
        heights: rows of each of several images; windows never reach from one into the next.
        role: "image" (folded from a spatial grid), "sequence" (a packed or text input), "ids"
            (position ids), "other".
    """

    name: str
    length: int
    grid: Size | None = None
    role: Literal["image", "sequence", "ids", "other"] = "other"
    heights: tuple[int, ...] = ()

    def __str__(self) -> str:
        shape = f" ({size_text(self.grid)})" if self.grid else ""
        return f"{self.name} {self.length}{shape}"


@dataclass(frozen=True)
class Tokens:
    """Label of a dimension that enumerates tokens: segments, end to end."""

    segments: tuple[Segment, ...]

    @property
    def length(self) -> int:
        """Total number of tokens."""
        return sum(s.length for s in self.segments)

    def __str__(self) -> str:
        return "[" + " | ".join(str(s) for s in self.segments) + "]"


@dataclass(frozen=True)
class Keys(Tokens):
    """Label of the last dimension of attention scores: the tokens that are attended to.

    Attributes:
        normal: whether softmax has made the scores add up to 1 over them.
    """

    normal: bool = False


@dataclass(frozen=True)
class Flat(Tokens):
    """Label of batch and tokens folded into one dimension, as quantised linear layers do.

    Attributes:
        rows: size of the batch. outer: whether the tokens are the outer of the two.
    """

    rows: int = 1
    outer: bool = False


@dataclass(frozen=True)
class Row(Tokens):
    """Label of the tokens of one row of a batch, taken out of it.

    Attributes:
        row: which of the batch.
    """

    row: int = 0


@dataclass(frozen=True)
class Batch:
    """Label of a dimension that enumerates the batch, or a stretch of its rows.

    Perturbed-attention guidance cuts the batch and joins it again. Each element merges by its own
    pattern, so only pieces of the same rows may meet.

    Attributes:
        span: (start, stop, total) of the rows if they are a part of the batch.
        times: entries of each row (heads folded into the batch).
    """

    span: tuple[int, int, int] | None = None
    times: int = 1

    def rows(self, size: int) -> tuple[int, int, int]:
        """(start, stop, total) on a dimension of `size`."""
        return self.span or (0, size // self.times, size // self.times)

    def part(self, start: int, stop: int, total: int) -> Batch:
        """The label of some rows."""
        return Batch(None if (start, stop) == (0, total) else (start, stop, total), self.times)


BATCH = Batch()
Label = str | Batch | Tokens | None


def is_batch(label: Label) -> TypeGuard[Batch]:
    """Whether a dimension enumerates the batch, or rows of it."""
    return isinstance(label, Batch)


Layout = tuple[Label, ...]
Fact = Layout | tuple[Layout | None, ...] | None
"""Layout of a tensor, layouts of a tuple of tensors, or nothing known."""


def is_tuple_fact(fact: Fact) -> TypeGuard[tuple[Layout | None, ...]]:
    """Whether a fact describes a tuple of tensors and at least one of their layouts is known."""
    return bool(fact) and any(isinstance(f, tuple) for f in fact or ())


def layout_of(fact: Fact) -> Layout | None:
    """The layout of a tensor; None for a tuple of tensors."""
    return None if is_tuple_fact(fact) else cast("Layout | None", fact)


def layouts_of(fact: Fact) -> tuple[Layout | None, ...]:
    """The layouts of a tuple of tensors, or of one tensor."""
    return fact if is_tuple_fact(fact) else (layout_of(fact),)


def token_dim(layout: Layout | None) -> int | None:
    """The dimension that enumerates tokens, if there is one."""
    if layout is None:
        return None
    return next((d for d, label in enumerate(layout) if isinstance(label, Tokens)), None)


def tokens_of(layout: Layout | None) -> Tokens | None:
    """The token label of a layout, if there is one."""
    dim = token_dim(layout)
    if layout is None or dim is None:
        return None
    label = layout[dim]
    return label if isinstance(label, Tokens) else None


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
    """An operand from outside the token flow whose dimension `dim` lines up with the token axis.

    `batch` is the operand's dimension that lines up with the batch (None: it has none, and the
    batch lies `lead` dimensions before its first). `additive` operands may be merged like tokens;
    the others (rotary tables, masks, gates) are gathered at the destinations.
    """

    operand: str
    dim: int
    tokens: Tokens
    batch: int | None
    lead: int = 0
    additive: bool = False


@dataclass(frozen=True)
class Transfer:
    """What a rule derives: the fact of the output, literals to patch, positional operands.

    `whole` says why the op must see all tokens, if it must: labels go on behind it, merging doesn't
    reach across it.
    """

    fact: Fact
    patches: tuple[Patch, ...] = ()
    positionals: tuple[Positional, ...] = ()
    whole: str = ""


@dataclass(frozen=True)
class Rejected:
    """A "no" with its reason and the node to blame."""

    node: str
    reason: str


@dataclass(frozen=True)
class Site:
    """One scaled-dot-product attention and what its tokens are.

    Attributes:
        node: graph node. module: module path.
        kind: "self", "joint", "cross", "temporal", "text" or "unknown".
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
        entries: normalised values that enter the branch (where a sublayer merges).
        nodes: nodes between entries and `out`, in graph order.
        rejected: why the branch can't be merged, if it can't. leak: a use of its inner values by
            others, for which it can't be merged by itself.
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
        facts: layout of every labelled node. transfers: the rule results that rewriting needs.
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

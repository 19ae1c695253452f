"""Transfer rules: how each op family moves the token axis. One small function per family.

A rule gets a `Call` (the node's arguments, shapes and the layouts of its operands) and returns a
`Transfer` or `Rejected`. Which dimension is which is decided by dimension bookkeeping alone, never
by comparing sizes with a token count, so that a head width equal to the token count can't mislead.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from toma_fx.axis import (
    BATCH,
    HEIGHT,
    WIDTH,
    Fact,
    Label,
    Layout,
    Patch,
    Positional,
    Rejected,
    Segment,
    Tokens,
    Transfer,
    token_dim,
    tokens_of,
)

Outcome = Transfer | Rejected
NOTHING = Transfer(None)


@dataclass(frozen=True)
class Call:
    """One node as a rule sees it."""

    node: fx.Node
    facts: dict[str, Fact]

    @property
    def name(self) -> str:
        """Node name."""
        return self.node.name

    @property
    def op(self) -> str:
        """Op name without overload, e.g. "aten.view"."""
        return op_name(self.node.target)

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """Positional or keyword argument."""
        if len(self.node.args) > index:
            return self.node.args[index]
        return self.node.kwargs.get(name, default)

    def fact(self, operand: Any) -> Fact:
        """Fact of an operand (None for literals)."""
        return self.facts.get(operand.name) if isinstance(operand, fx.Node) else None

    def layout(self, operand: Any) -> Layout | None:
        """Layout of a tensor operand."""
        fact = self.fact(operand)
        return fact if fact is not None and not _is_tuple_fact(fact) else None  # type: ignore[return-value]

    def mixes(self, what: str, layout: Layout, dims: Iterable[int]) -> Rejected | None:
        """Refusal if `what`, which mixes or cuts along `dims`, would touch tokens, or their batch.

        Each batch element merges by its own pattern, so token i of one no longer matches token i of
        another.
        """
        shape = shape_of(self.node.args[0])
        for dim in dims:
            if isinstance(layout[dim], Tokens):
                return self.no(f"{what} the token axis")
            if layout[dim] == BATCH and shape[dim] != 1 and tokens_of(layout) is not None:
                return self.no(f"{what} the batch of tokens")
        return None

    def no(self, reason: str) -> Rejected:
        """Refusal that blames this node."""
        return Rejected(self.name, f"{reason} ({self.node.target})")


def _is_tuple_fact(fact: Fact) -> bool:
    return bool(fact) and any(f is not None and isinstance(f, tuple) for f in fact or ())


def op_name(target: Any) -> str:
    """ "aten.view" for `torch.ops.aten.view.default`; the name of a plain function otherwise."""
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[1]}"
    return getattr(target, "__name__", str(target))


def shape_of(value: Any) -> tuple[int, ...]:
    """Static shape of a node's value."""
    return tuple(int(s) for s in value.meta["val"].shape)


Rule = Callable[[Call], Outcome]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a transfer rule for aten ops."""

    def add(function: Rule) -> Rule:
        RULES.update({f"aten.{name}": function for name in names})
        return function

    return add


def apply_rule(node: fx.Node, facts: dict[str, Fact]) -> Outcome:
    """Run the rule of `node`, or say that there is none."""
    call = Call(node, facts)
    if node.target is operator.getitem:
        return _getitem(call)
    found = RULES.get(call.op)
    if found is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        found = pointwise
    if found is not None:
        return found(call)
    touched = [n for n in node.all_input_nodes if _carries_tokens(facts.get(n.name))]
    return call.no(f"no transfer rule for {call.op}") if touched else NOTHING


def _carries_tokens(fact: Fact) -> bool:
    if fact is None:
        return False
    if _is_tuple_fact(fact):
        return any(tokens_of(f) is not None for f in fact)  # type: ignore[arg-type]
    return tokens_of(fact) is not None  # type: ignore[arg-type]


def _getitem(call: Call) -> Outcome:
    fact = call.fact(call.node.args[0])
    index = call.node.args[1]
    if fact is None or not _is_tuple_fact(fact) or not isinstance(index, int):
        return NOTHING
    return Transfer(fact[index])  # type: ignore[arg-type]


# -- element-wise ---------------------------------------------------------------------------------


@rule("clip", "expand_as", "full_like", "zeros_like", "ones_like")
def pointwise(call: Call) -> Outcome:
    """Element-wise ops keep every axis; operands broadcast from the right."""
    operands = [n for n in call.node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return broadcast(call, operands, additive=call.op in ("aten.add", "aten.sub"))


def broadcast(call: Call, operands: Sequence[fx.Node], *, additive: bool = False) -> Outcome:
    """Labels of a broadcast result, with the operands that are positional to its token axis."""
    out_shape = shape_of(call.node)
    rank = len(out_shape)
    labels: list[Label] = [None] * rank
    for operand in operands:
        layout, shape = call.layout(operand), shape_of(operand)
        if layout is None:
            continue
        shift = rank - len(shape)
        for d, label in enumerate(layout):
            if label is None or (shape[d] == 1 and out_shape[d + shift] != 1):
                continue
            current = labels[d + shift]
            if current is None or _outranks(label, current):
                labels[d + shift] = label
            elif isinstance(label, Tokens) != isinstance(current, Tokens) and BATCH in (
                label,
                current,
            ):
                return call.no("a token axis meets a batch axis")
            elif isinstance(label, Tokens) and current in (HEIGHT, WIDTH):
                labels[d + shift] = label
    if sum(isinstance(label, Tokens) for label in labels) > 1:
        return call.no("two token axes in one value")
    if _batch_lost(call, operands, labels):
        return call.no("tokens whose batch elements may have been mixed")
    positionals = []
    for operand in operands:
        found = _positional(call, operand, tuple(labels), additive)
        if found is not None and BATCH not in labels and _is_content(found.tokens):
            return call.no("a table over tokens whose batch is folded into another axis")
        if found is not None:
            positionals.append(found)
    return Transfer(tuple(labels), positionals=tuple(positionals))


def _is_content(tokens: Tokens) -> bool:
    return any(s.role in ("image", "sequence") for s in tokens.segments)


def _batch_lost(call: Call, operands: Sequence[fx.Node], labels: Sequence[Label]) -> bool:
    """Whether an operand carries the result's tokens but no longer its batch."""
    at = next((d for d, label in enumerate(labels) if label == BATCH), None)
    dim = token_dim(tuple(labels))
    if at is None or dim is None or shape_of(call.node)[at] == 1:
        return False
    for operand in operands:
        layout, shift = call.layout(operand), len(labels) - len(shape_of(operand))
        if layout is None or dim < shift or layout[dim - shift] != labels[dim]:
            continue
        content = isinstance(labels[dim], Tokens) and _is_content(labels[dim])  # type: ignore[arg-type]
        own = layout[at - shift] if at >= shift else None
        if content and own != BATCH:
            return True
    return False


def _outranks(label: Label, other: Label) -> bool:
    """Token content outranks position ids: the result of q * cos(ids) is about q's tokens."""

    def rank(value: Label) -> int:
        if not isinstance(value, Tokens):
            return 0
        return 1 + max(s.role in ("image", "sequence") for s in value.segments)

    return rank(label) > rank(other) > 0


def _positional(call: Call, operand: fx.Node, labels: Layout, additive: bool) -> Positional | None:
    """How `operand` lines up with the token axis of `labels` without carrying it itself."""
    dim = token_dim(labels)
    if dim is None:
        return None
    tokens, shape = labels[dim], shape_of(operand)
    assert isinstance(tokens, Tokens)
    shift = len(labels) - len(shape)
    own = dim - shift
    if own < 0 or shape[own] == 1:
        return None
    layout = call.layout(operand)
    if layout is not None and layout[own] == tokens:
        return None
    at = next((d for d, label in enumerate(labels) if label == BATCH), None)
    batch = at - shift if at is not None and at >= shift else None
    lead = 0 if at is None else max(0, shift - at)
    return Positional(operand.name, own, tokens, batch, lead, additive)


# -- attention and linear maps --------------------------------------------------------------------


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Outcome:
    """Attention mixes tokens but returns the query's axis. [..., heads, tokens, width]."""
    query, key, value = call.node.args[:3]
    q, k, v = call.layout(query), call.layout(key), call.layout(value)
    mask, causal = call.arg(3, "attn_mask"), call.arg(5, "is_causal", False)
    for name, layout in (("query", q), ("key", k), ("value", v)):
        if layout is not None and isinstance(layout[-1], Tokens):
            return call.no(f"tokens lie along the width of the {name}")
    if k is not None and v is not None and k[-2] != v[-2]:
        return call.no("keys and values come from different tokens")
    for layout in (k, v):
        if q is not None and layout is not None and q[0] != layout[0] and tokens_of(layout):
            return call.no("queries and keys are batched differently")
    outer = token_dim(q)
    if outer is not None and outer < len(shape_of(query)) - 2:
        if k is None or k[outer] != q[outer]:  # type: ignore[index]
            return call.no("queries are batched over tokens, keys are not")
        return Transfer((*q[:-1], None)) if mask is None else call.no("mask on batched tokens")  # type: ignore[index]
    involved = [x[-2] for x in (q, k) if x is not None and isinstance(x[-2], Tokens)]
    if causal and involved:
        return call.no("causal attention depends on the order of the tokens")
    positionals: list[Positional] = []
    if mask is not None:
        for own, layout in ((-2, q), (-1, k)):
            label = layout[-2] if layout is not None else None
            shape = shape_of(mask)
            if isinstance(label, Tokens) and len(shape) >= -own and shape[own] != 1:
                batch = 0 if len(shape) == 4 else None
                lead = 4 - len(shape)
                positionals.append(Positional(mask.name, len(shape) + own, label, batch, lead))
    return Transfer((*q[:-1], None) if q is not None else None, positionals=tuple(positionals))


@rule("linear")
def linear(call: Call) -> Outcome:
    """A linear map over the last dimension treats every token alike."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    if isinstance(layout[-1], Tokens):
        return call.no("a linear map over the token axis")
    return Transfer((*layout[:-1], None))


@rule("matmul", "mm", "bmm")
def matmul(call: Call) -> Outcome:
    """x @ weight treats every token alike; any other product of token axes has no rule."""
    a, b = call.node.args[:2]
    left, right = call.layout(a), call.layout(b)
    if left is None and right is None:
        return NOTHING
    if tokens_of(right) is not None or left is None or isinstance(left[-1], Tokens):
        return call.no("a matrix product over token axes")
    if len(shape_of(b)) == 1:
        return Transfer(left[:-1])
    if len(shape_of(b)) > 2:
        return call.no("a batched matrix product across tokens")
    return Transfer((*left[:-1], None))


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose2d")
def convolution(call: Call) -> Outcome:
    """Convolutions work on a spatial grid; their output is where image grids come from."""
    if tokens_of(call.layout(call.node.args[0])) is not None:
        return call.no("a convolution over the token axis")
    return _spatial(call)


@rule(
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "_upsample_nearest_exact2d",
    "max_pool2d",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "pixel_shuffle",
    "pixel_unshuffle",
)
def spatial(call: Call) -> Outcome:
    """Resampling of a spatial grid yields a spatial grid."""
    if tokens_of(call.layout(call.node.args[0])) is not None:
        return call.no("spatial resampling of a token axis")
    return _spatial(call)


def _spatial(call: Call) -> Transfer:
    rank = len(shape_of(call.node))
    return Transfer((BATCH, None, HEIGHT, WIDTH)) if rank == 4 else NOTHING


# -- norms and reductions -------------------------------------------------------------------------


@rule("layer_norm", "rms_norm")
def norm(call: Call) -> Outcome:
    """Normalisation over the last dimensions keeps the token axis."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    count = len(call.node.args[1])  # type: ignore[arg-type]
    if any(isinstance(label, Tokens) for label in layout[len(layout) - count :]):
        return call.no("normalisation over the token axis")
    return Transfer(layout)


@rule("group_norm", "batch_norm", "instance_norm")
def spatial_norm(call: Call) -> Outcome:
    """Statistics over positions: fine on a spatial grid, mixing on tokens."""
    layout = call.layout(call.node.args[0])
    if tokens_of(layout) is not None:
        return call.no("normalisation statistics over the token axis")
    return Transfer(layout)


@rule("softmax", "_softmax", "log_softmax", "cumsum", "flip")
def along(call: Call) -> Outcome:
    """Ops along some dimensions that keep the shape."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    dims = call.arg(1, "dim")
    if not isinstance(dims, (list, tuple)):
        dims = [dims]
    return call.mixes("a reduction over", layout, dims) or Transfer(layout)


@rule("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm")
def reduction(call: Call) -> Outcome:
    """Reductions over other dimensions keep the token axis."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    at = 2 if call.op == "aten.linalg_vector_norm" else 1
    dims = call.arg(at, "dim")
    whole = range(len(layout))
    if isinstance(dims, int):
        dims = [dims]
    reduced = (
        set(whole)
        if not isinstance(dims, (list, tuple)) or not dims
        else {d % len(layout) for d in dims}
    )
    refused = call.mixes("a reduction over", layout, reduced)
    if refused:
        return refused
    if len(shape_of(call.node)) == len(layout):
        return Transfer(tuple(None if d in reduced else layout[d] for d in whole))
    return Transfer(tuple(layout[d] for d in whole if d not in reduced))


# -- ops that keep the shape ----------------------------------------------------------------------


@rule("contiguous", "clone", "detach", "alias", "to", "_to_copy", "type_as", "lift_fresh_copy")
def same(call: Call) -> Outcome:
    """Copies and casts."""
    return Transfer(call.fact(call.node.args[0]))


@rule("dropout", "feature_dropout", "native_dropout")
def dropout(call: Call) -> Outcome:
    """Dropout is the identity in evaluation mode."""
    if call.arg(2, "train") and _carries_tokens(call.fact(call.node.args[0])):
        return call.no("active dropout")
    return Transfer(call.fact(call.node.args[0]))


# -- shape ops ------------------------------------------------------------------------------------


def regroup(
    source: Sequence[int], target: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Finest independent groups of dimensions of a row-major reshape, as (in dims, out dims).

    [2, 256, 64] -> [2, 256, 4, 16] gives ((0,),(0,)), ((1,),(1,)), ((2,),(2,3)). Sizes of 1 pair up
    where both sides have one and stand alone otherwise.
    """
    groups: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    i = j = 0
    while i < len(source) or j < len(target):
        if i == len(source) or (j < len(target) and target[j] == 1 != source[i]):
            groups.append(((), (j,)))
            j += 1
            continue
        if j == len(target) or (source[i] == 1 != target[j]):
            groups.append(((i,), ()))
            i += 1
            continue
        a, b, left, right = i + 1, j + 1, source[i], target[j]
        while left != right:
            if left < right:
                left *= source[a]
                a += 1
            else:
                right *= target[b]
                b += 1
        groups.append((tuple(range(i, a)), tuple(range(j, b))))
        i, j = a, b
    return groups


def _reshaped(call: Call, layout: Layout, sizes_at: int | None) -> Outcome:
    """Layout after a row-major reshape; `sizes_at`: argument that holds the literal sizes."""
    source, target = shape_of(call.node.args[0]), shape_of(call.node)
    labels: list[Label] = [None] * len(target)
    patches = []
    sizes = call.node.args[sizes_at] if sizes_at is not None else None
    for ins, outs in regroup(source, target):
        inside = [layout[d] for d in ins]
        if len(outs) == 1 and len(inside) == 1:
            labels[outs[0]] = label = inside[0]
            literal = sizes[outs[0]] if isinstance(sizes, (list, tuple)) else -1
            if isinstance(label, Tokens) and literal != -1:
                assert sizes_at is not None
                patches.append(Patch((sizes_at, outs[0]), label.segments))
        elif inside == [HEIGHT, WIDTH] and len(outs) == 1:
            grid = (source[ins[0]], source[ins[1]])
            image = Segment(call.name, grid[0] * grid[1], grid, "image")
            labels[outs[0]] = Tokens((image,))
        elif any(isinstance(label, Tokens) for label in inside):
            if _is_grid_of(inside, [target[d] for d in outs]):
                return call.no("tokens are laid out as a spatial grid")
            return call.no("a reshape that folds the token axis with others")
    return Transfer(tuple(labels), tuple(patches))


def _is_grid_of(inside: list[Label], sizes: list[int]) -> bool:
    label = inside[0]
    if len(inside) != 1 or not isinstance(label, Tokens) or len(label.segments) != 1:
        return False
    return label.segments[0].grid == tuple(sizes)


@rule("view", "reshape", "_unsafe_view", "view_copy")
def view(call: Call) -> Outcome:
    """Reshapes: labels follow the groups of dimensions that stay together."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    return _reshaped(call, layout, 1)


@rule("flatten", "unflatten")
def flatten(call: Call) -> Outcome:
    """Reshapes that name dimensions instead of all sizes; their literals never hold a token axis."""
    layout = call.layout(call.node.args[0])
    return NOTHING if layout is None else _reshaped(call, layout, None)


@rule("expand")
def expand(call: Call) -> Outcome:
    """Broadcast to literal sizes."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    sizes: Any = call.node.args[1]
    source, shift = shape_of(call.node.args[0]), len(sizes) - len(layout)
    labels: list[Label] = [None] * shift + list(layout)
    patches = []
    for d, label in enumerate(layout):
        if isinstance(label, Tokens) and source[d] != 1 and sizes[d + shift] != -1:
            patches.append(Patch((1, d + shift), label.segments))
    return Transfer(tuple(labels), tuple(patches))


@rule("repeat")
def repeat(call: Call) -> Outcome:
    """Tiling of other dimensions."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    times: Any = call.node.args[1]
    labels: list[Label] = [None] * (len(times) - len(layout)) + list(layout)
    for d, label in enumerate(labels):
        if times[d] != 1 and (isinstance(label, Tokens) or label == BATCH):
            return call.no("repetition of the token axis or its batch")
    return Transfer(tuple(labels))


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Outcome:
    """Repetition of elements along another dimension."""
    layout, dim = call.layout(call.node.args[0]), call.arg(2, "dim")
    if layout is None:
        return NOTHING
    if dim is None:
        return call.no("repetition of the token axis")
    return call.mixes("repetition of", layout, [dim]) or Transfer(layout)


@rule("permute")
def permute(call: Call) -> Outcome:
    """Reordering of dimensions."""
    layout = call.layout(call.node.args[0])
    dims: Any = call.node.args[1]
    return NOTHING if layout is None else Transfer(tuple(layout[d] for d in dims))


@rule("transpose", "swapaxes", "t")
def transpose(call: Call) -> Outcome:
    """Swap of two dimensions."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    a, b = (0, 1) if call.op == "aten.t" else (call.node.args[1], call.node.args[2])
    labels = list(layout)
    if len(labels) > 1:
        labels[a], labels[b] = labels[b], labels[a]  # type: ignore[index]
    return Transfer(tuple(labels))


@rule("unsqueeze")
def unsqueeze(call: Call) -> Outcome:
    """A new dimension of size 1."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    labels = list(layout)
    labels.insert(call.node.args[1] % (len(layout) + 1), None)  # type: ignore[operator, arg-type]
    return Transfer(tuple(labels))


@rule("squeeze")
def squeeze(call: Call) -> Outcome:
    """Removal of dimensions of size 1."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    shape = shape_of(call.node.args[0])
    dims = call.arg(1, "dim", list(range(len(shape))))
    dims = [dims] if isinstance(dims, int) else dims
    gone = {d % len(shape) for d in dims if shape[d] == 1}
    if any(isinstance(layout[d], Tokens) for d in gone):
        return call.no("a token axis of one token is dropped")
    return Transfer(tuple(label for d, label in enumerate(layout) if d not in gone))


@rule("select")
def select(call: Call) -> Outcome:
    """One index of another dimension."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    dim = call.arg(1, "dim", 0) % len(layout)
    return call.mixes("selection of one index of", layout, [dim]) or Transfer(
        layout[:dim] + layout[dim + 1 :]
    )


@rule("unbind")
def unbind(call: Call) -> Outcome:
    """All indices of another dimension."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    dim = call.arg(1, "dim", 0) % len(layout)
    refused = call.mixes("unbinding of", layout, [dim])
    if refused:
        return refused
    return Transfer((layout[:dim] + layout[dim + 1 :],) * shape_of(call.node.args[0])[dim])


@rule("chunk", "split")
def chunk(call: Call) -> Outcome:
    """Equal pieces along another dimension."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    dim = call.arg(2, "dim", 0) % len(layout)
    refused = call.mixes("equal pieces of", layout, [dim])
    if refused:
        return refused
    pieces = len(call.node.meta["val"])
    return Transfer((_without_batch(layout, dim),) * pieces)


def _without_batch(layout: Layout, dim: int) -> Layout:
    """The layout after cutting `dim`, whose label no longer describes it whole."""
    return tuple(None if d == dim else label for d, label in enumerate(layout))


def _cut(tokens: Tokens, start: int, end: int) -> tuple[Segment, ...] | None:
    """Segments of [start, end), cutting through text but never through an image."""
    kept, at = [], 0
    for segment in tokens.segments:
        low, high = max(start, at), min(end, at + segment.length)
        if low < high:
            if high - low == segment.length:
                kept.append(segment)
            elif segment.grid is not None or segment.role == "image":
                return None
            else:
                name = f"{segment.name}[{low - at}:{high - at}]"
                kept.append(Segment(name, high - low, None, segment.role))
        at += segment.length
    return tuple(kept)


def _before(tokens: Tokens, position: int) -> tuple[Segment, ...]:
    """Segments left of `position`, the last one shortened to end there."""
    return _cut(tokens, 0, position) or ()


@rule("split_with_sizes")
def split_with_sizes(call: Call) -> Outcome:
    """Pieces of literal sizes: along the token axis this separates text from image."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    sizes: Any = call.node.args[1]
    dim = call.arg(2, "dim", 0) % len(layout)
    tokens = layout[dim]
    if not isinstance(tokens, Tokens):
        refused = call.mixes("pieces of", layout, [dim])
        return refused or Transfer((_without_batch(layout, dim),) * len(sizes))
    facts: list[Layout] = []
    patches, at = [], 0
    for i, size in enumerate(sizes):
        piece = _cut(tokens, at, at + size)
        if piece is None:
            return call.no("an image is cut in two")
        facts.append((*layout[:dim], Tokens(piece), *layout[dim + 1 :]))
        patches.append(Patch((1, i), piece))
        at += size
    return Transfer(tuple(facts), tuple(patches))


@rule("slice", "narrow")
def slice_(call: Call) -> Outcome:
    """A range of one dimension."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    dim = call.arg(1, "dim", 0) % len(layout)
    tokens = layout[dim]
    size = shape_of(call.node.args[0])[dim]
    start, end = call.arg(2, "start") or 0, call.arg(3, "end")
    if call.op == "aten.narrow":
        end = start + call.arg(3, "length")
    start = start + size if start < 0 else min(start, size)
    end = size if end is None else (end + size if end < 0 else min(end, size))
    if not isinstance(tokens, Tokens):
        if end - start == size and call.arg(4, "step", 1) == 1:
            return Transfer(layout)
        return call.mixes("a range of", layout, [dim]) or Transfer(_without_batch(layout, dim))
    if call.arg(4, "step", 1) != 1 or call.op == "aten.narrow":
        return call.no("a strided or narrowed token axis")
    piece = _cut(tokens, start, end)
    if piece is None:
        return call.no("an image is cut in two")
    patches = [Patch((2,), _before(tokens, start))] if start else []
    if end < size:
        patches.append(Patch((3,), _before(tokens, end)))
    return Transfer((*layout[:dim], Tokens(piece), *layout[dim + 1 :]), tuple(patches))


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Outcome:
    """Concatenation joins segments along the token axis, and features along another."""
    operands: Any = call.node.args[0]
    layouts = [call.layout(x) for x in operands]
    rank = len(shape_of(call.node))
    dim = call.arg(1, "dim", 0) % rank
    if all(layout is None for layout in layouts):
        return NOTHING
    known = [x for x in layouts if x is not None]
    if any(isinstance(x[dim], Tokens) for x in known):
        return _join(call, operands, layouts, dim)
    if any(x[dim] == BATCH and tokens_of(x) is not None for x in known):
        return call.no("batches of tokens are joined")
    return broadcast(call, operands) if not _spatial_only(layouts) else _cat_features(layouts, dim)


def _spatial_only(layouts: list[Layout | None]) -> bool:
    return not any(tokens_of(x) is not None for x in layouts)


def _cat_features(layouts: list[Layout | None], dim: int) -> Outcome:
    known = next(x for x in layouts if x is not None)
    return Transfer(_without_batch(known, dim))


def _join(call: Call, operands: Any, layouts: list[Layout | None], dim: int) -> Outcome:
    segments: list[Segment] = []
    labels: list[Label] = [None] * len(shape_of(call.node))
    for operand, layout in zip(operands, layouts, strict=True):
        label = layout[dim] if layout is not None else None
        if isinstance(label, Tokens):
            segments.extend(label.segments)
        else:
            segments.append(Segment(operand.name, shape_of(operand)[dim]))
        for d, other in enumerate(layout or ()):
            labels[d] = other if labels[d] is None else labels[d]
    if len({s.name for s in segments}) < len(segments):
        return call.no("the same tokens occur twice in one sequence")
    labels[dim] = Tokens(tuple(segments))
    for operand, layout in zip(operands, layouts, strict=True):
        held = layout is not None and isinstance(layout[dim], Tokens)
        if held and BATCH in labels and layout[labels.index(BATCH)] != BATCH:  # type: ignore[index]
            return call.no(f"the batch elements of {operand.name} may have been mixed")
    return Transfer(tuple(labels))


@rule("stack")
def stack(call: Call) -> Outcome:
    """Stacking along a new dimension."""
    operands: Any = call.node.args[0]
    layouts = [call.layout(x) for x in operands]
    known = next((x for x in layouts if x is not None), None)
    if known is None:
        return NOTHING
    if any(x != known for x in layouts):
        return call.no("values with different axes are stacked")
    labels = list(known)
    labels.insert(call.arg(1, "dim", 0) % (len(known) + 1), None)
    return Transfer(tuple(labels))


@rule("constant_pad_nd", "pad")
def pad(call: Call) -> Outcome:
    """Padding of other dimensions (pairs count from the last)."""
    layout = call.layout(call.node.args[0])
    if layout is None:
        return NOTHING
    widths: Any = call.node.args[1]
    for i in range(len(widths) // 2):
        label = layout[-1 - i]
        if (widths[2 * i] or widths[2 * i + 1]) and (isinstance(label, Tokens) or label == BATCH):
            return call.no("padding of the token axis or its batch")
    return Transfer(layout)


@rule("outer")
def outer(call: Call) -> Outcome:
    """Outer product of two vectors."""
    a, b = (call.layout(x) for x in call.node.args[:2])
    if a is None and b is None:
        return NOTHING
    return Transfer(((a or (None,))[0], (b or (None,))[0]))


@rule("view_as_complex")
def view_as_complex(call: Call) -> Outcome:
    """Pairs along the last dimension become one complex number."""
    layout = call.layout(call.node.args[0])
    return NOTHING if layout is None else Transfer(layout[:-1])


@rule("view_as_real")
def view_as_real(call: Call) -> Outcome:
    """One complex number becomes a pair along a new last dimension."""
    layout = call.layout(call.node.args[0])
    return NOTHING if layout is None else Transfer((*layout, None))

"""The graph as plain data: names, edges, shapes, facts. Input of streams and plans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from toma_fx.analysis.factors import HEIGHT, Axis, Segment
from toma_fx.analysis.facts import Kind, Rejected
from toma_fx.analysis.labels import (
    Fact,
    Label,
    Layout,
    layout_of,
    layouts_of,
    names_axis,
    sort_axes,
)
from toma_fx.graph.nodes import (
    PRODUCTS,
    READERS,
    SCALES,
    SOFTMAX,
    UNKNOWN,
)


@dataclass(frozen=True)
class Flow:
    """A captured graph and its facts, without graph objects.

    Attributes:
        order: node names in graph order. operands: inputs of each. ops: op name of each.
        shapes: static shape of each tensor. modules: module path of each. lines: of Python.
        facts, refusals: from the analysis. aliases: {node: source} for nodes that return the
            image tokens of their source unchanged; scaled: for those that scale them.
            pointwise: element-wise ops. sums: plain a + b.
        attention: fused attention, the softmax of one that is written out, and the sums over
            tokens of linear attention. sums_of_tokens: products and sums over them.
        needs_all_tokens: refusals of nodes that must see all tokens.
    """

    order: tuple[str, ...]
    operands: Mapping[str, tuple[str, ...]]
    ops: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    modules: Mapping[str, str]
    lines: Mapping[str, str]
    facts: Mapping[str, Fact]
    refusals: Mapping[str, Rejected]
    aliases: Mapping[str, str]
    scaled: Mapping[str, str]
    pointwise: frozenset[str]
    sums: frozenset[str]
    attention: frozenset[str]
    sums_of_tokens: frozenset[str]
    linears: frozenset[str]
    needs_all_tokens: Mapping[str, Rejected]

    @cached_property
    def users(self) -> Mapping[str, tuple[str, ...]]:
        """Nodes that use each node, in graph order."""
        out: dict[str, list[str]] = {name: [] for name in self.order}
        for name in self.order:
            for operand in dict.fromkeys(self.operands[name]):
                out[operand].append(name)
        return {name: tuple(users) for name, users in out.items()}

    @cached_property
    def position(self) -> Mapping[str, int]:
        """Index of each node in graph order."""
        return {name: i for i, name in enumerate(self.order)}

    def in_order(self, names: Iterable[str]) -> tuple[str, ...]:
        """Nodes in graph order."""
        return tuple(sorted(names, key=self.position.__getitem__))

    def reject(self, name: str, reason: str, kind: Kind) -> Rejected:
        """Refusal that blames a node, but no operator."""
        return Rejected(name, reason, kind, "", "", self.modules[name], self.lines[name])

    def layout(self, name: str) -> Layout | None:
        """Layout of a tensor-valued node."""
        return layout_of(self.facts.get(name))

    def carries(self, name: str, segment: str) -> bool:
        """Whether the node's value (or one of its values) holds the tokens of `segment`."""
        return any(s.name == segment for s in self.segments(name))

    @cached_property
    def _segments_by_node(self) -> Mapping[str, tuple[Segment, ...]]:
        """Token segments of every node that has any."""
        out = {}
        for name, fact in self.facts.items():
            labels = (x for layout in layouts_of(fact) for x in layout or ())
            tokens = (label.positions for label in labels if label.positions)
            if segments := tuple(dict.fromkeys(s for label in tokens for s in label.segments)):
                out[name] = segments
        return out

    @cached_property
    def _carriers_by_segment(self) -> Mapping[str, tuple[str, ...]]:
        """Nodes that hold each segment, in graph order."""
        out: dict[str, list[str]] = {}
        for name in self.order:
            for segment in self.segments(name):
                out.setdefault(segment.name, []).append(name)
        return {segment: tuple(names) for segment, names in out.items()}

    def segments(self, name: str) -> tuple[Segment, ...]:
        """Token segments of the node's value or values, on whatever dimension."""
        return self._segments_by_node.get(name, ())

    def is_embedding(self, name: str) -> bool:
        """Whether the value is laid out [batch, tokens, channels], with a known token count.

        So is one with the tokens before the batch.
        """
        return is_embedding(self.layout(name))

    def leads_with_tokens(self, name: str) -> bool:
        """Whether the value is laid out [tokens, batch, channels]."""
        return leads_with_tokens(self.layout(name))

    def row_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value, with the batch before the tokens."""
        first, *rest = self.shapes[name]
        return (rest[0], first, *rest[1:]) if self.leads_with_tokens(name) else (first, *rest)

    def is_batch_of_tokens(self, name: str) -> bool:
        """Whether the batch comes first and just one dimension after it enumerates known tokens."""
        first, *rest = self.layout(name) or (Label(),)
        plain = [x for x in rest if x.positions]
        alone = [x.tokens is not None and len(x.factors) == 1 and x.size < UNKNOWN for x in plain]
        return is_batch(first) and alone == [True] and not any(x.axes for x in rest)

    def is_spatial(self, name: str) -> bool:
        """Whether the value holds an image, as tokens or laid out in height and width."""
        layouts = layouts_of(self.facts.get(name))
        return any(names_axis(x, HEIGHT) for x in layouts) or any(
            s.grid for s in self.segments(name)
        )

    def carriers(self, segment: str) -> tuple[str, ...]:
        """Nodes that hold the tokens of `segment`, in graph order."""
        return self._carriers_by_segment.get(segment, ())

    def attention_products(self, softmax: str) -> list[str]:
        """The products with the values that follow the softmax of attention."""
        front, products = [softmax], []
        while front:
            users = [u for f in front for u in self.users[f]]
            products += [u for u in users if self.ops[u] in PRODUCTS]
            front = [u for u in users if self.ops[u] in SCALES]
        return products if self.ops[softmax] in SOFTMAX else []

    def root(self, name: str) -> str:
        """The node whose image tokens `name` returns unchanged."""
        while name in self.aliases:
            name = self.aliases[name]
        return name

    def region(self, segment: str, start: str, end: str) -> tuple[str, ...]:
        """Carriers of `segment` after `start` and up to `end`: those on a path between the two.

        Sums over its tokens, and what is made of them, are on such a path too: in linear attention
        queries meet a product of keys and values.
        """
        first, last = self.position[start], self.position[end]
        after, sums = {start}, set[str]()
        for name in self.order[first + 1 : last + 1]:
            operands = self.operands[name]
            carrying = self.carries(name, segment)
            summing = name in self.sums_of_tokens or not sums.isdisjoint(operands)
            if (carrying or summing) and not after.isdisjoint(operands):
                after.add(name)
                sums.update(() if carrying else (name,))
        before = {end}
        for name in reversed(self.order[first + 1 : last + 1]):
            if name in before:
                before.update(o for o in self.operands[name] if o in after)
        return tuple(n for n in self.order[first + 1 : last + 1] if n in after and n in before)

    def find_exclusive_inputs(
        self, segment: str, ends: Iterable[str], reader: str, within: Iterable[str]
    ) -> tuple[str, ...]:
        """Carriers among `within` that lead to `ends`, and through them to `reader` alone.

        A node that others use too is left out, and so are the nodes before it.
        """
        allowed, front = set(within), list(ends)
        inputs: set[str] = set()
        while front:
            name = front.pop()
            if name in allowed and name not in inputs and self.carries(name, segment):
                inputs.add(name)
                front.extend(self.operands[name])
        while True:
            shared = {
                n
                for n in inputs
                if any(u not in inputs and u != reader for u in self.users[n])
                or (self.ops[n] == "getitem" and self.operands[n][0] not in inputs)
            }
            if not shared:
                return self.in_order(inputs)
            inputs -= shared

    def include_readers(self, segment: str, inner: tuple[str, ...], end: str) -> tuple[str, ...]:
        """The region and what reads its tokens and ends in another's attention, as keys do.

        Merged tokens leave a region through its exit alone. Keys of another stream's attention are
        an exception: it averages over them, so they need not be unmerged. In a model of sound and
        video, `norm`, `k` and `v` join the region of the video x:

            x -> norm -> k, v -> attention(q of sound, k, v) -> sound

        They don't if they also read tokens of the segment from behind the region, not merged there.
        """
        inside = set(inner)
        front = [n for n in inner if n != end]
        side: set[str] = set()
        while front:
            users = {u for f in front for u in self.users[f] if self.carries(u, segment)}
            front = [u for u in users if u not in inside and u not in side]
            side.update(front)
        if any(self.ops[u] == "output" for n in side for u in self.users[n]):
            return inner
        others = {o for n in side for o in self.operands[n]} - (inside - {end}) - side
        later = (o for o in others if self.position[o] > self.position[inner[0]])
        if any(self.carries(o, segment) for o in later):
            return inner
        return self.in_order(inside | side)

    def entries(self, segment: str, inner: Iterable[str]) -> tuple[str, ...]:
        """Values with the tokens of `segment` that flow into `inner` from outside, in order."""
        inside = set(inner)
        outside = {o for n in inside for o in self.operands[n]} - inside
        return self.in_order(o for o in outside if self.carries(o, segment))

    def find_leak(self, segment: str, inner: Iterable[str], end: str) -> Rejected | None:
        """A use of the region's values that merging would break, if there is one."""
        inside = dict.fromkeys(inner)
        for name in inside:
            if name in self.needs_all_tokens:
                return self.needs_all_tokens[name]
            for user in self.users[name] if name != end else ():
                if user in self.refusals:
                    return self.refusals[user]
                if user in self.needs_all_tokens:
                    return self.needs_all_tokens[user]
                if user not in inside and (
                    self.carries(user, segment) or self.ops[user] not in READERS
                ):
                    ended = self._find_end(user, segment)
                    where = f"; {ended}" if ended else " outside the branch"
                    return self.reject(user, f"uses {name}{where}", "use")
                if self.ops[user] == "output":
                    return self.reject(name, "is an output of the model", "use")
        return None

    def _find_end(self, name: str, segment: str) -> Rejected | None:
        """The refusal that ends the tokens of `segment` on every way from a node, if there is one.

        What is refused there has no tokens, so that the node seems to lie outside the branch.
        """
        front, seen, found = [name], {name}, None
        while front:
            users = {u for f in front for u in self.users[f]} - seen
            found = found or next((self.refusals[u] for u in users if u in self.refusals), None)
            seen |= users
            front = [u for u in users if self.carries(u, segment)]
        return found if not any(self.ops[n] == "output" for n in seen) else None


def is_batch(label: Label) -> bool:
    """Whether a dimension enumerates the rows of tokens in their order, and nothing else."""
    whole = all(isinstance(f, Axis) and f.is_whole for f in label.factors)
    return whole and label.factors == sort_axes(label.axes)


def leads_with_tokens(layout: Layout | None) -> bool:
    """Whether a value is laid out [tokens, batch, channels]."""
    return layout is not None and len(layout) == 3 and layout[0].tokens is not None


def is_embedding(layout: Layout | None, *, image: bool = False) -> bool:
    """Whether a value is laid out [batch, tokens, channels], with a known number of tokens.

    So is one with the tokens before the batch.

    Args:
        image: whether an image must be among the tokens.
    """
    if layout is None or len(layout) != 3:
        return False
    batch, sequence = layout[:2] if not leads_with_tokens(layout) else layout[1::-1]
    if not is_batch(batch) or not layout[2].is_plain:
        return False
    tokens = sequence.tokens
    if tokens is None or tokens.fixed or len(sequence.factors) > 1 or tokens.length >= UNKNOWN:
        return False
    return not image or bool(tokens.names)

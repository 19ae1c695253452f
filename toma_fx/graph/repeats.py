"""Stretches of a graph that compute the same on other values: the blocks of a stack.

They are found in the order of the nodes, which is that of the code that was traced. A stretch is a
run of calls; two are alike if they hold the same operators with the same literals and shapes, wired
alike. Parameters, kept tensors and values of other stretches are what they are called with.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from toma_fx.compat.pytorch import aliased_argument
from toma_fx.graph.flops import node_flops

LEAST = 12
"""Calls that a stretch has at least."""
PRODUCTS = 2
"""Products and convolutions that it has at least: others compile fast, and fuse with users."""
DISTANCES = 64
"""Distances between equal calls that are tried, the most frequent ones."""


@dataclass(frozen=True)
class Repeat:
    """Stretches that compute the same.

    Attributes:
        stretches: nodes of each, in graph order. outputs: indices of the nodes that are read
            outside of some stretch; none is a view.
    """

    stretches: tuple[tuple[fx.Node, ...], ...]
    outputs: tuple[int, ...]


def find_repeats(graph: fx.Graph) -> list[Repeat]:
    """Stretches that occur more than once, those that save the most nodes first."""
    return list(_Search(graph).repeats())


def base_of(node: fx.Node) -> fx.Node:
    """The node whose memory a view reads; a node that is no view itself."""
    while node.op == "call_function":
        source: Any = node.args[0] if node.target is operator.getitem else node
        viewed = aliased_argument(source)
        if viewed is None:
            return node
        node = viewed
    return node


def operands_of(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """What a stretch reads from outside, in the order in which it first does."""
    inside = set(nodes)
    read = (x for node in nodes for x in node.all_input_nodes)
    return list(dict.fromkeys(x for x in read if x not in inside))


class _Search:
    """The calls of a graph as a sequence of numbers, equal for calls that may be alike."""

    def __init__(self, graph: fx.Graph) -> None:
        self.calls = [n for n in graph.nodes if n.op == "call_function"]
        numbers: dict[Hashable, int] = {}
        self.numbers = np.array(
            [numbers.setdefault(_key_of(n), len(numbers)) for n in self.calls], dtype=np.int64
        )
        self.taken = np.zeros(len(self.calls), dtype=bool)
        self.places: dict[int, list[int]] = defaultdict(list)
        for place, number in enumerate(self.numbers.tolist()):
            self.places[number].append(place)

    def repeats(self) -> Iterator[Repeat]:
        distances = self._distances()
        while (found := self._best(distances)) is not None:
            start, length = found
            stretches = self._occurrences(start, length)
            products = sum(node_flops(n) > 0 for n in self.calls[start : start + length])
            if len(stretches) < 2 or products < PRODUCTS:
                self.taken[start : start + length] = True
                continue
            for place in stretches:
                self.taken[place : place + length] = True
            nodes = tuple(tuple(self.calls[p : p + length]) for p in stretches)
            yield Repeat(nodes, _outputs_of(nodes))

    def _distances(self) -> list[int]:
        counts: Counter[int] = Counter()
        for places in self.places.values():
            for skip in (1, 2):
                counts.update(b - a for a, b in zip(places, places[skip:], strict=False))
        return [d for d, _ in counts.most_common(DISTANCES) if d >= LEAST]

    def _best(self, distances: Sequence[int]) -> tuple[int, int] | None:
        """(start, length) of the stretch that saves the most nodes; repeated end to end or not."""
        best, chosen = 0, None
        for distance in distances:
            free = ~self.taken[:-distance] & ~self.taken[distance:]
            equal = (self.numbers[:-distance] == self.numbers[distance:]) & free
            edges = np.diff(np.concatenate([[0], equal.astype(np.int8), [0]]))
            starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
            if not len(starts):
                continue
            run = int(np.argmax(ends - starts))
            start, end = int(starts[run]), int(ends[run])
            length = min(end - start, distance)
            saved = (len(self._matches(start, length)) - 1) * length if length >= LEAST else 0
            if saved > best:
                best, chosen = saved, (start, end, distance)
        return None if chosen is None else self._cut(*chosen)

    def _cut(self, start: int, end: int, distance: int) -> tuple[int, int]:
        """Where a stretch begins and how long it is, so that few values cross its borders."""
        if end - start >= distance:  # end to end: any turn of it repeats
            turns = range(start, min(start + distance, end + 1))
            return min(turns, key=lambda at: self._crossing(at, distance)), distance
        spare = min((end - start) // 4, end - start - LEAST)
        firsts = range(start, start + spare + 1)
        first = min(firsts, key=lambda at: (self._crossing(at, end - at), at))
        ends = range(end - (spare - (first - start)), end + 1)
        last = min(ends, key=lambda at: (self._crossing(first, at - first), -at))
        return first, last - first

    def _crossing(self, start: int, length: int) -> int:
        """How many computed values go in or out."""
        nodes = self.calls[start : start + length]
        entering = {base_of(x) for x in operands_of(nodes) if x.op == "call_function"}
        return len(entering) + len(_outputs_of([nodes]))

    def _matches(self, start: int, length: int) -> list[int]:
        """Where the same calls lie, whatever they read."""
        pattern, found = self.numbers[start : start + length], list[int]()
        rarest = min(range(length), key=lambda i: len(self.places[int(pattern[i])]))
        for place in (p - rarest for p in self.places[int(pattern[rarest])]):
            stop = place + length
            if place < (found[-1] + length if found else 0) or self.taken[place:stop].any():
                continue
            if np.array_equal(self.numbers[place:stop], pattern):
                found.append(place)
        return found

    def _occurrences(self, start: int, length: int) -> list[int]:
        """Where calls lie that are wired as those of this stretch are."""
        wiring: dict[Hashable, list[int]] = defaultdict(list)
        for place in self._matches(start, length):
            wiring[_wiring_of(self.calls[place : place + length])].append(place)
        return max(wiring.values(), key=len, default=[])


def _key_of(node: fx.Node) -> Hashable:
    """Equal for calls that may be alike: operator, literals, and what it returns."""
    value = node.meta.get("val")
    if not _is_static(value):
        return node  # alike to none
    return node.target, _literals(node.args), _literals(node.kwargs), _describe(value)


def _literals(value: Any) -> Hashable:
    if isinstance(value, fx.Node):
        return None
    if isinstance(value, (list, tuple)):
        return tuple(map(_literals, value))
    if isinstance(value, dict):
        return tuple((name, _literals(x)) for name, x in sorted(value.items()))
    return type(value).__name__, repr(value)


def _is_static(value: Any) -> bool:
    """Whether a value is tensors of known sizes."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_static, value))
    return isinstance(value, torch.Tensor) and all(
        isinstance(n, int) for n in (*value.shape, *value.stride())
    )


def _describe(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    return tuple(map(_describe, value)) if isinstance(value, (list, tuple)) else repr(value)


def _wiring_of(nodes: Sequence[fx.Node]) -> Hashable:
    """Equal for stretches whose calls read alike: their own, or the same operand."""
    operands = operands_of(nodes)
    places = {node: i for i, node in enumerate((*nodes, *operands))}
    reads: list[int] = []
    for node in nodes:
        fx.map_arg((node.args, node.kwargs), lambda x: reads.append(places[x]))
    return tuple(reads), tuple(_describe(operand_value(x)) for x in operands)


def operand_value(node: fx.Node) -> Any:
    """The value of an operand: a fake tensor, or the parameter itself."""
    if "val" in node.meta or node.op != "get_attr":
        return node.meta.get("val")
    return operator.attrgetter(str(node.target))(node.graph.owning_module)


def _outputs_of(stretches: Sequence[Sequence[fx.Node]]) -> tuple[int, ...]:
    """Indices of nodes that are read outside; of views, those of the memory that they read."""
    found = set()
    for nodes in stretches:
        places = {node: i for i, node in enumerate(nodes)}
        read = (n for n in nodes if any(user not in places for user in n.users))
        found |= {places[base] for base in map(base_of, read) if base in places}
    return tuple(sorted(found))

"""The canonical form of a captured graph: flat, functional, and free of what hides data flow.

In-place writes become functional before the passes run. What the passes change gives bit-equal
results, and no pass but `DropUnusedAddend` changes a value that another node sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from toma_fx.capture.pieces import FoldSlices, JoinPieces
from toma_fx.capture.reshapes import SplitReshapes
from toma_fx.compat.pytorch import make_graph_module, writes_in_place
from toma_fx.graph.nodes import DROPOUTS, RESHAPES, argument, is_inactive_dropout, op_name
from toma_fx.graph.passes import EraseDead, Pass, run_passes
from toma_fx.graph.rewriter import Rewriter
from toma_fx.graph.specs import CAPTURED

aten = torch.ops.aten


def flat_graph(program: ExportedProgram, name: str) -> fx.GraphModule:
    """The program as a canonical graph module: flat inputs -> flat tuple of outputs.

    Raises:
        RewriteError, VerifyError: a pass failed, or something is left that a captured graph must
            not hold.
    """
    exported: Any = functional(program).module(check_guards=False)
    graph_module = make_graph_module(exported, exported.graph, name)
    run_passes(Rewriter(graph_module), PASSES, "capture", after=CAPTURED)
    return graph_module


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program without writes in place: those through views would pass unseen by data flow."""
    written = any(writes_in_place(n.target) for n in program.graph.nodes)
    return program.run_decompositions({}) if written else program


@dataclass(frozen=True)
class FlattenSignature:
    """forward(sample, added={"ids": ids}) -> Output(sample)  becomes  (sample, ids) -> (sample,)"""

    name: ClassVar[str] = "flatten_signature"

    def apply(self, rewriter: Rewriter) -> None:
        """Flatten what the graph takes and returns."""
        rewriter.flatten_signature()


@dataclass(frozen=True)
class InlineAutocast:
    """A region with autocast off becomes its ops: the graph runs without autocast anyway.

    So does a region for a device that none of its operands is on. One that holds a region with
    autocast on stays, and so does that.
    """

    name: ClassVar[str] = "inline_autocast"

    def apply(self, rewriter: Rewriter) -> None:
        """Inline from the inside out."""
        for node in rewriter.calls("wrap_with_autocast"):
            arguments: Any = node.args
            device, _, enabled, _, body, *operands = arguments
            values = [n.meta["val"] for n in operands if isinstance(n, fx.Node)]
            if enabled and device in {v.device.type for v in values if isinstance(v, Tensor)}:
                continue
            module: Any = rewriter.graph_module.get_submodule(body.target)
            inside = Rewriter(module)
            self.apply(inside)
            inside.erase_dead()
            if not module.graph.find_nodes(op="get_attr"):
                rewriter.inline(node, module.graph, operands)


@dataclass(frozen=True)
class EraseAssertions:
    """_assert_tensor_metadata(x, size, ...) goes: it would pin token counts."""

    name: ClassVar[str] = "erase_assertions"

    def apply(self, rewriter: Rewriter) -> None:
        """Erase them."""
        for node in rewriter.calls("aten._assert_tensor_metadata"):
            rewriter.erase(node)


@dataclass(frozen=True)
class EraseDropout:
    """dropout(x, p, train=False)  becomes  x"""

    name: ClassVar[str] = "erase_dropout"

    def apply(self, rewriter: Rewriter) -> None:
        """Erase inactive dropout; `native_dropout` also returns a mask, which may be in use."""
        for node in rewriter.calls(*DROPOUTS):
            x: Any = node.args[0]
            if not is_inactive_dropout(node):
                continue
            if op_name(node.target) != "aten.native_dropout":
                rewriter.replace(node, x)
                continue
            for user in [u for u in node.users if u.args[1] == 0]:
                rewriter.replace(user, x)


@dataclass(frozen=True)
class SkipCopies:
    """copy(x, y)  becomes  y, where both have the same shape, dtype and device."""

    name: ClassVar[str] = "skip_copies"

    def apply(self, rewriter: Rewriter) -> None:
        """Skip them; a copy that broadcasts or casts stays."""
        for node in rewriter.calls("aten.copy"):
            source: Any = node.args[1]
            old, new = node.meta["val"], source.meta["val"]
            if (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device):
                rewriter.replace(node, source)


@dataclass(frozen=True)
class NameDtypes:
    """type_as(x, y)  becomes  to(x, dtype of y): it reads nothing else of y."""

    name: ClassVar[str] = "name_dtypes"

    def apply(self, rewriter: Rewriter) -> None:
        """Replace them."""
        for node in rewriter.calls("aten.type_as"):
            with rewriter.before(node):
                cast = rewriter.insert(aten.to.dtype, node.args[0], node.meta["val"].dtype)
            rewriter.replace(node, cast)


@dataclass(frozen=True)
class JoinPadding:
    """pad(x, (0, n))  becomes  cat([x, full(..., 0)]), where the data says n.

    The analysis follows joins. Padding of a fixed width stays, and so does padding in front, of
    several dimensions, or with another value.
    """

    name: ClassVar[str] = "join_padding"

    def apply(self, rewriter: Rewriter) -> None:
        """Replace padding whose one width is a node."""
        for node in rewriter.calls("aten.pad", "aten.constant_pad_nd"):
            arguments: Any = node.args
            x, widths, *rest = arguments
            by_data = [i for i, width in enumerate(widths) if isinstance(width, fx.Node)]
            others = any(width for i, width in enumerate(widths) if i not in by_data)
            if len(by_data) != 1 or by_data[0] % 2 == 0 or others or rest not in ([], ["constant"]):
                continue
            value = x.meta["val"]
            like = {"dtype": value.dtype, "device": value.device}
            sizes = list(value.shape)
            dim = value.dim() - 1 - by_data[0] // 2
            sizes[dim] = widths[by_data[0]]
            with rewriter.before(node):
                zeros = rewriter.insert(aten.full.default, sizes, 0.0, **like)
                joined = rewriter.insert(aten.cat.default, [x, zeros], dim)
            rewriter.replace(node, joined)


_Parts = list[tuple[fx.Node, int]]
"""What a value consists of along a dimension: (node, length) end to end."""


@dataclass(frozen=True)
class JoinWrites:
    """slice_scatter(x, y, dim, a, b)  becomes  cat([x[:a], y, x[b:]], dim)

    A second write into the result cuts these parts, not the result:

        slice_scatter(slice_scatter(x, y, 1, 0, 4), z, 1, 4, 8)  becomes  cat([y, z], 1) if x has 8

    Writes with a step, or at a place that the data says, stay.
    """

    name: ClassVar[str] = "join_writes"

    def apply(self, rewriter: Rewriter) -> None:
        """Replace writes in graph order, so that the parts of what is written into are known."""
        parts: dict[tuple[fx.Node, int], _Parts] = {}
        for node in rewriter.calls("aten.slice_scatter"):
            base, written, dim, start, end, step = _scattered(node)
            size = base.meta["val"].shape[dim]
            end = size if end is None else end
            if step != 1 or not 0 <= start < end:
                continue
            end = min(end, size)
            known = parts.get((base, dim), [(base, size)])
            with rewriter.before(node):
                found = self._between(rewriter, known, dim, 0, start)
                found += [(written, end - start)]
                found += self._between(rewriter, known, dim, end, size)
                joined = written
                if len(found) > 1:
                    joined = rewriter.insert(aten.cat.default, [n for n, _ in found], dim)
            parts[joined, dim] = found
            rewriter.replace(node, joined)

    def _between(self, rewriter: Rewriter, parts: _Parts, dim: int, start: int, end: int) -> _Parts:
        """The parts of [start, end); one that is cut becomes a slice."""
        found, at = [], 0
        for node, length in parts:
            low, high = max(start, at), min(end, at + length)
            if high - low == length:
                found.append((node, length))
            elif low < high:
                cut = rewriter.insert(aten.slice.Tensor, node, dim, low - at, high - at)
                found.append((cut, high - low))
            at += length
        return found


def _scattered(node: fx.Node) -> tuple[Any, ...]:
    """Base, written value, dimension, start, end and step of a `slice_scatter`."""
    base: Any = node.args[0]
    dim = argument(node, 2, "dim", 0) % base.meta["val"].dim()
    start, end = argument(node, 3, "start"), argument(node, 4, "end")
    return base, node.args[1], dim, start or 0, end, argument(node, 5, "step", 1)


@dataclass(frozen=True)
class DropUnusedAddend:
    """baddbmm(x, a, b, beta=0)  becomes  baddbmm(empty([1, 1, 1]), a, b, beta=0)

    x is ignored, but has the size of the scores, and so would hold a token count.
    """

    name: ClassVar[str] = "drop_unused_addend"

    def apply(self, rewriter: Rewriter) -> None:
        """Replace the operand; with another beta it counts."""
        for node in rewriter.calls("aten.baddbmm"):
            if node.kwargs.get("beta") != 0:
                continue
            old: Any = node.args[0]
            value = old.meta["val"]
            like = {"dtype": value.dtype, "device": value.device}
            with rewriter.before(node):
                scalar = rewriter.insert(aten.empty.memory_format, [1, 1, 1], **like)
            rewriter.set_argument(node, 0, scalar)


@dataclass(frozen=True)
class ShareShapeOps:
    """Equal shape and cast ops on one value become one node (40 rotary casts in Flux, say)."""

    name: ClassVar[str] = "share_shape_ops"
    ops: ClassVar[tuple[str, ...]] = (
        "aten.unsqueeze", "aten.to", "aten.view", "aten.reshape", "aten.permute", "aten.transpose",
        "aten.slice", "aten.expand",
    )  # fmt: skip

    def apply(self, rewriter: Rewriter) -> None:
        """Replace each by the first of its equals."""
        seen: dict[str, fx.Node] = {}
        for node in rewriter.calls(*self.ops):
            key = repr((node.target, self._arguments(node), sorted(node.kwargs.items())))
            first = seen.setdefault(key, node)
            if first is not node:
                rewriter.replace(node, first)

    def _arguments(self, node: fx.Node) -> Any:
        """The arguments, with the sizes of a reshape written out (no -1)."""
        if op_name(node.target) in RESHAPES and isinstance(node.args[1], (list, tuple)):
            return node.args[0], tuple(node.meta["val"].shape)
        return node.args


PASSES: tuple[Pass, ...] = (
    FlattenSignature(),
    InlineAutocast(),
    EraseAssertions(),
    EraseDropout(),
    SkipCopies(),
    NameDtypes(),
    JoinPadding(),
    JoinWrites(),
    DropUnusedAddend(),
    EraseDead(),
    SplitReshapes(),
    ShareShapeOps(),
    JoinPieces(),
    FoldSlices(),
    EraseDead(),
)
"""Joins come after copies are skipped, since a write is a copy inside a `slice_scatter`. Sharing
comes when dead nodes are gone, and brings slices of one value together for folding."""

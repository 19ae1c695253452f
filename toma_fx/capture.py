"""Capture: a denoiser and example inputs become one flat FX graph of pre-dispatch ATen ops.

The graph takes the flattened inputs and returns the flattened outputs; parameters and buffers are
attributes shared with the original model, never copied. In-place writes are made functional. Three
bit-exact clean-ups make it canonical: metadata assertions (which would pin token counts) are
dropped, equal shape and cast ops become one, and `cat` of all slices of a value becomes the value.
"""

from __future__ import annotations

import copy
import linecache
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from toma_fx.axis import Raster
from toma_fx.errors import CaptureError, ModelTypeError, TrainingModeError
from toma_fx.guard import STAND_IN
from toma_fx.methods.windows import Size
from toma_fx.rules import op_name


@dataclass(frozen=True)
class InputSpec:
    """One flattened input of a captured graph.

    Attributes:
        name: placeholder name.
        tensor: fake tensor with its shape, dtype, device; None for constants.
        raster: what the values enumerate, if they are position ids.
    """

    name: str
    tensor: Tensor | None
    raster: Raster | None = None


@dataclass(frozen=True)
class Captured:
    """A canonical graph of one call signature.

    Attributes:
        graph_module: flat inputs -> flat outputs, parameters shared with the model.
        inputs: one spec per placeholder. out_spec: tree of the outputs.
        hints: what a packed input may enumerate, by sizes among the arguments.
    """

    graph_module: fx.GraphModule
    inputs: tuple[InputSpec, ...]
    out_spec: pytree.TreeSpec
    hints: tuple[Raster, ...] = ()


def flatten_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """Flatten a call; keyword order does not matter."""
    return pytree.tree_flatten((tuple(args), dict(sorted(kwargs.items()))))


def raster(value: Any) -> Raster | None:
    """What the rows of position ids [N, d] or [1, N, d] enumerate in their last two columns.

    The columns before those tell images (or frames) apart. Images that differ in width from the
    first count as other tokens.
    """
    if not isinstance(value, Tensor) or value.dim() not in (2, 3) or not 2 <= value.shape[-1] <= 4:
        return None
    if value.dim() == 3:
        value = value[0]
    if isinstance(value, torch._subclasses.FakeTensor) or value.shape[0] < 4:
        return None
    ids = value.detach().double().cpu()
    border = (ids[1:, :-2] != ids[:-1, :-2]).any(1).nonzero().flatten() + 1
    images = torch.tensor_split(ids, border.tolist())
    sizes = [_image_size(image[:, -2], image[:, -1]) for image in images]
    known = [size for size in takewhile(lambda size: size is not None, sizes) if size is not None]
    return _stacked(known, len(ids)) if known else None


def _stacked(sizes: Sequence[Size], length: int) -> Raster:
    """Images (H, W) one after the other in `length` tokens; after the first other width, others."""
    width = sizes[0][1]
    heights = tuple(h for h, _ in takewhile(lambda size: size[1] == width, sizes))
    return Raster(heights, width, length - sum(heights) * width)


def size_hints(value: Any) -> Iterator[Raster]:
    """What the sizes among the arguments of a call say that a packed input may hold.

    Sizes are whole numbers named height and width, perhaps num_frames (LTX), or lists of (H, W) or
    (T, H, W), one for each image of a sequence (QwenImage).
    """
    if isinstance(value, Mapping):
        named = [value.get("num_frames", 1), value.get("height"), value.get("width")]
        if _is_size(named):
            yield from size_hints(named)
        for inner in value.values():
            yield from size_hints(inner)
    elif isinstance(value, (list, tuple)):
        sizes = [value] if _is_size(value) else value
        if sizes and all(_is_size(size) for size in sizes):
            images = [(s[-2], s[-1]) for s in sizes for _ in range(math.prod(s[:-2]))]
            yield _stacked(images, sum(math.prod(size) for size in sizes))
        else:
            for inner in value:
                yield from size_hints(inner)


def _is_size(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) in (2, 3)
        and all(type(side) is int and side > 0 for side in value)
    )


def _image_size(y: Tensor, x: Tensor) -> tuple[int, int] | None:
    """(H, W) if (y, x) run through a picture row by row."""
    width = int((y == y[0]).sum())
    if width < 2 or len(y) % width or len(y) == width:
        return None
    rows, columns = y.view(-1, width), x.view(-1, width)
    steady = (rows == rows[:, :1]).all() and (columns == columns[:1]).all()
    rising = (rows[1:, 0] > rows[:-1, 0]).all() and (columns[0, 1:] > columns[0, :-1]).all()
    return (len(y) // width, width) if bool(steady) and bool(rising) else None


def check_model(model: Any) -> None:
    """Raise unless `model` is a module in evaluation mode."""
    if not isinstance(model, nn.Module):
        raise ModelTypeError(
            "not a denoiser",
            where="model",
            expected="a torch.nn.Module such as UNet2DConditionModel, or a diffusers pipeline",
            got=type(model).__name__,
        )
    if model.training:
        raise TrainingModeError(
            "the model is in training mode",
            where=type(model).__name__,
            expected="evaluation mode",
            got="training = True",
            hint="call model.eval() first; merging is for inference",
        )


def capture(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Captured:
    """Trace one call of `model`; the model is not changed.

    Raises:
        CaptureError: the model can't be exported; names the module and the Python line.
        ModelTypeError, TrainingModeError: see `check_model`.
    """
    check_model(model)
    kwargs = dict(sorted(kwargs.items()))
    try:
        with torch.no_grad():
            program = torch.export.export(_bare(model), tuple(args), kwargs, strict=False)
            if mutates(program.graph):
                # writes through views would pass unseen by data flow: make them functional
                program = program.run_decompositions({})
    except Exception as error:
        raise _capture_error(model, error) from error
    exported = program.module(check_guards=False)
    graph = exported.graph
    flat = flatten_call(args, kwargs)[0]
    graph.set_codegen(fx.graph.CodeGen())
    flatten_output(graph)
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    specs = []
    for node, value in zip(placeholders, flat, strict=True):
        fake = node.meta["val"] if isinstance(value, Tensor) else None
        specs.append(InputSpec(node.name, fake, raster(value)))
    graph_module = fx.GraphModule(exported, graph, type(model).__name__)
    canonicalise(graph_module)
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    hints = dict.fromkeys((*size_hints(kwargs), *size_hints(args)))
    return Captured(graph_module, tuple(specs), out_spec, tuple(hints))


def _bare(model: nn.Module) -> nn.Module:
    """The model without what others wrapped around its call (offload hooks); shares everything."""
    bare = copy.copy(model)
    own = vars(bare)
    forward = own.get("_old_forward", own.get("forward"))
    for name in STAND_IN:
        own.pop(name, None)
    if forward is not None and getattr(forward, "__func__", None) is not type(model).forward:
        own["forward"] = forward  # the user's own
    return bare


def mutates(graph: fx.Graph) -> bool:
    """Whether an op of the graph writes in place."""
    return any(
        isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable
        for n in graph.nodes
    )


def flatten_output(graph: fx.Graph) -> None:
    """Make the output node return a flat tuple of nodes and constants."""
    output = graph.output_node()
    output.args = (tuple(pytree.tree_leaves(output.args[0])),)


def _capture_error(model: nn.Module, error: Exception) -> CaptureError:
    """Find the innermost module and model source line in the traceback."""
    names = {id(m): name for name, m in model.named_modules()}
    where, line = type(model).__name__, ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if id(owner) in names and isinstance(owner, nn.Module):
            where = names[id(owner)] or type(model).__name__
        file = frame.f_code.co_filename
        if id(owner) in names and "/torch/" not in file:
            text = linecache.getline(file, number).strip()
            line = f"{file}:{number}: {text}"
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return CaptureError(
        "torch.export could not trace the model",
        where=f"{where} at {line}" if line else where,
        expected="a forward pass without data-dependent Python",
        got=f"{type(error).__name__}: {reason[0]}",
        hint="check the inputs first: the original model must run on them",
    )


# -- canonical form -------------------------------------------------------------------------------

_SHARED = {
    "aten.unsqueeze", "aten.to", "aten.view", "aten.reshape", "aten.permute", "aten.transpose",
    "aten.slice", "aten.expand",
}  # fmt: skip


def canonicalise(graph_module: fx.GraphModule) -> None:
    """Drop assertions and dead code, share equal shape ops, fold cat-of-slices. Bit-exact."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node.target) == "aten._assert_tensor_metadata":
            graph.erase_node(node)
    _share_shape_ops(graph)
    _fold_slices(graph)
    graph.eliminate_dead_code()
    graph.lint()
    graph_module.recompile()


def _share_shape_ops(graph: fx.Graph) -> None:
    """Equal shape and cast ops on one value become one node (40 rotary casts in Flux, say)."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node.target) not in _SHARED:
            continue
        key = repr((node.target, node.args, sorted(node.kwargs.items())))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _fold_slices(graph: fx.Graph) -> None:
    """cat([x[:a], x[a:]]) along the same dimension is x."""
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node.target) not in ("aten.cat", "aten.concat"):
            continue
        parts: Any = node.args[0]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if not all(op_name(p.target) == "aten.slice" for p in parts):
            continue
        source, at = parts[0].args[0], 0
        rank = source.meta["val"].dim()
        for part in parts:
            args = part.args
            aligned = args[0] is source and len(args) == 4 and args[1] % rank == dim % rank
            if not aligned or args[2] != at:
                break
            at = args[3]
        else:
            if at >= source.meta["val"].shape[dim]:
                node.replace_all_uses_with(source)

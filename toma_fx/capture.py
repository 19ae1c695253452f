"""Capture: a denoiser and example inputs become one flat FX graph of pre-dispatch ATen ops.

The graph takes the flattened inputs and returns the flattened outputs; parameters and buffers are
attributes shared with the original model, never copied. It is in canonical form (see `canonical`).
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
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from toma_fx.axis import Raster
from toma_fx.canonical import flat_graph
from toma_fx.errors import CaptureError, ModelTypeError, TrainingModeError
from toma_fx.guard import STAND_IN
from toma_fx.methods.windows import Size


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


def ids_dim(value: Any) -> int | None:
    """The dimension of position ids that enumerates tokens: [N, d], [B, N, d] or [B, d, N]."""
    if not isinstance(value, Tensor) or value.dim() not in (2, 3) or value.is_complex():
        return None
    if 2 <= value.shape[-1] <= 4:
        return value.dim() - 2
    return 2 if value.dim() == 3 and 2 <= value.shape[1] <= 4 else None


def raster(value: Any) -> Raster | None:
    """What position ids [N, d], [B, N, d] or [B, d, N] enumerate in their last two columns.

    Columns at the end that are the same everywhere don't count (Flux.2's index of text). Those
    before tell images (or frames) apart. What comes before the first image, and images that differ
    from it in width, count as other tokens.
    """
    at = ids_dim(value)
    if at is None:
        return None
    value = value.transpose(at, -2)
    if value.dim() == 3:
        value = value[0]
    if isinstance(value, FakeTensor) or value.is_meta or value.shape[0] < 4:
        return None
    ids = value.detach().double().cpu()
    varying = (ids != ids[:1]).any(0).nonzero().flatten()
    if len(varying) < 2:
        return None
    ids = ids[:, : int(varying[-1]) + 1]
    # text has one id for all of its tokens
    border = (ids[1:, :-2] != ids[:-1, :-2]).any(1) | (ids[1:] == ids[:-1]).all(1)
    images = torch.tensor_split(ids, (border.nonzero().flatten() + 1).tolist())
    sizes = [_image_size(image[:, -2], image[:, -1]) for image in images]
    first = next((i for i, size in enumerate(sizes) if size is not None), None)
    if first is None:
        return None
    known = [size for size in takewhile(lambda size: size is not None, sizes[first:]) if size]
    return _stacked(known, len(ids), sum(map(len, images[:first])))


def _stacked(sizes: Sequence[Size], length: int, before: int = 0) -> Raster:
    """Images (H, W) one after the other in `length` tokens; after the first other width, others."""
    width = sizes[0][1]
    heights = tuple(h for h, _ in takewhile(lambda size: size[1] == width, sizes))
    return Raster(heights, width, length - before - sum(heights) * width, before)


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
    kwargs, plain = dict(sorted(kwargs.items())), bare(model)
    try:
        with torch.no_grad():
            program = torch.export.export(plain, tuple(args), kwargs, strict=False)
            graph_module = flat_graph(program, type(model).__name__)
    except Exception as error:
        raise _capture_error(plain, error) from error
    specs = []
    placeholders: list[Any] = graph_module.graph.find_nodes(op="placeholder")
    for node, value in zip(placeholders, flatten_call(args, kwargs)[0], strict=True):
        fake = node.meta["val"] if isinstance(value, Tensor) else None
        specs.append(InputSpec(node.name, fake, raster(value)))
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    hints = dict.fromkeys((*size_hints(kwargs), *size_hints(args)))
    return Captured(graph_module, tuple(specs), out_spec, tuple(hints))


def bare(model: nn.Module) -> nn.Module:
    """The model without what others wrapped around its call (offload hooks); shares everything."""
    bare = copy.copy(model)
    own = vars(bare)
    forward = own.get("_old_forward", own.get("forward"))
    for name in STAND_IN:
        own.pop(name, None)
    if forward is not None and getattr(forward, "__func__", None) is not type(model).forward:
        own["forward"] = forward  # the user's own
    return bare


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

"""Capture: a denoiser and example inputs become one flat FX graph of pre-dispatch ATen ops.

The graph takes the flattened inputs and returns the flattened outputs; parameters and buffers are
attributes shared with the original model, never copied. It is in canonical form (see `canonical`).
"""

from __future__ import annotations

import copy
import linecache
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from toma_fx.capture.canonical import flat_graph
from toma_fx.capture.grids import Raster, find_raster, size_hints
from toma_fx.capture.opaque import traceable
from toma_fx.capture.references import without_weak_references
from toma_fx.capture.traceable import TraceableForms
from toma_fx.compat.libraries import WRAPPING, own_forward
from toma_fx.compat.pytorch import lazy_graph_modules, tree_flatten, tree_map, tree_paths
from toma_fx.compat.tracebacks import own_frames
from toma_fx.errors import (
    CaptureError,
    ModelTypeError,
    SignatureError,
    TomaError,
    TrainingModeError,
)
from toma_fx.graph.collection import no_collection

if TYPE_CHECKING:
    from toma_fx.compat.pytorch import TreeSpec


@dataclass(frozen=True)
class InputSpec:
    """One flattened input of a captured graph.

    Attributes:
        name: placeholder name.
        tensor: fake tensor with its shape, dtype, device; None for constants.
        raster: what the values enumerate, if they are position ids.
        argument: the name of the argument, where the placeholder has another one.
        owned: whether it belongs to the model, and is no argument.
    """

    name: str
    tensor: Tensor | None
    raster: Raster | None = None
    argument: str = ""
    owned: bool = False


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
    out_spec: TreeSpec
    hints: tuple[Raster, ...] = ()


def flatten_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], TreeSpec]:
    """Flatten a call; keyword order does not matter.

    Raises:
        SignatureError: a tensor is sparse, nested, or of another layout that graphs do not take.
    """
    call = tuple(args), dict(sorted(kwargs.items()))
    leaves, structure = tree_flatten(call)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            continue
        if leaf.layout is not torch.strided or leaf.is_nested:
            path = tree_paths(call)[i][0][1:]
            raise _layout_error(".".join(path), leaf)
        leaves[i] = resolve_lazy(leaf)
    return leaves, structure


def resolve_lazy(tensor: Tensor) -> Tensor:
    """A tensor whose memory holds its values: Inductor reads no signs that wait to be applied."""
    if tensor.is_neg() or tensor.is_conj():
        return tensor.resolve_conj().resolve_neg()
    return tensor


def _layout_error(path: str, tensor: Tensor) -> SignatureError:
    return SignatureError(
        "a graph takes dense tensors",
        where=path,
        expected="a dense tensor",
        got=f"a nested tensor ({tensor.layout})" if tensor.is_nested else str(tensor.layout),
        hint="call the denoiser with tensor.to_dense(), or with padding",
    )


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


@no_collection()
def capture(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Captured:
    """Trace one call of `model`; the model is not changed.

    Raises:
        CaptureError: the model can't be exported; names the module and the Python line.
        ModelTypeError, TrainingModeError: see `check_model`.
    """
    check_model(model)
    kwargs, plain = dict(sorted(kwargs.items())), traceable(unwrap(model))
    try:
        with torch.no_grad(), lazy_graph_modules(), without_weak_references() as graphs:
            with TraceableForms(), own_frames():
                inputs = _like_model(plain, (tuple(args), kwargs))
                program = torch.export.export(plain, *inputs, strict=False)
            graphs.append(program.graph)
            graph_module = flat_graph(program, type(model).__name__)
    except TomaError:
        raise
    except Exception as error:
        raise _capture_error(plain, error) from error
    specs = []
    placeholders: list[Any] = graph_module.graph.find_nodes(op="placeholder")
    for node, value in zip(placeholders, flatten_call(args, kwargs)[0], strict=True):
        fake = node.meta["val"] if isinstance(value, Tensor) else None
        specs.append(InputSpec(node.name, fake, find_raster(value)))
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    hints = dict.fromkeys((*size_hints(kwargs), *size_hints(args)))
    return Captured(graph_module, tuple(specs), out_spec, tuple(hints))


def _like_model(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """The call, on the meta device if the model is there: its values are read from the original."""
    if not any(p.is_meta for p in model.parameters()):
        return call
    return tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, call)


def unwrap(model: nn.Module) -> nn.Module:
    """The model without wrappers of its call (offload hooks); shares everything."""
    plain = copy.copy(model)
    attributes = vars(plain)
    forward = own_forward(model)
    for name in WRAPPING:
        attributes.pop(name, None)
    if forward is not None:
        attributes["forward"] = forward  # set by the user
    return plain


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
        hint="rewrite what is named without Python that depends on the values of tensors or on "
        "objects that a graph can't hold; torch.export.export(model, args, kwargs, strict=False) "
        "must take it",
    )

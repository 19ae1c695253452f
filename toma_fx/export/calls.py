"""Calls of an artifact, checked against its manifest."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from toma_fx.capture.grids import Raster
from toma_fx.compat.pytorch import inner_tensors
from toma_fx.errors import SignatureError
from toma_fx.export.manifest import (
    ArtifactInput,
    CallSpec,
    Constant,
    Manifest,
    TensorSpec,
    describe_calls,
    raster_spec,
)

Calls = Sequence[CallSpec]


@dataclass(frozen=True)
class ArtifactCall:
    """A call that fits an artifact.

    Attributes:
        places: of the manifest's calls that it may be, told apart by position ids alone.
        inputs: of the programs. arguments: they came from, by path. ids: the inputs that must
            enumerate a grid, at the same places as `inputs`. dtype: that outputs are given in, if
            not their own.
    """

    places: tuple[int, ...]
    inputs: tuple[Tensor, ...]
    arguments: Mapping[tuple[str, ...], Any]
    ids: tuple[Any, ...]
    dtype: torch.dtype | None = None


def match_call(
    manifest: Manifest,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    device: torch.device,
    *,
    cast: bool = False,
) -> ArtifactCall:
    """A call, checked against those of the manifest.

    Args:
        cast: take inputs of another floating dtype, and ask for outputs in that of the first.

    Raises:
        SignatureError: names the first argument that does not fit the nearest of them.
    """
    named = {**dict(zip(manifest.parameters, args, strict=False)), **kwargs}
    leaves, calls = dict(_leaves(named)), manifest.calls
    if len(calls) == 1:
        return _match(calls, (0,), leaves, device, cast)
    distances = [call_distance(call, leaves) for call in calls]
    nearest = [i for i, distance in enumerate(distances) if distance == min(distances)]
    errors = []
    for places in _alike(calls, nearest):  # which may differ in dtypes
        try:
            return _match(calls, places, leaves, device, cast)
        except SignatureError as error:
            errors.append(error)
    raise errors[0]


def call_distance(call: CallSpec, leaves: Mapping[tuple[str, ...], Any]) -> tuple[int, int]:
    """How far arguments are from a call: (how many don't fit, by how much their shapes differ)."""
    count, far = 0, 0
    for spec in call.inputs:
        shape, value = spec.tensor.shape, leaves.get(spec.path)
        if not isinstance(value, Tensor) or value.is_nested:
            count += not (isinstance(value, Real) and shape == ())
        elif (own := tuple(value.shape)) != shape:
            count += 1
            alike = len(own) == len(shape)
            far += sum(abs(a - b) for a, b in zip(own, shape, strict=True)) if alike else FAR
    count += sum(not _has_value(leaves, constant) for constant in call.constants)
    known = {spec.path for spec in call.inputs} | {constant.path for constant in call.constants}
    return count + sum(x is not None for path, x in leaves.items() if path not in known), far


def _has_value(leaves: Mapping[tuple[str, ...], Any], constant: Constant) -> bool:
    value = leaves.get(constant.path)
    return not isinstance(value, Tensor) and bool(value == constant.value)


FAR = 1 << 40
"""How much shapes of other numbers of dimensions differ: more than others do."""


def _alike(calls: Calls, places: Sequence[int]) -> list[tuple[int, ...]]:
    """Calls that position ids alone tell apart, together; those that check most ids first."""
    groups: dict[Any, list[int]] = {}
    for i in places:
        tensors = tuple((spec.path, spec.tensor) for spec in calls[i].inputs)
        groups.setdefault((tensors, calls[i].constants), []).append(i)
    return [tuple(sorted(g, key=lambda i: -_checked_ids(calls[i]))) for g in groups.values()]


def _checked_ids(call: CallSpec) -> int:
    return sum(spec.raster is not None for spec in call.inputs)


def _match(
    calls: Calls,
    places: tuple[int, ...],
    leaves: Mapping[tuple[str, ...], Any],
    device: torch.device,
    cast: bool,
) -> ArtifactCall:
    """Arguments as a call of some that position ids alone tell apart.

    Raises:
        SignatureError: names the first that does not fit.
    """
    call, dtype = calls[places[0]], None
    if cast:
        dtype = _floating_dtype(leaves.get(spec.path) for spec in call.inputs)
        cast_ones = {s.path: _cast_floats(leaves.get(s.path), s.tensor) for s in call.inputs}
        leaves = {**leaves, **cast_ones}
    inputs = tuple(
        _match_input(spec, leaves.get(spec.path), device, calls, casts=_may_cast(call, spec))
        for spec in call.inputs
    )
    known = {spec.path for spec in call.inputs}
    for constant in call.constants:
        if not _has_value(leaves, constant):
            value = repr(leaves.get(constant.path))
            raise _misfit(constant.path, repr(constant.value), value, calls)
        known.add(constant.path)
    extra = next((p for p, x in leaves.items() if p not in known and x is not None), None)
    if extra is not None:
        nothing = "nothing: the artifact has no such input"
        raise _misfit(extra, nothing, repr(leaves[extra])[:80], calls)
    checked = {s.path for i in places for s in calls[i].inputs if s.raster is not None}
    ids = tuple(leaves[s.path] if s.path in checked else None for s in call.inputs)
    return ArtifactCall(places, inputs, leaves, ids, dtype)


def find_call(calls: Calls, places: Sequence[int], rasters: Sequence[Raster | None]) -> int:
    """Place of the call, among some that position ids alone tell apart, whose grids these are.

    Raises:
        SignatureError: none is: names the first input that enumerates another grid.
    """
    for i in places:
        if _first_other(calls[i], rasters) is None:
            return i
    at = _first_other(calls[places[0]], rasters)
    assert at is not None
    grids = dict.fromkeys(str(calls[i].inputs[at].raster) for i in places)
    path, got = calls[places[0]].inputs[at].path, raster_spec(rasters[at])
    raise _misfit(path, f"positions of a grid {' or '.join(grids)}", str(got), calls)


def _first_other(call: CallSpec, rasters: Sequence[Raster | None]) -> int | None:
    """Place of the first input whose ids enumerate another grid than the programs merge on."""
    for i, (spec, raster) in enumerate(zip(call.inputs, rasters, strict=True)):
        if spec.raster is not None and raster_spec(raster) != spec.raster:
            return i
    return None


def kept_settings(calls: Calls) -> list[Hashable]:
    """Of each call what kept tensors must agree on to fit: all but the rows of the batch."""
    features = [
        {x.path: (x.tensor.name, x.tensor.shape[1:], x.raster) for x in call.inputs}
        | {x.path: ("_".join(x.path), x.value) for x in call.constants}
        for call in calls
    ]
    apart = [
        tuple(value for path, value in own.items() if any(x.get(path) != value for x in features))
        for own in features
    ]
    kept = (tuple((x.name, x.shape[1:], x.dtype) for x in call.kept) for call in calls)
    return [*zip(apart, kept, strict=True)]


def nest_arguments(spec: CallSpec, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of a call, nested as the model takes them.

    Args:
        spec: of the call; gives the constants. tensors: inputs by their names in the programs,
            every one.
    """
    call: dict[str, Any] = {}
    for own in spec.inputs:
        _put(call, own.path, tensors[own.tensor.name])
    for constant in spec.constants:
        _put(call, constant.path, constant.value)
    return call


def _put(call: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    *outer, last = path
    for key in outer:
        call = call.setdefault(key, {})
    call[last] = value


def _may_cast(call: CallSpec, spec: ArtifactInput) -> bool:
    """Whether an input may come in any dtype that holds its values.

    Schedulers count timesteps in integers or not, pipelines number positions in the dtype of their
    embeddings.
    """
    return spec.path == call.timestep or spec.path[-1].endswith("_ids")


def _match_input(
    spec: ArtifactInput, value: Any, device: torch.device, calls: Calls, *, casts: bool
) -> Tensor:
    """One input of the programs, on their device."""
    dtype = getattr(torch, spec.tensor.dtype)
    want = f"{spec.tensor.shape} {spec.tensor.dtype}"
    if isinstance(value, Real) and not isinstance(value, bool):
        value = _tensor_of(value, dtype, spec.path, calls)
    if not isinstance(value, Tensor):
        raise _misfit(spec.path, want, repr(value), calls)
    value = _plain(value, spec.path, calls)
    if casts:
        value = _cast_exactly(value, dtype)
    own = TensorSpec.of(spec.tensor.name, value)
    got = f"{own.shape} {own.dtype}"
    if got != want:
        floats = value.is_floating_point() and dtype.is_floating_point
        fits = own.shape == spec.tensor.shape and floats
        raise _misfit(spec.path, want, got, calls, dtype if fits else None)
    placed: Tensor = value.to(device)
    return placed


def _floating_dtype(values: Iterator[Any]) -> torch.dtype | None:
    """The dtype of the first value that is a floating tensor."""
    tensors = (x for x in values if isinstance(x, Tensor) and x.is_floating_point())
    return next((x.dtype for x in tensors), None)


def _cast_floats(value: Any, spec: TensorSpec) -> Any:
    """A floating tensor in the floating dtype that an artifact was built for."""
    dtype = getattr(torch, spec.dtype)
    floats = isinstance(value, Tensor) and value.is_floating_point() and dtype.is_floating_point
    return value.to(dtype) if floats else value


def _tensor_of(value: Any, dtype: torch.dtype, path: Sequence[str], calls: Calls) -> Tensor:
    """A number as a tensor of no dimension: fractions are rounded as torch does, nothing else."""
    try:
        tensor = torch.tensor(value, dtype=dtype)
        held = tensor.item()
        rounds = dtype.is_floating_point and not isinstance(value, Integral)
        fits = math.isfinite(held) and (rounds or held == value) and dtype != torch.bool
    except (RuntimeError, OverflowError, ValueError, TypeError):  # out of the dtype's range
        fits = False
    if not fits:
        raise _misfit(path, f"a number that {dtype} holds", repr(value), calls)
    return tensor


def _plain(value: Tensor, path: Sequence[str], calls: Calls) -> Tensor:
    """A tensor whose memory holds its values: programs read inputs by their address.

    Raises:
        SignatureError: it has none such.
    """
    odd = [name for name in ODD if getattr(value, name)]
    if value.layout != torch.strided or odd or inner_tensors(value):
        got = f"{type(value).__name__} {value.layout} {' '.join(odd)}".rstrip()
        raise _misfit(path, "a dense tensor with values of its own", got, calls)
    # signs and conjugates that wait to be applied, zeros that have no memory
    lazy = value.is_neg() or value.is_conj() or (not value.data_ptr() and value.numel())
    return value.detach().clone() if lazy else value.detach()


ODD = ("is_nested", "is_quantized", "is_meta")
"""Attributes of tensors whose values do not lie in memory as those of others do."""


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, leaf) of nested arguments."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _leaves(inner, (*path, str(i)))
    else:
        yield path, value


def _cast_exactly(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype, if that changes no value."""
    if value.dtype == dtype or value.dtype == torch.bool or value.is_complex():
        return value
    cast = value.to(dtype)
    return cast if torch.equal(cast.to(value.dtype), value) else value


def _misfit(
    path: Sequence[str], expected: str, got: str, calls: Calls, dtype: torch.dtype | None = None
) -> SignatureError:
    """`dtype`: of the artifact, if only that of the input is another one."""
    hint = "an artifact is for the shapes, dtypes and constants that it was built with"
    if dtype is not None:
        hint = f"pipe.to({dtype}) before, or toma_fx.load(..., cast=True) takes any floating dtype"
    elif len(calls) > 1:
        sizes = "; ".join(f"{name}: {text}" for name, text in describe_calls(calls).items())
        hint = f"the artifact is for {sizes}"
    return SignatureError(
        "the call does not fit the artifact",
        where=".".join(path),
        expected=expected,
        got=got,
        hint=hint,
    )

"""Calls of an artifact, checked against its manifest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from toma_fx.capture.grids import Raster
from toma_fx.compat.pytorch import inner_tensors
from toma_fx.errors import SignatureError
from toma_fx.export.manifest import ArtifactInput, Manifest, TensorSpec, raster_spec


@dataclass(frozen=True)
class ArtifactCall:
    """A call that fits an artifact.

    Attributes:
        inputs: of its programs. arguments: they came from, by path. dtype: that outputs are given
            in, if not their own.
    """

    inputs: tuple[Tensor, ...]
    arguments: Mapping[tuple[str, ...], Any]
    dtype: torch.dtype | None = None


def match_call(
    manifest: Manifest,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    device: torch.device,
    *,
    cast: bool = False,
) -> ArtifactCall:
    """A call, checked against the manifest.

    Args:
        cast: take inputs of another floating dtype, and ask for outputs in that of the first.

    Raises:
        SignatureError: names the first argument that does not fit.
    """
    named = {**dict(zip(manifest.parameters, args, strict=False)), **kwargs}
    leaves = dict(_leaves(named))
    dtype = None
    if cast:
        dtype = _floating_dtype(leaves.get(spec.path) for spec in manifest.inputs)
        leaves |= {s.path: _cast_floats(leaves.get(s.path), s.tensor) for s in manifest.inputs}
    inputs = tuple(
        _match_input(spec, leaves.get(spec.path), device, casts=_may_cast(manifest, spec))
        for spec in manifest.inputs
    )
    known = {spec.path for spec in manifest.inputs}
    for constant in manifest.constants:
        if leaves.get(constant.path) != constant.value:
            value = repr(leaves.get(constant.path))
            raise _misfit(constant.path, repr(constant.value), value)
        known.add(constant.path)
    extra = next((p for p, x in leaves.items() if p not in known and x is not None), None)
    if extra is not None:
        raise _misfit(extra, "nothing: the artifact has no such input", repr(leaves[extra])[:80])
    return ArtifactCall(inputs, leaves, dtype)


def nest_arguments(manifest: Manifest, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of a call, nested as the model takes them.

    Args:
        manifest: of the artifact; gives the constants. tensors: inputs by their names in the
            programs, every one.
    """
    call: dict[str, Any] = {}
    for spec in manifest.inputs:
        _put(call, spec.path, tensors[spec.tensor.name])
    for constant in manifest.constants:
        _put(call, constant.path, constant.value)
    return call


def _put(call: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    *outer, last = path
    for key in outer:
        call = call.setdefault(key, {})
    call[last] = value


def _may_cast(manifest: Manifest, spec: ArtifactInput) -> bool:
    """Whether an input may come in any dtype that holds its values.

    Schedulers count timesteps in integers or not, pipelines number positions in the dtype of their
    embeddings.
    """
    return spec.path == manifest.timestep or spec.path[-1].endswith("_ids")


def _match_input(spec: ArtifactInput, value: Any, device: torch.device, *, casts: bool) -> Tensor:
    """One input of the programs, on their device."""
    dtype = getattr(torch, spec.tensor.dtype)
    want = f"{spec.tensor.shape} {spec.tensor.dtype}"
    if isinstance(value, Real) and not isinstance(value, bool):
        value = _tensor_of(value, dtype, spec.path)
    if not isinstance(value, Tensor):
        raise _misfit(spec.path, want, repr(value))
    value = _plain(value, spec.path)
    if casts:
        value = _cast_exactly(value, dtype)
    own = TensorSpec.of(spec.tensor.name, value)
    got = f"{own.shape} {own.dtype}"
    if got != want:
        floats = value.is_floating_point() and dtype.is_floating_point
        fits = own.shape == spec.tensor.shape and floats
        raise _misfit(spec.path, want, got, dtype if fits else None)
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


def _tensor_of(value: Any, dtype: torch.dtype, path: Sequence[str]) -> Tensor:
    """A number as a tensor of no dimension: fractions are rounded as torch does, nothing else."""
    try:
        tensor = torch.tensor(value, dtype=dtype)
        held = tensor.item()
        rounds = dtype.is_floating_point and not isinstance(value, Integral)
        fits = math.isfinite(held) and (rounds or held == value) and dtype != torch.bool
    except (RuntimeError, OverflowError, ValueError, TypeError):  # out of the dtype's range
        fits = False
    if not fits:
        raise _misfit(path, f"a number that {dtype} holds", repr(value))
    return tensor


def _plain(value: Tensor, path: Sequence[str]) -> Tensor:
    """A tensor whose memory holds its values: programs read inputs by their address.

    Raises:
        SignatureError: it has none such.
    """
    odd = [name for name in ODD if getattr(value, name)]
    if value.layout != torch.strided or odd or inner_tensors(value):
        got = f"{type(value).__name__} {value.layout} {' '.join(odd)}".rstrip()
        raise _misfit(path, "a dense tensor with values of its own", got)
    # signs and conjugates that wait to be applied, zeros that have no memory
    lazy = value.is_neg() or value.is_conj() or (not value.data_ptr() and value.numel())
    return value.detach().clone() if lazy else value.detach()


ODD = ("is_nested", "is_quantized", "is_meta")
"""Attributes of tensors whose values do not lie in memory as those of others do."""


def check_positions(manifest: Manifest, rasters: Sequence[Raster | None]) -> None:
    """Position ids must enumerate the grids that the programs merge on.

    Raises:
        SignatureError: names the first input that does not.
    """
    for spec, raster in zip(manifest.inputs, rasters, strict=True):
        if spec.raster is not None and raster_spec(raster) != spec.raster:
            want = f"positions of a grid {spec.raster}"
            raise _misfit(spec.path, want, str(raster_spec(raster)))


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
    path: Sequence[str], expected: str, got: str, dtype: torch.dtype | None = None
) -> SignatureError:
    """`dtype`: of the artifact, if only that of the input is another one."""
    hint = "an artifact is for the shapes, dtypes and constants that it was built with"
    if dtype is not None:
        hint = f"pipe.to({dtype}) before, or toma_fx.load(..., cast=True) takes any floating dtype"
    return SignatureError(
        "the call does not fit the artifact",
        where=".".join(path),
        expected=expected,
        got=got,
        hint=hint,
    )

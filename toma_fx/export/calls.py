"""Calls of an artifact, checked against its manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toma_fx.capture.grids import Raster
from toma_fx.errors import SignatureError
from toma_fx.export.manifest import ArtifactInput, Manifest, TensorSpec, raster_spec

NUMBERS = ("timestep", "_ids")
"""Ends of the names of inputs that may come in any dtype that holds their values: schedulers count
timesteps in integers or not, pipelines number positions in the dtype of their embeddings."""


@dataclass(frozen=True)
class ArtifactCall:
    """A call that fits an artifact: inputs of its programs, and the arguments they came from."""

    inputs: tuple[Tensor, ...]
    arguments: Mapping[tuple[str, ...], Any]


def match_call(
    manifest: Manifest, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device
) -> ArtifactCall:
    """A call, checked against the manifest.

    Raises:
        SignatureError: names the first argument that does not fit.
    """
    named = {**dict(zip(manifest.parameters, args, strict=False)), **kwargs}
    leaves = dict(_leaves(named))
    inputs = tuple(_match_input(spec, leaves.get(spec.path), device) for spec in manifest.inputs)
    known = {spec.path for spec in manifest.inputs}
    for constant in manifest.constants:
        if leaves.get(constant.path) != constant.value:
            value = repr(leaves.get(constant.path))
            raise _misfit(constant.path, repr(constant.value), value)
        known.add(constant.path)
    extra = next((p for p, x in leaves.items() if p not in known and x is not None), None)
    if extra is not None:
        raise _misfit(extra, "nothing: the artifact has no such input", repr(leaves[extra])[:80])
    return ArtifactCall(inputs, leaves)


def _match_input(spec: ArtifactInput, value: Any, device: torch.device) -> Tensor:
    """One input of the programs, on their device."""
    dtype = getattr(torch, spec.tensor.dtype)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = torch.tensor(value, dtype=dtype)
    want = f"{spec.tensor.shape} {spec.tensor.dtype}"
    if not isinstance(value, Tensor):
        raise _misfit(spec.path, want, repr(value))
    if spec.path[-1].endswith(NUMBERS):
        value = _cast_exactly(value, dtype)
    own = TensorSpec.of(spec.tensor.name, value)
    got = f"{own.shape} {own.dtype}"
    if got != want:
        raise _misfit(spec.path, want, got)
    placed: Tensor = value.to(device)
    return placed


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
    if value.dtype == dtype:
        return value
    cast = value.to(dtype)
    return cast if torch.equal(cast.to(value.dtype), value) else value


def _misfit(path: Sequence[str], expected: str, got: str) -> SignatureError:
    return SignatureError(
        "the call does not fit the artifact",
        where=".".join(path),
        expected=expected,
        got=got,
        hint="an artifact is for the shapes, dtypes and constants that it was built with",
    )

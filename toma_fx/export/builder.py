"""Build an artifact: export the programs, lower them, compare with the process, publish."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from toma_fx.axis import Raster
from toma_fx.errors import BuildError
from toma_fx.export.artifact import Report, building, check_place, reported, silent
from toma_fx.export.manifest import (
    VERSION,
    Constant,
    InputSpec,
    Manifest,
    Parity,
    Schedule,
    Structure,
    TensorSpec,
)
from toma_fx.export.programs import Programs, export_programs
from toma_fx.export.targets import Lowered, Runtime, Target
from toma_fx.parity import fresh
from toma_fx.state import Call
from toma_fx.verify import output_values

TOLERANCE = {"float16": 2e-2, "bfloat16": 5e-2}
"""Largest difference relative to the largest value of an output, by dtype; else `EXACT`."""
EXACT = 1e-4
CHECKED_STEPS = 4
"""Steps of the comparison, of the schedule from its first merged step."""


def build(
    optimized: Any,
    example_inputs: Any,
    out: str | Path,
    target: Target,
    *,
    overwrite: bool = False,
    licence: str = "",
    report: Report = silent,
) -> Manifest:
    """Make an artifact of an optimized denoiser.

    Args:
        optimized: what `toma_fx.optimize` returned. example_inputs: a call, whose shapes, dtypes
            and constants the artifact is for.
        out: folder to make. target: what to make. overwrite: whether an artifact there is replaced,
            once the new one is done.
        licence: note on the model's licence, for the manifest. report: told of every stage.

    Returns:
        The manifest.

    Raises:
        BuildError: the folder can't be used, an artifact that computes something else than the
            process (nothing is left of it then). MissingPackageError: the target needs a package.
            DynamicError, ModelTypeError, SignatureError: see `export_programs`.
    """
    check_place(Path(out), overwrite)
    target.check_installed()
    with reported("export", report):
        programs = export_programs(optimized, example_inputs)
    target.check(programs)
    key = _key(programs, target)
    with building(Path(out), key, overwrite=overwrite, report=report) as work, torch.no_grad():
        lowered = target.lower(programs, work)
        manifest = manifest_of(programs, lowered, licence)
        with reported("compare with the process", report):
            runtime = target.open(work.folder, manifest, programs.device, {})
            try:
                figures = tuple(_compare(programs, manifest, runtime))
            except BuildError:
                work.discard()
                raise
        return work.finish(replace(manifest, parity=figures))


def manifest_of(programs: Programs, lowered: Lowered, licence: str) -> Manifest:
    """Everything but the parity and the checksums."""
    denoiser, specialization = programs.denoiser, programs.specialization
    captured = specialization.captured
    leaves = list(zip(programs.paths, programs.leaves, captured.inputs, strict=True))
    inputs = tuple(
        InputSpec(path, tensor_spec("_".join(path), leaf), _raster(spec.raster))
        for path, leaf, spec in leaves
        if isinstance(leaf, Tensor)
    )
    constants = tuple(
        Constant(path, leaf) for path, leaf, _ in leaves if not isinstance(leaf, Tensor)
    )
    fakes = output_values(captured.graph_module.graph)
    outputs = tuple(tensor_spec(f"output_{i}", x) for i, x in enumerate(fakes))
    used = {n for p in lowered.programs.values() for n in (*p.patterns_in, *p.patterns_out)}
    return Manifest(
        version=VERSION,
        target=lowered.target,
        device=lowered.device,
        model=type(denoiser.denoiser).__name__,
        model_config=_jsonable(dict(getattr(denoiser, "config", {}))),
        dtype=_dtype(next(denoiser.denoiser.parameters()).dtype),
        licence=licence,
        plan=_jsonable(programs.plan.to_json()),
        schedule=Schedule.of(programs.plan.config) if programs.plan.segments else Schedule.plain(),
        parameters=denoiser.parameter_names,
        inputs=inputs,
        constants=constants,
        outputs=outputs,
        structure=_structure(captured.out_spec),
        patterns=tuple(
            tensor_spec(name, x) for name, x in programs.patterns.items() if name in used
        ),
        programs=lowered.programs,
        versions={"toma_fx": version("toma_fx"), "torch": torch.__version__, **lowered.versions},
        parity=(),
        files={},
    )


def _compare(programs: Programs, manifest: Manifest, runtime: Runtime) -> Iterator[Parity]:
    """Some steps of a generation, each side with its own patterns; every program takes part.

    Raises:
        BuildError: they differ by more than the tolerance.
    """
    patterns, own = dict[str, Tensor](), dict[str, Tensor]()
    for step, call in enumerate(_checked_calls(manifest)):
        inputs = [fresh(x, seed=step) for x in programs.inputs.values()]
        want, made = programs.run(call, inputs, own)
        own.update(made)
        got, given = runtime.run(call, inputs, patterns)
        patterns.update({name: value.clone() for name, value in given.items()})
        for a, b, spec in zip(got, want, manifest.outputs, strict=True):
            found, limit = difference(a, b), TOLERANCE.get(spec.dtype, EXACT)
            if not found <= limit:
                raise BuildError(
                    "the artifact does not compute what the process computes",
                    where=f"step {step} ({call}), {spec.name}",
                    expected=f"a difference of at most {limit:.0e} of the largest value",
                    got=f"{found:.2g}",
                    hint="please report this model and target; nothing was written",
                )
            yield Parity(call, found, limit)


def _checked_calls(manifest: Manifest) -> list[Call]:
    """Programs of the first merged steps, and those that no such step runs."""
    first = manifest.schedule.first_step
    calls = manifest.calls(first + CHECKED_STEPS)[first:]
    order: tuple[Call, ...] = ("refresh", "reweigh", "reuse", "plain")
    return calls + [c for c in order if c in manifest.programs and c not in calls]


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of `b`."""
    a, b = a.double().cpu().nan_to_num(), b.double().cpu().nan_to_num()
    return float((a - b).abs().max()) / (float(b.abs().max()) or 1.0)


def tensor_spec(name: str, x: Tensor) -> TensorSpec:
    """What the manifest says of a tensor."""
    return TensorSpec(name, tuple(x.shape), _dtype(x.dtype))


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _raster(raster: Raster | None) -> tuple[tuple[int, ...], int, int, int] | None:
    if raster is None:
        return None
    return raster.heights, raster.width, raster.rest, raster.before


def _structure(spec: pytree.TreeSpec) -> Structure:
    """How the outputs are returned."""
    if spec.is_leaf():
        return Structure("tensor", ("0",))
    if spec.type in (tuple, list):
        return Structure(spec.type.__name__, tuple(map(str, range(spec.num_leaves))))
    names = spec.context if isinstance(spec.context, (list, tuple)) else range(spec.num_leaves)
    return Structure(getattr(spec.type, "__name__", "tuple"), tuple(map(str, names)))


def _jsonable(value: Any) -> Any:
    """A configuration as JSON values; what is none becomes text."""
    return json.loads(json.dumps(value, default=str))


def _key(programs: Programs, target: Target) -> str:
    """What decides whether finished stages of an interrupted build can be used."""
    digest = hashlib.sha256()
    specs = [tensor_spec(name, x) for name, x in programs.inputs.items()]
    said = (version("toma_fx"), torch.__version__, repr(target), specs, programs.plan.to_json())
    digest.update(repr(said).encode())
    for name, x in programs.denoiser.denoiser.state_dict().items():
        digest.update(name.encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

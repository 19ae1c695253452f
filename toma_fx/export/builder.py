"""Build an artifact: export the programs, lower them, compare with the process, publish."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toma_fx.capture.parity import perturb, relative_difference, tolerance
from toma_fx.errors import BuildError
from toma_fx.export.building import OnStage, building, ignore, report_stage
from toma_fx.export.destination import check_output
from toma_fx.export.folder import OpenFolder
from toma_fx.export.manifest import (
    VERSION,
    ArtifactInput,
    Constant,
    Manifest,
    Parity,
    ProgramSpec,
    Structure,
    TensorSpec,
    raster_spec,
)
from toma_fx.export.programs import Programs, export_programs
from toma_fx.export.reading import ArtifactFiles
from toma_fx.export.registry import make_target
from toma_fx.export.targets import Lowered, Runtime, Target
from toma_fx.methods.cached_steps import LONGEST, Length
from toma_fx.methods.kinds import REUSE, kind_in, phase_of
from toma_fx.run.schedule import Schedule, aged

ALIKE = {"float16": 0.85, "bfloat16": 0.7}
"""Least share of tokens that an artifact's patterns treat as the process's do, by dtype of the
model; else `EXACTLY_ALIKE`."""
EXACTLY_ALIKE = 0.95
PROBES, NEAR = 8, 0.05
"""Random channels that tell whether a token is treated alike, and how near their values must be,
relative to the largest."""
UPDATES = 8
"""How many times the tolerance of outputs kept updates may differ: they are small differences of
large values."""
CHECKED_STEPS = 4
"""Steps of the comparison, of the schedule from its first merged step."""


def export(
    optimized: Any,
    inputs: Any,
    out: str | Path,
    target: str | Target = "onnx",
    *,
    overwrite: bool = False,
    license: str = "",
    report: OnStage = ignore,
    **options: Any,
) -> Manifest:
    """Make an artifact of an optimized denoiser: a folder that runs without the model.

    Args:
        optimized: what `toma_fx.optimize` returned. inputs: a call, whose shapes, dtypes and
            constants the artifact is for.
        out: folder to make. target: "onnx", "aoti", "tensorrt", "triton", or a target of
            your own.
        overwrite: whether an artifact there is replaced, once the new one is done.
        license: note on the model's license, for the manifest.
        report: called with every stage, as it begins and as it ends.
        options: of the target, as fields of `ONNXTarget`, `AOTITarget`, `TensorRTTarget` and
            `TritonTarget`.

    Returns:
        The manifest.

    Raises:
        UnknownNameError: no such target, or no such option of it. ConfigError: a value that an
            option can't have. MissingPackageError: the target needs a package.
        BuildError: the folder can't be used, or the artifact computes something else than the
            process (nothing is left of it then).
        DynamicError, ModelTypeError, SignatureError: see `export_programs`.
    """
    target = make_target(target, options)
    out = check_output(out, overwrite)
    target.check_installed()
    with report_stage("export", report):
        programs = export_programs(optimized, inputs)
    target.check(programs)
    key = _key(programs, target)
    with building(out, key, overwrite=overwrite, report=report) as work, torch.no_grad():
        lowered = target.lower(programs, work)
        manifest = manifest_of(programs, lowered, license)
        with report_stage("compare with the process", report):
            with OpenFolder(work.folder) as folder:
                files = ArtifactFiles(folder, work.list_files(manifest))
                runtime = target.open(files, programs.device, {})
            try:
                figures = tuple(_compare(programs, manifest, runtime))
            except BuildError:
                work.discard()
                raise
        return work.finish(replace(manifest, parity=figures))


aoti = partial(export, target="aoti")
onnx = partial(export, target="onnx")
tensorrt = partial(export, target="tensorrt")
triton = partial(export, target="triton")


def manifest_of(programs: Programs, lowered: Lowered, license: str) -> Manifest:
    """Everything but the parity and the checksums."""
    denoiser, specialization = programs.denoiser, programs.specialization
    captured = specialization.captured
    leaves = list(zip(programs.paths, programs.leaves, captured.inputs, strict=True))
    inputs = tuple(
        ArtifactInput(path, TensorSpec.of("_".join(path), leaf), raster_spec(spec.raster))
        for path, leaf, spec in leaves
        if isinstance(leaf, Tensor)
    )
    constants = tuple(
        Constant(path, leaf) for path, leaf, _ in leaves if not isinstance(leaf, Tensor)
    )
    timestep = specialization.roles.timestep
    used = {n for p in lowered.programs.values() for n in (*p.takes, *p.gives)}
    return Manifest(
        version=VERSION,
        target=lowered.target,
        device=lowered.device,
        model=type(denoiser.denoiser).__name__,
        model_config=_jsonable(dict(getattr(denoiser, "config", {}))),
        dtype=TensorSpec.of("", next(denoiser.denoiser.parameters())).dtype,
        license=_jsonable(license),
        plan=_jsonable(programs.plan.to_dict()),
        schedule=_schedule(programs, lowered.programs),
        parameters=denoiser.parameter_names,
        inputs=inputs,
        timestep=() if timestep is None else programs.paths[timestep],
        constants=constants,
        outputs=tuple(TensorSpec.of(name, x) for name, x in programs.outputs.items()),
        structure=_structure(captured.out_spec),
        kept=tuple(TensorSpec.of(name, x) for name, x in programs.kept.items() if name in used),
        older={a: b for a, b in programs.plan.older.items() if a in used and b in used},
        programs=lowered.programs,
        versions={"toma_fx": version("toma_fx"), "torch": torch.__version__, **lowered.versions},
        parity=(),
        files={},
    )


def _schedule(programs: Programs, lowered: Mapping[str, ProgramSpec]) -> Schedule:
    """Which kind is due when; for a kind that the target left out, what runs instead of it."""

    def kind_instead(kind: str) -> str:
        return kind if kind in lowered or kind not in programs else programs[kind].instead

    return programs.specialization.schedule.replacing(kind_instead)


def _compare(programs: Programs, manifest: Manifest, runtime: Runtime) -> Iterator[Parity]:
    """Some steps of a generation; every program takes part.

    Which of two nearly equal tokens stays depends on the last bit of a sum, and either is right. So
    the process computes every step with the patterns of the artifact, and these must merge all but
    few tokens as those of the process do.

    Raises:
        BuildError: outputs or patterns differ by more than the tolerance.
    """
    kept = dict[str, Tensor]()
    for step, kind in enumerate(_checked_kinds(manifest)):
        where = f"step {step} ({kind})"
        inputs = [perturb(x, seed=step) for x in programs.inputs.values()]
        outputs, gives = runtime.run(kind, inputs, kept)
        got = [x.clone() for x in outputs]
        expected, expected_gives = programs.run(kind, inputs, kept)
        kept = aged(kept, {name: x.clone() for name, x in gives.items()}, manifest.older)
        alike = 1.0
        reuse = _reusing(kind)
        values = {*programs.plan.signals, *programs.plan.new_updates}
        if not values.issuperset(gives) and reuse in programs:
            expected, more = programs.run(reuse, inputs, kept)
            expected_gives = {**expected_gives, **more}
            alike = _alike(programs, kept, {**kept, **expected_gives})
            limit = ALIKE.get(manifest.dtype, EXACTLY_ALIKE)
            if not alike >= limit:
                share = f"at least {limit:.0%} of the tokens merged alike"
                raise _mismatch(where, share, f"{alike:.1%}")
        for a, b, spec in zip(got, expected, manifest.outputs, strict=True):
            difference, limit = relative_difference(a, b), tolerance(b.dtype)
            if not difference <= limit:
                most = f"a difference of at most {limit:.0e} of the largest value"
                raise _mismatch(f"{where}, {spec.name}", most, f"{difference:.2g}")
            yield Parity(kind, difference, limit, alike)
        for name in values.intersection(gives):
            difference = relative_difference(gives[name], expected_gives[name])
            limit = UPDATES * tolerance(gives[name].dtype)
            if not difference <= limit:
                most = f"a difference of at most {limit:.0e} of the largest value"
                raise _mismatch(f"{where}, {name}", most, f"{difference:.2g}")


def _mismatch(where: str, expected: str, got: str) -> BuildError:
    return BuildError(
        "the artifact does not compute what the process computes",
        where=where,
        expected=expected,
        got=got,
        hint="please report this model and target; nothing was written",
    )


def _alike(programs: Programs, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Least share of the tokens of a group that two sets of patterns merge and unmerge alike."""
    dtype = next(programs.denoiser.denoiser.parameters()).dtype
    shares = [1.0]
    for group in programs.plan.all_groups:
        setting = group.setting
        if not all(group.tensor(part) in a for part in setting.parts):
            continue  # of a phase that has not begun
        size = group.batch, prod(setting.grid), PROBES
        random = torch.Generator().manual_seed(0)
        x = torch.randn(size, generator=random).to(dtype)
        results = []
        for tensors in (a, b):
            parts = {part: tensors[group.tensor(part)] for part in setting.parts}
            x = x.to(next(iter(parts.values())).device)
            results.append(setting.unmerge(setting.merge(x, parts), parts))
        distance = (results[0] - results[1]).abs().amax(-1)
        shares.append(float((distance <= NEAR * x.abs().max()).float().mean()))
    return min(shares)


def _reusing(kind: str) -> str:
    """The kind that computes with the patterns that `kind` selects."""
    return kind_in(REUSE, phase_of(kind))


def _checked_kinds(manifest: Manifest) -> list[str]:
    """Kinds of the first merged steps, and those that no such step runs."""
    first, caching = manifest.schedule.first_step, manifest.schedule.caching
    length = Length(LONGEST if caching is None else caching.horizon)
    kinds = manifest.kinds(first + CHECKED_STEPS, length)[first:]
    return kinds + [kind for kind in manifest.programs if kind not in kinds]


def _structure(spec: Any) -> Structure:
    """How the outputs are returned."""
    if spec.is_leaf():
        return Structure("tensor", ("0",))
    if spec.type in (tuple, list):
        return Structure(spec.type.__name__, tuple(map(str, range(spec.num_leaves))))
    names = spec.context if isinstance(spec.context, (list, tuple)) else range(spec.num_leaves)
    return Structure(getattr(spec.type, "__name__", "tuple"), tuple(map(str, names)))


def _jsonable(value: Any) -> Any:
    """A configuration as JSON values; of others (NaN and infinity too) their text."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    # a terminal may hand over what no text holds
    return json.loads(text.encode(errors="replace"), parse_constant=str)


def source_digest(folder: Path = Path(__file__).parents[1]) -> str:
    """SHA-256 of the package's source: builds of other code don't share stages."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _key(programs: Programs, target: Target) -> str:
    """Digest of all that a build depends on: finished stages of another key are not used."""
    digest = hashlib.sha256()
    specs = [TensorSpec.of(name, x) for name, x in programs.inputs.items()]
    parts = (source_digest(), torch.__version__, repr(target), specs, programs.plan.to_dict())
    digest.update(repr(parts).encode())
    for name, x in programs.denoiser.denoiser.state_dict().items():
        digest.update(name.encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

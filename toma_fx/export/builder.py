"""Build an artifact: export the programs, lower them, compare with the process, publish."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toma_fx.capture.parity import perturb, relative_difference, tolerance
from toma_fx.errors import BuildError, ConfigError
from toma_fx.export.building import OnStage, building, ignore, report_stage
from toma_fx.export.checks import CALL_NAME
from toma_fx.export.destination import check_output
from toma_fx.export.folder import OpenFolder
from toma_fx.export.manifest import (
    VERSION,
    ArtifactInput,
    CallSpec,
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
from toma_fx.run.calls import calls_of
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
    names: Sequence[str] = (),
    overwrite: bool = False,
    license: str = "",
    report: OnStage = ignore,
    **options: Any,
) -> Manifest:
    """Make an artifact of an optimized denoiser: a folder that runs without the model.

    Args:
        optimized: what `toma_fx.optimize` returned. inputs: a call, whose shapes, dtypes and
            constants the artifact is for; or a list of calls, of several sizes, say.
        out: folder to make. target: "onnx", "aoti", "tensorrt", "triton", or a target of
            your own.
        names: of the calls, as "832x1216", in letters and digits; by default "call0", "call1".
        overwrite: whether an artifact there is replaced, once the new one is done.
        license: note on the model's license, for the manifest.
        report: called with every stage, as it begins and as it ends.
        options: of the target, as fields of `ONNXTarget`, `AOTITarget`, `TensorRTTarget` and
            `TritonTarget`.

    Returns:
        The manifest.

    Raises:
        UnknownNameError: no such target, or no such option of it. ConfigError: a value that an
            option can't have, calls that are alike, or several of a target that takes one.
        MissingPackageError: the target needs a package.
        BuildError: the folder can't be used, or the artifact computes something else than the
            process (nothing is left of it then).
        DynamicError, ModelTypeError, SignatureError: see `export_programs`.
    """
    target = make_target(target, options)
    out = check_output(out, overwrite)
    given = calls_of(inputs)
    names = call_names(names, len(given))
    target.check_calls(len(given))
    target.check_installed()
    calls = _export_calls(optimized, given, names, report)
    for programs in calls:
        target.check(programs)
    key = _key(calls, target)
    with building(out, key, overwrite=overwrite, report=report) as work, torch.no_grad():
        lowered = target.lower(calls, work)
        manifest = manifest_of(calls, names, lowered, license)
        with report_stage("compare with the process", report):
            with OpenFolder(work.folder) as folder:
                files = ArtifactFiles(folder, work.list_files(manifest))
                runtime = target.open(files, calls[0].device, {})
            try:
                compared = tuple(_compared(calls, manifest, runtime))
            except BuildError:
                work.discard()
                raise
        return work.finish(replace(manifest, calls=compared))


aoti = partial(export, target="aoti")
onnx = partial(export, target="onnx")
tensorrt = partial(export, target="tensorrt")
triton = partial(export, target="triton")


def call_names(names: Sequence[str], count: int) -> tuple[str, ...]:
    """Names of so many calls: those given, or numbers.

    Raises:
        ConfigError: another number of names, one twice, or one that can't be part of a file's.
    """
    given = names if isinstance(names, (list, tuple)) else [names]  # a text is one name
    chosen = tuple(given) or tuple(f"call{i}" for i in range(count))
    fitting = all(isinstance(name, str) and CALL_NAME.fullmatch(name) for name in chosen)
    if not fitting or len({*chosen}) != count or len(chosen) != count:
        raise ConfigError(
            "no names for the calls of an artifact",
            where="names",
            expected=f"{count}, each once, of letters and digits, as '832x1216'",
            got=repr(names),
        )
    return chosen


def _export_calls(
    optimized: Any, given: Sequence[Any], names: Sequence[str], report: OnStage
) -> list[Programs]:
    """The programs of every call.

    Raises:
        ConfigError: two calls are alike.
    """
    if len(given) == 1:
        with report_stage("export", report):
            return [export_programs(optimized, given[0])]
    calls, known = list[Programs](), dict[Any, str]()
    for call, name in zip(given, names, strict=True):
        with report_stage(f"export {name}", report):
            programs = replace(export_programs(optimized, call), call=name)
        other = known.setdefault(
            (frozenset(_inputs(programs)), frozenset(_constants(programs))), name
        )
        if other != name:
            raise ConfigError(
                "two calls are alike",
                where="inputs",
                expected="calls that differ in shapes, dtypes, constants or positions",
                got=f"{other} and {name}, which don't",
            )
        calls.append(programs)
    return calls


def manifest_of(
    calls: Sequence[Programs], names: Sequence[str], lowered: Lowered, license: str
) -> Manifest:
    """Everything but the parity and the checksums."""
    denoiser = calls[0].denoiser
    return Manifest(
        version=VERSION,
        target=lowered.target,
        device=lowered.device,
        model=type(denoiser.denoiser).__name__,
        model_config=_jsonable(dict(getattr(denoiser, "config", {}))),
        dtype=TensorSpec.of("", next(denoiser.denoiser.parameters())).dtype,
        license=_jsonable(license),
        parameters=denoiser.parameter_names,
        calls=tuple(map(_call_spec, calls, names, lowered.programs)),
        versions={"toma_fx": version("toma_fx"), "torch": torch.__version__, **lowered.versions},
        files={},
    )


def _call_spec(programs: Programs, name: str, lowered: Mapping[str, ProgramSpec]) -> CallSpec:
    """What the manifest says of a call, but for the parity."""
    timestep = programs.specialization.roles.timestep
    used = {n for p in lowered.values() for n in (*p.takes, *p.gives)}
    return CallSpec(
        name=name,
        plan=_jsonable(programs.plan.to_dict()),
        schedule=_schedule(programs, lowered),
        inputs=_inputs(programs),
        timestep=() if timestep is None else programs.paths[timestep],
        constants=_constants(programs),
        outputs=tuple(TensorSpec.of(name, x) for name, x in programs.outputs.items()),
        structure=_structure(programs.specialization.captured.out_spec),
        kept=tuple(TensorSpec.of(name, x) for name, x in programs.kept.items() if name in used),
        older={a: b for a, b in programs.plan.older.items() if a in used and b in used},
        programs=lowered,
        parity=(),
    )


def _inputs(programs: Programs) -> tuple[ArtifactInput, ...]:
    """The tensors of the call."""
    specs = programs.specialization.captured.inputs
    return tuple(
        ArtifactInput(path, TensorSpec.of("_".join(path), leaf), raster_spec(spec.raster))
        for path, leaf, spec in zip(programs.paths, programs.leaves, specs, strict=True)
        if isinstance(leaf, Tensor)
    )


def _constants(programs: Programs) -> tuple[Constant, ...]:
    """What the call has beside tensors."""
    leaves = zip(programs.paths, programs.leaves, strict=True)
    return tuple(Constant(path, leaf) for path, leaf in leaves if not isinstance(leaf, Tensor))


def _schedule(programs: Programs, lowered: Mapping[str, ProgramSpec]) -> Schedule:
    """Which kind is due when; for a kind that the target left out, what runs instead of it."""

    def kind_instead(kind: str) -> str:
        return kind if kind in lowered or kind not in programs else programs[kind].instead

    return programs.specialization.schedule.replacing(kind_instead)


def _compared(
    calls: Sequence[Programs], manifest: Manifest, runtime: Runtime
) -> Iterator[CallSpec]:
    """The calls of the manifest, with the parity of each."""
    for i, (programs, call) in enumerate(zip(calls, manifest.calls, strict=True)):
        yield replace(call, parity=tuple(_compare(programs, manifest, i, runtime)))


def _compare(
    programs: Programs, manifest: Manifest, place: int, runtime: Runtime
) -> Iterator[Parity]:
    """Some steps of a generation; every program takes part.

    Which of two nearly equal tokens stays depends on the last bit of a sum, and either is right. So
    the process computes every step with the patterns of the artifact, and these must merge all but
    few tokens as those of the process do.

    Raises:
        BuildError: outputs or patterns differ by more than the tolerance.
    """
    kept, call = dict[str, Tensor](), manifest.calls[place]
    for step, kind in enumerate(_checked_kinds(call)):
        where = f"step {step} ({programs.label(kind)})"
        inputs = [perturb(x, seed=step) for x in programs.inputs.values()]
        outputs, gives = runtime.run(place, kind, inputs, kept)
        got = [x.clone() for x in outputs]
        expected, expected_gives = programs.run(kind, inputs, kept)
        kept = aged(kept, {name: x.clone() for name, x in gives.items()}, call.older)
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
        for a, b, spec in zip(got, expected, call.outputs, strict=True):
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


def _checked_kinds(call: CallSpec) -> list[str]:
    """Kinds of the first merged steps, and those that no such step runs."""
    first, caching = call.schedule.first_step, call.schedule.caching
    length = Length(LONGEST if caching is None else caching.horizon)
    kinds = call.kinds(first + CHECKED_STEPS, length)[first:]
    return kinds + [kind for kind in call.programs if kind not in kinds]


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


def _key(calls: Sequence[Programs], target: Target) -> str:
    """Digest of all that a build depends on: finished stages of another key are not used."""
    digest = hashlib.sha256()
    specs = [(each.call, _inputs(each), _constants(each), each.plan.to_dict()) for each in calls]
    digest.update(repr((source_digest(), torch.__version__, repr(target), specs)).encode())
    for name, x in calls[0].denoiser.denoiser.state_dict().items():
        digest.update(name.encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

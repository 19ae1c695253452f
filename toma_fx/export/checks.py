"""What must be true of a manifest beyond its form: no field contradicts another.

Programs are native code and read memory by what the manifest says, so that nothing here may be
left to them. Imports no torch: `toma-fx info` reads manifests without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import PurePosixPath

from toma_fx.errors import ArtifactError, ConfigError, GenerationError
from toma_fx.export.manifest import (
    ArtifactInput,
    CallSpec,
    FileSpec,
    Manifest,
    ProgramSpec,
    TensorSpec,
)
from toma_fx.methods.cached_steps import POLICIES, CachedSteps, is_step_count
from toma_fx.run.schedule import Schedule, kinds_that_run

SIZES = {
    **{"bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8},
    **{"uint16": 2, "uint32": 4, "uint64": 8, "complex64": 8, "complex128": 16},
    **{"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8},
    **{"float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1},
}
"""Bytes of an element by dtype: those that tensors of programs and weights may have."""
LARGEST_TENSOR, LARGEST_FILE = 1 << 40, 1 << 50
"""Bytes."""
PACKAGE_SUFFIX = ".pt2"
"""Of packages of compiled programs, whose entries the manifest lists."""
MOST_STEPS = 100_000
"""Steps that a schedule may speak of."""
MOST_TENSORS, MOST_CALLS, LONGEST_NAME, LONGEST_PATH = 10_000, 1000, 255, 1024
CALL_NAME = re.compile("[A-Za-z0-9]{1,64}")
"""Names of calls: programs of several calls have them in their own names, before a "_"."""
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_WORD = re.compile(r"\w+", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}")

Trouble = tuple[str, str, str]
"""Field, what would be right, what is there."""


def check_manifest(manifest: Manifest, where: str) -> None:
    """Passes if the fields agree with each other and with what programs can be.

    Args:
        where: path of the manifest, for messages.

    Raises:
        ArtifactError: names the first field that does not.
    """
    for rule in RULES:
        for field, expected, got in rule(manifest):
            raise malformed(f"{where}: {field}", expected, got)
    for call in manifest.calls:
        for call_rule in CALL_RULES:
            for field, expected, got in call_rule(call):
                raise malformed(f"{where}: calls.{call.name}.{field}", expected, got)


def malformed(where: str, expected: str, got: str) -> ArtifactError:
    """The error for a manifest that is not of the form that its version has."""
    return ArtifactError(
        "the manifest is not of the form that its version has",
        where=where,
        expected=expected,
        got=got[:200],
        hint="the artifact is damaged or was edited: build it anew",
    )


def _files(manifest: Manifest) -> Iterator[Trouble]:
    for name, spec in manifest.files.items():
        parts = PurePosixPath(name).parts
        plain = all(_FILE.fullmatch(part) and len(part) <= LONGEST_NAME for part in parts)
        if not parts or "/".join(parts) != name or len(name) > LONGEST_PATH or not plain:
            yield "files", "names of letters, digits, '.', '_', '-', not outside", repr(name)
        if not (0 <= spec.size <= LARGEST_FILE and _DIGEST.fullmatch(spec.sha256)):
            yield f"files.{name}", "a size in bytes and a SHA-256", repr(spec)
        yield from _entries(name, spec)


def _entries(name: str, spec: FileSpec) -> Iterator[Trouble]:
    if (spec.entries is not None) != name.endswith(PACKAGE_SUFFIX):
        yield f"files.{name}.entries", "a list for packages, and for them alone", repr(spec.entries)
    sizes = (spec.entries or {}).values()
    if any(size < 0 for size in sizes) or sum(sizes) > spec.size:
        yield f"files.{name}.entries", "sizes that fit into the file", str(sum(sizes))


def _device(manifest: Manifest) -> Iterator[Trouble]:
    if not re.fullmatch("[a-z]{1,20}", manifest.device.type):
        yield "device.type", "the kind of a device, as cpu or cuda", repr(manifest.device.type)
    if manifest.dtype not in SIZES:
        yield "dtype", "a dtype of torch", repr(manifest.dtype)


def _calls(manifest: Manifest) -> Iterator[Trouble]:
    calls = manifest.calls
    if not 0 < len(calls) <= MOST_CALLS or sum(1 for _ in manifest.tensors) > MOST_TENSORS:
        yield "calls", f"1 to {MOST_CALLS}, of at most {MOST_TENSORS} tensors", str(len(calls))
        return
    for call in calls:
        if not CALL_NAME.fullmatch(call.name):
            yield "calls", "names of letters and digits", repr(call.name)
    yield from _unique("calls", [call.name for call in calls])
    if len({call.signature for call in calls}) != len(calls):
        yield "calls", "calls that differ in their inputs or constants", "two that do not"
    yield from _unique("parameters", manifest.parameters)
    programs = [program for call in calls for program in call.programs.values()]
    for program in programs:
        if program.file not in manifest.files:
            yield "calls.programs.file", "programs in files that are listed", program.file
    yield from _unique("calls.programs", [(p.file, p.entry) for p in programs])


def _tensors(call: CallSpec) -> Iterator[Trouble]:
    specs = (*(spec.tensor for spec in call.inputs), *call.outputs, *call.kept)
    for spec in specs:
        yield from _tensor(f"tensor {spec.name}", spec)
    yield from _unique("inputs, outputs and kept", [spec.name for spec in specs])


def _tensor(field: str, spec: TensorSpec) -> Iterator[Trouble]:
    if not spec.name:
        yield field, "a name", repr(spec.name)
    if spec.dtype not in SIZES:
        yield field, "a dtype of torch", repr(spec.dtype)
    elif any(n < 0 for n in spec.shape) or len(spec.shape) > 64:
        yield field, "a shape", str(spec.shape)
    elif math.prod(max(n, 1) for n in spec.shape) * SIZES[spec.dtype] > LARGEST_TENSOR:
        yield field, f"at most {LARGEST_TENSOR} bytes", f"{spec.shape} {spec.dtype}"


def _arguments(call: CallSpec) -> Iterator[Trouble]:
    inputs, constants = call.inputs, call.constants
    for spec in inputs:
        if not spec.path or spec.tensor.name != "_".join(spec.path):
            yield "inputs", "a tensor that is named by its path", f"{spec.path} {spec.tensor.name}"
        yield from _raster(spec)
    paths = [*(spec.path for spec in inputs), *(constant.path for constant in constants)]
    if not all(paths):
        yield "constants", "a path", "none"
    yield from _unique("inputs and constants", paths)
    if call.timestep and call.timestep not in [spec.path for spec in inputs]:
        yield "timestep", "the path of an input", str(call.timestep)


def _raster(spec: ArtifactInput) -> Iterator[Trouble]:
    if spec.raster is None:
        return
    heights, width, after, before = spec.raster
    tokens = sum(heights) * width + after + before
    if not heights or min(*heights, width) < 1 or min(after, before) < 0:
        yield f"inputs.{spec.tensor.name}.raster", "a grid of tokens", str(spec.raster)
    elif tokens not in spec.tensor.shape:
        yield f"inputs.{spec.tensor.name}.raster", f"tokens of {spec.tensor.shape}", str(tokens)


def _results(call: CallSpec) -> Iterator[Trouble]:
    count, structure = len(call.outputs), call.structure
    names = tuple(spec.name for spec in call.outputs)
    if not count or names != tuple(f"output_{i}" for i in range(count)):
        yield "outputs", "output_0, output_1, ...", str(names)
    numbers = tuple(map(str, range(count)))
    named = structure.kind not in ("tensor", "tuple", "list")
    if len(structure.fields) != count or (structure.kind == "tensor" and count != 1):
        yield "structure", f"a field for each of {count} outputs", str(structure)
    elif not named and structure.fields != numbers:
        yield "structure.fields", str(numbers), str(structure.fields)
    if not all(_WORD.fullmatch(word) for word in (structure.kind, *structure.fields)):
        yield "structure", "names", str(structure)
    yield from _unique("structure.fields", structure.fields)


def _programs(call: CallSpec) -> Iterator[Trouble]:
    kept = {spec.name: spec for spec in call.kept}
    used: set[str] = set()
    for kind, program in call.programs.items():
        if not _WORD.fullmatch(kind):
            yield "programs", "names of kinds", repr(kind)
        for field, names in (("takes", program.takes), ("gives", program.gives)):
            yield from _known(f"programs.{kind}.{field}", names, kept)
            yield from _unique(f"programs.{kind}.{field}", names)
            used |= {*names}
        yield from _instead(kind, call.programs)
    yield from _known("kept", kept, used)
    for newer, older in call.older.items():
        yield from _known("older", [newer, older], kept)
        a, b = (kept.get(name) for name in (newer, older))
        if newer == older or (a and b and (a.shape, a.dtype) != (b.shape, b.dtype)):
            yield f"older.{newer}", "another kept tensor of the same shape", older
    yield from _unique("older", [*call.older.values()])


def _instead(kind: str, programs: Mapping[str, ProgramSpec]) -> Iterator[Trouble]:
    """What runs instead of a program ends at one that takes nothing."""
    tried = [kind]
    while programs[tried[-1]].takes:
        other = programs[tried[-1]].instead
        yield from _known(f"programs.{kind}.instead", [other], {*programs} - {*tried})
        tried.append(other)


def _schedule(call: CallSpec) -> Iterator[Trouble]:
    schedule = call.schedule
    begins = [phase.begin for phase in schedule.phases]
    steps = (schedule.first_step, schedule.last_step or 0, *begins)
    if not all(is_step_count(n) and n <= MOST_STEPS for n in steps) or begins[:1] != [0]:
        yield "schedule", f"steps from 0 to {MOST_STEPS}, or shares", str(schedule)
    elif any(type(a) is type(b) and a >= b for a, b in pairwise(begins)):
        yield "schedule.phases", "one after the other", str(begins)
    elif not all(phase.cycle for phase in schedule.phases):
        yield "schedule.phases", "kinds that repeat", "none"
    elif schedule.caching is not None and (trouble := _caching(schedule.caching)):
        yield "schedule.caching", trouble, str(schedule.caching)
    else:
        yield from _kinds(call, schedule)


def _caching(caching: CachedSteps) -> str:
    """What would be right, or nothing if it is."""
    ways = (caching.mask, caching.policy, caching.share)
    if sum(way is not None for way in ways) > 1:
        return "one of mask, policy and share"
    if caching.mask is not None and not (
        0 < len(caching.mask) <= MOST_STEPS and {*caching.mask} <= {0, 1} and caching.mask[0]
    ):
        return "a mask of 0 and 1 that begins with 1"
    if caching.policy is not None and caching.policy not in POLICIES:
        return "one of " + ", ".join(POLICIES)
    if caching.share is not None and not 0 < caching.share <= 1:
        return "a share of the steps"
    if not all(is_step_count(n) for n in (caching.warmup_steps, caching.last_steps)):
        return "numbers of steps, or shares"
    counts = (caching.every, caching.warmup_interval, caching.most, caching.steps)
    if not all(n is None or 1 <= n <= MOST_STEPS for n in counts) or caching.threshold is not None:
        return "numbers of steps, and no threshold"
    return ""


def _kinds(call: CallSpec, schedule: Schedule) -> Iterator[Trouble]:
    """Every kind that some step runs must be there, and every program must be of such a kind."""
    try:
        ran = kinds_that_run(call, schedule)
    except KeyError as error:
        yield "programs", f"a program of the kind {error}", ", ".join(call.programs)
    except (ConfigError, GenerationError) as error:
        yield "schedule", "kinds that can run", str(error)
    else:
        yield from _known("schedule", sorted(ran), call.programs)


def _parity(call: CallSpec) -> Iterator[Trouble]:
    for figure in call.parity:
        yield from _known("parity", [figure.kind], call.programs)
        if not (0 <= figure.relative <= figure.tolerance <= 1 and 0 <= figure.alike <= 1):
            yield "parity", "differences within their tolerance", str(figure)


RULES: Sequence[Callable[[Manifest], Iterator[Trouble]]] = (_files, _device, _calls)
CALL_RULES: Sequence[Callable[[CallSpec], Iterator[Trouble]]] = (
    _tensors, _arguments, _results, _programs, _schedule, _parity
)  # fmt: skip


def _known(field: str, names: Collection[str], known: Collection[str]) -> Iterator[Trouble]:
    for name in names:
        if name not in known:
            yield field, "one of " + (", ".join(known) or "nothing"), repr(name)


def _unique(field: str, values: Sequence[object]) -> Iterator[Trouble]:
    if len({*values}) != len(values):
        twice = next(x for x in values if values.count(x) > 1)
        yield field, "each once", f"{twice} twice"

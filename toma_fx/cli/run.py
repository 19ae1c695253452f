"""`toma-fx run`: run an artifact on random or given inputs, and time it."""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from toma_fx.capture.grids import find_raster
from toma_fx.cli.text import bytes_text, print_json
from toma_fx.errors import ArtifactError, ConfigError
from toma_fx.export.calls import nest_arguments
from toma_fx.export.loader import load
from toma_fx.export.manifest import ArtifactInput, CallSpec, Manifest, raster_spec


def run_artifact(args: argparse.Namespace, options: dict[str, Any], console: Console) -> None:
    """Time the steps of a generation; the first generation warms up."""
    tensors = _read_tensors(args.inputs) if args.inputs else {}
    if args.outputs:
        _check_kind(args.outputs)
    settings: dict[str, Any] = {}
    if args.providers is not None:
        settings["providers"] = args.providers.split(",")
    if args.threads is not None:
        settings["threads"] = args.threads
    if args.size and args.inputs:
        raise ConfigError(
            "inputs have a size of their own", where="--size", expected="--size or --inputs",
            got="both",
        )  # fmt: skip
    start = time.perf_counter()
    denoiser = load(args.path, device=args.device, trust=args.trust, **settings)
    loaded = time.perf_counter() - start
    spec = _chosen(denoiser.manifest, args.size, tensors)
    call = arguments_for(spec, tensors)
    timestep = call.get("timestep") if not args.inputs else None
    times, outputs = defaultdict[str, list[float]](list), None
    kinds = spec.kinds(args.steps)
    for rounds in range(2):  # the first round warms up
        with denoiser.generation(steps=args.steps) as generation:
            for step, program in enumerate(kinds):
                if timestep is not None:
                    call["timestep"] = (timestep * (1 - step / args.steps)).to(timestep.dtype)
                generation.step(step)
                start = time.perf_counter()
                outputs = denoiser(**call)
                if denoiser.device.type == "cuda":
                    torch.cuda.synchronize(denoiser.device)
                if rounds:
                    times[program].append(1000 * (time.perf_counter() - start))
    if args.outputs:
        _write_tensors(args.outputs, _named_outputs(outputs))
    if args.json:
        about = {"device": str(denoiser.device), "size": spec.name, "load_s": loaded}
        print_json({**about, "peak_bytes": _peak_memory(), "step_ms": times})
    else:
        title = f"time a step of {spec.name}" if len(denoiser.manifest.calls) > 1 else "time a step"
        _print_times(title, times, loaded, denoiser.device, console)


def _chosen(manifest: Manifest, name: str | None, tensors: Mapping[str, Tensor]) -> CallSpec:
    """The call of the artifact that is meant: by its name, by the inputs' shapes, or the first.

    Raises:
        ConfigError: the artifact has none of that name.
    """
    calls = {call.name: call for call in manifest.calls}
    if name is not None and name not in calls:
        raise ConfigError(
            "the artifact has no such size", where="--size", expected=", ".join(calls), got=name
        )
    shapes = {x: tuple(tensor.shape) for x, tensor in tensors.items()}
    fitting = (
        call
        for call in calls.values()
        if {spec.tensor.name: spec.tensor.shape for spec in call.inputs} == shapes
    )
    # inputs that fit none are refused by what they are given to
    return calls[name] if name is not None else next(fitting, manifest.calls[0])


def arguments_for(call: CallSpec, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of a step, nested as the model takes them.

    Args:
        call: of an artifact. tensors: inputs by their names in the programs; if none,
            random values, and the positions that the programs are for.

    Raises:
        ConfigError: some inputs are given, but not all, or others.
    """
    names = [spec.tensor.name for spec in call.inputs]
    if tensors and set(tensors) != set(names):
        raise ConfigError(
            "the inputs are not those of the artifact",
            where="--inputs",
            expected=", ".join(names),
            got=", ".join(sorted(tensors)),
        )
    random = torch.Generator().manual_seed(0)
    given = tensors or {spec.tensor.name: _random(spec, random) for spec in call.inputs}
    return nest_arguments(call, given)


def _random(spec: ArtifactInput, random: torch.Generator) -> Tensor:
    """A value for an input."""
    shape, dtype = spec.tensor.shape, getattr(torch, spec.tensor.dtype)
    if spec.raster is not None:
        return _positions(spec).to(dtype)
    if spec.path == ("timestep",):
        return torch.full(shape, 999 if not dtype.is_floating_point else 1.0).to(dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=random).to(dtype)
    return torch.ones(shape, dtype=dtype)


def _positions(spec: ArtifactInput) -> Tensor:
    """Position ids that enumerate the grid of an input.

    Raises:
        ArtifactError: they have a form that is not known here.
    """
    assert spec.raster is not None
    heights, width, rest, before = spec.raster
    rows = [
        (i + 1, y, x)
        for i, height in enumerate(heights)
        for y in range(height)
        for x in range(width)
    ]
    every = [(0, 0, 0)] * before + rows + [(0, 0, 0)] * rest
    columns = spec.tensor.shape[-1]
    ids = torch.zeros(spec.tensor.shape)
    if ids.shape[-2:] == (len(every), columns) and columns >= 3:
        ids[..., :3] = torch.tensor(every, dtype=ids.dtype)
        if raster_spec(find_raster(ids)) == spec.raster:
            return ids
    raise ArtifactError(
        "no position ids can be generated for this artifact",
        where="_".join(spec.path),
        expected=f"ids of a grid {spec.raster}",
        hint="give your own with --inputs",
    )


def _print_times(
    title: str,
    times: Mapping[str, list[float]],
    loaded: float,
    device: torch.device,
    console: Console,
) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for name in ("program", "steps", "median", "fastest", "slowest"):
        table.add_column(name, justify="left" if name == "program" else "right")
    for program, ms in times.items():
        figures = (f"{f(ms):.1f} ms" for f in (statistics.median, min, max))
        table.add_row(program, str(len(ms)), *figures)
    console.print(table)
    text = f"loaded in {loaded:.1f} s; peak memory of this process {bytes_text(_peak_memory())}"
    if device.type == "cuda":
        text += f", of torch on the GPU {bytes_text(torch.cuda.max_memory_allocated(device))}"
    console.print(text, highlight=False, soft_wrap=True)


def _peak_memory() -> int:
    """The most bytes that this process ever held."""
    import resource  # which Windows lacks; the other commands work there

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name.

    Raises:
        ConfigError: the file can't be read.
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _check_kind(path)
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # NumPy leaves a file open that it can't read
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, BadZipFile, SafetensorError) as error:
        raise ConfigError(
            "the inputs can't be read",
            where=str(path),
            expected="tensors by name",
            got=f"{type(error).__name__}: {error}",
        ) from error


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    _check_kind(path)
    try:
        if path.suffix == ".safetensors":
            save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, path)
        else:
            named: dict[str, Any] = {name: x.float().cpu().numpy() for name, x in tensors.items()}
            np.savez(path, **named)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            "the outputs can't be written", where=str(path), got=f"{type(error).__name__}: {error}"
        ) from error


def _check_kind(path: Path) -> None:
    if path.suffix not in (".npz", ".safetensors"):
        raise ConfigError(
            "unknown kind of file",
            where=str(path),
            expected="a name that ends in .npz or .safetensors",
            got=path.suffix or "no ending",
        )


def _named_outputs(outputs: Any) -> dict[str, Tensor]:
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return {f"output_{i}": x for i, x in enumerate(values)}

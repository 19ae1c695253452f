"""Files of an AOTInductor artifact: the package and its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor

from toma_fx.compat.compilers import package_programs
from toma_fx.errors import BuildError
from toma_fx.export.programs import Programs
from toma_fx.export.to_aoti.package import IO, PACKAGE, SPECS, specs_text

WEIGHTS = "weights.safetensors"
PARTS = "parts"
"""Folder of intermediate files, removed when the build ends."""


def part_files(label: str) -> tuple[str, str]:
    """Files of the stage of one program: compiled code and constants."""
    return f"{PARTS}/{label}.zip", f"{PARTS}/{label}.safetensors"


def save_part(path: Path, files: Sequence[str]) -> None:
    """Keep the files of a compiled program."""
    path.parent.mkdir(exist_ok=True)
    with ZipFile(path, "w") as archive:
        for file in files:
            archive.write(file, Path(file).name)


def join_parts(folder: Path, parts: Mapping[str, str], specs: Mapping[str, IO]) -> None:
    """Make the package of all programs.

    Args:
        folder: of the artifact. parts: by program, the file that `save_part` wrote. specs: by
            program, what it takes and gives.
    """
    files: dict[str, list[str]] = {}
    for label, part in parts.items():
        with ZipFile(folder / part) as archive:
            archive.extractall(folder / PARTS / label)
            files[label] = [str(folder / PARTS / label / name) for name in archive.namelist()]
    package = BytesIO()  # torch's writer of files ends the process when the disk is full
    package_programs(package, files)
    with ZipFile(package, "a") as archive:
        archive.writestr(SPECS, specs_text(specs))
    (folder / PACKAGE).write_bytes(package.getbuffer())


def weights_of(programs: Programs) -> dict[str, Tensor]:
    """Parameters and buffers of the model by name."""
    return {name: x.detach() for name, x in programs.denoiser.denoiser.state_dict().items()}


def _memory(x: Tensor) -> tuple[Any, ...]:
    """Key that is equal for two tensors of the same memory and layout."""
    return x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, x.device


def names_by_memory(state: Mapping[str, Tensor]) -> dict[tuple[Any, ...], str]:
    """The first name of every weight; tied weights have several."""
    names: dict[tuple[Any, ...], str] = {}
    for name, x in state.items():
        names.setdefault(_memory(x), name)
    return names


def save_constants(
    path: Path,
    constants: Mapping[str, Tensor],
    names: Mapping[tuple[Any, ...], str],
    device: torch.device,
) -> None:
    """Save which weight each constant of a program is, and the values of those that are none.

    Args:
        path: file to write. constants: by their names in the program. names: of weights, by memory.
        device: of the program.

    Raises:
        BuildError: a constant has no plain memory.
    """
    sources, own = {}, {}
    for name, x in constants.items():
        if x.is_mkldnn or type(x.data) is not Tensor:
            raise BuildError(
                "a constant is no plain tensor",
                where=name,
                got=f"{type(x.data).__name__}, {x.layout}",
                hint="leave Inductor's options as they are",
            )
        sources[name] = names.get(_memory(x), "")
        if not sources[name]:
            own[name] = x.detach()
    save_tensors(path, own, {"sources": json.dumps(sources)}, device)


def save_weights(folder: Path, calls: Sequence[Programs]) -> None:
    """Write every weight that a program uses once, and constants that are no weights."""
    from safetensors import safe_open

    state, device = weights_of(calls[0]), calls[0].device
    stored: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for label in (programs.label(kind) for programs in calls for kind in programs):
        with safe_open(folder / part_files(label)[1], "pt") as part:
            sources = json.loads(part.metadata()["sources"])
            for name, source in sources.items():
                if source:
                    stored[source] = state[source]
                else:
                    value = _tensor(part, name, device)
                    source = _same(constants, value) or f"constant.{len(constants)}"
                    constants[source] = value
                if source != name:
                    metadata[f"alias/{label}/{name}"] = source
    save_tensors(folder / WEIGHTS, {**stored, **constants}, metadata, device)


def _same(known: Mapping[str, Tensor], x: Tensor) -> str | None:
    """Name of a constant of the same value and layout."""
    for name, y in known.items():
        if _memory(x)[1:] == _memory(y)[1:] and torch.equal(x, y):
            return name
    return None


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], device: torch.device
) -> None:
    """Write tensors of programs on `device`, those not contiguous as their memory lies."""
    from safetensors.torch import save_file

    header, flat = dict(metadata), {}
    for name, x in tensors.items():
        if x.device.type != device.type:
            header[f"host/{name}"] = ""
        if not x.is_contiguous():
            header[f"strided/{name}"] = json.dumps([list(x.shape), list(x.stride())])
            x = x.as_strided((_span(x),), (1,))
        flat[name] = x.cpu()
    save_file(flat, path, metadata=header or None)
    path.chmod(0o644)  # safetensors leaves it to its owner alone


def _span(x: Tensor) -> int:
    """Elements of memory from the first of a tensor to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _tensor(file: Any, name: str, device: torch.device) -> Tensor:
    """A tensor of an open weights file, where and with the strides that it had."""
    x: Tensor = file.get_tensor(name)
    metadata = file.metadata() or {}
    if strided := metadata.get(f"strided/{name}"):
        x = x.as_strided(*json.loads(strided))
    return x if f"host/{name}" in metadata else x.to(device)


def load_weights(
    path: str | Path, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Open a weights file: (tensors by name, names by "program/constant" where they differ)."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: _tensor(file, name, device) for name in file.keys()}  # noqa: SIM118
    aliases = {
        key.removeprefix("alias/"): name
        for key, name in metadata.items()
        if key.startswith("alias/")
    }
    return tensors, aliases

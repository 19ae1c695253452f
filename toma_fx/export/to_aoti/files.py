"""Files of an AOTInductor artifact: the package and its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toma_fx.errors import BuildError
from toma_fx.export.programs import Programs

PACKAGE = "programs.pt2"


WEIGHTS = "weights.safetensors"


PARTS = "parts"
"""Folder of what is made on the way, gone when the build ends."""


def _part(call: str) -> tuple[str, str]:
    """Files of one program's stage."""
    return f"{PARTS}/{call}.pt2", f"{PARTS}/{call}.safetensors"


def _package(folder: Path, parts: Mapping[str, str]) -> None:
    """Join packages of one program each."""
    from torch.export.pt2_archive._package import PT2ArchiveReader, PT2ArchiveWriter
    from torch.export.pt2_archive.constants import AOTINDUCTOR_DIR

    with PT2ArchiveWriter(str(folder / PACKAGE)) as writer:
        for call, part in parts.items():
            with PT2ArchiveReader(str(folder / part)) as reader:
                for name in reader.get_file_names():
                    if name.startswith(f"{AOTINDUCTOR_DIR}{call}/"):
                        writer.write_bytes(name, reader.read_bytes(name))


# -- weights ----------------------------------------------------------------------------------


def _state(programs: Programs) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in programs.denoiser.denoiser.state_dict().items()}


def _memory(x: Tensor) -> tuple[Any, ...]:
    """What two tensors that are the same have in common."""
    return x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, x.device


def _by_memory(state: Mapping[str, Tensor]) -> dict[tuple[Any, ...], str]:
    """The first name of every weight; tied weights have several."""
    found: dict[tuple[Any, ...], str] = {}
    for name, x in state.items():
        found.setdefault(_memory(x), name)
    return found


def _save_constants(
    path: Path,
    given: Mapping[str, Tensor],
    known: Mapping[tuple[Any, ...], str],
    device: torch.device,
) -> None:
    """Write down which weight each constant of a program is, and the values of those that are none.

    Raises:
        BuildError: a constant has no plain memory.
    """
    sources, own = {}, {}
    for name, x in given.items():
        if x.is_mkldnn or type(x.data) is not Tensor:
            raise BuildError(
                "a constant is no plain tensor",
                where=name,
                got=f"{type(x.data).__name__}, {x.layout}",
                hint="leave Inductor's options as they are",
            )
        sources[name] = known.get(_memory(x), "")
        if not sources[name]:
            own[name] = x.detach()
    _save(path, own, {"sources": json.dumps(sources)}, device)


def _save_weights(folder: Path, programs: Programs) -> None:
    """Write every weight that a program uses once, and constants that are no weights."""
    from safetensors import safe_open

    state = _state(programs)
    stored: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for call in programs:
        with safe_open(folder / _part(call)[1], "pt") as part:
            sources = json.loads(part.metadata()["sources"])
            for name, source in sources.items():
                if source:
                    stored[source] = state[source]
                else:
                    value = _tensor(part, name, programs.device)
                    source = _same(constants, value) or f"constant.{len(constants)}"
                    constants[source] = value
                if source != name:
                    metadata[f"alias/{call}/{name}"] = source
    _save(folder / WEIGHTS, {**stored, **constants}, metadata, programs.device)


def _same(known: Mapping[str, Tensor], x: Tensor) -> str | None:
    """Name of a constant of the same value and layout."""
    for name, y in known.items():
        if _memory(x)[1:] == _memory(y)[1:] and torch.equal(x, y):
            return name
    return None


def _save(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], device: torch.device
) -> None:
    """Write tensors of programs on `device`, those not contiguous as their memory lies."""
    from safetensors.torch import save_file

    said, flat = dict(metadata), {}
    for name, x in tensors.items():
        if x.device.type != device.type:
            said[f"host/{name}"] = ""
        if not x.is_contiguous():
            said[f"strided/{name}"] = json.dumps([list(x.shape), list(x.stride())])
            x = x.as_strided((_span(x),), (1,))
        flat[name] = x.cpu()
    save_file(flat, path, metadata=said or None)
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


def _weights(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, names by "program/constant" where they differ)."""
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

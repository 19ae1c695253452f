"""Weights of ONNX models: one safetensors file that all of them share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toma_fx.export.packages import import_onnx

WEIGHTS = "weights.safetensors"
INLINE = 1024
"""Bytes below which a constant stays in the model, where shape inference sees it."""


# not the integers of indices and shapes: shape inference reads those, and not in other files
_SAFETENSORS = {
    "FLOAT": "F32",
    "FLOAT16": "F16",
    "BFLOAT16": "BF16",
    "DOUBLE": "F64",
    "INT8": "I8",
    "UINT8": "U8",
    "FLOAT8E4M3FN": "F8_E4M3",
    "FLOAT8E5M2": "F8_E5M2",
}
_ALIGNED = 64
"""Bytes that every tensor of the weights file starts at a multiple of."""


def _bytes(tensor: Any) -> memoryview:
    """Values of a tensor as they lie in memory, contiguous."""
    import numpy as np

    flat = np.ascontiguousarray(tensor.numpy()).reshape(-1)
    data: memoryview = flat.view(np.uint8).data
    return data


def externalize_weights(model: Any, folder: Path, *, create: bool) -> None:
    """Make the weights of a model external data.

    Args:
        model: changed in place. folder: of the weights file.
        create: whether to write the file; otherwise weights are looked up in it.
    """
    weights = [
        value
        for value in model.graph.initializers.values()
        if value.const_value.nbytes >= INLINE and value.dtype.name in _SAFETENSORS
    ]
    if create:
        _write_weights(weights, folder / WEIGHTS)
    _point(model, weights, folder / WEIGHTS)


def _write_weights(weights: Sequence[Any], path: Path) -> None:
    """Write the weights file, one tensor in memory at a time."""
    header: dict[str, Any] = {}
    at = 0
    # the longest element first: then every tensor starts at a multiple of its own
    for value in (ordered := sorted(weights, key=lambda v: (-v.dtype.itemsize, v.name))):
        end = at + value.const_value.nbytes
        header[value.name] = {
            "dtype": _SAFETENSORS[value.dtype.name],
            "shape": [int(n) for n in value.const_value.shape],
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNED)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in ordered:
            file.write(_bytes(value.const_value))


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of the weights file, and where its data starts."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


def _point(model: Any, weights: Sequence[Any], path: Path) -> None:
    """Make the weights of a model external data, wherever the file has the same values.

    They get the names they have in the file; others stay in the model.
    """
    ir = import_onnx("onnx_ir")
    header, start = _header(path)
    stored = dict[tuple[str, tuple[int, ...], bytes], str]()
    with path.open("rb") as file:
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            digest = hashlib.sha256(file.read(end - begin)).digest()
            stored.setdefault((entry["dtype"], tuple(entry["shape"]), digest), name)
    placed: dict[str, Any] = {}
    for value in weights:
        tensor = value.const_value
        digest = hashlib.sha256(_bytes(tensor)).digest()
        dtype, shape = _SAFETENSORS[tensor.dtype.name], tuple(int(n) for n in tensor.shape)
        place = dtype, shape, digest
        if place not in stored:
            continue
        name = stored[place]
        if name in placed:
            ir.convenience.replace_all_uses_with(value, placed[name])
            model.graph.initializers.pop(value.name)
            continue
        begin, end = header[name]["data_offsets"]
        value.const_value = ir.ExternalTensor(
            path.name,
            start + begin,
            end - begin,
            tensor.dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=str(path.parent),
        )
        placed[name] = value
    for i, value in enumerate(placed.values()):
        value.name = f"weight.{i}.moving"  # names may have to change places
    for final, value in placed.items():
        value.name = final


def save_model(model: Any, path: Path) -> None:
    """Write a model; its external data stay where they are."""
    ir, onnx = import_onnx("onnx_ir"), import_onnx("onnx")
    opsets = [onnx.helper.make_opsetid(name, n) for name, n in model.opset_imports.items()]
    # the exporter says the same version of the format for all opsets
    model.ir_version = max(model.ir_version, onnx.helper.find_min_ir_version_for(opsets))
    path.write_bytes(ir.to_proto(model).SerializeToString())


def close_files(model: Any) -> None:
    """Close the weights file that a model has mapped."""
    for value in model.graph.initializers.values():
        release = getattr(value.const_value, "release", None)
        if release is not None:
            release()

"""`config.pbtxt`: what Triton has to know of a model, a `ModelConfig` of its model_config.proto."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from toma_fx.export.manifest import TensorSpec

CONFIG = "config.pbtxt"
START, END, READY, SEQUENCE = CONTROLS = ("START", "END", "READY", "CORRID")
"""Inputs by which Triton tells a model what it knows of sequences."""
STEPS = "steps"
"""Optional input: steps of the generation in all, at its first step; some schedules ask for it."""
DTYPES: Mapping[str, str] = {
    **{"bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32"},
    **{"uint64": "UINT64", "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64"},
    **{"float16": "FP16", "bfloat16": "BF16", "float32": "FP32", "float64": "FP64"},
}
"""Triton's names of dtypes, without TYPE_."""


def config_text(
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    device: str,
    sequences: int,
    instances: int,
    idle_seconds: int,
) -> str:
    """The configuration of a model whose requests are steps of sequences.

    Its name is left to the folder's. Triton may not batch requests, max_batch_size 0: programs have
    static shapes. So it keeps the order in which sequences began ("oldest") and hands over
    steps one by one.

    Args:
        inputs, outputs: of a step; a scalar is a tensor of shape (1,) to Triton. device: type.
        sequences, instances, idle_seconds: as of `TritonTarget`.
    """
    flags = "".join(
        f'    {{ name: "{name}" control [ {{ kind: CONTROL_SEQUENCE_{name}'
        " int32_false_true: [ 0, 1 ] } ] },\n"
        for name in (START, END, READY)
    )
    kind = "GPU" if device == "cuda" else "CPU"
    steps = f'{{ name: "{STEPS}" data_type: TYPE_INT32 dims: [ 1 ] optional: true }}'
    lines = [
        'backend: "python"',
        "max_batch_size: 0",
        _tensors("input", inputs, steps),
        _tensors("output", outputs),
        "sequence_batching {",
        f"  max_sequence_idle_microseconds: {idle_seconds * 1_000_000}",
        "  control_input [",
        f'{flags}    {{ name: "{SEQUENCE}" control [ {{ kind: CONTROL_SEQUENCE_CORRID'
        " data_type: TYPE_UINT64 } ] }",
        "  ]",
        f"  oldest {{ max_candidate_sequences: {sequences} }}",
        "}",
        f"instance_group [ {{ count: {instances} kind: KIND_{kind} }} ]",
    ]
    if kind == "GPU":  # else Triton copies inputs to the host first
        lines.append(
            'parameters { key: "FORCE_CPU_ONLY_INPUT_TENSORS" value { string_value: "no" } }'
        )
    return "\n".join(lines) + "\n"


def _tensors(field: str, specs: Sequence[TensorSpec], *more: str) -> str:
    """A repeated field of inputs or outputs."""
    entries = [
        f"{{ name: {json.dumps(spec.name)} data_type: TYPE_{DTYPES[spec.dtype]}"
        f" dims: {list(spec.shape or (1,))} }}"
        for spec in specs
    ]
    lines = ",\n".join(f"  {entry}" for entry in (*entries, *more))
    return f"{field} [\n{lines}\n]"

"""Checks of a written ONNX model against the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toma_fx.export.manifest import TensorSpec
from toma_fx.export.packages import import_onnx
from toma_fx.export.to_onnx.names import IONames, unexpected_model


def check_model(path: Path, opset: int, names: IONames, label: str) -> None:
    """The written model must be valid, of the opset asked for, and of the shapes promised.

    Raises:
        BuildError: it is not.
    """
    onnx = import_onnx("onnx")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # protobuf's and the checker's errors have no base of their own
        raise unexpected_model(label, "a valid ONNX model", str(error)[:500]) from error
    model = onnx.load(str(path), load_external_data=False)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets != {"": opset}:
        raise unexpected_model(label, f"operators of opset {opset} alone", str(opsets))
    try:
        inferred = onnx.shape_inference.infer_shapes(_bare(onnx, model), strict_mode=True)
    except Exception as error:  # as above
        raise unexpected_model(label, "shapes that can be inferred", str(error)[:500]) from error
    for role, values, specs in (
        ("input", model.graph.input, names.inputs),
        ("output", model.graph.output, names.outputs),
        ("inferred output", inferred.graph.output, names.outputs),
    ):
        for value, spec in zip(values, specs, strict=True):
            got = _spec_of(onnx, value)
            if got != spec:
                raise unexpected_model(label, f"{role} {spec}", str(got))


def _bare(onnx: Any, model: Any) -> Any:
    """A model without types of inner values, except those that can't be inferred.

    ONNX infers nothing for some operators (GroupNormalization, up to opset 25 at least).
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    opset = model.opset_import[0].version
    untyped = [
        name
        for node in model.graph.node
        if not onnx.defs.get_schema(node.op_type, opset).has_type_and_shape_inference_function
        for name in node.output
    ]
    kept = [value for value in model.graph.value_info if value.name in untyped]
    del bare.graph.value_info[:]
    bare.graph.value_info.extend(kept)
    for value in bare.graph.output:
        value.type.tensor_type.ClearField("shape")
    return bare


def _spec_of(onnx: Any, value: Any) -> TensorSpec:
    """Name, shape and dtype that a model states for an input or output."""
    typed = value.type.tensor_type
    shape = tuple(d.dim_value for d in typed.shape.dim)
    names = {"FLOAT": "float32", "DOUBLE": "float64"}
    dtype = onnx.TensorProto.DataType.Name(typed.elem_type)
    return TensorSpec(value.name, shape, names.get(dtype, dtype.lower()))

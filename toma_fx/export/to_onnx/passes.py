"""Clean-ups of ONNX models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toma_fx.export.packages import import_onnx
from toma_fx.export.to_onnx.weights import INLINE


def cast_mixed_joins(model: Any) -> None:
    """Give the inputs of each Concat the type of its output: ATen promotes them, ONNX does not."""
    ir = import_onnx("onnx_ir")
    for node in list(model.graph):
        if node.op_type != "Concat":
            continue
        want = node.outputs[0].dtype
        for i, value in enumerate(node.inputs):
            if want is None or value.dtype is None or value.dtype == want:
                continue
            cast = ir.node("Cast", [value], attributes={"to": want})
            cast.outputs[0].dtype, cast.outputs[0].shape = want, value.shape
            model.graph.insert_before(node, cast)
            node.replace_input_with(i, cast.outputs[0])


def simplify(model: Any) -> None:
    """Fold small constants, take weights transposed, drop what is unused or there twice."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    common.InlinePass()(model)
    common.RemoveUnusedNodesPass()(model)
    optimizer.fold_constants(
        model, onnx_shape_inference=True, input_size_limit=INLINE, should_fold=_foldable
    )
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _transpose_weights(model)
    _give_constants_a_node(model)
    common.RemoveUnusedNodesPass()(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    # stack traces name the files of this machine
    common.ClearMetadataAndDocStringPass()(model)


def _foldable(node: Any) -> bool | None:
    """Not transposed weights: a folded one would be a copy."""
    if node.op_type == "Transpose" and node.inputs[0].const_value is not None:
        return bool(node.inputs[0].const_value.nbytes < INLINE)
    return None


def _give_constants_a_node(model: Any) -> None:
    """Copy outputs that are constants: nothing infers the shape of an initializer as an output.

    Patterns are such where every source merges, whatever the tokens are.
    """
    ir = import_onnx("onnx_ir")
    for i, value in enumerate(model.graph.outputs):
        if value.is_initializer():
            node = ir.node("Identity", [value])
            node.outputs[0].dtype, node.outputs[0].shape = value.dtype, value.shape
            model.graph.append(node)
            model.graph.outputs[i] = node.outputs[0]


def _transpose_weights(model: Any) -> None:
    """Make `Transpose(weight)` a weight; it is transposed when it is written."""
    ir = import_onnx("onnx_ir")
    transposed: dict[tuple[str, tuple[int, ...]], Any] = {}
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or not source.is_initializer() or source.const_value.nbytes < INLINE:
            continue
        order = tuple(node.attributes["perm"].as_ints())
        key = source.name, order
        if key not in transposed:
            transposed[key] = ir.Value(
                name=f"{source.name}.{''.join(map(str, order))}",
                const_value=_Transposed.of(source.const_value, order),
            )
            transposed[key].dtype, transposed[key].shape = (
                source.dtype,
                transposed[key].const_value.shape,
            )
            model.graph.register_initializer(transposed[key])
        ir.convenience.replace_all_uses_with(node.outputs[0], transposed[key])


class _Transposed:
    """A lazily transposed tensor."""

    @staticmethod
    def of(tensor: Any, order: Sequence[int]) -> Any:
        """`tensor` with its dimensions in another order; nothing is copied until it is read."""
        ir = import_onnx("onnx_ir")
        shape = ir.Shape([tensor.shape[i] for i in order])

        def read() -> Any:
            return ir.tensor(tensor.numpy().transpose(order).copy(), dtype=tensor.dtype)

        return ir.LazyTensor(read, dtype=tensor.dtype, shape=shape, name=tensor.name, cache=False)

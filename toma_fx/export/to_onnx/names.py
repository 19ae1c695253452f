"""Names of values in ONNX models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toma_fx.errors import BuildError
from toma_fx.export.manifest import TensorSpec
from toma_fx.export.programs import Exported, Programs


def file_of(label: str) -> str:
    """Name of the model of a program."""
    return f"{label}.onnx"


@dataclass(frozen=True)
class IONames:
    """Names, shapes and dtypes of the inputs and outputs of a model.

    Attributes:
        inputs, outputs: in the order of the model.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, programs: Programs, program: Exported) -> IONames:
        """Names of the manifest."""
        kept = programs.kept
        inputs = {**programs.inputs, **{name: kept[name] for name in program.takes}}
        outputs = {**programs.outputs, **{name: kept[name] for name in program.gives}}
        return cls(
            tuple(TensorSpec.of(name, x) for name, x in inputs.items()),
            tuple(TensorSpec.of(name, x) for name, x in outputs.items()),
        )

    def keep_outputs(self, model: Any) -> None:
        """Drop outputs that have no name: kept of a program that hands none on."""
        del model.graph.outputs[len(self.outputs) :]

    def assign(self, model: Any, label: str) -> None:
        """Name the inputs and outputs.

        Raises:
            BuildError: the model has others.
        """
        graph = model.graph
        for role, values, specs in (
            ("inputs", graph.inputs, self.inputs),
            ("outputs", graph.outputs, self.outputs),
        ):
            if len(values) != len(specs):
                names = [spec.name for spec in specs]
                got = [value.name for value in values]
                raise unexpected_model(
                    label, f"{role} {', '.join(names)}", ", ".join(map(str, got))
                )
        wanted = {spec.name for spec in (*self.inputs, *self.outputs)}
        inner = (v for node in graph for v in node.outputs)
        for value in (*graph.inputs, *inner, *list(graph.initializers.values())):
            if value.name in wanted:
                value.name = f"{value.name}.inner"
        for value, spec in zip(
            (*graph.inputs, *graph.outputs), (*self.inputs, *self.outputs), strict=True
        ):
            value.name = spec.name


def unexpected_model(label: str, expected: str, got: str) -> BuildError:
    """The error for a model that is not what was asked for."""
    return BuildError(
        "the exporter wrote another model than asked for",
        where=file_of(label),
        expected=expected,
        got=got,
        hint="please report this model and opset",
    )

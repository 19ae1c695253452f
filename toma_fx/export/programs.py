"""`torch.export` programs of an optimized denoiser: what every deployment target is made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from toma_fx.capture.references import without_weak_references
from toma_fx.compat.pytorch import tree_paths
from toma_fx.compat.tracebacks import own_frames
from toma_fx.errors import BuildError, ModelTypeError, ParallelError
from toma_fx.export.manifest import TensorSpec
from toma_fx.export.selection import ExpandSelection
from toma_fx.graph.nodes import module_path, op_name
from toma_fx.graph.passes import EraseInputs, run_passes
from toma_fx.graph.rewriter import Rewriter, copy_graph
from toma_fx.graph.specs import EXPORTABLE
from toma_fx.graph.verify import output_values
from toma_fx.plan.plan import MergePlan
from toma_fx.run.calls import call_of
from toma_fx.run.denoiser import OptimizedDenoiser, optimized_of
from toma_fx.run.pipelines import COMPONENTS
from toma_fx.run.program_set import split_outputs
from toma_fx.run.programs import Specialization
from toma_fx.run.schedule import kinds_that_run
from toma_fx.run.tracing import tracing


@dataclass(frozen=True)
class Exported:
    """One exported program.

    Attributes:
        program: (model inputs, kept tensors) -> (model outputs, kept tensors), flat, of static
            shapes and operators of torch alone. Inputs are tensors; constants are gone.
        example: inputs that it was exported with, in order.
        takes, gives: names of the kept tensors, which follow the model's own inputs and outputs in
            this order. instead: the kind that runs while one that it takes is not kept.
    """

    program: ExportedProgram
    example: tuple[Tensor, ...]
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    instead: str

    @cached_property
    def module(self) -> fx.GraphModule:
        """The program to call in this process; making it copies the graph."""
        return self.program.module()


@dataclass(frozen=True)
class Programs(Mapping[str, Exported]):
    """The programs that the schedule of an optimized denoiser runs, by kind of step.

    Attributes:
        denoiser: what they were made of. specialization: what was captured of it. plan: its plan.
        by_kind: those that some step runs.
        paths: keyword of every leaf of a call, and keys below it where arguments are nested, in
            the order of `leaves`. leaves: tensors and constants of the example call.
        kept: an example of every kept tensor, by name.
        call: name of the call among several of one artifact; "" if it is the only one.
    """

    denoiser: OptimizedDenoiser
    specialization: Specialization
    plan: MergePlan
    by_kind: Mapping[str, Exported]
    paths: tuple[tuple[str, ...], ...]
    leaves: tuple[Any, ...]
    kept: Mapping[str, Tensor]
    call: str = ""

    def __getitem__(self, kind: str) -> Exported:
        return self.by_kind[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_kind)

    def __len__(self) -> int:
        return len(self.by_kind)

    def label(self, kind: str) -> str:
        """Name of a program, which no other of the artifact has."""
        return f"{self.call}_{kind}" if self.call else kind

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.denoiser.denoiser.parameters()).device

    def run(
        self, kind: str, inputs: Sequence[Tensor], kept: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """One step in this process: (the model's outputs, kept tensors that the program gives)."""
        exported = self.by_kind[kind]
        with torch.no_grad():
            results = list(exported.module(*inputs, *(kept[name] for name in exported.takes)))
        return split_outputs(results, exported.gives)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Tensors of the example call by their names: paths joined by "_"."""
        pairs = zip(self.paths, self.leaves, strict=True)
        return {"_".join(path): leaf for path, leaf in pairs if isinstance(leaf, Tensor)}

    def tensors_of(self, kind: str) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """What a program takes and gives, by its own graph."""
        exported = self.by_kind[kind]
        takes = dict(zip([*self.inputs, *exported.takes], exported.example, strict=True))
        results = output_values(exported.program.graph)
        gives = dict(zip([*self.outputs, *exported.gives], results, strict=True))
        specs = [[TensorSpec.of(name, x) for name, x in each.items()] for each in (takes, gives)]
        return specs[0], specs[1]

    @property
    def outputs(self) -> dict[str, Tensor]:
        """What the model returns, as fake tensors, by the names that artifacts give them."""
        fakes = output_values(self.specialization.captured.graph_module.graph)
        return {f"output_{i}": x for i, x in enumerate(fakes)}


def export_programs(optimized: Any, example_inputs: Any) -> Programs:
    """The programs that the schedule of an optimized denoiser runs, for one call's shapes.

    Args:
        optimized: what `toma_fx.optimize` returned for a model.
        example_inputs: a call: a dict of keyword arguments, a tuple, or a pair (args, kwargs).

    Raises:
        BuildError: quantized layers that can't be traced.
        DynamicError: the method's number of merged tokens depends on the data, or which steps
            compute; names the form that can be exported. ModelTypeError: not an optimized
            denoiser. SignatureError, CaptureError, NoMergeSites, TileError: as at a call.
    """
    denoiser = optimized_of(optimized)
    if denoiser is None:
        parts = {name: getattr(optimized, name, None) for name in COMPONENTS}
        own = next((name for name, part in parts.items() if optimized_of(part)), None)
        raise ModelTypeError(
            "a pipeline is exported by its denoiser" if own else "the model is not optimized",
            where="export",
            expected="what toma_fx.optimize(model) returned",
            got=type(optimized).__name__,
            hint=f"give pipe.{own}" if own else "toma_fx.optimize(model) before",
        )
    if denoiser._ranks is not None:
        raise ParallelError(
            "an artifact can't be made of one process of several that share the tokens",
            where="export_programs",
            expected="toma_fx.optimize(model) without parallel=",
            got="a model whose tokens processes share",
            hint="a program of one process is a graph that torch.export and AOTInductor take "
            "(docs/parallel.md)",
        )
    denoiser.config_toma.check_static("export")
    denoiser.config_toma.check_fixed_steps("export")
    specialization, arguments = denoiser.specialized(*call_of(example_inputs))
    _check_layers(specialization)
    leaves = arguments.leaves
    by_kind: dict[str, Exported] = {}
    kept: dict[str, Tensor] = {}
    ran = kinds_that_run(specialization, specialization.schedule)
    for kind in (kind for kind in specialization.uses if kind in ran):
        by_kind[kind] = _export(specialization, kind, leaves, kept)
    args, kwargs = arguments.call.args, dict(sorted(arguments.call.kwargs.items()))
    names = tuple(path[1:] for path, _ in tree_paths((args, kwargs)))
    plan = specialization.plan
    return Programs(denoiser, specialization, plan, by_kind, names, tuple(leaves), kept)


def _check_layers(specialization: Specialization) -> None:
    """Refuse layers that only this process has.

    Raises:
        BuildError: the graph calls one.
    """
    graph = specialization.captured.graph_module.graph
    for node in graph.nodes:
        if op_name(node.target) == "toma_fx.layer":
            raise BuildError(
                "quantized layers that run in Python can't be in an artifact",
                where=module_path(node),
                expected="layers that torch.export can trace",
                got="one of GGUF or bitsandbytes, which the graph calls as it is",
                hint="build the artifact from the model before it was quantized",
            )


def _export(
    specialization: Specialization,
    kind: str,
    leaves: Sequence[Any],
    kept: dict[str, Tensor],
) -> Exported:
    """One program, without the inputs that are constants; adds what it gives to `kept`."""
    program = specialization.program(kind)
    with tracing(), torch.no_grad():
        graph_module = copy_graph(program.graph_module)
        pairs = zip(specialization.captured.inputs, leaves, strict=True)
        constants = [spec.name for spec, leaf in pairs if not _is_tensor(leaf)]
        steps = (ExpandSelection(), EraseInputs(frozenset(constants)))
        run_passes(Rewriter(graph_module), steps, f"export_{kind}", after=EXPORTABLE)
        tensors = (*filter(_is_tensor, leaves), *(kept[name] for name in program.takes))
        # programs of static shapes have static strides too, and runtimes hand over contiguous ones
        example = tuple(x.contiguous() for x in tensors)
        if program.gives:
            results = graph_module(*example)
            kept.update(split_outputs(results, program.gives)[1])
            for newer, older in specialization.older.items():
                if newer in kept and older not in kept:
                    kept[older] = kept[newer].clone()  # one tensor twice would become one input
        with without_weak_references() as graphs, own_frames():
            exported = torch.export.export(graph_module, example, strict=False)
            graphs.append(exported.graph)
    return Exported(exported, example, program.takes, program.gives, program.use.instead)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)

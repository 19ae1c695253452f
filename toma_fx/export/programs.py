"""`torch.export` programs of an optimized denoiser: what every deployment target is made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from toma_fx.errors import ModelTypeError
from toma_fx.export.selection import ExpandSelection
from toma_fx.graph.rewriter import Rewriter
from toma_fx.graph.verify import output_values
from toma_fx.passes.pipeline import copy_graph, rewrite
from toma_fx.plan.plan import MergePlan
from toma_fx.run.calls import call_of
from toma_fx.run.denoiser import OptimizedDenoiser, optimized_of
from toma_fx.run.programs import Specialization, tracing
from toma_fx.run.schedule import LONGEST, Call, call_at


@dataclass(frozen=True)
class Exported:
    """One exported program.

    Attributes:
        program: (model inputs, pattern inputs) -> (model outputs, pattern outputs), flat, of static
            shapes and operators of torch alone. Inputs are tensors; constants are gone.
        example: inputs that it was exported with, in order.
        pattern_inputs, pattern_outputs: names of the patterns, which follow the model's own inputs
            and outputs in this order.
    """

    program: ExportedProgram
    example: tuple[Tensor, ...]
    pattern_inputs: tuple[str, ...]
    pattern_outputs: tuple[str, ...]

    @cached_property
    def module(self) -> fx.GraphModule:
        """The program to call in this process; making it copies the graph."""
        return self.program.module()


@dataclass(frozen=True)
class Programs(Mapping[Call, Exported]):
    """The programs that the schedule of an optimized denoiser runs, by kind of step.

    Attributes:
        denoiser: what they were made of. specialization: what was captured of it. plan: its
            plan.
        by_call: "refresh", "reweigh", "reuse" and "plain", those of them that some step runs.
        paths: keyword of every leaf of a call, and keys below it where arguments are nested, in
            the order of `leaves`. leaves: tensors and constants of the example call.
        patterns: an example of every pattern tensor, by name.
    """

    denoiser: OptimizedDenoiser
    specialization: Specialization
    plan: MergePlan
    by_call: Mapping[Call, Exported]
    paths: tuple[tuple[str, ...], ...]
    leaves: tuple[Any, ...]
    patterns: Mapping[str, Tensor]

    def __getitem__(self, call: Call) -> Exported:
        return self.by_call[call]

    def __iter__(self) -> Iterator[Call]:
        return iter(self.by_call)

    def __len__(self) -> int:
        return len(self.by_call)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.denoiser.denoiser.parameters()).device

    def run(
        self, call: Call, inputs: Sequence[Tensor], patterns: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """One step in this process: (the model's outputs, patterns that the program gives)."""
        made = self.by_call[call]
        with torch.no_grad():
            results = list(made.module(*inputs, *(patterns[name] for name in made.pattern_inputs)))
        return parted(results, made.pattern_outputs)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Tensors of the example call by their names: paths joined by "_"."""
        pairs = zip(self.paths, self.leaves, strict=True)
        return {"_".join(path): leaf for path, leaf in pairs if isinstance(leaf, Tensor)}

    @property
    def outputs(self) -> dict[str, Tensor]:
        """What the model returns, as fake tensors, by the names that artifacts give them."""
        fakes = output_values(self.specialization.captured.graph_module.graph)
        return {f"output_{i}": x for i, x in enumerate(fakes)}


def parted(
    results: Sequence[Tensor], patterns: Sequence[str]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What a program gives: the model's own outputs, and the patterns after them by their names."""
    own = len(results) - len(patterns)
    return list(results[:own]), dict(zip(patterns, results[own:], strict=True))


def export_programs(optimized: Any, example_inputs: Any) -> Programs:
    """The programs that the schedule of an optimized denoiser runs, for one call's shapes.

    Args:
        optimized: what `toma_fx.optimize` returned for a model.
        example_inputs: a call: a dict of keyword arguments, a tuple, or a pair (args, kwargs).

    Raises:
        DynamicError: the method's number of merged tokens depends on the data; names the form that
            can be exported. ModelTypeError: not an optimized denoiser. SignatureError,
            CaptureError, NoMergeSites, TileError: as at a call.
    """
    denoiser = optimized_of(optimized)
    if denoiser is None:
        raise ModelTypeError(
            "the model is not optimized",
            where="export_programs",
            expected="what toma_fx.optimize(model) returned",
            got=type(optimized).__name__,
        )
    denoiser.config_toma.check_static("export")
    specialization, given = denoiser.specialized(*call_of(example_inputs))
    plan = specialization.plan
    by_call: dict[Call, Exported] = {}
    patterns: dict[str, Tensor] = {}
    for call in _calls(plan):
        by_call[call] = _exported(specialization, plan, call, given.leaves, patterns)
    tree = (
        ((), dict(sorted(given.kwargs.items()))) if not given.args else (given.args, given.kwargs)
    )
    paths = tuple(_path(path[1:]) for path, _ in pytree.tree_flatten_with_path(tree)[0])
    return Programs(denoiser, specialization, plan, by_call, paths, tuple(given.leaves), patterns)


def _exported(
    specialization: Specialization,
    plan: MergePlan,
    call: Call,
    leaves: Sequence[Any],
    patterns: dict[str, Tensor],
) -> Exported:
    """One program, without the inputs that are constants; notes the patterns that it gives."""
    captured = specialization.captured
    taken: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    with tracing(), torch.no_grad():
        if call == "plain":
            graph_module = copy_graph(captured.graph_module)
        else:
            program = rewrite(captured, specialization.analysis, specialization.flow, plan, call)
            graph_module = program.graph_module
            taken, given = program.pattern_inputs, program.pattern_outputs
        pairs = zip(captured.inputs, leaves, strict=True)
        constants = [spec.name for spec, leaf in pairs if not _is_tensor(leaf)]
        rewriter = Rewriter(graph_module)
        expand = ExpandSelection()
        with rewriter.running(expand.name):
            expand.apply(rewriter)
        rewriter.erase_inputs(constants)
        tensors = (*filter(_is_tensor, leaves), *(patterns[name] for name in taken))
        # programs of static shapes have static strides too, and runtimes hand over contiguous ones
        example = tuple(x.contiguous() for x in tensors)
        if given:
            results = graph_module(*example)
            patterns.update(zip(given, results[len(results) - len(given) :], strict=True))
        exported = torch.export.export(graph_module, example, strict=False)
    return Exported(exported, example, taken, given)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _path(keys: Sequence[Any]) -> tuple[str, ...]:
    """Keyword of a leaf, and keys below it."""
    return tuple(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)


def _calls(plan: MergePlan) -> list[Call]:
    """The kinds of steps in a generation, those that give patterns first."""
    config = plan.config
    if not plan.segments:
        return ["plain"]
    first = call_at(config, config.first_step, False)
    later = (call_at(config, step, True) for step in range(LONGEST))
    order: tuple[Call, ...] = ("refresh", "reweigh", "reuse", "plain")
    ran = {first, *later, *(["plain"] if config.last_step is not None else [])}
    return [call for call in order if call in ran]

"""A back end of `torch.compile`: merge tokens in the graph that Dynamo captured, then Inductor.

    torch.compile(model, backend="toma_fx", options={"ratio": 0.5})

    Dynamo graph -> capture -> plan -> refresh | reuse | ... programs -> Inductor, one each

Dynamo guards the model and its inputs, as for any back end; the program of a step is chosen inside
the compiled call, so steps never recompile. Where Dynamo's shapes are symbolic, every set of
concrete shapes gets its own programs. Inference only: no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from toma_fx.capture.dynamo import (
    arguments_of,
    capture_dynamo,
    example_values,
    models_being_compiled,
)
from toma_fx.capture.grids import Raster
from toma_fx.capture.guard import ModelGuard
from toma_fx.capture.parity import check_replay
from toma_fx.compat.compilers import (
    compile_graph,
    inductor_modes,
    inductor_options,
    input_notes,
    note_inputs,
    noted_input,
)
from toma_fx.errors import NoMergeSites, UnknownNameError, nearest
from toma_fx.graph.outline import outline
from toma_fx.graph.rewriter import copy_graph
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.checks import check_switch
from toma_fx.methods.config import make_config
from toma_fx.methods.planning import merging
from toma_fx.methods.recipe import Recipe
from toma_fx.methods.toma import ToMAConfig
from toma_fx.run.gradients import refuse_gradient
from toma_fx.run.marks import PositionIds
from toma_fx.run.program_set import StepCall
from toma_fx.run.programs import Runner, Specialization
from toma_fx.run.specializations import SpecializationCache
from toma_fx.run.stepper import Stepper

CAPACITY = 16
"""Sets of concrete shapes whose programs and patterns are kept for one Dynamo graph."""
STEPPERS: dict[tuple[StorageWeakRef, Any], Stepper] = {}
"""State of the models that run, by where a tensor that they own lies: torch calls a back end once
for every graph of a model and hands it nothing that the graphs share but such tensors. (A weak
reference to the tensor itself would keep quantized weights from moving.)"""


@dataclass(frozen=True)
class Options:
    """What `toma_backend` is told.

    Attributes:
        config: what to merge. patches: changes to Inductor's configuration.
        allow_unmerged: whether a graph in which nothing can be merged is compiled as it is.
    """

    config: MethodConfig
    patches: Mapping[str, Any]
    allow_unmerged: bool
    outline: bool

    @classmethod
    def make(cls, mode: str | None, options: Mapping[str, Any] | None) -> Options:
        """From the arguments of `torch.compile`.

        Raises:
            UnknownNameError: an unknown option, preset, mode or field of Inductor's configuration.
            ConfigError: a value outside its domain.
        """
        fields = dict(options or {})
        patches = {**_mode_patches(mode), **fields.pop("inductor", {})}
        known = inductor_options()
        for name in patches:
            if name not in known:
                raise UnknownNameError(
                    f"unknown field {name!r} of Inductor's configuration",
                    where="options['inductor']",
                    hint=nearest(name, known),
                )
        allow, outlined = fields.pop("allow_unmerged", False), fields.pop("outline", True)
        check_switch("allow_unmerged", allow, "options['allow_unmerged']")
        check_switch("outline", outlined, "options['outline']")
        toma = fields.pop("toma", True)
        if isinstance(toma, Recipe):  # of the model there is only a graph: nothing to check
            toma = toma.config
        config = make_config(toma, fields.pop("method", None), fields)
        config.check_static('torch.compile(backend="toma_fx")')
        return cls(config, patches, allow, outlined)


def _mode_patches(mode: str | None) -> Mapping[str, Any]:
    modes = inductor_modes()
    if mode is not None and mode not in modes:
        raise UnknownNameError(f"unknown mode {mode!r}", where="mode", hint=nearest(mode, modes))
    return modes[mode] if mode is not None else {}


def toma_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with token merging; `torch.compile(..., backend="toma_fx")` calls it.

    Args:
        gm: the graph; parameters are inputs.
        example_inputs: one fake tensor or symbolic number per input.
        mode: a mode of `torch.compile`: its changes to Inductor's configuration.
        options: fields of the method's configuration (`ToMAConfig`); "method" and "toma" as for
            `toma_fx.optimize`; "inductor", changes to Inductor's configuration; "allow_unmerged",
            True to compile a graph in which nothing can be merged as it is; "outline", False to
            compile blocks that repeat each by itself.

    Returns:
        A callable that takes the inputs of `gm` and returns its outputs as a tuple.

    Raises:
        ConfigError: see `Options.make`. CaptureError: the graph can't be exported.
        NoMergeSites: nothing in the graph can be merged. TileError: a window larger than a grid.
            Dynamo shows these as the text of a `BackendCompilerFailed`, which keeps the error in
            `inner_exception`. Shapes that come up later raise them as they are.
    """
    chosen = Options.make(mode, options)
    merged = MergedGraph(gm, chosen)
    specialization = merged.specialize(example_values(gm, example_inputs))
    if specialization.plan.merges or specialization.plan.cache:
        return merged
    return _unmerged(gm, example_inputs, chosen.patches)


def _unmerged(
    gm: fx.GraphModule, example_inputs: Sequence[Any], patches: Mapping[str, Any]
) -> Callable[..., Any]:
    """What plain Inductor makes of the graph, without gradients."""
    with torch.no_grad():
        compiled = compile_graph(gm, example_inputs, patches)

    def run(*args: Any) -> Any:
        with torch.no_grad():
            return compiled(*args)

    return run


class MergedGraph:
    """A Dynamo graph that runs with token merging: called as the graph is.

    Attributes:
        gm: the graph. arguments: its inputs. options: how to merge and compile.
        cache: the specializations that live, by concrete shapes and position grids.

    Raises:
        CompanionError: another library acts inside the forward pass, or attention or autocast are
            such that merging would not do what it should.
    """

    def __init__(self, gm: fx.GraphModule, options: Options) -> None:
        self.gm = gm
        self.arguments = arguments_of(gm)
        self.options = options
        self.cache = SpecializationCache(CAPACITY, "CAPACITY")
        self._own_stepper = Stepper("a model compiled with backend='toma_fx'")
        self._kernel: Callable[[], AbstractContextManager[Any]] = nullcontext
        for model in models_being_compiled(self.arguments):
            guard = ModelGuard(model)
            guard.companions.check_merging(merging(options.config))
            self._kernel = guard.companions.kernel

    def specialize(self, values: Sequence[Any]) -> Specialization:
        """Graph, analysis and plan for the shapes of `values`; made when first asked for.

        Raises:
            CaptureError, NoMergeSites, ParityError, TileError, UnknownNameError: see
                `toma_backend`.
        """
        ids = self._ids(values)
        rasters = PositionIds(ids).read(ids)
        return self._specialization(self._signature(values), rasters, values)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """One denoising step.

        Raises:
            CaptureError, NoMergeSites, ParityError, TileError: at the first call with new shapes.
            GenerationError: the schedule counts steps, and no input is a timestep.
        """
        refuse_gradient(self._ids(args), "a model compiled with backend='toma_fx'")
        owned = [v for a, v in zip(self.arguments, args, strict=True) if a.kind == "owned"]
        identity = tuple(map(id, owned))
        call = self._step_call(args, identity)

        def find(rasters: tuple[Raster | None, ...]) -> tuple[Hashable, Specialization]:
            specialization = self._specialization(call.signature, rasters, args)
            return (identity, call.signature, rasters), specialization

        return self._stepper(owned).step(lambda: call, find, tuple)

    # -- which program --------------------------------------------------------------------------

    def _step_call(self, values: Sequence[Any], identity: tuple[int, ...]) -> StepCall:
        pairs = zip(self.arguments, values, strict=True)
        return StepCall(
            signature=self._signature(values),
            leaves=[a.to_input(v) for a, v in pairs if a.is_captured],
            ids=self._ids(values),
            context=identity,
            kernel=self._kernel,
        )

    def _stepper(self, owned: Sequence[Tensor]) -> Stepper:
        """That of the model: its graphs share it, since a generation may change between them."""
        if not owned:
            return self._own_stepper
        place = StorageWeakRef(owned[0].untyped_storage()), owned[0].storage_offset()
        if place not in STEPPERS:
            for gone in [each for each in list(STEPPERS) if each[0].expired()]:
                STEPPERS.pop(gone, None)
        return STEPPERS.setdefault(place, self._own_stepper)

    def _ids(self, values: Sequence[Any]) -> list[Any]:
        """The graph's own inputs, which may be position ids."""
        pairs = zip(self.arguments, values, strict=True)
        return [v if a.kind == "tensor" else None for a, v in pairs]

    def _signature(self, values: Sequence[Any]) -> tuple[Any, ...]:
        # with the graph: Dynamo makes another one where guidance that ends changes the batch size
        return (id(self), *(a.key(v) for a, v in zip(self.arguments, values, strict=True)))

    # -- making programs ------------------------------------------------------------------------

    def _specialization(
        self, signature: Hashable, rasters: tuple[Raster | None, ...], values: Sequence[Any]
    ) -> Specialization:
        pairs = zip(self.arguments, values, strict=True)
        describe = lambda: {a.name: str(a.key(v)) for a, v in pairs}  # noqa: E731
        return self.cache.get((signature, rasters), lambda: self._make(values), describe)

    def _make(self, values: Sequence[Any]) -> Specialization:
        captured = capture_dynamo(self.gm, self.arguments, values)
        check_replay(self.gm, self.arguments, values, captured)
        config = self.options.config
        try:
            return Specialization.of(captured, config, self._make_runner)
        except NoMergeSites as error:
            if self.options.allow_unmerged:
                return Specialization.of(captured, ToMAConfig(ratio=0.0), self._make_runner)
            raise _no_sites(error) from error

    def _make_runner(self, specialization: Specialization, kind: str) -> Runner:
        program = specialization.program(kind)
        graph_module = copy_graph(program.graph_module)
        if self.options.outline:
            outline(graph_module)
        return self._compile(graph_module, program.takes)

    def _compile(self, graph_module: fx.GraphModule, takes: Sequence[str]) -> Runner:
        """Compile a program, told what Dynamo knew about its inputs.

        Without the sources and marks on its inputs, Inductor would take parameters and kept tensors
        for fresh tensors, and CUDA graphs would copy them at every call.
        """
        inputs: list[Any] = self.gm.graph.find_nodes(op="placeholder")
        pairs = zip(inputs, self.arguments, strict=True)
        notes = [input_notes(n) for n, argument in pairs if argument.is_captured]
        note_inputs(graph_module, [*notes, *(noted_input(name, static=True) for name in takes)])
        graph_module.meta.update(self.gm.meta)
        nodes: list[Any] = graph_module.graph.find_nodes(op="placeholder")
        fakes = [node.meta["val"] for node in nodes]
        return compile_graph(graph_module, fakes, self.options.patches)


def _no_sites(error: NoMergeSites) -> NoMergeSites:
    """The same, with what may have gone wrong on the way through Dynamo."""
    hint = (
        f"{error.hint}; a graph break may have cut the model: fullgraph=True shows it; "
        'options={"allow_unmerged": True} compiles such pieces unmerged'
    )
    what = "nothing in this graph of torch.compile can be merged with this configuration"
    return NoMergeSites(what, error.reasons, where=error.where, hint=hint)

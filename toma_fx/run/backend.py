"""A back end of `torch.compile`: merge tokens in the graph that Dynamo captured, then Inductor.

    torch.compile(model, backend="toma_fx", options={"ratio": 0.5})

    Dynamo graph -> capture -> plan -> refresh | reuse | ... programs -> Inductor, one each

Dynamo guards the model and its inputs, as for any back end; the program of a step is chosen inside
the compiled call, so steps never recompile. Where Dynamo's shapes are symbolic, every set of
concrete shapes gets its own programs. Inference only: no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._inductor import compile_fx as inductor
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options

from toma_fx.capture.dynamo import Argument, arguments_of, capture_dynamo, example_values
from toma_fx.capture.grids import Raster
from toma_fx.errors import ConfigError, NoMergeSites, UnknownNameError, nearest
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.config import make_config
from toma_fx.methods.toma import ToMAConfig
from toma_fx.passes.pipeline import copy_graph
from toma_fx.run.generation import GENERATIONS, Generation, Implicit, PassState, Rasters
from toma_fx.run.programs import TRACING, Specialization, SpecializationCache
from toma_fx.run.schedule import Call, call_at

CAPACITY = 16
"""Sets of concrete shapes whose programs and patterns are kept for one Dynamo graph."""


STATIC = {"_dynamo_static_input_type": "unguarded"}
"""How Dynamo marks an input whose address never changes."""


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

    @classmethod
    def make(cls, mode: str | None, options: Mapping[str, Any] | None) -> Options:
        """From the arguments of `torch.compile`.

        Raises:
            UnknownNameError: an unknown option, preset, mode or field of Inductor's configuration.
            ConfigError: a value outside its domain.
        """
        fields = dict(options or {})
        patches = {**_mode_patches(mode), **fields.pop("inductor", {})}
        known = inductor_config.get_config_copy()
        for name in patches:
            if name not in known:
                raise UnknownNameError(
                    f"unknown field {name!r} of Inductor's configuration",
                    where="options['inductor']",
                    hint=nearest(name, known),
                )
        allow = fields.pop("allow_unmerged", False)
        if not isinstance(allow, bool):
            raise ConfigError(
                "allow_unmerged is out of range",
                where="options['allow_unmerged']",
                expected="True or False",
                got=repr(allow),
            )
        config = make_config(fields.pop("toma", True), fields.pop("method", None), fields)
        config.check_static('torch.compile(backend="toma_fx")')
        return cls(config, patches, allow)


def _mode_patches(mode: str | None) -> Mapping[str, Any]:
    modes: dict[str, dict[str, Any]] = list_mode_options()
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
            True to compile a graph in which nothing can be merged as it is.

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
    if specialization.plan.segments:
        return merged
    return _unmerged(gm, example_inputs, chosen.patches)


def _unmerged(
    gm: fx.GraphModule, example_inputs: Sequence[Any], patches: Mapping[str, Any]
) -> Callable[..., Any]:
    """What plain Inductor makes of the graph, without gradients."""
    with torch.no_grad():
        compiled: Any = inductor.compile_fx(gm, example_inputs, config_patches=dict(patches))

    def run(*args: Any) -> Any:
        with torch.no_grad():
            return compiled(*args)

    return run


@dataclass(frozen=True)
class Turn:
    """What a call runs: a program of a specialization, for a pass of a generation."""

    specialization: Specialization
    call: Call
    generation: Generation
    state: PassState


class MergedGraph:
    """A Dynamo graph that runs with token merging: called as the graph is.

    Attributes:
        gm: the graph. arguments: its inputs. options: how to merge and compile.
        cache: the specializations that live, by concrete shapes and position grids.
    """

    def __init__(self, gm: fx.GraphModule, options: Options) -> None:
        self.gm = gm
        self.arguments = arguments_of(gm)
        self.options = options
        self.cache = SpecializationCache(CAPACITY)
        self._implicit = Implicit()
        self._timestep = _position(self.arguments, "timestep")
        self._conditioning = _position(self.arguments, "encoder_hidden_states")

    def specialize(self, values: Sequence[Any]) -> Specialization:
        """Graph, analysis and plan for the shapes of `values`; made when first asked for.

        Raises:
            CaptureError, NoMergeSites, TileError, UnknownNameError: see `toma_backend`.
        """
        rasters = self._rasters(values).values
        return self._specialization(self._signature(values), rasters, values)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """One denoising step.

        Raises:
            CaptureError, NoMergeSites, TileError: at the first call with new shapes.
            SharedStateError: another thread is in the middle of a generation.
        """
        with self._implicit.busy, torch.no_grad():
            turn = self._turn(args)
            try:
                return self._step(turn, args)
            except BaseException:
                turn.generation.restart()
                raise

    # -- which program --------------------------------------------------------------------------

    def _turn(self, args: Sequence[Any]) -> Turn:
        """What this call runs. The one place that asks the state."""
        signature = self._signature(args)
        # models of one class and shape share what Dynamo compiled, but not their patterns
        key = ("", (self._model(args), *signature))
        generation = self._implicit.generation(key, GENERATIONS * CAPACITY)
        timestep = None if self._timestep is None else _number(args[self._timestep])
        conditioning = None if self._conditioning is None else args[self._conditioning]
        if timestep is None:
            generation.restart()  # nothing would tell that a generation starts: always refresh
        known = self._implicit.rasters.get(key)
        fresh = generation.starts(timestep, conditioning)
        if known is None or fresh or not known.of(args):
            # position ids are read once a generation: on a GPU reading waits for it
            known = self._implicit.rasters[key] = self._rasters(args)
        specialization = self._specialization(signature, known.values, args)
        state = generation.turn(timestep, conditioning)
        state.bind((signature, known.values))
        plan = specialization.plan
        call: Call = "plain"
        if plan.segments:
            call = call_at(plan.config, state.step, state.has_pattern)
        return Turn(specialization, call, generation, state)

    def _step(self, turn: Turn, args: Sequence[Any]) -> tuple[Any, ...]:
        inputs = [a.given(v) for a, v in zip(self.arguments, args, strict=True) if a.captured]
        program = turn.specialization.program(turn.call)
        names: tuple[str, ...] = ()
        if program is not None:
            inputs += [turn.state.patterns[name] for name in program.pattern_inputs]
            names = program.pattern_outputs
        results = self._runner(turn.specialization, turn.call)(*inputs)
        own = len(results) - len(names)
        if names:
            turn.state.store(names, results[own:])
        turn.state.done(turn.call)
        turn.specialization.count(turn.call)
        # a CUDA graph writes its outputs to the same place again
        return tuple(r.clone() if isinstance(r, Tensor) and r.is_cuda else r for r in results[:own])

    def _model(self, values: Sequence[Any]) -> tuple[int, ...]:
        """Tells models apart: the identities of what they own."""
        pairs = zip(self.arguments, values, strict=True)
        return tuple(id(v) for a, v in pairs if a.kind == "owned")

    def _rasters(self, values: Sequence[Any]) -> Rasters:
        """What the graph's own inputs enumerate, if they are position ids."""
        pairs = zip(self.arguments, values, strict=True)
        return Rasters.read([v if a.kind == "tensor" else None for a, v in pairs])

    def _signature(self, values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(a.key(v) for a, v in zip(self.arguments, values, strict=True))

    # -- making programs ------------------------------------------------------------------------

    def _specialization(
        self,
        signature: tuple[Any, ...],
        rasters: tuple[Raster | None, ...],
        values: Sequence[Any],
    ) -> Specialization:
        return self.cache.get((signature, rasters), lambda: self._make(values))

    def _make(self, values: Sequence[Any]) -> Specialization:
        captured = capture_dynamo(self.gm, self.arguments, values)
        config = self.options.config
        try:
            return Specialization.of(captured, config)
        except NoMergeSites as error:
            if self.options.allow_unmerged:
                return Specialization.of(captured, ToMAConfig(ratio=0.0))
            raise _no_sites(error) from error

    def _runner(self, specialization: Specialization, call: Call) -> Callable[..., Any]:
        with TRACING:
            if call not in specialization.runners:
                program = specialization.program(call)
                patterns = program.pattern_inputs if program is not None else ()
                graph_module = copy_graph(specialization.graph_module(call))
                specialization.runners[call] = self._compiled(graph_module, patterns)
            return specialization.runners[call]

    def _compiled(
        self, graph_module: fx.GraphModule, patterns: Sequence[str]
    ) -> Callable[..., Any]:
        """Compile a program, told what Dynamo knew about its inputs.

        Without the sources and marks on its inputs, Inductor would take parameters and patterns for
        fresh tensors, and CUDA graphs would copy them at every call.
        """
        given: list[Any] = self.gm.graph.find_nodes(op="placeholder")
        known = [
            (n._dynamo_source, n.meta.get("tensor_dict", {}))
            for n, argument in zip(given, self.arguments, strict=True)
            if argument.captured
        ]
        known += [(_own_source(name), STATIC) for name in patterns]
        nodes: list[Any] = graph_module.graph.find_nodes(op="placeholder")
        for node, (source, marks) in zip(nodes, known, strict=True):
            node._dynamo_source = source
            node.meta["tensor_dict"] = marks
        graph_module.meta.update(self.gm.meta)
        constants = [name for name, _ in graph_module.named_buffers()]
        graph_module._param_name_to_source = {  # type: ignore[assignment]
            name: _own_source(name) for name in constants
        }
        fakes = [node.meta["val"] for node in nodes]
        patches = dict(self.options.patches)
        compiled: Any = inductor.compile_fx(graph_module, fakes, config_patches=patches)
        run: Callable[..., Any] = compiled
        return run


def _own_source(name: str) -> ConstantSource:
    return ConstantSource(f"toma_fx.{name}")


def _position(arguments: Sequence[Argument], name: str) -> int | None:
    """Where the graph's input of that name is."""
    found = [i for i, a in enumerate(arguments) if a.captured and a.name == name]
    return found[0] if found else None


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return float(value.reshape(-1)[0]) if value.numel() else None
    return float(value)


def _no_sites(error: NoMergeSites) -> NoMergeSites:
    """The same, with what may have gone wrong on the way through Dynamo."""
    hint = (
        f"{error.hint}; a graph break may have cut the model: fullgraph=True shows it; "
        'options={"allow_unmerged": True} compiles such pieces unmerged'
    )
    what = "nothing in this graph of torch.compile can be merged with this configuration"
    return NoMergeSites(what, error.reasons, where=error.where, hint=hint)

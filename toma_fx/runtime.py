"""Run: `OptimizedDenoiser` stands where the denoiser stood and picks the program for each step.

    step 0 refresh | 1..m-1 reuse | m reweigh | ... | n refresh ...      (n, m from the schedule)

The choice is made on the host; nothing in a graph depends on the step. Patterns live in buffers
with fixed addresses that refresh and reweigh programs are copied into. Inference only: no
gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from toma_fx.analysis import Flow, analyse
from toma_fx.axis import Analysis
from toma_fx.capture import (
    Captured,
    capture,
    check_model,
    flatten_call,
    ids_grid,
)
from toma_fx.config import ToMAConfig
from toma_fx.errors import SignatureError
from toma_fx.passes.pipeline import Program, rewrite
from toma_fx.passes.rewriter import Templates
from toma_fx.plan import MergePlan, make_plan
from toma_fx.verify import output_values, verify

Call = Literal["plain", "refresh", "reweigh", "reuse"]
Signature = tuple[Any, ...]


def call_at(config: ToMAConfig, step: int, has_pattern: bool) -> Call:
    """Which program runs at `step` (from 0) of a generation."""
    if step < config.first_step or (config.last_step is not None and step > config.last_step):
        return "plain"
    since = step - config.first_step
    if not has_pattern or since % config.destinations_every == 0:
        return "refresh"
    return "reweigh" if since % config.weights_every == 0 else "reuse"


@dataclass
class Specialization:
    """Everything made for one call signature; programs are rewritten when first used."""

    captured: Captured
    analysis: Analysis
    flow: Flow
    plan: MergePlan
    templates: Templates = field(default_factory=dict)
    programs: dict[Call, Program] = field(default_factory=dict)
    runners: dict[Call, Callable[..., Any]] = field(default_factory=dict)

    @classmethod
    def make(
        cls, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], config: ToMAConfig
    ) -> Specialization:
        """Capture, analyse and plan one call."""
        captured = capture(model, args, kwargs)
        outputs = output_values(captured.graph_module.graph)
        verify(captured.graph_module, [i.name for i in captured.inputs], outputs, "capture")
        analysis, flow = analyse(captured, config.grid)
        return cls(captured, analysis, flow, make_plan(analysis, flow, config))

    def program(self, call: Call) -> Program | None:
        """The rewritten program of a call; None for the unmerged one."""
        if call == "plain":
            return None
        if call not in self.programs:
            self.programs[call] = rewrite(
                self.captured, self.analysis, self.flow, self.plan, call, self.templates
            )
        return self.programs[call]

    def graph_module(self, call: Call) -> fx.GraphModule:
        """The graph that runs for a call."""
        program = self.program(call)
        return self.captured.graph_module if program is None else program.graph_module


@dataclass
class GenerationState:
    """State of one generation under one signature.

    Attributes:
        specialization: what runs. step: steps done. timestep: of the last step.
        patterns: fixed-address buffers by name. has_pattern: whether they are filled.
        counts: steps done per kind of program.
    """

    specialization: Specialization
    step: int = 0
    timestep: float | None = None
    patterns: dict[str, Tensor] = field(default_factory=dict)
    has_pattern: bool = False
    counts: dict[Call, int] = field(default_factory=dict)

    def restart(self) -> None:
        """Back to before the first step; buffers keep their addresses."""
        self.step, self.timestep, self.has_pattern = 0, None, False
        self.counts.clear()

    def store(self, names: Sequence[str], values: Sequence[Tensor]) -> None:
        """Copy pattern outputs into the buffers."""
        with torch.inference_mode(False), torch.no_grad():
            for name, value in zip(names, values, strict=True):
                if name not in self.patterns:
                    shape = tuple(value.shape)
                    buffer = torch.empty(shape, dtype=value.dtype, device=value.device)
                    torch._dynamo.mark_static_address(buffer, guard=False)
                    self.patterns[name] = buffer
                self.patterns[name].copy_(value)
        self.has_pattern = True


class OptimizedDenoiser(nn.Module):
    """A denoiser that runs with token merging. Made by `toma_fx.optimize`.

    Called exactly as the original. Attributes and methods it does not define are the original's;
    `isinstance` and `__class__` say the original's class, as diffusers' loaders expect.

    Attributes:
        denoiser: the original model, never modified.
        config_toma: the configuration.
    """

    denoiser: nn.Module

    def __init__(self, model: nn.Module, config: ToMAConfig) -> None:
        super(OptimizedDenoiser, self).__init__()  # noqa: UP008 - __class__ is a property here
        self.denoiser = model
        self.config_toma = config
        self.training = False
        self._specializations: dict[tuple[Signature, tuple[Any, ...]], Specialization] = {}
        self._states: dict[tuple[str, Signature], GenerationState] = {}
        self._fixed: Signature | None = None
        self._fixed_leaves: list[tuple[str, Any]] = []
        self._context = ""
        self._compile: dict[str, Any] | None = None
        self._forward_signature = inspect.signature(model.forward)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.__dict__["_modules"]["denoiser"])

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        return getattr(modules["denoiser"], name)

    # -- calling --------------------------------------------------------------------------------

    @torch._dynamo.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One denoising step, called as the original is.

        Raises:
            SignatureError: the call does not fit a fixed capture.
            CaptureError, NoMergeSites, TileError: at the first call of a signature.
        """
        state, call, inputs = self._prepare(args, kwargs)
        with torch.no_grad():
            results = self._runner(state.specialization, call)(*inputs)
        return self._finish(state, call, results)

    @torch._dynamo.disable
    def _prepare(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[GenerationState, Call, list[Any]]:
        check_model(self.denoiser)
        args, kwargs, timestep = self._normalised(args, kwargs)
        leaves, tree = flatten_call(args, kwargs)
        signature = self._signature(leaves, tree)
        if self._fixed is not None and signature != self._fixed:
            raise self._mismatch(args, kwargs)
        state = self._state(signature, args, kwargs, leaves)
        if timestep is not None and state.timestep is not None and timestep > state.timestep:
            state.restart()
        state.timestep = timestep
        plan = state.specialization.plan
        call: Call = "plain"
        if plan.segments:
            call = call_at(plan.config, state.step, state.has_pattern)
        program = state.specialization.program(call)
        if program is not None:
            leaves = [*leaves, *(state.patterns[name] for name in program.pattern_inputs)]
        return state, call, leaves

    @torch._dynamo.disable
    def _finish(self, state: GenerationState, call: Call, results: Sequence[Any]) -> Any:
        program = state.specialization.program(call)
        names = program.pattern_outputs if program is not None else ()
        own = len(results) - len(names)
        if names:
            state.store(names, results[own:])
        state.step += 1
        state.counts[call] = state.counts.get(call, 0) + 1
        return pytree.tree_unflatten(list(results[:own]), state.specialization.captured.out_spec)

    def _runner(self, specialization: Specialization, call: Call) -> Callable[..., Any]:
        if call not in specialization.runners:
            graph_module = specialization.graph_module(call)
            run: Callable[..., Any] = graph_module.forward
            if self._compile is not None:
                run = torch.compile(graph_module, **self._compile)
            specialization.runners[call] = run
        return specialization.runners[call]

    def _normalised(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], float | None]:
        """The call as keywords where the signature names them, and the timestep as a number.

        A Python number as timestep becomes a tensor, as the denoisers themselves make it one.
        """
        try:
            bound = self._forward_signature.bind(*args, **kwargs)
        except TypeError as error:
            raise SignatureError(
                "the call does not fit the denoiser's forward",
                where=type(self.denoiser).__name__,
                expected=str(self._forward_signature),
                got=str(error),
            ) from error
        named: dict[str, Any] = {}
        rest: tuple[Any, ...] = ()
        for name, value in bound.arguments.items():
            kind = self._forward_signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                rest = value
            elif kind is inspect.Parameter.VAR_KEYWORD:
                named.update(value)
            else:
                named[name] = value
        if rest:
            return args, kwargs, None
        timestep = named.get("timestep")
        if isinstance(timestep, (int, float)) and not isinstance(timestep, bool):
            kind_ = torch.float64 if isinstance(timestep, float) else torch.int64
            named["timestep"] = torch.tensor(timestep, dtype=kind_)
            return (), named, float(timestep)
        if isinstance(timestep, Tensor) and timestep.numel():
            return (), named, float(timestep.reshape(-1)[0])
        return (), named, None

    def _signature(self, leaves: Sequence[Any], tree: Any) -> Signature:
        own = next(iter(self.denoiser.parameters()), None)
        home = (own.dtype, own.device) if own is not None else ()
        return (tree, home, *(_leaf_key(leaf) for leaf in leaves))

    def _state(
        self,
        signature: Signature,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: Sequence[Any],
    ) -> GenerationState:
        """State for this context and signature. Grids of position ids are read at step 0 only."""
        key = (self._context, signature)
        state = self._states.get(key)
        if state is not None and state.step:
            return state
        found = (signature, tuple(ids_grid(leaf) for leaf in leaves))
        if found not in self._specializations:
            self._specializations[found] = Specialization.make(
                self.denoiser, args, kwargs, self.config_toma
            )
        specialization = self._specializations[found]
        if state is None or state.specialization is not specialization:
            state = self._states[key] = GenerationState(specialization)
        return state

    def fix(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Capture for these inputs now and refuse every other signature from here on."""
        call_args, call_kwargs, _ = self._normalised(tuple(args), dict(kwargs))
        leaves, tree = flatten_call(call_args, call_kwargs)
        signature = self._signature(leaves, tree)
        self._state(signature, call_args, call_kwargs, leaves)
        self._fixed, self._fixed_leaves = signature, _named_leaves(call_args, call_kwargs)

    def _mismatch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SignatureError:
        """The first difference between a call and the fixed capture."""
        fixed, given = dict(self._fixed_leaves), dict(_named_leaves(args, kwargs))
        hint = (
            "call optimize() without example_inputs to capture each signature when it first occurs"
        )
        for name in [*fixed, *given]:
            want, got = fixed.get(name, "nothing"), given.get(name, "nothing")
            if want != got:
                return SignatureError(
                    "the call does not fit the captured signature",
                    where=name,
                    expected=str(want),
                    got=str(got),
                    hint=hint,
                )
        return SignatureError(
            "the call does not fit the captured signature",
            where=type(self.denoiser).__name__,
            expected="the captured structure, "
            "with the model on the same device and in the same dtype",
            got="another",
            hint=hint,
        )

    # -- compiling ------------------------------------------------------------------------------

    def compile(self, *args: Any, **kwargs: Any) -> OptimizedDenoiser:  # type: ignore[override]
        """Compile every program with `torch.compile(program, *args, **kwargs)` when it first runs.

        One program per use: refresh, reuse, reweigh if weights are recomputed between refreshes,
        and the unmerged one if the schedule has unmerged steps. Returns self.
        """
        names = list(inspect.signature(torch.compile).parameters)[1:]
        self._compile = {"dynamic": False, **dict(zip(names, args, strict=False)), **kwargs}
        for specialization in self._specializations.values():
            specialization.runners.clear()
        return self

    # -- state ----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget every pattern; the next call is step 0 of a new generation."""
        for state in self._states.values():
            state.restart()

    def _reset_stateful_cache(self, *args: Any, **kwargs: Any) -> None:
        """Called by diffusers pipelines at the end of a generation."""
        self.reset()
        inner = getattr(self.denoiser, "_reset_stateful_cache", None)
        if inner is not None:
            inner(*args, **kwargs)

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Keep separate patterns for the calls inside ("cond", "uncond" of true CFG)."""
        previous, self._context = self._context, name
        inner = getattr(self.denoiser, "cache_context", None)
        try:
            with inner(name) if inner is not None else nullcontext():
                yield
        finally:
            self._context = previous

    @property
    def states(self) -> tuple[GenerationState, ...]:
        """Live states, one per context and signature."""
        return tuple(self._states.values())

    @property
    def specializations(self) -> tuple[Specialization, ...]:
        """What was captured so far, one per signature."""
        return tuple(self._specializations.values())


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.dtype, leaf.device)
    return (type(leaf).__name__, repr(leaf))


def _named_leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(name, shape and dtype or value) of every leaf of a call."""
    leaves = pytree.tree_flatten_with_path((tuple(args), dict(sorted(kwargs.items()))))[0]
    out = []
    for path, leaf in leaves:
        name = ".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path[1:])
        shown = f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else repr(leaf)
        out.append((name, shown))
    return out

"""Run: `OptimizedDenoiser` stands where the denoiser stood and picks the program for each step.

    step 0 refresh | 1..m-1 reuse | m reweigh | ... | n refresh ...      (n, m from the schedule)

The choice is made on the host; nothing in a graph depends on the step. Called like the original, it
keeps the state itself: patterns live in buffers with fixed addresses that refresh and reweigh
programs are copied into (`state.Generation`). Called through `step`, the caller holds the state.
Inference only: no gradients.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import decorators as dynamo_decorators
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils import _pytree as pytree

from toma_fx.capture.companions import check_wrapping
from toma_fx.capture.grids import Raster
from toma_fx.capture.guard import ModelGuard
from toma_fx.capture.model import check_model, flatten_call
from toma_fx.compat import WRAPPING
from toma_fx.errors import AdapterError, CaptureError, CompanionError, SignatureError
from toma_fx.methods.base import MethodConfig
from toma_fx.run.batching import State, batched, checked_states, fitting, following
from toma_fx.run.calls import Arguments, _call_of, _leaf_key, _named_leaves
from toma_fx.run.generation import (
    GENERATIONS,
    Generation,
    Implicit,
    PassState,
    Rasters,
    shared_state,
)
from toma_fx.run.programs import TRACING, Specialization, SpecializationCache, beside_tracing
from toma_fx.run.schedule import Call, call_at


def optimized_of(model: Any) -> OptimizedDenoiser | None:
    """The optimized denoiser that a module is, compiled or not; None for anything else."""
    inner = getattr(model, "_orig_mod", model) if type(model) is OptimizedModule else model
    return inner if type(inner) is OptimizedDenoiser else None


@dataclass(frozen=True)
class Turn:
    """What a call runs: a program of a specialization on inputs, for a pass of a generation."""

    guard: ModelGuard
    specialization: Specialization
    call: Call
    run: Callable[..., Any]
    inputs: list[Any]
    generation: Generation
    state: PassState
    implicit: Implicit


class OptimizedDenoiser(nn.Module):
    """A denoiser that runs with token merging. Made by `toma_fx.optimize`.

    Called exactly as the original. It is a view of the original: modules, parameters and buffers
    are the same dictionaries, attributes and methods it does not define are the original's, and
    `isinstance` and `__class__` say the original's class, as diffusers' loaders expect.

    Attributes:
        denoiser: the original model, never modified.
        config_toma: the configuration.
        cache: the specializations that live.
    """

    denoiser: nn.Module
    config_toma: MethodConfig
    cache: SpecializationCache

    def __init__(self, model: nn.Module, config: MethodConfig, max_signatures: int = 8) -> None:
        super(OptimizedDenoiser, self).__init__()  # noqa: UP008 - __class__ is a property here
        own = self.__dict__
        for shared in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            own[shared] = model.__dict__[shared]
        own["denoiser"] = model
        own["__module__"] = type(model).__module__
        own["training"] = False
        own["config_toma"] = config
        own["cache"] = SpecializationCache(max_signatures)
        own["_guard"] = None
        own["_implicit"] = Implicit()
        own["_local"] = threading.local()
        own["_fixed"] = None
        own["_compile"] = None
        own["_totals"] = {}
        own["_accepted"] = OrderedDict()
        own["_forward_signature"] = inspect.signature(model.forward)

    # -- standing in ----------------------------------------------------------------------------

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.__dict__["denoiser"])

    def __getattr__(self, name: str) -> Any:
        if name in WRAPPING:  # hooks on the original are not hooks on this
            raise AttributeError(name)
        return getattr(self.__dict__["denoiser"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training":
            self.denoiser.training = value
        model = self.__dict__.get("denoiser")
        inner = model is not None and name not in self.__dict__ and name not in WRAPPING
        if inner and (hasattr(model, name) or isinstance(value, (nn.Module, nn.Parameter))):
            setattr(model, name, value)
        else:
            object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            object.__delattr__(self, name)
        else:
            delattr(self.denoiser, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        options = self.__dict__
        arguments = (self.denoiser, self.config_toma, self.cache.capacity)
        return _rebuilt, (*arguments, options["_compile"], options["_fixed"])

    def to(self, *args: Any, **kwargs: Any) -> OptimizedDenoiser:
        """Move or cast the original, in place; graphs follow."""
        self.denoiser.to(*args, **kwargs)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> OptimizedDenoiser:
        self.denoiser._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> OptimizedDenoiser:
        """Set the original's mode; calls in training mode are refused."""
        self.denoiser.train(mode)
        object.__setattr__(self, "training", mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's."""
        return self.denoiser.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Into the original; graphs share its parameters."""
        return self.denoiser.load_state_dict(*args, **kwargs)

    # -- calling --------------------------------------------------------------------------------

    @dynamo_decorators.skip  # disable() would refuse to run while another thread captures
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One denoising step, called as the original is.

        Raises:
            SignatureError: the call does not fit a fixed capture.
            CaptureError, NoMergeSites, TileError: at the first call of a signature.
            AdapterError: the model no longer accepts the call.
            CompanionError: another library acts inside the forward pass (`OffloadError`: by hooks).
            SharedStateError: another thread is in the middle of a generation.
        """
        turn = self._prepare(args, kwargs)
        done = False
        try:
            with torch.no_grad(), beside_tracing(), turn.guard.companions.kernel():
                results = turn.run(*turn.inputs)
            outputs = self._finish(turn, results)
            done = True
        finally:
            self._leave(turn, done)
        return outputs

    @torch._dynamo.disable
    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Turn:
        implicit: Implicit = getattr(self._local, "implicit", None) or self._implicit
        if not implicit.busy.acquire(blocking=False):
            raise shared_state("another thread is in a step with it")
        try:
            return self._turn(implicit, *self._placed(args, kwargs))
        except BaseException:
            implicit.busy.release()
            raise

    def _turn(self, implicit: Implicit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Turn:
        given = self._arguments(args, kwargs)
        key = (self._context, given.signature)
        generation = implicit.generation(key, GENERATIONS * self.cache.capacity)
        known = implicit.rasters.get(key)
        fresh = generation.starts(given.timestep, given.conditioning)
        if known is None or fresh or not known.of(given.leaves):
            # position ids are read once a generation: on a GPU reading waits for it
            known = implicit.rasters[key] = Rasters.read(given.leaves)
        before = implicit.running(self._context, given.timestep) if fresh else None
        owner, specialization = self._specialization(given, known.values)
        state = generation.turn(given.timestep, given.conditioning)
        if before is not None and before is not generation:
            generation.follow(before)
        state.bind(owner)
        plan = specialization.plan
        call: Call = "plain"
        if plan.segments:
            call = call_at(plan.config, state.step, state.has_pattern)
        try:
            run = specialization.runner(call, self._compile)
        except BaseException:
            generation.restart()
            raise
        program = specialization.program(call)
        inputs = given.leaves
        if program is not None:
            inputs = [*inputs, *(state.patterns[name] for name in program.pattern_inputs)]
        return Turn(given.guard, specialization, call, run, inputs, generation, state, implicit)

    @torch._dynamo.disable
    def _leave(self, turn: Turn, done: bool) -> None:
        """Let others in; after an exception the next call starts a generation."""
        if not done:
            turn.generation.restart()
        turn.implicit.busy.release()

    @torch._dynamo.disable
    def _finish(self, turn: Turn, results: Sequence[Any]) -> Any:
        program = turn.specialization.program(turn.call)
        names = program.pattern_outputs if program is not None else ()
        own = len(results) - len(names)
        if names:
            turn.state.store(names, results[own:])
        turn.state.done(turn.call)
        self._count(turn.specialization, turn.call)
        return self._outputs(turn.specialization, results[:own])

    def _outputs(self, specialization: Specialization, results: Sequence[Any]) -> Any:
        return pytree.tree_unflatten(_kept(results), specialization.captured.out_spec)

    def _count(self, specialization: Specialization, call: Call) -> None:
        specialization.count(call)
        self._totals[call] = self._totals.get(call, 0) + 1

    def _placed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, step: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Honour offload hooks that the call passes by: weights and inputs on their device.

        Those are the hooks of the original, and in a `step` those of the stand-in.
        """
        own, hook = self.__dict__.get("_hf_hook"), vars(self.denoiser).get("_hf_hook")
        if own is not None:
            hook = own if step else None
        if hook is None:
            return args, kwargs
        if getattr(hook, "offload", False):
            ModelGuard(self.denoiser)  # says what can't work
        placed: tuple[tuple[Any, ...], dict[str, Any]] = hook.pre_forward(
            self.denoiser, *args, **kwargs
        )
        return placed

    # -- what a call is -------------------------------------------------------------------------

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        check_model(self.denoiser)
        check_wrapping(self)
        args, kwargs, timestep = self._normalised(args, kwargs)
        leaves, tree = flatten_call(args, kwargs)
        guard = self._current_guard()
        signature = (tree, guard.companions.environment, *(_leaf_key(leaf) for leaf in leaves))
        if self._fixed is not None and signature != self._fixed[0]:
            raise self._mismatch(args, kwargs)
        text = kwargs.get("encoder_hidden_states")
        conditioning = text if isinstance(text, Tensor) else None
        return Arguments(args, kwargs, leaves, guard, signature, timestep, conditioning)

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

    def _current_guard(self) -> ModelGuard:
        """What the model is now; the cache follows a change of modules, adapters or buffers."""
        guard: ModelGuard | None = self._guard
        if guard is None or not guard.holds():
            with TRACING:
                guard = ModelGuard(self.denoiser)
                self.__dict__["_guard"] = guard
                self.cache.refresh(self.denoiser)
        return guard

    def _specialization(
        self, given: Arguments, rasters: tuple[Raster | None, ...]
    ) -> tuple[tuple[Any, ...], Specialization]:
        key = (given.guard.key, given.signature, rasters)

        def make() -> Specialization:
            given.guard.companions.check_merging(merging(self.config_toma))
            try:
                with given.guard.companions.kernel():
                    made = Specialization.make(
                        self.denoiser, given.args, given.kwargs, self.config_toma
                    )
                self._accepted[given.signature] = None
                if len(self._accepted) > GENERATIONS * self.cache.capacity:
                    self._accepted.popitem(last=False)
                return made
            except CaptureError as error:
                if given.signature not in self._accepted:
                    raise
                raise AdapterError(
                    "the model no longer accepts a call that it accepted before",
                    where=error.where,
                    expected="adapters that leave the shapes of inputs and layers as they are",
                    got=error.got,
                    hint="unload the adapter that changes shapes, or call the model "
                    "with the inputs it needs now",
                ) from error

        return key, self.cache.get(key, make)

    def specialized(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Specialization, Arguments]:
        """What is made for a call, and the call in canonical form."""
        given = self._arguments(*self._placed(tuple(args), dict(kwargs)))
        return self._specialization(given, given.rasters)[1], given

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the arguments of a call, in order."""
        return tuple(self._forward_signature.parameters)

    def fix(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Capture for these inputs now and refuse every other signature from here on."""
        given = self._arguments(tuple(args), dict(kwargs))
        self._specialization(given, given.rasters)
        leaves = _named_leaves(given.args, given.kwargs)
        self.__dict__["_fixed"] = (given.signature, leaves)

    def _mismatch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SignatureError:
        """The first difference between a call and the fixed capture."""
        fixed, given = dict(self._fixed[1]), dict(_named_leaves(args, kwargs))
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
            "with the model on the same device and in the same dtype, "
            "in the same autocast region and with the same attention backend",
            got="another",
            hint=hint,
        )

    # -- state held by the caller ---------------------------------------------------------------

    def step(self, inputs: Any, state: State | Sequence[State]) -> tuple[Any, Any]:
        """One denoising step with the state in the caller's hands; changes nothing else.

        Args:
            inputs: keyword arguments of the call (a dict), or a pair (args, kwargs).
            state: `State()` before a request's first step, then what the last step returned. Or a
                list of them, one per request, when the batch holds several: request i has the rows
                of the batch after those of request i - 1. Requests may be at different steps.

        Returns:
            (outputs as the denoiser returns them, next state or list of next states).

        Raises:
            StateError: no states, states that do not fill the batch, that belong to another size,
                or whose steps merge in one and not in another.
            SignatureError: inputs that are no call of the denoiser.
            CompanionError: hooks on the optimized denoiser, which only act when it is called.
        """
        single = isinstance(state, State)
        states = checked_states(state)
        self._check_own_hooks()
        args, kwargs = _call_of(inputs)
        given = self._arguments(*self._placed(args, kwargs, step=True))
        _, specialization = self._specialization(given, given.rasters)
        model = (given.guard.key, given.signature[1])  # with its dtype and device
        states = [fitting(s, specialization, model) for s in states]
        call, patterns = batched(states, specialization)
        run = specialization.runner(call, self._compile)
        program = specialization.program(call)
        names = program.pattern_inputs if program is not None else ()
        with torch.no_grad(), beside_tracing(), given.guard.companions.kernel():
            results = run(*given.leaves, *(patterns[name] for name in names))
        made_names = program.pattern_outputs if program is not None else ()
        own = len(results) - len(made_names)
        made = dict(zip(made_names, _kept(results[own:]), strict=True))
        self._count(specialization, call)
        states = following(states, {**patterns, **made}, call, specialization, model)
        outputs = self._outputs(specialization, results[:own])
        return outputs, states[0] if single else states

    def _check_own_hooks(self) -> None:
        """Refuse hooks on the stand-in that a call would run and a `step` would not."""
        hooks = getattr(self.__dict__.get("_diffusers_hook"), "hooks", {})
        tables = (self._forward_pre_hooks, self._forward_hooks)
        names = [type(h).__name__ for h in hooks.values()]
        names += [getattr(h, "__qualname__", repr(h)) for table in tables for h in table.values()]
        if names:
            raise CompanionError(
                "hooks on the optimized denoiser do not act in a step",
                where="step(inputs, state)",
                expected="an optimized denoiser without hooks of its own",
                got=", ".join(names),
                hint="call the denoiser itself, inside own_state() for a state apart; "
                "or denoiser.denoiser.register_forward_hook, which is captured",
            )

    # -- compiling ------------------------------------------------------------------------------

    def compile(self, *args: Any, **kwargs: Any) -> OptimizedDenoiser:  # type: ignore[override]
        """Compile every program with `torch.compile(program, *args, **kwargs)` when it first runs.

        One program per use: refresh, reuse, reweigh if weights are recomputed between refreshes,
        and the unmerged one if the schedule has unmerged steps. Returns self.

        Raises:
            DynamicError: the method's number of merged tokens depends on the data.
        """
        self.config_toma.check_static("compile")
        names = list(inspect.signature(torch.compile).parameters)[1:]
        options = {"dynamic": False, **dict(zip(names, args, strict=False)), **kwargs}
        self.__dict__["_compile"] = options
        for specialization in self.cache.values():
            specialization.runners.clear()
        return self

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """As `compile`: a program is one graph without blocks, and is compiled whole."""
        self.compile(*args, **kwargs)

    # -- implicit state -------------------------------------------------------------------------

    @contextmanager
    def own_state(self) -> Iterator[None]:
        """Calls of this thread inside keep their patterns apart from everybody else's."""
        previous = getattr(self._local, "implicit", None)
        self._local.implicit = Implicit()
        try:
            yield
        finally:
            self._local.implicit = previous

    def reset(self) -> None:
        """Forget every pattern; the next call is step 0 of a new generation."""
        for generation in self._generations():
            generation.restart()

    def _generations(self) -> tuple[Generation, ...]:
        implicit: Implicit = getattr(self._local, "implicit", None) or self._implicit
        return tuple(implicit.generations.values())

    def _reset_stateful_cache(self, *args: Any, **kwargs: Any) -> None:
        """Called by diffusers pipelines at the end of a generation."""
        self.reset()
        inner = getattr(self.denoiser, "_reset_stateful_cache", None)
        if inner is not None:
            inner(*args, **kwargs)

    @property
    def _context(self) -> str:
        return getattr(self._local, "context", "")

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Keep separate patterns for the calls inside ("cond", "uncond" of true CFG)."""
        previous, self._local.context = self._context, name
        inner = getattr(self.denoiser, "cache_context", None)
        try:
            with inner(name) if inner is not None else nullcontext():
                yield
        finally:
            self._local.context = previous

    @property
    def states(self) -> tuple[PassState, ...]:
        """Implicit states that live: one per context, signature and pass."""
        return tuple(s for g in self._generations() for s in g.passes)

    @property
    def specializations(self) -> tuple[Specialization, ...]:
        """What was captured and lives, the one used last at the end."""
        return self.cache.values()

    @property
    def compiled(self) -> bool:
        """Whether `compile` was called."""
        return self._compile is not None

    @property
    def totals(self) -> dict[Call, int]:
        """Steps run since `optimize`, by kind of program."""
        return dict(self._totals)


def merging(config: MethodConfig) -> Callable[[str], bool]:
    """Whether a configuration merges attention at a module path; of "", whether it merges."""
    return lambda path: config.merges_attention(path) if path else config.merges


def _rebuilt(
    model: nn.Module, config: MethodConfig, capacity: int, compile_: Any, fixed: Any
) -> OptimizedDenoiser:
    """A copy: the same settings, no graphs and no state yet."""
    copied = OptimizedDenoiser(model, config, capacity)
    copied.__dict__["_compile"], copied.__dict__["_fixed"] = compile_, fixed
    return copied


def _kept(results: Sequence[Any]) -> list[Any]:
    """Results that stay as they are: a CUDA graph writes its outputs to the same place again."""
    return [r.clone() if isinstance(r, Tensor) and r.is_cuda else r for r in results]

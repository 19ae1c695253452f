"""Run: `OptimizedDenoiser` stands where the denoiser stood and picks the program for each step.

    step 0 refresh | 1..m-1 reuse | m reweigh | ... | n refresh ...      (n, m from the schedule)

The choice is made on the host; nothing in a graph depends on the step. Called like the original, it
keeps the state itself, in buffers with fixed addresses (`stepper.Stepper`). Called through `step`,
the caller holds the state (`batching.step_states`). Inference only: no gradients.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from toma_fx.capture.companions import check_wrapping
from toma_fx.capture.grids import Raster
from toma_fx.capture.model import check_model, flatten_call
from toma_fx.compat.compilers import (
    compiled_original,
    disable_dynamo,
    skip_frame,
)
from toma_fx.compat.libraries import reset_stateful_cache
from toma_fx.compat.pytorch import tree_unflatten
from toma_fx.methods.base import MethodConfig
from toma_fx.run.arguments import are_taken, check_leaves, plain_numbers
from toma_fx.run.batching import ModelKey, State, step_states
from toma_fx.run.calls import (
    Arguments,
    CallSignature,
    NamedCall,
    call_of_step,
    describe_leaves,
    first_difference,
    leaf_key,
    name_arguments,
)
from toma_fx.run.compiling import Compiles
from toma_fx.run.generation import PassState
from toma_fx.run.gradients import needs_gradient, refuse_gradient
from toma_fx.run.guidance import GuidanceRanks, SplitsGuidance
from toma_fx.run.keeps_state import KeepsState
from toma_fx.run.program_set import StepCall
from toma_fx.run.programs import Specialization
from toma_fx.run.ranks import Ranks, watched
from toma_fx.run.specializations import SpecializationCache
from toma_fx.run.specializing import Specializes
from toma_fx.run.stand_in import StandIn
from toma_fx.run.stepper import Stepper
from toma_fx.run.warmup import WarmsUp


class OptimizedDenoiser(  # type: ignore[misc]
    Specializes, Compiles, WarmsUp, SplitsGuidance, KeepsState, StandIn
):
    """A denoiser that runs with token merging. Made by `toma_fx.optimize`.

    Called exactly as the original, of which it is a view.

    Attributes:
        denoiser: the original model, never modified.
        cache: the specializations that live.
    """

    cache: SpecializationCache

    def __init__(
        self,
        model: nn.Module,
        config: MethodConfig,
        max_signatures: int = 8,
        like: OptimizedDenoiser | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        for function in (OptimizedDenoiser.forward, OptimizedDenoiser._run):
            skip_frame(function)
        super().__init__(model)
        own = self.__dict__
        self._set_up(config)
        own["cache"] = SpecializationCache(max_signatures)
        own["_guard"] = None
        own["_stepper"] = Stepper("the optimized denoiser")
        own["_like"], own["_ranks"] = like, ranks
        own["_compile"] = own["_fixed"] = own["_guidance"] = None
        own["_accepted"] = OrderedDict()
        own["_signature"] = CallSignature(model)

    def __reduce_ex__(self, protocol: Any) -> Any:
        options = self.__dict__
        arguments = (self.denoiser, self._own, self.cache.capacity, self._ranks)
        guidance = self._guidance and self._guidance.ranks
        merges = self._standing.config == self._own
        return _rebuild, (*arguments, options["_compile"], options["_fixed"], guidance, merges)

    def __repr__(self) -> str:
        config = self.config_toma
        amount = f", ratio={config.ratio}" if hasattr(config, "ratio") else ""
        cached = ", cached steps" if config.caching else ""
        how = f"method={config.name!r}{amount}{cached}, {'compiled' if self.compiled else 'eager'}"
        return f"OptimizedDenoiser({how}) of {self.denoiser!r}"

    # -- calling --------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One denoising step, called as the original is.

        Raises:
            SignatureError: the call does not fit a fixed capture, or no graph can take it.
            CaptureError, NoMergeSites, TileError: at the first call of a signature
                (`StatefulModelError`: the model keeps state in Python).
            AdapterError: the model no longer accepts the call.
            GradientError: gradients are asked for, and tokens merge.
            CompanionError: another library acts inside the forward pass (`OffloadError`: by hooks).
            GenerationError: the call contradicts what `generation` was told, or the steps that a
                schedule needs can't be counted.
            SharedStateError: another thread is in the same pass of a generation.
        """
        around = self.__dict__.get("forward")
        if around is not None:
            around.ran = True
        if self._guidance is not None:
            call = self._named(args, kwargs, by_name=True)
            return self._guidance.call(self._run, self._stepper.context, call.args, call.kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """One denoising step of all that a call asks for."""
        if self._runs_original((args, kwargs)):
            return self.denoiser(*args, **kwargs)
        turn = _DenoiserTurn(self, args, kwargs)
        return self._stepper.step(turn.prepare, turn.find, turn.unflatten)

    def step(
        self,
        inputs: Any,
        state: State | Sequence[State],
        *,
        rows: Sequence[int] | None = None,
    ) -> tuple[Any, Any]:
        """One denoising step with the state in the caller's hands; changes nothing else.

        Args:
            inputs: keyword arguments of the call (a dict), or a pair (args, kwargs).
            state: `State()` before a request's first step, then what the last step returned. Or a
                list of them, one per request, when the batch holds several: request i has the rows
                of the batch after those of request i - 1. Requests may be at different steps.
            rows: of each request, where they differ; by default those that keep nothing yet share
                evenly what others leave.

        Returns:
            (outputs as the denoiser returns them, next state or list of next states).

        Raises:
            StateError: no states, states that do not fill the batch, that belong to another size,
                or whose steps merge in one and not in another.
            SignatureError: inputs that are no call of the denoiser.
            CompanionError: hooks on the optimized denoiser, which only act when it is called.
            DynamicError: a cache with a threshold.
        """
        self._refuse_own_hooks()
        self.config_toma.check_fixed_steps("step(inputs, state)")
        args, kwargs = call_of_step(inputs)
        original = self._runs_original((args, kwargs))
        arguments = self._arguments(*self._apply_offload_hook(args, kwargs, step=True))
        programs = self._specialization_of(arguments)
        environment = arguments.signature[1]  # with dtype and device
        model = ModelKey(arguments.guard, environment, self.variant.plan)
        outputs, following = step_states(
            self._stepper,
            programs,
            arguments.leaves,
            state,
            model,
            watched(arguments.guard.companions.kernel, self._ranks),
            rows,
        )
        if original:
            return self.denoiser(*args, **kwargs), following
        return tree_unflatten(outputs, programs.captured.out_spec), following

    # -- what a call is -------------------------------------------------------------------------

    @disable_dynamo
    def _runs_original(self, call: Any) -> bool:
        """Whether the original has to run, for the sake of gradients; refused where it merges."""
        if self.config_toma.changes_outputs:
            hint = "turn merging and caching off for them: ratio=0, or toma_fx.restore(model)"
            refuse_gradient(call, "the optimized denoiser", hint)
        return needs_gradient(call)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        check_model(self.denoiser)
        check_wrapping(self)
        call = self._named(args, kwargs)
        leaves, tree = flatten_call(call.args, call.kwargs)
        if not are_taken(leaves):
            args, kwargs = plain_numbers(args, kwargs)
            call = self._named(args, kwargs)
            check_leaves(call.args, call.kwargs)
            leaves, tree = flatten_call(call.args, call.kwargs)
        guard = self._current_guard()
        signature = (tree, guard.companions.environment, *(leaf_key(leaf) for leaf in leaves))
        if self._fixed is not None and signature != self._fixed[0]:
            own = describe_leaves(call.args, call.kwargs)
            raise first_difference(self._fixed[1], own, type(self.denoiser).__name__)
        return Arguments(call, leaves, guard, signature)

    def _named(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, by_name: bool = False
    ) -> NamedCall:
        where, signature = type(self.denoiser).__name__, self._signature.now()
        keep = 0 if by_name or not self._signature.is_wrapped else len(args)
        return name_arguments(signature, args, kwargs, where, keep=keep)

    def specialized(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Specialization, Arguments]:
        """What is made for a call, and the call in canonical form."""
        arguments = self._arguments(*self._apply_offload_hook(tuple(args), dict(kwargs)))
        return self._specialization_of(arguments), arguments

    @property
    def can_mix(self) -> bool:
        """Whether a batch may hold requests that are due different kinds of programs."""
        return not any(stage.static_form for stage in self.config_toma.stages)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the arguments of a call, in order."""
        return tuple(self._signature.now().parameters)

    def fix(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Capture for these inputs now and refuse every other signature from here on."""
        arguments = self._arguments(tuple(args), dict(kwargs))
        self._specialization_of(arguments)
        leaves = describe_leaves(arguments.call.args, arguments.call.kwargs)
        self.__dict__["_fixed"] = (arguments.signature, leaves)

    # -- implicit state -------------------------------------------------------------------------

    def _reset_stateful_cache(self, *args: Any, **kwargs: Any) -> None:
        """Called by diffusers pipelines at the end of a generation."""
        self.reset()
        reset_stateful_cache(self.denoiser, *args, **kwargs)

    @contextmanager
    def cache_context(self, name: str, **about: Any) -> Iterator[None]:
        """Calls inside are a pass of their own ("cond", "uncond" of true CFG).

        Args:
            name: of the pass. about: what diffusers tells its caches beside it.
        """
        inner = getattr(self.denoiser, "cache_context", None)
        inside = inner(name, **about) if inner is not None else nullcontext()
        with self._stepper.cache_context(name, **about), inside:
            yield

    @property
    def states(self) -> tuple[PassState, ...]:
        """States of the passes that live, of this thread or of the generation that was told."""
        return tuple(s for g in self._stepper.generations() for s in g.passes)

    @property
    def specializations(self) -> tuple[Specialization, ...]:
        """What was captured and lives, the one used last at the end."""
        return self.cache.values()

    @property
    def totals(self) -> dict[str, int]:
        """Steps run since `optimize`, by kind of program."""
        totals: dict[str, int] = self._stepper.totals
        return totals

    @property
    def unsure(self) -> int:
        """Steps that selected anew because it was not clear what they belong to."""
        count: int = self._stepper.unsure
        return count


class _DenoiserTurn:
    """One call on its way through the stepper."""

    def __init__(
        self, owner: OptimizedDenoiser, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.owner, self.args, self.kwargs = owner, args, kwargs

    def prepare(self) -> StepCall:
        """The call in canonical form."""
        owner = self.owner
        self.arguments = owner._arguments(*owner._apply_offload_hook(self.args, self.kwargs))
        call, leaves = self.arguments.call, self.arguments.leaves
        return StepCall(
            self.arguments.signature,
            leaves,
            leaves,
            label=call.label,
            token=call.token,
            kernel=watched(self.arguments.guard.companions.kernel, owner._ranks),
        )

    def find(self, rasters: tuple[Raster | None, ...]) -> tuple[Hashable, Specialization]:
        """The programs of the call."""
        key, self.programs = self.owner._specialization(self.arguments, rasters)
        return key, self.programs

    def unflatten(self, outputs: list[Any]) -> Any:
        """The outputs as the denoiser returns them."""
        return tree_unflatten(outputs, self.programs.captured.out_spec)


def optimized_of(model: Any) -> OptimizedDenoiser | None:
    """The optimized denoiser that a module is, compiled or not; None for anything else."""
    inner = compiled_original(model)
    return inner if type(inner) is OptimizedDenoiser else None


def _rebuild(
    model: nn.Module,
    config: MethodConfig,
    capacity: int,
    ranks: Any,
    compile_: Any,
    fixed: Any,
    guidance: Ranks | None,
    merges: bool,
) -> OptimizedDenoiser:
    """A copy: the same settings, no graphs and no state yet."""
    copy = OptimizedDenoiser(model, config, capacity, ranks=ranks)
    copy.__dict__["_compile"], copy.__dict__["_fixed"] = compile_, fixed
    if guidance is not None:
        copy.__dict__["_guidance"] = GuidanceRanks(guidance, copy.parameter_names[0])
    if not merges:
        copy.disable_merging()
    return copy

"""An artifact as a module that stands in a diffusers pipeline as the denoiser did."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from toma_fx.analysis.roles import Roles
from toma_fx.capture.grids import Raster
from toma_fx.compat.libraries import ORIGINAL_FORWARD
from toma_fx.errors import ArtifactError
from toma_fx.export.calls import find_call, kept_settings, match_call
from toma_fx.export.manifest import CallSpec, Manifest, ProgramSpec
from toma_fx.export.targets import Runtime
from toma_fx.run.arguments import plain_numbers
from toma_fx.run.batching import State, step_states
from toma_fx.run.calls import call_of_step
from toma_fx.run.gradients import refuse_gradient
from toma_fx.run.keeps_state import KeepsState
from toma_fx.run.program_set import OVERWRITES, StepCall
from toma_fx.run.schedule import Schedule
from toma_fx.run.stepper import Stepper


class ArtifactPrograms:
    """The programs of a call of an artifact, by kind: a `run.program_set.ProgramSet`.

    Attributes:
        call: of the manifest. settings: what kept tensors must agree on to fit.
    """

    def __init__(self, call: CallSpec, place: int, settings: Hashable, runtime: Runtime) -> None:
        self.call, self._place, self._runtime = call, place, runtime
        self.schedule, self.older, self.watched = call.schedule, call.older, ""
        paths = [spec.path for spec in call.inputs]
        timestep = paths.index(call.timestep) if call.timestep else None
        self.roles = Roles.of_names(["_".join(p) for p in paths], [True] * len(paths), timestep)
        self.settings = settings
        self.batch_sizes = frozenset(spec.shape[0] for spec in call.kept if spec.shape)

    def takes(self, kind: str) -> tuple[str, ...]:
        """Names of the kept tensors that follow the model's own inputs."""
        return self._spec(kind).takes

    def gives(self, kind: str) -> tuple[str, ...]:
        """Names of the kept tensors that follow the model's own outputs."""
        return self._spec(kind).gives

    def instead(self, kind: str) -> str:
        """The kind that runs while something that `kind` takes is not kept."""
        return self._spec(kind).instead

    def mixed(self, kinds: Collection[str]) -> str | None:
        """None: artifacts hold no program for requests that are due different kinds."""
        return None

    def count(self, kind: str) -> None:
        """Nothing to count in an artifact."""

    def runner(self, kind: str) -> Callable[..., list[Tensor]]:
        """The program: (inputs, kept tensors) -> (outputs, kept tensors), flat."""
        own, spec = len(self.call.inputs), self._spec(kind)

        def run(*flat: Tensor) -> list[Tensor]:
            kept = dict(zip(spec.takes, flat[own:], strict=True))
            outputs, updates = self._runtime.run(self._place, kind, flat[:own], kept)
            # the next run may write to the same memory
            return [x.clone() for x in (*outputs, *(updates[name] for name in spec.gives))]

        setattr(run, OVERWRITES, False)
        return run

    def _spec(self, kind: str) -> ProgramSpec:
        if kind not in self.call.programs:
            raise ArtifactError(
                "the artifact lacks a program that its schedule names",
                where="manifest.json",
                expected=f"a program of the kind {kind!r}",
                got=", ".join(self.call.programs),
                hint="the artifact is damaged or was edited: build it anew",
            )
        return self.call.programs[kind]


class ArtifactDenoiser(KeepsState, nn.Module):
    """A denoiser that runs from an artifact. Made by `toma_fx.load`.

    Called by keyword as the original, or with its arguments in the order of the manifest. It keeps
    state as an optimized denoiser does: by `cache_context` and `own_state`, from step to step,
    reset at the end of a pipeline call; or the caller holds it, `step(inputs, state)`. It has no
    parameters: weights are in the artifact. Of the calls (sizes) that the artifact is for, each
    step runs the one that its inputs are of.

    Attributes:
        manifest: what the artifact says of itself. config: the original's configuration.
        cast: whether calls may come in another floating dtype; they get outputs in theirs.
    """

    def __init__(
        self, manifest: Manifest, runtime: Runtime, device: torch.device, *, cast: bool = False
    ) -> None:
        super().__init__()
        self.cast = cast
        self.manifest = manifest
        self.config = _Config(manifest.model_config)
        every = enumerate(zip(manifest.calls, kept_settings(manifest.calls), strict=True))
        self._programs = [ArtifactPrograms(call, i, kept, runtime) for i, (call, kept) in every]
        self._device = device
        self._stepper = Stepper("the loaded artifact")
        self._digest = manifest.digest
        self.training = False
        inside = manifest.model_config.get("projection_class_embeddings_input_dim")
        if inside is not None:  # SDXL's pipelines compare it with what they made
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=inside))
        adapters = max(
            sum("ip_adapter_image_embeds" in spec.path for spec in call.inputs)
            for call in manifest.calls
        )
        if adapters:  # Flux's pipelines compare it with the pictures they were given
            self.encoder_hid_proj = SimpleNamespace(num_ip_adapters=adapters)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the programs run."""
        return self._device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One denoising step.

        Raises:
            SignatureError: other inputs than the artifact was built for: names the first.
            GradientError: gradients are asked for.
            GenerationError: the call contradicts what `generation` was told, or the steps that a
                schedule needs can't be counted.
            SharedStateError: another thread is in the same pass of a generation.
        """
        turn = _ArtifactTurn(self, args, kwargs)
        return self._stepper.step(turn.prepare, turn.find, turn.unflatten)

    can_mix = False
    """Whether a batch may hold requests that are due different kinds of programs."""

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the arguments of a call, in order."""
        inputs = (spec for call in self.manifest.calls for spec in call.inputs)
        return tuple(dict.fromkeys(spec.path[0] for spec in inputs))

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
                list of them, one per request, when the batch holds several, in batch order; an
                artifact serves requests that are due the same kind of program.
            rows: of each request, where they differ.

        Returns:
            (outputs as the denoiser returned them, next state or list of next states).

        Raises:
            StateError: no states, states that do not fill the batch, that belong to another
                artifact's shapes, or that are due different kinds of programs.
            SignatureError: inputs that the artifact was not built for.
        """
        args, kwargs = call_of_step(inputs)
        turn = _ArtifactTurn(self, args, kwargs)
        call = turn.prepare()
        _, (_, programs) = self._stepper.find(call.signature, call.ids, turn.find)
        model = (self._digest, str(self._device))
        outputs, following = step_states(
            self._stepper, programs, call.leaves, state, model, nullcontext, rows
        )
        return turn.unflatten(outputs), following

    def _schedule(self, state: State) -> Schedule:
        """Of the call that a state is of; before it keeps anything, of the first."""
        own = (each for each in self._programs if each.settings == state.settings)
        return next(own, self._programs[0]).schedule

    # -- standing in ----------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"an artifact has no {name!r}: only programs are left of the model. LoRA and "
                "IP-Adapters go into the model before the build; nothing can change it later"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse the hooks of offloading, which would look for parameters.

        Raises:
            ArtifactError: the attribute is what accelerate sets for its hooks.
        """
        if name == ORIGINAL_FORWARD:
            raise ArtifactError(
                "an artifact can't be offloaded",
                where="enable_model_cpu_offload()",
                expected="weights that stay on the artifact's device",
                hint="leave offloading out, or move the pipeline's other components yourself",
            )
        super().__setattr__(name, value)

    def cache_context(self, name: str, **about: Any) -> AbstractContextManager[Any]:
        """Calls inside are a pass of their own ("cond", "uncond" of true CFG).

        Args:
            name: of the pass. about: what diffusers tells its caches beside it.
        """
        return self._stepper.cache_context(name, **about)

    def _reset_stateful_cache(self, *args: Any, **kwargs: Any) -> None:
        """Called by diffusers pipelines at the end of a generation."""
        self.reset()

    def to(self, *args: Any, **kwargs: Any) -> ArtifactDenoiser:
        """Stay: an artifact runs where and in the dtype it was built for.

        Raises:
            ArtifactError: another device or dtype is asked for.
        """
        device, dtype = _destination((*args, *kwargs.values()))
        wrong_device = device is not None and device.type != self._device.type
        if wrong_device or (dtype is not None and dtype != self.dtype):
            raise ArtifactError(
                "an artifact can't be moved or cast",
                where="to()",
                expected=f"{self._device}, {self.dtype}",
                got=f"{device}, {dtype}",
                hint="build it for that device and dtype",
            )
        return self

    def train(self, mode: bool = True) -> ArtifactDenoiser:
        """Refuse training mode.

        Raises:
            ArtifactError: `mode` is true.
        """
        if mode:
            raise ArtifactError("an artifact can't be trained", where="train()")
        return self


class _ArtifactTurn:
    """One call on its way through the stepper."""

    def __init__(
        self, owner: ArtifactDenoiser, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        self.owner, self.args, self.kwargs = owner, args, kwargs

    def prepare(self) -> StepCall:
        """The call in canonical form."""
        owner = self.owner
        refuse_gradient((self.args, self.kwargs), "the loaded artifact")
        args, kwargs = plain_numbers(self.args, self.kwargs)
        call = match_call(owner.manifest, args, kwargs, owner.device, cast=owner.cast)
        self.places, self.dtype = call.places, call.dtype
        return StepCall(signature=call.places, leaves=call.inputs, ids=call.ids)

    def find(self, rasters: tuple[Raster | None, ...]) -> tuple[Hashable, ArtifactPrograms]:
        """The programs; position ids must enumerate the grid that they merge on."""
        place = find_call(self.owner.manifest.calls, self.places, rasters)
        self.programs = self.owner._programs[place]
        return place, self.programs

    def unflatten(self, outputs: list[Tensor]) -> Any:
        """The outputs as the denoiser returned them, in the dtype of the call."""
        structure, dtype = self.programs.call.structure, self.dtype
        if dtype is not None:
            outputs = [x.to(dtype) if x.is_floating_point() else x for x in outputs]
        if structure.kind == "tensor":
            return outputs[0]
        if structure.kind == "list":
            return outputs
        if structure.kind == "tuple":
            return tuple(outputs)
        return _Output(zip(structure.fields, outputs, strict=True))


def _destination(values: Sequence[Any]) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and dtype among the arguments of `Module.to`."""
    device, dtype = None, None
    for value in values:
        if isinstance(value, Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (str, torch.device)) or type(value) is int:
            device = torch.device(value)
    return device, dtype


class _Config(dict[str, Any]):
    """The original's configuration: keys are attributes too, as diffusers' pipelines expect."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class _Output(dict[str, Tensor]):
    """Outputs by name: `out.sample`, `out["sample"]` or `out[0]`, as diffusers' output classes."""

    def __getattr__(self, name: str) -> Tensor:
        if name in self:
            return self[name]
        raise AttributeError(name)

    def __getitem__(self, key: str | int) -> Tensor:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)

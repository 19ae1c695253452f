"""`load`: an artifact as a module that stands in a diffusers pipeline as the denoiser did."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from toma_fx.capture.grids import raster
from toma_fx.compat import ORIGINAL_FORWARD
from toma_fx.errors import ArtifactError, SignatureError
from toma_fx.export.artifact import verify_artifact
from toma_fx.export.manifest import Manifest, TensorSpec, raster_spec
from toma_fx.export.registry import TARGETS, target_class
from toma_fx.export.targets import Runtime
from toma_fx.run.generation import Generation, PassState

NUMBERS = ("timestep", "_ids")
"""Ends of the names of inputs that may come in any dtype that holds their values: schedulers count
timesteps in integers or not, pipelines number positions in the dtype of their embeddings."""


class ArtifactDenoiser(nn.Module):
    """A denoiser that runs from an artifact. Made by `toma_fx.load`.

    Called by keyword as the original, or with its arguments in the order of the manifest. It keeps
    the merging state as an optimized denoiser does: by `cache_context`, from step to step, reset at
    the end of a pipeline call. It has no parameters: weights are in the artifact.

    Attributes:
        manifest: what the artifact says of itself. config: the original's configuration.
    """

    def __init__(self, manifest: Manifest, runtime: Runtime, device: torch.device) -> None:
        super().__init__()
        self.manifest = manifest
        self.config = _Config(manifest.model_config)
        self._runtime, self._device = runtime, device
        self._generations: dict[str, Generation] = {}
        self._context = ""
        self._busy = threading.Lock()
        self.training = False
        inside = manifest.model_config.get("projection_class_embeddings_input_dim")
        if inside is not None:  # SDXL's pipelines compare it with what they made
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=inside))
        adapters = sum("ip_adapter_image_embeds" in spec.path for spec in manifest.inputs)
        if adapters:  # Flux's pipelines compare it with the pictures they were given
            self.encoder_hid_proj = SimpleNamespace(num_ip_adapters=adapters)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        found: torch.dtype = getattr(torch, self.manifest.dtype)
        return found

    @property
    def device(self) -> torch.device:
        """Where the programs run."""
        return self._device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One denoising step.

        Raises:
            SignatureError: other inputs than the artifact was built for: names the first.
            SharedStateError: another thread is in the middle of a generation.
        """
        inputs, leaves = self._inputs(args, kwargs)
        with self._busy, torch.no_grad():
            generation = self._generations.setdefault(self._context, Generation())
            timestep = _number(leaves.get(("timestep",)))
            conditioning = leaves.get(("encoder_hidden_states",))
            if generation.starts(timestep, conditioning):
                self._check_rasters(leaves)
            try:
                state = generation.turn(timestep, conditioning)
                outputs = self._step(state, inputs)
            except BaseException:
                generation.restart()
                raise
        return self._structured(outputs)

    def _step(self, state: PassState, inputs: Sequence[Tensor]) -> list[Tensor]:
        call = self.manifest.schedule.call(state.step, state.has_pattern)
        program = self.manifest.programs[call]
        patterns = {name: state.patterns[name] for name in program.patterns_in}
        outputs, made = self._runtime.run(call, inputs, patterns)
        if made:
            state.store(list(made), list(made.values()))
        state.done(call)
        return [x.clone() for x in outputs]

    # -- what a call is -------------------------------------------------------------------------

    def _inputs(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[Tensor], dict[tuple[str, ...], Any]]:
        """The inputs of the programs, and every leaf by its path."""
        given = {**dict(zip(self.manifest.parameters, args, strict=False)), **kwargs}
        leaves = dict(_leaves(given))
        inputs = []
        for spec in self.manifest.inputs:
            value = leaves.get(spec.path)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                value = torch.tensor(value, dtype=getattr(torch, spec.tensor.dtype))
            want = f"{spec.tensor.shape} {spec.tensor.dtype}"
            if not isinstance(value, Tensor):
                raise _misfit(spec.path, want, repr(value))
            if spec.path[-1].endswith(NUMBERS):
                value = _exactly(value, getattr(torch, spec.tensor.dtype))
            found = TensorSpec.of(spec.tensor.name, value)
            got = f"{found.shape} {found.dtype}"
            if got != want:
                raise _misfit(spec.path, want, got)
            inputs.append(value.to(self._device))
        known = {spec.path for spec in self.manifest.inputs}
        for constant in self.manifest.constants:
            if leaves.get(constant.path) != constant.value:
                value = repr(leaves.get(constant.path))
                raise _misfit(constant.path, repr(constant.value), value)
            known.add(constant.path)
        extra = next((p for p, x in leaves.items() if p not in known and x is not None), None)
        if extra is not None:
            raise _misfit(
                extra, "nothing: the artifact has no such input", repr(leaves[extra])[:80]
            )
        return inputs, leaves

    def _check_rasters(self, leaves: Mapping[tuple[str, ...], Any]) -> None:
        """Position ids must enumerate the grid that the programs merge on."""
        for spec in self.manifest.inputs:
            if spec.raster is None:
                continue
            got = raster_spec(raster(leaves[spec.path]))
            if got != spec.raster:
                raise _misfit(spec.path, f"positions of a grid {spec.raster}", str(got))

    def _structured(self, outputs: list[Tensor]) -> Any:
        structure = self.manifest.structure
        if structure.kind == "tensor":
            return outputs[0]
        if structure.kind == "list":
            return outputs
        if structure.kind == "tuple":
            return tuple(outputs)
        return _Output(zip(structure.fields, outputs, strict=True))

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

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Keep separate patterns for the calls inside ("cond", "uncond" of true CFG)."""
        previous, self._context = self._context, name
        try:
            yield
        finally:
            self._context = previous

    def reset(self) -> None:
        """Forget every pattern; the next call is step 0 of a new generation."""
        for generation in self._generations.values():
            generation.restart()

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


def load(
    path: str | Path, *, device: str | torch.device | None = None, **options: Any
) -> ArtifactDenoiser:
    """Load an artifact.

    Args:
        path: the folder that a build made.
        device: to run on; what the artifact was built on if not given. Compiled artifacts are for
            devices of that kind alone, ONNX models for the CPU and for CUDA.
        options: of the target: `providers=` for ONNX Runtime.

    Returns:
        A module that stands where the denoiser stood: `pipe.unet = toma_fx.load("sdxl-onnx")`.

    Raises:
        ArtifactError: a file is missing or has changed, another version of the manifest or of what
            the target needs, another device or architecture. Nothing of the artifact was run then.
        MissingPackageError: the target needs a package that is not installed.
    """
    folder = Path(path)
    manifest = verify_artifact(folder)
    wanted = torch.device(manifest.device.type if device is None else device)
    if manifest.target.name not in TARGETS:
        raise ArtifactError(
            "the artifact has an unknown target",
            where="target.name",
            expected=", ".join(TARGETS),
            got=repr(manifest.target.name),
            hint="read it with the toma_fx that made it",
        )
    target = target_class(manifest.target.name)
    return ArtifactDenoiser(manifest, target.open(folder, manifest, wanted, options), wanted)


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, leaf) of nested arguments."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _leaves(inner, (*path, str(i)))
    else:
        yield path, value


def _exactly(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype, if that changes no value."""
    if value.dtype == dtype:
        return value
    cast = value.to(dtype)
    return cast if torch.equal(cast.to(value.dtype), value) else value


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return float(value.reshape(-1)[0]) if value.numel() else None
    return None if value is None else float(value)


def _misfit(path: Sequence[str], expected: str, got: str) -> SignatureError:
    return SignatureError(
        "the call does not fit the artifact",
        where=".".join(path),
        expected=expected,
        got=got,
        hint="an artifact is for the shapes, dtypes and constants that it was built with",
    )

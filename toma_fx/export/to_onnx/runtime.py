"""Running ONNX models in ONNX Runtime."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from toma_fx.errors import ArtifactError, UnknownNameError, nearest
from toma_fx.export.manifest import CallSpec, Manifest, TensorSpec
from toma_fx.export.packages import import_onnx, missing_onnx
from toma_fx.export.reading import ArtifactFiles, reading
from toma_fx.export.targets import Runtime, check_options, separate_inputs
from toma_fx.export.to_onnx.weights import WEIGHTS
from toma_fx.run.program_set import split_outputs

LOAD_OPTIONS = ("providers", "threads", "prepack")
Provider = str | tuple[str, Mapping[str, Any]]
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class ORTRuntime(Runtime):
    """The models of an artifact in ONNX Runtime.

    Inputs are read, and outputs written, where torch has them, on the GPU too: nothing goes through
    the host. Weights are read once and given to every session.

    Attributes:
        sessions: by call and kind. providers: those in use, first choice first.
    """

    def __init__(
        self, artifact: ArtifactFiles, device: torch.device, options: Mapping[str, Any]
    ) -> None:
        """See `ONNXTarget.open`."""
        manifest = artifact.manifest
        ort = import_onnx("onnxruntime")
        check_options("load() of an onnx artifact", options, LOAD_OPTIONS)
        self._device = device
        chosen = options.get("providers")
        providers = default_providers(device) if chosen is None else list(chosen)
        self.providers = _known(ort, providers)
        _check_device(self.providers, device, manifest)
        shared = _shared(artifact, device, self.providers)
        # ONNX Runtime keeps pointers to these
        self._weights = {name: _ort_value(ort, x) for name, x in shared.items()}
        self._kept = shared
        self.sessions: dict[tuple[int, str], Any] = {}
        self._programs: dict[tuple[int, str], _Bound] = {}
        with reading(artifact.file(WEIGHTS)), TemporaryDirectory() as folder:
            weights = Path(folder, WEIGHTS)
            if shared:  # models name the file, which must be there, but nothing is read from it
                weights.touch()
            else:
                artifact.copy(WEIGHTS, weights)
            for i, kind, call in manifest.each_program:
                program = call.programs[kind]
                model = artifact.read(program.file)
                session = self._session(ort, model, program.file, folder, options, providers)
                _check_model(session, call, kind)
                self.sessions[i, kind] = session
                outputs = call.outputs_of(kind)
                self._programs[i, kind] = _Bound(session, outputs, program.gives, device)

    def run(
        self, call: int, kind: str, inputs: Sequence[Tensor], kept: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """One step; see `Runtime.run`."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # ONNX Runtime has its own
        return self._programs[call, kind].run(inputs, kept)

    def _session(
        self,
        ort: Any,
        model: bytes,
        name: str,
        folder: str,
        options: Mapping[str, Any],
        providers: Sequence[Provider],
    ) -> Any:
        """One model, ready to run.

        Args:
            ort: ONNX Runtime. model: its bytes. name: of its file, for messages. folder: the only
                one that it may read weights from. options, providers: of `toma_fx.load`.

        Raises:
            ArtifactError: ONNX Runtime can't read it, or not with the first provider.
        """
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        if "threads" in options:
            settings.intra_op_num_threads = options["threads"]
        if not options.get("prepack", False):
            settings.add_session_config_entry("session.disable_prepacking", "1")
            # the levels above arrange the weights of convolutions anew
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        settings.add_session_config_entry(_WEIGHTS_FOLDER, folder)
        for weight, value in self._weights.items():
            settings.add_initializer(weight, value)
        try:
            session = ort.InferenceSession(model, settings, providers=list(providers))
        except Exception as error:  # ONNX Runtime's errors have no base of their own
            raise ArtifactError(
                "ONNX Runtime can't open a model",
                where=name,
                got=f"{type(error).__name__}: {str(error)[:500]}",
                hint="install the version of ONNX Runtime that the manifest names, or a newer one",
            ) from error
        if self.providers[0] not in session.get_providers():
            raise ArtifactError(
                "ONNX Runtime could not use a provider",
                where="providers",
                expected=self.providers[0],
                got=", ".join(session.get_providers()),
                hint="install the libraries that it needs, or leave it out of providers",
            )
        return session


def _check_model(session: Any, call: CallSpec, kind: str) -> None:
    """Compare the inputs and outputs of a model with the manifest.

    Raises:
        ArtifactError: names the first that differs.
    """
    pairs = (
        (session.get_inputs(), call.inputs_of(kind)),
        (session.get_outputs(), call.outputs_of(kind)),
    )
    for values, specs in pairs:
        got = [(x.name, tuple(x.shape), x.type) for x in values]
        want = [(spec.name, spec.shape, _type_name(spec.dtype)) for spec in specs]
        if got != want:
            first = next(((a, b) for a, b in zip(want, got, strict=False) if a != b), (want, got))
            raise ArtifactError(
                "a model has other tensors than the manifest says",
                where=call.programs[kind].file,
                expected=str(first[0])[:200],
                got=str(first[1])[:200],
                hint="build the artifact anew",
            )


def _type_name(dtype: str) -> str:
    """ONNX Runtime's name of the type of tensors."""
    return "tensor({})".format({"float32": "float", "float64": "double"}.get(dtype, dtype))


class _Bound:
    """A session with preallocated outputs."""

    def __init__(
        self,
        session: Any,
        outputs: Sequence[TensorSpec],
        gives: Sequence[str],
        device: torch.device,
    ) -> None:
        self._session, self._gives = session, gives
        self._names = [x.name for x in session.get_inputs()]
        self._outputs = {
            spec.name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
            for spec in outputs
        }

    def run(
        self, inputs: Sequence[Tensor], kept: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """One step; outputs live until the next."""
        named = (kept[name] for name in self._names[len(inputs) :])
        tensors = separate_inputs([*inputs, *named], self._outputs.values())
        binding = self._session.io_binding()
        for name, x in zip(self._names, tensors, strict=True):
            binding.bind_input(name, *self._place(x))
        for name, x in self._outputs.items():
            binding.bind_output(name, *self._place(x))
        self._session.run_with_iobinding(binding)
        return split_outputs(list(self._outputs.values()), self._gives)

    def _place(self, x: Tensor) -> tuple[str, int, Any, list[int], int]:
        """Arguments of ONNX Runtime for a tensor: device, type, shape, address."""
        return x.device.type, x.device.index or 0, _element(x.dtype), list(x.shape), x.data_ptr()


def _element(dtype: torch.dtype) -> Any:
    """numpy's name of a type, or ONNX's number of one that numpy lacks."""
    import numpy as np

    if dtype == torch.bfloat16:
        return 16
    return getattr(np, {torch.bool: "bool_"}.get(dtype, str(dtype).removeprefix("torch.")))


def default_providers(device: torch.device) -> list[Provider]:
    """TensorRT where it is installed and CUDA on a GPU, and the CPU."""
    available = import_onnx("onnxruntime").get_available_providers()
    index = {"device_id": device.index or 0}
    wanted: list[Provider] = []
    if device.type == "cuda":
        # the list names TensorRT whether its libraries are there or not
        if importlib.util.find_spec("tensorrt") is not None:
            wanted.append(("TensorrtExecutionProvider", {**index, "trt_fp16_enable": True}))
        wanted.append(("CUDAExecutionProvider", index))
    return [*(p for p in wanted if _provider(p) in available), "CPUExecutionProvider"]


def _provider(provider: Any) -> str:
    """Name of a provider, which may come with options."""
    return str(provider[0] if isinstance(provider, (tuple, list)) else provider)


def _known(ort: Any, providers: Sequence[Any]) -> list[str]:
    """Names of the providers.

    Raises:
        UnknownNameError: this ONNX Runtime has no such provider, or none is given.
    """
    names, available = [_provider(p) for p in providers], ort.get_available_providers()
    for name in names or ["none"]:
        if name not in available:
            raise UnknownNameError(
                "this ONNX Runtime has no such provider",
                where="providers",
                expected=", ".join(available),
                got=name,
                hint="pip install toma_fx[onnx-gpu] for CUDA and TensorRT; "
                + nearest(name, available),
            )
    return names


def _check_device(providers: Sequence[str], device: torch.device, manifest: Manifest) -> None:
    """Raise unless the models can run on the device that tensors are on.

    Raises:
        ArtifactError: neither a CPU nor a GPU of this machine, or bfloat16 on a CPU.
        MissingPackageError: a GPU, and an ONNX Runtime without CUDA.
    """
    trouble = ""
    if device.type not in ("cpu", "cuda"):
        trouble = "ONNX models run on cpu and cuda, not on another device"
    elif device.type == "cuda" and not torch.cuda.is_available():
        trouble = "torch finds no GPU on this machine"
    elif device.type == "cpu" and "bfloat16" in _dtypes(manifest):
        trouble = "ONNX Runtime has no bfloat16 kernels for CPUs"
    if trouble:
        raise ArtifactError(
            trouble,
            where="device",
            got=str(device),
            hint='load(..., device="cpu") or device="cuda", as the machine and the dtype allow',
        )
    on_gpu = {"CUDAExecutionProvider", "TensorrtExecutionProvider"} & set(providers)
    if device.type == "cuda" and not on_gpu:
        raise missing_onnx("onnxruntime-gpu", "onnx-gpu")


def _dtypes(manifest: Manifest) -> set[str]:
    """Of weights, inputs, outputs and kept tensors."""
    return {manifest.dtype, *(spec.dtype for spec in manifest.tensors)}


def _shared(
    artifact: ArtifactFiles, device: torch.device, providers: Sequence[str]
) -> dict[str, Tensor]:
    """The weights, once for all sessions: mapped on a CPU, on a GPU in its memory.

    TensorRT copies weights into its engines: nothing is gained by having them there too.
    """
    from safetensors import safe_open

    if "TensorrtExecutionProvider" in providers:
        return {}
    weights = artifact.file(WEIGHTS)
    with reading(weights), safe_open(weights.path, framework="pt", device=str(device)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _ort_value(ort: Any, x: Tensor) -> Any:
    """A tensor as ONNX Runtime's, in the same memory."""
    return ort.OrtValue.from_dlpack(x)

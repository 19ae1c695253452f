"""Running TensorRT engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from toma_fx.errors import ArtifactError
from toma_fx.export.manifest import TensorSpec
from toma_fx.export.reading import ArtifactFiles
from toma_fx.export.targets import Runtime, separate_inputs
from toma_fx.run.program_set import split_outputs

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""torch's names of the element types of engines."""


class TensorRTRuntime(Runtime):
    """The engines of an artifact, on a stream of their own."""

    def __init__(self, trt: Any, artifact: ArtifactFiles, device: torch.device) -> None:
        """Deserialize every engine.

        Raises:
            ArtifactError: TensorRT can't, or an engine has other tensors than the manifest says.
        """
        manifest = artifact.manifest
        self._gives = {(i, kind): call.gives(kind) for i, kind, call in manifest.each_program}
        self._logger = trt.Logger(trt.Logger.WARNING)  # the runtime keeps no reference
        self._runtime = trt.Runtime(self._logger)
        self._stream = torch.cuda.Stream(device)
        numbered = manifest.target.options.get("route") == "torch"
        self._engines = {
            (i, kind): _Engine(
                trt,
                self._runtime,
                call.programs[kind].file,
                artifact.read(call.programs[kind].file),
                call.inputs_of(kind),
                call.outputs_of(kind),
                numbered,
                device,
            )
            for i, kind, call in manifest.each_program
        }

    def run(
        self, call: int, kind: str, inputs: Sequence[Tensor], kept: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """One step; see `Runtime.run`."""
        results = self._engines[call, kind].run(inputs, kept, self._stream)
        return split_outputs(results, self._gives[call, kind])


class _Engine:
    """One engine, and memory for what it gives.

    Attributes:
        inputs, outputs: what the manifest says of its tensors.
        numbered: whether outputs are called "output0", "output1", ..., as Torch-TensorRT does.
    """

    def __init__(
        self,
        trt: Any,
        runtime: Any,
        name: str,
        content: bytes,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        numbered: bool,
        device: torch.device,
    ) -> None:
        self._name, self._inputs = name, [spec.name for spec in inputs]
        self._engine = runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise self._unfit("an engine of this version of TensorRT", "TensorRT can't read it")
        names = {f"output{i}" if numbered else s.name: s for i, s in enumerate(outputs)}
        self._check(trt, {spec.name: spec for spec in inputs}, names)
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise self._unfit("memory for its steps", "TensorRT gives no context")
        self._outputs: list[Tensor] = []
        for name, spec in names.items():
            place = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
            self._context.set_tensor_address(name, place.data_ptr())
            self._outputs.append(place)

    def run(
        self, inputs: Sequence[Tensor], kept: Mapping[str, Tensor], stream: torch.cuda.Stream
    ) -> list[Tensor]:
        """One step; outputs live until the next.

        Raises:
            ArtifactError: TensorRT could not run it.
        """
        names = self._inputs[len(inputs) :]
        tensors = separate_inputs([*inputs, *(kept[name] for name in names)], self._outputs)
        for name, x in zip(self._inputs, tensors, strict=True):
            if name in self._bound:
                self._context.set_tensor_address(name, x.data_ptr())
        caller = torch.cuda.current_stream(stream.device)
        stream.wait_stream(caller)
        done = self._context.execute_async_v3(stream.cuda_stream)
        caller.wait_stream(stream)  # `tensors` are not used again before that
        if not done:
            raise self._unfit("a step", "TensorRT could not run it; its log says why")
        return self._outputs

    def _check(
        self, trt: Any, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]
    ) -> None:
        """Compare its tensors with the manifest; it may lack inputs that change nothing."""
        engine = self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self._bound = {n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT}
        if missing := set(outputs) - set(names):
            raise self._unfit(f"the outputs {sorted(outputs)}", f"none called {sorted(missing)}")
        for name in names:
            spec = (inputs if name in self._bound else outputs).get(name)
            kind = engine.get_tensor_dtype(name).name
            got = f"{tuple(engine.get_tensor_shape(name))} {_DTYPES.get(kind, kind)}"
            want = f"{spec.shape} {spec.dtype}" if spec else "no such tensor"
            if got != want:
                raise self._unfit(f"{name}: {want}", f"{name}: {got}")

    def _unfit(self, expected: str, got: str) -> ArtifactError:
        return ArtifactError(
            "an engine can't be used",
            where=self._name,
            expected=expected,
            got=got,
            hint="build the artifact anew on this machine",
        )

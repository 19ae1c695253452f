"""Steps of an artifact in the Python back end of Triton Inference Server.

    client:  START, CORRID 7, inputs -> instance -> denoiser.step -> outputs      (step 0)
                    CORRID 7, inputs -> the same instance ...                     (step 1, ...)
             END,   CORRID 7, inputs -> the same instance, which drops the state

`toma-fx build --target triton` writes a model.py that imports this. Contract:
triton_python_backend_utils, as its repository documents it in 2026.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.dlpack import from_dlpack

from toma_fx.compat.pytorch import tree_leaves
from toma_fx.errors import MissingPackageError, SignatureError, StateError, TomaError
from toma_fx.export.calls import nest_arguments
from toma_fx.export.loader import load
from toma_fx.export.packages import import_package
from toma_fx.export.to_triton.config import END, READY, SEQUENCE, START, STEPS
from toma_fx.run.batching import State

UTILS = "triton_python_backend_utils"


class TritonPythonModel:
    """An instance: a loaded artifact, and the states of the sequences that are under way."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the artifact.

        Args:
            args: of Triton: the folder of the model, its configuration, device of the instance.

        Raises:
            MissingPackageError: not called by Triton. ArtifactError, ConfigError: as of
                `toma_fx.load`.
        """
        self._utils = import_package(
            UTILS,
            lambda _: MissingPackageError(
                "steps are run by Triton's Python back end", where=UTILS,
                hint="tritonserver --model-repository=FOLDER; toma_fx.load runs the artifact here",
            ),
        )  # fmt: skip
        on_gpu = args["model_instance_kind"] == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu"
        self.denoiser = load(args["model_repository"], device=device)
        self._call_spec = self.denoiser.manifest.calls[0]  # config.pbtxt has the shapes of one
        batching = json.loads(args["model_config"])["sequence_batching"]
        self._most = int(batching["oldest"]["max_candidate_sequences"])
        self._states: dict[int, State] = {}  # the one that was used last is last

    @property
    def sequences(self) -> tuple[int, ...]:
        """Correlation IDs of the sequences that have a state, by their last use."""
        return tuple(self._states)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One step of each request: responses in their order; errors are of one request alone."""
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        """Drop all states."""
        self._states.clear()

    def _respond(self, request: Any) -> Any:
        utils = self._utils
        try:
            outputs = self._step(request)
        except Exception as error:  # of any kind: it must not end the instance
            foreseen = isinstance(error, TomaError)
            code = utils.TritonError.INVALID_ARG if foreseen else utils.TritonError.INTERNAL
            text = f"{type(error).__name__}: {error}"
            return utils.InferenceResponse([], utils.TritonError(text, code))
        names = [spec.name for spec in self._call_spec.outputs]
        tensors = [x.reshape(1) if x.dim() == 0 else x.contiguous() for x in outputs]
        pairs = zip(names, tensors, strict=True)
        return utils.InferenceResponse([utils.Tensor.from_dlpack(*pair) for pair in pairs])

    def _step(self, request: Any) -> list[Tensor]:
        """The outputs of a step; a step that fails leaves its sequence where it was.

        Raises:
            SignatureError: an input is missing, or does not fit the artifact. StateError: a step of
                a sequence that has not begun here, or one that Triton marks as none.
        """
        start, end, ready, sequence = (
            self._number(request, name) for name in (START, END, READY, SEQUENCE)
        )
        if not ready:
            raise StateError("a request that is none", where=READY, expected="1", got="0")
        if start:
            self._begin(sequence, request)
        if sequence not in self._states:
            raise StateError(
                "a step of a sequence that has not begun",
                where=f"{SEQUENCE} {sequence}",
                expected=f"{START} with its first step",
                got="a later step",
                hint="begin it anew: it ended, was idle too long, or its instance was restarted",
            )
        state = self._states.pop(sequence)
        try:
            outputs, following = self.denoiser.step(self._call(request), state)
            state = following
        finally:
            if not end:
                self._states[sequence] = state
        return tree_leaves(outputs)

    def _begin(self, sequence: int, request: Any) -> None:
        """Give a sequence its first state, for that of the longest unused one if there is no room.

        Triton never has more sequences under way in an instance, and does not tell it of those
        whose clients left: a state too many belongs to one of them.
        """
        self._states.pop(sequence, None)
        while len(self._states) >= self._most:
            del self._states[next(iter(self._states))]
        given = self._utils.get_input_tensor_by_name(request, STEPS)
        self._states[sequence] = State(steps=None if given is None else int(given.as_numpy()[0]))

    def _call(self, request: Any) -> dict[str, Any]:
        """Arguments of the step. Memory of a request is Triton's again after it: a copy of it."""
        tensors = {}
        for spec in self._call_spec.inputs:
            name = spec.tensor.name
            x = from_dlpack(self._tensor(request, name).to_dlpack()).clone()
            tensors[name] = x if spec.tensor.shape else x.reshape(())
        return nest_arguments(self._call_spec, tensors)

    def _number(self, request: Any, name: str) -> int:
        """The value of a control, of shape [1]."""
        return int(self._tensor(request, name).as_numpy().reshape(-1)[0])

    def _tensor(self, request: Any, name: str) -> Any:
        tensor = self._utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            raise SignatureError(
                "a request without an input", where=name, expected="as config.pbtxt says",
                got="nothing",
            )  # fmt: skip
        return tensor

"""Stands in for `triton_python_backend_utils`, as python_backend's README and pb_stub.cc of 2026
describe it: what `model.py` calls, and no more. Nothing of Triton itself runs here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

UTILS = "triton_python_backend_utils"


class Tensor:
    def __init__(self, name: str, values: Any) -> None:
        assert isinstance(values, np.ndarray)
        self._name, self._values = name, torch.from_numpy(values.copy())

    @classmethod
    def from_dlpack(cls, name: str, values: Any) -> Tensor:
        made = cls.__new__(cls)
        made._name, made._values = name, from_dlpack(values)
        assert made._values.is_contiguous(), "the back end takes no others"
        return made

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        if self._values.dtype == torch.bfloat16:
            raise RuntimeError("Tensor dtype is BF16 and cannot be converted to NumPy")
        return self._values.numpy()

    def to_dlpack(self) -> Any:
        return to_dlpack(self._values)


class InferenceRequest:
    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = list(inputs)

    def inputs(self) -> list[Tensor]:
        return self._inputs


class TritonError:
    INTERNAL, INVALID_ARG = 1, 3

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor], error: TritonError | None = None) -> None:
        self._outputs, self._error = list(output_tensors), error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def output_tensors(self) -> list[Tensor]:
        return self._outputs


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((x for x in request.inputs() if x.name() == name), None)


def put_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it importable, as in the process that Triton starts."""
    made = ModuleType(UTILS)
    known = (Tensor, InferenceRequest, InferenceResponse, TritonError, get_input_tensor_by_name)
    vars(made).update({each.__name__: each for each in known})
    monkeypatch.setitem(sys.modules, UTILS, made)


def start(folder: Path, config: str) -> Any:
    """An instance of the model in a folder: its model.py, run as the back end runs it."""
    spec = importlib.util.spec_from_file_location("model_of_triton", folder / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    instance = module.TritonPythonModel()
    instance.initialize(
        {
            "model_repository": str(folder), "model_version": "1", "model_name": folder.name,
            "model_instance_kind": "CPU", "model_instance_device_id": "0", "model_config": config,
        }
    )  # fmt: skip
    return instance


def request(
    sequence: int,
    inputs: Mapping[str, torch.Tensor],
    *,
    start: bool = False,
    end: bool = False,
    ready: bool = True,
) -> InferenceRequest:
    """A step of a sequence, with the controls that Triton adds; scalars have the shape [1]."""
    flags = {"START": start, "END": end, "READY": ready}
    controls = [Tensor(name, np.array([flag], np.int32)) for name, flag in flags.items()]
    tensors = [
        Tensor(name, x.reshape(x.shape or (1,)).contiguous().numpy()) for name, x in inputs.items()
    ]
    number = Tensor("CORRID", np.array([sequence], np.uint64))
    return InferenceRequest([*controls, number, *tensors])


def run(instance: Any, requests: Sequence[InferenceRequest]) -> list[InferenceResponse]:
    """What the instance answers. The memory of the requests is used for others then."""
    responses: list[InferenceResponse] = instance.execute(requests)
    assert len(responses) == len(requests)
    for each in requests:
        for x in each.inputs():
            x._values.zero_()
    return responses

"""What a call of an artifact takes: numbers that a dtype holds, tensors that can be read."""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.export.edited import edit
from tests.export.in_process import InProcess, opened
from tests.methods.test_methods import inputs
from toma_fx.errors import GradientError, SignatureError
from toma_fx.export.builder import export
from toma_fx.export.calls import match_call
from toma_fx.export.targets import separate_inputs

pytestmark = pytest.mark.usefixtures("exported_once")


def whole_number(target: InProcess, folder: Path, optimized: Any, dtype: str) -> Any:
    """An artifact whose timestep has no dimension and another dtype."""
    export(optimized, inputs(), folder, target)

    def change(data: Any) -> None:
        for spec in data["calls"][0]["inputs"]:
            if spec["path"] == ["timestep"]:
                spec["tensor"] |= {"shape": [], "dtype": dtype}

    edit(folder, change)
    loaded: Any = opened(target, folder)
    return loaded


HELD: list[tuple[str, Any]] = [
    ("int64", 3), ("int64", 3.0), ("int64", torch.tensor(3.0)), ("int64", np.float64(3.0)),
    ("int64", np.int32(3)), ("float32", 0.1), ("float32", 3), ("float16", torch.tensor(999)),
    ("float16", 0.1), ("float32", -0.0),
]  # fmt: skip
NOT_HELD: list[tuple[str, Any]] = [
    ("int64", 3.9), ("int64", torch.tensor(3.9)), ("int64", 2**70), ("int64", math.nan),
    ("int64", math.inf), ("int8", 300), ("uint8", -1), ("float32", 2**24 + 1), ("float16", 70000.0),
    ("bfloat16", 999), ("float32", math.nan), ("float32", True), ("int64", torch.tensor(True)),
    ("float32", 2j), ("float32", torch.tensor(2j)),
    ("float32", torch.tensor(0.1, dtype=torch.float64)),
    ("float32", 10**400), ("bool", 1),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "value"), HELD)
def test_numbers_that_a_dtype_holds(
    tmp_path: Path, target: InProcess, optimized: Any, dtype: str, value: Any
) -> None:
    manifest = whole_number(target, tmp_path / "a", optimized, dtype).manifest
    call = match_call(manifest, (), {**inputs(), "timestep": value}, torch.device("cpu"))
    got = call.arguments["timestep",], call.inputs[_timestep(manifest)]
    assert float(got[1]) == float(torch.as_tensor(value).to(getattr(torch, dtype)))
    assert got[1].dtype == getattr(torch, dtype)


@pytest.mark.parametrize(("dtype", "value"), NOT_HELD)
def test_numbers_that_a_dtype_does_not_hold(
    tmp_path: Path, target: InProcess, optimized: Any, dtype: str, value: Any
) -> None:
    loaded = whole_number(target, tmp_path / "a", optimized, dtype)
    with pytest.raises(SignatureError) as caught:
        loaded(**{**inputs(), "timestep": value})
    assert caught.value.where == "timestep"


def _timestep(manifest: Any) -> int:
    return [spec.path for spec in manifest.calls[0].inputs].index(("timestep",))


class Named(Tensor):
    """A subclass that adds nothing."""


RIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "negated later": lambda x: torch._neg_view(-x),
    "imaginary part of a conjugate": lambda x: torch.complex(x, -x).conj().imag,
    "expanded": lambda x: x[:1].expand(2, *x.shape[1:]),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "a slice off the alignment": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x),
    "every second": lambda x: torch.stack([x, x], -1)[..., 0],
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape),
    "of a subclass": lambda x: x.as_subclass(Named),
    "a parameter": lambda x: nn.Parameter(x, requires_grad=False),
}


@pytest.mark.parametrize("how", RIGHT)
@torch.no_grad()
def test_tensors_whose_values_lie_otherwise(
    tmp_path: Path, target: InProcess, optimized: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that reads memory by its address gets the values."""
    export(optimized, inputs(), tmp_path / "a", target)
    loaded: Any = opened(target, tmp_path / "a")
    x = RIGHT[how](inputs()["sample"])
    seen: list[Any] = []
    run = target.step

    def step(kind: Any, inputs: Any, kept: Any) -> Any:
        seen.append([_read(x) for x in separate_inputs(inputs, [])])
        return run(kind, inputs, kept)

    monkeypatch.setattr(target, "step", step)
    loaded(**{**inputs(), "sample": x})
    index = [spec.path for spec in loaded.manifest.calls[0].inputs].index(("sample",))
    assert torch.equal(seen[0][index], torch.zeros(x.shape) + x)


def _read(x: Tensor) -> Tensor:
    """The values of a tensor of float32, read from its memory."""
    assert x.data_ptr() % 32 == 0 or x.storage_offset() == 0
    raw = (ctypes.c_float * x.numel()).from_address(x.data_ptr())
    return torch.frombuffer(raw, dtype=torch.float32).reshape(x.shape).clone()


def _quantized(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.flatten(1).to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    "quantized": _quantized,
    "without values": lambda x: x.to("meta"),
    "an array": lambda x: x.numpy(),
}


@pytest.mark.parametrize("how", REFUSED)
def test_tensors_that_no_program_can_read(
    tmp_path: Path, target: InProcess, optimized: Any, how: str
) -> None:
    export(optimized, inputs(), tmp_path / "a", target)
    loaded: Any = opened(target, tmp_path / "a")
    with pytest.raises(SignatureError) as caught:
        loaded(**{**inputs(), "sample": REFUSED[how](inputs()["sample"])})
    assert caught.value.where == "sample"


def test_gradients_are_refused(tmp_path: Path, target: InProcess, optimized: Any) -> None:
    export(optimized, inputs(), tmp_path / "a", target)
    loaded: Any = opened(target, tmp_path / "a")
    sample = inputs()["sample"].requires_grad_()
    with torch.enable_grad(), pytest.raises(GradientError):
        loaded(**{**inputs(), "sample": sample})
    with torch.no_grad():
        assert loaded(**{**inputs(), "sample": sample}).isfinite().all()


def test_calls_in_any_mode_of_gradients(tmp_path: Path, target: InProcess, optimized: Any) -> None:
    export(optimized, inputs(), tmp_path / "a", target)
    loaded: Any = opened(target, tmp_path / "a")
    want = loaded(**inputs(timestep=900.0)), loaded(**inputs(timestep=800.0))
    loaded.reset()
    with torch.inference_mode():
        first = loaded(**inputs(timestep=900.0))
        assert first.is_inference()
    assert torch.equal(first, want[0])
    assert torch.equal(loaded(**inputs(timestep=800.0)), want[1])
    loaded.reset()
    call = inputs(timestep=900.0)
    with torch.inference_mode():
        call["sample"] = call["sample"].clone()
    assert torch.equal(loaded(**call), want[0])
    loaded.reset()
    with torch.no_grad():
        again = loaded(**{**inputs(timestep=900.0), "sample": inputs()["sample"].requires_grad_()})
    assert torch.equal(again, want[0])
    assert not again.requires_grad

"""The Triton kernel for selection: equal to PyTorch bit by bit, and chosen where it can run."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import toma_fx.methods
from tests.logs import logged
from tests.methods.triton_process import CASES, compare
from toma_fx.methods import ops
from toma_fx.methods.facility import facility_location
from toma_fx.methods.ops import MOST_TOKENS, Choice, choose_implementation, kernel_problem

GPU = torch.device("cuda:0")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs Triton: CUDA builds of torch bring it, else the extra toma-fx[triton]",
)


def run_process(argument: str, cache: Path, **environment: str) -> dict[str, Any]:
    """What `triton_process` prints."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)} | environment
    process = subprocess.run(
        [sys.executable, "-m", "tests.methods.triton_process", argument],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    result: dict[str, Any] = json.loads(process.stdout)
    return result


@needs_triton
def test_the_kernel_chooses_what_pytorch_chooses(tmp_path: Path) -> None:
    equal = run_process("interpret", tmp_path, TRITON_INTERPRET="1")
    assert equal == dict.fromkeys(CASES, True)


@needs_triton
def test_the_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    """Triton's interpreter takes more than its compiler."""
    for tokens, usage in run_process("compile", tmp_path, TRITON_INTERPRET="0").items():
        assert usage["stack"] == 0, f"registers spill with {tokens} tokens: {usage}"
        assert usage["shared"] <= 4096
        assert usage["reg"] * usage["warps"] * 32 <= 65536


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_chooses_what_pytorch_chooses() -> None:
    assert {case: compare("cuda", case) for case in CASES} == dict.fromkeys(CASES, True)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_operator_runs_the_kernel_on_a_gpu() -> None:
    assert kernel_problem(GPU) == ""
    similarity = CASES["batches"][0]().to(GPU)
    chosen = torch.ops.toma_fx.facility_location(similarity, 9)
    assert torch.equal(chosen, facility_location(similarity, 9))


@pytest.mark.parametrize(
    ("device", "dtype", "tokens", "keep", "expected"),
    [
        ("cuda", torch.float32, 256, 128, "triton"),
        ("cuda", torch.float32, 100, 1, "triton"),
        ("cuda", torch.float32, MOST_TOKENS, MOST_TOKENS, "triton"),
        ("cuda", torch.float32, MOST_TOKENS + 1, 8, "up to 512"),
        ("cuda", torch.float32, 16, 17, "17 of 16 tokens"),
        ("cuda", torch.float64, 256, 128, "float64"),
        ("cpu", torch.float32, 256, 128, "device cpu"),
        ("mps", torch.float32, 256, 128, "device mps"),
    ],
)
def test_the_choice_by_device_dtype_and_shape(
    device: str, dtype: torch.dtype, tokens: int, keep: int, expected: str
) -> None:
    def problem(device: torch.device) -> str:
        assert device.type == "cuda", "only GPUs are tried"
        return ""

    choice = choose_implementation(torch.device(device), dtype, tokens, keep, problem)
    assert choice.name == ("triton" if expected == "triton" else "reference")
    assert choice.name == expected or expected in choice.reason


def test_a_gpu_without_the_kernel_takes_the_reference() -> None:
    choice = choose_implementation(GPU, torch.float32, 256, 128, lambda device: "no compiler")
    assert choice == Choice("reference", "no compiler")


def test_triton_that_is_missing_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "toma_fx.methods.facility_triton", raising=False)
    monkeypatch.delattr(toma_fx.methods, "facility_triton", raising=False)
    assert "Triton can't be imported" in kernel_problem.__wrapped__(GPU)


def test_a_kernel_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @staticmethod
        def facility_location(similarity: torch.Tensor, keep: int) -> torch.Tensor:
            raise RuntimeError("no C compiler")

    eye = torch.eye(16)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "eye", lambda n, device: eye)
    monkeypatch.setattr(toma_fx.methods, "facility_triton", Broken, raising=False)
    with logged(logging.WARNING, "toma_fx.methods") as warnings:
        assert "fails on cuda:0 (RuntimeError)" in kernel_problem.__wrapped__(GPU)
    assert warnings == ["the Triton kernel for selection does not run on cuda:0"]


def test_builds_of_torch_for_other_devices_take_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert kernel_problem.__wrapped__(GPU) == "torch is not built for CUDA"


def test_a_choice_is_logged_once() -> None:
    ops._report.cache_clear()
    similarity = CASES["one matrix"][0]()
    with logged(logging.INFO, "toma_fx.methods") as messages:
        for _ in range(3):
            torch.ops.toma_fx.facility_location(similarity, 9)
    (message,) = messages
    assert message.endswith("by: reference, because similarities are on the device cpu")


def test_the_operator_calls_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        @staticmethod
        def facility_location(similarity: torch.Tensor, keep: int) -> torch.Tensor:
            return torch.full((keep,), 7)

    monkeypatch.setattr(toma_fx.methods, "facility_triton", Kernel, raising=False)
    monkeypatch.setattr(ops, "choose_implementation", lambda *args: Choice("triton", "of a test"))
    chosen = torch.ops.toma_fx.facility_location(CASES["one matrix"][0](), 9)
    assert chosen.tolist() == [7] * 9

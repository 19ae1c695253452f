"""Weights move after captures: nothing of a capture keeps a weak reference to them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toma_fx
from tests import denoisers
from toma_fx.errors import CaptureError
from toma_fx.export import export_programs

SMALL: dict[str, Any] = {"min_tokens": 16, "destinations_every": 2}


def flux(quantized: bool = True) -> Any:
    model = denoisers.small_flux()
    if quantized:
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def call(timestep: float = 0.5) -> dict[str, Any]:
    return denoisers.small_flux_inputs(batch=1, timestep=timestep)


def weak_references(model: nn.Module) -> dict[str, int]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: weakref.getweakrefcount(x) for name, x in tensors}


def run(model: nn.Module) -> Any:
    optimized = toma_fx.optimize(model, **SMALL)
    return optimized, [optimized(**call(t)) for t in (0.9, 0.8, 0.7)]


def run_compiled(model: nn.Module) -> Any:
    optimized: Any = toma_fx.optimize(model, **SMALL)
    optimized.compile(backend="aot_eager")
    return optimized, [optimized(**call(t)) for t in (0.9, 0.8, 0.7)]


def run_backend(model: nn.Module) -> Any:
    compiled = torch.compile(model, backend="toma_fx", options=SMALL)
    return compiled, compiled(**call())


def export(model: nn.Module) -> Any:
    return export_programs(toma_fx.optimize(model, **SMALL), call())


def restore(model: nn.Module) -> Any:
    return toma_fx.restore(run(model)[0])


def explain(model: nn.Module) -> Any:
    return toma_fx.explain(model, call(), **SMALL)


USES = (run, run_compiled, explain, restore, export)


@pytest.mark.parametrize(
    ("use", "quantized"), [(run_backend, False), *((use, q) for use in USES for q in (False, True))]
)
@torch.no_grad()
def test_nothing_keeps_weak_references(use: Callable[[nn.Module], Any], quantized: bool) -> None:
    torch.compiler.reset()
    model = flux(quantized)
    before = weak_references(model)
    alive = use(model)
    assert weak_references(model) == before
    del alive


class Failing(nn.Module):
    """Runs, but can't be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) + self.shift
        if torch.compiler.is_compiling():
            raise ValueError("traced")
        return y


def test_nor_does_a_capture_that_fails() -> None:
    model = Failing().eval()
    before = weak_references(model)
    with pytest.raises(CaptureError) as error:
        toma_fx.optimize(model, ratio=0)(torch.ones(1, 4))
    assert weak_references(model) == before
    assert error.value.__traceback__ is not None, "the error, which holds the trace, is alive"


@torch.no_grad()
def test_quantized_weights_move_after_a_capture() -> None:
    model = flux()
    optimized, _ = run(model)
    optimized.reset()
    before = optimized(**call())[0]
    optimized.to("cpu")
    optimized.reset()
    assert torch.equal(optimized(**call())[0], before)
    model.to("cpu")
    assert optimized.cache.captures == 1


@torch.no_grad()
def test_plain_weights_that_move_by_swapping() -> None:
    model = flux(quantized=False)
    before = run(model)[1][0][0]
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(run(model)[1][0][0], before)

"""Weights move after captures: nothing of a capture keeps a weak reference to them."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from torch import Tensor, nn

import toma_fx
from tests import denoisers
from toma_fx.compat import pytorch
from toma_fx.errors import CaptureError
from toma_fx.export import export_programs

SMALL: dict[str, Any] = {"min_tokens": 16, "destinations_every": 2}


def flux(quantized: bool = True) -> Any:
    model = denoisers.small_flux(num_single_layers=0)
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


def moved(model: nn.Module) -> None:
    """As between devices: every weight's memory is another afterwards."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if pytorch.inner_tensors(p):
                torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone(), requires_grad=False))
            else:
                getattr(module, name).data = p.detach().clone()


def first_weight(model: Any) -> Any:
    return model.transformer_blocks[0].attn.to_q.weight


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_a_graph_follows_quantized_weights(compiled: bool) -> None:
    """Without another capture, it sees what happens to them where they are now."""
    model = flux()
    optimized: Any = toma_fx.optimize(model, **SMALL)
    if compiled:
        optimized.compile(backend="aot_eager")
    before = optimized(**call())[0]
    for _ in range(2):
        old = weakref.ref(first_weight(model).qdata.untyped_storage())
        moved(model)
        assert old() is None, "the memory is free before the next call"
        optimized.reset()
        assert torch.equal(optimized(**call())[0], before)
    first_weight(model).qdata.zero_()
    optimized.reset()
    after = optimized(**call())[0]
    assert not torch.equal(after, before)
    assert optimized.cache.captures == 1
    want = toma_fx.optimize(copy.deepcopy(model), **SMALL)(**call())[0]
    assert denoisers.relative(after, want) < 1e-5


@torch.no_grad()
def test_every_graph_of_a_model_follows() -> None:
    model = flux()
    optimized: Any = toma_fx.optimize(model, **SMALL)
    calls = [denoisers.small_flux_inputs(batch=batch) for batch in (1, 2)]
    before = [optimized(**each)[0] for each in calls]
    assert not any(s.parts.lost for s in optimized.specializations)
    moved(model)
    for each, want in zip(calls, before, strict=True):
        optimized.reset()
        assert torch.equal(optimized(**each)[0], want)
    assert optimized.cache.captures == 2


@torch.no_grad()
def test_weights_of_another_form_are_captured_anew() -> None:
    model = flux()
    optimized: Any = toma_fx.optimize(model, **SMALL)
    optimized(**call())
    layer = model.transformer_blocks[0].attn.to_q
    layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    optimized.reset()
    got = optimized(**call())[0]
    assert optimized.cache.captures == 2
    assert len(optimized.specializations) == 1
    want = toma_fx.optimize(copy.deepcopy(model), **SMALL)(**call())[0]
    assert torch.equal(got, want)


@torch.no_grad()
def test_weights_that_are_away_while_the_model_seems_to_be_there() -> None:
    model = flux()
    optimized: Any = toma_fx.optimize(model, **SMALL)
    before = optimized(**call())[0]
    weight, parts = first_weight(model), optimized.specializations[0].parts
    scale = weight.scale.clone()
    weight.scale = scale.double()
    assert len(parts.lost) == 1
    optimized.reset()
    with contextlib.suppress(CaptureError):  # whether the model runs so is torchao's affair
        optimized(**call())
    weight.scale = scale
    optimized.reset()
    assert torch.equal(optimized(**call())[0], before)
    assert not any(s.parts.lost for s in optimized.specializations)


@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_model_offload_with_quantized_weights(when: str) -> None:
    """accelerate moves the model before every call; the guard is made once."""
    want = toma_fx.optimize(flux(), **SMALL)(**call())[0]
    model = flux()
    if when == "before":
        hook = cpu_offload_with_hook(model, "cpu")[1]
    optimized: Any = toma_fx.optimize(model, **SMALL)
    if when == "after":
        hook = cpu_offload_with_hook(optimized, "cpu")[1]
    assert torch.equal(optimized(**call(0.5))[0], want)
    optimized(**call(0.4))
    guard = optimized._guard
    optimized(**call(0.3))
    hook.offload()
    optimized.reset()
    assert torch.equal(optimized(**call(0.5))[0], want)
    assert optimized.cache.captures == 1
    assert optimized._guard is guard

"""Quantized layers that can't be traced: captured as one operator, merged as the reference merges.

`PackedLinear` stands for them where the packages are not there: a parameter of its own class whose
Python attributes say what the bytes mean, and notes that the layer writes at each call.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig, QuantoConfig
from torch import Tensor, nn

import toma_fx
from tests import denoisers
from tests.reference import Settings, stand_in
from toma_fx.capture.attributes import is_opaque
from toma_fx.capture.guard import ModelGuard
from toma_fx.capture.opaque import OneOperator, traceable
from toma_fx.errors import BuildError, StatefulModelError
from toma_fx.graph.flops import graph_flops
from toma_fx.methods.ops import Layers

TOLERANCE = 1e-4
SMALL: dict[str, Any] = {"min_tokens": 60, "tile": 4}
REFERENCE: dict[str, Any] = {"tile": (4, 4), "keep": 8, "scope": "stack"}


class PackedParameter(nn.Parameter):
    """Bytes, and what Python needs to read them; torch.export would keep the bytes alone."""

    scale: float

    def __new__(cls, weight: Tensor) -> PackedParameter:
        scale = float(weight.abs().max() / 127)
        packed = torch.Tensor._make_subclass(cls, (weight / scale).round().to(torch.int8), False)
        packed.scale = scale
        return packed

    def __deepcopy__(self, memo: Any) -> PackedParameter:
        packed = torch.Tensor._make_subclass(type(self), self.data.clone(), False)
        packed.scale = self.scale
        return packed


class PackedLinear(nn.Linear):
    """Unpacks its weight at each call."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features, source.bias is not None)
        self.weight, self.bias = PackedParameter(source.weight.data), source.bias
        self.notes = {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.notes["calls"] += 1
        weight = self.weight.data.to(x.dtype) * self.weight.scale
        return nn.functional.linear(x, weight, self.bias)


def flux() -> Any:
    return denoisers.flux(num_layers=1, num_single_layers=1)


def call(model: Any, step: int = 0) -> Tensor:
    return model(**denoisers.flux_inputs(8, 8, batch=1, timestep=0.9 - step / 20))[0]


def converted(make: Callable[[nn.Linear], nn.Module | None]) -> Any:
    """The model with linear layers of its blocks replaced."""
    model = flux()
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and "blocks" in path:
            model.set_submodule(path, make(module) or module)
    return model.eval().requires_grad_(False)


# -- models of the packages -----------------------------------------------------------------------


def packed(folder: Path) -> Any:
    return converted(PackedLinear)


def gguf(folder: Path) -> Any:
    """As `from_single_file` loads a file with weights in Q8_0."""
    library = pytest.importorskip("gguf")
    kind = library.GGMLQuantizationType.Q8_0
    model = flux()
    writer = library.GGUFWriter(folder / "model.gguf", "flux")
    for name, value in model.state_dict().items():
        data = value.numpy().astype(np.float32)
        if data.ndim == 2 and data.shape[1] % 32 == 0 and "blocks" in name:
            writer.add_tensor(name, library.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.save_config(folder)
    return FluxTransformer2DModel.from_single_file(
        str(folder / "model.gguf"),
        config=str(folder),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    ).eval()


def four_bits(kind: str, plain: bool = True) -> Callable[[Path], Any]:
    """Layers of bitsandbytes; diffusers' loader asks for a GPU, the layers run here.

    Args:
        plain: without the CPU's own packing, which rows shorter than a block of 64 break.
    """

    def make(folder: Path) -> Any:
        library = pytest.importorskip("bitsandbytes")

        def convert(source: nn.Linear) -> nn.Module | None:
            if source.in_features % 64 and not plain:
                return None
            layer = library.nn.Linear4bit(
                source.in_features,
                source.out_features,
                compute_dtype=torch.float32,
                quant_type=kind,
            )
            layer.load_state_dict(source.state_dict())
            if plain:
                layer.support_avx512bf16_for_cpu = False
            return layer.to("cpu")

        return converted(convert)

    return make


def eight_bits(folder: Path) -> Any:
    library = pytest.importorskip("bitsandbytes")

    def convert(source: nn.Linear) -> nn.Module:
        layer = library.nn.Linear8bitLt(
            source.in_features, source.out_features, has_fp16_weights=False, threshold=6.0
        )
        layer.load_state_dict(source.state_dict())
        return layer.to("cpu")

    return converted(convert)


def quanto(folder: Path) -> Any:
    pytest.importorskip("optimum.quanto")
    flux().save_pretrained(folder)
    return FluxTransformer2DModel.from_pretrained(
        folder, quantization_config=QuantoConfig("int8"), torch_dtype=torch.float32
    ).eval()


MODELS: dict[str, tuple[Callable[[Path], Any], bool]] = {
    "a stand-in": (packed, True),
    "GGUF": (gguf, True),
    "bitsandbytes nf4": (four_bits("nf4"), True),
    "bitsandbytes nf4, packed for the CPU": (four_bits("nf4", plain=False), True),
    "bitsandbytes fp4": (four_bits("fp4"), True),
    "bitsandbytes int8": (eight_bits, True),
    "quanto int8": (quanto, False),
}
"""How to make each, and whether it has layers that can't be traced."""
ROUGH = {"bitsandbytes int8": 2e-2, "bitsandbytes nf4, packed for the CPU": 2e-2}
"""They round tokens themselves (to int8, to bfloat16), and noise of float32 may turn a digit."""


def planned(model: Any) -> Any:
    optimized = toma_fx.optimize(model, **SMALL)
    call(optimized)
    return optimized


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_quantized(name: str, tmp_path: Path) -> None:
    make, opaque = MODELS[name]
    model = make(tmp_path)
    assert any(map(is_opaque, model.modules())) == opaque
    want = [call(model, step) for step in range(2)]
    state = ModelGuard(model).key
    off = toma_fx.optimize(model, ratio=0.0)
    assert all(torch.equal(call(off, step), want[step]) for step in range(2))
    on = toma_fx.optimize(model, **SMALL)
    eager = stand_in(make(tmp_path), Settings(**REFERENCE), itself=True)  # some can't be copied
    tolerance = ROUGH.get(name, TOLERANCE)
    for step in range(2):
        got = call(on, step)
        assert denoisers.relative(got, call(eager, step)) < tolerance
        assert denoisers.relative(got, want[step]) > 50 * TOLERANCE, "merging acts"
    assert on.totals == {"refresh": 1, "reuse": 1}
    assert (off.cache.captures, on.cache.captures) == (1, 1)
    assert ModelGuard(model).key == state
    (found,) = on.specializations
    (plain,) = planned(flux()).specializations
    assert found.plan.segments
    assert not found.plan.rejections
    flops = [graph_flops(each.captured.graph_module.graph) for each in (found, plain)]
    assert flops[0] == flops[1]


# -- the operator ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MODELS])
@torch.no_grad()
def test_compiled(name: str, tmp_path: Path) -> None:
    model = MODELS[name][0](tmp_path)
    on = toma_fx.optimize(model, **SMALL)
    compiled = toma_fx.optimize(model, **SMALL).compile()
    for step in range(2):
        error = denoisers.relative(call(compiled, step), call(on, step))
        assert error < ROUGH.get(name, TOLERANCE)


@torch.no_grad()
def test_the_model_is_shared_and_not_changed(tmp_path: Path) -> None:
    model = packed(tmp_path)
    before = dict(model.named_modules())
    traced = traceable(model)
    assert dict(model.named_modules()) == before
    layers = [m for m in traced.modules() if isinstance(m, OneOperator)]
    assert len(layers) == sum(map(is_opaque, model.modules())) > 10
    assert traced.x_embedder is model.x_embedder
    inner, own = traced.transformer_blocks[0].attn, model.transformer_blocks[0].attn
    assert inner.to_q.weight is own.to_q.weight
    plain = flux()
    assert traceable(plain) is plain
    model.transformer_blocks[0].ff.forward = model.transformer_blocks[0].ff.forward
    assert traceable(model).transformer_blocks[0].ff.forward.__self__ is not (
        model.transformer_blocks[0].ff
    )


@torch.no_grad()
def test_what_the_layer_is_shows_at_once(tmp_path: Path) -> None:
    """Its weights and hooks are its own affair; a graph holds neither."""
    model = packed(tmp_path)
    off = toma_fx.optimize(model, ratio=0.0)
    first = call(off)
    layer = model.transformer_blocks[0].ff.net[2]
    layer.weight.scale *= 2
    layer.weight.data[0] = 1
    off.reset()
    assert torch.equal(call(off), call(model))
    assert not torch.equal(call(model), first)
    assert off.cache.captures == 1


@torch.no_grad()
def test_artifacts_refuse_it(tmp_path: Path) -> None:
    optimized = toma_fx.optimize(packed(tmp_path), **SMALL)
    with pytest.raises(BuildError, match="quantized layers") as caught:
        toma_fx.export.onnx(optimized, denoisers.flux_inputs(8, 8, batch=1), tmp_path / "a")
    assert caught.value.where.startswith("transformer_blocks.0")
    assert not (tmp_path / "a").exists()


def test_layers_are_not_kept() -> None:
    layers, layer = Layers(), nn.Linear(2, 2)
    number = layers.number_of(layer)
    assert layers.number_of(layer) == number != layers.number_of(copy.deepcopy(layer))
    assert layers[number] is layer
    del layer
    gc.collect()
    with pytest.raises(StatefulModelError, match="is gone"):
        layers[number]

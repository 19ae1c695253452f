"""ONNX artifacts of other models, dtypes and opsets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import toma_fx
from tests import denoisers
from tests.denoisers import relative
from tests.export.test_onnx import optimized, steps
from tests.methods.test_methods import inputs, model
from toma_fx.export.builder import export
from toma_fx.export.loader import load
from toma_fx.export.manifest import Manifest
from toma_fx.export.to_onnx.target import DEFAULT_OPSET, OPSETS, ONNXTarget

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")
CPU = torch.device("cpu")


# -- other models, dtypes, opsets -----------------------------------------------------------------


def parity(manifest: Manifest) -> float:
    return max(p.relative for call in manifest.calls for p in call.parity)


def half(call: dict[str, Any]) -> dict[str, Any]:
    return pytree.tree_map(
        lambda x: x.half() if isinstance(x, Tensor) and x.is_floating_point() else x, call
    )


@pytest.mark.usefixtures("exported_once")
@pytest.mark.parametrize("opset", [n for n in OPSETS if n != DEFAULT_OPSET])
def test_opsets(opset: int, tmp_path: Path) -> None:
    manifest = export(optimized("grid"), inputs(), tmp_path / "out", ONNXTarget(opset=opset))
    assert manifest.target.options["opset"] == str(opset)
    graphs = [onnx.load(p, load_external_data=False) for p in (tmp_path / "out").glob("*.onnx")]
    for loaded in graphs:
        assert [(o.domain, o.version) for o in loaded.opset_import] == [("", opset)]
        fused = any(n.op_type == "Attention" for n in loaded.graph.node)
        assert fused == (opset >= 23)
    want = steps(optimized("grid"))
    for a, b in zip(steps(load(tmp_path / "out")), want, strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.usefixtures("exported_once")
def test_stateless_without_patterns(tmp_path: Path) -> None:
    """A method without patterns has one program, and both forms are the same."""
    manifest = export(optimized("todo"), inputs(), tmp_path / "out", ONNXTarget("stateless"))
    assert list(manifest.calls[0].programs) == ["reuse"]
    for a, b in zip(steps(load(tmp_path / "out"), 2), steps(optimized("todo"), 2), strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("form", ["cached", "stateless"])
def test_steps_without_merging(form: Any, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"min_tokens": 1, "first_step": 1, "last_step": 2}
    denoiser = toma_fx.optimize(model(), method="tomesd", destinations_every=2, **fields)
    manifest = export(denoiser, inputs(), tmp_path / "out", ONNXTarget(form))
    own = {"refresh", "plain"} if form == "stateless" else {"refresh", "reuse", "plain"}
    assert set(manifest.calls[0].programs) == own
    every = denoiser
    if form == "stateless":
        every = toma_fx.optimize(model(), method="tomesd", destinations_every=1, **fields)
    for a, b in zip(steps(load(tmp_path / "out")), steps(every), strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("form", ["cached", "stateless"])
@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_whole_models(name: str, form: Any, tmp_path: Path) -> None:
    call = getattr(denoisers, f"{name}_inputs")
    denoiser = toma_fx.optimize(getattr(denoisers, name)(), method="tomesd", min_tokens=200)
    manifest = export(denoiser, call(), tmp_path / "out", ONNXTarget(form))
    assert parity(manifest) < 1e-5
    if name == "sdxl":
        assert "added_cond_kwargs_time_ids" in [x.tensor.name for x in manifest.calls[0].inputs]
    denoiser.reset()
    runs = load(tmp_path / "out")
    with torch.no_grad():
        for i in range(3):
            given = call(seed=i, timestep=0.5 - 0.1 * i)
            assert relative(runs(**given)[0], denoiser(**given)[0]) < 1e-5


@pytest.mark.parametrize("method", ["tomesd", "toma"])
def test_half_precision(method: str, tmp_path: Path) -> None:
    """SDXL joins float16 and float32 in its time embedding, which ONNX must be told to."""
    denoiser = toma_fx.optimize(denoisers.sdxl().half(), method=method, min_tokens=200)
    manifest = export(denoiser, half(denoisers.sdxl_inputs()), tmp_path / "out", ONNXTarget())
    assert manifest.dtype == "float16"
    assert parity(manifest) < 2e-2
    graph = onnx.load(tmp_path / "out" / "refresh.onnx", load_external_data=False).graph
    (join,) = [n for n in graph.node if n.op_type == "Concat" and n.name == "node_concat"]
    casts = {n.output[0] for n in graph.node if n.op_type == "Cast"}
    assert casts & set(join.input)

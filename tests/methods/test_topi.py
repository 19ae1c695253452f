"""Merging of reference images alone: Flux with a picture to follow, against an eager step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import toma_fx
from tests import denoisers, reference
from tests.methods.test_methods import inputs, model, run_onnx
from tests.tracing import Program, check_traces
from toma_fx.errors import NoMergeSites
from toma_fx.methods.setting import Place
from toma_fx.methods.toma import ToMA
from toma_fx.methods.topi import ToPi, ToPiConfig


def call_of(heights: tuple[int, ...], width: int = 8) -> dict[str, Any]:
    """Flux's call with images of one width one after the other, as Kontext's pipeline makes it."""
    call = denoisers.flux_inputs(sum(heights), width)
    ids = [denoisers.ids(height, width) for height in heights]
    for number, image in enumerate(ids):
        image[:, 0] = number
    return {**call, "img_ids": torch.cat(ids)}


FIELDS: dict[str, Any] = {"tile": 4, "scale": 20.0, "min_tokens": 16, "scope": "stack"}


@pytest.mark.parametrize("heights", [(8, 4), (8, 8), (4, 8, 4)])
@torch.no_grad()
def test_a_step_equals_an_eager_implementation(
    heights: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn stays whole, and reads merged references."""
    net, target = denoisers.small_flux(), heights[0] * 8
    make, s = reference.make_pattern, reference.Settings((4, 4), 8, scale=20.0, scope="stack")

    def pattern(x: Tensor, grids: list[reference.Grid], s: Any) -> reference.Pattern:
        p = make(x[:, target:], grids[1:], s)
        eye = torch.eye(target).unsqueeze(0)
        return reference.Pattern(
            torch.stack([torch.block_diag(eye[0], m) for m in p.merge]),
            torch.stack([torch.block_diag(eye[0], m) for m in p.unmerge]),
            torch.cat([torch.arange(target)[None], target + p.destinations], 1),
        )

    monkeypatch.setattr(reference, "make_pattern", pattern)
    optimized = toma_fx.optimize(net, method="topi", **FIELDS)
    for step in range(2):
        call = call_of(heights)
        noise = torch.Generator().manual_seed(step)
        call["hidden_states"] = torch.randn(call["hidden_states"].shape, generator=noise)
        call["timestep"] = call["timestep"] - 0.1 * step
        s.refresh = step == 0
        expected = reference._flux_step(net, reference.grids_of(call["img_ids"]), s, call)
        assert denoisers.relative(optimized(**call)[0], expected) < 1e-5
        assert denoisers.relative(net(**call)[0], expected) > 1e-3
    assert optimized.totals == {"refresh": 1, "reuse": 1}, "references are selected once"


def test_a_picture_alone_is_refused_with_the_reason() -> None:
    with pytest.raises(NoMergeSites, match="there is no reference"):
        toma_fx.optimize(model(), method="topi", min_tokens=1)(**inputs())


def test_settings() -> None:
    place = Place((16, 8), (4, 8), heights=(8, 4, 4))
    setting = ToPiConfig(ratio=0.25, tile=4, scale=20).setting(place)
    assert setting == ToPi((16, 8), 64, ToMA((8, 8), (4, 4), 12, 20.0))
    assert setting.merged_count == 64 + 48
    assert "of references" in setting.describe()
    video = Place((3, 4, 8), (3, 4, 8), heights=(4, 4, 4))
    assert ToPiConfig(tile=4).setting(video) == ToPi((3, 4, 8), 32, ToMA((8, 8), (4, 4), 8, 1000.0))
    assert ToPiConfig(ratio=0).setting(place) == "ratio is 0"
    x = torch.randn(2, 128, 6)
    pattern = dict(zip(setting.chosen, setting.select(x), strict=True))
    pattern |= dict(zip(setting.weighed, setting.weights(x, pattern), strict=True))
    assert torch.equal(setting.merge(x, pattern)[:, :64], x[:, :64])
    assert torch.equal(setting.positions(pattern)[:, :64], torch.arange(64).expand(2, -1))
    torch.testing.assert_close(setting.sizes(pattern).sum(1), torch.full((2,), 128.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_traces(dtype: torch.dtype) -> None:
    setting = ToPi((16, 8), 64, ToMA((8, 8), (4, 4), 4, 20.0))
    check_traces(Program(setting), torch.randn(2, 128, 8).to(dtype))


@torch.no_grad()
def test_compiled_and_exported() -> None:
    net, call = denoisers.small_flux(), call_of((8, 4))
    eager = toma_fx.optimize(net, method="topi", **FIELDS)
    compiled = toma_fx.optimize(net, method="topi", **FIELDS).compile(backend="aot_eager")
    steps = [eager(**call)[0].clone() for _ in range(2)]
    for want in steps:
        assert denoisers.relative(compiled(**call)[0], want) < 1e-5
    eager.reset()
    exported = toma_fx.export.export_programs(eager, call)
    for program, want in zip(exported.values(), steps, strict=True):
        assert denoisers.relative(run_onnx(program)[0], want) < 1e-4

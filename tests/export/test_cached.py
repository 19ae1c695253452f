"""Artifacts with cached steps: every target, over whole generations."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toma_fx
from tests.denoisers import relative
from tests.export.cpp import run_example
from tests.export.in_process import InProcess, opened
from tests.methods.test_methods import inputs, model
from toma_fx import CacheConfig, State
from toma_fx.errors import BuildError, GenerationError
from toma_fx.export.builder import export
from toma_fx.export.reading import parse_manifest
from toma_fx.export.to_tensorrt.dry_run import tensorrt_coverage

STEPS = 9
KINDS = ["refresh", "reuse", "cached", "cached", "refresh", "cached", "cached", "refresh", "reuse"]
"""Of 9 steps, 2 of warm-up and 1 at the end; what is due at step 3 and 6 is selected at 4 and 7."""


@cache
def optimized() -> Any:
    config = CacheConfig(every=3, order=1, warmup_steps=2, last_steps=1)
    return toma_fx.optimize(
        model(), method="grid", min_tokens=1, destinations_every=3, weights_every=3, cache=config
    )


def generation(denoiser: Any, steps: int = STEPS, seed: int = 0) -> list[torch.Tensor]:
    """Outputs of a generation that is told, of uneven timesteps."""
    outputs = []
    with denoiser.generation(steps=steps) as run:
        for i in range(steps):
            run.step(i)
            call = inputs(seed=100 * seed + i, timestep=900.0 - 10 * i - i**2)
            outputs.append(denoiser(**call))
    return outputs


def check_artifact(folder: Path, loaded: Any) -> None:
    """The artifact computes what the process computes, in each of two generations."""
    assert loaded.manifest.calls[0].kinds(STEPS) == KINDS
    assert set(loaded.manifest.calls[0].programs) == {"refresh", "reuse", "cached"}
    for seed in range(2):
        pairs = zip(generation(loaded, seed=seed), generation(optimized(), seed=seed), strict=True)
        for i, (got, want) in enumerate(pairs):
            assert relative(got, want) < 1e-5, i
    call = inputs(seed=2, timestep=880.0)
    assert relative(generation(optimized())[2], model()(**call)) > 1e-3
    with pytest.raises(GenerationError, match="number of steps is not known"):
        loaded(**inputs())
    state, own = State(steps=STEPS), State(steps=STEPS)
    for i in range(STEPS):
        call = inputs(seed=i, timestep=900.0 - 10 * i)
        got, state = loaded.step(call, state)
        want, own = optimized().step(call, own)
        assert relative(got, want) < 1e-5, i


@torch.no_grad()
def test_in_process(tmp_path: Path) -> None:
    target = InProcess()
    manifest = export(optimized(), inputs(), tmp_path / "a", target)
    check_artifact(tmp_path / "a", opened(target, tmp_path / "a"))
    assert dict(manifest.calls[0].older) == {
        "update_u0_0": "update_u0_1",
        "update_time_0": "update_time_1",
    }
    assert manifest.calls[0].schedule.caching == optimized().config_toma.caching
    assert parse_manifest(manifest.to_json().encode(), "text") == manifest
    assert {p.kind for p in manifest.calls[0].parity} == set(KINDS)


@torch.no_grad()
def test_a_wrong_update_is_found(tmp_path: Path) -> None:
    """Outputs alone would not tell: cached steps are compared with what the artifact kept."""

    class Wrong(InProcess):
        def step(self, kind: Any, inputs: Any, kept: Mapping[str, torch.Tensor]) -> Any:
            outputs, gives = super().step(kind, inputs, kept)
            return outputs, {k: 2 * x if "update_u" in k else x for k, x in gives.items()}

    with pytest.raises(BuildError, match="does not compute what the process computes"):
        export(optimized(), inputs(), tmp_path / "a", Wrong())


@torch.no_grad()
@pytest.mark.parametrize("name", ["onnx", "aoti"])
def test_targets(tmp_path: Path, name: str) -> None:
    manifest = export(optimized(), inputs(), tmp_path / "a", name)
    check_artifact(tmp_path / "a", toma_fx.load(tmp_path / "a"))
    weights = [f for f in manifest.files if f.endswith(".safetensors")]
    assert weights == ["weights.safetensors"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["onnx", "aoti"])
def test_fitted_weights(tmp_path: Path, name: str) -> None:
    mask, steps = (1, 1, 0, 1, 0, 0, 1), range(7)
    times = [900.0 - 10 * i - i**2 for i in steps]
    fitted = [(times[i], (1.5 - 0.1 * i, -0.4, 0.0)) for i in steps if not mask[i]]
    cache = CacheConfig(steps_mask=mask, order=2, fitted=fitted)
    caching = toma_fx.optimize(model(), toma=False, cache=cache)
    export(caching, inputs(), tmp_path / "a", name)
    got = generation(toma_fx.load(tmp_path / "a"), steps=7)
    for a, b in zip(got, generation(caching, steps=7), strict=True):
        assert relative(a, b) < 1e-5
    plain = toma_fx.optimize(model(), toma=False, cache=CacheConfig(steps_mask=mask, order=2))
    assert relative(got[5], generation(plain, steps=7)[5]) > 1e-3


def test_tensorrt_takes_every_program() -> None:
    coverages = tensorrt_coverage(optimized(), inputs())
    assert set(coverages) == {"refresh", "reuse", "cached"}
    assert all(coverage.complete for coverage in coverages.values())


@torch.no_grad()
def test_without_merging(tmp_path: Path) -> None:
    target = InProcess()
    caching = toma_fx.optimize(model(), toma=False, cache=CacheConfig(every=2, order=2))
    manifest = export(caching, inputs(), tmp_path / "a", target)
    assert manifest.calls[0].kinds(5) == ["plain", "cached_plain"] * 2 + ["plain"]
    loaded = opened(target, tmp_path / "a")
    for got, want in zip(generation(loaded), generation(caching), strict=True):
        assert relative(got, want) < 1e-5


@torch.no_grad()
def test_a_mask_belongs_to_its_number_of_steps(tmp_path: Path) -> None:
    target, mask = InProcess(), (1, 1, 0, 1, 0)
    caching = toma_fx.optimize(model(), toma=False, cache=CacheConfig(steps_mask=mask))
    manifest = export(caching, inputs(), tmp_path / "a", target)
    assert manifest.calls[0].kinds(5) == ["plain", "plain", "cached_plain", "plain", "cached_plain"]
    with pytest.raises(GenerationError, match="steps_mask is of another length"):
        generation(opened(target, tmp_path / "a"), steps=6)


@torch.no_grad()
@pytest.mark.parametrize(
    "cache", [CacheConfig(every=3, last_steps=1), CacheConfig(steps_mask="balanced")]
)
def test_from_cpp(tmp_path: Path, cache: CacheConfig) -> None:
    """The example program follows the schedule, and gives the outputs of the process."""
    if shutil.which("cmake") is None:
        pytest.skip("no cmake: pip install cmake")
    phases = ((0.5, {"ratio": 0.5}),) if cache.last_steps else ()
    caching = toma_fx.optimize(
        model(), ratio=0.0, min_tokens=1, weights_every=1, cache=cache, phases=phases
    )
    export(caching, inputs(), tmp_path / "artifact", "aoti")
    calls = [inputs(seed=i, timestep=900.0 - 10 * i - i**2) for i in range(12)]
    want, kinds = [], []
    with caching.generation(steps=len(calls)) as run:
        for i, call in enumerate(calls):
            run.step(i)
            before = dict(caching.totals)
            want.append(caching(**call))
            kinds += [kind for kind, n in caching.totals.items() if n != before.get(kind, 0)]
    assert {"plain", "cached_plain"} <= set(kinds)
    assert ("refresh_1" in kinds) == bool(phases)
    said = run_example(tmp_path, tmp_path / "artifact", calls)
    assert [kind for _, kind, _, _ in said] == kinds
    for i, output in enumerate(want):
        found = torch.from_numpy(np.fromfile(tmp_path / f"out.{i}", dtype=np.float32))
        assert relative(found.reshape(output.shape), output) < 1e-5, (i, kinds)

"""Artifacts that run in process: what they compute, refuse and say; damage is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import toma_fx
from tests import denoisers
from tests.denoisers import relative
from tests.export.edited import edit
from tests.export.in_process import InProcess, opened
from tests.methods.test_methods import inputs, model
from toma_fx.errors import ArtifactError, ConfigError, SignatureError
from toma_fx.export.builder import export
from toma_fx.export.loader import load
from toma_fx.export.reading import verify_artifact
from toma_fx.run.schedule import Schedule, due

pytestmark = pytest.mark.usefixtures("exported_once")


ONE_BLOCK: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "block_out_channels": (16,),
    "transformer_layers_per_block": (1,),
    "attention_head_dim": (2,),
    "mid_block_type": None,
}


# -- build and run --------------------------------------------------------------------------------


@torch.no_grad()
def test_steps_of_generations(tmp_path: Path, optimized: Any, target: InProcess) -> None:
    """The same programs at the same steps as in process, over two generations."""
    manifest = export(optimized, inputs(), tmp_path / "a", target)
    (call,) = manifest.calls
    assert set(call.programs) == {"refresh", "reweigh", "reuse"}
    assert [p.kind for p in call.parity] == ["refresh", "reuse", "reweigh", "reuse"]
    assert all(p.relative <= p.tolerance for p in call.parity)
    loaded = opened(target, tmp_path / "a")
    for generation in range(2):
        optimized.reset()
        for step in range(7):
            call = inputs(seed=10 * generation + step, timestep=800.0 - step)
            want = optimized(**call)
            assert relative(loaded(**call), want) < 1e-5
            assert relative(want, model()(**call)) > 1e-3, "it merges"
    assert loaded.dtype == torch.float32


@pytest.mark.parametrize("options", [{"ratio": 0.0}, {"toma": False}])
def test_a_model_that_does_not_merge(
    tmp_path: Path, target: InProcess, options: dict[str, Any]
) -> None:
    """The counterpart to compare a merged artifact with."""
    plain = model()
    made = export(
        toma_fx.optimize(plain, min_tokens=1, **options), inputs(), tmp_path / "a", target
    )
    (call,) = made.calls
    assert list(call.programs) == ["plain"]
    assert call.kinds(3) == ["plain"] * 3
    assert {p.kind for p in call.parity} == {"plain"}
    with torch.no_grad():
        got = opened(target, tmp_path / "a")(**inputs())
        assert torch.equal(got, plain(**inputs()))


def test_manifest_reads_back(tmp_path: Path, optimized: Any, target: InProcess) -> None:
    manifest = export(optimized, inputs(), tmp_path / "a", target, license="mine")
    assert verify_artifact(tmp_path / "a") == manifest
    assert manifest.license == "mine"
    assert {s.tensor.name: s.tensor.shape for s in manifest.calls[0].inputs} == {
        "sample": (2, 4, 16, 24), "timestep": (2,)
    }  # fmt: skip
    assert set(manifest.files) == {"refresh.txt", "reweigh.txt", "reuse.txt"}


def test_nested_inputs_constants_and_structure(tmp_path: Path, target: InProcess) -> None:
    unet = toma_fx.optimize(denoisers.sdxl(**ONE_BLOCK), min_tokens=60)
    call = {**denoisers.sdxl_inputs(), "return_dict": True}
    manifest = export(unet, call, tmp_path / "a", target)
    assert "added_cond_kwargs_time_ids" in {s.tensor.name for s in manifest.calls[0].inputs}
    assert [(c.path, c.value) for c in manifest.calls[0].constants] == [(("return_dict",), True)]
    loaded = opened(target, tmp_path / "a")
    with torch.no_grad():
        want = unet(**call).sample
        for out in (loaded(**call), loaded(call.pop("sample"), **call)):
            assert relative(out.sample, want) < 1e-5
            loaded.reset()
    assert loaded.config.in_channels == 4
    assert loaded.add_embedding.linear_1.in_features == 64


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"sample": torch.zeros(1, 4, 16, 24)}, "sample"),
        ({"sample": torch.zeros(2, 4, 16, 16, dtype=torch.float64)}, "sample"),
        ({"timestep": torch.full((2,), 0.1, dtype=torch.float64)}, "timestep"),
        ({"sample": None}, "sample"),
        ({"mask": torch.zeros(1)}, "mask"),
    ],
)
def test_other_calls_are_refused(
    tmp_path: Path, optimized: Any, target: InProcess, change: dict[str, Any], where: str
) -> None:
    export(optimized, inputs(), tmp_path / "a", target)
    with pytest.raises(SignatureError) as caught:
        opened(target, tmp_path / "a")({**inputs(), **change}["sample"], **_rest(change))
    assert caught.value.where == where


def _rest(change: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in {**inputs(), **change}.items() if k != "sample"}


@torch.no_grad()
def test_numbers_come_in_any_dtype_that_holds_them(
    tmp_path: Path, optimized: Any, target: InProcess
) -> None:
    export(optimized, inputs(), tmp_path / "a", target)
    loaded, call = opened(target, tmp_path / "a"), inputs(timestep=800.0)
    want = loaded(**call)
    for dtype in (torch.int64, torch.float64, torch.float16):
        loaded.reset()
        assert torch.equal(loaded(**{**call, "timestep": call["timestep"].to(dtype)}), want)


def test_positions_of_another_grid_are_refused(tmp_path: Path, target: InProcess) -> None:
    flux = toma_fx.optimize(denoisers.flux(num_layers=1, num_single_layers=0), min_tokens=60)
    export(flux, denoisers.flux_inputs(8, 16), tmp_path / "a", target)
    loaded = opened(target, tmp_path / "a")
    with torch.no_grad():
        loaded(**denoisers.flux_inputs(8, 16))
        loaded.reset()
        with pytest.raises(SignatureError, match="img_ids"):
            loaded(**denoisers.flux_inputs(16, 8))


def test_contexts_keep_patterns_apart(tmp_path: Path, optimized: Any, target: InProcess) -> None:
    export(optimized, inputs(), tmp_path / "a", target)
    loaded = opened(target, tmp_path / "a")
    optimized.reset()
    with torch.no_grad():
        for step in range(3):
            for seed, name in enumerate(("cond", "uncond")):
                call = inputs(seed, 800.0 - step)
                with loaded.cache_context(name), optimized.cache_context(name):
                    assert relative(loaded(**call), optimized(**call)) < 1e-5


def test_it_stays_where_it_is(tmp_path: Path, optimized: Any, target: InProcess) -> None:
    export(optimized, inputs(), tmp_path / "a", target)
    loaded = opened(target, tmp_path / "a")
    assert loaded.to("cpu", torch.float32) is loaded
    assert loaded.to(torch.ones(1), True) is loaded
    assert loaded.to(torch.device("cpu"), non_blocking=True) is loaded
    for change in ({"device": "meta"}, {"dtype": torch.float16}):
        with pytest.raises(ArtifactError):
            loaded.to(**change)
        with pytest.raises(ArtifactError):
            loaded.to(*change.values())
    with pytest.raises(ArtifactError):
        loaded.to(torch.ones(1, device="meta"))
    with pytest.raises(ArtifactError):
        loaded.train()


@pytest.mark.parametrize(
    "options",
    [
        {}, {"destinations_every": 3, "weights_every": 2}, {"select_at": (0, 4, 9)},
        {"first_step": 2, "last_step": 8}, {"destinations_every": 7, "weights_every": 3},
    ],
)  # fmt: skip
def test_schedule_says_what_the_configuration_says(options: dict[str, Any]) -> None:
    config = toma_fx.ToMAConfig(**options)
    schedule = Schedule.of(config)
    for step in range(1500):
        first, last = config.first_step, config.last_step
        merges = step >= first and (last is None or step <= last)
        assert due(schedule, step) == (config.renewal(step - first) if merges else "plain")


# -- damage ---------------------------------------------------------------------------------------


TARGET = {"name": "zip", "options": {}}


def linked(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def edited(folder: Path, change: dict[str, Any]) -> None:
    edit(folder, lambda data: data.update(change))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda a: (a / "reuse.txt").unlink(), "nothing"),
        (lambda a: (a / "reuse.txt").write_text("REUSE.txt"), "SHA-256"),
        (lambda a: (a / "reuse.txt").write_text("reuse"), "bytes"),
        (lambda a: linked(a / "reuse.txt"), "link"),
        (lambda a: (a / "manifest.json").unlink(), "no artifact"),
        (lambda a: (a / "manifest.json").write_text("{"), "JSON"),
        (lambda a: edited(a, {"version": 1}), "another version"),
        (lambda a: edited(a, {"files": {"../../passwd": {"size": 1, "sha256": ""}}}), "outside"),
        (lambda a: edited(a, {"files": {}}), "files that are listed"),
        (lambda a: edited(a, {"surprise": 1}), "every field once"),
        (lambda a: edited(a, {"calls": [{"inputs": [{"path": "x"}]}]}), "inputs"),
        (lambda a: edited(a, {"target": TARGET}), "unknown target"),
    ],
)  # fmt: skip
def test_damage_is_found_before_anything_runs(
    tmp_path: Path, optimized: Any, target: InProcess, damage: Any, said: str
) -> None:
    export(optimized, inputs(), tmp_path / "a", target)
    damage(tmp_path / "a")
    with pytest.raises(ArtifactError, match=said):
        load(tmp_path / "a")


@pytest.mark.parametrize("name", ["aoti", "onnx"])
def test_another_device(tmp_path: Path, optimized: Any, target: InProcess, name: str) -> None:
    """Every target says which devices it is for, before it opens a program."""
    if name == "onnx":
        pytest.importorskip("onnxruntime")
    export(optimized, inputs(), tmp_path / "a", target)
    edited(tmp_path / "a", {"target": {**TARGET, "name": name}})
    with pytest.raises(ConfigError, match="device"):
        load(tmp_path / "a", device="meta")

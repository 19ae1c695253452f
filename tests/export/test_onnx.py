"""ONNX artifacts: what they compute in ONNX Runtime, what they hold, and how builds go wrong."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import toma_fx
from tests.denoisers import relative
from tests.export.edited import edit, list_anew
from tests.methods.test_methods import inputs, model, static
from toma_fx.errors import (
    ArtifactError,
    BuildError,
    ConfigError,
    MissingPackageError,
    TomaError,
    UnknownNameError,
)
from toma_fx.export.builder import export
from toma_fx.export.loader import load
from toma_fx.export.manifest import Manifest
from toma_fx.export.reading import open_artifact, verify_artifact
from toma_fx.export.to_onnx import lower
from toma_fx.export.to_onnx.runtime import ORTRuntime
from toma_fx.export.to_onnx.target import DEFAULT_OPSET, ONNXTarget
from toma_fx.run.schedule import Phase

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")
CPU = torch.device("cpu")


@cache
def optimized(name: str = "toma") -> Any:
    return toma_fx.optimize(model(), method=static(name))


def steps(denoiser: Any, count: int = 5) -> list[Tensor]:
    """Outputs of a generation."""
    denoiser.reset()
    made = (denoiser(**inputs(seed=i, timestep=800.0 - i)) for i in range(count))
    with torch.no_grad():
        return [x.clone() for x in made]


def names(values: Any) -> list[str]:
    return [x.name for x in values]


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    """An artifact that was built in two goes, and the programs converted in each."""
    out = tmp_path_factory.mktemp("onnx") / "cached"
    goes: list[list[str]] = []
    convert = lower.convert

    def first(call: str, *rest: Any) -> Any:
        goes[-1].append(call)
        if len(goes) == 1 and call == "reuse":
            raise Interrupted
        return convert(call, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower, "convert", first)
        goes.append([])
        with pytest.raises(Interrupted):
            export(optimized(), inputs(), out, ONNXTarget())
        assert not out.exists()
        goes.append([])
        export(optimized(), inputs(), out, ONNXTarget())
    return out, goes[0], goes[1]


# -- cached ---------------------------------------------------------------------------------------


def test_an_interrupted_build_goes_on(cached: Any) -> None:
    _, first, second = cached
    assert first == ["refresh", "reuse"]
    assert second == ["reuse"], "the first stage is not done again"


def test_a_generation_is_that_of_the_process(cached: Any) -> None:
    want, denoiser = steps(optimized()), load(cached[0])
    for _ in range(2):
        for a, b in zip(steps(denoiser), want, strict=True):
            assert relative(a, b) < 1e-5
    assert relative(want[0], model()(**inputs(seed=0, timestep=800.0))) > 1e-3, "it merges"


def test_what_the_manifest_says(cached: Any) -> None:
    manifest = verify_artifact(cached[0])
    assert manifest.target.name == "onnx"
    assert manifest.target.options == {"form": "cached", "opset": str(DEFAULT_OPSET)}
    (call,) = manifest.calls
    assert set(call.programs) == {"refresh", "reuse"}
    assert set(manifest.files) == {"refresh.onnx", "reuse.onnx", lower.WEIGHTS}
    assert {"onnx", "onnxscript", "onnxruntime", "torch"} <= set(manifest.versions)
    assert all(p.relative < 1e-5 for p in call.parity)
    own = [spec.tensor.name for spec in call.inputs]
    for program in call.programs.values():
        graph = onnx.load(cached[0] / program.file, load_external_data=False).graph
        assert names(graph.input) == [*own, *program.takes]
        assert names(graph.output) == [*names(call.outputs), *program.gives]


def test_weights_are_there_once(cached: Any) -> None:
    total = sum(x.nbytes for x in model().parameters())
    folder = cached[0]
    size = (folder / lower.WEIGHTS).stat().st_size
    models_ = sum(path.stat().st_size for path in folder.glob("*.onnx"))
    assert 0.8 * total < size < 1.2 * total + 4096
    assert models_ < 150_000
    places = []
    for path in folder.glob("*.onnx"):
        graph = onnx.load(path, load_external_data=False).graph
        stored = [x for x in graph.initializer if x.external_data]
        places.append({x.name: [(e.key, e.value) for e in x.external_data] for x in stored})
        assert all(dict(x)["location"] == lower.WEIGHTS for x in places[-1].values())
    first, second = places
    assert first.keys() == second.keys()
    assert first == second


def test_weights_can_be_read_without_the_models(cached: Any) -> None:
    from safetensors.torch import load_file

    stored = load_file(cached[0] / lower.WEIGHTS)
    parameters = dict(model().named_parameters())
    for name, x in stored.items():
        own, transposed = (name, False) if name in parameters else (name[:-3], True)
        want = parameters[own].T if transposed else parameters[own]
        assert torch.equal(x, want), name
    assert any(name.endswith(".10") for name in stored), "a matrix is stored as it is used"


def test_models_hold_nothing_of_this_machine(cached: Any) -> None:
    for path in cached[0].glob("*.onnx"):
        assert b".py" not in path.read_bytes()
        loaded = onnx.load(path, load_external_data=False)
        assert {o.domain for o in loaded.opset_import} == {""}
        assert not any(n.op_type in ("If", "Loop") for n in loaded.graph.node)


def opened(folder: Path, **options: Any) -> tuple[ORTRuntime, Manifest]:
    with open_artifact(folder) as files:
        runtime = ONNXTarget.open(files, CPU, options)
    assert isinstance(runtime, ORTRuntime)
    return runtime, files.manifest


def test_outputs_live_where_torch_has_them(cached: Any) -> None:
    """No step allocates, and a step may take what the last one gave."""
    runtime, _ = opened(cached[0], providers=["CPUExecutionProvider"], threads=1)
    given = list(inputs().values())
    out, patterns = runtime.run(0, "refresh", given, {})
    places = {name: x.data_ptr() for name, x in patterns.items()}
    held = {name: x.clone() for name, x in patterns.items()}
    again, patterns = runtime.run(0, "refresh", given, {})
    assert places == {name: x.data_ptr() for name, x in patterns.items()}
    assert again[0].data_ptr() == out[0].data_ptr()
    one = runtime.run(0, "reuse", given, patterns)[0][0].clone()
    two = runtime.run(0, "reuse", [x.clone() for x in given], held)[0][0]
    assert torch.equal(one, two)
    strided = [given[0].transpose(2, 3).contiguous().transpose(2, 3), *given[1:]]
    assert not strided[0].is_contiguous()
    assert torch.equal(runtime.run(0, "reuse", strided, held)[0][0], one)


def test_sessions_take_the_weights_they_are_given(cached: Any) -> None:
    """Other values in the shared memory change what both models compute: none has a copy."""
    runtime, _ = opened(cached[0])
    given = list(inputs().values())
    out, patterns = runtime.run(0, "refresh", given, {})
    before = out[0].clone(), runtime.run(0, "reuse", given, patterns)[0][0].clone()
    for x in runtime._kept.values():
        x.mul_(1.5)
    out, _ = runtime.run(0, "refresh", given, {})
    after = out[0].clone(), runtime.run(0, "reuse", given, patterns)[0][0].clone()
    for a, b in zip(after, before, strict=True):
        assert relative(a, b) > 1e-2
    fresh = opened(cached[0])[0].run(0, "refresh", given, {})[0][0]
    assert torch.equal(fresh, before[0]), "the file is as it was"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"provider": ["CPUExecutionProvider"]}, "providers"),
        ({"providers": ["CudaExecutionProvider"]}, "onnx-gpu"),
        ({"providers": []}, "none"),
    ],
)
def test_bad_options(cached: Any, options: dict[str, Any], word: str) -> None:
    with pytest.raises(UnknownNameError, match=word):
        opened(cached[0], **options)


def test_a_model_that_cannot_be_read(cached: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cached[0], tmp_path / "a"))
    (folder / "reuse.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactError, match=r"reuse\.onnx"):
        opened(list_anew(folder))


def elsewhere(folder: Path, out: Path, **changes: Any) -> Path:
    """A copy of an artifact whose manifest says other things."""
    shutil.copytree(folder, out)
    return edit(out, lambda data: data.update(changes))


def test_an_artifact_built_on_a_gpu_runs_on_a_cpu(cached: Any, tmp_path: Path) -> None:
    moved = elsewhere(cached[0], tmp_path / "a", device={"type": "cuda", "name": "", "arch": ""})
    denoiser = load(moved, device="cpu")
    assert denoiser.device == CPU
    for a, b in zip(steps(denoiser, 2), steps(load(cached[0]), 2), strict=True):
        assert torch.equal(a, b)
    if not torch.cuda.is_available():
        with pytest.raises(ArtifactError, match="is not here"):
            load(moved)


def test_bfloat16_can_not_be_moved_to_a_cpu(cached: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="bfloat16"):
        load(elsewhere(cached[0], tmp_path / "a", dtype="bfloat16"))


# -- stateless ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("exported_once")
def test_stateless(tmp_path: Path) -> None:
    """One model that selects at every step and hands nothing on."""
    manifest = export(optimized(), inputs(), tmp_path / "out", ONNXTarget("stateless"))
    (call,) = manifest.calls
    assert list(call.programs) == ["refresh"]
    assert call.kept == ()
    assert call.schedule.phases == (Phase(0, (), ("refresh",), "cached"),)
    assert call.kinds(3) == ["refresh"] * 3
    graph = onnx.load(tmp_path / "out" / "refresh.onnx", load_external_data=False).graph
    assert names(graph.output) == ["output_0"]
    assert names(graph.input) == ["sample", "timestep"]
    every = toma_fx.optimize(
        model(),
        method="toma",
        min_tokens=1,
        scope="block",
        branches=("attention", "mlp"),
        destinations_every=1,
        weights_every=1,
    )
    denoiser = load(tmp_path / "out")
    for a, b in zip(steps(denoiser, 3), steps(every, 3), strict=True):
        assert relative(a, b) < 1e-5


# -- what can go wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [17, 26, 0, "20", 20.0, True, None])
def test_bad_opset(opset: Any) -> None:
    with pytest.raises(ConfigError, match="18 to 25"):
        ONNXTarget(opset=opset)


def test_bad_form() -> None:
    with pytest.raises(UnknownNameError, match="stateless"):
        ONNXTarget(form="statless")  # type: ignore[arg-type]


@pytest.mark.usefixtures("exported_once")
@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, *rest: Any) -> Any:
        if name == package:
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingPackageError, match=r"toma_fx\[onnx\]") as caught:
        export(optimized(), inputs(), tmp_path / "out", ONNXTarget())
    assert package in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("exported_once")
def test_full_disk(cached: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for path in cached[0].iterdir():
        (out / path.name).write_bytes(path.read_bytes())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lower, "convert", lambda *_: None)
    monkeypatch.setattr(lower, "externalize_weights", full)
    with pytest.raises(BuildError, match="No space left"):
        export(optimized(), inputs(), out, ONNXTarget(opset=20), overwrite=True)
    assert verify_artifact(out).target.options["opset"] == str(DEFAULT_OPSET), (
        "what was there stays"
    )


@pytest.mark.usefixtures("exported_once")
def test_what_the_exporter_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("outer") from ValueError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(BuildError, match="no such operator"):
        export(optimized(), inputs(), tmp_path / "out", ONNXTarget())
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("exported_once")
def test_another_opset_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = lower.convert

    def other(*rest: Any) -> Any:
        found = convert(*rest)
        found.opset_imports[""] = 21
        return found

    monkeypatch.setattr(lower, "convert", other)
    with pytest.raises(BuildError, match="opset 20"):
        export(optimized("todo"), inputs(), tmp_path / "out", ONNXTarget(opset=20))


def test_bfloat16_needs_a_gpu() -> None:
    found: Any = SimpleNamespace(
        device=CPU,
        leaves=(None, torch.zeros(1, dtype=torch.bfloat16)),
        denoiser=SimpleNamespace(denoiser=model()),
    )
    with pytest.raises(BuildError, match="bfloat16") as caught:
        ONNXTarget().check(found)
    assert isinstance(caught.value, TomaError)
    assert "half()" in caught.value.hint


def test_onnx_runtime_reports_nothing_home(
    cached: tuple[Path, list[str], list[str]], tmp_path: Path
) -> None:
    """No file outside the artifact: from 1.29 on it keeps an identifier and a queue below HOME."""
    switches = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "CI")
    environment = {k: v for k, v in os.environ.items() if k not in switches}
    code = f"import toma_fx; toma_fx.load({str(cached[0])!r})"
    for switch, silent in (({}, True), ({"ORT_DISABLE_TELEMETRY": "0"}, False)):
        home = tmp_path / f"home-{silent}"
        home.mkdir()
        subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, **switch, "HOME": str(home)},
            check=True,
        )
        kept = [p for p in home.rglob("*") if "onnxruntime" in str(p)]
        assert bool(kept) != silent, kept

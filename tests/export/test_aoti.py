"""AOTInductor artifacts: compiled, run from Python and C++, refused where they don't fit."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import toma_fx
from tests import denoisers
from tests.denoisers import relative
from tests.export.cpp import run_example
from tests.export.edited import edit, list_anew
from tests.methods.test_methods import inputs, model, static
from toma_fx.errors import ArtifactError, UnknownNameError
from toma_fx.export.builder import export
from toma_fx.export.loader import load
from toma_fx.export.programs import export_programs
from toma_fx.export.reading import open_artifact
from toma_fx.export.to_aoti import runtime
from toma_fx.export.to_aoti.files import PACKAGE, WEIGHTS
from toma_fx.export.to_aoti.target import AOTITarget

CPU = torch.device("cpu")


@cache
def optimized() -> Any:
    return toma_fx.optimize(model(), method=static("grid"))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One build of the smallest model, which no test changes."""
    out = tmp_path_factory.mktemp("aoti") / "artifact"
    export(optimized(), inputs(), out, AOTITarget())
    return out


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """An artifact with another manifest, and checksums that fit the files."""
    edit(folder, change)
    return list_anew(folder)


# -- what it computes -----------------------------------------------------------------------------


@torch.no_grad()
def test_steps_equal_the_process(artifact: Path) -> None:
    loaded = load(artifact)
    assert set(loaded.manifest.calls[0].programs) == {"refresh", "reuse"}
    assert all(p.relative < 1e-5 for p in loaded.manifest.calls[0].parity)
    for generation in range(2):
        optimized().reset()
        for step in range(5):
            call = inputs(seed=10 * generation + step, timestep=800.0 - step)
            want = optimized()(**call)
            assert relative(loaded(**call), want) < 1e-5
            assert relative(want, model()(**call)) > 1e-3, "it merges"


@torch.no_grad()
def test_strides_of_a_call_do_not_matter(artifact: Path) -> None:
    """Compiled code reads memory as its example lay."""
    loaded = load(artifact)
    want = loaded(**inputs())
    sample = inputs()["sample"].to(memory_format=torch.channels_last)
    assert not sample.is_contiguous()
    loaded.reset()
    assert relative(loaded(sample=sample, timestep=torch.tensor(800.0).expand(2)), want) < 1e-6


def test_examples_are_contiguous() -> None:
    sample = inputs()["sample"].to(memory_format=torch.channels_last)
    made = export_programs(
        optimized(), {"sample": sample, "timestep": torch.tensor(800.0).expand(2)}
    )
    for program in made.values():
        assert all(x.is_contiguous() for x in program.example)
        placeholders = [n for n in program.program.graph.nodes if n.op == "placeholder"]
        assert all(n.meta["val"].is_contiguous() for n in placeholders)


# -- weights once ---------------------------------------------------------------------------------


def test_weights_are_stored_once(artifact: Path) -> None:
    with zipfile.ZipFile(artifact / PACKAGE) as package:
        names = package.namelist()
    assert not [n for n in names if "weight" in n or "constant" in n]
    assert sum(n.endswith(".so") for n in names) == 2
    state = model().state_dict()
    stored = load_file(artifact / WEIGHTS)
    assert set(stored) == set(state)
    assert all(torch.equal(stored[name], x) for name, x in state.items())
    size = sum(x.nbytes for x in state.values())
    assert size < (artifact / WEIGHTS).stat().st_size < size + 4096


def test_weights_are_in_memory_once(artifact: Path) -> None:
    """Every constant of every program is a tensor of the one mapping."""
    with open_artifact(artifact) as files:
        runtime: Any = AOTITarget.open(files, CPU, {})
    given: list[dict[str, Tensor]] = []

    class Spy:
        def __init__(self, runner: Any) -> None:
            self.loader = runner

        def get_constant_fqns(self) -> list[str]:
            return list(self.loader.get_constant_fqns())

        def load_constants(self, constants: dict[str, Tensor], **options: bool) -> None:
            assert options == {"check_full_update": True, "user_managed": True}
            given.append(constants)

    for (_, entry), loader in runtime._runners.items():
        runtime._complete({entry: Spy(loader)}, entry)
    assert len(given) == 2
    for name, x in given[0].items():
        assert given[1][name].data_ptr() == x.data_ptr() == runtime._weights[name].data_ptr()
    mapped = Path("/proc/self/maps").read_text() if sys.platform == "linux" else WEIGHTS
    assert WEIGHTS in mapped


def test_no_pickles(artifact: Path) -> None:
    with zipfile.ZipFile(artifact / PACKAGE) as package:
        assert not [n for n in package.namelist() if n.endswith((".pkl", ".pt"))]
        for name in package.namelist():
            head = package.read(name)[:4]
            assert head[:2] not in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"PK"), name


# -- refusals -------------------------------------------------------------------------------------


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the artifact may be loaded."""

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("an artifact that must be refused was opened")

    monkeypatch.setattr(runtime, "load_programs", forbidden)
    monkeypatch.setattr(runtime, "load_weights", forbidden)


def other_torch(data: dict[str, Any]) -> None:
    data["versions"]["torch"] = "2.12.1+cpu"


def other_device(data: dict[str, Any]) -> None:
    data["device"]["type"] = "cuda"


def other_arch(data: dict[str, Any]) -> None:
    data["device"]["arch"] = "linux aarch64 sve2"


def wider_arch(data: dict[str, Any]) -> None:
    data["device"]["arch"] += " avx10_9"


def no_arch(data: dict[str, Any]) -> None:
    data["device"]["arch"] = ""


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_torch, r"versions\.torch"),
        (other_arch, "aarch64"),
        (wider_arch, "without avx10_9"),
        (no_arch, "without a check"),
    ],
)
def test_other_machines_are_refused(copied: Path, change: Any, said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        load(rewritten(copied, change))


@pytest.mark.usefixtures("untouched")
def test_other_devices_are_refused(copied: Path) -> None:
    with pytest.raises(ArtifactError, match="device"):
        load(rewritten(copied, other_device), device="cpu")
    with pytest.raises(ArtifactError, match=r"device\.type"), open_artifact(copied) as files:
        AOTITarget.open(files, CPU, {})


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", [PACKAGE, WEIGHTS])
def test_truncated_files_are_refused(copied: Path, name: str) -> None:
    data = (copied / name).read_bytes()
    (copied / name).write_bytes(data[:-100])
    with pytest.raises(ArtifactError, match="bytes"):
        load(copied)
    (copied / name).write_bytes(data[:-100] + bytes(100))
    with pytest.raises(ArtifactError, match="SHA-256"):
        load(copied)


def test_options_are_refused(artifact: Path) -> None:
    with pytest.raises(UnknownNameError, match="providers"):
        load(artifact, providers=["CUDAExecutionProvider"])


@pytest.mark.parametrize("lost", [("embed.weight",), ()])
def test_a_program_without_its_constants_is_never_run(copied: Path, lost: tuple[str, ...]) -> None:
    """Even where the checksums fit: running it would end the process."""
    tensors = load_file(copied / WEIGHTS)
    kept = {k: v for k, v in tensors.items() if lost and k not in lost}
    save_file(kept, copied / WEIGHTS)
    with pytest.raises(ArtifactError, match="don't belong together"):
        load(rewritten(copied, lambda data: None))


def test_a_weights_file_that_is_none(copied: Path) -> None:
    (copied / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(ArtifactError, match="can't be loaded"):
        load(rewritten(copied, lambda data: None))


def test_a_package_without_the_program(copied: Path) -> None:
    def rename(data: dict[str, Any]) -> None:
        data["calls"][0]["programs"]["reuse"]["entry"] = "reweigh"

    with pytest.raises(ArtifactError, match="the programs"):
        load(rewritten(copied, rename))


# -- several calls --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One build for batches of two and of one."""
    out = tmp_path_factory.mktemp("several") / "artifact"
    calls = [inputs(), inputs(batch=1)]
    export(optimized(), calls, out, AOTITarget(), names=["two", "one"])
    return out


@torch.no_grad()
def test_several_calls_share_package_and_weights(several: Path, artifact: Path) -> None:
    assert {path.name for path in several.iterdir()} == {path.name for path in artifact.iterdir()}
    one, both = (load_file(folder / WEIGHTS) for folder in (artifact, several))
    assert one.keys() == both.keys()
    assert all(torch.equal(x, both[name]) for name, x in one.items())
    loaded = load(several)
    for size in (2, 1):
        optimized().reset()
        for step in range(4):
            call = inputs(seed=step, timestep=800.0 - step, batch=size)
            assert relative(loaded(**call), optimized()(**call)) < 1e-5
    loaded.reset()
    for a, b in zip(load(artifact)(**inputs()), loaded(**inputs()), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_several_calls_from_cpp(several: Path, tmp_path: Path) -> None:
    """The call is chosen by the shapes of the inputs, or by its name."""
    if shutil.which("cmake") is None:
        pytest.skip("no cmake: pip install cmake")
    steps = [inputs(seed=step, timestep=800.0 - step, batch=1) for step in range(3)]
    assert [kind for _, kind, _, _ in run_example(tmp_path, several, steps)] == [
        "refresh", "reuse", "refresh"
    ]  # fmt: skip
    loaded = load(several)
    for i, call in enumerate(steps):
        want = loaded(**call)
        found = torch.from_numpy(np.fromfile(tmp_path / f"out.{i}", dtype=np.float32))
        assert torch.equal(found.reshape(want.shape), want)
    given = [tmp_path / "build/denoise", several, tmp_path / "inputs.safetensors", tmp_path / "x"]
    for name, words in (("two", "another shape"), ("three", "none of the calls"), ("one", "")):
        run = subprocess.run([*given, name], capture_output=True, text=True)
        assert run.returncode == (1 if words else 0)
        assert words in run.stderr


# -- whole models, and C++ ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdxl", "channels_last", "flux"])
@torch.no_grad()
def test_whole_models(tmp_path: Path, name: str) -> None:
    whole: nn.Module = denoisers.flux() if name == "flux" else denoisers.sdxl()
    if name == "channels_last":
        whole = whole.to(memory_format=torch.channels_last)
    call = denoisers.flux_inputs if name == "flux" else denoisers.sdxl_inputs
    optimized = toma_fx.optimize(whole, min_tokens=60)
    export(optimized, call(), tmp_path / "a", AOTITarget())
    loaded = load(tmp_path / "a")
    optimized.reset()
    for step in range(6):
        given = call(seed=step, timestep=0.9 - 0.01 * step)
        assert relative(loaded(**given)[0], optimized(**given)[0]) < 1e-5
    with safe_open(tmp_path / "a" / WEIGHTS, "pt") as file:
        strided = [k for k in file.metadata() or {} if k.startswith("strided/")]
    assert bool(strided) == (name == "channels_last")


@torch.no_grad()
def test_from_cpp(artifact: Path, tmp_path: Path) -> None:
    """The example program gives the outputs of the process, step by step."""
    if shutil.which("cmake") is None:
        pytest.skip("no cmake: pip install cmake")
    steps = [inputs(seed=step, timestep=800.0 - step) for step in range(5)]
    said = run_example(tmp_path, artifact, steps)
    assert [call for _, call, _, _ in said] == ["refresh", "reuse", "refresh", "reuse", "refresh"]
    optimized().reset()
    for i, call in enumerate(steps):
        want = optimized()(**call)
        found = torch.from_numpy(np.fromfile(tmp_path / f"out.{i}", dtype=np.float32))
        assert relative(found.reshape(want.shape), want) < 1e-5
        assert float(said[i][3]) == pytest.approx(float(want.double().abs().mean()), rel=1e-5)

    def refused(folder: Path) -> str:
        run = subprocess.run(
            [tmp_path / "build/denoise", folder, tmp_path / "inputs.safetensors", tmp_path / "out"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 1, "an error, and no crash"
        return run.stderr

    broken = Path(shutil.copytree(artifact, tmp_path / "broken"))
    save_file({"embed.bias": torch.zeros(16)}, broken / WEIGHTS)
    assert "no constant" in refused(broken)
    (broken / WEIGHTS).write_bytes(b"\xff" * 64)
    assert "damaged" in refused(broken)
    assert "made with torch" in refused(rewritten(broken, other_torch))

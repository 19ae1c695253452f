"""The TensorRT target, without TensorRT: against a stand-in."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import toma_fx
from tests.export.edited import list_anew
from tests.export.tensorrt_stand_in import (
    ENGINES,
    TABLE,
    TORCH_TENSORRT,
    TRT,
    Builder,
    Config,
    Context,
    CudaEngine,
    HostTorch,
    MemoryPoolType,
    OnnxParser,
    Stream,
)
from tests.methods.test_methods import inputs, model
from toma_fx.errors import (
    ArtifactError,
    BuildError,
    ConfigError,
    MissingPackageError,
    UnknownNameError,
)
from toma_fx.export import tensorrt, tensorrt_coverage
from toma_fx.export.folder import OpenFolder
from toma_fx.export.programs import Programs
from toma_fx.export.reading import ArtifactFiles, verify_artifact
from toma_fx.export.to_tensorrt import lower, runtime, target
from toma_fx.export.to_tensorrt.target import TensorRTTarget

pytestmark = pytest.mark.usefixtures("exported_once")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT, and a GPU whose memory is the host's."""
    packages = {"tensorrt": TRT, "torch_tensorrt": TORCH_TENSORRT}
    for module in (target, lower):
        monkeypatch.setattr(module, "import_tensorrt", packages.__getitem__)
    monkeypatch.setattr(Programs, "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(runtime, "torch", HostTorch())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")


# -- the interfaces -------------------------------------------------------------------------------


def test_the_stand_in_has_nothing_that_tensorrt_lacks() -> None:
    names = TABLE["tensorrt"]["names"]
    classes = [CudaEngine, Context, Config, *vars(TRT).values()]
    used = {k for k in vars(TRT) if not k.startswith("_")}
    for kind in classes:
        if isinstance(kind, type):
            used |= {k for k in vars(kind) if not k.startswith("_")} - {"last", "errors"}
    used |= {"num_io_tensors", "num_errors", "builder_optimization_level"}
    assert used - {"WARNING", "INPUT", "OUTPUT"} <= {k for k, there in names.items() if there}
    assert {"execute_async_v3", "build_serialized_network", "STRONGLY_TYPED"} <= used


@pytest.mark.parametrize("route", ["torch", "onnx"])
def test_engines_through_all_steps(tmp_path: Path, optimized: Any, gpu: None, route: Any) -> None:
    if route == "onnx":
        pytest.importorskip("onnxscript")
    made = tensorrt(optimized, inputs(), tmp_path / "a", route=route, license="mine")
    assert [p.kind for p in made.calls[0].parity] == ["refresh", "reuse", "reweigh", "reuse"]
    assert max(p.relative for p in made.calls[0].parity) < 1e-5
    assert verify_artifact(tmp_path / "a") == made
    assert sorted(made.files) == ["refresh.engine", "reuse.engine", "reweigh.engine"]
    assert made.device.arch == "sm_90"
    assert made.versions["tensorrt"] == "11.0.0.114"
    assert made.target.options["route"] == route


@pytest.mark.parametrize("route", ["torch", "onnx"])
def test_several_calls(tmp_path: Path, optimized: Any, gpu: None, route: Any) -> None:
    """An engine for each call and kind of step."""
    calls, names = [inputs(), inputs(batch=1)], ["two", "one"]
    made = tensorrt(optimized, calls, tmp_path / "a", route=route, names=names)
    kinds = ("refresh", "reuse", "reweigh")
    assert {*made.files} == {f"{name}_{kind}.engine" for name in names for kind in kinds}
    assert max(p.relative for call in made.calls for p in call.parity) < 1e-5


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    onnx = pytest.importorskip("onnx")
    kind, helper = onnx.TensorProto.FLOAT, onnx.helper
    values = [helper.make_tensor_value_info(name, kind, [2]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "g", *([v] for v in values))
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_options_reach_the_builder(onnx_file: Path, gpu: None) -> None:
    assert lower.engine_of_model("reuse", onnx_file, level=5, workspace=2**30) in ENGINES
    assert Builder.last.builder_optimization_level == 5
    assert Builder.last._limits == {MemoryPoolType.WORKSPACE: 2**30}


def test_what_the_parser_says_is_passed_on(
    onnx_file: Path, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Builder, "build_serialized_network", lambda *args: None)
    with pytest.raises(BuildError, match="found no engine"):
        lower.engine_of_model("reuse", onnx_file, None, 0)
    monkeypatch.setattr(OnnxParser, "errors", ("node 3: no", "node 7: no"))
    with pytest.raises(BuildError, match="node 3: no; node 7: no"):
        lower.engine_of_model("reuse", onnx_file, None, 0)


def test_what_torch_tensorrt_says_is_passed_on(
    tmp_path: Path, optimized: Any, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:

    def broken(*args: Any, **kwargs: Any) -> bytes:
        raise RuntimeError("While interpreting the module got an error")

    monkeypatch.setattr(
        TORCH_TENSORRT.dynamo, "convert_exported_program_to_serialized_trt_engine", broken
    )
    with pytest.raises(BuildError, match="While interpreting"):
        tensorrt(optimized, inputs(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_programs_that_are_not_taken_are_refused_first(
    tmp_path: Path, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"min_tokens": 1, "inverse": "pinv", "destinations_every": 2}
    other = toma_fx.optimize(model(), method="toma", **fields)
    with pytest.raises(BuildError, match=r"aten\._linalg_solve_ex"):
        tensorrt(other, inputs(), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_other_engines_are_refused(
    tmp_path: Path, optimized: Any, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tensorrt(optimized, inputs(), tmp_path / "a")
    cuda = torch.device("cuda")

    def opened(changed: Any = made, device: torch.device = cuda, **options: Any) -> Any:
        with OpenFolder(tmp_path / "a") as folder:
            return TensorRTTarget.open(ArtifactFiles(folder, changed), device, options)

    opened()
    with pytest.raises(ArtifactError, match=r"versions\.tensorrt"):
        opened(replace(made, versions={**made.versions, "tensorrt": "10.0"}))
    with pytest.raises(ArtifactError, match=r"device\.arch"):
        opened(replace(made, device=replace(made.device, arch="sm_80")))
    with pytest.raises(ArtifactError, match=r"device\.type"):
        opened(device=torch.device("cpu"))
    with pytest.raises(UnknownNameError, match="no options"):
        opened(threads=2)
    (call,) = made.calls
    other = replace(call, outputs=(replace(call.outputs[0], dtype="float16"),))
    with pytest.raises(ArtifactError, match="output0"):
        opened(replace(made, calls=(other,)))
    with pytest.raises(ArtifactError, match="none called"):
        opened(replace(made, target=replace(made.target, options={"route": "onnx"})))
    (tmp_path / "a" / "reuse.engine").write_bytes(b"of another version")
    with pytest.raises(ArtifactError, match="bytes"):
        opened()
    with pytest.raises(ArtifactError, match="can't read it"):
        opened(verify_artifact(list_anew(tmp_path / "a")))


# -- without TensorRT -----------------------------------------------------------------------------


@pytest.mark.parametrize(("route", "package"), [("torch", "tensorrt"), ("onnx", "tensorrt")])
def test_missing_packages(tmp_path: Path, optimized: Any, route: Any, package: str) -> None:
    with pytest.raises(MissingPackageError) as caught:
        tensorrt(optimized, inputs(), tmp_path / "a", route=route)
    text = str(caught.value)
    for words in (
        package,
        "torch-tensorrt 2.13.0",
        "tensorrt<11.1.0,>=11.0.0",
        "toma_fx[tensorrt]",
    ):
        assert words in text
    assert list(tmp_path.iterdir()) == []


def test_a_model_on_a_cpu(
    tmp_path: Path, optimized: Any, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Programs, "device", property(lambda self: torch.device("cpu")))
    with pytest.raises(BuildError, match="the GPU that they are for"):
        tensorrt(optimized, inputs(), tmp_path / "a")


@pytest.mark.parametrize(
    "options",
    [
        {"route": "tvm"},
        {"optimization_level": 6},
        {"workspace": -1},
        {"workspace": math.inf},
    ],
)
def test_bad_options(options: Any) -> None:
    with pytest.raises(ConfigError):
        TensorRTTarget(**options)


@pytest.mark.parametrize("route", ["torch", "onnx"])
def test_coverage_needs_no_tensorrt(optimized: Any, route: Any) -> None:
    if route == "onnx":
        pytest.importorskip("onnxscript")
    found = tensorrt_coverage(optimized, inputs(), route=route)
    assert list(found) == ["refresh", "reweigh", "reuse"]
    assert all(coverage.complete for coverage in found.values())
    names = {row.name for row in found["refresh"].ops}
    assert names >= ({"aten.argmax.default"} if route == "torch" else {"ArgMax", "Attention"})


def test_coverage_of_an_unknown_route(optimized: Any) -> None:
    with pytest.raises(UnknownNameError, match="of route"):
        tensorrt_coverage(optimized, inputs(), route="tvm")  # type: ignore[arg-type]

"""The TensorRT target, without TensorRT: against a stand-in that has nothing but what the published
wheels have (`tests/data/signatures.json`), and that runs each "engine" in this process."""

from __future__ import annotations

import ctypes
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import toma_fx
from tests.examples import ROOT
from tests.methods.test_methods import inputs, model
from toma_fx.errors import (
    ArtifactError,
    BuildError,
    ConfigError,
    MissingPackageError,
    UnknownNameError,
)
from toma_fx.export import tensorrt, tensorrt_coverage
from toma_fx.export.artifact import verify_artifact
from toma_fx.export.programs import Programs
from toma_fx.export.to_tensorrt import lower, runtime, target
from toma_fx.export.to_tensorrt.coverage import load_table
from toma_fx.export.to_tensorrt.target import TensorRTTarget

pytestmark = pytest.mark.usefixtures("exported_once")
TABLE = json.loads((ROOT / "tests" / "data" / "signatures.json").read_text())
DTYPES = {
    "FLOAT": torch.float32,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
}


@dataclass
class Engine:
    """What an engine computes, and its tensors by name."""

    compute: Callable[[list[Tensor]], list[Tensor]]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


ENGINES: dict[bytes, Engine] = {}


def serialized(engine: Engine) -> bytes:
    key = f"engine {len(ENGINES)}".encode()
    ENGINES[key] = engine
    return key


# -- a stand-in for tensorrt ----------------------------------------------------------------------


class Mode(Enum):
    INPUT = 0
    OUTPUT = 1


class Context:
    def __init__(self, engine: Engine) -> None:
        self._engine, self._places = engine, dict[str, int]()

    def set_tensor_address(self, name: str, place: int) -> bool:
        self._places[name] = place
        return True

    def execute_async_v3(self, stream: int) -> bool:
        engine = self._engine
        given = [self._at(name, like).clone() for name, like in engine.inputs.items()]
        results = engine.compute(given)
        for (name, like), value in zip(engine.outputs.items(), results, strict=True):
            self._at(name, like).copy_(value)
        return True

    def _at(self, name: str, like: Tensor) -> Tensor:
        size = max(1, like.numel() * like.element_size())
        memory = (ctypes.c_char * size).from_address(self._places[name])
        return torch.frombuffer(memory, dtype=like.dtype, count=like.numel()).view(like.shape)


class CudaEngine:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._names = [*engine.inputs, *engine.outputs]
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name in self._engine.inputs else Mode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple({**self._engine.inputs, **self._engine.outputs}[name].shape)

    def get_tensor_dtype(self, name: str) -> Any:
        dtype = {**self._engine.inputs, **self._engine.outputs}[name].dtype
        return SimpleNamespace(name=next(k for k, v in DTYPES.items() if v == dtype))

    def create_execution_context(self) -> Context:
        return Context(self._engine)


class Runtime:
    def __init__(self, logger: Any) -> None:
        pass

    def deserialize_cuda_engine(self, data: bytes) -> CudaEngine | None:
        return CudaEngine(ENGINES[data]) if data in ENGINES else None


class Logger:
    WARNING = 2

    def __init__(self, severity: int) -> None:
        pass


class Network:
    def __init__(self) -> None:
        self._engine: Engine | None = None


class Config:
    def __init__(self) -> None:
        self._cleared: list[Any] = []
        self._limits: dict[Any, int] = {}
        self.builder_optimization_level = 3

    def clear_flag(self, flag: Any) -> None:
        self._cleared.append(flag)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self._limits[pool] = size


class Builder:
    last: Config

    def __init__(self, logger: Any) -> None:
        pass

    def create_network(self, flags: int) -> Network:
        assert flags == 1 << Flag.STRONGLY_TYPED.value
        return Network()

    def create_builder_config(self) -> Config:
        Builder.last = Config()
        return Builder.last

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        assert config._cleared == [BuilderFlag.TF32], "float32 is float32"
        return None if network._engine is None else serialized(network._engine)


class OnnxParser:
    errors: tuple[str, ...] = ()

    def __init__(self, network: Network, logger: Any) -> None:
        self._network, self.num_errors = network, len(self.errors)

    def parse_from_file(self, path: str) -> bool:
        self._network._engine = from_onnx(path)
        return not self.errors

    def get_error(self, index: int) -> str:
        return self.errors[index]


class Flag(Enum):
    STRONGLY_TYPED = 1

    def __int__(self) -> int:
        return int(self.value)


class BuilderFlag(Enum):
    TF32 = 0


class MemoryPoolType(Enum):
    WORKSPACE = 0


TRT = SimpleNamespace(
    __version__="11.0.0.114",
    Builder=Builder,
    BuilderFlag=BuilderFlag,
    Logger=Logger,
    MemoryPoolType=MemoryPoolType,
    NetworkDefinitionCreationFlag=Flag,
    OnnxParser=OnnxParser,
    Runtime=Runtime,
    TensorIOMode=Mode,
)


def from_onnx(path: str) -> Engine:
    """What TensorRT's parser would make of a model, run by ONNX Runtime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path)
    kinds = {"tensor(float)": torch.float32, "tensor(int64)": torch.int64}

    def example(x: Any) -> Tensor:
        return torch.empty(x.shape, dtype=kinds[x.type])

    given = {x.name: example(x) for x in session.get_inputs()}
    taken = {x.name: example(x) for x in session.get_outputs()}

    def compute(values: list[Tensor]) -> list[Tensor]:
        named = zip(given, (x.numpy() for x in values), strict=True)
        return [torch.from_numpy(x) for x in session.run(None, dict(named))]

    return Engine(compute, given, taken)


# -- a stand-in for torch_tensorrt ----------------------------------------------------------------


def signature(name: str) -> inspect.Signature:
    """Of a function, as the wheel has it."""
    kinds = {
        "positional": inspect.Parameter.POSITIONAL_OR_KEYWORD,
        "keyword": inspect.Parameter.KEYWORD_ONLY,
        "**": inspect.Parameter.VAR_KEYWORD,
    }
    return inspect.Signature(
        [
            inspect.Parameter(
                p["name"],
                kinds[p["kind"]],
                default=p.get("default", inspect.Parameter.empty),
            )
            for p in TABLE["functions"][name]
        ]
    )


def convert(*args: Any, **kwargs: Any) -> bytes:
    name = "torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine"
    given = signature(name).bind(*args, **kwargs).arguments
    assert "kwargs" not in given, "nothing goes to the parameter that takes anything"
    module = given["exported_program"].module()
    names = [n.target for n in module.graph.nodes if n.op == "placeholder"]
    examples = dict(zip(names, given["arg_inputs"], strict=True))
    with torch.no_grad():
        results = list(module(*given["arg_inputs"]))

    def compute(values: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(module(*values))

    return serialized(Engine(compute, examples, {f"output{i}": x for i, x in enumerate(results)}))


TORCH_TENSORRT = SimpleNamespace(
    __version__=load_table("torch_tensorrt")["version"],
    dynamo=SimpleNamespace(convert_exported_program_to_serialized_trt_engine=convert),
)


class Stream:
    """A stream of a GPU that computes at once."""

    cuda_stream = 7

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_stream(self, other: Any) -> None:
        pass


class HostTorch:
    """torch, but memory of a GPU is on the host."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *args: Any, device: Any, **kwargs: Any) -> Tensor:
        return torch.empty(*args, **kwargs)


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


@pytest.fixture(scope="module")
def optimized() -> Any:
    return toma_fx.optimize(model(), method="toma", min_tokens=1, weights_every=2)


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
    assert [p.kind for p in made.parity] == ["refresh", "reuse", "reweigh", "reuse"]
    assert max(p.relative for p in made.parity) < 1e-5
    assert verify_artifact(tmp_path / "a") == made
    assert sorted(made.files) == ["refresh.engine", "reuse.engine", "reweigh.engine"]
    assert made.device.arch == "sm_90"
    assert made.versions["tensorrt"] == "11.0.0.114"
    assert made.target.options["route"] == route


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

    def opened(changed: Any = made, device: torch.device = cuda) -> Any:
        return TensorRTTarget.open(tmp_path / "a", changed, device, {})

    opened()
    with pytest.raises(ArtifactError, match=r"versions\.tensorrt"):
        opened(replace(made, versions={**made.versions, "tensorrt": "10.0"}))
    with pytest.raises(ArtifactError, match=r"device\.arch"):
        opened(replace(made, device=replace(made.device, arch="sm_80")))
    with pytest.raises(ArtifactError, match=r"device\.type"):
        opened(device=torch.device("cpu"))
    with pytest.raises(UnknownNameError, match="no options"):
        TensorRTTarget.open(tmp_path / "a", made, cuda, {"threads": 2})
    (spec,) = made.outputs
    with pytest.raises(ArtifactError, match="output0"):
        opened(replace(made, outputs=(replace(spec, dtype="float16"),)))
    with pytest.raises(ArtifactError, match="none called"):
        opened(replace(made, target=replace(made.target, options={"route": "onnx"})))
    (tmp_path / "a" / "reuse.engine").write_bytes(b"of another version")
    with pytest.raises(ArtifactError, match="can't read it"):
        opened()


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

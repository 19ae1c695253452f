"""A stand-in for TensorRT and Torch-TensorRT: it has nothing but what the published wheels have
(`tests/data/signatures.json`), and runs each "engine" in this process."""

from __future__ import annotations

import ctypes
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.examples import ROOT
from toma_fx.export.to_tensorrt.coverage import load_table

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

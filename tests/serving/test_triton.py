"""Model folders of Triton: what a build writes, and its model.py in a stand-in of the back end.

Triton itself is not run here. `config.pbtxt` is held to the published protobuf where it is.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import toma_fx
from tests.cli.conftest import build, model_folder
from tests.serving import triton_stand_in as triton
from toma_fx.cli.main import main
from toma_fx.cli.run import arguments_for
from toma_fx.errors import (
    ArtifactError,
    BuildError,
    ConfigError,
    MissingPackageError,
    UnknownNameError,
)
from toma_fx.export.manifest import TensorSpec
from toma_fx.export.reading import read_manifest
from toma_fx.export.to_onnx.target import ONNXTarget
from toma_fx.export.to_triton.config import config_text
from toma_fx.export.to_triton.target import TritonTarget
from toma_fx.run.batching import State

__all__ = ["model_folder"]  # the fixture

STEPS = 6
CONFIG = json.dumps({"sequence_batching": {"oldest": {"max_candidate_sequences": 2}}})


@pytest.fixture(scope="module")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "flux"
    options = ("--engine", "onnx", "--sequences", 2, "--method", "toma")
    assert build("--model", model_folder, "--target", "triton", *options, "--out", out) == 0
    return out


@pytest.fixture
def instance(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    triton.put_in(monkeypatch)
    return triton.start(folder, CONFIG)


def inputs(folder: Path, seed: int, step: int) -> dict[str, Tensor]:
    """Inputs of a step by their names; requests differ in their pictures, which are their own."""
    manifest = read_manifest(folder).calls[0]
    call = arguments_for(manifest, {})
    tensors = {spec.tensor.name: call[spec.path[0]] for spec in manifest.inputs}
    g = torch.Generator().manual_seed(100 * seed + step)
    first = torch.randn(
        tensors["hidden_states"].shape, generator=torch.Generator().manual_seed(seed)
    )
    noise = torch.randn(first.shape, generator=g)
    timestep = torch.full_like(tensors["timestep"], 1 - step / STEPS)
    return tensors | {"hidden_states": first + 0.1 * noise, "timestep": timestep}


def alone(folder: Path, seed: int) -> list[Tensor]:
    """What the artifact computes of a request by itself."""
    denoiser, state, outputs = toma_fx.load(folder), State(), []
    for step in range(STEPS):
        call = {**inputs(folder, seed, step), "return_dict": False}
        output, state = denoiser.step(call, state)
        outputs.append(output[0])
    return outputs


def step(folder: Path, sequence: int, number: int) -> triton.InferenceRequest:
    """A step of a sequence whose seed is its number."""
    first, last = number == 0, number == STEPS - 1
    return triton.request(sequence, inputs(folder, sequence, number), start=first, end=last)


def output(response: triton.InferenceResponse) -> Tensor:
    assert not response.has_error(), response.error().message()  # type: ignore[union-attr]
    (tensor,) = response.output_tensors()
    assert tensor.name() == "output_0"
    return torch.from_numpy(tensor.as_numpy())


def interleaved(folder: Path, instance: Any, swap_before: int = -1) -> dict[int, list[Tensor]]:
    """Outputs of two sequences, the second of which begins two steps later."""
    outputs: dict[int, list[Tensor]] = {1: [], 2: []}
    for time in range(STEPS + 2):
        if time == swap_before:
            states = instance._states
            states[1], states[2] = states[2], states[1]
        due = [(1, time), (2, time - 2)]
        requests = [step(folder, s, n) for s, n in due if 0 <= n < STEPS]
        numbers = [s for s, n in due if 0 <= n < STEPS]
        for sequence, response in zip(numbers, triton.run(instance, requests), strict=True):
            outputs[sequence].append(output(response))
    return outputs


def test_interleaved_sequences_equal_each_alone(folder: Path, instance: Any) -> None:
    outputs = interleaved(folder, instance)
    for sequence, got in outputs.items():
        want = alone(folder, sequence)
        for a, b in zip(got, want, strict=True):
            assert (a - b).abs().max() <= 1e-5
    assert instance.sequences == (), "the last step of each ended it"


def test_swapped_states_are_noticed(folder: Path, instance: Any) -> None:
    got, want = interleaved(folder, instance, swap_before=4), alone(folder, 1)
    assert max((a - b).abs().max() for a, b in zip(got[1], want, strict=True)) > 1e-3


def test_a_step_of_a_sequence_that_has_not_begun_fails_alone(folder: Path, instance: Any) -> None:
    requests = [step(folder, 1, 0), step(folder, 2, 1)]
    good, bad = triton.run(instance, requests)
    assert (output(good) - alone(folder, 1)[0]).abs().max() <= 1e-5
    error = bad.error()
    assert error is not None
    assert error.code() == triton.TritonError.INVALID_ARG
    assert "StateError: a step of a sequence that has not begun" in error.message()
    assert instance.sequences == (1,)
    # after its end, too
    for number in range(1, STEPS):
        (last,) = triton.run(instance, [step(folder, 1, number)])
    output(last)
    (gone,) = triton.run(instance, [step(folder, 1, 3)])
    assert "has not begun" in gone.error().message()  # type: ignore[union-attr]


def test_a_bad_step_leaves_its_sequence_where_it_was(folder: Path, instance: Any) -> None:
    want = alone(folder, 1)
    triton.run(instance, [step(folder, 1, 0)])
    wrong = inputs(folder, 1, 1)
    short = wrong | {"hidden_states": wrong["hidden_states"][:, :-1]}
    lacking = {name: x for name, x in wrong.items() if name != "txt_ids"}
    for tensors, words in ((short, "hidden_states"), (lacking, "txt_ids")):
        (bad,) = triton.run(instance, [triton.request(1, tensors)])
        assert f"SignatureError: {'the call' if tensors is short else 'a request'}" in (
            bad.error().message()  # type: ignore[union-attr]
        )
        assert words in bad.error().message()  # type: ignore[union-attr]
    (none,) = triton.run(instance, [triton.request(1, wrong, ready=False)])
    assert none.has_error()
    (good,) = triton.run(instance, [step(folder, 1, 1)])
    assert (output(good) - want[1]).abs().max() <= 1e-5
    (bad,) = triton.run(instance, [triton.request(1, short, end=True)])
    assert bad.has_error()
    assert instance.sequences == (), "END ends it whatever came of the step"


def test_what_was_abandoned_makes_room(folder: Path, instance: Any) -> None:
    """Triton never has three sequences here, so that one of them is one whose client has left."""
    triton.run(instance, [step(folder, 1, 0), step(folder, 2, 0)])
    triton.run(instance, [step(folder, 1, 1)])
    triton.run(instance, [step(folder, 3, 0)])
    assert instance.sequences == (1, 3)
    triton.run(instance, [step(folder, 3, 0)])
    assert instance.sequences == (1, 3), "one that begins anew takes its own place"
    instance.finalize()
    assert instance.sequences == ()


def test_an_error_that_nobody_foresaw_fails_its_step(
    folder: Path, instance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(instance.denoiser), "step", fail)
        (bad,) = triton.run(instance, [step(folder, 1, 0)])
    assert bad.error().code() == triton.TritonError.INTERNAL  # type: ignore[union-attr]
    (good,) = triton.run(instance, [triton.request(1, inputs(folder, 1, 0))])
    output(good)


def test_with_compiled_programs(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default engine, by its files and its steps."""
    out = tmp_path / "flux"
    options = ("--sequences", 2, "--method", "toma")
    assert build("--model", model_folder, "--target", "triton", *options, "--out", out) == 0
    assert {"programs.pt2", "config.pbtxt", "1/model.py"} < set(read_manifest(out).files)
    triton.put_in(monkeypatch)
    instance = triton.start(out, CONFIG)
    outputs = interleaved(out, instance)
    for sequence, got in outputs.items():
        for a, b in zip(got, alone(out, sequence), strict=True):
            assert (a - b).abs().max() <= 1e-5


def test_outside_triton(folder: Path) -> None:
    with pytest.raises(MissingPackageError, match="tritonserver"):
        triton.start(folder, CONFIG)


# -- what is written ------------------------------------------------------------------------------

TEXT = """\
backend: "python"
max_batch_size: 0
input [
  { name: "x" data_type: TYPE_BF16 dims: [2, 4] },
  { name: "t" data_type: TYPE_FP32 dims: [1] },
  { name: "steps" data_type: TYPE_INT32 dims: [ 1 ] optional: true }
]
output [
  { name: "output_0" data_type: TYPE_BF16 dims: [2, 4] }
]
sequence_batching {
  max_sequence_idle_microseconds: 7000000
  control_input [
    { name: "START" control [ { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } ] },
    { name: "END" control [ { kind: CONTROL_SEQUENCE_END int32_false_true: [ 0, 1 ] } ] },
    { name: "READY" control [ { kind: CONTROL_SEQUENCE_READY int32_false_true: [ 0, 1 ] } ] },
    { name: "CORRID" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } ] }
  ]
  oldest { max_candidate_sequences: 3 }
}
instance_group [ { count: 2 kind: KIND_GPU } ]
parameters { key: "FORCE_CPU_ONLY_INPUT_TENSORS" value { string_value: "no" } }
"""


def example_text(device: str) -> str:
    x, t = TensorSpec("x", (2, 4), "bfloat16"), TensorSpec("t", (), "float32")
    y = TensorSpec("output_0", (2, 4), "bfloat16")
    return config_text([x, t], [y], device=device, sequences=3, instances=2, idle_seconds=7)


def test_the_text_of_a_configuration() -> None:
    assert example_text("cuda") == TEXT
    assert example_text("cpu") == TEXT.replace("KIND_GPU", "KIND_CPU").partition("parameters")[0]


def published() -> Any:
    """model_config_pb2 of the tritonclient wheel, without its package, which imports grpc."""
    pytest.importorskip("google.protobuf")
    spec = importlib.util.find_spec("tritonclient")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("tritonclient is not installed, which has the published protobuf")
    path = Path(spec.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_is_one_of_the_published_protobuf(folder: Path) -> None:
    messages = published()
    from google.protobuf import json_format, text_format

    text_format.Parse(TEXT, messages.ModelConfig())
    config = text_format.Parse((folder / "config.pbtxt").read_text(), messages.ModelConfig())
    manifest = read_manifest(folder).calls[0]
    got = {x.name: (tuple(x.dims), x.data_type) for x in config.input if not x.optional}
    kinds = {"float32": messages.TYPE_FP32, "int64": messages.TYPE_INT64}
    specs = [spec.tensor for spec in manifest.inputs]
    assert got == {s.name: (s.shape or (1,), kinds[s.dtype]) for s in specs}
    assert [(x.name, tuple(x.dims)) for x in config.output] == [
        (spec.name, spec.shape) for spec in manifest.outputs
    ]
    (steps,) = (x for x in config.input if x.optional)
    assert (steps.name, steps.data_type) == ("steps", messages.TYPE_INT32)
    assert (config.backend, config.max_batch_size, config.name) == ("python", 0, "")
    batching = config.sequence_batching
    control = messages.ModelSequenceBatching.Control
    found = {each.name: each.control[0].kind for each in batching.control_input}
    assert found == {
        "START": control.CONTROL_SEQUENCE_START, "END": control.CONTROL_SEQUENCE_END,
        "READY": control.CONTROL_SEQUENCE_READY, "CORRID": control.CONTROL_SEQUENCE_CORRID,
    }  # fmt: skip
    assert batching.max_sequence_idle_microseconds == 60_000_000
    assert config.instance_group[0].kind == messages.ModelInstanceGroup.KIND_CPU
    # what an instance reads of it
    plain = json_format.MessageToDict(config, preserving_proto_field_name=True)
    assert plain["sequence_batching"]["oldest"] == json.loads(CONFIG)["sequence_batching"]["oldest"]
    with pytest.raises(text_format.ParseError):
        text_format.Parse(TEXT.replace("TYPE_BF16", "TYPE_BFLOAT16"), messages.ModelConfig())


def test_the_folder_is_an_artifact(
    folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["verify", str(folder)]) == 0
    assert main(["info", str(folder)]) == 0
    assert "triton, engine onnx, form cached" in " ".join(capsys.readouterr().out.split())
    assert {"config.pbtxt", "1/model.py"} < set(read_manifest(folder).files)
    toma_fx.load(folder).save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy/1/model.py").read_text() == (folder / "1/model.py").read_text()
    (tmp_path / "copy/1/model.py").write_text("other code")
    with pytest.raises(ArtifactError, match=r"model\.py"):
        toma_fx.load(tmp_path / "copy")


@pytest.mark.parametrize("file", ["1/__pycache__/model.cpython-311.pyc", "1/notes.txt"])
def test_what_python_left_is_no_reason_to_keep_an_artifact(
    folder: Path, tmp_path: Path, file: str
) -> None:
    from toma_fx.export.destination import check_output

    toma_fx.load(folder).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / file).parent.mkdir(exist_ok=True)
    (tmp_path / "a" / file).write_bytes(b"")
    if file.endswith(".pyc"):
        check_output(tmp_path / "a", overwrite=True)
    else:
        with pytest.raises(BuildError, match="other files"):
            check_output(tmp_path / "a", overwrite=True)


def test_bad_options() -> None:
    with pytest.raises(UnknownNameError, match="nearest: onnx"):
        TritonTarget(engine="onxx")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="nearest: opset"):
        TritonTarget(engine="onnx", options=(("opste", 20),))
    assert TritonTarget(engine="onnx", options=(("opset", 20),)).inner == ONNXTarget(opset=20)
    for name in ("sequences", "instances", "idle_seconds"):
        with pytest.raises(ConfigError, match=f"{name} is out of range"):
            TritonTarget(**{name: 0})


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"START": torch.zeros(1)}, "the name of one that tells Triton"),
        ({"steps": torch.zeros(1)}, "the name of one that tells Triton"),
        ({"x": torch.zeros(1, dtype=torch.complex64)}, "no such dtype"),
    ],
)
def test_models_that_triton_can_not_have(
    inputs: dict[str, Tensor], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ONNXTarget, "check", lambda self, programs: None)
    programs: Any = SimpleNamespace(inputs=inputs, outputs={})
    with pytest.raises(BuildError, match=words):
        TritonTarget(engine="onnx").check(programs)


def test_an_artifact_of_an_engine_that_is_not_known() -> None:
    target = SimpleNamespace(options={"engine": "own"})
    artifact: Any = SimpleNamespace(manifest=SimpleNamespace(target=target))
    with pytest.raises(ArtifactError, match="unknown engine"):
        TritonTarget.open(artifact, torch.device("cpu"), {})

"""The frame of artifacts (folder, manifest, build, loader), with a target that runs in process."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import toma_fx
from tests import denoisers
from tests.denoisers import relative
from tests.examples import ROOT, load_example
from tests.methods.test_methods import inputs, model
from toma_fx.errors import ArtifactError, BuildError, ModelTypeError, SignatureError
from toma_fx.export import artifact, builder
from toma_fx.export.artifact import Build, Stage, verify_artifact
from toma_fx.export.builder import export
from toma_fx.export.denoiser import ArtifactDenoiser
from toma_fx.export.loader import load
from toma_fx.export.manifest import Device, Manifest, ProgramSpec, TargetSpec
from toma_fx.export.programs import Programs
from toma_fx.export.targets import Lowered, Runtime, Target
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


class InProcess(Target):
    """Writes a line for each program and runs the exported programs; `error` scales outputs."""

    name = "in-process"

    def __init__(self, error: float = 0.0) -> None:
        self.error, self.made = error, list[str]()
        self.fail_at = ""

    def __repr__(self) -> str:
        return "InProcess"

    def check_installed(self) -> None:
        pass

    def check(self, programs: Programs) -> None:
        self.programs = programs

    def lower(self, programs: Programs, build: Build) -> Lowered:
        specs = {}
        for call, made in programs.items():
            file = f"{call}.txt"

            def write(folder: Path, file: str = file) -> None:
                if file == self.fail_at:
                    raise KeyboardInterrupt
                self.made.append(file)
                (folder / file).write_text(file)

            build.stage(call, write, file)
            specs[call] = ProgramSpec(file, call, made.takes, made.gives, made.instead)
        return Lowered(TargetSpec("in-process", {}), Device("cpu", "", ""), specs, {})

    def open(  # type: ignore[override]  # of an instance: it knows the programs
        self, folder: Path, manifest: Manifest, device: torch.device, options: Mapping[str, Any]
    ) -> Runtime:
        target = self

        class Run(Runtime):
            def run(self, call: Any, inputs: Any, patterns: Any) -> Any:
                return target.step(call, inputs, patterns)

        return Run()

    def step(self, call: Any, inputs: Sequence[Tensor], patterns: Mapping[str, Tensor]) -> Any:
        outputs, made = self.programs.run(call, inputs, patterns)
        return [x * (1 + self.error) for x in outputs], made


@pytest.fixture(scope="module")
def optimized() -> Any:
    return toma_fx.optimize(model(), method="toma", min_tokens=1, weights_every=2)


@pytest.fixture
def target() -> InProcess:
    return InProcess()


def opened(target: InProcess, folder: Path) -> ArtifactDenoiser:
    manifest, device = verify_artifact(folder), torch.device("cpu")
    return ArtifactDenoiser(manifest, target.open(folder, manifest, device, {}), device)


# -- build and run --------------------------------------------------------------------------------


@torch.no_grad()
def test_steps_of_generations(tmp_path: Path, optimized: Any, target: InProcess) -> None:
    """The same programs at the same steps as in process, over two generations."""
    manifest = export(optimized, inputs(), tmp_path / "a", target)
    assert set(manifest.programs) == {"refresh", "reweigh", "reuse"}
    assert [p.kind for p in manifest.parity] == ["refresh", "reuse", "reweigh", "reuse"]
    assert all(p.relative <= p.tolerance for p in manifest.parity)
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
    assert list(made.programs) == ["plain"]
    assert made.kinds(3) == ["plain"] * 3
    assert {p.kind for p in made.parity} == {"plain"}
    with torch.no_grad():
        got = opened(target, tmp_path / "a")(**inputs())
        assert torch.equal(got, plain(**inputs()))


def test_manifest_reads_back(tmp_path: Path, optimized: Any, target: InProcess) -> None:
    manifest = export(optimized, inputs(), tmp_path / "a", target, license="mine")
    assert verify_artifact(tmp_path / "a") == manifest
    assert manifest.license == "mine"
    assert {s.tensor.name: s.tensor.shape for s in manifest.inputs} == {
        "sample": (2, 4, 16, 24), "timestep": (2,)
    }  # fmt: skip
    assert set(manifest.files) == {"refresh.txt", "reweigh.txt", "reuse.txt"}


def test_nested_inputs_constants_and_structure(tmp_path: Path, target: InProcess) -> None:
    unet = toma_fx.optimize(denoisers.sdxl(**ONE_BLOCK), min_tokens=60)
    call = {**denoisers.sdxl_inputs(), "return_dict": True}
    manifest = export(unet, call, tmp_path / "a", target)
    assert "added_cond_kwargs_time_ids" in {s.tensor.name for s in manifest.inputs}
    assert [(c.path, c.value) for c in manifest.constants] == [(("return_dict",), True)]
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
        assert due(schedule, step) == due(config, step)


# -- all or nothing -------------------------------------------------------------------------------


def test_wrong_programs_are_never_published(tmp_path: Path, optimized: Any) -> None:
    with pytest.raises(BuildError, match="does not compute"):
        export(optimized, inputs(), tmp_path / "a", InProcess(error=0.01))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_goes_on(tmp_path: Path, optimized: Any, target: InProcess) -> None:
    target.fail_at = "reuse.txt"
    with pytest.raises(KeyboardInterrupt):
        export(optimized, inputs(), tmp_path / "a", target)
    assert not (tmp_path / "a").exists()
    assert target.made == ["refresh.txt", "reweigh.txt"]
    target.fail_at, said = "", list[Stage]()
    export(optimized, inputs(), tmp_path / "a", target, report=said.append)
    assert target.made == ["refresh.txt", "reweigh.txt", "reuse.txt"], "nothing is made twice"
    assert [(s.name, s.state) for s in said] == [
        ("export", "begun"),
        ("export", "done"),
        ("refresh", "kept"),
        ("reweigh", "kept"),
        ("reuse", "begun"),
        ("reuse", "done"),
        ("compare with the process", "begun"),
        ("compare with the process", "done"),
    ]
    assert [s.size for s in said if s.name == "reuse"] == [0, len("reuse.txt")]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_build_of_something_else_starts_anew(
    tmp_path: Path, optimized: Any, target: InProcess
) -> None:
    target.fail_at = "reuse.txt"
    with pytest.raises(KeyboardInterrupt):
        export(optimized, inputs(), tmp_path / "a", target)
    target.fail_at = ""
    other = toma_fx.optimize(model(), min_tokens=1, ratio=0.25, weights_every=2)
    export(other, inputs(), tmp_path / "a", target)
    assert target.made.count("refresh.txt") == 2


def test_a_build_by_other_code_starts_anew(
    tmp_path: Path, optimized: Any, target: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text("x = 1")
    first = builder.source_digest(tmp_path / "package")
    (tmp_path / "package" / "a.py").write_text("x = 2")
    assert first != builder.source_digest(tmp_path / "package")
    target.fail_at = "reuse.txt"
    with pytest.raises(KeyboardInterrupt):
        export(optimized, inputs(), tmp_path / "a", target)
    target.fail_at = ""
    monkeypatch.setattr(builder, "source_digest", lambda: "edited")
    export(optimized, inputs(), tmp_path / "a", target)
    assert target.made.count("refresh.txt") == 2


def test_an_artifact_is_replaced_only_by_a_finished_one(
    tmp_path: Path, optimized: Any, target: InProcess
) -> None:
    out = tmp_path / "a"
    first = export(optimized, inputs(), out, target)
    with pytest.raises(BuildError, match="not empty"):
        export(optimized, inputs(), out, target)
    target.fail_at = "reuse.txt"
    with pytest.raises(KeyboardInterrupt):
        export(optimized, inputs(), out, target, overwrite=True)
    assert verify_artifact(out) == first
    target.fail_at = ""
    second = export(optimized, inputs(), out, target, overwrite=True, license="new")
    assert verify_artifact(out) == second
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_folders_of_others_are_left_alone(
    tmp_path: Path, optimized: Any, target: InProcess
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("all my work")
    (tmp_path / "b").write_text("a file")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "manifest.json").write_text('{"name": "a web site"}')
    export(optimized, inputs(), tmp_path / "d", target)
    (tmp_path / "d" / "notes.txt").write_text("beside an artifact")
    for name in "abcd":
        with pytest.raises(BuildError):
            export(optimized, inputs(), tmp_path / name, target, overwrite=True)
    assert (tmp_path / "a" / "thesis.tex").read_text() == "all my work"
    assert (tmp_path / "d" / "notes.txt").exists()


def test_a_full_disk(
    tmp_path: Path, optimized: Any, target: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    first = export(optimized, inputs(), tmp_path / "a", target)
    monkeypatch.setattr(artifact, "_write", full)
    with pytest.raises(BuildError, match="No space left"):
        export(optimized, inputs(), tmp_path / "a", target, overwrite=True)
    assert verify_artifact(tmp_path / "a") == first


def test_a_folder_that_cannot_be_written(optimized: Any, target: InProcess) -> None:
    with pytest.raises(BuildError, match="can't be written"):
        export(optimized, inputs(), "/proc/artifact", target)


def test_only_optimized_models_are_built(tmp_path: Path, target: InProcess) -> None:
    with pytest.raises(ModelTypeError):
        export(model(), inputs(), tmp_path / "a", target)


def test_the_published_schema(tmp_path: Path, optimized: Any, target: InProcess) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    written = load_example("write_schema", "tools")
    assert written.PATH.read_text() == written.text(), "python tools/write_schema.py"
    assert '"export/*.json"' in (ROOT / "pyproject.toml").read_text(), "it is in the package"
    export(optimized, inputs(), tmp_path / "a", target)
    data = json.loads((tmp_path / "a" / "manifest.json").read_text())
    check = jsonschema.Draft202012Validator(json.loads(written.text())).validate
    check(data)
    for wrong in ({"version": 3}, {"files": {"a": 3}}, {"schedule": {}}, {"more": 1}):
        with pytest.raises(jsonschema.ValidationError):
            check({**data, **wrong})


# -- damage ---------------------------------------------------------------------------------------


TARGET = {"name": "zip", "options": {}}


def linked(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def edited(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


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
        (lambda a: edited(a, {"surprise": 1}), "the fields"),
        (lambda a: edited(a, {"inputs": [{"path": "x"}]}), "inputs"),
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
    with pytest.raises(ArtifactError, match="device"):
        load(tmp_path / "a", device="meta")


# -- choices that hang on rounding ----------------------------------------------------------------


class Weighing(InProcess):
    """Gives other weights than the process, and computes with them."""

    def step(self, call: Any, inputs: Sequence[Tensor], patterns: Mapping[str, Tensor]) -> Any:
        outputs, made = self.programs.run(call, inputs, patterns)
        if made:
            made = {n: 1.2 * x if x.is_floating_point() else x for n, x in made.items()}
            outputs, _ = self.programs.run("reuse", inputs, {**patterns, **made})
        return outputs, made


def test_wrong_weights_are_a_fault(tmp_path: Path, optimized: Any) -> None:
    with pytest.raises(BuildError, match="merged alike"):
        export(optimized, inputs(), tmp_path / "a", Weighing())


class Choosing(InProcess):
    """Keeps in some windows one token that the process merges away."""

    def __init__(self, windows: int) -> None:
        super().__init__()
        self.windows = windows

    def step(self, call: Any, inputs: Sequence[Tensor], patterns: Mapping[str, Tensor]) -> Any:
        outputs, made = self.programs.run(call, inputs, patterns)
        if call != "refresh":
            return outputs, made
        ((name, idx),) = ((n, x.clone()) for n, x in made.items() if n.endswith("idx"))
        every = torch.arange(made[name.replace("idx", "merge")].shape[-1])
        for row in idx.flatten(0, 1)[: self.windows]:
            row[0] = every[~torch.isin(every, row)][0]
        outputs, weights = self.programs.run("reweigh", inputs, {**made, name: idx})
        return outputs, {name: idx, **weights}


def test_choices_that_hang_on_rounding_are_no_fault(tmp_path: Path, optimized: Any) -> None:
    made = export(optimized, inputs(), tmp_path / "a", Choosing(1))
    assert 0.95 < made.parity[0].alike < 1 == made.parity[1].alike
    with pytest.raises(BuildError, match="merged alike"):
        export(optimized, inputs(), tmp_path / "b", Choosing(1000))

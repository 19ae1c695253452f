"""Artifacts of several calls: each call runs what was made for its shapes, and no other knows."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import toma_fx
from tests import denoisers
from tests.denoisers import relative
from tests.export.conftest import export_once
from tests.export.edited import edit
from tests.export.in_process import InProcess, opened
from toma_fx import State
from toma_fx.errors import ArtifactError, BuildError, ConfigError, SignatureError, StateError
from toma_fx.export import builder
from toma_fx.export.builder import export
from toma_fx.export.reading import verify_artifact
from toma_fx.run.calls import calls_of
from toma_fx.serving.batcher import StepBatcher

pytestmark = pytest.mark.usefixtures("exported_once")

SIZES = ((4, 6), (6, 4), (6, 8))
"""Rows and columns of tokens: the first two have as many, in calls of the same shapes."""
NAMES = ("6x4", "4x6", "8x6")


@cache
def flux() -> Any:
    network = denoisers.flux(num_layers=1, num_single_layers=0)
    return toma_fx.optimize(
        network, method="grid", min_tokens=1, destinations_every=3, weights_every=3
    )


def call(size: tuple[int, int], step: int = 0, seed: int = 1, batch: int = 1) -> dict[str, Any]:
    """A step of a generation: its text stays."""
    text = denoisers.flux_inputs(*size, batch=batch, seed=seed, timestep=0.9 - 0.1 * step)
    picture = denoisers.flux_inputs(*size, batch=batch, seed=100 + step)["hidden_states"]
    return {**text, "hidden_states": picture}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[InProcess, Path]:
    """An artifact of all sizes, and its target, which runs it."""
    target, folder = InProcess(), tmp_path_factory.mktemp("sizes") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "export_programs", export_once)
        export(flux(), [call(size) for size in SIZES], folder, target, names=NAMES)
    return target, folder


@pytest.fixture
def loaded(built: tuple[InProcess, Path]) -> Any:
    return opened(*built)


def alone(size: tuple[int, int], seed: int = 1, steps: int = 4) -> list[Tensor]:
    """What the process computes of a generation by itself."""
    with torch.no_grad(), flux().own_state():
        return [flux()(**call(size, step, seed))[0] for step in range(steps)]


def test_what_the_manifest_says(loaded: Any) -> None:
    manifest = loaded.manifest
    assert [each.name for each in manifest.calls] == list(NAMES)
    assert [each.kinds(4) for each in manifest.calls] == [
        ["refresh", "reuse", "reuse", "refresh"]
    ] * 3
    assert set(manifest.files) == {f"{n}_{k}.txt" for n in NAMES for k in ("refresh", "reuse")}
    assert all(each.parity for each in manifest.calls)


@torch.no_grad()
def test_generations_of_all_sizes_at_once(loaded: Any) -> None:
    """Those of the same shapes in states of their own, the third beside one of them."""
    want = {size: alone(size) for size in SIZES}
    assert not torch.equal(want[SIZES[0]][1], want[SIZES[1]][1])
    first, second = loaded.own_state(), loaded.own_state()
    for step in range(4):
        for state, sizes in ((first, SIZES[::2]), (second, SIZES[1:2])):
            with state:
                for size in sizes:
                    assert torch.equal(loaded(**call(size, step))[0], want[size][step])


@torch.no_grad()
def test_generations_that_are_told(loaded: Any) -> None:
    for size in SIZES:
        with loaded.generation(steps=4) as run:
            for step, want in enumerate(alone(size)):
                run.step(step)
                assert torch.equal(loaded(**call(size, step))[0], want)


@torch.no_grad()
def test_states_belong_to_their_size(loaded: Any) -> None:
    want = {size: alone(size) for size in SIZES}
    states = dict.fromkeys(SIZES, State())
    for step in range(4):
        for size in SIZES:
            outputs, states[size] = loaded.step(call(size, step), states[size])
            assert torch.equal(outputs[0], want[size][step])
            assert loaded.due(states[size]) == ("reuse", "reuse", "refresh", "reuse")[step]
    for size, other in ((SIZES[0], SIZES[1]), (SIZES[0], SIZES[2])):
        with pytest.raises(StateError, match="another call"):
            loaded.step(call(size), states[other])


@pytest.mark.parametrize(
    ("size", "where", "expected"),
    [
        ((6, 7), "hidden_states", "(1, 48, 4)"),  # nearer to 6x8
        ((4, 5), "hidden_states", "(1, 24, 4)"),
        ((3, 8), "img_ids", "positions of a grid ((4,), 6, 0, 0) or ((6,), 4, 0, 0)"),
    ],
)
def test_another_size_is_refused(
    loaded: Any, size: tuple[int, int], where: str, expected: str
) -> None:
    with pytest.raises(SignatureError) as caught, torch.no_grad():
        loaded(**call(size))
    assert caught.value.where == where
    assert caught.value.expected.startswith(expected)
    assert caught.value.hint == (
        "the artifact is for 6x4: hidden_states [1, 24, 4], img_ids of 4x6; "
        "4x6: hidden_states [1, 24, 4], img_ids of 6x4; "
        "8x6: hidden_states [1, 48, 4], img_ids of 6x8"
    )


def test_an_interrupted_build_makes_what_is_missing(tmp_path: Path, target: InProcess) -> None:
    calls = [call(size) for size in SIZES[1:]]
    target.fail_at = "8x6_reuse.txt"
    with pytest.raises(KeyboardInterrupt):
        export(flux(), calls, tmp_path / "a", target, names=NAMES[1:])
    target.fail_at, before = "", list(target.made)
    made = export(flux(), calls, tmp_path / "a", target, names=NAMES[1:])
    assert before == ["4x6_refresh.txt", "4x6_reuse.txt", "8x6_refresh.txt"]
    assert target.made == [*before, "8x6_reuse.txt"]
    assert verify_artifact(tmp_path / "a") == made


def test_every_call_is_compared(tmp_path: Path) -> None:
    class Wrong(InProcess):
        def step(self, kind: Any, inputs: Any, kept: Any) -> Any:
            self.error = 0.01 if self.programs is self.calls[-1] else 0.0
            return super().step(kind, inputs, kept)

    with pytest.raises(BuildError, match="8x6_refresh"):
        export(flux(), [call(s) for s in SIZES[1:]], tmp_path / "a", Wrong(), names=NAMES[1:])
    assert list(tmp_path.iterdir()) == []


# -- calls that differ in something else ----------------------------------------------------------


@torch.no_grad()
def test_batches_of_several_sizes(tmp_path: Path, target: InProcess) -> None:
    """A request's state goes from a batch of two to a batch of one and back."""
    export(flux(), [call(SIZES[1]), call(SIZES[1], batch=2)], tmp_path / "a", target)
    loaded = opened(target, tmp_path / "a")
    batcher = StepBatcher(loaded, buckets=(1, 2))
    for seed in (1, 2):
        batcher.join(seed)
    want = {seed: alone(SIZES[1], seed) for seed in (1, 2)}
    for step, together in enumerate((True, False, True)):
        given = {seed: call(SIZES[1], step, seed) for seed in (1, 2)}
        results = batcher.step(given) if together else {}
        for seed, one in given.items():
            got = results.get(seed) or batcher.step({seed: one})[seed]
            assert relative(got.unwrap()[0], want[seed][step]) < 1e-5
    assert loaded._stepper.totals == {"refresh": 1, "reuse": 3}


@torch.no_grad()
def test_constants_choose(tmp_path: Path, target: InProcess) -> None:
    calls = [{**call(SIZES[0]), "return_dict": flag} for flag in (False, True)]
    plain = toma_fx.optimize(flux().denoiser, ratio=0)
    export(plain, calls, tmp_path / "a", target)
    loaded = opened(target, tmp_path / "a")
    results = [loaded(**each) for each in calls]
    assert isinstance(results[0], tuple)
    assert torch.equal(results[0][0], results[1].sample)
    with pytest.raises(SignatureError, match=r"call0: return_dict False; call1: return_dict True"):
        loaded(**{**calls[0], "return_dict": None})


def test_calls_that_are_alike(tmp_path: Path, target: InProcess) -> None:
    with pytest.raises(ConfigError, match="call0 and call1, which don't"):
        export(flux(), [call(SIZES[1]), call(SIZES[1], step=1)], tmp_path / "a", target)
    with pytest.raises(ConfigError, match="empty list"):
        export(flux(), [], tmp_path / "a", target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [["a"], ["a", "a"], ["a", "../b"], ["a", 5], ["a", "b_c"], "ab"])
def test_names_that_calls_can_not_have(tmp_path: Path, target: InProcess, names: Any) -> None:
    with pytest.raises(ConfigError, match="no names for the calls"):
        export(flux(), [call(SIZES[0]), call(SIZES[1])], tmp_path / "a", target, names=names)


def test_a_target_of_one_call(tmp_path: Path) -> None:
    """Refused before the model is looked at."""
    with pytest.raises(ConfigError, match=r"config\.pbtxt has one shape"):
        export(None, [call(SIZES[0]), call(SIZES[1])], tmp_path / "a", "triton")


def test_one_program_for_two_calls(tmp_path: Path, built: tuple[InProcess, Path]) -> None:
    shutil.copytree(built[1], tmp_path / "a")

    def change(data: Any) -> None:
        data["calls"][1]["programs"]["reuse"] |= data["calls"][0]["programs"]["reuse"]

    with pytest.raises(ArtifactError, match="each once"):
        verify_artifact(edit(tmp_path / "a", change))


def test_what_is_a_list_of_calls() -> None:
    x, named = torch.zeros(1), {"sample": torch.zeros(1)}
    assert calls_of([named, (x,), ((x,), named)]) == [named, (x,), ((x,), named)]
    for one in (named, (x, x), ((x,), named), [(x,), named], [x, x]):
        assert calls_of(one) == [one], "a call itself"

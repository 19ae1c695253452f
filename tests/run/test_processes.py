"""A state that goes to another process continues there, or a warning says why it does not."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

import toma_fx
from tests import denoisers
from tests.logs import logged
from tests.methods.test_methods import inputs, model
from toma_fx.capture.fingerprint import Fingerprint
from toma_fx.capture.guard import ModelGuard
from toma_fx.errors import SignatureError, StateError
from toma_fx.run.batching import ModelKey, State

OPTIONS: dict[str, Any] = {"method": "toma", "min_tokens": 1, "destinations_every": 4}


def steps(denoiser: Any, state: State, first: int, last: int) -> tuple[list[Tensor], State]:
    outputs = []
    for i in range(first, last):
        out, state = denoiser.step(inputs(seed=i, timestep=900.0 - 100 * i), state)
        outputs.append(out)
    return outputs, state


def fresh() -> Any:
    """The model as every process makes it; the one that tests share may have been changed."""
    return model.__wrapped__()


def optimized(module: Any = None) -> Any:
    return toma_fx.optimize(fresh() if module is None else module, **OPTIONS)


def weights_of_model() -> Any:
    changed = fresh()
    with torch.no_grad():
        next(changed.parameters()).mul_(1.001)
    return changed


def attribute_of_model() -> Any:
    changed: Any = fresh()
    changed.extra = 3
    return changed


class Received:
    """What another process made of a state."""

    def __init__(self, data: bytes, change: str) -> None:
        state = pickle.loads(data)
        make: Any = globals().get(f"{change}_of_model")
        denoiser = optimized(make() if make else None)
        options = {"ratio": 0.25} if change == "configuration" else {}
        self.step, self.outputs, self.error = state.step, [], ""
        with logged(logging.WARNING) as self.warnings:
            try:
                with denoiser.using(**options):
                    self.outputs, _ = steps(denoiser, state, state.step, state.step + 3)
            except StateError as error:
                self.error = str(error)
        self.kinds = dict(denoiser.totals)


CASES = ("", "weights", "attribute", "configuration")


def receive(folder: Path) -> None:
    """In the other process."""
    torch.set_num_threads(1)
    with torch.no_grad():
        results = [Received((folder / "state").read_bytes(), change) for change in CASES]
        results.append(Received((folder / "late").read_bytes(), ""))
    (folder / "results").write_bytes(pickle.dumps(results))


@torch.no_grad()
def test_a_state_in_another_process(tmp_path: Path) -> None:
    denoiser = optimized()
    state = steps(denoiser, State(), 0, 2)[1]
    assert state.kept
    (tmp_path / "state").write_bytes(pickle.dumps(state))
    want = steps(denoiser, state, 2, 5)[0]
    gone = ModelKey(ModelGuard(fresh()), state.model.environment, state.model.plan)
    (tmp_path / "late").write_bytes(pickle.dumps(replace(state, model=gone)))
    process = multiprocessing.get_context("spawn").Process(target=receive, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    same, weights, attribute, configuration, unknown = pickle.loads(
        (tmp_path / "results").read_bytes()
    )
    assert same.step == 2
    for a, b in zip(same.outputs, want, strict=True):  # other processes may round otherwise
        assert denoisers.relative(a, b) < 1e-5
    assert same.kinds == {"reuse": 2, "refresh": 1}, "the schedule goes on"
    assert same.warnings == []
    for received, reason in ((weights, "in weights"), (attribute, "in modules, attributes")):
        assert "the state was made by another model" in received.error
        assert f"the models differ {reason}" in received.error
        assert not received.kinds
    assert "the state was made under another configuration" in configuration.error
    assert not configuration.kinds
    assert unknown.kinds == {"refresh": 2, "reuse": 1}, "it selects anew"
    (warning,) = unknown.warnings
    assert "had changed, or was gone" in warning
    assert "step 2" in warning


@torch.no_grad()
def test_in_its_own_process() -> None:
    """Pickles continue, copies cost nothing, and a change of the model drops what is kept."""
    denoiser = optimized()
    state = steps(denoiser, State(), 0, 2)[1]
    want = steps(denoiser, state, 2, 3)[0][0]
    assert denoiser._guard._fingerprint is None, "nothing was read"
    for copied in (copy.copy(state), copy.deepcopy(state)):
        assert torch.equal(steps(denoiser, copied, 2, 3)[0][0], want)
    assert denoiser._guard._fingerprint is None, "still"
    again = pickle.loads(pickle.dumps(state))
    outputs, following = steps(denoiser, again, 2, 3)
    assert torch.equal(outputs[0], want)
    assert following.model.local is not None
    with logged(logging.INFO) as messages:
        denoiser.denoiser.extra = 4
        before = denoiser.totals["refresh"]
        steps(denoiser, state, 2, 3)
    assert denoiser.totals["refresh"] == before + 1
    (message,) = [m for m in messages if "anew" in m]
    assert "has changed" in message


def layer(**changes: Any) -> Any:
    torch.manual_seed(0)
    made: Any = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_fingerprints() -> None:
    one = Fingerprint.of(layer())
    assert one == Fingerprint.of(layer())
    assert one.difference(Fingerprint.of(layer().to(torch.float64)))
    flipped = layer()
    with torch.no_grad():
        flipped[0].weight.copy_(flipped[0].weight.flip(0).clone())
    assert "weights" in one.difference(Fingerprint.of(flipped)), "order counts"
    buffer = layer()
    buffer[1].running_mean += 1
    assert "weights" in one.difference(Fingerprint.of(buffer))
    hooked = layer()
    hooked.register_forward_hook(receive)
    assert "hooks" in one.difference(Fingerprint.of(hooked))
    hooked.register_forward_hook(lambda *_: None)
    assert "other processes can't compare" in Fingerprint.of(hooked).unknown
    assert Fingerprint.of(layer(act=torch.relu)) == Fingerprint.of(layer(act=torch.relu))


def test_the_order_of_a_set_in_the_configuration_does_not_matter() -> None:
    """diffusers notes which values were defaults as list(set), another order in each process."""
    one, other = denoisers.small_sdxl(), denoisers.small_sdxl()
    assert len(one.config["_use_default_values"]) > 2
    other.config["_use_default_values"].reverse()
    assert Fingerprint.of(one) == Fingerprint.of(other)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64]
)
def test_fingerprints_of_any_dtype(dtype: torch.dtype) -> None:
    def holding(value: float) -> Any:
        made = nn.Module()
        made.register_buffer("odd", torch.full((3, 5), value).to(dtype).t())
        made.register_buffer("none", torch.empty(0, dtype=dtype))
        return made.eval()

    assert Fingerprint.of(holding(1.0)) == Fingerprint.of(holding(1.0))
    assert Fingerprint.of(holding(1.0)) != Fingerprint.of(holding(0.0))


def test_fingerprints_of_models_that_were_loaded_and_adapted(tmp_path: Path) -> None:
    """From two folders, as two machines have them; adapters count while they act."""
    own = denoisers.sd15()
    for name in "ab":
        own.save_pretrained(tmp_path / name)
    loaded = [UNet2DConditionModel.from_pretrained(tmp_path / name).eval() for name in "ab"]
    assert Fingerprint.of(loaded[0]) == Fingerprint.of(loaded[1])
    for each in loaded:
        torch.manual_seed(0)
        each.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "one")
    assert Fingerprint.of(loaded[0]) == Fingerprint.of(loaded[1])
    assert Fingerprint.of(loaded[0]).difference(Fingerprint.of(own))
    loaded[0].disable_adapters()
    assert Fingerprint.of(loaded[0]).difference(Fingerprint.of(loaded[1]))


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("how", COPIES)
@torch.no_grad()
def test_copies_of_a_denoiser_keep_its_settings(how: str, inside: bool) -> None:
    module = fresh()
    denoiser: Any = toma_fx.optimize(
        module, example_inputs=inputs(), max_signatures=3, **(OPTIONS | {"ratio": 0.4})
    )
    denoiser.compile(backend="eager", fullgraph=True)
    want = denoiser(**inputs())
    if inside:
        pipe = DDIMPipeline(unet=denoiser, scheduler=DDIMScheduler())
        copied: Any = COPIES[how](pipe).unet
    else:
        copied = COPIES[how](denoiser)
    assert copied.config_toma == denoiser.config_toma
    assert copied.cache.capacity == 3
    assert copied.compiled
    assert copied._compile.options == {"dynamic": False, "backend": "eager", "fullgraph": True}
    assert (copied.denoiser is module) == (how == "copy")
    copied.reset()
    assert torch.equal(copied(**inputs()), want)
    with pytest.raises(SignatureError):
        copied(**inputs(batch=3))

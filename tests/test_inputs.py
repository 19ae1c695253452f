"""Example inputs of any pipeline are those of its own first call."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import toma_fx
from tests import denoisers
from tests.diffusers_pipelines import CASES
from toma_fx.cli.main import main
from toma_fx.errors import ConfigError, ModelTypeError
from toma_fx.inputs import load_example


@pytest.mark.parametrize("name", CASES)
def test_they_are_those_of_the_pipelines_own_call(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call of the case, made by `example_inputs` instead."""
    case = CASES[name]
    pipe, asked = case.make(), {}

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert not args
        asked.update(kwargs)
        raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(type(pipe), "__call__", note)
        with pytest.raises(InterruptedError):
            case.call(pipe)
    with toma_fx.record_calls(pipe) as calls:
        case.call(pipe)
    own = {k: v for k, v in asked.items() if k not in ("height", "width")}
    size = {k: asked[k] for k in ("height", "width") if k in asked}
    found = toma_fx.example_inputs(pipe, **size, **own)
    denoiser, (args, kwargs) = case.denoiser(pipe), calls[0]
    named = dict(zip(inspect.signature(denoiser.forward).parameters, args, strict=False))
    kwargs = {**named, **kwargs}
    assert shapes(found) == shapes(kwargs)
    with torch.no_grad():
        denoiser(**found)
    assert not denoiser._forward_pre_hooks, "it is as before"
    assert toma_fx.explain(pipe, found, min_tokens=60).rows


def shapes(value: Any) -> Any:
    """A call with shapes instead of tensors, and without what stands for nothing."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return {k: shapes(v) for k, v in value.items() if v is not None}
    return [shapes(v) for v in value] if isinstance(value, (list, tuple)) else type(value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of a family that the command line has no inputs for."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
        num_layers=2, sample_size=16, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=2)
    path = tmp_path_factory.mktemp("pipeline")
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(path)
    return path


def test_of_a_pipeline_by_class_labels(folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(folder)
    call = toma_fx.example_inputs(pipe, batch=3)
    assert call["hidden_states"].shape == (6, 4, 16, 16), "with guidance"
    assert call["class_labels"].shape == (6,)


def test_the_command_line_takes_any_pipeline(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(folder), "--min_tokens", "16"]) == 0
    assert "8x8: 64 -> 32" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="encodes its own text"):
        load_example(str(folder), None, None, 1, text=8)


def test_of_models_alone() -> None:
    call = toma_fx.example_inputs(denoisers.sdxl(), 128, 64, batch=3, text=5)
    assert call["sample"].shape == (3, 4, 16, 8)
    assert call["encoder_hidden_states"].shape[:2] == (3, 5)
    with pytest.raises(ModelTypeError, match=r"example_inputs\(pipe\)"):
        toma_fx.example_inputs(nn.Linear(2, 2))
    with pytest.raises(ModelTypeError, match="no denoiser"):
        toma_fx.example_inputs("a folder")


def test_what_a_pipeline_does_not_take() -> None:
    pipe = CASES["sdxl"].make()
    with pytest.raises(ConfigError, match="no such argument"):
        toma_fx.example_inputs(pipe, num_frames=3)
    with pytest.raises(ConfigError, match="does not run with these arguments"):
        toma_fx.example_inputs(pipe, 63, 63)
    with pytest.raises(ConfigError, match="did not call the denoiser"):
        toma_fx.example_inputs(NoCall(denoisers.sdxl()))
    assert not pipe.unet._forward_pre_hooks


def test_offloaded_models_go_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the end of a call: what stays on the device is in the way of the next model."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.enable_model_cpu_offload(device="cpu")
    freed, home = list[str](), type(pipe).maybe_free_model_hooks

    def free(self: Any) -> None:
        freed.append("freed")
        home(self)

    monkeypatch.setattr(type(pipe), "maybe_free_model_hooks", free)
    inputs = toma_fx.example_inputs(pipe)
    assert freed == ["freed"]
    assert pipe.transformer(**inputs)[0].isfinite().all()
    with pytest.raises(ConfigError, match="does not run"):
        toma_fx.example_inputs(pipe, class_labels=["none"])
    assert freed == ["freed", "freed"]


class NoCall:
    """A pipeline that denoises nothing."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet

    def __call__(self) -> None:
        """Nothing."""

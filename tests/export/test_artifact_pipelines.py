"""Artifacts in real diffusers pipelines: whole generations against the optimized denoiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

import toma_fx
from tests import diffusers_pipelines
from tests.denoisers import relative
from tests.diffusers_pipelines import CASES, Case
from tests.export.in_process import InProcess, opened
from toma_fx.errors import ArtifactError
from toma_fx.export.builder import export
from toma_fx.models import flow, tiny

STEPS = 20
SMALL: dict[str, Any] = {"min_tokens": 60, "tile": 4}
EQUAL = 1e-6
"""Largest mean squared error of a picture in [-1, 1]."""


def recorded(pipe: Any, call: Callable[[Any], Tensor]) -> tuple[Any, Tensor]:
    """(the first call that the denoiser gets, what the pipeline draws)."""
    with toma_fx.record_calls(pipe) as calls:
        drawn = call(pipe)
    return calls[0], drawn


def made(target: str, optimized: Any, inputs: Any, out: Path) -> Any:
    """An artifact, loaded; of the target "in-process" without files."""
    if target == "in-process":
        programs = InProcess()
        export(optimized, inputs, out, programs)
        return opened(programs, out)
    if target == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    getattr(toma_fx.export, target)(optimized, inputs, out)
    return toma_fx.load(out)


# -- every pipeline -------------------------------------------------------------------------------

NAMES = [name for name in CASES if name != "sdxl_pag"]
"""Perturbed attention exchanges attention processors during a call: no artifact can have them."""
"""Guidance with two calls a step, a context each."""


def check(case: Case, target: str, out: Path) -> None:
    """Twice in a row the pipeline draws with the artifact what it draws with the denoiser."""
    pipe = case.make()
    call, plain = recorded(pipe, case.call)
    toma_fx.optimize(pipe, **SMALL)
    want = case.call(pipe)
    assert relative(want, plain) > 1e-2, "merging acts"
    artifact = made(target, case.denoiser(pipe), call, out)
    setattr(pipe, case.component, artifact)
    pipe.to("cpu")
    got = case.call(pipe)
    assert relative(got, want) < 1e-4
    assert torch.equal(case.call(pipe), got), "the second generation starts anew"
    assert case.denoiser(type(pipe)(**pipe.components)) is artifact


@pytest.mark.parametrize("name", NAMES)
def test_every_pipeline(name: str, tmp_path: Path) -> None:
    """What pipelines ask of a denoiser beyond calling it, an artifact has."""
    check(CASES[name], "in-process", tmp_path / "out")


REAL = [
    ("sdxl", "onnx"), ("sdxl", "aoti"), ("sdxl_controlnet", "onnx"),
    ("flux_true_cfg", "onnx"), ("flux_true_cfg", "aoti"),
    ("flux_img2img", "onnx"), ("flux_img2img", "aoti"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "target"), REAL)
def test_guidance(name: str, target: str, tmp_path: Path) -> None:
    """Batched, labeled and unlabeled guidance, and another model's residuals."""
    check(CASES[name], target, tmp_path / "out")


def test_what_an_artifact_can_not_do(tmp_path: Path) -> None:
    case = CASES["flux_true_cfg"]
    pipe = case.make()
    call, _ = recorded(pipe, case.call)
    toma_fx.optimize(pipe, **SMALL)
    pipe.transformer = made("in-process", pipe.transformer, call, tmp_path / "out")
    with pytest.raises(ArtifactError, match="offloaded"):
        pipe.enable_model_cpu_offload(device="cpu")
    pipe.remove_all_hooks()
    with pytest.raises(AttributeError, match="before the build"):
        pipe.load_lora_weights(diffusers_pipelines.lora_state(case), adapter_name="late")
    with pytest.raises(ArtifactError, match="cast"):
        pipe.to(torch.float16)


# -- the embedded models --------------------------------------------------------------------------


load = cache(tiny.load)


class Flow(FlowMatchEulerDiscreteScheduler):
    """The scheduler of rectified flow, with the two things that SDXL's pipeline asks for besides.

    Steps of the flow scale no inputs, and start from noise of variance one.
    """

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        return sample


@dataclass(frozen=True)
class Drawn:
    """An embedded model in its pipeline, drawing four pictures.

    tiny-sdxl gets both passes of guidance in one call, tiny-flux in two, a context each.
    """

    name: str

    guidance = 2.0
    labels = (0, 2, 4, 10)

    @property
    def component(self) -> str:
        return "unet" if self.name == "tiny-sdxl" else "transformer"

    @property
    def model(self) -> tiny.TinyModel:
        return load(self.name)

    def pipe(self) -> Any:
        """A pipeline around the model; its VAE has the size of pixels, and is not used."""
        components = {
            "vae": AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
            "scheduler": Flow() if self.name == "tiny-sdxl" else FlowMatchEulerDiscreteScheduler(),
            self.component: self.model.denoiser,
            **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
        }
        if self.name == "tiny-sdxl":
            pipe: Any = StableDiffusionXLPipeline(**components, add_watermarker=False)
        else:
            pipe = FluxPipeline(**components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe: Any) -> Tensor:
        """Pictures [4, 3, 64, 64] in [-1, 1], from the noise of `TinyModel.generate`."""
        noise = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        sdxl = self.name == "tiny-sdxl"
        tokens, pooled = self.model.conditioning(torch.tensor(self.labels))
        free, free_pooled = self.model.conditioning(torch.full((4,), len(tiny.CLASSES)))
        arguments: dict[str, Any] = {
            "prompt_embeds": tokens,
            "pooled_prompt_embeds": pooled,
            "negative_prompt_embeds": free,
            "negative_pooled_prompt_embeds": free_pooled,
            "latents": noise if sdxl else flow.pack(noise),
            "sigmas": torch.linspace(1, 0, STEPS + 1)[:-1].tolist(),
            "num_inference_steps": STEPS,
            "guidance_scale" if sdxl else "true_cfg_scale": self.guidance,
            "height": 64,
            "width": 64,
            "output_type": "latent",
        }
        drawn = pipe(**arguments).images
        return (drawn if sdxl else flow.unpack(drawn, 64, 64)).clamp(-1, 1)


def errors(a: Tensor, b: Tensor) -> list[float]:
    """Mean squared error of every picture."""
    return [float((x - y).square().mean()) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_pictures_of_the_embedded_models(name: str, tmp_path: Path) -> None:
    """Twenty steps: original pictures are those of the sampler, artifacts' those of the process."""
    drawn = Drawn(name)
    pipe = drawn.pipe()
    call, plain = recorded(pipe, drawn.draw)
    sampled = drawn.model.generate(drawn.labels, steps=STEPS, guidance=drawn.guidance)
    assert max(errors(plain, sampled)) < EQUAL
    toma_fx.optimize(pipe)
    want, denoiser = drawn.draw(pipe), getattr(pipe, drawn.component)
    assert min(errors(want, plain)) > 1000 * EQUAL, "merging acts"
    for target in ("onnx", "aoti"):
        setattr(pipe, drawn.component, made(target, denoiser, call, tmp_path / target))
        got = drawn.draw(pipe)
        assert max(errors(got, want)) < EQUAL, target
        assert torch.equal(drawn.draw(pipe), got), "the second generation starts anew"

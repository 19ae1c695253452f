"""Pipelines tell their denoisers when a generation begins and ends, and which step it is at."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FluxPipeline,
    HeunDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep
from torch import Tensor

import toma_fx
from tests import denoisers
from tests.diffusers_pipelines import CASES, sdxl, sdxl_call, sdxl_img2img_call
from tests.run.loops import call, denoiser, same, truth
from toma_fx.run.told import Run

SMALL: dict[str, Any] = {"min_tokens": 60, "tile": 4}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None, int]]:
    """(step, steps, order) of every call that was told."""
    seen: list[tuple[int, int | None, int]] = []
    real = Run.place

    def place(self: Run, *arguments: Any) -> Any:
        state = real(self, *arguments)
        seen.append((self.generation.step, self.steps, self.order))
        return state

    monkeypatch.setattr(Run, "place", place)
    return seen


@pytest.mark.parametrize(
    ("scheduler", "calls", "order"),
    [
        (EulerDiscreteScheduler, 6, 1),
        (DPMSolverMultistepScheduler, 6, 1),
        (UniPCMultistepScheduler, 6, 1),
        (HeunDiscreteScheduler, 11, 2),
        (DDIMScheduler, 6, 1),
    ],
)
def test_steps_are_the_schedulers(scheduler: Any, calls: int, order: int, told: Any) -> None:
    """Also where the scheduler has no index (DDIM), and where it calls twice a step (Heun)."""
    pipe = toma_fx.optimize(sdxl(), **SMALL)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    for _ in range(2):
        told.clear()
        sdxl_call(pipe)
        assert told == [(step, calls, order) for step in range(calls)]
    assert pipe.unet.unsure == 0
    assert pipe.num_timesteps == calls


def test_img2img_counts_from_where_it_begins(told: Any) -> None:
    pipe = toma_fx.optimize(sdxl(StableDiffusionXLImg2ImgPipeline), **SMALL)
    sdxl_img2img_call(pipe, strength=0.5)
    assert told == [(step, 4, 1) for step in range(4)], "half of eight"


def record_calls(denoiser: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Tensor]]:
    """Every ((args, kwargs), output) of the denoiser from here on."""
    calls: list[tuple[Any, Tensor]] = []
    real = type(denoiser).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = real(self, *args, **kwargs)
        calls.append(((args, kwargs), output[0].clone()))
        return output

    monkeypatch.setattr(type(denoiser), "forward", forward)
    return calls


def check(denoiser: Any, calls: list[tuple[Any, Tensor]], passes: int) -> None:
    """Compare recorded calls with `step()`, with one state for each pass of a step."""
    states = [toma_fx.State()] * passes
    for i, (made, output) in enumerate(calls):
        (want, *_), states[i % passes] = denoiser.step(made, states[i % passes])
        assert torch.equal(output, want), f"call {i}"
    assert denoiser.unsure == 0
    assert {"refresh", "reuse"} <= denoiser.totals.keys()


@pytest.mark.parametrize("name", ["flux_true_cfg", "flux_img2img", "sdxl"])
def test_a_pipeline_gets_the_truth(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    pipe = toma_fx.optimize(case.make(), **SMALL)
    calls = record_calls(case.denoiser(pipe), monkeypatch)
    case.call(pipe)
    check(case.denoiser(pipe), calls, 1 if name == "sdxl" else 2)


@pytest.mark.parametrize("name", ["flux_true_cfg", "flux_img2img", "sdxl"])
def test_a_pipeline_that_does_not_tell_gets_the_truth(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    pipe = case.make()
    setattr(pipe, case.component, toma_fx.optimize(case.denoiser(pipe), **SMALL))
    calls = record_calls(case.denoiser(pipe), monkeypatch)
    case.call(pipe)
    check(case.denoiser(pipe), calls, 1 if name == "sdxl" else 2)


@torch.no_grad()
def test_a_modular_pipeline_gets_the_truth(monkeypatch: pytest.MonkeyPatch, told: Any) -> None:
    """Its guider calls the denoiser once for each side, and labels neither."""
    scheduler = EulerDiscreteScheduler()
    pipe: Any = StableDiffusionXLDenoiseStep().init_pipeline()
    guider = ClassifierFreeGuidance(guidance_scale=5.0)
    pipe.update_components(unet=denoisers.small_sdxl(), scheduler=scheduler, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    toma_fx.optimize(pipe, **SMALL)
    calls = record_calls(pipe.unet, monkeypatch)
    made = denoisers.sdxl_inputs(batch=1)
    text, added = made["encoder_hidden_states"], made["added_cond_kwargs"]
    fields = {
        "prompt_embeds": text,
        "negative_prompt_embeds": -text,
        "pooled_prompt_embeds": added["text_embeds"],
        "negative_pooled_prompt_embeds": -added["text_embeds"],
        "add_time_ids": added["time_ids"],
        "negative_add_time_ids": added["time_ids"],
    }
    scheduler.set_timesteps(4)
    options = {"timesteps": scheduler.timesteps, "num_inference_steps": 4, "output": "latents"}
    pipe(latents=made["sample"] * 10, denoiser_input_fields=fields, **options)
    assert [step for step, _, _ in told] == [0, 0, 1, 1, 2, 2, 3, 3]
    check(pipe.unet, calls, 2)


class Cancelled(Exception):
    """Raised by a callback, as servers do to end a request."""


@pytest.mark.parametrize("how", ["pipeline", "component"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_cancelled_request_leaves_nothing(how: str, at: int) -> None:
    """The next one has the same text and begins later."""
    case = CASES["flux_img2img"]
    pipe = case.make()
    if how == "pipeline":
        toma_fx.optimize(pipe, **SMALL)
    else:
        pipe.transformer = toma_fx.optimize(pipe.transformer, **SMALL)
    text = {"prompt_embeds": torch.randn(1, 5, 24), "pooled_prompt_embeds": torch.randn(1, 16)}

    def stop(_: Any, step: int, __: Any, arguments: Any) -> Any:
        if step == at:
            raise Cancelled
        return arguments

    want = case.call(pipe, strength=0.4, **text)
    with pytest.raises(Cancelled):
        case.call(pipe, strength=0.9, callback_on_step_end=stop, **text)
    assert torch.equal(case.call(pipe, strength=0.4, **text), want)


def test_a_pipeline_that_tells_is_the_pipeline_it_was() -> None:
    case = CASES["flux"]
    pipe = toma_fx.optimize(case.make(), **SMALL)
    assert isinstance(pipe, FluxPipeline)
    assert (type(pipe).__name__, type(pipe).__module__) == ("FluxPipeline", FluxPipeline.__module__)
    want = case.call(pipe)
    toma_fx.optimize(pipe, **SMALL)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert torch.equal(case.call(other), want)
        assert type(other) is type(pipe)
    toma_fx.restore(pipe)
    assert type(pipe) is FluxPipeline


class Loop:
    """A pipeline that is a loop; `transformer_2` takes the later steps, as in Wan 2.2."""

    def __init__(self) -> None:
        self.transformer, self.transformer_2 = denoiser(), copy.deepcopy(denoiser())
        self.scheduler = SimpleNamespace(step_index=None, order=1)

    def steps(self, seed: int) -> Iterator[Tensor]:
        self.scheduler.step_index = None
        self._num_timesteps = 4
        for step in range(4):
            model = self.transformer if step < 2 else self.transformer_2
            yield model(**call(seed, step))
            self.scheduler.step_index = (self.scheduler.step_index or 0) + 1


class Streaming(Loop):
    """Its call is a generator of the pictures so far."""

    def __call__(self, seed: int) -> Iterator[Tensor]:
        yield from self.steps(seed)


class Whole(Loop):
    """Its call returns the pictures of all steps."""

    def __call__(self, seed: int, then: Callable[[], Any] | None = None) -> list[Tensor]:
        outputs = []
        for output in self.steps(seed):
            outputs.append(output)
            if then is not None:
                then()
        return outputs


@torch.no_grad()
def test_the_second_denoiser_goes_on_at_the_step_of_the_first(told: Any) -> None:
    pipe = toma_fx.optimize(Whole(), min_tokens=1, last_step=2)
    pipe(1)
    assert [step for step, _, _ in told] == [0, 1, 2, 3]
    assert pipe.transformer.totals == {"refresh": 1, "reuse": 1}
    assert pipe.transformer_2.totals == {"refresh": 1, "plain": 1}


@torch.no_grad()
def test_a_pipeline_within_a_pipeline() -> None:
    """A callback makes another picture with the same denoisers."""
    pipe = toma_fx.optimize(Whole(), min_tokens=1)
    inner: list[list[Tensor]] = []
    want = pipe(1), pipe(2)
    index = pipe.scheduler

    def other() -> None:
        pipe.scheduler = SimpleNamespace(step_index=None, order=1)
        inner.append(pipe(2))
        pipe.scheduler = index

    got = pipe(1, other)
    assert same(got, want[0])
    assert all(same(each, want[1]) for each in inner)


@torch.no_grad()
def test_a_generator_that_is_dropped_ends_its_generation() -> None:
    pipe = toma_fx.optimize(Streaming(), min_tokens=1)
    want = truth(pipe.transformer, [("", call(1, 1))])
    stream = pipe(1)
    next(stream)
    del stream
    gc.collect()
    assert pipe.transformer._stepper.told is None
    assert torch.equal(pipe.transformer(**call(1, 1)), want[0])
    one, two = pipe(1), pipe(2)
    outputs = [next(one), next(two), next(one)]
    assert same(outputs[::2], truth(pipe.transformer, [("", call(1, s)) for s in (0, 1)]))


@torch.no_grad()
def test_a_generation_of_the_callers_own_goes_on() -> None:
    pipe = toma_fx.optimize(Whole(), min_tokens=1)
    with pipe.transformer.generation(steps=4) as run:
        run.step(0)
        pipe.transformer(**call(1, 0))
        assert pipe.transformer._stepper.told is run

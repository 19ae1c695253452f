"""Subjects draw the same pictures as the models do by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import toma_fx
from tests.diffusers_pipelines import sdxl
from toma_fx.errors import ConfigError, ModelTypeError, UnknownNameError
from toma_fx.measure.cases import Case
from toma_fx.measure.subjects import EmbeddedSubject, PipelineSubject, Settings, subject_of
from toma_fx.models import latent, tiny

CASES = [Case("cat", 1), Case("clock", 2), Case("cat", 3)]


def embedded(**settings: Any) -> EmbeddedSubject:
    return EmbeddedSubject(tiny.load("tiny-sdxl"), Settings(**{"steps": 3, **settings}))


def test_pictures_depend_on_their_own_seed_alone() -> None:
    one, two = embedded().draw(CASES), embedded(batch=2).draw(CASES)
    assert one.shape == (3, 3, 64, 64)
    assert one.dtype == torch.float32
    assert 0 <= float(one.min()) < float(one.max()) <= 1
    assert torch.allclose(one, two, atol=1e-4)
    assert not torch.allclose(one[0], one[2], atol=0.05)


def test_a_batch_of_one_seed_is_drawn_as_before() -> None:
    model = tiny.load("tiny-flux")
    batch = model.generate([0, 1], seed=5, steps=2)
    first = model.generate([0], seed=[5], steps=2)
    assert torch.allclose(batch[:1], first, atol=1e-4)


def test_a_configuration_is_optimized_once_and_its_generations_are_told() -> None:
    subject = embedded(batch=2)
    config = toma_fx.ToMAConfig(ratio=0.5)
    got = subject.draw(CASES, config)
    denoiser = subject.optimized(config)["denoiser"]
    assert subject.optimized(toma_fx.ToMAConfig(ratio=0.5))["denoiser"] is denoiser
    assert denoiser.cache.captures == 1, "the last batch is filled up"
    assert denoiser.unsure == 0
    assert sum(denoiser.totals.values()) == 2 * 3
    assert not torch.allclose(got, subject.reference(CASES), atol=1e-3)
    model = tiny.load("tiny-sdxl")
    optimized = toma_fx.optimize(model.denoiser, config)
    with optimized.generation(steps=3):
        want = model.generate([2, 3], seed=[1, 2], steps=3, denoiser=optimized)
    assert torch.equal(got[:2], (want + 1) / 2)
    subject.forget(config)
    assert subject.optimized(config)["denoiser"] is not denoiser


def test_references_are_drawn_once() -> None:
    subject = embedded()
    want = subject.reference(CASES)
    calls: list[Any] = []
    subject.denoisers["denoiser"].register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(subject.reference([CASES[2], CASES[0]]), want[[2, 0]])
    assert not calls
    subject.reference([Case("cat", 4)])
    assert len(calls) == 3


def test_what_an_embedded_model_can_not_draw() -> None:
    subject = embedded()
    with pytest.raises(ConfigError, match="nearest: cat"):
        subject.draw([Case("cats")])
    with pytest.raises(ConfigError, match="height"):
        embedded(height=128)
    with pytest.raises(ConfigError, match="steps"):
        embedded(steps=0)


def test_cases_are_checked_before_anything_is_drawn() -> None:
    subject = embedded()
    subject.check([*CASES, Case("cat", 0, {"width": 64})])
    for case, match in (
        (Case("cats", where="p.txt, line 7"), "nearest: cat"),
        (Case("cat", 0, {"negative_prompt": "x"}, "p.txt, line 7"), "negative_prompt"),
        (Case("cat", 0, {"width": 96}, "p.txt, line 7"), "96"),
    ):
        with pytest.raises(ConfigError, match=match) as caught:
            subject.check([*CASES, case])
        notes = getattr(caught.value, "__notes__", ())
        assert "p.txt, line 7" in "\n".join([str(caught.value), *notes])
    with pytest.raises(ConfigError, match="negative_prompt"):
        subject.draw([Case("cat", 0, {"negative_prompt": "x"})])
    with pytest.raises(UnknownNameError, match="negative_prompt") as unknown:
        PipelineSubject(sdxl()).check([Case("a"), Case("b", 1, {"negatve_prompt": "x"}, "line 2")])
    assert unknown.value.__notes__ == ["  prompts: line 2"]


def test_latent_models_are_embedded_models() -> None:
    text, autoencoder = latent.TextEncoder().eval(), latent.Autoencoder().eval()
    model = latent.LatentModel("latent-sdxl", torch.nn.Identity(), text, autoencoder)
    subject = subject_of(model, {"steps": 2})
    assert isinstance(subject, EmbeddedSubject)
    assert subject.example_prompt in latent.PROMPTS
    with pytest.raises(UnknownNameError, match="guidance"):
        subject_of(model, {"guidence": 2})


def test_compiled_subjects_draw_the_same() -> None:
    subject = embedded(compile=True, compile_options={"backend": "eager"})
    for config in (None, "balanced"):
        want = embedded().draw(CASES[:1], config)
        assert torch.allclose(subject.draw(CASES[:1], config), want, atol=1e-4)
    assert subject.optimized("balanced")["denoiser"].compiled


def embeddings(seed: int, **more: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"prompt_embeds": (1, 5, 24), "pooled_prompt_embeds": (1, 16)}
    values = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return {**values, **{f"negative_{k}": torch.zeros_like(v) for k, v in values.items()}, **more}


def test_pipelines_draw_with_the_denoiser_of_a_configuration() -> None:
    pipe = sdxl()
    before, kind = pipe.unet, type(pipe)
    settings = Settings(steps=2, guidance=3.0, height=64, width=64, batch=2)
    subject = PipelineSubject(pipe, settings)
    cases = [Case("", seed, embeddings(seed)) for seed in range(2)]
    got = subject.draw(cases, "balanced")
    assert got.shape == (2, 3, 64, 64)
    optimized = subject.optimized("balanced")["unet"]
    assert sum(optimized.totals.values()) == 2
    assert optimized.unsure == 0
    assert pipe.unet is before
    assert type(pipe) is kind
    assert subject.facts["components"]["scheduler"] == "EulerDiscreteScheduler"
    assert subject.facts["scheduler"]["prediction_type"] == "v_prediction"
    before_weights = subject.facts["weights"]
    assert "unet" not in before_weights
    torch.nn.init.ones_(next(pipe.vae.parameters()))
    assert subject.facts["weights"] != before_weights
    want = pipe(
        **embeddings(1), generator=torch.Generator().manual_seed(1), num_inference_steps=2,
        guidance_scale=3.0, height=64, width=64, output_type="pt",
    ).images  # fmt: skip
    assert torch.allclose(subject.reference(cases)[1:], want, atol=1e-4)


def test_a_pipeline_that_refuses_says_so() -> None:
    subject = PipelineSubject(sdxl(), Settings(steps=1, height=64, width=64, batch=2))
    with pytest.raises(UnknownNameError, match="guidance_scale"):
        subject.draw([Case("", 0, embeddings(0, guidance=1))])
    with pytest.raises(ConfigError, match="refuses the call"):
        subject.draw([Case("", 0, embeddings(0, height=60))])
    cases = [Case("", i, embeddings(i, guidance_scale=float(i))) for i in range(2)]
    with pytest.raises(ConfigError, match="guidance_scale"):
        subject.draw(cases)
    with pytest.raises(ConfigError, match="nothing to draw"):
        subject.draw([])


def test_what_is_optimized_already_has_no_original_to_compare_with() -> None:
    pipe = toma_fx.optimize(sdxl(), "balanced")
    with pytest.raises(ModelTypeError, match="restore"):
        PipelineSubject(pipe)
    with pytest.raises(ModelTypeError, match="no denoiser"):
        PipelineSubject("a/path")

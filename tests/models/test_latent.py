"""The latent models: captions, text encoder, autoencoder, sampler, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import toma_fx
from toma_fx.errors import ModelTypeError, UnknownNameError
from toma_fx.measure.cases import Case
from toma_fx.measure.subjects import EmbeddedSubject, Settings
from toma_fx.models import captions, latent, tiny
from toma_fx.models.embedded import EmbeddedModel

CAT = captions.caption("a cat", "at night")


@pytest.fixture(scope="module", params=latent.NAMES)
def untrained(request: Any) -> latent.LatentModel:
    torch.manual_seed(0)
    modules = latent.build(request.param), latent.TextEncoder(), latent.Autoencoder()
    return latent.LatentModel(request.param, *(m.eval().requires_grad_(False) for m in modules))


def test_captions_and_those_held_out() -> None:
    assert CAT == "a photo of a cat, at night"
    assert len(set(captions.PROMPTS)) == 400
    assert len(captions.HELD_OUT) == 61
    seen = [p for p in captions.PROMPTS if p not in captions.HELD_OUT]
    words = {w for p in seen for w in captions.tokenize(p)}
    assert words == set(range(1, len(captions.VOCABULARY)))
    for subject in captions.SUBJECTS:
        assert 1 <= sum(f"of {subject}," in p for p in captions.HELD_OUT) <= 6


def test_an_unknown_word_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="nearest: mirrored"):
        captions.token_ids(["a photo of a cat, mirored"])
    with pytest.raises(UnknownNameError, match="at most 16 words"):
        captions.token_ids(["cat " * 17])


def test_tokens_are_padded_and_commas_and_case_are_nothing() -> None:
    ids = captions.token_ids(["", CAT, "A photo of a cat at night"])
    assert ids.shape == (3, captions.TEXT_TOKENS)
    assert not ids[0].any()
    assert torch.equal(ids[1], ids[2])
    assert [captions.VOCABULARY[i] for i in ids[1] if i] == CAT.replace(",", "").split()


def test_text_encoder_reads_order_and_every_word() -> None:
    encoder = latent.TextEncoder()
    tokens, pooled = encoder(
        captions.token_ids([CAT, "night a at cat a of photo", CAT + ", mirrored"])
    )
    assert tokens.shape == (3, 16, 128)
    assert pooled.shape == (3, 128)
    assert (pooled[0] - pooled[1:]).abs().amax(1).min() > 1e-3


def test_autoencoder_shapes_and_its_principal_components() -> None:
    torch.manual_seed(0)
    model = latent.Autoencoder()
    pictures = torch.rand(2, 3, 64, 96) * 2 - 1
    latents = model.encode(pictures)
    assert latents.shape == (2, 8, 16, 24)
    assert model.decode(latents).shape == pictures.shape
    # `decode` undoes the normalization that `encode` does
    before = model.decode(latents)
    model.shift.fill_(0.5)
    model.scale.fill_(3.0)
    assert not torch.allclose(model.encode(pictures), latents)
    assert torch.allclose(model.decode(model.encode(pictures)), before, atol=1e-5)


def test_position_ids_scale_with_the_grid() -> None:
    full, half = latent.FLOW.image_ids(64, 64), latent.FLOW.image_ids(32, 32)
    assert full.shape == (1024, 3)
    assert full[:, 1:].amax() == 31
    # the center of four tokens
    assert torch.equal(half[0], full.unflatten(0, (32, 32))[:2, :2].mean((0, 1)))


def test_pictures_depend_on_prompt_seed_and_guidance(untrained: latent.LatentModel) -> None:
    model: EmbeddedModel = untrained
    steps: list[int] = []
    drawn = model.generate([CAT, CAT], seed=[3, 4], steps=2, on_step=steps.append)
    assert drawn.shape == (2, 3, model.size, model.size)
    assert steps == [0, 1]
    assert drawn.abs().max() <= 1
    assert not torch.equal(drawn[0], drawn[1])
    alone = model.generate([CAT], seed=[4], steps=2)
    assert torch.allclose(alone[0], drawn[1], atol=1e-3)
    assert torch.equal(alone, model.generate([CAT], seed=4, steps=2))
    for other in (
        model.generate([captions.HELD_OUT[0]], seed=4, steps=2),
        model.generate([CAT], seed=4, steps=2, guidance=3.0),
    ):
        assert not torch.allclose(other, alone, atol=1e-4)


def test_merging_and_caching_apply(untrained: latent.LatentModel) -> None:
    inputs = untrained.step_inputs([CAT], 0.7)
    report = toma_fx.explain(untrained.denoiser, inputs, ratio=0.5)
    grids = {(r.tokens, r.merged) for r in report.rows}
    if untrained.name == "latent-flux":
        assert grids == {(1024, 512)}
        assert len(report.rows) == 2 * 2 + 6
    else:
        # attention, cross-attention and MLP of 6 blocks at 32x32 tokens and 8 at 16x16
        assert grids == {(1024, 512), (256, 128)}
        assert len(report.rows) == 3 * (6 + 8)
    subject = EmbeddedSubject(untrained, Settings(steps=2))
    cases = [Case(CAT, seed=1)]
    near, plain = subject.draw(cases, {"ratio": 0.5}), subject.reference(cases)
    assert near.shape == plain.shape == (1, 3, 256, 256)
    assert not torch.equal(near, plain)
    with pytest.raises(UnknownNameError, match="nearest: cat"):
        subject.draw([Case("a photo of a cta")])


def test_files_hold_all_of_a_model(untrained: latent.LatentModel, tmp_path: Path) -> None:
    with pytest.raises(ModelTypeError, match="has no weights"):
        latent.load(untrained.name, tmp_path)
    for part in ("denoiser", "text", "autoencoder"):
        folder = tmp_path / ("latent-autoencoder" if part == "autoencoder" else untrained.name)
        folder.mkdir(exist_ok=True)
        state = getattr(untrained, part).state_dict()
        save_file(
            {k: v.half().contiguous() for k, v in state.items()}, folder / f"{part}.safetensors"
        )
    assert sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors")) < 25e6
    loaded = latent.load(untrained.name, tmp_path)
    drawn = loaded.generate([CAT], steps=1)
    assert torch.allclose(drawn, untrained.generate([CAT], steps=1), atol=0.05)


def test_pixel_models_draw_by_name_as_well() -> None:
    model: EmbeddedModel = tiny.load("tiny-sdxl")
    assert model.prompts[2] == "cat"
    by_name = model.generate(["cat"], steps=1)
    assert torch.equal(by_name, tiny.load("tiny-sdxl").generate([2], steps=1))
    assert model.step_inputs(["cat"], 0.5)["sample"].shape == (1, 3, model.size, model.size)
    with pytest.raises(UnknownNameError, match="nearest: cat"):
        model.generate(["cta"])

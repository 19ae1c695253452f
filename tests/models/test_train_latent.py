"""The script that trains the latent models, on noise in place of photographs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.examples import load_example
from toma_fx.models import captions, latent

train: Any = load_example("train_latent")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoint of an untrained autoencoder, and latents of noise."""
    torch.save({"model": latent.Autoencoder().state_dict()}, tmp_path / "autoencoder.pt")
    for grid in train.GRIDS[:2]:
        noise = np.random.default_rng(0).standard_normal((400, 1, 8, grid, grid))
        np.save(tmp_path / f"latents-{grid}.npy", noise.astype(np.float16))
    return tmp_path


def test_a_training_stops_resumes_and_is_exported(
    folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(10_000))
    monkeypatch.setattr(train, "clock", lambda device: next(seconds))
    command = ["denoiser", "latent-sdxl", "--out", str(folder), "--every", "2"]
    command += ["--batches", "2", "2", "1", "--shares", "0.5", "0.5", "0"]
    train.main([*command, "--minutes", "0.2"])
    first = torch.load(folder / "latent-sdxl.pt")
    assert first["step"] > 2
    assert "grid 16" in (printed := capsys.readouterr().out)
    assert "grid 32" in printed
    train.main([*command, "--resume", "--minutes", "0.2"])  # over already
    over = torch.load(folder / "latent-sdxl.pt")
    assert over["step"] == first["step"]
    train.main([*command, "--resume", "--new-schedule", "--minutes", "0.2"])
    second = torch.load(folder / "latent-sdxl.pt")
    assert second["step"] > first["step"]
    assert second["begun"] == over["minutes"]
    train.main(["export", "latent-sdxl", "--out", str(folder), "--weights", str(folder)])
    model = latent.load("latent-sdxl", folder)
    stored = second["average"]["text.words.weight"]
    assert torch.allclose(model.text.words.weight, stored, atol=1e-3)
    sheet = folder / "sheet.png"
    options = ["--count", "2", "--steps", "1", "--guidance", "1", "--sheet", str(sheet)]
    train.main(["sheet", "latent-sdxl", "--out", str(folder), *options])
    assert sheet.stat().st_size > 10_000


def test_the_schedule_ends_each_stage_on_small_steps() -> None:
    run = object.__new__(train.Run)
    run.args = Namespace(shares=(0.0, 0.4, 0.6), batches=(64, 16, 4), rate=1.0)
    run.step, run.first = 1000, 0
    assert run.stage(0.0) == (32, 16, 1.0)
    assert run.stage(0.39)[2] < 0.05
    assert run.stage(0.41)[:2] == (64, 4)
    assert run.stage(0.41)[2] == pytest.approx(0.6, rel=0.01)
    assert run.stage(0.999)[2] < 0.05


@torch.no_grad()
def test_lights_and_principal_components() -> None:
    torch.manual_seed(0)
    # smooth pictures: eight components keep nearly all of them
    pictures = train.resize(torch.rand(64, 3, 4, 4), 32)
    lit = {light: train.relight(pictures, light) for light in captions.LIGHTS}
    assert torch.equal(lit[""], pictures)
    assert torch.equal(lit["black and white"][:, 0], lit["black and white"][:, 2])
    assert lit["at night"][:, 2].mean() > 1.5 * lit["at night"][:, 0].mean()
    assert lit["at sunset"][:, 0].mean() > 1.5 * lit["at sunset"][:, 2].mean()
    assert lit["in fog"].std() < 0.6 * pictures.std()
    assert all(x.min() >= 0 and x.max() <= 1 for x in lit.values())
    model = latent.Autoencoder()
    pictures = pictures * 2 - 1
    train.set_components(model, pictures)
    model.encoder[-1].weight.data.zero_()
    model.decoder[-2].weight.data.zero_()
    latents = model.encode(pictures)
    assert latents.square().mean() == pytest.approx(1, rel=0.05)
    assert (model.decode(latents) - pictures).square().mean() < 0.02 * pictures.square().mean()

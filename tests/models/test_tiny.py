"""The embedded models, the command line, and the README's claims about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import toma_fx
from toma_fx.capture.grids import Raster, find_raster
from toma_fx.cli.demo_sheet import CROP, HOT, RAMP, heat, token_crop
from toma_fx.cli.main import main
from toma_fx.models import flow, tiny


@pytest.mark.parametrize("name", tiny.NAMES)
def test_weights_are_small_and_drawn_pictures_differ_by_class(name: str) -> None:
    files = list(tiny.weights_dir(name).glob("*.safetensors"))
    assert len(files) == 2
    assert sum(f.stat().st_size for f in files) < 10e6
    model = tiny.load(name)
    pictures = model.generate([0, 10], steps=6)
    assert pictures.shape == (2, 3, 64, 64)
    red, blue = pictures[:, 0].mean((1, 2)), pictures[:, 2].mean((1, 2))
    # the astronaut wears orange; the Chinese pagoda stands before a pale blue sky
    assert red[0] - blue[0] > red[1] - blue[1]
    assert pictures[1, 2, :16].mean() > pictures[0, 2, 32:].mean()


@pytest.mark.parametrize("name", tiny.NAMES)
def test_merging_stays_close_to_the_original_picture(name: str) -> None:
    model = tiny.load(name)
    plain = model.generate([4], steps=8)
    merged = toma_fx.optimize(model.denoiser, ratio=0.25, last_step=4)
    picture = model.generate([4], steps=8, denoiser=merged)
    assert 0 < (picture - plain).square().mean() < 0.05
    off = model.generate([4], steps=8, denoiser=toma_fx.optimize(model.denoiser, False))
    assert torch.equal(off, plain)


def test_packing_round_trip_and_ids() -> None:
    images = torch.randn(2, 3, 64, 48)
    assert torch.equal(flow.unpack(flow.pack(images), 64, 48), images)
    assert find_raster(tiny.FLOW.image_ids(64, 64)) == Raster((32,), 32)


def test_command_line_explain(capsys: Any) -> None:
    assert main(["explain", "tiny-flux", "--json", "--ratio", "0.75", "--batch", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {(r["tokens"], r["merged"]) for r in report["rows"]} == {(1024, 256)}


def test_command_line_says_what_is_wrong(capsys: Any) -> None:
    assert main(["explain", "tiny-flux", "--ratoi", "0.5"]) == 1
    assert "nearest: ratio" in capsys.readouterr().err


def test_a_quick_demo_of_one_model(tmp_path: Path, capsys: Any) -> None:
    words = ["demo", "--quick", "--model", "tiny-flux", "--out", str(tmp_path)]
    assert main([*words, "--ratio", "0.25"]) == 0
    assert "page: " in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert (result["model"], result["compiled"]) == ("tiny-flux", False)
    assert len(result["psnrs"]) == len(result["ssims"]) == 4
    assert set(result["cpu_ms"]) == {"original", "refresh", "reuse"}
    page = (tmp_path / "index.html").read_text()
    assert '<img src="contact-sheet.png"' in page
    assert f"{min(result['psnrs']):.1f} to {max(result['psnrs']):.1f} dB" in page
    assert "<svg" in page


def test_the_scale_of_differences() -> None:
    image = torch.zeros(3, 4, 4)
    other = image.clone()
    other[1, 0, 0], other[2, 3, 3], other[0, 0, 3] = HOT, -2.0, HOT / 2
    shown = heat(image, other)
    corner = [shown.getpixel(place) for place in ((0, 0), (255, 255), (255, 0), (0, 255))]
    assert corner == [RAMP[-1], RAMP[-1], RAMP[2], RAMP[0]]


@torch.no_grad()
def test_tokens_of_one_color_merge_into_one() -> None:
    """The colors of the crop, read again, against the pattern."""
    model = tiny.load("tiny-flux")
    merged: Any = toma_fx.optimize(model.denoiser, last_step=9)
    merged(**model.step_inputs((0, 2), 1.0))
    crop = token_crop(torch.ones(3, 64, 64), merged, 1)
    group = merged.specializations[-1].plan.groups[0]
    state = merged.states[0].buffers
    share, idx = state[group.tensor("unmerge")][1], state[group.tensor("idx")][1]
    side, first = 256 // CROP, (32 - CROP) // 2
    windows = 0
    for top in range(0, CROP, 4):
        for left in range(0, CROP, 4):
            window = (first + top) // 4 * 8 + (first + left) // 4
            ends = torch.take_along_dim(idx[window], share[window].argmax(-1), -1).tolist()
            colors = [
                crop.getpixel(((left + slot % 4) * side + 6, (top + slot // 4) * side + 6))
                for slot in range(16)
            ]
            for i in range(16):
                for j in range(16):
                    assert (colors[i] == colors[j]) == (ends[i] == ends[j])
            windows += 1
    assert windows == 4


def test_demo_writes_pictures_and_figures(tmp_path: Path) -> None:
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "contact-sheet.png").stat().st_size > 100_000
    assert "<svg" in (tmp_path / "index.html").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["model"] for r in results] == list(tiny.NAMES)
    assert all(0 < r["mse"] < 0.1 for r in results)
    for cached in (r["cached"] for r in results):
        assert min(cached["psnr"]) >= 28
        assert min(cached["ssim"]) >= 0.95
        assert cached["steps"]["cached_plain"] > cached["steps"]["plain"]

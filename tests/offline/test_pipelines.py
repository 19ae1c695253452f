"""A pipeline of diffusers in a folder, with prompts that bring their own seeds, texts and sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.test_readme import save_sdxl
from toma_fx.cli.main import main

ROWS = [
    {"prompt": "a lighthouse"},
    {"prompt": "a storm", "seed": 99, "negative_prompt": "blur"},
    {"prompt": "a cat", "width": 96, "height": 64},
    {"prompt": "a ship", "negative_prompt": "text"},
]


def test_shards_of_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_sdxl(tmp_path / "sdxl", tmp_path / "work")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, ROWS)))

    def generate(out: str, *more: str) -> int:
        model = ["generate", "--pipeline", str(tmp_path / "sdxl"), "--device", "cpu"]
        size = ["--height", "64", "--width", "64", "--steps", "2", "--batch", "2"]
        prompted = ["--prompts", str(prompts), "--recipe", "toma:ratio=0.5,min_tokens=16"]
        return main([*model, *size, *prompted, "--out", str(tmp_path / out), *more])

    assert generate("one") == 0
    pictures = sorted((tmp_path / "one/pictures").iterdir())
    assert [Image.open(p).size for p in pictures] == [(64, 64), (64, 64), (96, 64), (64, 64)]
    listed = (tmp_path / "one/pictures.jsonl").read_text()
    assert [json.loads(line)["seed"] for line in listed.splitlines()] == [0, 99, 2, 3]
    assert [generate("two", "--shard", f"{i}/2") for i in range(2)] == [0, 0]
    assert (tmp_path / "two/pictures.jsonl").read_text() == listed
    save_sdxl(tmp_path / "sdxl", tmp_path / "work")  # the same again
    assert generate("two") == 0
    prompts.write_text(prompts.read_text() + '\n{"prompt": "x", "negatve_prompt": "y"}')
    assert generate("three") == 1
    said = capsys.readouterr().err
    assert "prompts.jsonl, line 5" in said
    assert "nearest: negative_prompt" in said

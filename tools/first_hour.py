"""A stranger's first hour, as a script: what README and the first page promise, in turn.

    python -m venv new && new/bin/pip install torch==2.13.0 'toma_fx.whl[onnx]'
    new/bin/python tools/first_hour.py --folder work

It uses nothing but the installed package, in an empty folder: the command line as a process of its
own, Python as a user would write it. Each step prints its seconds; what a user does wrong must end
with a reason and without a traceback. Exit status 1 if a step failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONFIGS = {
    "UNet2DConditionModel": {
        "sample_size": 32,
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 8,
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    },
    "FluxTransformer2DModel": {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": [4, 6, 6],
        "in_channels": 16,
    },
}
"""Small denoisers of two kinds; no weights are needed to explain one."""

PYTHON = """
import torch
import toma_fx
from toma_fx.models.named import load_embedded

model = load_embedded("tiny-sdxl")
labels = ["rocket", "coffee"]

def draw(denoiser):
    with denoiser.generation(steps=4):
        return model.generate(labels, seed=1, steps=4, denoiser=denoiser)

original = model.generate(labels, seed=1, steps=4)
denoiser = toma_fx.optimize(model.denoiser, ratio=0.5)
merged = draw(denoiser)
assert not torch.equal(merged, original), "nothing merged"
denoiser.disable_merging()
assert torch.equal(draw(denoiser), original), "off is not the original"
denoiser.enable_merging()
assert torch.equal(draw(denoiser), merged), "on again is not what it was"
with denoiser.using("balanced"):
    draw(denoiser)
print(toma_fx.summary(denoiser))
loaded = toma_fx.load("artifact", cast=True)
shipped = draw(loaded)
assert (shipped - merged).abs().max() < 1e-3, "the artifact draws something else"
assert toma_fx.restore(denoiser) is model.denoiser
"""

MISTAKES = {
    "a method that is none": "explain tiny-flux --method tomesdd",
    "a field that is none": "explain tiny-flux --ratoi 0.4",
    "a ratio of 2": "explain tiny-flux --ratio 2",
    "a model that is none": "explain tiny-fluxx",
    "a target that is none": "build --model tiny-flux --target tflite --out b",
    "no folder to write to": "build --model tiny-flux --target onnx",
    "an artifact that is there": "build --model tiny-sdxl --target onnx --out artifact",
    "an artifact that is none": "run prompts.txt",
    "a recipe that is none": "explain tiny-flux --recipe prompts.txt",
    "a GPU that is not there": "run artifact --device cuda:99",
    "prompts that are none": "quality --model tiny-sdxl --prompts no --config balanced --out q",
}
"""Each ends with a reason."""


@dataclass(frozen=True)
class Step:
    """One command. `fails`: whether it must, with a reason. `says`: a part of its output."""

    name: str
    command: Sequence[str]
    says: str = ""
    fails: bool = False


def steps() -> list[Step]:
    """What a user does, in order; each finds what the ones before it have written."""
    tool = (sys.executable, "-m", "toma_fx")

    def line(words: str) -> list[str]:
        return [*tool, *words.split()]

    drawn = "--model tiny-sdxl --prompts prompts.txt --steps 6 --rounds 0 --out quality"
    merged = "--model tiny-sdxl --height 64 --min_tokens 64"
    explain = "explain --height 256 --min_tokens 16"
    return [
        Step("version", line("--version"), "toma-fx 0."),
        Step("demo", line("demo --quick --model tiny-flux --out demo"), "demo"),
        *(
            Step(name, line(f"{explain} --class {name} --config {name}.json"), "whole model")
            for name in CONFIGS
        ),
        Step("explain tiny-sdxl", line("explain tiny-sdxl --method tomesd --ratio 0.4"), "1024"),
        Step("quality", line(f"quality {drawn} --config balanced --config toma:ratio=0.25")),
        Step("build", line(f"build {merged} --target onnx --out artifact"), "artifact"),
        Step("info", line("info artifact"), "onnx"),
        Step("verify", line("verify artifact")),
        Step("run", line("run artifact --steps 3")),
        Step("Python: switch off and on, load", [sys.executable, "-c", PYTHON], "steps"),
        *(Step(name, line(words), fails=True) for name, words in MISTAKES.items()),
    ]


def take(step: Step, folder: Path) -> str:
    """Run a step; returns what is wrong with it, or nothing."""
    done = subprocess.run(step.command, cwd=folder, capture_output=True, text=True, timeout=1800)
    said = done.stdout + done.stderr
    if "Traceback" in said and step.fails:
        return f"a traceback:\n{said}"
    if (done.returncode != 0) != step.fails:
        return f"exit status {done.returncode}:\n{said}"
    if step.fails and not done.stderr.strip():
        return "no reason"
    return "" if step.says in said else f"{step.says!r} is not in:\n{said}"


def main() -> int:
    """Take every step in an empty folder; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--folder", type=Path, required=True, help="to make, or an empty one")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"--folder: not empty: {folder}")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    (folder / "prompts.txt").write_text("rocket\ncoffee\n")
    failed = 0
    for step in steps():
        start = time.perf_counter()
        wrong = take(step, folder)
        failed += bool(wrong)
        result = "FAILED" if wrong else "ok"
        print(f"{step.name:40} {time.perf_counter() - start:7.1f} s  {result}", flush=True)
        if wrong:
            print(wrong, flush=True)
    print(f"{failed} failed" if failed else "all done")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

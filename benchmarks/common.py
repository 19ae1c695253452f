"""What the benchmarks share: models, memory of this process, facts of the machine, result files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel

import toma_fx
from toma_fx.files import write_file

CLASSES = {"sdxl": UNet2DConditionModel, "flux": FluxTransformer2DModel}
CONFIGS: dict[str, dict[str, Any]] = {
    # unet/config.json of stabilityai/stable-diffusion-xl-base-1.0
    "sdxl": {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    # transformer/config.json of black-forest-labs/FLUX.1-dev
    "flux": {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
}

NARROW: dict[str, dict[str, Any]] = {
    "sdxl": {
        "block_out_channels": (8, 16, 32),
        "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": 16,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
        "norm_num_groups": 4,
    },
    "flux": {
        "in_channels": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    },
}
"""What makes the models narrow, at any depth."""


def random_model(name: str, config: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    """The model in its dtype on its device from the start: no float32 copy, no second copy."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = CLASSES[name](**config)
    finally:
        torch.set_default_dtype(usual)
    if any(True for _ in model.buffers()):
        raise RuntimeError(f"{name} has buffers, which random weights would leave undefined")
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for path, parameter in model.named_parameters():
        if parameter.dim() > 1:
            fan_in = parameter[0].numel()
            parameter.normal_(0, fan_in**-0.5, generator=generator)
        else:
            parameter.fill_(1.0 if path.endswith("weight") else 0.0)
    return model


def resident(peak: bool = False) -> float:
    """Resident memory of this process in MiB, or the most it ever was."""
    # not getrusage: a child's maximum starts at its parent's
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) / 1024


def device_name(device: str = "cpu") -> str:
    """Marketing name of the processor that computes."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of everything that matters, where installed."""
    found = {"python": platform.python_version(), "toma_fx": toma_fx.__version__}
    for package in ("torch", "diffusers", "triton", "tomesd"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command_line() -> str:
    """How this run was started."""
    threads = os.environ.get("OMP_NUM_THREADS")
    prefix = f"OMP_NUM_THREADS={threads} " if threads else ""
    return f"{prefix}python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}"


def save(results: dict[str, Any], path: Path | None) -> None:
    """Write results to a file, if there is one, all or nothing."""
    if path is None:
        return
    write_file(path, json.dumps(results, indent=2) + "\n")


def publish(results: dict[str, Any], path: Path | None) -> None:
    """Print results, and write them to a file, if there is one."""
    print(json.dumps(results, indent=2))
    save(results, path)

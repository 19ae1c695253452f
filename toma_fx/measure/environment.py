"""Where something was measured."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

PACKAGES = ("toma-fx", "torch", "diffusers", "transformers", "lpips", "image-reward", "triton")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment(device: torch.device) -> dict[str, str]:
    """Versions of what matters, where installed, and the device."""
    found = {"python": platform.python_version(), **versions()}
    found["device"] = device_name(device)
    found["threads"] = str(torch.get_num_threads())
    return found


def device_name(device: torch.device) -> str:
    """Marketing name of what computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

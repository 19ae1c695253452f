"""The machine that a compiled artifact is for."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from toma_fx.errors import ArtifactError
from toma_fx.export.manifest import Manifest

_EXTENSIONS = (
    "avx", "fma", "amx", "bmi", "f16c", "sve", "neon", "asimd", "bf16", "i8mm", "vsx", "vxe"
)  # fmt: skip
"""Beginnings of the processor's capabilities that compiled code may use."""


def architecture(device: torch.device) -> str:
    """Words for what compiled code may ask of a machine, sorted.

    Inductor compiles for the very processor it runs on, so these are all of its vector extensions;
    for a GPU its compute capability comes on top.
    """
    able = torch.cpu.get_capabilities()
    words = [k for k, v in able.items() if v is True and k.startswith(_EXTENSIONS)]
    if device.type == "cuda":
        words.append(compute_capability(device))
    return " ".join([sys.platform, platform.machine(), *sorted(words)])


def compute_capability(device: torch.device) -> str:
    """That of a GPU, as "sm_90"."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def processor(device: torch.device) -> str:
    """Name of a GPU, or of this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def check_machine(
    manifest: Manifest,
    device: torch.device,
    package: str,
    version: str,
    arch: Callable[[torch.device], str] = architecture,
) -> None:
    """Refuse what was compiled for something else, before anything of it is loaded.

    Args:
        manifest: of the artifact. device: to run on.
        package, version: what programs are compiled with, and which version is installed.
        arch: words for what a device has; all those of the manifest must be among them.

    Raises:
        ArtifactError: naming the first difference.
    """
    built = manifest.device
    pairs = [
        (f"versions.{package}", manifest.versions.get(package, "unknown"), version),
        ("device.type", built.type, device.type),
    ]
    for where, expected, got in pairs:
        if expected != got:
            raise _other_machine(where, expected, got)
    available = arch(device)
    lacking = set(built.arch.split()) - set(available.split())
    if lacking or not built.arch:
        expected = f"{built.arch or 'an architecture'} ({built.name})"
        got = f"{available}: without {', '.join(sorted(lacking)) or 'a check'}"
        raise _other_machine("device.arch", expected, got)


def _other_machine(where: str, expected: str, got: str) -> ArtifactError:
    return ArtifactError(
        "the artifact was compiled for something else",
        where=where,
        expected=expected,
        got=got,
        hint="build it on a machine and with versions like these, or install those",
    )

"""The machine that a compiled artifact is for."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch

from toma_fx.errors import ArtifactError
from toma_fx.export.manifest import Manifest

_WORDS = ("avx", "fma", "amx", "bmi", "f16c", "sve", "neon", "asimd", "bf16", "i8mm", "vsx", "vxe")
"""Beginnings of the processor's capabilities that compiled code may use."""


# -- the machine --------------------------------------------------------------------------------


def architecture(device: torch.device) -> str:
    """Words for what compiled code may ask of a machine, sorted.

    Inductor compiles for the very processor it runs on, so these are all of its vector extensions;
    for a GPU its compute capability comes on top.
    """
    able = torch.cpu.get_capabilities()
    words = [k for k, v in able.items() if v is True and k.startswith(_WORDS)]
    if device.type == "cuda":
        words.append("sm_{}{}".format(*torch.cuda.get_device_capability(device)))
    return " ".join([sys.platform, platform.machine(), *sorted(words)])


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _versions(device: torch.device) -> dict[str, str]:
    return {"cuda": str(torch.version.cuda)} if device.type == "cuda" else {}


def _check_machine(manifest: Manifest, device: torch.device) -> None:
    """Refuse what was compiled for something else, before anything of it is loaded.

    Raises:
        ArtifactError: naming the first difference.
    """
    if manifest.versions.get("torch") != torch.__version__:
        raise ArtifactError(
            "the artifact was made with another version of torch",
            where="versions.torch",
            expected=f"torch {manifest.versions.get('torch')}",
            got=f"torch {torch.__version__}",
            hint="install that version, or build the artifact anew",
        )
    if device.type != manifest.device.type:
        raise ArtifactError(
            "the artifact was compiled for another device",
            where="device.type",
            expected=manifest.device.type,
            got=device.type,
            hint="build it for that device",
        )
    here = architecture(device)
    lacking = set(manifest.device.arch.split()) - set(here.split())
    if lacking or not manifest.device.arch:
        raise ArtifactError(
            "the artifact was compiled for another processor",
            where="device.arch",
            expected=f"{manifest.device.arch or 'an architecture'} ({manifest.device.name})",
            got=f"{here}: without {', '.join(sorted(lacking)) or 'a check'}",
            hint="build it on a machine of this kind",
        )

"""Devices as users name them."""

from __future__ import annotations

import torch
from torch import Tensor

from toma_fx.errors import ConfigError


def usable_device(device: str | int | torch.device) -> torch.device:
    """A device that torch can compute on here.

    Raises:
        ConfigError: torch knows no such device, or this machine has none.
    """
    try:
        found = torch.device(device)
        if found.type == "cpu" and found.index:
            raise RuntimeError("there is one CPU")
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ConfigError(
            "no such device here",
            where="device",
            expected="cpu" + (", cuda" if torch.cuda.is_available() else ""),
            got=f"{device!r} ({str(error).splitlines()[0][:80]})",
        ) from error
    return found


def is_computed_elsewhere(tensor: Tensor) -> bool:
    """Whether a tensor lies on another device than the CPU, so that reading it waits for that."""
    return tensor.device.type != "cpu"

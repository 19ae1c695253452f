"""Which architecture a model is: equal for all weights, dtypes and adapters of it."""

from __future__ import annotations

import hashlib
import json

from torch import nn


def architecture_of(model: nn.Module) -> tuple[str, str]:
    """(class, fingerprint) of a model.

    That of a model of diffusers is of its configuration, so that adapters and quantized layers
    change nothing; else of the names and shapes of parameters.
    """
    config = getattr(model, "config", None)
    if isinstance(config, dict) and config:
        known = {k: v for k, v in config.items() if not k.startswith("_")}
    else:
        known = {name: list(p.shape) for name, p in model.named_parameters()}
    text = json.dumps(known, sort_keys=True, default=str)
    return type(model).__name__, hashlib.sha256(text.encode()).hexdigest()

"""What a model is by content: the same in every process that has an equal model.

`state_key` is quicker, and names parameters by identity. A fingerprint reads every weight once, and
on a GPU it waits for that.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toma_fx.capture.state_key import Opaque, state_key
from toma_fx.compat.pytorch import inner_tensors

CHANGED = "the model had changed, or was gone, before it was read"
SAMPLES = 256
"""Words of a tensor that are compared in their places."""


@dataclass(frozen=True)
class Fingerprint:
    """Digests of what a model is.

    Attributes:
        structure: modules, attributes and hooks; names, shapes and dtypes of tensors.
        weights: values of parameters and buffers.
        unknown: why there are no digests, if there are none.
    """

    structure: str = ""
    weights: str = ""
    unknown: str = ""

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """Read a model."""
        try:
            structure = state_key(model, local=False)
        except Opaque as error:
            return cls(unknown=str(error))
        return cls(structure, digest_weights(model))

    def difference(self, other: Fingerprint) -> str:
        """What tells two models apart, in words; "" for equal ones."""
        if self.unknown or other.unknown:
            return self.unknown or other.unknown
        if self.structure != other.structure:
            return "the models differ in modules, attributes, hooks or shapes of weights"
        return "" if self.weights == other.weights else "the models differ in weights"


def digest_weights(model: nn.Module) -> str:
    """Digest of the names and values of a model's parameters and buffers."""
    weights = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        weights.update(name.encode())
        _add(weights, tensor.detach())
    return weights.hexdigest()


def _add(digest: Any, tensor: Tensor) -> None:
    """Add a tensor: all its words in any order, and some of them in theirs."""
    inner = [x for x in inner_tensors(tensor) if isinstance(x, Tensor)]
    for x in inner:
        _add(digest, x)
    digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    if inner or not tensor.numel():
        return
    octets = tensor.contiguous().reshape(-1).view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()
    words = octets.view(next(kind for kind in _WORDS if len(octets) % kind.itemsize == 0))
    sample = words[:: max(1, len(words) // SAMPLES)]
    total = torch.hash_tensor(words).view(torch.int64)
    digest.update(repr((total.item(), sample.tolist())).encode())


_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)

"""Quantized layers that torch.export can't trace, as one operator each.

GGUF of diffusers and bitsandbytes keep packed weights in parameters of their own classes, with
Python attributes that say how to unpack them. torch.export traces plain tensors in their place, and
the attributes are gone. So a model is traced without the insides of such layers:

    to_q(x)  becomes  toma_fx.layer(x, number, features, dtype)    which runs to_q as it is

The operator is token-wise, as every linear layer, so tokens merge across it, and compilers call it.
It names a layer of this process: artifacts can't hold it.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from toma_fx.capture.attributes import is_opaque
from toma_fx.compat.pytorch import copy_with_children, module_tables
from toma_fx.methods.ops import LAYERS


def traceable(model: nn.Module) -> nn.Module:
    """The model with an operator for each opaque layer; itself if it has none.

    What is above such a layer is copied, all else is shared. The model is not changed.
    """
    return _replace(model, {})


def _replace(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    if id(module) in known:
        return known[id(module)]
    found: nn.Module = module
    if is_opaque(module):
        found = OneOperator(module)
    else:
        children = {k: c and _replace(c, known) for k, c in module_tables(module)[0].items()}
        if any(children[k] is not c for k, c in module_tables(module)[0].items()):
            found = copy_with_children(module, children)
            forward = vars(found).get("forward")
            if isinstance(forward, MethodType) and forward.__self__ is module:
                vars(found)["forward"] = MethodType(forward.__func__, found)
    known[id(module)] = found
    return found


class OneOperator(nn.Module):
    """Stands for a layer while the model around it is traced."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        vars(self)["layer"], self.number = layer, LAYERS.number_of(layer)
        self.features = layer.out_features

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["layer"], name)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., features], in the dtype that the layer gives."""
        dtype = self._dtype(x)
        result: Tensor = torch.ops.toma_fx.layer(x, self.number, self.features, dtype)
        return result

    def _dtype(self, x: Tensor) -> torch.dtype:
        """GGUF's layers leave results in the dtype that they compute in, bitsandbytes' in x's."""
        packed = hasattr(self.layer.weight, "quant_type") and hasattr(self.layer, "forward_native")
        return self.layer.compute_dtype if packed else x.dtype

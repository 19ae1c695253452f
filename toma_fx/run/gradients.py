"""Calls that ask for gradients: a graph with merging gives none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toma_fx.compat.pytorch import tree_leaves
from toma_fx.errors import GradientError


def needs_gradient(inputs: Any) -> bool:
    """Whether gradients are on and a tensor among nested inputs requires one."""
    return torch.is_grad_enabled() and any(
        isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(inputs)
    )


def refuse_gradient(inputs: Any, where: str, hint: str = "") -> None:
    """Raise for a call that asks for gradients, which would be lost.

    Args:
        inputs: of the call, nested. where: what is called. hint: how to get the gradient.

    Raises:
        GradientError: gradients are on, and an input requires one.
    """
    if needs_gradient(inputs):
        raise GradientError(
            "the call asks for gradients, and merged programs give none",
            where=where,
            expected="inputs that require no gradient, or torch.no_grad() around the call",
            got="an input with requires_grad=True while gradients are on",
            hint="; or ".join(filter(None, ["call it inside torch.no_grad()", hint])),
        )

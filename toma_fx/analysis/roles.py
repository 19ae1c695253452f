"""What the inputs of a denoiser mean to the run around it: the timestep, the picture, the rest.

Names tell where they are those of the field; else the graph does: a timestep is a number, or one a
row, whose sine or cosine is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from toma_fx.capture.model import Captured
from toma_fx.graph.nodes import (
    CASTS,
    CONDITIONING,
    COPIES,
    PICTURES,
    RESHAPES,
    TIMESTEPS,
    op_name,
)

_CARRYING = CASTS | COPIES | RESHAPES | {
    "aten.unsqueeze", "aten.squeeze", "aten.expand", "aten.repeat", "aten.flatten", "aten.slice",
    "aten.select", "aten.mul", "aten.div", "aten.add", "aten.sub", "aten.rsub", "aten.neg",
    "aten.log", "aten.atan", "aten.pow",
}  # fmt: skip
"""Ops on the way from a timestep to its embedding."""
_EMBEDDING = {"aten.sin", "aten.cos", "aten.embedding"}


@dataclass(frozen=True)
class Roles:
    """Roles of the inputs, by index.

    Attributes:
        timestep: tells how far a generation is; None if no input does.
        compared: inputs that stay the same in all steps of a pass, so that they tell it.
        conditioning: place of the text in `compared`; None if it is not known.
    """

    timestep: int | None = None
    compared: tuple[int, ...] = ()
    conditioning: int | None = None

    @classmethod
    def of_names(
        cls, names: Sequence[str], tensors: Sequence[bool], timestep: int | None = None
    ) -> Roles:
        """Roles by name.

        Args:
            names: of the arguments ("0": the first of those given by position).
            tensors: which are tensors of the call. timestep: which is the timestep, if known.
        """
        if timestep is None:
            timestep = _first_named(names, TIMESTEPS)
        rest = [i for i, is_tensor in enumerate(tensors) if is_tensor and i != timestep]
        picture = _first_named([names[i] for i in rest], PICTURES)
        taken = {rest[picture]} if picture is not None else set(rest[:1])
        compared = tuple(i for i in rest if i not in taken and not _is_residual(names[i]))
        text = [place for place, i in enumerate(compared) if names[i].endswith(CONDITIONING)]
        return cls(timestep, compared, text[0] if text else None)


def find_roles(captured: Captured) -> Roles:
    """Roles of the inputs of a captured graph."""
    names = [spec.argument or spec.name for spec in captured.inputs]
    tensors = [spec.tensor is not None for spec in captured.inputs]
    roles = Roles.of_names(names, tensors)
    if roles.timestep is not None:
        return roles
    nodes = captured.graph_module.graph.find_nodes(op="placeholder")
    embedded = (
        i
        for i, (node, spec) in enumerate(zip(nodes, captured.inputs, strict=True))
        if not spec.owned and spec.raster is None and "guidance" not in names[i]
        if _is_number(node.meta.get("val")) and _is_embedded(node)
    )
    return Roles.of_names(names, tensors, next(embedded, None))


def _is_number(value: Any) -> bool:
    """Whether a fake tensor is a number, or one a row."""
    return isinstance(value, Tensor) and value.numel() == (len(value) if value.dim() else 1)


def _is_residual(name: str) -> bool:
    """Whether an input comes from another network, anew at every step."""
    return "residual" in name or name.startswith("controlnet")


def _first_named(names: Sequence[str], known: Sequence[str]) -> int | None:
    found = (i for name in known for i, own in enumerate(names) if own in (name, f"{name}_0"))
    return next(found, None)


def _is_embedded(node: fx.Node) -> bool:
    """Whether a value's sine or cosine is taken, perhaps scaled, or it is looked up."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            name = op_name(user.target)
            if name in _EMBEDDING:
                return True
            if name in _CARRYING and user not in seen:
                seen.add(user)
                pending.append(user)
    return False

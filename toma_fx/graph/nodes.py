"""Reading FX nodes: operator names, shapes, module paths, classes of operators."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import fx

UNKNOWN = 2**40
"""Sizes from here on stand for what depends on the data (text without its padding, say)."""


ATTENTION = "aten.scaled_dot_product_attention"


SOFTMAX = ("aten.softmax", "aten._softmax")


CASTS = {"aten.to", "aten._to_copy"}


PRODUCTS = {"aten.matmul", "aten.mm", "aten.bmm", "aten.baddbmm", "aten.einsum"}


WEIGHTED = {"aten.linear", "aten._int_mm", "aten._scaled_mm"}
"""Products with a weight."""


READERS = {"aten.slice", "aten.split_with_sizes", "getitem", ATTENTION, "output"} | PRODUCTS
"""Ops that may read tokens of a region without carrying them: others cut off, or attending."""


SCALES = {"aten.mul", "aten.div", "aten.add", "aten.to", "aten.reshape", "aten.view"}
"""Ops that may stand between scores, their softmax and its use."""


COPIES = {"aten.contiguous", "aten.clone", "aten.alias", "aten.detach", "aten.dropout"}


def module_path(node: fx.Node) -> str:
    """Path of the module that produced a node ("" for the root)."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    return str(entries[-1][0]) if entries else ""


def op_name(target: Any) -> str:
    """ "aten.view" for `torch.ops.aten.view.default`; the name of a plain function otherwise."""
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[1]}"
    return getattr(target, "__name__", str(target))


def shape_of(value: Any) -> tuple[int, ...]:
    """Shape of a node's value; a size that depends on the data is some number over `UNKNOWN`."""
    return tuple(int_size(s) for s in value.meta["val"].shape)


def int_size(size: Any) -> int:
    """A size, perhaps a node's, as a number; equal numbers for equal expressions."""
    size = size.meta["val"] if isinstance(size, fx.Node) else size
    return size if isinstance(size, int) else UNKNOWN + zlib.crc32(str(size).encode())

"""Reading FX nodes: operator names, shapes, module paths, classes of operators."""

from __future__ import annotations

import zlib
from collections.abc import Collection
from typing import Any

from torch import fx

from toma_fx.compat.collectives import is_wait
from toma_fx.compat.pytorch import is_operator

UNKNOWN = 2**40
"""Sizes from here on stand for what depends on the data (text without its padding, say)."""


# A graph tells nearly all that is asked of it; what a call means, only names can tell. These are
# those of diffusers and of the field, and each is looked up once: at a model with other names less
# is known.
LATENTS = "hidden_states"
"""The packed input that holds the picture, where the text has as many tokens."""
PICTURES = ("sample", LATENTS, "x", "latents", "img", "0")
"""The argument that is another one at every step, the likelier name first."""
TIMESTEPS = ("timestep", "timesteps", "t", "timestep_ratio", "time", "sigma", "sigmas")
"""The argument that tells how far a generation is, the likelier name first."""
CONDITIONING = "encoder_hidden_states"
"""The argument whose tensor stays the same through a generation."""
ATTENTION = "aten.scaled_dot_product_attention"
SOFTMAX = ("aten.softmax", "aten._softmax")
CASTS = {"aten.to", "aten._to_copy"}
COPIES = {"aten.contiguous", "aten.clone", "aten.alias", "aten.detach", "aten.lift_fresh_copy"}
"""Ops that return what they are given."""
RESHAPES = {"aten.view", "aten.reshape", "aten._unsafe_view", "aten.view_copy"}
JOINS = {"aten.cat", "aten.concat", "aten.concatenate"}
REDUCTIONS = {
    "aten.mean", "aten.sum", "aten.amax", "aten.amin", "aten.var", "aten.std",
    "aten.linalg_vector_norm",
}  # fmt: skip
PACKED = {
    "aten._weight_int8pack_mm", "aten._weight_int4pack_mm", "aten._weight_int4pack_mm_for_cpu",
}  # fmt: skip
"""Products of [N, C] with a weight that is packed in a layout of its own."""
LINEAR_LAYERS = frozenset({"bitsandbytes.gemm_4bit", "quanto.qbytes_mm", "toma_fx.layer"})
"""Operators of other libraries that are a linear layer of tokens [..., C], and this one's."""
WEIGHTED = {"aten.linear", "aten._int_mm", "aten._scaled_mm"}
"""Products with a weight."""
PRODUCTS = {"aten.matmul", "aten.mm", "aten.bmm", "aten.baddbmm", "aten.einsum"}
"""Products that may be those of an attention."""
CONVOLUTIONS = {"aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution"}
READERS = {"aten.slice", "aten.split_with_sizes", "getitem", ATTENTION, "output"} | PRODUCTS
"""Ops that may read tokens of a region without carrying them: others cut off, or attending.

(The rules of `narrow`, `chunk` and `split` refuse to cut a token axis.)
"""
SCALES = {"aten.mul", "aten.div", "aten.add"} | CASTS | COPIES | RESHAPES
"""Ops that may stand between scores, their softmax and its use."""
DROPOUTS = {
    "aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.feature_alpha_dropout",
    "aten.native_dropout",
}  # fmt: skip
"""Ops (x, p, train) that drop elements, or channels, in training mode."""


def module_path(node: fx.Node) -> str:
    """Path of the module that produced a node ("" for the root)."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    return str(entries[-1][0]) if entries else ""


def source_line(node: fx.Node) -> str:
    """The line of Python that a node is from, outside of torch: "model.py:12 x = f(x)"; or ""."""
    frames = str(node.meta.get("stack_trace") or "").strip().split("File ")[1:]
    own = [frame for frame in frames if "/torch/" not in frame.partition(",")[0]]
    if not own:
        return ""
    place, _, code = own[-1].strip().partition("\n")
    path, _, rest = place.partition(", line ")
    number = rest.partition(",")[0]
    return f"{path.strip(chr(34)).rpartition('/')[2]}:{number} {code.strip()}".strip()


def op_name(target: Any) -> str:
    """ "aten.view" for `torch.ops.aten.view.default`; the name of a plain function otherwise."""
    if is_operator(target):
        return str(target).rpartition(".")[0]
    return getattr(target, "__name__", str(target))


def shape_of(value: Any) -> tuple[int, ...]:
    """Shape of a node's value; a size that depends on the data is some number over `UNKNOWN`."""
    return tuple(int_size(s) for s in value.meta["val"].shape)


def int_size(size: Any) -> int:
    """A size, perhaps a node's, as a number; equal numbers for equal expressions."""
    size = size.meta["val"] if isinstance(size, fx.Node) else size
    return size if isinstance(size, int) else UNKNOWN + zlib.crc32(str(size).encode())


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Positional or keyword argument of a call."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def is_inactive_dropout(node: fx.Node) -> bool:
    """Whether a node is dropout in evaluation mode, which is the identity."""
    return _is_call(node, DROPOUTS) and argument(node, 2, "train") is False


def is_dead(node: fx.Node) -> bool:
    """Whether nothing reads a node and it has no side effect.

    torch tags attention and dropout as random even where no element is dropped, and its own dead
    code elimination keeps what is random: erasing that would change the random numbers to come.
    Collectives may go, as they go in the program of every process.
    """
    attention = _is_call(node, {ATTENTION}) and not argument(node, 4, "dropout_p", 0.0)
    random = not (attention or is_inactive_dropout(node))
    impure = node.is_impure(impure_random=random) and not is_wait(node.target)
    return not node.users and not impure


def _is_call(node: fx.Node, ops: Collection[str]) -> bool:
    return node.op == "call_function" and op_name(node.target) in ops

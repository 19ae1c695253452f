"""The passes that bring a graph to canonical form: before and after, twins that stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.graphs import apply, graph_of, text
from toma_fx.capture import canonical
from toma_fx.capture.canonical import (
    DropUnusedAddend,
    EraseAssertions,
    EraseDropout,
    InlineAutocast,
    JoinPadding,
    JoinWrites,
    NameDtypes,
    ShareShapeOps,
    SkipCopies,
)
from toma_fx.capture.model import capture
from toma_fx.capture.pieces import FoldSlices, JoinPieces
from toma_fx.capture.reshapes import SplitReshapes
from toma_fx.errors import VerifyError
from toma_fx.graph.passes import EraseDead, Pass
from toma_fx.graph.rewriter import Rewriter
from toma_fx.graph.specs import CAPTURED
from toma_fx.graph.verify import verify

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
HALF = X[:, :3]
MASK = torch.tensor([True, True, False, True])


@dataclass(frozen=True)
class Rewrite:
    """Passes and a function on whose graph they act; a graph as text, before and after."""

    passes: tuple[Pass, ...]
    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    before: str
    after: str


def modulated_in_pieces(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The first tokens by one vector, the others by another; one shift for all."""
    n = torch.cat([x[:, :1] * (1 + u[None]) + v, x[:, 1:] * (1 + v[None]) + v], 1)
    return torch.cat([x[:, :1] + n[:, :1] * u[None, None], x[:, 1:] + n[:, 1:] * v[None, None]], 1)


def without_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y = x * 2
        with torch.autocast("cpu", enabled=False):
            y = y + x
    return y + 1


def every_dropout(x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.feature_alpha_dropout(F.alpha_dropout(F.dropout(x, 0.5, False), 0.5, False), 0.5, False)
    y, mask = torch.native_dropout(torch.feature_dropout(y, 0.5, False), 0.5, False)
    return y + 1, mask


def write(x: Tensor, y: Tensor) -> Tensor:
    z = x + 1
    z[:, 1:4] = y
    return z


def write_all(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :3] = y
    out[:, 3:] = z
    return out


def write_transposed(x: Tensor, y: Tensor) -> Tensor:
    z = x.transpose(0, 1).sin()  # keeps the strides of its operand, [1, 6], as writes into it do
    z[:3] = y
    return z.transpose(0, 1).view(12)


def pad(x: Tensor, mask: Tensor) -> Tensor:
    n = mask.sum().item()
    torch._check(n >= 0)
    torch._check(n <= 6)
    return F.pad(x[:, :n], (0, 6 - n))


def same_shapes(x: Tensor) -> Tensor:
    return x.unsqueeze(0) + x.unsqueeze(0) + x.view(3, 4).sum() + x.view(3, -1).sum()


def slices_of_transposed(x: Tensor) -> Tensor:
    parts = x.transpose(0, 1)[:2], x.transpose(0, 1)[2:]
    return torch.cat(parts).view(12) + 1


def unused(x: Tensor) -> Tensor:
    F.scaled_dot_product_attention(x[None], x[None], x[None])
    F.dropout(x, 0.5, False)
    return x + 1


REWRITES = {
    "autocast": Rewrite(
        (InlineAutocast(), EraseDead()),
        without_autocast,
        (X,),
        """\
add: (float32[2, 6]) = wrap_with_autocast(cpu, torch.bfloat16, False, False, submod_3, x_0)
getitem: float32[2, 6] = getitem(add, 0)
add_1: float32[2, 6] = aten.add.Tensor(getitem, 1)
return (add_1)""",
        """\
mul: float32[2, 6] = aten.mul.Tensor(x_0, 2)
add_2: float32[2, 6] = aten.add.Tensor(mul, x_0)
add_1: float32[2, 6] = aten.add.Tensor(add_2, 1)
return (add_1)""",
    ),
    "assertion": Rewrite(
        (EraseAssertions(),),
        lambda x: x.to(torch.float64) + 1,
        (X,),
        """\
_assert_tensor_metadata_default = aten._assert_tensor_metadata(x_0, dtype=torch.float32, device=cpu, layout=torch.strided)
to: float64[2, 6] = aten.to.dtype(x_0, torch.float64)
add: float64[2, 6] = aten.add.Tensor(to, 1)
return (add)""",  # noqa: E501
        """\
to: float64[2, 6] = aten.to.dtype(x_0, torch.float64)
add: float64[2, 6] = aten.add.Tensor(to, 1)
return (add)""",
    ),
    "dropout": Rewrite(
        (EraseDropout(),),
        every_dropout,
        (X,),
        """\
dropout: float32[2, 6] = aten.dropout(x_0, 0.5, False)
alpha_dropout: float32[2, 6] = aten.alpha_dropout(dropout, 0.5, False)
feature_alpha_dropout: float32[2, 6] = aten.feature_alpha_dropout(alpha_dropout, 0.5, False)
feature_dropout: float32[2, 6] = aten.feature_dropout(feature_alpha_dropout, 0.5, False)
native_dropout: (float32[2, 6], bool[2, 6]) = aten.native_dropout(feature_dropout, 0.5, False)
getitem: float32[2, 6] = getitem(native_dropout, 0)
getitem_1: bool[2, 6] = getitem(native_dropout, 1)
add: float32[2, 6] = aten.add.Tensor(getitem, 1)
return (add, getitem_1)""",
        """\
native_dropout: (float32[2, 6], bool[2, 6]) = aten.native_dropout(x_0, 0.5, False)
getitem_1: bool[2, 6] = getitem(native_dropout, 1)
add: float32[2, 6] = aten.add.Tensor(x_0, 1)
return (add, getitem_1)""",
    ),
    "copy": Rewrite(
        (SkipCopies(),),
        write,
        (X, HALF),
        """\
add: float32[2, 6] = aten.add.Tensor(x_0, 1)
slice_1: float32[2, 3] = aten.slice.Tensor(add, 1, 1, 4)
copy: float32[2, 3] = aten.copy(slice_1, x_1)
slice_scatter: float32[2, 6] = aten.slice_scatter(add, copy, 1, 1, 4)
return (slice_scatter)""",
        """\
add: float32[2, 6] = aten.add.Tensor(x_0, 1)
slice_1: float32[2, 3] = aten.slice.Tensor(add, 1, 1, 4)
slice_scatter: float32[2, 6] = aten.slice_scatter(add, x_1, 1, 1, 4)
return (slice_scatter)""",
    ),
    "type_as": Rewrite(
        (NameDtypes(),),
        lambda x, y: x.type_as(y),
        (X, X.double()),
        """\
type_as: float64[2, 6] = aten.type_as(x_0, x_1)
return (type_as)""",
        """\
to_dtype: float64[2, 6] = aten.to.dtype(x_0, torch.float64)
return (to_dtype)""",
    ),
    "heads joined as a picture": Rewrite(
        (SplitReshapes(), EraseDead()),
        lambda x: x.reshape(2, 2, 2, 6),
        (X.view(2, 1, 6).expand(2, 4, 6).unflatten(2, (2, 3)),),
        """\
reshape: float32[2, 2, 2, 6] = aten.reshape(x_0, [2, 2, 2, 6])
return (reshape)""",
        """\
reshape_default: float32[2, 4, 6] = aten.reshape(x_0, [2, 4, 6])
view_default: float32[2, 2, 2, 6] = aten.view(reshape_default, [2, 2, 2, 6])
return (view_default)""",
    ),
    "padding": Rewrite(
        (EraseAssertions(), JoinPadding()),
        pad,
        (X, MASK),
        """\
sum_1: int64[] = aten.sum(x_1)
item: SymInt = aten.item(sum_1)
ge_1: SymBool = ge(item, 0)
_assert_scalar_default = aten._assert_scalar(ge_1, Runtime assertion failed for expression u0 >= 0 on node 'ge_1')
le_1: SymBool = le(item, 6)
_assert_scalar_default_1 = aten._assert_scalar(le_1, Runtime assertion failed for expression u0 <= 6 on node 'le_1')
slice_1: float32[2, u0] = aten.slice.Tensor(x_0, 1, None, item)
sub: SymInt = sub(6, item)
pad: float32[2, 6] = aten.pad(slice_1, [0, sub])
return (pad)""",  # noqa: E501
        """\
sum_1: int64[] = aten.sum(x_1)
item: SymInt = aten.item(sum_1)
ge_1: SymBool = ge(item, 0)
_assert_scalar_default = aten._assert_scalar(ge_1, Runtime assertion failed for expression u0 >= 0 on node 'ge_1')
le_1: SymBool = le(item, 6)
_assert_scalar_default_1 = aten._assert_scalar(le_1, Runtime assertion failed for expression u0 <= 6 on node 'le_1')
slice_1: float32[2, u0] = aten.slice.Tensor(x_0, 1, None, item)
sub: SymInt = sub(6, item)
full_default: float32[2, 6 - u0] = aten.full([2, sub], 0.0, dtype=torch.float32, device=cpu)
cat_default: float32[2, 6] = aten.cat([slice_1, full_default], 1)
return (cat_default)""",  # noqa: E501
    ),
    "write": Rewrite(
        (SkipCopies(), JoinWrites(), EraseDead()),
        write,
        (X, HALF),
        """\
add: float32[2, 6] = aten.add.Tensor(x_0, 1)
slice_1: float32[2, 3] = aten.slice.Tensor(add, 1, 1, 4)
copy: float32[2, 3] = aten.copy(slice_1, x_1)
slice_scatter: float32[2, 6] = aten.slice_scatter(add, copy, 1, 1, 4)
return (slice_scatter)""",
        """\
add: float32[2, 6] = aten.add.Tensor(x_0, 1)
slice_tensor: float32[2, 1] = aten.slice.Tensor(add, 1, 0, 1)
slice_tensor_1: float32[2, 2] = aten.slice.Tensor(add, 1, 4, 6)
cat_default: float32[2, 6] = aten.cat([slice_tensor, x_1, slice_tensor_1], 1)
return (cat_default)""",
    ),
    "writes": Rewrite(
        (SkipCopies(), JoinWrites(), EraseDead()),
        write_all,
        (X, HALF, 2 * HALF),
        """\
zeros_like: float32[2, 6] = aten.zeros_like(x_0, pin_memory=False)
slice_1: float32[2, 3] = aten.slice.Tensor(zeros_like, 1, 0, 3)
copy: float32[2, 3] = aten.copy(slice_1, x_1)
slice_scatter: float32[2, 6] = aten.slice_scatter(zeros_like, copy, 1, 0, 3)
slice_4: float32[2, 3] = aten.slice.Tensor(slice_scatter, 1, 3, 9223372036854775807)
copy_1: float32[2, 3] = aten.copy(slice_4, x_2)
slice_scatter_1: float32[2, 6] = aten.slice_scatter(slice_scatter, copy_1, 1, 3, 9223372036854775807)
return (slice_scatter_1)""",  # noqa: E501
        """\
cat_default_1: float32[2, 6] = aten.cat([x_1, x_2], 1)
return (cat_default_1)""",
    ),
    "write with strides": Rewrite(
        (SkipCopies(), JoinWrites(), EraseDead()),
        write_transposed,
        (X, X[:, :3].T),
        """\
transpose: float32[6, 2] = aten.transpose.int(x_0, 0, 1)
sin: float32[6, 2] = aten.sin(transpose)
slice_1: float32[3, 2] = aten.slice.Tensor(sin, 0, 0, 3)
copy: float32[3, 2] = aten.copy(slice_1, x_1)
slice_scatter: float32[6, 2] = aten.slice_scatter(sin, copy, 0, 0, 3)
transpose_3: float32[2, 6] = aten.transpose.int(slice_scatter, 0, 1)
view_1: float32[12] = aten.view(transpose_3, [12])
return (view_1)""",
        """\
transpose: float32[6, 2] = aten.transpose.int(x_0, 0, 1)
sin: float32[6, 2] = aten.sin(transpose)
slice_tensor: float32[3, 2] = aten.slice.Tensor(sin, 0, 3, 6)
cat_default: float32[6, 2] = aten.cat([x_1, slice_tensor], 0)
transpose_3: float32[2, 6] = aten.transpose.int(cat_default, 0, 1)
view_1: float32[12] = aten.reshape(transpose_3, [12])
return (view_1)""",
    ),
    "baddbmm": Rewrite(
        (DropUnusedAddend(),),
        lambda x, a, b: torch.baddbmm(x, a, b, beta=0, alpha=0.5),
        (torch.zeros(2, 3, 4), X.view(2, 3, 2), X[:, None, :4].expand(2, 2, 4)),
        """\
baddbmm: float32[2, 3, 4] = aten.baddbmm(x_0, x_1, x_2, beta=0, alpha=0.5)
return (baddbmm)""",
        """\
empty_memory_format: float32[1, 1, 1] = aten.empty.memory_format([1, 1, 1], dtype=torch.float32, device=cpu)
baddbmm: float32[2, 3, 4] = aten.baddbmm(empty_memory_format, x_1, x_2, beta=0, alpha=0.5)
return (baddbmm)""",  # noqa: E501
    ),
    "dead": Rewrite(
        (EraseDead(),),
        unused,
        (X,),
        """\
unsqueeze: float32[1, 2, 6] = aten.unsqueeze(x_0, 0)
unsqueeze_1: float32[1, 2, 6] = aten.unsqueeze(x_0, 0)
unsqueeze_2: float32[1, 2, 6] = aten.unsqueeze(x_0, 0)
scaled_dot_product_attention: float32[1, 2, 6] = aten.scaled_dot_product_attention(unsqueeze, unsqueeze_1, unsqueeze_2)
dropout: float32[2, 6] = aten.dropout(x_0, 0.5, False)
add: float32[2, 6] = aten.add.Tensor(x_0, 1)
return (add)""",  # noqa: E501
        """\
add: float32[2, 6] = aten.add.Tensor(x_0, 1)
return (add)""",
    ),
    "shape ops": Rewrite(
        (ShareShapeOps(),),
        same_shapes,
        (X,),
        """\
unsqueeze: float32[1, 2, 6] = aten.unsqueeze(x_0, 0)
unsqueeze_1: float32[1, 2, 6] = aten.unsqueeze(x_0, 0)
add: float32[1, 2, 6] = aten.add.Tensor(unsqueeze, unsqueeze_1)
view: float32[3, 4] = aten.view(x_0, [3, 4])
sum_1: float32[] = aten.sum(view)
add_1: float32[1, 2, 6] = aten.add.Tensor(add, sum_1)
view_1: float32[3, 4] = aten.view(x_0, [3, -1])
sum_2: float32[] = aten.sum(view_1)
add_2: float32[1, 2, 6] = aten.add.Tensor(add_1, sum_2)
return (add_2)""",
        """\
unsqueeze: float32[1, 2, 6] = aten.unsqueeze(x_0, 0)
add: float32[1, 2, 6] = aten.add.Tensor(unsqueeze, unsqueeze)
view: float32[3, 4] = aten.view(x_0, [3, 4])
sum_1: float32[] = aten.sum(view)
add_1: float32[1, 2, 6] = aten.add.Tensor(add, sum_1)
sum_2: float32[] = aten.sum(view)
add_2: float32[1, 2, 6] = aten.add.Tensor(add_1, sum_2)
return (add_2)""",
    ),
    "slices": Rewrite(
        (ShareShapeOps(), FoldSlices(), EraseDead()),
        slices_of_transposed,
        (X,),
        """\
transpose: float32[6, 2] = aten.transpose.int(x_0, 0, 1)
slice_1: float32[2, 2] = aten.slice.Tensor(transpose, 0, 0, 2)
transpose_1: float32[6, 2] = aten.transpose.int(x_0, 0, 1)
slice_2: float32[4, 2] = aten.slice.Tensor(transpose_1, 0, 2, 9223372036854775807)
cat: float32[6, 2] = aten.cat([slice_1, slice_2])
view: float32[12] = aten.view(cat, [12])
add: float32[12] = aten.add.Tensor(view, 1)
return (add)""",
        """\
transpose: float32[6, 2] = aten.transpose.int(x_0, 0, 1)
view: float32[12] = aten.reshape(transpose, [12])
add: float32[12] = aten.add.Tensor(view, 1)
return (add)""",
    ),
    "pieces": Rewrite(
        (ShareShapeOps(), JoinPieces(), EraseDead()),
        modulated_in_pieces,
        (X.view(1, 4, 3), X[0, :3], X[1, :3]),
        """\
slice_1: float32[1, 1, 3] = aten.slice.Tensor(x_0, 1, 0, 1)
unsqueeze: float32[1, 3] = aten.unsqueeze(x_1, 0)
add: float32[1, 3] = aten.add.Tensor(unsqueeze, 1)
mul: float32[1, 1, 3] = aten.mul.Tensor(slice_1, add)
add_1: float32[1, 1, 3] = aten.add.Tensor(mul, x_2)
slice_2: float32[1, 3, 3] = aten.slice.Tensor(x_0, 1, 1, 9223372036854775807)
unsqueeze_1: float32[1, 3] = aten.unsqueeze(x_2, 0)
add_2: float32[1, 3] = aten.add.Tensor(unsqueeze_1, 1)
mul_1: float32[1, 3, 3] = aten.mul.Tensor(slice_2, add_2)
add_3: float32[1, 3, 3] = aten.add.Tensor(mul_1, x_2)
cat: float32[1, 4, 3] = aten.cat([add_1, add_3], 1)
slice_3: float32[1, 1, 3] = aten.slice.Tensor(x_0, 1, 0, 1)
slice_4: float32[1, 1, 3] = aten.slice.Tensor(cat, 1, 0, 1)
unsqueeze_2: float32[1, 3] = aten.unsqueeze(x_1, 0)
unsqueeze_3: float32[1, 1, 3] = aten.unsqueeze(unsqueeze_2, 1)
mul_2: float32[1, 1, 3] = aten.mul.Tensor(slice_4, unsqueeze_3)
add_4: float32[1, 1, 3] = aten.add.Tensor(slice_3, mul_2)
slice_5: float32[1, 3, 3] = aten.slice.Tensor(x_0, 1, 1, 9223372036854775807)
slice_6: float32[1, 3, 3] = aten.slice.Tensor(cat, 1, 1, 9223372036854775807)
unsqueeze_4: float32[1, 3] = aten.unsqueeze(x_2, 0)
unsqueeze_5: float32[1, 1, 3] = aten.unsqueeze(unsqueeze_4, 1)
mul_3: float32[1, 3, 3] = aten.mul.Tensor(slice_6, unsqueeze_5)
add_5: float32[1, 3, 3] = aten.add.Tensor(slice_5, mul_3)
cat_1: float32[1, 4, 3] = aten.cat([add_4, add_5], 1)
return (cat_1)""",
        """\
unsqueeze: float32[1, 3] = aten.unsqueeze(x_1, 0)
add: float32[1, 3] = aten.add.Tensor(unsqueeze, 1)
unsqueeze_1: float32[1, 3] = aten.unsqueeze(x_2, 0)
add_2: float32[1, 3] = aten.add.Tensor(unsqueeze_1, 1)
expand_default: float32[1, 3] = aten.expand(add, [1, 3])
expand_default_1: float32[3, 3] = aten.expand(add_2, [3, 3])
cat_default: float32[4, 3] = aten.cat([expand_default, expand_default_1], -2)
mul_tensor: float32[1, 4, 3] = aten.mul.Tensor(x_0, cat_default)
add_tensor: float32[1, 4, 3] = aten.add.Tensor(mul_tensor, x_2)
unsqueeze_3: float32[1, 1, 3] = aten.unsqueeze(unsqueeze, 1)
unsqueeze_5: float32[1, 1, 3] = aten.unsqueeze(unsqueeze_1, 1)
expand_default_2: float32[1, 1, 3] = aten.expand(unsqueeze_3, [1, 1, 3])
expand_default_3: float32[1, 3, 3] = aten.expand(unsqueeze_5, [1, 3, 3])
cat_default_1: float32[1, 4, 3] = aten.cat([expand_default_2, expand_default_3], -2)
mul_tensor_1: float32[1, 4, 3] = aten.mul.Tensor(add_tensor, cat_default_1)
add_tensor_1: float32[1, 4, 3] = aten.add.Tensor(x_0, mul_tensor_1)
return (add_tensor_1)""",
    ),
}


@pytest.mark.parametrize("name", REWRITES)
@torch.no_grad()
def test_graph_before_and_after(name: str) -> None:
    """The text of both graphs, and results that are equal bit by bit."""
    case = REWRITES[name]
    graph_module = graph_of(case.function, *case.inputs)
    assert text(graph_module).splitlines() == case.before.splitlines()
    after, _ = apply(graph_module, case.passes)
    assert text(after).splitlines() == case.after.splitlines()
    for got, want in zip(after(*case.inputs), graph_module(*case.inputs), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


PIECES = X.view(1, 4, 3)


def with_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = x @ x.T
    return y + 1


def autocast_inside(x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y = x * 2
        with torch.autocast("cpu", torch.bfloat16):
            y = y @ x.T
    return y + 1


def write_every_second(x: Tensor, y: Tensor) -> Tensor:
    z = x + 1
    z[:, ::2] = y
    return z


def draws(x: Tensor) -> Tensor:
    F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5)
    F.dropout(x, 0.5, True)
    torch.rand_like(x)
    return x + 1


def padded_in_front(x: Tensor, mask: Tensor) -> Tensor:
    n = mask.sum().item()
    torch._check(n >= 0)
    torch._check(n <= 6)
    return F.pad(x[:, :n], (6 - n, 0))


def used_piece(x: Tensor) -> tuple[Tensor, Tensor]:
    first = x[:, :1] * 2
    return torch.cat([first, x[:, 1:] * 2], 1), first


TWINS: dict[str, tuple[str, Pass, Callable[..., Any], tuple[Tensor, ...]]] = {
    "autocast on": ("wrap_with_autocast", InlineAutocast(), with_autocast, (X,)),
    "autocast on inside": ("wrap_with_autocast", InlineAutocast(), autocast_inside, (X,)),
    "assertion on data": ("aten._assert_scalar", EraseAssertions(), pad, (X, MASK)),
    "active dropout": ("aten.dropout", EraseDropout(), lambda x: F.dropout(x, 0.5, True), (X,)),
    "casting copy": ("aten.copy", SkipCopies(), write, (X, HALF.double())),
    "fixed padding": ("aten.pad", JoinPadding(), lambda x: F.pad(x, (0, 2)), (X,)),
    "padding in front": ("aten.pad", JoinPadding(), padded_in_front, (X, MASK)),
    "write with a step": ("aten.slice_scatter", JoinWrites(), write_every_second, (X, HALF)),
    "addend that counts": (
        "aten.baddbmm",
        DropUnusedAddend(),
        lambda x, a, b: torch.baddbmm(x, a, b, beta=0.5),
        (torch.zeros(2, 3, 3), X.view(2, 3, 2), X.view(2, 2, 3)),
    ),
    "random numbers": ("aten.rand_like", EraseDead(), draws, (X,)),
    "other shapes": (
        "aten.view", ShareShapeOps(), lambda x: x.view(3, 4).sum() + x.view(4, 3).sum(), (X,)
    ),
    "slices in another order": (
        "aten.cat", FoldSlices(), lambda x: torch.cat([x[:, 2:], x[:, :2]], 1), (X,)
    ),
    "slices along another dimension": (
        "aten.cat", FoldSlices(), lambda x: torch.cat([x[:, :2], x[:, 2:4]], 0), (X,)
    ),
    "slices with a gap": (
        "aten.cat", FoldSlices(), lambda x: torch.cat([x[:, :2], x[:, 3:]], 1), (X,)
    ),
    "slices of a part": (
        "aten.cat", FoldSlices(), lambda x: torch.cat([x[:, :2], x[:, 2:4]], 1), (X,)
    ),
    "pieces of features": (
        "aten.cat", JoinPieces(), lambda x: torch.cat([x[:, :2] * 2, x[:, 2:] * 2], 1), (X,)
    ),
    "pieces by different factors": (
        "aten.cat", JoinPieces(), lambda x: torch.cat([x[:, :1] * 2, x[:, 1:] * 3], 1), (PIECES,)
    ),
    "pieces by different ops": (
        "aten.cat", JoinPieces(), lambda x: torch.cat([x[:, :1] * 2, x[:, 1:] / 2], 1), (PIECES,)
    ),
    "pieces by an op that may round otherwise": (
        "aten.cat",
        JoinPieces(),
        lambda x: torch.cat([x[:, :1].exp(), x[:, 1:].exp()], 1),
        (PIECES,),
    ),
    "pieces in another order": (
        "aten.cat", JoinPieces(), lambda x: torch.cat([x[:, 1:] * 2, x[:, :1] * 2], 1), (PIECES,)
    ),
    "a piece that is used": (
        "aten.cat", JoinPieces(), used_piece, (PIECES,)
    ),
    "a reshape that splits alone": (
        "aten.view", SplitReshapes(), lambda x: x.view(2, 2, 3), (X,)
    ),
    "a reshape that cuts across": (
        "aten.view", SplitReshapes(), lambda x: x.view(3, 2, 2), (X,)
    ),
    "pieces of two types": (
        "aten.cat",
        JoinPieces(),
        lambda x, y: torch.cat([x[:, :1] * y[0], x[:, 1:] * y[0].double()], 1),
        (PIECES, X[:, :3]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
@torch.no_grad()
def test_twins_stay_as_they_are(name: str) -> None:
    """What looks alike and means something else is there before, and unchanged after."""
    op, step, function, inputs = TWINS[name]
    graph_module = graph_of(function, *inputs)
    after, rewriter = apply(graph_module, [step])
    assert rewriter.calls(op), "the graph holds what it should"
    assert text(after) == text(graph_module)
    assert rewriter.log == [(step.name, "changed nothing", "")]


def test_every_pass_has_a_graph_before_and_after() -> None:
    shown = {step.name for case in REWRITES.values() for step in case.passes}
    assert shown == {step.name for step in canonical.PASSES} - {"flatten_signature"}
    refused = {step.name for _, step, _, _ in TWINS.values()}
    assert refused == shown - {"name_dtypes"}, "type_as has no twin: it reads a dtype and no more"


def test_the_signature_becomes_flat() -> None:
    """Inputs and outputs in containers become tuples; constants stay."""

    class Nested(torch.nn.Module):
        def forward(self, x: Tensor, options: dict[str, Any]) -> dict[str, Any]:
            return {"x": x * options["scale"], "rest": [x + 1, None]}

    captured = capture(Nested().eval(), (), {"x": X, "options": {"scale": X}})
    assert [i.name for i in captured.inputs] == ["options_scale", "x"]
    out = captured.graph_module(X, X)
    assert isinstance(out, tuple)
    assert torch.equal(out[0], X * X)
    assert torch.equal(out[1], X + 1)
    assert out[2] is None


def test_strides_are_recorded_anew() -> None:
    """A join is contiguous where a write keeps the strides of its base; views that no longer hold
    become reshapes, and only these.
    """
    graph_module = graph_of(write_transposed, X, X[:, :3].T)
    passes = REWRITES["write with strides"].passes
    after, rewriter = apply(graph_module, passes)
    old, new = Rewriter(graph_module).index()["transpose_3"], rewriter.index()["transpose_3"]
    assert old.meta["val"].stride() == (6, 1), "the base's"
    assert new.meta["val"].stride() == (1, 2), "the join's"
    assert text(after).count("aten.reshape") == 1
    new.meta["val"] = old.meta["val"]
    with pytest.raises(VerifyError, match="strides are stale"):
        verify(after, rewriter.inputs, rewriter.outputs, "test")


def test_a_captured_graph_fits_its_spec() -> None:
    """A graph with everything that the passes remove does not fit before, and does after."""

    def everything(x: Tensor) -> Tensor:
        return F.dropout(without_autocast(x), 0.5, False).to(torch.float64).type_as(x)

    raw = graph_of(everything, X)
    steps: list[Pass] = []
    reasons = {
        "dropout in evaluation mode": EraseDropout(),
        "pins token counts": EraseAssertions(),
        "hides a dtype": NameDtypes(),
    }
    for reason, step in reasons.items():
        with pytest.raises(VerifyError, match=reason) as caught:
            CAPTURED.check(apply(raw, steps)[0].graph, "stage")
        assert caught.value.where.startswith("stage: %")
        steps.append(step)
    CAPTURED.check(apply(raw, canonical.PASSES[1:])[0].graph, "stage")

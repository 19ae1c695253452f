"""Classes of operators: one place for each, and FLOPs that agree with torch's own count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import toma_fx.analysis.rules.apply  # noqa: F401  (registers the rules)
from tests.graphs import graph_of
from toma_fx.analysis.rules.base import RULES
from toma_fx.analysis.streams import PROLOGUE, UNFOLD
from toma_fx.graph import nodes
from toma_fx.graph.flops import _COUNTED, _MULTIPLIES, find_uncounted, graph_flops, node_flops
from toma_fx.graph.rewriter import Rewriter

CLASSES = {name: value for name, value in vars(nodes).items() if name.isupper()}
ARGUMENTS = ("PICTURES", "TIMESTEPS")
TABLES = [
    name
    for name, value in CLASSES.items()
    if isinstance(value, (set, tuple)) and name not in ARGUMENTS
]
aten = torch.ops.aten


@pytest.mark.parametrize("name", TABLES)
def test_every_name_is_an_operator(name: str) -> None:
    for op in set(CLASSES[name]) - {"getitem", "output"}:
        assert op.startswith("aten."), op
        assert hasattr(aten, op.removeprefix("aten.")), op


@pytest.mark.parametrize("name", ["COPIES", "RESHAPES", "JOINS", "REDUCTIONS", "SOFTMAX"])
def test_a_class_has_one_rule(name: str) -> None:
    assert len(CLASSES[name]) > 1
    assert len({RULES[op] for op in CLASSES[name]}) == 1
    assert RULES["aten.to"] is RULES["aten._to_copy"] is RULES["aten.clone"]


def test_tables_hold_whole_classes() -> None:
    """What is a copy or a cast in one place is one everywhere."""
    for table in (PROLOGUE, nodes.SCALES):
        assert table >= nodes.COPIES | nodes.CASTS
    assert PROLOGUE >= nodes.JOINS | nodes.REDUCTIONS
    assert nodes.SCALES >= nodes.RESHAPES
    assert UNFOLD >= nodes.RESHAPES


# -- FLOPs ----------------------------------------------------------------------------------------

X, Y = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
PICTURE = torch.randn(2, 4, 6, 6)
COUNTED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "linear": (F.linear, (X, torch.randn(7, 4), torch.randn(7))),
    "matmul": (torch.matmul, (X[:, None], Y[:, None])),
    "mm": (torch.mm, (X[0], Y[0])),
    "bmm": (torch.bmm, (X, Y)),
    "addmm": (torch.addmm, (torch.randn(5), X[0], Y[0])),
    "baddbmm": (lambda x, a, b: torch.baddbmm(x, a, b, beta=0), (torch.zeros(2, 3, 5), X, Y)),
    "conv1d": (F.conv1d, (torch.randn(2, 4, 9), torch.randn(6, 2, 3), None, 1, 1, 1, 2)),
    "conv2d": (F.conv2d, (PICTURE, torch.randn(8, 4, 3, 3))),
    "conv_transpose1d": (F.conv_transpose1d, (torch.randn(2, 4, 9), torch.randn(4, 3, 2), None, 2)),
    "convolution": (
        aten.convolution,
        (PICTURE, torch.randn(4, 3, 2, 2), None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1),
    ),
    "conv_transpose2d": (F.conv_transpose2d, (PICTURE, torch.randn(4, 3, 2, 2), None, 2)),
    "einsum": (lambda a, b: torch.einsum("bid,bdj->bij", a, b), (X, Y)),
}  # fmt: skip
EINSUMS = {
    "bid,bjd->bij": ((2, 3, 4), (2, 5, 4)),
    "bhid,bhjd->bhij": ((2, 3, 5, 4), (2, 3, 6, 4)),
    "bid,kd->bik": ((2, 3, 4), (5, 4)),
    "ij,jk": ((3, 4), (4, 5)),
    "...id,...jd->...ij": ((2, 3, 4, 5), (2, 3, 6, 5)),
    "b...d,de->b...e": ((2, 3, 4), (4, 5)),
    "ij,jk,kl->il": ((3, 4), (4, 5), (5, 6)),
    "bid,kd->bi": ((2, 3, 4), (5, 4)),
    "ijj->i": ((3, 4, 4),),
    "ij->ji": ((3, 4),),
}


def counted_by_torch(function: Callable[..., Any], *inputs: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("op", COUNTED)
@torch.no_grad()
def test_flops_are_those_that_torch_counts(op: str) -> None:
    function, inputs = COUNTED[op]
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    rest = inputs[len(tensors) :]
    graph = graph_of(lambda *x: function(*x, *rest), *tensors).graph
    (node,) = Rewriter(graph.owning_module).calls(f"aten.{op}")
    assert node_flops(node) == counted_by_torch(function, *inputs) > 0


@torch.no_grad()
def test_flops_of_products_that_torch_does_not_count() -> None:
    """In integers they are as many as in floats."""
    a, b = torch.ones(32, 8, dtype=torch.int8), torch.ones(8, 16, dtype=torch.int8)
    assert graph_flops(graph_of(torch._int_mm, a, b).graph) == 2 * 32 * 8 * 16
    x, scales = torch.randn(32, 8).bfloat16(), torch.ones(16).bfloat16()
    packed = graph_of(aten._weight_int8pack_mm, x, b.mT.contiguous(), scales)
    assert graph_flops(packed.graph) == 2 * 32 * 8 * 16


@torch.no_grad()
def test_products_that_are_not_counted_are_named() -> None:
    """By torch's own list, or by their name; what multiplies no matrices is not."""

    def run(x: Tensor, y: Tensor) -> Tensor:
        a, b, c = (
            F.bilinear(x, x, torch.ones(5, 4, 4)),
            x @ y,
            F.interpolate(PICTURE, scale_factor=2),
        )
        return a.sum() + b.norm() + c.sum() + F.group_norm(PICTURE, 2).sum()

    graph = graph_of(run, X, Y).graph
    assert find_uncounted(graph) == ("aten.bilinear",)
    for op in flop_registry:
        name = str(op)
        if "backward" not in name and name.startswith("aten."):
            assert name in _COUNTED or _MULTIPLIES.search(name), name


@pytest.mark.parametrize("equation", EINSUMS)
@torch.no_grad()
def test_flops_of_an_einsum(equation: str) -> None:
    """Of two operands and more; one operand alone is summed or transposed, which counts nothing."""
    inputs = [torch.randn(shape) for shape in EINSUMS[equation]]

    def run(*x: Tensor) -> Tensor:
        return torch.einsum(equation, *x)

    found = graph_flops(graph_of(run, *inputs).graph)
    assert found == counted_by_torch(run, *inputs)
    assert (found > 0) == (len(inputs) > 1)


@torch.no_grad()
def test_attention_costs_the_same_however_it_is_written() -> None:
    q, k, v = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 6)

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v

    def sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
        return torch.einsum("bhij,bhje->bhie", scores, v)

    def with_addend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        scores = torch.baddbmm(torch.empty(2, 16, 10), q, k.mT, beta=0)
        return torch.bmm(scores.softmax(-1), v)

    with sdpa_kernel(SDPBackend.MATH):
        expected = counted_by_torch(fused, q, k, v)
    for function in (fused, products, sums, with_addend):
        assert graph_flops(graph_of(function, q, k, v).graph) == expected

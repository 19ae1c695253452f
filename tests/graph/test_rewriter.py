"""The verbs of the rewriter: what they change, record, and refuse; verification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.graphs import graph_of, text
from toma_fx.capture.model import capture
from toma_fx.errors import RewriteError, VerifyError
from toma_fx.graph.nodes import module_path
from toma_fx.graph.passes import EraseInputs
from toma_fx.graph.rewriter import Rewriter
from toma_fx.graph.verify import agree, output_values, verify

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
aten = torch.ops.aten


class Net(nn.Module):
    """Two layers, so that nodes belong to modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def rewriter_of(function: Any, *inputs: Tensor) -> Rewriter:
    return Rewriter(graph_of(function, *inputs))


def net() -> Rewriter:
    torch.manual_seed(0)
    return Rewriter(capture(Net().eval().requires_grad_(False), (X,), {}).graph_module)


@pytest.mark.parametrize("where", ["before", "after"])
@torch.no_grad()
def test_new_nodes_belong_to_the_module_of_the_node_beside_them(where: str) -> None:
    rewriter = net()
    first = rewriter.index()["linear"]
    x = rewriter.index()["x"]
    with rewriter.running("a pass"), getattr(rewriter, where)(first):
        one = rewriter.insert(aten.mul.Tensor, x if where == "before" else first, 2)
        two = rewriter.insert(aten.add.Tensor, one, alpha=3, other=1)
    names = [n.name for n in rewriter.graph.nodes if n.op == "call_function"]
    new = ["mul_tensor", "add_tensor"]
    assert names == (
        [*new, "linear", "linear_1"] if where == "before" else ["linear", *new, "linear_1"]
    )
    for node in (one, two):
        assert module_path(node) == "first"
        assert node.meta["toma_fx"] == "a pass"
        assert node.meta["val"].shape == ((2, 6) if where == "before" else (2, 4))
    assert two.kwargs == {"alpha": 3, "other": 1}
    assert rewriter.log == [("a pass", "insert", n) for n in new]
    assert rewriter.settle() == {one, two}
    assert rewriter.settle() == set(), "a new count"


def test_nothing_is_inserted_nowhere() -> None:
    with pytest.raises(RewriteError, match="no place to insert"):
        net().insert(aten.relu.default, 1)


def test_a_node_in_use_is_not_erased() -> None:
    rewriter = net()
    nodes = rewriter.index()
    with pytest.raises(RewriteError, match="in use") as caught:
        rewriter.erase(nodes["linear"])
    assert caught.value.got == "linear_1"
    rewriter.replace(nodes["linear_1"], nodes["x"])
    assert "linear_1" not in rewriter.index()
    assert ("", "erase", "linear_1") in rewriter.log
    assert nodes["linear_1"] not in rewriter.settle(), "what is gone is not verified"
    verify(rewriter.graph_module, rewriter.inputs, rewriter.outputs, "test")


def test_names_and_strangers_are_refused() -> None:
    rewriter = net()
    nodes = rewriter.index()
    with pytest.raises(RewriteError, match="name exists"):
        rewriter.add_input("linear", lambda: torch.empty(1))
    with pytest.raises(RewriteError, match="not an input"):
        rewriter.replace_input(nodes["linear_1"], nodes["x"], nodes["linear"])
    with pytest.raises(RewriteError, match="not a literal"):
        rewriter.set_literal(nodes["linear"], (0,), 3)
    assert not rewriter.log, "a refused change is not recorded"
    assert rewriter.inputs == ["x"]


def test_a_graph_without_inputs() -> None:
    """Nodes go in, and a first input does."""
    rewriter = rewriter_of(lambda: torch.arange(6) + 1)
    assert rewriter.inputs == []
    (start,) = rewriter.calls("aten.arange")
    with rewriter.before(start):
        ones = rewriter.insert(aten.ones.default, [6])
    node = rewriter.add_input("shift", lambda: torch.empty(6))
    assert ones.meta["val"].shape == node.meta["val"].shape == (6,)
    (add,) = rewriter.calls("aten.add")
    with rewriter.after(add, ones):
        total = rewriter.insert(aten.add.Tensor, ones, node)
    rewriter.add_outputs([total])
    rewriter.graph_module.recompile()
    verify(rewriter.graph_module, ["shift"], rewriter.outputs, "test")
    first, second = rewriter.graph_module(torch.arange(6.0))
    assert torch.equal(first, torch.arange(6) + 1)
    assert torch.equal(second, torch.arange(6.0) + 1)


def test_what_comes_after_an_input_comes_after_all_inputs() -> None:
    """Also after those that are added later."""
    rewriter = rewriter_of(lambda x, y: x + y, X, X)
    x = rewriter.index()[rewriter.inputs[0]]
    with rewriter.after(x):
        late = rewriter.add_input("late", lambda: torch.empty(2, 6))
        (total,) = rewriter.splice("sum", lambda a, b: a + b, [x, late])
    rewriter.add_outputs([total])
    rewriter.graph_module.recompile()
    verify(rewriter.graph_module, rewriter.inputs, rewriter.outputs, "test")
    assert torch.equal(rewriter.graph_module(X, X, -X)[1], torch.zeros(2, 6))


def test_sizes_that_depend_on_the_data_leave_nothing_pending() -> None:
    """Run again, they have another name; a snippet that is traced later knows nothing of them."""
    rewriter = rewriter_of(lambda x: (x.nonzero().sum(0), x * 2), X)
    (found,) = rewriter.calls("aten.nonzero")
    (twice,) = rewriter.calls("aten.mul")
    rewriter.retype(found)
    verify(rewriter.graph_module, rewriter.inputs, rewriter.outputs, "test")
    with rewriter.after(twice):
        (halved,) = rewriter.splice("half", lambda x: x / 2, [twice])
        with pytest.raises(RewriteError, match="length depends on the data"):
            rewriter.splice("half", lambda x: x / 2, [found])
    rewriter.add_outputs([halved])
    rewriter.graph_module.recompile()
    assert torch.equal(rewriter.graph_module(X)[2], X)


@pytest.mark.parametrize("write", [lambda x: x.add_(1), lambda x: x.clone().mul_(2)])
def test_a_snippet_that_writes_in_place_is_refused(write: Any) -> None:
    """Other readers of what it writes into would see the change."""
    rewriter = net()
    first = rewriter.index()["linear"]
    with (
        pytest.raises(RewriteError, match="may not write in place") as caught,
        rewriter.after(first),
    ):
        rewriter.splice("write", write, [first])
    assert "_.Tensor" in caught.value.got


def test_a_graph_without_tensors() -> None:
    graph = fx.Graph()
    graph.output((1, 2))
    rewriter = Rewriter(fx.GraphModule({}, graph))
    assert (rewriter.inputs, rewriter.outputs) == ([], [1, 2])
    rewriter.erase_dead()
    verify(rewriter.graph_module, [], [1, 2], "test")


def test_inputs_and_outputs_are_kept_up_to_date() -> None:
    rewriter = net()
    (linear,) = [n for n in rewriter.calls("aten.linear") if n.name == "linear"]
    rewriter.add_input("extra", lambda: torch.empty(3))
    rewriter.add_outputs([linear])
    assert rewriter.inputs == ["x", "extra"]
    assert [tuple(v.shape) for v in rewriter.outputs] == [(2, 6), (2, 4)]
    verify(rewriter.graph_module, rewriter.inputs, rewriter.outputs, "test")
    with pytest.raises(RewriteError, match="in use"):
        EraseInputs(frozenset({"x"})).apply(rewriter)
    EraseInputs(frozenset({"extra"})).apply(rewriter)
    assert rewriter.inputs == ["x"]


# -- strides --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_view_of_other_strides_becomes_a_reshape() -> None:
    """Downstream values follow; a view that still holds stays one."""
    rewriter = rewriter_of(lambda x: ((x + 1).view(12) * 2, (x + 1).view(2, 3, 2).cos()), X)
    adds = rewriter.calls("aten.add")
    for add in adds:
        with rewriter.after(add):
            turned = rewriter.insert(aten.transpose.int, add, 0, 1)
            copied = rewriter.insert(
                aten.clone.default, turned, memory_format=torch.contiguous_format
            )
            back = rewriter.insert(aten.transpose.int, copied, 0, 1)
        rewriter.replace_uses(add, back, keep=(turned,))
    assert adds[0].meta["val"].stride() == (6, 1)
    rewriter.settle()
    assert [n.target for n in rewriter.calls("aten.view", "aten.reshape")] == [
        aten.reshape.default,
        aten.view.default,
    ]
    (cos,) = rewriter.calls("aten.cos")
    assert cos.meta["val"].stride() == (1, 4, 2), "recorded anew behind the view"
    assert [entry[1] for entry in rewriter.log].count("view becomes reshape") == 1
    rewriter.graph_module.recompile()
    verify(rewriter.graph_module, rewriter.inputs, rewriter.outputs, "test")
    got = rewriter.graph_module(X)
    assert torch.equal(got[0], (X + 1).view(12) * 2)
    assert torch.equal(got[1], (X + 1).view(2, 3, 2).cos())


def test_other_shapes_are_not_updated_but_reported() -> None:
    rewriter = rewriter_of(lambda x: (x + 1).relu().cos(), X)
    (add,) = rewriter.calls("aten.add")
    with rewriter.after(add):
        cut = rewriter.insert(aten.slice.Tensor, add, 1, 0, 3)
    rewriter.replace_uses(add, cut, keep=(cut,))
    rewriter.settle()
    (relu,) = rewriter.calls("aten.relu")
    assert relu.meta["val"].shape == (2, 6)
    with pytest.raises(VerifyError, match=r"recorded value is stale(.|\n)*%relu"):
        verify(rewriter.graph_module, rewriter.inputs, rewriter.outputs, "test")


# -- dead code ------------------------------------------------------------------------------------


def test_dead_attention_and_dropout_go_and_side_effects_stay() -> None:
    """A chain goes from its end to its start; torch keeps attention and dropout."""

    def run(x: Tensor, mask: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(x[None], x[None].cos(), x[None].sin())
        F.dropout(y.relu(), 0.3, False)
        F.dropout(x, 0.3, True)
        F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.3)
        n = mask.sum().item()
        torch._check(n >= 3)
        return x + 1

    rewriter = rewriter_of(run, X, X[0] > 0)
    untouched = rewriter_of(run, X, X[0] > 0).graph
    untouched.eliminate_dead_code()
    assert len([n for n in untouched.nodes if "scaled_dot" in n.name]) == 2, "torch keeps them"
    assert len(rewriter.calls("aten.scaled_dot_product_attention", "aten.dropout")) == 4
    with rewriter.running("erase_dead"):
        rewriter.erase_dead()
    kept = [n.name for n in rewriter.calls("aten.scaled_dot_product_attention", "aten.dropout")]
    assert kept == ["dropout_1", "scaled_dot_product_attention_1"], "they draw random numbers"
    assert rewriter.calls("aten._assert_scalar")
    assert not rewriter.calls("aten.cos", "aten.sin", "aten.relu")
    erased = [name for _, action, name in rewriter.log if action == "erase"]
    assert (
        erased.index("dropout")
        < erased.index("relu")
        < erased.index("scaled_dot_product_attention")
    )
    verify(rewriter.graph_module, rewriter.inputs, rewriter.outputs, "test")


def test_an_input_that_nothing_reads_stays() -> None:
    rewriter = rewriter_of(lambda x, y: x + 1, X, X + 1)
    rewriter.erase_dead()
    assert rewriter.inputs == [n.name for n in rewriter.graph.find_nodes(op="placeholder")]
    assert len(rewriter.inputs) == 2


# -- verification ---------------------------------------------------------------------------------


def test_verify_finds_stale_values_and_changed_signatures() -> None:
    rewriter = net()
    graph_module, names = rewriter.graph_module, ["x"]
    outputs = output_values(rewriter.graph)
    verify(graph_module, names, outputs, "test")
    with pytest.raises(VerifyError, match="inputs of the graph changed"):
        verify(graph_module, [], outputs, "test")
    with pytest.raises(VerifyError, match="outputs of the graph changed"):
        verify(graph_module, names, [], "test")
    node = rewriter.index()["linear_1"]
    value = node.meta["val"]
    node.meta["val"] = value.new_empty_strided((2, 6), (1, 2))
    with pytest.raises(VerifyError, match="strides are stale"):
        verify(graph_module, names, outputs, "test")
    node.meta["val"] = value.new_empty((1, 3, 8))
    with pytest.raises(VerifyError, match="value is stale"):
        verify(graph_module, names, outputs, "test")
    node.meta["val"] = value
    verify(graph_module, names, outputs, "test")


def test_a_graph_that_calls_a_graph_is_verified() -> None:
    """Regions under autocast stay higher-order operators, whose body has no value."""

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = x @ x.T
        return y + 1

    rewriter = rewriter_of(run, X)
    assert rewriter.calls("wrap_with_autocast")
    verify(rewriter.graph_module, rewriter.inputs, rewriter.outputs, "test")
    assert "bfloat16" in text(rewriter.graph_module)


def test_a_size_that_only_one_run_knows_is_not_stale() -> None:
    """Torch learns sizes from assertions about the first run, not about later ones."""
    assert agree("(1, ?, 40) torch.float32 cpu", "(1, 444, 40) torch.float32 cpu")
    assert agree("?", "444")
    assert not agree("(1, ?, 40) torch.float32 cpu", "(1, 444, 41) torch.float32 cpu")
    assert not agree("(1, ?) torch.float32 cpu", "(1, 444, 40) torch.float32 cpu")
    assert not agree("(1, ?) torch.float32 cpu", "(1, 4) torch.float16 cpu")

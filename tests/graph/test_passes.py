"""How passes run: order, verification, what errors say, dumps, specs."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graphs import graph_of
from toma_fx.capture.model import capture
from toma_fx.errors import ConfigError, RewriteError, TomaError, VerifyError
from toma_fx.graph.dump import VARIABLE, dumping
from toma_fx.graph.passes import EraseDead, Pass, run_passes
from toma_fx.graph.printing import print_graph
from toma_fx.graph.rewriter import Rewriter
from toma_fx.graph.specs import CAPTURED, EXPORTABLE, REWRITTEN

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
aten = torch.ops.aten


@dataclass(frozen=True)
class Double:
    """x + 1 becomes 2 (x + 1)."""

    name: ClassVar[str] = "double"
    times: int = 1

    def apply(self, rewriter: Rewriter) -> None:
        (add,) = rewriter.calls("aten.add")
        for _ in range(self.times):
            with rewriter.after(add):
                doubled = rewriter.insert(aten.mul.Tensor, add, 2)
            rewriter.replace_uses(add, doubled, keep=(doubled,))


@dataclass(frozen=True)
class Fail:
    """Raises what it is told to."""

    name: ClassVar[str] = "fail"
    error: Exception

    def apply(self, rewriter: Rewriter) -> None:
        raise self.error


@dataclass(frozen=True)
class Widen:
    """Puts a value of another shape where the graph had one: a pass with a mistake."""

    name: ClassVar[str] = "widen"

    def apply(self, rewriter: Rewriter) -> None:
        (add,) = rewriter.calls("aten.add")
        with rewriter.after(add):
            wide = rewriter.insert(aten.cat.default, [add, add], 1)
        rewriter.replace_uses(add, wide, keep=(wide,))


def rewriter_of(function: Any = lambda x: (x + 1).relu(), *inputs: Tensor) -> Rewriter:
    return Rewriter(graph_of(function, *(inputs or (X,))))


@torch.no_grad()
def test_passes_run_in_order_and_the_log_says_what_each_did() -> None:
    rewriter = rewriter_of()
    run_passes(rewriter, (EraseDead(), Double(), EraseDead()), "test")
    assert rewriter.log == [
        ("erase_dead", "changed nothing", ""),
        ("double", "insert", "mul_tensor"),
        ("double", "replace input", "relu"),
        ("erase_dead", "changed nothing", ""),
    ]
    assert torch.equal(rewriter.graph_module(X)[0], ((X + 1) * 2).relu()), "the code is new"
    assert str(Double(times=3)) == "Double(times=3)", "options are fields, and text shows them"


def test_an_error_says_which_passes_ran_before() -> None:
    with pytest.raises(VerifyError) as caught:
        run_passes(rewriter_of(), (EraseDead(), Double(), Widen()), "refresh")
    assert "stale" in caught.value.what
    assert caught.value.where.startswith("refresh, widen: %mul_tensor")
    assert caught.value.where.endswith("(after the passes erase_dead, double)")
    with pytest.raises(RewriteError, match="no pass ran before") as refused:
        run_passes(rewriter_of(), (Fail(RewriteError("no", where="node", hint="try")),), "test")
    assert (refused.value.what, refused.value.hint) == ("no", "try")


def test_what_a_pass_raises_by_mistake_becomes_typed() -> None:
    with pytest.raises(RewriteError, match="KeyError: 'x'") as caught:
        run_passes(rewriter_of(), (Double(), Fail(KeyError("x"))), "test")
    assert caught.value.where == "fail (after the passes double)"
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(ConfigError) as passed:
        run_passes(rewriter_of(), (Fail(ConfigError("a method's own")),), "test")
    assert passed.value.what == "a method's own", "an error about options stays as it is"


def test_only_a_pass_that_changed_something_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    rewriter, seen = rewriter_of(), []
    monkeypatch.setattr("toma_fx.graph.passes.verify", lambda g, i, o, stage, c: seen.append(stage))
    run_passes(rewriter, (EraseDead(), Double()), "test")
    assert seen == ["test, double"]


# -- dumps ----------------------------------------------------------------------------------------

BEFORE = """\
x_0: float32[2, 6] = input
add: float32[2, 6] = aten.add.Tensor(x_0, 1)
relu: float32[2, 6] = aten.relu(add)
return (relu)
"""
AFTER = """\
x_0: float32[2, 6] = input
add: float32[2, 6] = aten.add.Tensor(x_0, 1)
mul_tensor: float32[2, 6] = aten.mul.Tensor(add, 2)
relu: float32[2, 6] = aten.relu(mul_tensor)
return (relu)
"""


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("by", ["variable", "argument"])
def test_graphs_are_dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """One folder per run of passes; before each pass is the file before it."""
    rewriters = [rewriter_of(), rewriter_of()]
    out = tmp_path / "new" / "dump"
    if by == "variable":
        monkeypatch.setenv(VARIABLE, str(out))
    with dumping(out if by == "argument" else None):
        run_passes(rewriters[0], (EraseDead(), Double()), "refresh")
        run_passes(rewriters[1], (), "reuse")
    assert files(out) == [
        "000_Function_refresh/00_input.txt",
        "000_Function_refresh/02_double.txt",
        "000_Function_refresh/passes.txt",
        "001_Function_reuse/00_input.txt",
    ]
    folder = out / "000_Function_refresh"
    assert (folder / "00_input.txt").read_text() == BEFORE
    assert (folder / "02_double.txt").read_text() == AFTER
    lines = (folder / "passes.txt").read_text().splitlines()
    assert lines[0].startswith("01 EraseDead(): changes 0, ")
    assert lines[1].startswith("02 Double(times=1): changes 2, ")


def test_a_pass_that_fails_is_dumped_as_it_left_the_graph(tmp_path: Path) -> None:
    rewriter = rewriter_of()
    with dumping(tmp_path), pytest.raises(TomaError):
        run_passes(rewriter, (Double(), Widen()), "test")
    folder = tmp_path / "000_Function_test"
    assert "cat_default: float32[2, 12]" in (folder / "02_widen_failed.txt").read_text()
    assert "02 Widen(): a node's recorded value is stale" in (folder / "passes.txt").read_text()


def test_nothing_is_dumped_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    with dumping(tmp_path / "a"):
        pass
    run_passes(rewriter_of(), (Double(),), "test")
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with dumping(tmp_path / "file"), pytest.raises(ConfigError, match="can't be written there"):
        run_passes(rewriter_of(), (), "test")


def test_printed_graphs_name_modules_parameters_and_kinds_of_values() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 4))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [y.to(torch.float16) for y in self.inner(x).chunk(2, dim=1)]

    graph_module = capture(Net().eval(), (X,), {}).graph_module
    assert (
        print_graph(graph_module.graph)
        == """\
inner_0_weight: float32[4, 6] = attribute inner.0.weight
inner_0_bias: float32[4] = attribute inner.0.bias
x: float32[2, 6] = input
# inner.0
linear: float32[2, 4] = aten.linear(x, inner_0_weight, inner_0_bias)
# the model itself
chunk: (float32[2, 2], float32[2, 2]) = aten.chunk(linear, 2, 1)
getitem: float32[2, 2] = getitem(chunk, 0)
getitem_1: float32[2, 2] = getitem(chunk, 1)
to: float16[2, 2] = aten.to.dtype(getitem, torch.float16)
to_1: float16[2, 2] = aten.to.dtype(getitem_1, torch.float16)
return (to, to_1)
"""
    )


# -- specs ----------------------------------------------------------------------------------------


def opaque(rewriter: Rewriter) -> None:
    (add,) = rewriter.calls("aten.add")
    with rewriter.after(add):
        (node,) = rewriter.splice("key", lambda x: x * 2, [add], as_call=True)
    rewriter.replace_uses(add, node, keep=(node,))


def dead(rewriter: Rewriter) -> None:
    (add,) = rewriter.calls("aten.add")
    with rewriter.after(add):
        rewriter.insert(aten.mul.Tensor, add, 2)


def python(rewriter: Rewriter) -> None:
    (add,) = rewriter.calls("aten.add")
    with rewriter.after(add):
        node = rewriter.insert(F.relu, add)
    rewriter.replace_uses(add, node, keep=(node,))


def in_place(rewriter: Rewriter) -> None:
    (add,) = rewriter.calls("aten.add")
    with rewriter.after(add):
        rewriter.insert(aten.add_.Tensor, add, 1)


def own(rewriter: Rewriter) -> None:
    (add,) = rewriter.calls("aten.add")
    with rewriter.after(add):
        scores = rewriter.insert(aten.view.default, add, [1, 1, 3, 4])
        chosen = rewriter.insert(torch.ops.toma_fx.facility_location.default, scores, 2)
    rewriter.add_outputs([chosen])


def module(rewriter: Rewriter) -> None:
    rewriter.graph_module.add_module("inner", nn.ReLU())
    (add,) = rewriter.calls("aten.add")
    with rewriter.graph.inserting_after(add):
        rewriter.graph.call_module("inner", (add,))


def nested(rewriter: Rewriter) -> None:
    output: Any = rewriter.graph.output_node()
    output.args = ((output.args[0],),)


LEFT_OVER = [
    (CAPTURED, opaque, "only a rewrite inserts whole functions"),
    (EXPORTABLE, opaque, "runtimes can't call Python functions"),
    (EXPORTABLE, own, "only this package registers it"),
    *((spec, dead, "nothing reads it") for spec in (CAPTURED, REWRITTEN, EXPORTABLE)),
    *((spec, python, "only operators") for spec in (CAPTURED, REWRITTEN, EXPORTABLE)),
    *((spec, in_place, "a write in place") for spec in (CAPTURED, REWRITTEN, EXPORTABLE)),
    *((spec, module, "modules and methods") for spec in (CAPTURED, REWRITTEN, EXPORTABLE)),
    *((spec, nested, "one flat tuple") for spec in (CAPTURED, REWRITTEN, EXPORTABLE)),
]


@pytest.mark.parametrize(("spec", "add", "why"), LEFT_OVER)
def test_a_spec_names_what_is_left_over(spec: Any, add: Any, why: str) -> None:
    rewriter = rewriter_of()
    spec.check(rewriter.graph, "before")
    with rewriter.running("test"):
        add(rewriter)
    with pytest.raises(VerifyError, match=why) as caught:
        spec.check(rewriter.graph, "stage")
    assert caught.value.what.startswith(f"a {spec.name} graph must not hold this node")
    assert caught.value.where.startswith("stage: ")


def test_rewritten_graphs_may_hold_whole_functions_and_own_operators() -> None:
    rewriter = rewriter_of()
    with rewriter.running("test"):
        opaque(rewriter)
    REWRITTEN.check(rewriter.graph, "stage")
    rewriter = rewriter_of()
    with rewriter.running("test"):
        own(rewriter)
    REWRITTEN.check(rewriter.graph, "stage")


def test_specs_hold_at_entry_and_exit() -> None:
    def unused(x: Tensor) -> Tensor:
        x * 2
        return (x + 1).relu()

    with pytest.raises(VerifyError, match="test, before its passes: %mul"):
        run_passes(rewriter_of(unused), (EraseDead(),), "test", before=CAPTURED)
    run_passes(rewriter_of(unused), (EraseDead(),), "test", after=CAPTURED)
    with pytest.raises(VerifyError, match="test, after its passes: %mul"):
        run_passes(rewriter_of(unused), (Double(),), "test", after=CAPTURED)


def test_arithmetic_on_sizes_belongs_to_every_stage() -> None:
    def run(x: Tensor, mask: Tensor) -> Tensor:
        n = mask.sum().item()
        torch._check(n >= 0)
        torch._check(n <= 6)
        return torch.cat([x[:, :n], x[:, : 6 - n]], 1)

    rewriter = rewriter_of(run, X, X[0] > 0)
    run_passes(rewriter, (EraseDead(),), "test")
    assert rewriter.graph.find_nodes(op="call_function", target=operator.sub)
    for spec in (REWRITTEN, EXPORTABLE):
        spec.check(rewriter.graph, "stage")


def test_passes_are_what_the_protocol_says() -> None:
    steps: tuple[Pass, ...] = (EraseDead(), Double())
    assert [step.name for step in steps] == ["erase_dead", "double"]
    assert hash(Double()) == hash(Double())

"""Kinds of programs: what each takes and gives, and one that is added from outside the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch._inductor import compile_fx as inductor

import toma_fx
from tests.export.in_process import InProcess, opened
from tests.methods.test_methods import inputs, model
from toma_fx.errors import ConfigError, RewriteError, UnknownNameError
from toma_fx.export.builder import export
from toma_fx.graph.passes import EraseDead
from toma_fx.graph.rewriter import Rewriter
from toma_fx.passes.uses import PASSES, REFRESH, USES, Use, uses_of
from toma_fx.plan.plan import MergePlan


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(inductor, "compile_fx", lambda gm, fakes, config_patches: gm.forward)
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def specialization(**fields: Any) -> Any:
    optimized = toma_fx.optimize(model(), min_tokens=1, **fields)
    return optimized.specialized((), inputs())[0]


@pytest.mark.parametrize(
    ("kind", "takes", "gives"),
    [
        ("refresh", (), ("idx", "merge", "unmerge")),
        ("reweigh", ("idx",), ("merge", "unmerge")),
        ("reuse", ("idx", "merge", "unmerge"), ()),
        ("plain", (), ()),
    ],
)
def test_what_a_kind_takes_and_gives(
    kind: str, takes: tuple[str, ...], gives: tuple[str, ...]
) -> None:
    found = specialization()
    groups = found.plan.groups
    assert found.takes(kind) == tuple(g.tensor(part) for g in groups for part in takes)
    assert found.gives(kind) == tuple(g.tensor(part) for g in groups for part in gives)
    program = found.program(kind)
    names = [n.name for n in program.graph_module.graph.find_nodes(op="placeholder")]
    assert names == [*(i.name for i in found.captured.inputs), *found.takes(kind)]


def test_a_batch_of_different_kinds_has_masks_before_its_kept_tensors() -> None:
    found = specialization()
    assert found.takes("mixed")[:2] == ("pattern_select", "pattern_weigh")
    assert found.takes("mixed")[2:] == found.gives("mixed") == found.gives("refresh")


# -- a kind from outside --------------------------------------------------------------------------


@dataclass(frozen=True)
class GiveOutput:
    """Hand on the model's output as a kept tensor."""

    name: ClassVar[str] = "give_output"

    def apply(self, rewriter: Rewriter) -> None:
        rewriter.add_outputs([rewriter.graph.output_node().all_input_nodes[0]])


@dataclass(frozen=True)
class TakeOutput:
    """Return what was handed on; compute nothing."""

    name: ClassVar[str] = "take_output"

    def apply(self, rewriter: Rewriter) -> None:
        output = rewriter.graph.output_node()
        old = output.all_input_nodes[0]
        kept = rewriter.add_input("last_output", old.meta["val"].clone)
        rewriter.replace_input(output, old, kept)


def keeps(plan: MergePlan) -> tuple[str, ...]:
    return (*REFRESH.gives(plan), "last_output")


KEEP = Use("keep", gives=keeps, passes=(*PASSES, lambda job: GiveOutput()))
HOLD = Use(
    "hold",
    takes=lambda plan: ("last_output",),
    instead="keep",
    passes=(lambda job: TakeOutput(), lambda job: EraseDead()),
)


class HeldConfig(toma_fx.ToMAConfig):
    """ToMA whose every second step repeats the output of the first."""

    name: ClassVar[str] = "held"
    uses: ClassVar[tuple[Any, ...]] = (KEEP, HOLD)

    def renewal(self, since: int) -> str:
        return "hold" if since % 2 else "keep"


CALLS = [inputs(seed=i, timestep=900.0 - 100 * i) for i in range(5)]


def check_held(outputs: list[torch.Tensor]) -> None:
    for i in (1, 3):
        assert torch.equal(outputs[i], outputs[i - 1])
    assert not torch.equal(outputs[2], outputs[1])


def held() -> Any:
    return toma_fx.optimize(model(), method=HeldConfig(min_tokens=1))


def test_it_runs_in_a_denoiser() -> None:
    optimized = held()
    outputs = [optimized(**call).clone() for call in CALLS]
    check_held(outputs)
    assert optimized.totals == {"keep": 3, "hold": 2}
    merged = toma_fx.optimize(model(), min_tokens=1, destinations_every=1, weights_every=1)
    assert torch.equal(outputs[0], merged(**CALLS[0])), "the steps that compute merge"
    nodes = optimized.specializations[0].program("hold").graph_module.graph.nodes
    assert {n.op for n in nodes} == {"placeholder", "output"}, "nothing is computed"


def test_it_runs_with_the_state_in_the_hands_of_the_caller() -> None:
    optimized, state, outputs = held(), toma_fx.State(), []
    for call in CALLS:
        output, state = optimized.step(call, state)
        outputs.append(output)
    check_held(outputs)
    assert "last_output" in state.kept


def test_it_runs_in_the_back_end_of_torch_compile() -> None:
    options = {"method": HeldConfig(min_tokens=1)}
    compiled = torch.compile(model(), backend="toma_fx", options=options)
    check_held([compiled(**call).clone() for call in CALLS])


def test_it_runs_in_an_artifact(tmp_path: Path) -> None:
    target = InProcess()
    manifest = export(held(), inputs(), tmp_path / "a", target)
    assert list(manifest.calls[0].programs) == ["keep", "hold"]
    assert manifest.calls[0].programs["hold"].instead == "keep"
    loaded = opened(target, tmp_path / "a")
    check_held([loaded(**call) for call in CALLS])


def test_it_is_in_the_reports() -> None:
    optimized = held()
    for call in CALLS:
        optimized(**call)
    assert "3 keep, 2 hold" in str(toma_fx.summary(optimized))


# -- kinds that are wrong -------------------------------------------------------------------------


def test_a_name_of_the_package_is_refused() -> None:
    class Twice(HeldConfig):
        uses = (Use("reuse"),)

    with pytest.raises(ConfigError, match="two kinds of programs have one name"):
        uses_of(Twice())
    assert list(uses_of(toma_fx.ToMAConfig())) == [use.name for use in USES]


def test_an_unknown_kind_is_refused() -> None:
    class Unknown(HeldConfig):
        def renewal(self, since: int) -> str:
            return "hald"

    with pytest.raises(UnknownNameError, match="hold"):
        toma_fx.optimize(model(), method=Unknown(min_tokens=1))(**CALLS[0])


def test_kinds_that_can_never_run_are_refused() -> None:
    class Never(HeldConfig):
        uses = (Use("hold", takes=HOLD.takes, instead="hold", passes=HOLD.passes),)

        def renewal(self, since: int) -> str:
            return "hold"

    with pytest.raises(ConfigError, match="no program can run"):
        toma_fx.optimize(model(), method=Never(min_tokens=1))(**CALLS[0])


def test_a_program_that_is_not_what_its_kind_says_is_refused() -> None:
    class Lies(HeldConfig):
        uses = (Use("keep", gives=keeps),)

        def renewal(self, since: int) -> str:
            return "keep"

    with pytest.raises(RewriteError, match="does not take and give"):
        toma_fx.optimize(model(), method=Lies(min_tokens=1))(**CALLS[0])

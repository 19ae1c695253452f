"""Programs that go to Inductor as they are: what Dynamo would have seen to."""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx

import toma_fx
from tests import denoisers
from tests.logs import logged
from tests.methods.test_methods import inputs, model
from toma_fx.errors import ConfigError
from toma_fx.run import compiled

SMALL: dict[str, Any] = {"min_tokens": 1, "scope": "stack"}
CALLS = (torch.ops.higher_order.invoke_subgraph, operator.getitem)
WAYS: dict[str, Callable[[Any], Any]] = {
    "method": lambda optimized: optimized.compile(),
    "torch.compile": torch.compile,
}


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Notes what is compiled, and runs it as it is."""
    calls: list[dict[str, Any]] = []

    def compile_graph(gm: Any, values: Sequence[Any], patches: Any) -> Any:
        calls.append({"graph": gm, "values": values, "patches": dict(patches), "runs": []})
        runs = calls[-1]["runs"]
        return lambda *args: (runs.append(args), gm.forward(*args))[1]

    monkeypatch.setattr(compiled, "compile_graph", compile_graph)
    return calls


def optimized(module: nn.Module | None = None, **options: Any) -> Any:
    return toma_fx.optimize(module or copy.deepcopy(model()), **(SMALL | options))


@pytest.mark.parametrize("how", WAYS)
@torch.no_grad()
def test_dynamo_reads_nothing(how: str, compiling: list[dict[str, Any]]) -> None:
    """Blocks that repeat are compiled once, whichever way is taken."""
    torch.compiler.reset()
    counters.clear()
    for depth in (3, 4):
        module = denoisers.flux(num_layers=0, num_single_layers=depth)
        run, eager = WAYS[how](optimized(module)), optimized(module)
        for timestep in (0.9, 0.8):
            call = denoisers.flux_inputs(8, 8, timestep=timestep)
            assert denoisers.relative(run(**call)[0], eager(**call)[0]) < 1e-5
    assert not counters["stats"]
    assert not counters["graph_break"]
    sizes = [[called_once(each["graph"]) for each in compiling[i : i + 2]] for i in (0, 2)]
    assert sizes[0] == sizes[1], "refresh and reuse"


def called_once(graph_module: fx.GraphModule) -> int:
    """Operators outside of subgraphs, and in each subgraph once."""
    graphs = [m.graph for m in graph_module.modules() if isinstance(m, fx.GraphModule)]
    return sum(n.op == "call_function" and n.target not in CALLS for g in graphs for n in g.nodes)


@pytest.mark.parametrize("how", WAYS)
@torch.no_grad()
def test_weights_and_kept_tensors_are_static(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs copy every input that is not static at each call."""
    fresh: list[int] = []
    inner = denoisers.counting_inner_compile(fresh)
    compile_graph = lambda gm, values, _: compile_fx(gm, values, inner_compile=inner)  # noqa: E731
    monkeypatch.setattr(compiled, "compile_graph", compile_graph)
    run = WAYS[how](optimized())
    with torch._functorch.config.patch(enable_autograd_cache=False):
        for timestep in (900.0, 850.0):
            run(**inputs(timestep=timestep))
    assert fresh == [2, 2], "latents and timestep"


@torch.no_grad()
def test_inputs_get_the_strides_they_were_compiled_for(compiling: list[dict[str, Any]]) -> None:
    run, eager = optimized().compile(), optimized()
    for timestep in (900.0, 850.0, 800.0):
        run(**inputs(timestep=timestep))
        eager(**inputs(timestep=timestep))
    call = inputs(timestep=750.0)
    call["sample"] = call["sample"].to(memory_format=torch.channels_last)
    assert denoisers.relative(run(**call), eager(**call)) < 1e-5
    assert len(compiling) == 2, "refresh and reuse, and nothing for other strides"
    for each in compiling:
        strides = [value.stride() for value in each["values"]]
        assert all([x.stride() for x in args] == strides for args in each["runs"])
    # what is kept lies as its program wants it: a copy at each step would cost time
    (state,) = run.states
    kept = {id(tensor) for tensor in state.buffers.values()}
    assert kept
    assert kept <= {id(x) for x in compiling[1]["runs"][-1]}


@torch.no_grad()
def test_rows_that_were_one_may_differ_later(compiling: list[dict[str, Any]]) -> None:
    """As where a warm-up expands one row, and requests have their own."""
    run, eager = optimized().compile(), optimized()
    for timestep in (900.0, 850.0):
        call = inputs(timestep=timestep)
        one = {name: x[:1].expand_as(x) for name, x in call.items()}
        assert one["sample"].stride(0) == one["timestep"].stride(0) == 0, "in one place"
        assert denoisers.relative(run(**one), eager(**one)) < 1e-5
    compiled_before = len(compiling)
    call = inputs(timestep=800.0)
    call["timestep"] = torch.tensor([800.0, 400.0])
    assert denoisers.relative(run(**call), eager(**call)) < 1e-5
    assert len(compiling) == compiled_before, "nothing for other strides"


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def determinism() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SWITCHES = {"threads": lambda: threads(torch.get_num_threads() + 1), "determinism": determinism}


@pytest.mark.parametrize("switch", SWITCHES)
@torch.no_grad()
def test_other_global_switches_compile_anew(switch: str, compiling: list[dict[str, Any]]) -> None:
    run = optimized(destinations_every=1).compile()
    with logged(logging.INFO) as messages:
        run(**inputs())
        with SWITCHES[switch]():
            run(**inputs())
            run(**inputs())
        assert len(compiling) == 2
        run(**inputs())
    assert len(compiling) == 2, "both are kept"
    assert [m.endswith("again: torch's global switches changed") for m in messages[-2:]] == [
        False, True,
    ]  # fmt: skip


class Scaled(nn.Module):
    """The model of the tests, with a buffer that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = copy.deepcopy(model())
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        scaled: Tensor = self.inner(sample, timestep) * self.scale
        return scaled


@torch.no_grad()
def test_a_buffer_that_was_made_anew(compiling: list[dict[str, Any]]) -> None:
    module = Scaled()
    run = optimized(module.eval(), destinations_every=1).compile()
    first = run(**inputs())
    module.scale = torch.tensor(3.0)
    assert denoisers.relative(run(**inputs()), first * 1.5) < 1e-5
    assert len(compiling) == 1


@torch.no_grad()
def test_modes_and_options_reach_inductor(compiling: list[dict[str, Any]]) -> None:
    optimized().compile(fullgraph=True, mode="reduce-overhead")(**inputs())
    optimized().compile(options={"max_fusion_size": 7})(**inputs())
    torch.compile(optimized(), options={"max_fusion_size": 8})(**inputs())
    assert [each["patches"] for each in compiling] == [
        {"triton.cudagraphs": True}, {"max_fusion_size": 7}, {"max_fusion_size": 8},
    ]  # fmt: skip


@torch.no_grad()
def test_each_surrounding_compilation_has_its_own(compiling: list[dict[str, Any]]) -> None:
    denoiser = optimized(destinations_every=1)
    wholes = [torch.compile(denoiser, options={"max_fusion_size": n}) for n in (7, 8)]
    for whole in (*wholes, denoiser, *wholes):
        whole(**inputs())
    assert [each["patches"]["max_fusion_size"] for each in compiling] == [7, 8]
    assert [len(each["runs"]) for each in compiling] == [2, 2], "and alone it runs as it is"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "reduce-overheat"}, "reduce-overheat"),
        ({"options": {"max_fusion_sise": 7}}, "max_fusion_sise"),
        ({"options": {"max_fusion_size": "seven"}}, "max_fusion_size"),
        ({"mode": "default", "options": {"max_fusion_size": 7}}, "mode or options"),
        ({"outline": "no"}, "outline"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    denoiser = optimized()
    with pytest.raises(ConfigError, match=message):
        denoiser.compile(**options)
    assert not denoiser.compiled


def test_dynamic_shapes_are_none() -> None:
    with logged(logging.WARNING) as messages:
        optimized().compile(dynamic=True)
    assert "dynamic=True has no effect" in messages[0]


@torch.no_grad()
def test_without_outlining(compiling: list[dict[str, Any]]) -> None:
    module = denoisers.flux(num_layers=0, num_single_layers=3)
    for outline in (True, False):
        optimized(module).compile(outline=outline)(**denoisers.flux_inputs(8, 8))
    once, flat = (each["graph"] for each in compiling)
    assert len(once.graph.nodes) < len(flat.graph.nodes)
    assert not list(flat.named_parameters()), "inputs, all of them"


@torch.no_grad()
def test_repeated_blocks_alone(compiling: list[dict[str, Any]]) -> None:
    module = denoisers.flux(num_layers=0, num_single_layers=3)
    run, eager = optimized(module), optimized(module)
    run.compile_repeated_blocks()
    for timestep in (0.9, 0.8, 0.7):
        call = denoisers.flux_inputs(8, 8, timestep=timestep)
        assert denoisers.relative(run(**call)[0], eager(**call)[0]) < 1e-5
    assert all(len(each["runs"]) > 1 for each in compiling), "each is called several times"
    code = [each["graph"].code for each in compiling]
    (refresh, reuse) = run.specializations[0].programs.values()
    assert sum(map(len, code)) < len(reuse.graph_module.code) < len(refresh.graph_module.code)
    half = len(code) // 2
    assert code[:half] == code[half:], "Inductor finds those of the second program in its caches"


@torch.no_grad()
def test_where_nothing_repeats_all_is_compiled(compiling: list[dict[str, Any]]) -> None:
    run = optimized()
    run.compile_repeated_blocks()
    run(**inputs())
    assert [len(each["runs"]) for each in compiling] == [1]


def test_repeated_blocks_are_no_cuda_graphs() -> None:
    with pytest.raises(ConfigError, match="CUDA graph of each block"):
        optimized().compile_repeated_blocks(mode="reduce-overhead")
    with logged(logging.WARNING) as messages:
        optimized().compile_repeated_blocks(backend="eager")
    assert "only Inductor takes blocks" in messages[0]


@torch.no_grad()
def test_what_dynamo_must_read_goes_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freezing needs parameters in the graph."""
    seen: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: seen.append(options) or module)
    optimized().compile(options={"freezing": True})(**inputs())
    assert seen == [{"dynamic": False, "options": {"freezing": True}}]


@pytest.mark.parametrize(
    ("options", "overwrites"),
    [({}, False), ({"mode": "reduce-overhead"}, True), ({"backend": "eager"}, True), (None, False)],
)
@torch.no_grad()
def test_only_cuda_graphs_write_over_what_they_returned(
    options: dict[str, Any] | None, overwrites: bool, compiling: list[dict[str, Any]]
) -> None:
    """There outputs are cloned; elsewhere that would cost a copy at each step."""
    denoiser = optimized()
    run = denoiser if options is None else denoiser.compile(**options)
    run(**inputs())
    (program,) = denoiser.specializations[0].runners.values()
    assert program.overwrites_outputs == overwrites
    torch.compile(denoiser, backend="eager")(**inputs())
    assert program.overwrites_outputs == (overwrites or options is None), "nobody knows"

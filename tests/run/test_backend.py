"""The back end of `torch.compile`: capture from Dynamo, programs, state, what Inductor is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor import compile_fx as inductor
from torch._inductor import list_mode_options

import toma_fx
from tests import denoisers
from tests.methods.test_methods import inputs as picture
from tests.methods.test_methods import model as block
from toma_fx.errors import NoMergeSites
from toma_fx.graph.nodes import op_name
from toma_fx.plan.plan import MergePlan
from toma_fx.run.backend import MergedGraph, toma_backend

SMALL: dict[str, Any] = {"min_tokens": 60, "tile": 4}


def small_flux(**changes: Any) -> Any:
    """Flux with one double block."""
    return denoisers.small_flux(**{"num_single_layers": 0, **changes})


class Timed(nn.Module):
    """Makes a tensor of its timestep, as UNets do; without one it is always half way."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_flux()

    def forward(self, timestep: Any = 0.5, **inputs: Any) -> Any:
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor([timestep])
        return self.model(timestep=timestep.expand(2).float(), **inputs)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Programs run as graphs, without Inductor; the configuration patches of each."""
    made: list[dict[str, Any]] = []

    def compile_fx(graph_module: Any, inputs: Any, config_patches: dict[str, Any]) -> Any:
        made.append(config_patches)
        return graph_module.forward

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    return made


class Compiled:
    """A model compiled with the back end; `graphs` are what the back end made of it."""

    def __init__(self, model: nn.Module, mode: str | None = None, **kwargs: Any) -> None:
        self.graphs: list[Any] = []
        how = {k: kwargs.pop(k) for k in ("dynamic", "fullgraph") if k in kwargs}
        options = {**SMALL, **kwargs} if mode is None else None
        self.run = torch.compile(model, backend=self.backend, mode=mode, options=options, **how)

    def backend(self, gm: Any, example_inputs: Any, **kwargs: Any) -> Any:
        self.graphs.append(toma_backend(gm, example_inputs, **kwargs))
        return self.graphs[-1]

    def __call__(self, **inputs: Any) -> Tensor:
        return self.run(**inputs)[0]

    @property
    def counts(self) -> Counter[str]:
        made = (s for g in self.graphs for s in g.cache.values())
        return sum((Counter(s.counts) for s in made), Counter())


def test_torch_finds_the_back_end_by_its_name() -> None:
    assert "toma_fx" in torch._dynamo.list_backends()


# -- capture --------------------------------------------------------------------------------------


def described(plan: MergePlan) -> Any:
    """A plan without the names of nodes."""
    segments = [
        (s.scope, s.branches, s.modules, s.kinds, len(s.inner), s.setting, s.group)
        for s in plan.segments
    ]
    groups = [(g.name, g.batch, g.setting) for g in plan.groups]
    return segments, groups, sorted((r.module, r.kind) for r in plan.rejections)


def check_equal(compiled: Compiled, optimized: Any) -> None:
    """The captures have the same operations in the same modules, and lead to the same plan."""
    (through_dynamo,), (exported,) = compiled.graphs[0].cache.values(), optimized.cache.values()
    assert described(through_dynamo.plan) == described(exported.plan)
    ops = [
        Counter(
            (op_name(n.target), s.flow.modules[n.name])
            for n in s.captured.graph_module.graph.nodes
            if n.op == "call_function"
        )
        for s in (through_dynamo, exported)
    ]
    assert ops[0] == ops[1]


@pytest.mark.usefixtures("compilations")
def test_symbolic_shapes_are_made_concrete() -> None:
    model, inputs = small_flux(), denoisers.flux_inputs()
    compiled = Compiled(model, dynamic=True)
    compiled(**inputs)
    assert "constant" in {a.kind for a in compiled.graphs[0].arguments}
    check_equal(compiled, toma_fx.optimize(model, **SMALL, example_inputs=inputs))


@pytest.mark.usefixtures("compilations")
def test_paths_start_at_the_model_however_it_is_called() -> None:
    model, inputs = small_flux(), denoisers.flux_inputs()

    def call(**kwargs: Any) -> Any:
        return model(**kwargs)

    compiled = Compiled(call)  # type: ignore[arg-type]
    compiled(**inputs)
    modules = compiled.graphs[0].cache.values()[0].flow.modules.values()
    assert "transformer_blocks.0.attn" in modules
    inside = Compiled(Timed().eval())
    inside(**inputs)
    modules = inside.graphs[0].cache.values()[0].flow.modules.values()
    assert "model.transformer_blocks.0.attn" in modules


@pytest.mark.usefixtures("compilations")
def test_include_and_exclude_name_module_paths() -> None:
    compiled = Compiled(denoisers.flux(), exclude=("transformer_blocks.*",))
    compiled(**denoisers.flux_inputs())
    segments = compiled.graphs[0].cache.values()[0].plan.segments
    assert {m.split(".")[0] for s in segments for m in s.modules} == {"single_transformer_blocks"}


# -- running --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small_sdxl", "small_flux", "sdxl", "flux"])
def test_every_step_equals_the_optimized_denoiser(
    name: str, compilations: list[dict[str, Any]]
) -> None:
    model, make = getattr(denoisers, name)(), getattr(denoisers, f"{name}_inputs")
    config = {"destinations_every": 4, "weights_every": 2}
    compiled = Compiled(model, **config, fullgraph=True)
    optimized = toma_fx.optimize(model, **SMALL, **config)
    for i in range(12):
        inputs = denoisers.at_step(make, i)
        assert denoisers.relative(compiled(**inputs), optimized(**inputs)[0]) < 1e-6, f"step {i}"
    check_equal(compiled, optimized)
    assert compiled.counts == {"refresh": 3, "reweigh": 3, "reuse": 6}
    assert len(compilations) == 3, "one program per use"
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dynamic", [None, False])
def test_another_shape(dynamic: bool | None, compilations: list[dict[str, Any]]) -> None:
    model = small_flux()
    compiled, optimized = Compiled(model, dynamic=dynamic), toma_fx.optimize(model, **SMALL)
    for height, width in ((8, 8), (8, 16), (16, 8)):
        for i in range(2):
            inputs = denoisers.at_step(denoisers.flux_inputs, i, height=height, width=width)
            assert torch.equal(compiled(**inputs), optimized(**inputs)[0]), (height, width, i)
    assert len(compiled.graphs) == 2, "8x16 and 16x8 have the same shapes"
    assert len(compilations) == 6, "but not the same programs"


@pytest.mark.usefixtures("compilations")
def test_generations_and_passes() -> None:
    model = small_flux()
    compiled = Compiled(model)
    for start in (900.0, 901.0):
        for i in range(3):
            for _guidance in range(2):
                compiled(**denoisers.flux_inputs(timestep=start - i))
    assert compiled.counts == {"refresh": 4, "reuse": 8}, "per generation one refresh per pass"


@pytest.mark.usefixtures("compilations")
def test_models_of_one_class_keep_their_own_patterns() -> None:
    both = [small_flux(seed=seed) for seed in (0, 1)]
    runs = [torch.compile(m, backend="toma_fx", options=dict(SMALL)) for m in both]
    optimized = [toma_fx.optimize(m, **SMALL) for m in both]
    for i in range(3):
        inputs = denoisers.at_step(denoisers.small_flux_inputs, i)
        for run, expected in zip(runs, optimized, strict=True):
            assert torch.equal(run(**inputs)[0], expected(**inputs)[0]), f"step {i}"
    assert counters["stats"]["unique_graphs"] == 1, "Dynamo compiles them once"


@pytest.mark.parametrize("kind", [int, float])
def test_timesteps_that_are_python_numbers(kind: type, compilations: list[dict[str, Any]]) -> None:
    model = Timed().eval()
    compiled, optimized = Compiled(model), toma_fx.optimize(model, **SMALL)
    for i in range(4):
        inputs = denoisers.at_step(denoisers.small_flux_inputs, i)
        inputs["timestep"] = kind(900 - i)
        if i == 1:
            optimized.reset()
        alike = optimized(**{**inputs, "timestep": torch.tensor(kind(900 - i))})[0]
        assert torch.equal(compiled(**inputs), alike), f"step {i}"
    assert len(compiled.graphs) == 2, "Dynamo takes the first number for a constant"
    assert len(compilations) == 3
    assert compiled.counts == {"refresh": 2, "reuse": 2}


@pytest.mark.usefixtures("compilations")
@pytest.mark.parametrize("options", [{}, {"first_step": 1}, {"last_step": 1}])
def test_timesteps_given_by_position(options: dict[str, Any]) -> None:
    """SDXL's pipelines do: the graph tells which input is the timestep, for no name does."""
    model = denoisers.small_sdxl()
    compiled, optimized = Compiled(model, **options), toma_fx.optimize(model, **SMALL, **options)
    for i in range(4):
        inputs = denoisers.at_step(denoisers.small_sdxl_inputs, i)
        positional = [inputs.pop(name) for name in ("sample", "timestep")]
        got, want = (run(*positional, **inputs)[0] for run in (compiled.run, optimized))
        assert denoisers.relative(got, want) < 1e-6, f"step {i}"
    assert compiled.counts == optimized.totals


@pytest.mark.usefixtures("compilations")
def test_without_a_timestep_every_call_selects() -> None:
    compiled = Compiled(Timed().eval())
    inputs = denoisers.flux_inputs()
    del inputs["timestep"]
    for _ in range(3):
        compiled(**inputs)
    assert compiled.counts == {"refresh": 3}


@pytest.mark.usefixtures("compilations")
def test_no_gradients() -> None:
    model = small_flux().requires_grad_(True)
    compiled = Compiled(model)
    with torch.enable_grad():
        out = compiled(**denoisers.flux_inputs())
    assert not out.requires_grad
    assert torch.equal(out, toma_fx.optimize(model, **SMALL)(**denoisers.flux_inputs())[0])


# -- Inductor -------------------------------------------------------------------------------------


def test_compiled_programs() -> None:
    compiled = Compiled(block(), fullgraph=True)
    optimized = toma_fx.optimize(block(), **SMALL)
    for i in range(12):
        call = picture(timestep=900.0 - i, seed=i)
        expected = optimized(**call)
        assert denoisers.relative(compiled.run(**call), expected) < 1e-4, f"step {i}"
    assert counters["aot_autograd"]["total"] == 2, "refresh and reuse"
    assert counters["stats"]["unique_graphs"] == 1


def test_a_ratio_of_zero_is_the_graph_of_dynamo(compilations: list[dict[str, Any]]) -> None:
    model, inputs = small_flux(), denoisers.flux_inputs()
    compiled = Compiled(model, ratio=0.0)
    assert torch.equal(compiled(**inputs), model(**inputs)[0])
    assert len(compilations) == 1
    assert not isinstance(compiled.graphs[0], MergedGraph)


def test_a_ratio_of_zero_is_plain_inductor() -> None:
    model, inputs = small_flux(), denoisers.flux_inputs(8, 8, batch=1)
    assert torch.equal(Compiled(model, ratio=0.0)(**inputs), torch.compile(model)(**inputs)[0])


def test_parameters_and_patterns_are_static_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh: list[int] = []
    compile_fx = inductor.compile_fx

    def spied(*args: Any, **kwargs: Any) -> Any:
        return compile_fx(*args, **kwargs, inner_compile=denoisers.counting_inner_compile(fresh))

    monkeypatch.setattr(inductor, "compile_fx", spied)
    compiled = Compiled(block())
    with torch._functorch.config.patch(enable_autograd_cache=False):
        for i in range(2):
            compiled(**picture(timestep=900.0 - i))
    # latents and timestep; neither weight nor pattern
    assert fresh == [2, 2]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_modes_are_inductor_patches(mode: str, compilations: list[dict[str, Any]]) -> None:
    compiled = Compiled(small_flux(), mode=mode)
    compiled(**denoisers.flux_inputs())
    assert compilations == [list_mode_options(mode)]


def test_options_for_inductor(compilations: list[dict[str, Any]]) -> None:
    compiled = Compiled(block(), toma="paper-sdxl", tiles=None, inductor={"max_autotune": True})
    compiled(**picture())
    assert compilations == [{"max_autotune": True}]
    assert compiled.graphs[0].options.config.scope == "sublayer"


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ratoi": 0.5}, "unknown option 'ratoi'\n  where: method 'toma'\n  try: nearest: ratio"),
        ({"ratio": 2.0}, "ratio is out of range"),
        ({"inductor": {"max_autotun": True}}, "nearest: max_autotune"),
        ({"allow_unmerged": 1}, "expected: True or False"),
    ],
)
def test_wrong_options(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(BackendCompilerFailed) as caught:
        Compiled(nn.Linear(4, 4), **options)(input=torch.ones(4))
    assert isinstance(caught.value.inner_exception, toma_fx.TomaError)
    assert expected in str(caught.value)


def test_wrong_mode() -> None:
    with pytest.raises(BackendCompilerFailed, match="nearest: max-autotune"):
        Compiled(nn.Linear(4, 4), mode="max-autotun")(input=torch.ones(4))


def test_a_path_that_does_not_exist() -> None:
    with pytest.raises(BackendCompilerFailed, match="matches nothing"):
        Compiled(small_flux(), include=("nowhere.*",))(**denoisers.flux_inputs())


class Cut(nn.Module):
    """A graph break after some work of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(4, 4)
        self.model = small_flux()

    def forward(self, hidden_states: Tensor, **inputs: Any) -> Any:
        scaled = self.scale(hidden_states)
        torch._dynamo.graph_break()
        return self.model(hidden_states=scaled, **inputs)


@pytest.mark.usefixtures("compilations")
def test_a_piece_without_sites() -> None:
    model, inputs = Cut().eval(), denoisers.flux_inputs()
    with pytest.raises(BackendCompilerFailed) as caught:
        Compiled(model)(**inputs)
    assert isinstance(caught.value.inner_exception, NoMergeSites)
    assert "a graph break may have cut the model: fullgraph=True shows it" in str(caught.value)
    assert 'options={"allow_unmerged": True}' in str(caught.value)
    torch._dynamo.reset()
    compiled = Compiled(model, allow_unmerged=True)
    inner = toma_fx.optimize(model.model, **SMALL)
    scaled = {**inputs, "hidden_states": model.scale(inputs["hidden_states"])}
    assert denoisers.relative(compiled(**inputs), inner(**scaled)[0]) < 1e-6
    assert sum(isinstance(g, MergedGraph) for g in compiled.graphs) == 1


@pytest.mark.usefixtures("compilations")
def test_a_later_shape_without_sites_raises_the_error_itself() -> None:
    compiled = Compiled(small_flux(), dynamic=True)
    compiled(**denoisers.flux_inputs(8, 16))
    with pytest.raises(NoMergeSites, match="lower min_tokens="):
        compiled(**denoisers.flux_inputs(4, 8))
    compiled(**denoisers.flux_inputs(8, 16))

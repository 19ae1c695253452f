"""The turn of a step is the same for a denoiser, the back end of `torch.compile`, an artifact."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import compile_fx as inductor

import toma_fx
from tests.export.in_process import InProcess, opened
from tests.methods.test_methods import inputs, model
from toma_fx.errors import CompanionError, GenerationError, ParityError, StateError
from toma_fx.export.builder import export
from toma_fx.run import backend
from toma_fx.run.backend import MergedGraph, toma_backend

CONFIG: dict[str, Any] = {"min_tokens": 1, "destinations_every": 4, "weights_every": 4}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """Makes a loaded artifact, with no state yet."""
    target, folder = InProcess(), tmp_path_factory.mktemp("artifact") / "a"
    export(toma_fx.optimize(model(), **CONFIG), inputs(), folder, target)
    return lambda: opened(target, folder)


@pytest.fixture(autouse=True)
def _fresh_dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs of the back end run as graphs, without Inductor."""
    monkeypatch.setattr(inductor, "compile_fx", lambda gm, fakes, config_patches: gm.forward)
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


class Compiled:
    """A model compiled with the back end; `graphs` are what the back end made of it."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        self.graphs: list[MergedGraph] = []
        self.run = torch.compile(module, backend=self.backend, options={**CONFIG, **options})

    def backend(self, gm: Any, example_inputs: Any, **options: Any) -> Any:
        self.graphs.append(toma_backend(gm, example_inputs, **options))  # type: ignore[arg-type]
        return self.graphs[-1]

    def __call__(self, **call: Any) -> Tensor:
        return self.run(**call)

    @property
    def kinds(self) -> dict[str, int]:
        """Steps by kind, over all graphs."""
        counts: dict[str, int] = {}
        for specialization in (s for g in self.graphs for s in g.cache.values()):
            for kind, steps in specialization.counts.items():
                counts[kind] = counts.get(kind, 0) + steps
        return counts


def in_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns or raises in a thread of its own."""
    results: list[Any] = []

    def body() -> None:
        try:
            with torch.no_grad():  # of each thread: with gradients, Dynamo makes another graph
                results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(60)
    return results[0]


def generation(seed: int, steps: int = 5) -> list[dict[str, Any]]:
    return [inputs(seed=seed, timestep=900.0 - 100 * i) for i in range(steps)]


STANDS = ["denoiser", "artifact", "backend"]


@pytest.fixture
def stand(request: pytest.FixtureRequest, artifact: Callable[[], Any]) -> Any:
    kinds = {
        "denoiser": lambda: toma_fx.optimize(model(), **CONFIG),
        "artifact": artifact,
        "backend": lambda: Compiled(model()),
    }
    return kinds[request.param]()


@pytest.mark.parametrize("stand", STANDS, indirect=True)
def test_threads_do_not_disturb_each_other(stand: Any) -> None:
    """A generation goes on as if another thread's calls had not been made, and the other's too."""
    want = {seed: [stand(**call).clone() for call in generation(seed)] for seed in (1, 2)}
    got: list[Tensor] = []

    def other(go: threading.Event, done: threading.Event) -> None:
        with torch.no_grad():
            for call in generation(2):
                go.wait(60)
                go.clear()
                got.append(stand(**call).clone())
                done.set()

    go, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=other, args=(go, done))
    thread.start()
    for i, call in enumerate(generation(1)):
        assert torch.equal(stand(**call), want[1][i]), f"step {i}"
        go.set()
        done.wait(60)
        done.clear()
    thread.join(60)
    assert all(torch.equal(a, b) for a, b in zip(got, want[2], strict=True))


@pytest.mark.parametrize("stand", ["denoiser", "artifact"], indirect=True)
def test_the_same_by_own_state_by_states_and_told(stand: Any) -> None:
    want = [stand(**call).clone() for call in generation(2)]
    with stand.own_state():
        own = [stand(**call).clone() for call in generation(2)]
    state, held = toma_fx.State(), []
    for call in generation(2):
        output, state = stand.step(call, state)
        held.append(output)
    with stand.generation(steps=5) as run:
        told = [(run.step(i), stand(**call).clone())[1] for i, call in enumerate(generation(2))]
    for others in zip(own, held, told, want, strict=True):
        assert all(torch.equal(other, others[-1]) for other in others)


@pytest.mark.parametrize("stand", ["denoiser", "artifact"], indirect=True)
def test_contexts_are_of_the_thread(stand: Any) -> None:
    inside = threading.Event()
    leave = threading.Event()

    def other() -> None:
        with stand.cache_context("uncond"):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(60)
    with stand.cache_context("cond"):
        assert stand._stepper.context == "cond"
        leave.set()
        thread.join(60)
        assert stand._stepper.context == "cond", "the other thread left its own"
    assert stand._stepper.context == ""


def test_states_of_an_artifact(artifact: Callable[[], Any]) -> None:
    """Interleaved requests get what each gets alone; states that do not fit are refused."""
    loaded = artifact()
    states = [toma_fx.State(), toma_fx.State()]
    got: list[list[Tensor]] = [[], []]
    for i in range(5):
        for request in (0, 1):
            call = generation(1 + request)[i]
            output, states[request] = loaded.step(call, states[request])
            got[request].append(output)
    for request in (0, 1):
        loaded.reset()
        for i, call in enumerate(generation(1 + request)):
            assert torch.equal(loaded(**call), got[request][i]), (request, i)
    with pytest.raises(StateError, match="not a state"):
        loaded.step(generation(1)[0], None)
    other = toma_fx.optimize(model(), **{**CONFIG, "ratio": 0.25})
    _, foreign = other.step(generation(1)[0], toma_fx.State())
    _, after = loaded.step(generation(1)[1], foreign)
    _, fresh = loaded.step(generation(1)[1], toma_fx.State())
    assert all(torch.equal(after.kept[name], fresh.kept[name]) for name in fresh.kept)


# -- what the back end of torch.compile did otherwise ---------------------------------------------


class Untimed(nn.Module):
    """A model without a timestep: only its conditioning tells a generation."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        half = sample.new_full((len(sample),), 0.5)
        return self.inner(sample=sample, timestep=half) + encoder_hidden_states.mean()


def test_a_model_without_timestep_is_told() -> None:
    """Its steps can't be told apart: each selects anew, or is announced."""
    text, calls = torch.randn(1, 3, 4), generation(1)
    optimized = toma_fx.optimize(Untimed().eval(), **CONFIG)
    stands: list[Any] = [optimized, Compiled(Untimed().eval())]
    for stand in stands:
        for call in calls:
            stand(sample=call["sample"], encoder_hidden_states=text)
    assert optimized.totals == {"refresh": 5}
    assert stands[1].kinds == {"refresh": 5}
    assert toma_fx.summary(optimized).unsure == 5
    with optimized.generation():
        for call in calls:
            optimized(sample=call["sample"], encoder_hidden_states=text)
    assert optimized.totals == {"refresh": 7, "reuse": 3}
    counted = toma_fx.optimize(Untimed().eval(), **CONFIG, first_step=1)
    with pytest.raises(GenerationError, match="can't be counted"):
        counted(sample=calls[0]["sample"], encoder_hidden_states=text)


def test_guidance_that_ends_in_mid_run_is_followed() -> None:
    """The step goes on where the batch gets smaller: with no pattern, but not from the start."""
    config = {"first_step": 0, "last_step": 3}
    stands: list[Any] = [toma_fx.optimize(model(), **CONFIG, **config), Compiled(model(), **config)]
    for stand in stands:
        for i, call in enumerate(generation(1, steps=6)):
            both = i < 2
            stand(**{name: torch.cat([x, x]) if both else x for name, x in call.items()})
    expected = {"refresh": 2, "reuse": 2, "plain": 2}
    assert stands[0].totals == expected
    assert stands[1].kinds == expected


def test_the_back_end_checks_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that computes something else than Dynamo's graph is refused."""
    real = backend.capture_dynamo

    def wrong(*arguments: Any) -> Any:
        captured = real(*arguments)
        linear = torch.ops.aten.linear.default
        first = captured.graph_module.graph.find_nodes(op="call_function", target=linear)[0]
        weight = next(iter(first.all_input_nodes[1].users)).args[1]
        assert isinstance(weight, torch.fx.Node)
        with captured.graph_module.graph.inserting_before(first):
            half = captured.graph_module.graph.call_function(
                torch.ops.aten.mul.Tensor, (first.args[0], 0.5)
            )
        half.meta = dict(first.args[0].meta)  # type: ignore[union-attr]
        first.replace_input_with(first.args[0], half)  # type: ignore[arg-type]
        captured.graph_module.recompile()
        return captured

    monkeypatch.setattr(backend, "capture_dynamo", wrong)
    with pytest.raises(BackendCompilerFailed, match="does not compute") as caught:
        Compiled(model())(**generation(1)[0])
    assert isinstance(caught.value.inner_exception, ParityError)


def test_the_back_end_refuses_companions() -> None:
    """Autocast would round what selects the tokens; hooks of diffusers act between the layers."""
    refused = pytest.raises(BackendCompilerFailed, match=r"torch\.autocast")
    with refused as caught, torch.autocast("cpu", torch.bfloat16):
        Compiled(model())(**generation(1)[0])
    assert isinstance(caught.value.inner_exception, CompanionError)
    torch._dynamo.reset()
    split = copy.deepcopy(model())
    split._parallel_config = object()
    with pytest.raises(BackendCompilerFailed, match="several processes"):
        Compiled(split)(**generation(1)[0])
    torch._dynamo.reset()

    def call(**arguments: Any) -> Tensor:
        return split(**arguments)

    with pytest.raises(BackendCompilerFailed, match="several processes"):
        Compiled(call)(**generation(1)[0])  # type: ignore[arg-type]


def test_a_failed_step_starts_a_generation(
    artifact: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After an exception inside a step nothing kept is trusted; after one before it, all is."""
    loaded = artifact()
    for call in generation(1)[:2]:
        loaded(**call)
    with pytest.raises(toma_fx.SignatureError):
        loaded(sample=torch.zeros(3), timestep=700.0)
    assert loaded._stepper.generations()[0].step == 1
    (programs,) = loaded._programs

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(programs._runtime, "run", broken, raising=False)
        with pytest.raises(RuntimeError, match="out of memory"):
            loaded(**generation(1)[2])
    assert not loaded._stepper.generations()

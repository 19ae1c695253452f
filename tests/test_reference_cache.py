"""The eager reference of step caching, checked against the models and against formulas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.denoisers import flux, flux_inputs, sdxl, sdxl_inputs
from tests.reference_cache import cached_blocks, newton

MODELS: dict[str, tuple[Any, Any]] = {"sdxl": (sdxl, sdxl_inputs), "flux": (flux, flux_inputs)}
SCOPES = [("sdxl", s) for s in ("stack", "block", "deep")] + [
    ("flux", s) for s in ("stack", "block")
]
TIMES = (900.0, 870.0, 800.0, 790.0, 640.0)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(name: str) -> tuple[Any, list[dict[str, Any]]]:
    """A model in float64, and a call at each of `TIMES` with another picture each time."""
    make, inputs = MODELS[name]
    calls = [inputs(16, 16, timestep=t, seed=i) for i, t in enumerate(TIMES)]
    return make().double(), [_double(call) for call in calls]


def _double(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _double(v) for k, v in value.items()}
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def names_called(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules without children in the order in which they are called."""
    called: list[str] = []

    def note(name: str) -> Any:
        return lambda *_: called.append(name)

    leaves = [(n, m) for n, m in model.named_modules() if not list(m.children())]
    handles = [module.register_forward_hook(note(name)) for name, module in leaves]
    yield called
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("name", "scope"), SCOPES)
def test_steps_that_compute_are_the_models_own(name: str, scope: str) -> None:
    model, calls = build(name)
    plain = [model(**call)[0] for call in calls]
    with cached_blocks(model, scope=scope, order=2, computes=[True] * len(calls)):
        for call, want in zip(calls, plain, strict=True):
            assert torch.equal(model(**call)[0], want)
    assert torch.equal(model(**calls[0])[0], plain[0])


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(("name", "scope"), SCOPES)
def test_cached_steps_differ_and_leave_the_next_computed_one_alone(
    name: str, scope: str, order: int
) -> None:
    model, calls = build(name)
    computes = [True, True, True, False, True]
    with cached_blocks(model, scope=scope, order=order, computes=computes):
        got = [model(**call)[0] for call in calls]
    for call, out, computed in zip(calls, got, computes, strict=True):
        assert torch.equal(out, model(**call)[0]) == computed


def test_the_orders_differ() -> None:
    model, calls = build("sdxl")
    found = []
    for order in (0, 1, 2):
        computes = [True, True, True, False]
        with cached_blocks(model, scope="stack", order=order, computes=computes):
            found.append([model(**call)[0] for call in calls[:4]][-1])
    assert all(not torch.allclose(a, b) for a, b in zip(found, found[1:] + found[:1], strict=True))


SKIPPED = {
    ("sdxl", "stack"): lambda n: ".transformer_blocks." in n,
    ("sdxl", "block"): lambda n: ".transformer_blocks." in n,
    ("sdxl", "deep"): lambda n: (
        n.startswith(("down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1"))
        or n.startswith("down_blocks.0.downsamplers")
    ),
    ("flux", "stack"): lambda n: "transformer_blocks." in n,
    ("flux", "block"): lambda n: "transformer_blocks." in n,
}


@pytest.mark.parametrize(("name", "scope"), SCOPES)
def test_what_is_cached_does_not_run_and_all_else_does(name: str, scope: str) -> None:
    model, calls = build(name)
    with names_called(model) as called:
        model(**calls[0])
        everything = list(called)
        skipped = list(filter(SKIPPED[name, scope], everything))
        assert 0 < len(skipped) < len(everything)
        with cached_blocks(model, scope=scope, order=0, computes=[True, False]):
            model(**calls[0])
            called.clear()
            model(**calls[1])
    assert called == [n for n in everything if n not in skipped]


# -- extrapolation --------------------------------------------------------------------------------


class Polynomial(nn.Module):
    """A block whose update depends on the time alone: sum of c_k t^k, t in thousands."""

    def __init__(self, degree: int, clock: list[float], *, flux: bool) -> None:
        super().__init__()
        self.coefficients = [0.3 * (k + 1) * (-1) ** k for k in range(degree + 1)]
        self.clock, self.flux = clock, flux

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        t = self.clock[0] / 1000
        value = sum(c * t**k for k, c in enumerate(self.coefficients))
        # another one in each channel: a norm would take away what all have in common
        update = value * torch.linspace(0, 1, hidden_states.shape[-1], dtype=hidden_states.dtype)
        if self.flux:
            return encoder_hidden_states - update, hidden_states + update
        return hidden_states + update


@pytest.mark.parametrize("degree", [0, 1, 2])
@pytest.mark.parametrize(("name", "scope"), [s for s in SCOPES if s[1] != "deep"])
def test_a_polynomial_of_the_order_is_met_exactly(name: str, scope: str, degree: int) -> None:
    model, calls = build(name)
    clock = [0.0]
    for module in model.modules():
        for attribute in ("transformer_blocks", "single_transformer_blocks"):
            blocks = getattr(module, attribute, None)
            for i in range(len(blocks or ())):
                blocks[i] = Polynomial(degree, clock, flux=name == "flux")

    def run() -> list[Tensor]:
        found = []
        for time, call in zip(TIMES, calls, strict=True):
            clock[0] = time
            found.append(model(**call)[0])
        return found

    plain = run()
    for order in range(3):
        computes = [True, True, True, False, False]
        with cached_blocks(model, scope=scope, order=order, computes=computes):
            got = run()
        exact = [torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(got, plain, strict=True)]
        assert exact == [True, True, True, order >= degree, order >= degree]


def test_deep_keeps_the_value_that_enters_the_last_up_block() -> None:
    model, calls = build("sdxl")
    entered: list[Tensor] = []
    with cached_blocks(model, scope="deep", order=1, computes=[True, True, False]):
        # after the patch, so that it sees what the patch makes of the input
        last = model.up_blocks[-1]
        handle = last.register_forward_pre_hook(
            lambda module, args, kwargs: entered.append(kwargs["hidden_states"]), with_kwargs=True
        )
        for call in calls[:3]:
            model(**call)
        handle.remove()
    t1, t0, t = TIMES[:3]
    want = entered[1] + (t - t0) * (entered[1] - entered[0]) / (t0 - t1)
    torch.testing.assert_close(entered[2], want, rtol=1e-12, atol=1e-12)


def test_newton_divides_differences_and_takes_equal_times_for_slope_zero() -> None:
    def value(t: float) -> Tensor:
        return torch.tensor([3 * t * t - 2 * t + 1], dtype=torch.float64)

    samples = [(t, value(t)) for t in (0.7, 0.8, 1.0)]
    torch.testing.assert_close(newton(samples, 0.4), value(0.4))
    linear = value(0.7) + (0.4 - 0.7) * (value(0.7) - value(0.8)) / (0.7 - 0.8)
    torch.testing.assert_close(newton(samples[:2], 0.4), linear)
    assert torch.equal(newton(samples[:1], 0.4), value(0.7))
    same = [(0.7, value(0.7)), (0.7, value(0.8))]
    assert torch.equal(newton(same, 0.4), value(0.7))


def test_with_fewer_samples_the_order_is_lower() -> None:
    model, calls = build("flux")
    found = []
    for order in (0, 2):
        with cached_blocks(model, scope="block", order=order, computes=[True, False]):
            found.append([model(**call)[0] for call in calls[:2]][1])
    assert torch.equal(*found)


def test_each_pass_has_its_own_steps_and_samples() -> None:
    model, calls = build("flux")
    other = [{**c, "encoder_hidden_states": -c["encoder_hidden_states"]} for c in calls]
    computes = [True, False]

    def alone(steps: list[dict[str, Any]]) -> list[Tensor]:
        with cached_blocks(model, scope="stack", order=0, computes=computes):
            return [model(**call)[0] for call in steps[:2]]

    got: dict[str, list[Tensor]] = {"cond": [], "uncond": []}
    with cached_blocks(model, scope="stack", order=0, computes=computes) as reference:
        for cond, uncond in zip(calls[:2], other[:2], strict=True):
            for name, call in (("uncond", uncond), ("cond", cond)):
                with reference.pass_(name):
                    got[name].append(model(**call)[0])
    for name, steps in (("cond", calls), ("uncond", other)):
        assert all(torch.equal(a, b) for a, b in zip(got[name], alone(steps), strict=True))


def test_misuse_is_noticed() -> None:
    model, calls = build("flux")
    with (
        cached_blocks(model, scope="stack", order=0, computes=[False]),
        pytest.raises(AssertionError, match="no step has been computed"),
    ):
        model(**calls[0])
    with cached_blocks(model, scope="stack", order=0, computes=[True]):
        model(**calls[0])
        with pytest.raises(AssertionError, match="more calls than steps"):
            model(**calls[1])


# -- published code -------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1])
def test_stack_computes_what_sea_cache_of_diffusers_does(order: int) -> None:
    """It extrapolates the update of all blocks together by steps; here they are alike in time."""
    hooks = pytest.importorskip("diffusers.hooks")
    steps = 8
    calls = [flux_inputs(8, 8, timestep=900.0 - 100 * i, seed=i) for i in range(steps)]

    def pictures(module: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
        return [x.T.unflatten(1, (1, 8, 8)) for x in kwargs["hidden_states"]]

    options = {"threshold": 1e9, "residual_order": order, "raw_vision_callback": pictures}
    model, got, computes = flux(), [], []
    model.enable_cache(hooks.SeaCacheConfig(**options))
    with names_called(model) as called:
        for i, call in enumerate(calls):
            called.clear()
            about = {"step_index": i, "sigma": 0.9 - 0.1 * i, "num_inference_steps": steps}
            with model.cache_context("cond", **about):
                got.append(model(**call)[0])
            computes.append("single_transformer_blocks.1.proj_out" in called)
    assert 2 < sum(computes) < steps - 2
    reference = flux()
    with cached_blocks(reference, scope="stack", order=order, computes=computes):
        want = [reference(**call)[0] for call in calls]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_deep_of_order_0_is_deep_cache() -> None:
    package = pytest.importorskip("DeepCache")
    model, calls = build("sdxl")
    times = [float(call.pop("timestep")) for call in calls]
    computes = [i % 2 == 0 for i in range(len(calls))]
    with cached_blocks(model, scope="deep", order=0, computes=computes):
        want = [model(timestep=t, **c)[0] for t, c in zip(times, calls, strict=True)]
    pipe = SimpleNamespace(unet=model, scheduler=SimpleNamespace(timesteps=times))
    helper = package.DeepCacheSDHelper(pipe=pipe)
    # of the first down block all layers run, its sampler aside
    branch = len(model.down_blocks[0].resnets)
    helper.set_params(cache_interval=2, cache_branch_id=branch)
    helper.enable()
    for time, call, out in zip(times, calls, want, strict=True):
        assert torch.equal(model(call.pop("sample"), torch.tensor(time), **call)[0], out)

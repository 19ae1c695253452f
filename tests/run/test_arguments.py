"""Calls that a graph can't take, numbers of NumPy, and calls that ask for gradients."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import toma_fx
from tests.methods.test_methods import inputs, model
from toma_fx.errors import GradientError, SignatureError
from toma_fx.run.arguments import plain_numbers
from toma_fx.run.batching import State

SMALL: dict[str, Any] = {"min_tokens": 60, "tile": 4}


class Optioned(nn.Module):
    """A denoiser with options that it does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, sample: Tensor, timestep: Any, options: Any = None) -> Tensor:
        timestep = torch.as_tensor(timestep, dtype=sample.dtype).expand(len(sample))
        out: Tensor = self.inner(sample, timestep)
        return out


@pytest.mark.parametrize(
    ("options", "where", "kind"),
    [
        ({"ids": [uuid.UUID(int=1)]}, "options.ids.0", "uuid.UUID"),
        ({"wrapper": len}, "options.wrapper", "builtin_function"),
        (object(), "options", "builtins.object"),
        (np.ones(3), "options", "numpy.ndarray"),
        (torch.Generator(), "options", "Generator"),
        ((1, torch.float16), "options.1", "torch.dtype"),
    ],
)
@torch.no_grad()
def test_arguments_that_no_graph_can_take(options: Any, where: str, kind: str) -> None:
    own = Optioned().eval()
    for call in (
        lambda: toma_fx.optimize(own, ratio=0)(**inputs(), options=options),
        lambda: toma_fx.optimize(own, **SMALL).step({**inputs(), "options": options}, State()),
        lambda: toma_fx.explain(own, {**inputs(), "options": options}, **SMALL),
    ):
        with pytest.raises(SignatureError) as caught:
            call()
        assert caught.value.where == where
        assert kind in caught.value.got
        assert caught.value.hint


@pytest.mark.parametrize("options", [None, 0.5, {"a": ["b", 1, None, True]}])
@torch.no_grad()
def test_plain_arguments_are_taken(options: Any) -> None:
    own = Optioned().eval()
    out = toma_fx.optimize(own, ratio=0)(**inputs(), options=options)
    assert torch.allclose(out, own(**inputs()), atol=1e-6)


@torch.no_grad()
def test_numbers_of_numpy_are_numbers() -> None:
    args, kwargs = plain_numbers((np.int64(3), [np.float32(0.5)]), {"flag": np.bool_(True)})
    assert (args, kwargs) == ((3, [0.5]), {"flag": True})
    assert [type(v) for v in (args[0], args[1][0], kwargs["flag"])] == [int, float, bool]
    own = Optioned().eval()
    call = inputs()["sample"], 500.0
    numbers = [toma_fx.optimize(own, **SMALL)(call[0], t) for t in (call[1], np.float64(call[1]))]
    assert torch.equal(*numbers)


def gradient(denoiser: Any) -> Tensor:
    call = inputs()
    with torch.enable_grad():
        sample = call["sample"].requires_grad_()
        return torch.autograd.grad(denoiser(sample, call["timestep"]).sum(), sample)[0]


def test_merging_off_gives_the_gradient_of_the_model() -> None:
    off = toma_fx.optimize(model(), ratio=0)
    expected = gradient(model())
    assert torch.equal(gradient(off), expected)
    state = State()

    def stepped(*args: Any) -> Tensor:
        out, _ = off.step((args, {}), state)
        return out  # type: ignore[no-any-return]

    assert torch.equal(gradient(stepped), expected)


@pytest.mark.parametrize("kind", ["forward", "step", "back end"])
def test_merging_refuses_gradients(kind: str) -> None:
    torch._dynamo.reset()
    merged: Any = toma_fx.optimize(model(), **SMALL)
    if kind == "step":
        merged = lambda *args: toma_fx.optimize(model(), **SMALL).step((args, {}), State())[0]  # noqa: E731
    elif kind == "back end":
        merged = torch.compile(model(), backend="toma_fx", options=SMALL)
    with pytest.raises(GradientError) as caught:
        gradient(merged)
    assert "no_grad" in caught.value.hint
    call = inputs()
    with torch.no_grad():
        merged(call["sample"].requires_grad_(), call["timestep"])

"""Inputs whose memory does not hold their values: programs get those that they stand for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import toma_fx
from tests.denoisers import relative
from tests.methods.test_methods import inputs, model
from toma_fx.errors import SignatureError
from toma_fx.run import backend
from toma_fx.run.denoiser import OptimizedDenoiser

LAZY: dict[str, Callable[[Tensor], Tensor]] = {
    "negated later": lambda x: torch._neg_view(-x),
    "imaginary part of a conjugate": lambda x: torch.complex(x, -x).conj().imag,
}


def reading_memory(fresh: list[Tensor]) -> Any:
    """A back end that keeps the inputs of the programs it runs."""

    def compiler(gm: Any, example: Any) -> Any:
        def run(*values: Any) -> Any:
            fresh.extend(v for v in values if isinstance(v, Tensor))
            return gm.forward(*values)

        return run

    return compiler


@pytest.mark.parametrize("how", LAZY)
@torch.no_grad()
def test_compiled_programs_get_resolved_inputs(how: str) -> None:
    torch.compiler.reset()
    seen: list[Tensor] = []
    optimized: Any = toma_fx.optimize(copy.deepcopy(model()), min_tokens=1)
    optimized.compile(backend=reading_memory(seen))
    want = optimized(**inputs())
    optimized.reset()
    lazy = LAZY[how](inputs()["sample"])
    assert lazy.is_neg()
    seen.clear()
    assert relative(optimized(**{**inputs(), "sample": lazy}), want) < 1e-5
    assert seen
    assert not any(x.is_neg() for x in seen)


@torch.no_grad()
def test_so_do_those_of_the_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    seen: list[Tensor] = []
    read = reading_memory(seen)
    monkeypatch.setattr(backend, "compile_graph", lambda gm, values, _: read(gm, values))
    options = {"min_tokens": 1}
    compiled: Any = torch.compile(copy.deepcopy(model()), backend="toma_fx", options=options)
    compiled(**inputs(timestep=900.0))
    seen.clear()
    lazy = torch._neg_view(-inputs()["sample"])
    got = compiled(**{**inputs(timestep=950.0), "sample": lazy})
    want = toma_fx.optimize(model(), min_tokens=1)(**inputs(timestep=950.0))
    assert relative(got, want) < 1e-4
    assert seen
    assert not any(x.is_neg() for x in seen)


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("how", REFUSED)
@torch.no_grad()
def test_other_layouts_are_refused(how: str, first: bool) -> None:
    optimized = toma_fx.optimize(model(), min_tokens=1)
    assert type(optimized) is OptimizedDenoiser
    if not first:
        optimized(**inputs())
    with pytest.raises(SignatureError) as caught:
        optimized(**{**inputs(), "sample": REFUSED[how](inputs()["sample"])})
    assert caught.value.where == "sample"

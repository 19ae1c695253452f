"""What other packages and users put in the place of `forward`: checks of rows of test_companions.

cache-dit is played by functions that do to a model what it does; test_replaced.py has the real one.
"""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable
from functools import partial, update_wrapper, wraps
from types import FunctionType, MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toma_fx
from tests import denoisers
from tests.reference import Settings, stand_in
from toma_fx.capture.guard import ModelGuard
from toma_fx.errors import CompanionError

SMALL: dict[str, Any] = {"min_tokens": 60, "tile": 4}
REFERENCE: dict[str, Any] = {"tile": (4, 4), "keep": 8, "scope": "stack"}
TOLERANCE = 1e-4


def flux() -> Any:
    return denoisers.flux(num_layers=1, num_single_layers=1)


def call_flux(model: Any) -> Tensor:
    return model(**denoisers.flux_inputs(8, 8, batch=1))[0]


def call_unet(model: Any) -> Tensor:
    """As pipelines do, and as tomesd asks for: the latents have a position and no name."""
    inputs = denoisers.sd15_inputs(batch=3)
    return model(inputs.pop("sample"), **inputs)[0]


def of_package(function: FunctionType, module: str) -> FunctionType:
    """The same function, written in a module of another package."""
    names = {**function.__globals__, "__name__": module}
    return FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )


def apply_cache(model: Any) -> None:
    """What cache-dit 1.5 does: a partial, named after a function that is not bound yet."""
    original, blocks = model.forward, nn.ModuleList(model.transformer_blocks)

    def new_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with unittest.mock.patch.object(self, "transformer_blocks", blocks):
            return original(*args, **kwargs)

    written = of_package(new_forward, "cache_dit.caching.cache_adapters.cache_adapter")
    model.forward = update_wrapper(partial(written, model), written)


def apply_layers(model: Any) -> None:
    """What cache-dit does to Flux of some versions: the model's forward and the blocks' anew."""
    forward = of_package(type(model).forward, "cache_dit.caching.patch_functors")
    model.forward = forward.__get__(model)


def refused_by_name(
    make: Callable[[], Any],
    call: Callable[[Any], Tensor],
    apply: Callable[[Any], Any],
    remove: Callable[[Any], Any],
    *words: str,
    captures: int = 1,
) -> Callable[[str], None]:
    """A typed error names the package and how to take it off; then all is as it was.

    Args:
        captures: at most as many, where the package leaves attributes behind.
    """

    def check(when: str) -> None:
        model = make()
        want = call(toma_fx.optimize(model, **SMALL))
        if when == "before":
            apply(model)
        optimized = toma_fx.optimize(model, **SMALL)
        if when != "before":
            assert torch.equal(call(optimized), want)
            apply(optimized if when == "through" else model)
        for _ in range(2):
            with pytest.raises(CompanionError) as caught:
                call(optimized)
            assert type(caught.value) is CompanionError
            for word in words:
                assert word in str(caught.value)
            assert caught.value.where
            assert caught.value.expected
            assert caught.value.hint
        remove(optimized if when == "through" else model)
        optimized.reset()
        assert torch.equal(call(optimized), want), "merges again"
        assert optimized.cache.captures <= captures, "and finds its graph again"

    return check


def put_back(model: Any) -> None:
    del model.forward


def cache_dit(when: str) -> None:
    for apply in (apply_cache, apply_layers) if when == "through" else (apply_cache,):
        words = "cache-dit skips", "cache_dit.disable_cache", "of cache_dit.caching"
        refused_by_name(flux, call_flux, apply, put_back, *words)(when)


def tome_patch(when: str) -> None:
    library = pytest.importorskip("tomesd")
    words = "tomesd merges", "tomesd.remove_patch(model)", 'method="tomesd"', "of tomesd.patch"
    check = refused_by_name(
        denoisers.small_sd15,
        call_unet,
        library.apply_patch,
        library.remove_patch,
        *words,
        captures=2,
    )
    check(when)


def doubling(forward: Any) -> Any:
    """A function around `forward` that takes whatever it takes."""

    @wraps(forward)
    def double(*args: Any, **kwargs: Any) -> Any:
        return (2 * forward(*args, **kwargs)[0],)

    return double


def scaling(forward: Any) -> Any:
    return lambda *args, **kwargs: 0.5 * forward(*args, **kwargs)


def class_scaling(kind: type) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return 0.5 * kind.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    return type("Scaled", (kind,), {"forward": forward})


def replace_in_model(model: Any) -> None:
    model.forward = doubling(model.forward)


def replace_in_block(model: Any) -> None:
    for layer in (model.transformer_blocks[0].ff, model.transformer_blocks[0].attn.to_out[0]):
        layer.forward = scaling(layer.forward)


def replace_class(model: Any) -> None:
    for block in model.transformer_blocks:
        block.ff.__class__ = class_scaling(type(block.ff))


def forward_function(when: str) -> None:
    """On the model, in its blocks, or by their class: captured, there before or put later."""
    for put in (replace_in_model, replace_in_block, replace_class):
        model = flux()
        eager, before = stand_in(model, Settings(**REFERENCE)), call_flux(model)
        off, on = toma_fx.optimize(model, ratio=0.0), toma_fx.optimize(model, **SMALL)
        if when == "original":
            assert torch.equal(call_flux(off), before)
            call_flux(on)
            off.reset()
            on.reset()
        put(model)
        put(eager)
        after = call_flux(model)
        assert denoisers.relative(after, before) > 50 * TOLERANCE, "it acts"
        assert torch.equal(call_flux(off), after)
        got = call_flux(on)
        assert denoisers.relative(got, call_flux(eager)) < TOLERANCE
        assert denoisers.relative(got, after) > 50 * TOLERANCE, "merging acts"


def forward_around(when: str) -> None:
    """Set on the optimized denoiser: acts around a call, and must call what it replaced."""
    model = flux()
    optimized = toma_fx.optimize(model, **SMALL)
    want = call_flux(optimized)
    own = optimized.forward
    optimized.forward = doubling(own)
    optimized.reset()
    assert torch.equal(call_flux(optimized), 2 * want)
    with pytest.raises(CompanionError, match="do not act in a step") as caught:
        optimized.step(denoisers.flux_inputs(8, 8, batch=1), toma_fx.State())
    assert "doubling" in caught.value.got
    optimized.forward = MethodType(type(model).forward, optimized)
    with pytest.raises(CompanionError, match="nothing would merge") as caught:
        call_flux(optimized)
    assert "of diffusers" in caught.value.got
    assert "restore(denoiser).forward" in caught.value.hint
    optimized.forward = own
    optimized.reset()
    assert "forward" not in vars(optimized)
    assert torch.equal(call_flux(optimized), want)
    assert ModelGuard(model).key == ModelGuard(toma_fx.restore(optimized)).key

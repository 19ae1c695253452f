"""Code in the place of a model's own: who wrote it, what it is called with, and real packages."""

from __future__ import annotations

from functools import partial, update_wrapper, wraps
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import FluxTransformer2DModel
from torch import nn

import toma_fx
from tests import denoisers
from tests.capture.replaced_cases import (
    SMALL,
    call_flux,
    call_unet,
    doubling,
    flux,
    of_package,
    refused_by_name,
)
from toma_fx.capture.guard import ModelGuard
from toma_fx.capture.replaced import find_replaced, module_of, replacement
from toma_fx.errors import CompanionError, StatefulModelError
from toma_fx.run.calls import CallSignature


@pytest.mark.parametrize("when", ["before", "through", "original"])
@torch.no_grad()
def test_cache_dit(when: str) -> None:
    library = pytest.importorskip("cache_dit")

    def make() -> Any:
        return denoisers.flux(num_layers=2, num_single_layers=1)

    def apply(model: Any) -> None:
        adapter = library.BlockAdapter(
            transformer=model,
            blocks=[model.transformer_blocks],
            forward_pattern=[library.ForwardPattern.Pattern_1],
            has_separate_cfg=False,
            check_forward_pattern=False,
        )
        config = library.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1)
        library.enable_cache(adapter, cache_config=config)

    words = "cache-dit skips", "cache_dit.disable_cache", "of cache_dit."
    refused_by_name(make, call_flux, apply, library.disable_cache, *words)(when)


def test_origins() -> None:
    def own(self: Any) -> None: ...

    named = of_package(own, "somewhere.deep")
    for form in (
        named,
        partial(named, 1),
        named.__get__(flux()),
        update_wrapper(partial(named), own),
    ):
        assert module_of(form) == "somewhere.deep"
    assert wraps(named)(own).__module__ == "somewhere.deep"
    assert module_of(wraps(named)(own)) == __name__, "by where it is written"
    found = replacement("a.b", named)
    assert (found.package, str(found)) == ("somewhere", f"{own.__qualname__} of somewhere.deep "
                                           "(in a.b)")  # fmt: skip


def test_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = flux()

    class Mine(FluxTransformer2DModel):
        pass

    class Local(nn.Module):
        def forward(self) -> None: ...

    plain = {"": model, "local": Local(), "base": nn.Module(), "list": nn.ModuleList()}
    assert list(find_replaced(plain)) == []
    model.__class__ = Mine
    assert list(find_replaced({"": model})) == []
    model.__class__ = FluxTransformer2DModel
    model.transformer_blocks[0].forward = doubling(len)
    (found,) = find_replaced(dict(model.named_modules()))
    assert (found.path, found.module) == ("transformer_blocks.0", doubling.__module__)
    monkeypatch.setattr(FluxTransformer2DModel, "forward", of_package(test_origins, "teacher.x"))
    (found,) = find_replaced({"": model})
    assert (found.path, found.package) == ("", "teacher")


@torch.no_grad()
def test_a_class_that_is_written_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is captured anew, and its first graph is found when the class is as it was."""
    model = flux()
    optimized = toma_fx.optimize(model, ratio=0.0)
    before, kind = call_flux(optimized), type(model.transformer_blocks[0])
    own = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        text, image = own(self, *args, **kwargs)
        return text, 0.5 * image

    for changed in (True, False, True):
        with monkeypatch.context() as patch:
            if changed:
                patch.setattr(kind, "forward", forward)
            optimized.reset()
            got = call_flux(optimized)
            assert torch.equal(got, call_flux(model))
            assert torch.equal(got, before) != changed
    assert optimized.cache.captures == 2


@torch.no_grad()
def test_a_class_alone_that_changes() -> None:
    """Nothing of the module's own dictionary is written."""
    block = flux().transformer_blocks[0]
    guard, key = ModelGuard(block), ModelGuard(block).key
    kind = type(block)
    block.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__})
    assert not guard.holds()
    assert ModelGuard(block).key != key
    block.__class__ = kind
    assert guard.holds()
    assert ModelGuard(block).key == key


@torch.no_grad()
def test_what_cannot_be_captured_names_its_origin() -> None:
    model, seen = flux(), []
    inner = model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return inner(*args, **kwargs)

    model.forward = counting
    with pytest.raises(StatefulModelError) as caught:
        call_flux(toma_fx.optimize(model, **SMALL))
    assert f"counting of {__name__} (in the denoiser)" in caught.value.hint
    assert caught.value.got.startswith("closure variable 'seen'")


@torch.no_grad()
def test_positions_are_kept_for_who_sees_them() -> None:
    """A hook, or a function around, reads `args[0]` as pipelines give it."""
    seen = []

    def note(module: nn.Module, args: Any) -> None:
        assert args[0].dim() == 4

    model = denoisers.small_sd15()
    want = call_unet(model)
    handle = model.register_forward_pre_hook(note)
    assert torch.equal(call_unet(toma_fx.optimize(model, ratio=0.0)), want)
    handle.remove()
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(2 * args[0], *args[1:], **kwargs)
    optimized = toma_fx.optimize(model, ratio=0.0)
    inputs = denoisers.sd15_inputs(batch=3)
    sample, hidden = inputs["sample"], inputs["encoder_hidden_states"]
    for step in (500, 400):
        got = optimized(sample, step, hidden)[0]
        assert torch.equal(got, model(sample, step, hidden)[0])
        seen.append(got)
    assert not torch.equal(*seen)
    assert optimized.cache.captures == 1, "steps as numbers are inputs of the graph"


def test_signatures() -> None:
    class Own(nn.Module):
        def forward(self, sample: Any, timestep: Any, *, scale: Any = 1) -> None: ...

    model = Own()
    signature = CallSignature(model)
    assert str(signature.now()) == "(sample: 'Any', timestep: 'Any', *, scale: 'Any' = 1) -> 'None'"
    assert not signature.is_wrapped

    def unbound(self: Any, *args: Any, **kwargs: Any) -> None: ...

    model.forward = update_wrapper(partial(unbound, model), unbound)
    assert signature.is_wrapped
    bound = signature.now().bind(1, own=2)
    assert bound.arguments == {"sample": 1, "kwargs": {"own": 2}}
    model.forward = lambda sample, extra: None
    assert list(signature.now().parameters) == ["sample", "extra"]
    del model.forward
    assert list(signature.now().parameters) == ["sample", "timestep", "scale"]


@torch.no_grad()
def test_around_a_hook_of_accelerate() -> None:
    """Below the hook it is captured; over it, it is refused, before or after a graph is there."""
    model = flux()
    model.forward = doubling(model.forward)
    want = call_flux(model)
    optimized = toma_fx.optimize(model, ratio=0.0)
    assert torch.equal(call_flux(optimized), want)
    key = ModelGuard(model).key
    cpu_offload_with_hook(model, "cpu")
    assert ModelGuard(model).key == key
    assert torch.equal(call_flux(optimized), want)
    model.forward = doubling(model.forward)
    for each in (optimized, toma_fx.optimize(model, ratio=0.0)):
        with pytest.raises(CompanionError, match="over a hook of accelerate"):
            call_flux(each)

"""What other libraries do to a model, before or after it is optimized: it works, or is refused.

`COMPANIONS` has a row for each, with the check that runs it; docs/companions.md prints the rows.
Merged results are compared with the independent eager reference, unmerged ones with the original.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import (
    ContextParallelConfig,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    SmoothedEnergyGuidanceConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
    hooks,
)
from diffusers.hooks import smoothed_energy_guidance_utils as smoothed
from diffusers.models import _modeling_parallel as parallel
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import toma_fx
from tests import denoisers
from tests.capture import replaced_cases
from tests.reference import Settings, stand_in
from toma_fx.capture.guard import ModelGuard
from toma_fx.errors import CompanionError, ModelTypeError, OffloadError

TOLERANCE = 1e-4
SMALL: dict[str, Any] = {"min_tokens": 60, "tile": 4}
REFERENCE: dict[str, Any] = {"tile": (4, 4), "keep": 8, "scope": "stack"}
DOCS = Path(__file__).parents[2] / "docs" / "companions.md"
WHENS = ("before", "through", "original")
"""Enabled on the model before it is optimized, on the optimized denoiser, on the original after."""

Enable = Callable[[Any], Any]


def flux(single: int = 0) -> Any:
    return denoisers.flux(num_layers=1, num_single_layers=single)


def two_blocks() -> Any:
    return flux(single=1)


def unet() -> Any:
    return denoisers.small_sd15()


def call(model: Any, step: int = 0) -> Tensor:
    """One step, labeled as pipelines do where the model takes labels."""
    if hasattr(model, "transformer_blocks"):
        with model.cache_context("cond"):
            return model(**denoisers.flux_inputs(8, 8, batch=1, timestep=0.9 - step / 20))[0]
    inputs = denoisers.sd15_inputs(batch=3)
    return model(**{**inputs, "timestep": torch.tensor(500 - step)})[0]


def enabled(when: str, model: Any, enable: Enable, **config: Any) -> tuple[Any, Any]:
    """(model, optimized): the companion is enabled before, through or after optimizing."""
    if when == "before":
        enable(model)
        return model, toma_fx.optimize(model, **{**SMALL, **config})
    optimized = toma_fx.optimize(model, **{**SMALL, **config})
    enable(optimized if when == "through" else model)
    return model, optimized


def works(make: Callable[[], Any], enable: Enable, *, acts: bool = False) -> Callable[[str], None]:
    """The companion changes both alike: merged as in the reference, off as in the original."""

    def check(when: str) -> None:
        model = make()
        if when != "through":
            off = toma_fx.optimize(model, ratio=0.0)
            before = call(model)
            if when == "original":
                assert torch.equal(call(off), before)
                off.reset()
            enable(model)
            after = call(model)
            assert torch.equal(call(off), after)
            assert not (acts and torch.equal(after, before))
            return
        optimized = toma_fx.optimize(model, **SMALL)
        enable(optimized)
        eager = stand_in(model, Settings(**REFERENCE))
        for step in range(2):
            got = call(optimized, step)
            assert denoisers.relative(got, call(eager, step)) < TOLERANCE
            assert denoisers.relative(got, call(model, step)) > 50 * TOLERANCE, "merging acts"
        assert optimized.totals == {"refresh": 1, "reuse": 1}

    return check


def refused(
    make: Callable[[], Any],
    enable: Enable,
    *words: str,
    error: type[CompanionError] = OffloadError,
    disable: Enable | None = None,
) -> Callable[[str], None]:
    """A typed error names the hook and what to do; done, it leaves the model as it was."""

    def check(when: str) -> None:
        model = make()
        state = ModelGuard(model).key
        _, optimized = enabled(when, model, enable, ratio=0.0)
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(error) as caught:
            call(optimized)
        assert type(caught.value) is error
        for word in words:
            assert word in str(caught.value)
        for each in (caught.value.where, caught.value.expected, caught.value.got):
            assert each
        assert caught.value.hint
        with pytest.raises(error):
            toma_fx.explain(model, denoisers.flux_inputs(8, 8, batch=1), ratio=0.0)
        assert optimized.cache.captures == 0, "nothing was captured"
        for name, value in model.state_dict().items():
            same = value.is_meta or torch.equal(value.float(), weights[name].float())
            assert same, "the original is untouched"
        if disable is not None:
            disable(optimized)
            assert ModelGuard(model).key == state, "earlier graphs are found again"

    return check


# -- how each is enabled --------------------------------------------------------------------------

NOW: dict[str, Any] = {"current_timestep_callback": lambda: 500}
RANGE: dict[str, Any] = {
    "spatial_attention_block_skip_range": 2,
    "spatial_attention_timestep_skip_range": (-1, 1000),
}


def cache(config: Any, hook: str) -> Callable[[str], None]:
    """Refused by the name of its hook, until `disable_cache`."""
    return refused(
        two_blocks,
        lambda m: m.enable_cache(copy.copy(config)),
        "a cache skips",
        hook,
        "disable_cache()",
        disable=lambda m: m.disable_cache(),
    )


def skip_layer(model: Any) -> None:
    hooks.apply_layer_skip(model, LayerSkipConfig([0], fqn="transformer_blocks"))


def smooth_energy(model: Any) -> None:
    config = SmoothedEnergyGuidanceConfig([0], fqn="down_blocks.0.attentions.0.transformer_blocks")
    smoothed._apply_smoothed_energy_guidance_hook(model, config, 1.0)


def offload_groups(model: Any) -> None:
    model.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


def remove(*names: str) -> Enable:
    """What the errors say: take hooks out of diffusers' registries by hand."""

    def act(model: Any) -> None:
        for root in {model, toma_fx.restore(model)}:
            registry = hooks.HookRegistry.check_if_exists_or_initialize(root)
            for name in names:
                registry.remove_hook(name, recurse=True)

    return act


def split_context(model: Any) -> None:
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))


def split_tensors(model: Any) -> None:
    """As `enable_parallelism` leaves the model, which does so on accelerators only."""
    config = parallel.TensorParallelConfig(tp_degree=2)
    model._parallel_config = parallel.ParallelConfig(tensor_parallel_config=config)


def perturb(model: Any) -> None:
    """As a PAG pipeline does for its layers."""
    block = model.down_blocks[0].attentions[0].transformer_blocks[0]
    block.attn1.processor = PAGCFGIdentitySelfAttnProcessor2_0()


@torch.no_grad()
def autocast_region(when: str) -> None:
    model, optimized = enabled(when, flux(), lambda m: None)
    outside = call(optimized)
    optimized.reset()
    off = toma_fx.optimize(model, ratio=0.0)
    assert torch.equal(call(off), call(model))
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(CompanionError, match="autocast") as caught:
            call(optimized)
        with pytest.raises(CompanionError, match="autocast"):
            toma_fx.explain(model, denoisers.flux_inputs(8, 8, batch=1), **SMALL)
        assert "bfloat16" in caught.value.got
        assert "denoiser.to(" in caught.value.hint
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(call(optimized), outside)
        off.reset()
        assert torch.equal(call(off), call(model)), "merging off: another graph"
        assert call(off).dtype == torch.bfloat16
    off.reset()
    assert torch.equal(call(off), call(model))
    assert off.cache.captures == 2


@torch.no_grad()
def other_backend(when: str) -> None:
    model, optimized = enabled(when, flux(), lambda m: m.set_attention_backend("flex"))
    with pytest.raises(CompanionError, match="'flex'") as caught:
        call(optimized)
    assert caught.value.where == "transformer_blocks.0.attn"
    assert 'set_attention_backend("native")' in caught.value.hint
    if when != "through":
        return
    off = toma_fx.optimize(model, ratio=0.0)
    assert torch.equal(call(off), call(model))
    mlp = toma_fx.optimize(model, **SMALL, branches=("mlp",))
    assert denoisers.relative(call(mlp), call(model)) > TOLERANCE
    optimized.set_attention_backend("native")
    assert torch.equal(call(optimized), call(toma_fx.optimize(flux(), **SMALL)))


@torch.no_grad()
def backend_region(when: str) -> None:
    """A backend that holds for a `with` block is outside the model, and still followed."""
    model, optimized = enabled(when, flux(), lambda m: None, ratio=0.0)
    plain = call(model)
    for _ in range(2):
        with attention_dispatch.attention_backend("_native_math"):
            other = call(model)
            assert torch.equal(call(optimized), other)
        assert torch.equal(call(optimized), plain)
    assert not torch.equal(other, plain), "the kernels round differently"
    assert optimized.cache.captures == 2


@torch.no_grad()
def blocks_compiled(when: str) -> None:
    model = flux()
    model.compile_repeated_blocks(backend="eager")
    with pytest.raises(ModelTypeError, match="parts of the model are compiled") as caught:
        toma_fx.optimize(model)
    assert caught.value.where == "transformer_blocks.0"
    for module in model.modules():
        module._compiled_call_impl = None
    optimized = toma_fx.optimize(model, ratio=0.0)
    want = call(optimized)
    optimized.reset()
    model.compile_repeated_blocks(backend="eager")
    assert torch.equal(call(optimized), want), "the original's own affair"
    assert optimized.cache.captures == 1


@torch.no_grad()
def compiled_regions(when: str) -> None:
    model, ran = flux(), []

    def backend(graph: Any, inputs: Any) -> Any:
        ran.append(graph)
        return graph.forward

    optimized = toma_fx.optimize(model, **SMALL)
    optimized.compile_repeated_blocks(backend=backend, fullgraph=True)
    got = [call(optimized, step) for step in range(2)]
    assert optimized.compiled
    assert len(ran) == 2, "one graph for refresh, one for reuse"
    assert all(m._compiled_call_impl is None for m in model.modules()), "the original is not"
    assert torch.equal(got[0], call(toma_fx.optimize(flux(), **SMALL)))


def compiled_original(when: str) -> None:
    with pytest.raises(ModelTypeError, match="compiled already"):
        toma_fx.optimize(torch.compile(flux(), backend="eager"))
    model = flux()
    model.compile(backend="eager")
    with pytest.raises(ModelTypeError, match=r"optimize\(model\)\.compile\(\)"):
        toma_fx.optimize(model)


@torch.no_grad()
def offloaded_model(when: str) -> None:
    """As `enable_model_cpu_offload` does, with the CPU in the part of the accelerator."""
    moved = []

    def enable(model: Any) -> None:
        hook = cpu_offload_with_hook(model, "cpu")[1].hook
        inner = hook.pre_forward
        hook.pre_forward = lambda *a, **k: (moved.append(1), inner(*a, **k))[1]

    optimized = enabled(when, flux(), enable)[1]
    want = call(toma_fx.optimize(flux(), **SMALL))
    assert torch.equal(call(optimized), want)
    out, _ = optimized.step(denoisers.flux_inputs(8, 8, batch=1, timestep=0.9), toma_fx.State())
    assert torch.equal(out[0], want)
    assert len(moved) == 2, "a call and a step"


class Double(hooks.ModelHook):
    """A hook of one's own."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return (2 * output[0],)


def register(model: Any) -> None:
    hooks.HookRegistry.check_if_exists_or_initialize(model).register_hook(Double(), "double")


@torch.no_grad()
def own_hook(when: str) -> None:
    """On the optimized denoiser around a call; elsewhere refused."""
    model, optimized = enabled(when, flux(), register, ratio=0.0)
    if when == "through":
        assert torch.equal(call(optimized), 2 * call(model))
        with pytest.raises(CompanionError, match="do not act in a step") as caught:
            optimized.step(denoisers.flux_inputs(8, 8, batch=1), toma_fx.State())
        assert caught.value.got == "Double"
    else:
        with pytest.raises(OffloadError, match=r"Double \(double\)"):
            call(optimized)


@torch.no_grad()
def forward_hook(when: str) -> None:
    handles = []

    def enable(model: Any) -> None:
        handles.append(model.register_forward_hook(lambda module, args, out: (2 * out[0],)))

    model, optimized = enabled(when, flux(), enable, ratio=0.0)
    doubled = call(optimized)
    handles[0].remove()
    assert torch.equal(doubled, 2 * call(model))


@torch.no_grad()
def caches_by_hand(when: str) -> None:
    """A cache applied to the stand-in leaves a hook on it, which must go as well."""
    config = FasterCacheConfig(**RANGE, **NOW, is_guidance_distilled=True)
    model = flux()
    state = ModelGuard(model).key
    _, optimized = enabled(when, model, lambda m: hooks.apply_faster_cache(m, config))
    with pytest.raises(OffloadError, match="FasterCache"):
        call(optimized)
    remove("faster_cache_block")(optimized)
    with pytest.raises(OffloadError, match="FasterCacheDenoiserHook") as caught:
        call(optimized)
    assert caught.value.where == ("the optimized denoiser" if when == "through" else "the denoiser")
    assert "('faster_cache_denoiser',)" in caught.value.hint
    remove("faster_cache_denoiser")(optimized)
    assert ModelGuard(model).key == state
    if when == "through":
        assert torch.equal(call(optimized), call(toma_fx.optimize(flux(), **SMALL)))


# -- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Companion:
    """A row of the table.

    Attributes:
        name, verdict, advice: the row, as printed. check: runs it, for one of `whens`.
    """

    name: str
    verdict: str
    advice: str
    check: Callable[[str], None]
    whens: tuple[str, ...] = WHENS


DISABLE = "`denoiser.disable_cache()`"
PLAIN_GUIDER = "a guider that leaves the layers alone, or `toma_fx.restore(pipe)`"
ONE_PROCESS = (
    "load without `parallel_config`; `optimize(model, parallel=mesh)` ([parallel.md](parallel.md))"
)
COMPANIONS = (
    Companion(
        "First-block cache (`FirstBlockCacheConfig`)",
        "refused",
        DISABLE,
        cache(FirstBlockCacheConfig(threshold=0.1), "FBCHeadBlockHook"),
    ),
    Companion(
        "Pyramid attention broadcast (`PyramidAttentionBroadcastConfig`)",
        "refused",
        DISABLE,
        cache(PyramidAttentionBroadcastConfig(**RANGE, **NOW), "PyramidAttentionBroadcastHook"),
    ),
    Companion(
        "FasterCache (`FasterCacheConfig`)",
        "refused",
        DISABLE,
        cache(
            FasterCacheConfig(**RANGE, **NOW, is_guidance_distilled=True), "FasterCacheDenoiserHook"
        ),
    ),
    Companion(
        "TaylorSeer (`TaylorSeerCacheConfig`)",
        "refused",
        DISABLE,
        cache(TaylorSeerCacheConfig(), "TaylorSeerCacheHook"),
    ),
    Companion(
        "MagCache (`MagCacheConfig`)",
        "refused",
        DISABLE,
        cache(MagCacheConfig(num_inference_steps=4, mag_ratios=[1.0] * 4), "MagCacheHeadHook"),
    ),
    Companion(
        "SeaCache (`SeaCacheConfig`)",
        "refused",
        DISABLE,
        cache(SeaCacheConfig(threshold=0.1), "SeaCacheRootHook"),
    ),
    Companion(
        "Text key and value cache (`TextKVCacheConfig`)",
        "refused",
        DISABLE,
        cache(TextKVCacheConfig(), "TextKVCacheTransformerHook"),
    ),
    Companion(
        "A cache applied by hand (`apply_faster_cache`, ...)",
        "refused",
        "`remove_hook` as the error says",
        caches_by_hand,
    ),
    Companion(
        "Skipped layers (`SkipLayerGuidance`, `apply_layer_skip`)",
        "refused",
        PLAIN_GUIDER,
        refused(
            flux,
            skip_layer,
            "a guider changes layers",
            "TransformerBlockSkipHook",
            disable=remove("layer_skip_hook"),
        ),
    ),
    Companion(
        "Smoothed energy guidance (`SmoothedEnergyGuidance`)",
        "refused",
        PLAIN_GUIDER,
        refused(unet, smooth_energy, "a guider changes layers", "SmoothedEnergyGuidanceHook"),
    ),
    Companion(
        "Group offload (`enable_group_offload`)",
        "refused",
        "`pipe.enable_model_cpu_offload()`",
        refused(
            flux,
            offload_groups,
            "group offload",
            "GroupOffloadingHook",
            "enable_model_cpu_offload",
            disable=remove("group_offloading"),
        ),
    ),
    Companion(
        "Sequential offload (`enable_sequential_cpu_offload`), device maps",
        "refused",
        "`pipe.remove_all_hooks()`, then `pipe.enable_model_cpu_offload()`",
        refused(
            flux,
            lambda m: cpu_offload(m, "cpu"),
            "AlignDevicesHook",
            "remove_all_hooks",
        ),
    ),
    Companion(
        "Model offload (`enable_model_cpu_offload`)",
        "works",
        "before or after optimizing",
        offloaded_model,
        ("before", "through"),
    ),
    Companion(
        "Layerwise casting (`enable_layerwise_casting`)",
        "refused",
        "load the model anew, in the compute dtype or quantized",
        refused(
            flux,
            lambda m: m.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
            "layerwise casting",
            "LayerwiseCastingHook",
        ),
    ),
    Companion(
        "Context parallelism (`enable_parallelism`)",
        "refused",
        ONE_PROCESS,
        refused(
            flux, split_context, "several processes", "ParallelConfig", error=CompanionError
        ),
    ),
    Companion(
        "Tensor parallelism (`enable_parallelism`)",
        "refused",
        ONE_PROCESS,
        refused(
            flux, split_tensors, "several processes", "ParallelConfig", error=CompanionError
        ),
    ),
    Companion(
        "Attention backend `native`",
        "works",
        "",
        works(flux, lambda m: m.set_attention_backend("native")),
        ("through",),
    ),
    Companion(
        "Attention backends `_native_math`, `_native_flash`, `_native_efficient`, `_native_cudnn`",
        "works",
        "the graph runs under the kernel; one for the whole model",
        works(flux, lambda m: m.set_attention_backend("_native_math"), acts=True),
    ),
    Companion(
        "Attention backends `flex`, `flash`, `sage`, `xformers`, ...",
        "refused",
        '`set_attention_backend("native")`; merging off or `branches=("mlp",)` runs with `flex`',
        other_backend,
    ),
    Companion(
        "`with attention_backend(...)`",
        "works",
        "as the backend it names; one capture for each",
        backend_region,
        ("before",),
    ),
    Companion(
        "Autocast regions (`torch.autocast`)",
        "refused",
        "`denoiser.to(torch.bfloat16)`; merging off runs in them",
        autocast_region,
        ("before",),
    ),
    Companion(
        "`torch.compile(model)`, `model.compile()` before optimizing",
        "refused",
        "`toma_fx.optimize(model).compile()`",
        compiled_original,
        ("before",),
    ),
    Companion(
        "`model.compile_repeated_blocks()` before optimizing",
        "refused",
        "`toma_fx.optimize(model).compile()`",
        blocks_compiled,
        ("before",),
    ),
    Companion(
        "`denoiser.compile_repeated_blocks()` on the optimized denoiser",
        "works",
        "compiles blocks that repeat, as on the original; `.compile()` compiles whole programs",
        compiled_regions,
        ("through",),
    ),
    Companion(
        "FreeU (`enable_freeu`)",
        "works",
        "",
        works(unet, lambda m: m.enable_freeu(0.9, 0.2, 1.1, 1.2), acts=True),
    ),
    Companion("PAG (pipelines with `pag_scale`)", "works", "", works(unet, perturb, acts=True)),
    Companion(
        "Gradient checkpointing (`enable_gradient_checkpointing`)",
        "works",
        "has no effect: inference only",
        works(flux, lambda m: m.enable_gradient_checkpointing()),
    ),
    Companion(
        "`to(memory_format=torch.channels_last)`",
        "works",
        "",
        works(unet, lambda m: m.to(memory_format=torch.channels_last)),
    ),
    Companion(
        "`register_forward_hook` on a module of the original",
        "works",
        "is captured; on the optimized denoiser it acts around a call",
        forward_hook,
    ),
    Companion(
        "A `ModelHook` of your own",
        "refused",
        "works on the optimized denoiser itself, around a call",
        own_hook,
    ),
    Companion(
        "cache-dit (`cache_dit.enable_cache`)",
        "refused",
        "`cache_dit.disable_cache(...)`; `optimize(model, cache=...)` ([caching.md](caching.md))",
        replaced_cases.cache_dit,
    ),
    Companion(
        "tomesd (`tomesd.apply_patch`)",
        "refused",
        '`tomesd.remove_patch(model)`; `optimize(model, method="tomesd")`',
        replaced_cases.tome_patch,
    ),
    Companion(
        "`forward` of the model or of a block, or the class of one, replaced",
        "works",
        "is captured; where it can't be, the error names the code and its module",
        replaced_cases.forward_function,
        ("before", "original"),
    ),
    Companion(
        "`forward` of the optimized denoiser replaced",
        "works",
        "around a call; refused if it does not call what it replaced, and in `step`",
        replaced_cases.forward_around,
        ("through",),
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    """diffusers' global attention backend, which `set_attention_backend` changes, as it was."""
    registry = attention_dispatch._AttentionBackendRegistry
    before = registry._active_backend
    yield
    registry.set_active_backend(before)


@pytest.fixture(autouse=True)
def _two_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process group of two that never communicates, for the row of context parallelism."""
    if "Context parallelism" not in request.node.name:
        yield
        return
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


CELLS = [
    pytest.param(row, when, id=f"{row.name}-{when}") for row in COMPANIONS for when in row.whens
]


@pytest.mark.parametrize(("row", "when"), CELLS)
@torch.no_grad()
def test_companion(row: Companion, when: str) -> None:
    row.check(when)


def test_the_docs_say_what_is_tested() -> None:
    table = DOCS.read_text().partition("## Quantized models")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    assert cells[1:] == [(row.name, row.verdict, row.advice) for row in COMPANIONS]
    assert {row.verdict for row in COMPANIONS} == {"works", "refused"}


# -- beside the table -----------------------------------------------------------------------------


@torch.no_grad()
def test_what_comes_and_goes_leaves_the_graph() -> None:
    optimized = toma_fx.optimize(two_blocks(), **SMALL)
    want = call(optimized)
    # each twice: what a removed hook leaves behind does not hide the next one
    for config in (FirstBlockCacheConfig(threshold=0.1), TaylorSeerCacheConfig()) * 2:
        optimized.enable_cache(config)
        with pytest.raises(OffloadError):
            call(optimized)
        optimized.disable_cache()
        optimized.reset()
        assert torch.equal(call(optimized), want)
    skip_layer(optimized)
    with pytest.raises(OffloadError):
        call(optimized)
    remove("layer_skip_hook")(optimized)
    offload_groups(optimized)
    with pytest.raises(OffloadError):
        call(optimized)
    remove("group_offloading")(optimized)
    optimized.reset()
    assert torch.equal(call(optimized), want)
    assert optimized.cache.captures == 1


@torch.no_grad()
def test_parts_of_a_model_under_different_kernels() -> None:
    model = denoisers.flux(num_layers=1, num_single_layers=1)
    model.transformer_blocks[0].attn.processor._attention_backend = "_native_math"
    with pytest.raises(CompanionError, match="different attention kernels") as caught:
        call(toma_fx.optimize(model, **SMALL))
    assert caught.value.where == "transformer_blocks.0.attn"
    assert "_native_math" in caught.value.got


def test_an_unused_backend_is_not_looked_at() -> None:
    """A UNet calls torch's attention itself, whatever the global backend is."""
    model = unet()
    home = ModelGuard(model).companions.environment
    with attention_dispatch.attention_backend("flex"):
        assert ModelGuard(model).companions.environment == home
        assert ModelGuard(model).companions.backends == ("native",)
        assert ModelGuard(flux()).companions.backends == ("flex",)

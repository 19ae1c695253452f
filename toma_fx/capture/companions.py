"""Other libraries that act inside the forward pass: what they do, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend

from toma_fx.errors import CompanionError, OffloadError

KERNELS = {
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_math": SDPBackend.MATH,
}
"""Attention backends of diffusers that are torch's own attention with one kernel."""


# -- what lies outside the model ------------------------------------------------------------------


def _autocast(device: str) -> tuple[tuple[str, torch.dtype], ...]:
    """The autocast regions that hold for a model on a device, and their dtypes."""
    kinds = (kind for kind in sorted({"cpu", device}) if torch.amp.is_autocast_available(kind))
    active = (kind for kind in kinds if torch.is_autocast_enabled(kind))
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in active)


def _dispatching(modules: Mapping[str, nn.Module]) -> dict[str | None, list[str]]:
    """Attention backend -> paths of the modules that use it; None is the global one.

    A processor that calls torch's attention directly counts as native.
    """
    found: dict[str | None, list[str]] = {}
    for path, module in modules.items():
        processor = getattr(module, "processor", None)
        if processor is not None:
            backend = getattr(processor, "_attention_backend", "native")
            found.setdefault(getattr(backend, "value", backend), []).append(path)
    return found


def _active_backend() -> str:
    """The attention backend that holds in diffusers now, set by `attention_backend(...)`, say."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    active = getattr(getattr(dispatch, "_AttentionBackendRegistry", None), "_active_backend", None)
    return str(getattr(active, "value", active) or "native")


# -- who else acts inside the forward pass --------------------------------------------------------

_REMOVE = (
    "for root in {denoiser, toma_fx.restore(denoiser)}: for name in {names}: "
    "HookRegistry.check_if_exists_or_initialize(root).remove_hook(name, recurse=True)"
)


_CACHE = (
    "a cache skips parts of the model, by what it saw in earlier steps",
    f"denoiser.disable_cache(); where it was applied by hand, {_REMOVE}",
)


_PARALLEL = (
    "the model is split over several processes",
    "load the model without parallel_config and do not call enable_parallelism; "
    "run whole requests side by side instead, one process per device",
)


_GUIDER = (
    "a guider changes layers in one of its passes",
    "a guider that leaves the layers alone (ClassifierFreeGuidance), or toma_fx.restore(pipe)",
)


_KNOWN: Mapping[str, tuple[str, str]] = {
    "context_parallel": _PARALLEL,
    "tensor_parallel": _PARALLEL,
    "faster_cache": _CACHE,
    "first_block_cache": _CACHE,
    "mag_cache": _CACHE,
    "pyramid_attention_broadcast": _CACHE,
    "sea_cache": _CACHE,
    "taylorseer_cache": _CACHE,
    "text_kv_cache": _CACHE,
    "group_offloading": (
        "group offload moves the weights while the model runs",
        f"pipe.enable_model_cpu_offload() instead; to go on with this model, {_REMOVE}; "
        "then denoiser.to(device)",
    ),
    "layer_skip": _GUIDER,
    "smoothed_energy_guidance_utils": _GUIDER,
    "layerwise_casting": (
        "layerwise casting casts the weights while the model runs",
        "load the model anew, in the compute dtype or quantized (the cast can't be undone)",
    ),
}
"""Module of `diffusers.hooks` -> what its hooks do, and what to do instead."""


_OTHER = (
    "a hook changes what the model does while it runs",
    f"{_REMOVE}; or register_forward_hook, which is captured, or a hook on the optimized denoiser "
    "itself, which acts around each step",
)


def _is_diffusers(hook: Any) -> bool:
    return type(hook).__module__.startswith("diffusers.hooks.")


def _hooks(module: nn.Module) -> dict[str, Any]:
    """Hooks in the registry of diffusers that a module has itself."""
    return getattr(vars(module).get("_diffusers_hook"), "hooks", None) or {}


def check_wrapping(stand_in: nn.Module) -> None:
    """Refuse diffusers' own hooks on a stand-in; hooks of the user act around its call.

    Raises:
        OffloadError: there are some.
    """
    hooks = {name: hook for name, hook in _hooks(stand_in).items() if _is_diffusers(hook)}
    if hooks:
        _refuse({"the optimized denoiser": hooks})


def _refuse(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise for hooks, by module path."""
    for path, hooks in found.items():
        first = next(iter(hooks.values()))
        known = _KNOWN if _is_diffusers(first) else {}
        what, hint = known.get(type(first).__module__.rpartition(".")[2], _OTHER)
        names = tuple(dict.fromkeys(name for each in found.values() for name in each))
        raise OffloadError(
            what,
            where=path or "the denoiser",
            expected="a forward pass without hooks of diffusers",
            got=", ".join(f"{type(hook).__name__} ({name})" for name, hook in hooks.items()),
            hint=hint.replace("{names}", repr(names)),
        )


def _check_parallel(model: nn.Module) -> None:
    config = getattr(model, "_parallel_config", None)
    if config is not None:
        what, hint = _PARALLEL
        raise CompanionError(
            what,
            where="_parallel_config of the denoiser",
            expected="a model that one process runs alone",
            got=type(config).__name__,
            hint=hint,
        )


def _check_hooks(modules: Mapping[str, nn.Module]) -> None:
    """Refuse weights that are elsewhere until a submodule runs."""
    for path, module in modules.items():
        hook = vars(module).get("_hf_hook")
        if hook is not None and (path or getattr(hook, "offload", False)):
            raise OffloadError(
                "the weights are moved while the model runs",
                where=path or "the denoiser",
                expected="weights that stay on one device during a call",
                got=f"accelerate's {type(hook).__name__} (sequential CPU offload or a device map)",
                hint="pipe.remove_all_hooks(), then pipe.enable_model_cpu_offload(), "
                "or pipe.to(device)",
            )
    _refuse({path: hooks for path, module in modules.items() if (hooks := _hooks(module))})
    meta = [n for n, p in modules[""].named_parameters() if p.is_meta] if "" in modules else []
    if meta:
        raise OffloadError(
            "the weights are not loaded",
            where=meta[0],
            expected="parameters on a device",
            got="parameters on the meta device",
            hint="load the weights first, and move the model to its device",
        )

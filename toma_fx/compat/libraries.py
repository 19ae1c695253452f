"""Private names of diffusers, accelerate and peft."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from toma_fx.compat.lookup import attribute, lookup

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils._pytree import TreeSpec as TreeSpec

F = TypeVar("F", bound=Callable[..., Any])


# -- diffusers, accelerate, peft ------------------------------------------------------------------

HOOKS, ORIGINAL_FORWARD = "_diffusers_hook", "_old_forward"
"""Where a module has diffusers' registry of hooks, and the `forward` that accelerate replaced."""
WRAPPING = frozenset({"_hf_hook", ORIGINAL_FORWARD, "forward", HOOKS})
"""Attributes by which accelerate and diffusers wrap the call of a module."""
HISTORY = frozenset(
    {"peft_config", "_hf_peft_config_loaded", "lora_scale", "_safe_fusing", "_cache_config"}
)
"""Attributes that tell how a model of diffusers came about; its forward pass reads none of them."""
STEPS_MADE, NOTES = "_num_timesteps", {"_name_or_path", "_use_default_values"}
"""Where a pipeline notes its number of steps, and a configuration what does not change a model."""
ADAPTER_SWITCHES = frozenset({"_active_adapter", "_disable_adapters", "merged_adapters"})
"""Attributes of a tuner layer of peft that say which adapters act; public properties read them."""


def diffusers_hooks(module: nn.Module) -> dict[str, Any]:
    """Hooks of diffusers that a module has itself, by name."""
    registry = vars(module).get(HOOKS)
    return {} if registry is None else attribute("diffusers", registry, "hooks")


def accelerate_hook(module: nn.Module) -> Any:
    """The hook of accelerate around a module's call (offloading, device maps); None without one."""
    return vars(module).get("_hf_hook")


def own_forward(module: nn.Module) -> Any:
    """The `forward` that was set on a module, below a hook of accelerate; None: its class's."""
    own = vars(module)
    forward = own.get("forward")
    if ORIGINAL_FORWARD in own and (forward is None or _is_accelerates(forward)):
        forward = own[ORIGINAL_FORWARD]
    natural = getattr(forward, "__func__", None) is getattr(type(module), "forward", None)
    return None if natural and getattr(forward, "__self__", None) is module else forward


def covers_hook(module: nn.Module) -> bool:
    """Whether another `forward` was set on a module over a hook of accelerate."""
    own = vars(module)
    return ORIGINAL_FORWARD in own and not _is_accelerates(own.get("forward"))


def _is_accelerates(forward: Any) -> bool:
    written = getattr(getattr(forward, "func", None), "__module__", "")
    return written.partition(".")[0] == "accelerate"


def attention_backend(processor: Any) -> str | None:
    """The attention backend of a processor: None for the global one, "native" if it knows none."""
    backend = getattr(processor, "_attention_backend", "native")
    return getattr(backend, "value", backend)


def active_attention_backend() -> str:
    """The global attention backend of diffusers; torch's own where diffusers is not imported."""
    if "diffusers.models.attention_dispatch" not in sys.modules:
        return "native"
    registry = lookup("diffusers.models.attention_dispatch", "_AttentionBackendRegistry")
    active = attribute("diffusers", registry, "_active_backend")
    return str(getattr(active, "value", active) or "native")


def parallel_config(model: nn.Module) -> Any:
    """How a model of diffusers is split over several processes; None if it is not."""
    return getattr(model, "_parallel_config", None)


def reset_stateful_cache(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Tell a model of diffusers that a generation ends, as pipelines do; others have no say."""
    getattr(model, "_reset_stateful_cache", lambda *_, **__: None)(*args, **kwargs)


def unpack_latents(pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """Latents of a Flux pipeline as a picture, from its sequence of tokens."""
    unpack = attribute("diffusers", pipe, "_unpack_latents")
    result: Tensor = unpack(latents, height, width, pipe.vae_scale_factor)
    return result

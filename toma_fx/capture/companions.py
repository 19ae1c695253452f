"""Other libraries that act on a model: what of that is followed, and what is refused.

Followed are diffusers' attention backends and, with merging off, autocast regions. Refused by name
is what acts inside the forward pass and can't be in a graph: caches, offload hooks, parallelism,
and packages that merge or skip themselves (`replaced`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from toma_fx.capture.replaced import check_replaced
from toma_fx.compat.libraries import (
    accelerate_hook,
    active_attention_backend,
    attention_backend,
    diffusers_hooks,
    parallel_config,
)
from toma_fx.errors import CompanionError, OffloadError

KERNELS = {
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_math": SDPBackend.MATH,
}
"""Attention backends of diffusers that are torch's own attention with one kernel."""


class Companions:
    """What other libraries do around a model, asked at each step.

    Raises:
        CompanionError: another library acts inside the forward pass (`OffloadError`: by hooks).
    """

    def __init__(self, model: nn.Module, *, runs: bool = True) -> None:
        """`runs`: whether the model will run, and not only be looked at."""
        modules = dict(model.named_modules())
        _check_parallel(model)
        _check_hooks(modules)
        check_replaced(modules)
        if runs or not all(p.is_meta for p in model.parameters()):
            _check_loaded(model)
        self._first = next(model.parameters(), None)
        self._users: dict[str | None, list[str]] = {}  # by attention backend; None: the global one
        for path, module in modules.items():
            processor = getattr(module, "processor", None)
            if processor is not None:
                self._users.setdefault(attention_backend(processor), []).append(path)

    @property
    def environment(self) -> tuple[Any, ...]:
        """Where the model runs: dtype and device, autocast regions, attention backends.

        Dtype and device are those of its first parameter, if it has one. Of the parameter itself:
        while another thread traces, the model holds a stand-in for it.
        """
        if self._first is None:
            return _autocast("cpu"), self.backends
        device = self._first.device
        return self._first.dtype, device, _autocast(device.type), self.backends

    @property
    def backends(self) -> tuple[str, ...]:
        """The attention backends of diffusers that act now; the global one where none is set."""
        active = active_attention_backend() if None in self._users else ""
        return tuple(dict.fromkeys(active if name is None else name for name in self._users))

    def kernel(self) -> AbstractContextManager[Any]:
        """What the graph runs under: the attention kernel that the backend asks for.

        In the graph attention is one op; which kernel runs it is not recorded there.

        Raises:
            CompanionError: parts of the model ask for different kernels.
        """
        backends = self.backends
        kernels = {KERNELS.get(name) for name in backends}
        if len(kernels) > 1:
            raise CompanionError(
                "parts of the model ask for different attention kernels",
                where=self._paths(next(name for name in backends if name in KERNELS))[0],
                expected="one attention backend for the whole model",
                got=", ".join(backends),
                hint="denoiser.set_attention_backend(...), or denoiser.reset_attention_backend()",
            )
        kernel = next(iter(kernels), None)
        return nullcontext() if kernel is None else sdpa_kernel(kernel)

    def check_merging(self, merges: Callable[[str], bool]) -> None:
        """Refuse to merge where it would not do what it should.

        Args:
            merges: whether attention at a module path is to be merged; of "", whether anything is.

        Raises:
            CompanionError: inside an autocast region, or attention is to be merged and its backend
                isn't torch's own.
        """
        autocast = _autocast("cpu" if self._first is None else self._first.device.type)
        if autocast and merges(""):
            # the graph leaves casting to autocast, which would also cast what selects the tokens
            raise CompanionError(
                "tokens are selected in float32, and autocast would round that",
                where="torch.autocast around the call",
                expected="no autocast region around the optimized denoiser",
                got=", ".join(f"torch.autocast({kind!r}, {dtype})" for kind, dtype in autocast),
                hint="cast the model instead: denoiser.to(torch.bfloat16), and call it outside, or "
                "inside torch.autocast(..., enabled=False)",
            )
        for name in self.backends:
            if name == "native" or name in KERNELS:
                continue
            where = next(filter(merges, self._paths(name)), None)
            if where is not None:
                raise CompanionError(
                    "the attention backend hides the attention",
                    where=where,
                    expected="torch's scaled_dot_product_attention in the graph",
                    got=f"the attention backend {name!r}",
                    hint='denoiser.set_attention_backend("native"), and compile: denoiser.compile()'
                    '; or leave attention alone: branches=("mlp",)',
                )

    def _paths(self, backend: str) -> list[str]:
        """Paths of the modules whose attention a backend computes."""
        following = self._users.get(None, []) if backend == active_attention_backend() else []
        return [*self._users.get(backend, []), *following]


def _autocast(device: str) -> tuple[tuple[str, torch.dtype], ...]:
    """The autocast regions that hold for a model on a device, and their dtypes."""
    kinds = (kind for kind in sorted({"cpu", device}) if torch.amp.is_autocast_available(kind))
    active = (kind for kind in kinds if torch.is_autocast_enabled(kind))
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in active)


# -- what is refused ------------------------------------------------------------------------------

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
    "toma_fx.optimize(model, parallel=mesh) shares merged tokens between processes "
    "(docs/parallel.md)",
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


def check_wrapping(stand_in: nn.Module) -> None:
    """Refuse diffusers' own hooks on a stand-in; hooks of the user act around its call.

    Raises:
        OffloadError: there are some.
    """
    hooks = {name: hook for name, hook in diffusers_hooks(stand_in).items() if _is_diffusers(hook)}
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
    config = parallel_config(model)
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
        hook = accelerate_hook(module)
        if hook is not None and (path or getattr(hook, "offload", False)):
            raise OffloadError(
                "the weights are moved while the model runs",
                where=path or "the denoiser",
                expected="weights that stay on one device during a call",
                got=f"accelerate's {type(hook).__name__} (sequential CPU offload or a device map)",
                hint="pipe.remove_all_hooks(), then pipe.enable_model_cpu_offload(), "
                "or pipe.to(device)",
            )
    _refuse({path: hooks for path, module in modules.items() if (hooks := diffusers_hooks(module))})


def _check_loaded(model: nn.Module) -> None:
    meta = [name for name, p in model.named_parameters() if p.is_meta]
    if meta:
        raise OffloadError(
            "the weights are not loaded",
            where=meta[0],
            expected="parameters on a device",
            got="parameters on the meta device",
            hint="load the weights first, and move the model to its device",
        )

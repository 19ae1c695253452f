"""Step caches of other libraries on the two embedded models, all driven in the same way.

diffusers brings FirstBlockCache, TaylorSeer, MagCache, SeaCache, FasterCache and Pyramid Attention
Broadcast; cache-dit and DeepCache are packages of their own, imported only where they are used.
Each `Peer` is one point of a curve: a library's method with one set of options.

Where a library looks only for modules that a UNet does not have, but takes patterns of names, the
patterns here name the same kind of module of the UNet; `curve` says so.
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from toma_fx.models import tiny

SDXL, FLUX = tiny.NAMES
EVERY = (2, 3, 4, 6)
"""Steps from one computed step to the next."""
WARMUP, LAST = 3, 1
"""Steps at the beginning that always compute (TaylorSeer's default), and at the end."""


class Unavailable(Exception):
    """A row can't be measured; the message says why."""


NOTES = {
    "diffusers FirstBlockCache": "Hooks lists of blocks that lie directly in the model: no UNet.",
    "diffusers TaylorSeer": "Its default patterns name no module of a UNet; given names, it runs. "
    "Factors in float32, not in bfloat16, its default. `lite` extrapolates the model's output, and "
    "runs no block in between.",
    "diffusers FasterCache": "Takes its own patterns of attention names and no others, which no "
    "module of a UNet has. Run as guidance-distilled: there is no guidance to skip.",
    "diffusers PyramidAttentionBroadcast": "Runs on both; skips attention alone.",
    "diffusers MagCache": "Ratios are calibrated, on pictures from other noise.",
    "diffusers SeaCache": "Made for video; the picture is given to it as a video of one frame. "
    "Needs step, noise level and number of steps in the cache context.",
    "cache-dit": "Supports no UNet. Its first block of Flux always runs (Fn_compute_blocks is at "
    "least 1).",
    "DeepCache": "For UNets. Needs a pipeline's scheduler, and the timestep as one number by "
    "position.",
    "all with thresholds": "They decide once for a whole batch.",
}
"""What was learned while they were made to run; it is written into the results."""

# -- a denoiser that draws ------------------------------------------------------------------------


class System:
    """A denoiser with which one generation after the other is drawn.

    Attributes:
        denoiser: a copy of the model's that may be patched, or something that stands for it.
        steps: of every generation.
    """

    def __init__(self, denoiser: Any, steps: int) -> None:
        self.denoiser, self.steps = denoiser, steps
        self.run: Callable[..., Any] = denoiser

    def compile(self) -> None:
        """Run through `torch.compile` from here on."""
        self.run = torch.compile(self.denoiser, dynamic=False)

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Around the calls of a generation."""
        yield

    def step(self, index: int, inputs: dict[str, Any]) -> Any:
        """The call of step `index`."""
        return self.run(**inputs)

    def kept(self) -> Any:
        """Objects that hold what is kept from step to step."""
        return ()

    def draw(
        self,
        model: tiny.TinyModel,
        labels: Sequence[int],
        seed: int,
        after: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """The pictures of a seed; `after` is called after each step, inside the generation."""
        index = iter(range(self.steps))

        def call(**inputs: Any) -> Any:
            return self.step(next(index), inputs)

        with self.generation():
            return model.generate(
                labels, seed=seed, steps=self.steps, denoiser=call, on_step=lambda _: after()
            )


def tensors_in(roots: Any) -> Iterator[Tensor]:
    """Tensors that can be reached from objects, modules and functions aside."""
    seen: set[int] = set()
    stack = [roots]
    skipped = (str, bytes, int, float, bool, type, nn.Module, types.FunctionType, types.ModuleType)
    while stack:
        value = stack.pop()
        if value is None or isinstance(value, skipped) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            stack += value
        elif hasattr(value, "__dict__") and not isinstance(value, types.MethodType):
            stack += vars(value).values()


def kept_bytes(system: System) -> int:
    """Bytes of all storages that hold what a system keeps."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors_in(system.kept())
    }
    return sum(storages.values())


# -- diffusers ------------------------------------------------------------------------------------


class Hooked(System):
    """A model with caching hooks of diffusers."""

    def __init__(
        self, model: tiny.TinyModel, steps: int, name: str, options: Callable[[Hooked], Any]
    ) -> None:
        from diffusers import hooks
        from diffusers.hooks import HookRegistry

        super().__init__(copy.deepcopy(model.denoiser), steps)
        self.time = 1000.0
        config = getattr(hooks, name + "Config")(**options(self))
        try:
            getattr(hooks, APPLY[name])(self.denoiser, config)
        except IndexError as error:  # FirstBlockCache takes the first of the blocks that it knows
            raise Unavailable(f"it finds no blocks in this model ({error})") from None
        self._registry = HookRegistry.check_if_exists_or_initialize(self.denoiser)
        if all(module is self.denoiser for module, _ in self._hooks()):
            raise Unavailable("it hooks no module inside this model")

    def _hooks(self) -> list[tuple[nn.Module, Any]]:
        registries = ((m, getattr(m, "_diffusers_hook", None)) for m in self.denoiser.modules())
        return [(m, hook) for m, r in registries if r is not None for hook in r.hooks.values()]

    def kept(self) -> Any:
        """States of all hooks."""
        return [hook for _, hook in self._hooks()]

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Begins with nothing kept."""
        self._registry.reset_stateful_hooks(recurse=True)
        yield

    def step(self, index: int, inputs: dict[str, Any]) -> Any:
        """Inside a cache context, with all that diffusers tells its caches."""
        from diffusers.hooks.hooks import CacheContext, _set_cache_context

        time = float(inputs["timestep"].flatten()[0])
        self.time = time if isinstance(self.denoiser, _unet()) else 1000 * time
        about = {"step_index": index, "sigma": self.time / 1000, "num_inference_steps": self.steps}
        # what `cache_context` does, which UNets do not have
        _set_cache_context(self.denoiser, CacheContext("cond", **about))
        try:
            return self.run(**inputs)
        finally:
            _set_cache_context(self.denoiser, None)


APPLY = {
    "FirstBlockCache": "apply_first_block_cache",
    "TaylorSeerCache": "apply_taylorseer_cache",
    "FasterCache": "apply_faster_cache",
    "MagCache": "apply_mag_cache",
    "SeaCache": "apply_sea_cache",
    "PyramidAttentionBroadcast": "apply_pyramid_attention_broadcast",
}


def _unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel


CALIBRATION_SEED = 1000


@functools.cache
def _mag_ratios(name: str, steps: int) -> tuple[float, ...]:
    """MagCache's ratios of pictures from other noise, as its own calibration measures them."""
    model = tiny.load(name)
    # with one step more than there are, it does not yet throw away what it has measured
    measuring = {"calibrate": True, "num_inference_steps": steps + 1}
    system = Hooked(model, steps, "MagCache", lambda _: measuring)
    ratios: list[float] = []

    def read() -> None:
        ratios[:] = _read_ratios(system)

    system.draw(model, range(len(tiny.CLASSES)), CALIBRATION_SEED, read)
    return tuple(ratios)


def _open_mag_cache(model: tiny.TinyModel, steps: int, threshold: float) -> System:
    options = {
        "threshold": threshold,
        "num_inference_steps": steps,
        "mag_ratios": list(_mag_ratios(model.name, steps)),
    }
    return Hooked(model, steps, "MagCache", lambda _: options)


def _read_ratios(system: Hooked) -> list[float]:
    for hook in system.kept():
        for state in hook.state_manager._state_cache.values():
            return list(state.calibration_ratios)
    raise Unavailable("no state has calibration ratios")


def _sea_pictures(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Flux's packed picture [B, N, C] as SeaCache wants it: one [C, 1, H, W] each."""
    x = kwargs["hidden_states"]
    side = int(x.shape[1] ** 0.5)
    return [y.T.reshape(y.shape[1], 1, side, side) for y in x]


# -- packages -------------------------------------------------------------------------------------


class CacheDiT(System):
    """A transformer with cache-dit's DBCache."""

    def __init__(
        self, model: tiny.TinyModel, steps: int, options: dict[str, Any], order: int | None
    ) -> None:
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
        package = _package("cache_dit", "cache-dit")
        super().__init__(copy.deepcopy(model.denoiser), steps)
        self._package, self._options, self._order = package, options, order
        try:
            package.enable_cache(self.denoiser, **self._configs())
        except (ValueError, AssertionError) as error:
            raise Unavailable(
                f"cache-dit refuses {type(self.denoiser).__name__}: {error}"
            ) from None

    def _configs(self) -> dict[str, Any]:
        """New ones each time: the library changes them."""
        asked = {**self._options, "num_inference_steps": self.steps}
        n = asked.pop("every", None)
        if n is not None:
            computes = (
                i < WARMUP or (i - WARMUP) % n == n - 1 or i >= self.steps - LAST
                for i in range(self.steps)
            )  # fmt: skip
            asked["steps_computation_mask"] = [int(c) for c in computes]
        found = {"cache_config": self._package.DBCacheConfig(**asked)}
        if self._order is not None:
            taylor = self._package.TaylorSeerCalibratorConfig(taylorseer_order=self._order)
            found["calibrator_config"] = taylor
        return found

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Begins with nothing kept."""
        self._package.refresh_context(self.denoiser, **self._configs())
        yield

    def kept(self) -> Any:
        """Its contexts."""
        manager = getattr(self.denoiser, "_context_manager", None)
        return [] if manager is None else [manager._cached_context_manager]


class DeepCached(System):
    """A UNet with DeepCache. It stands for a pipeline, and takes the timestep as one number."""

    def __init__(self, model: tiny.TinyModel, steps: int, interval: int, branch: int) -> None:
        package = _package("DeepCache", "DeepCache")
        super().__init__(copy.deepcopy(model.denoiser), steps)
        scheduler = types.SimpleNamespace(timesteps=[])
        self._pipe = types.SimpleNamespace(unet=self.denoiser, scheduler=scheduler)
        self.helper = package.DeepCacheSDHelper(pipe=self._pipe)
        self.helper.set_params(cache_interval=interval, cache_branch_id=branch)
        self.helper.enable()

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Begins with nothing kept."""
        self._pipe.scheduler.timesteps = [
            t.item() for t in torch.linspace(1, 0, self.steps + 1)[:-1] * 1000
        ]
        self.helper.start_timestep = None
        self.helper.cached_output.clear()
        yield

    def step(self, index: int, inputs: dict[str, Any]) -> Any:
        """By position, as its pipelines call a UNet."""
        rest = dict(inputs)
        sample, time = rest.pop("sample"), rest.pop("timestep")
        return self.run(sample, time[0], **rest)

    def kept(self) -> Any:
        """Outputs of modules."""
        return [self.helper.cached_output]


def _package(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise Unavailable(f"not installed: pip install --no-deps {name}") from None


# -- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """One point of a curve.

    Attributes:
        curve: library and method. detail: what differs along the curve. models: it is run on.
        open: makes the system for a model and a number of steps; raises `Unavailable`.
        options: for the record.
    """

    curve: str
    detail: str
    models: tuple[str, ...]
    open: Callable[[tiny.TinyModel, int], System]
    options: Mapping[str, Any] = field(default_factory=dict)


def peers() -> list[Peer]:
    """All of them."""
    return [
        *_fewer_steps(), *_first_block(), *_taylor(), *_attention(), *_others(), *_cache_dit(),
        *_deep_cache(),
    ]  # fmt: skip


def _fewer_steps() -> Iterator[Peer]:
    """What needs no cache at all: a generation of fewer Euler steps."""
    for n in (16, 13, 10, 8, 6, 5):
        yield Peer(
            "fewer steps", f"{n} steps", (SDXL, FLUX),
            lambda model, steps, n=n: System(model.denoiser, n), {"steps": n},
        )  # fmt: skip


def _of_diffusers(
    name: str,
    detail: str,
    models: tuple[str, ...],
    options: dict[str, Any],
    *,
    curve: str = "",
    extra: Callable[[Hooked], dict[str, Any]] = lambda system: {},
) -> Peer:
    """A configuration by its name; `extra` are options that need to know the system."""

    def open_(model: tiny.TinyModel, steps: int) -> System:
        return Hooked(model, steps, name, lambda system: {**options, **extra(system)})

    shown = {k: str(v) if isinstance(v, torch.dtype) else v for k, v in options.items()}
    return Peer(f"diffusers {curve or name}", detail, models, open_, shown)


def _first_block() -> Iterator[Peer]:
    for t in (0.05, 0.1, 0.2, 0.3, 0.5, 0.8):
        models = (SDXL, FLUX) if t == 0.1 else (FLUX,)  # once, to say that it does not work
        yield _of_diffusers("FirstBlockCache", f"threshold {t}", models, {"threshold": t})


def _taylor() -> Iterator[Peer]:
    """Factors in float32: in bfloat16, the default, the figures would be those of rounding."""
    kinds: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
        "lite": (FLUX, (0, 1, 2), {"use_lite_mode": True}),
        "attention": (FLUX, (1,), {}),
        # the default patterns match no module of a UNet
        "attention (own patterns)": (SDXL, (1,), {"cache_identifiers": [r".*\.attn[12]"]}),
        "blocks (own patterns)": (
            SDXL, (0, 1, 2), {"cache_identifiers": [r".*\.transformer_blocks\.\d+"]},
        ),
    }  # fmt: skip
    for kind, (model, orders, patterns) in kinds.items():
        for order in orders:
            for n in EVERY:
                options = {
                    "cache_interval": n,
                    "disable_cache_before_step": WARMUP,
                    "max_order": order,
                    "taylor_factors_dtype": torch.float32,
                    **patterns,
                }
                curve = f"TaylorSeer {kind}, order {order}"
                yield _of_diffusers("TaylorSeerCache", f"every {n}", (model,), options, curve=curve)


def _attention() -> Iterator[Peer]:
    """What caches attention alone, after the first steps."""

    def spatial(system: Hooked) -> dict[str, Any]:
        return {
            "spatial_attention_timestep_skip_range": (-1, 1001 * (1 - WARMUP / system.steps)),
            "current_timestep_callback": lambda: system.time,
        }

    def all_kinds(system: Hooked) -> dict[str, Any]:
        found = spatial(system)
        times = found["spatial_attention_timestep_skip_range"]
        return {**found, "cross_attention_timestep_skip_range": times}

    for n in EVERY:
        ranges = {"spatial_attention_block_skip_range": n, "cross_attention_block_skip_range": n}
        yield _of_diffusers(
            "PyramidAttentionBroadcast", f"every {n}", (SDXL, FLUX), ranges, extra=all_kinds
        )
        options = {
            "spatial_attention_block_skip_range": n,
            "is_guidance_distilled": True,
        }
        yield _of_diffusers("FasterCache", f"every {n}", (SDXL, FLUX), options, extra=spatial)


def _others() -> Iterator[Peer]:
    for t in (0.03, 0.06, 0.12, 0.24):
        yield Peer(
            "diffusers MagCache", f"threshold {t}", (FLUX,),
            lambda model, steps, t=t: _open_mag_cache(model, steps, t),
            {"threshold": t, "mag_ratios": "calibrated"},
        )  # fmt: skip
    for order, most in ((0, 2), (1, 2), (1, 4)):
        for t in (0.1, 0.25, 0.5, 1.0):
            options = {"residual_order": order, "max_consecutive_cached": most, "threshold": t}
            yield _of_diffusers(
                "SeaCache", f"threshold {t}", (FLUX,), options,
                curve=f"SeaCache, order {order}, at most {most} in a row",
                extra=lambda _: {"raw_vision_callback": _sea_pictures},
            )  # fmt: skip


def _cache_dit() -> Iterator[Peer]:
    base: dict[str, Any] = {"Fn_compute_blocks": 1, "max_warmup_steps": WARMUP}

    def row(curve: str, detail: str, order: int | None, **options: Any) -> Peer:
        once = (curve, detail) == ("DBCache", "threshold 0.1")  # to say that it does not work
        return Peer(
            f"cache-dit {curve}",
            detail,
            (SDXL, FLUX) if once else (FLUX,),
            lambda model, steps: CacheDiT(model, steps, {**base, **options}, order),
            {**base, **options, "order": order},
        )

    for name, order in (("DBCache", None), ("DBCache + TaylorSeer 1", 1)):
        for t in (0.05, 0.1, 0.2, 0.4, 0.8):
            yield row(name, f"threshold {t}", order, residual_diff_threshold=t)
    for order in (None, 1, 2):
        name = "static mask" + ("" if order is None else f" + TaylorSeer {order}")
        for n in EVERY:
            yield row(name, f"every {n}", order, every=n, steps_computation_policy="static")


def _deep_cache() -> Iterator[Peer]:
    for branch in (0, 1, 3):
        for n in EVERY:
            yield Peer(
                f"DeepCache branch {branch}", f"every {n}", (SDXL,),
                lambda model, steps, n=n, b=branch: DeepCached(model, steps, n, b),
                {"cache_interval": n, "cache_branch_id": branch},
            )  # fmt: skip

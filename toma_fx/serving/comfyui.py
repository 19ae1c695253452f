"""Models of ComfyUI with merged tokens and cached steps, by its own wrappers.

    accelerate(model) -> a clone of the MODEL, with two wrappers
    sampler.sample       -> Acceleration.sample: what is sampled inside is one generation
      diffusion_model(x, t, context=..., transformer_options=...)
                         -> Acceleration.call: the optimized denoiser, or the original

The original runs, and a line in the log says why, where something is to act inside the forward
pass that no graph knows of: patches of attention or blocks, other wrappers behind this one, weights
that are not on the device. ComfyUI itself is not imported: what is used of it is `ModelPatcher`,
the executor of its wrappers and the contents of `transformer_options`. The nodes lie in
integrations/comfyui.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from toma_fx.api import optimize
from toma_fx.errors import CaptureError, ConfigError, NoMergeSites, TomaError
from toma_fx.run.denoiser import OptimizedDenoiser

KEY = "toma_fx"
"""Under which ComfyUI keeps the wrappers."""
DIFFUSION_MODEL, SAMPLER_SAMPLE = "diffusion_model", "sampler_sample"
"""Kinds of wrappers, `comfy.patcher_extension.WrappersMP`: around a call of the diffusion model,
and around a sampler's run."""
OPTIONS = "transformer_options"
TOLD = ("cond_or_uncond", "uuids", "sample_sigmas")
"""What options tell of the pass and the generation."""
HARMLESS = frozenset({
    *TOLD, "sigmas",
    # of wrappers, those that stand around this call have acted; others are asked for separately
    "wrappers", "callbacks",
    # what models note down for their blocks while they run
    "original_shape", "activations_shape", "transformer_index", "block", "block_index",
    "block_type", "total_blocks",
})  # fmt: skip
"""Options that change nothing inside the forward pass."""
DYNAMIC = "prefetch_dynamic_vbars"
"""The option that says whether weights come to the device as they are needed."""
ONE_CALL = frozenset({
    "sample_euler", "sample_euler_cfg_pp", "sample_euler_ancestral",
    "sample_euler_ancestral_cfg_pp", "sample_lms", "sample_ddpm", "sample_lcm", "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde", "sample_dpmpp_2m_sde_gpu", "sample_dpmpp_3m_sde",
    "sample_dpmpp_3m_sde_gpu", "sample_ipndm", "sample_ipndm_v", "sample_deis",
    "sample_res_multistep", "sample_res_multistep_ancestral", "sample_gradient_estimation",
})  # fmt: skip
"""Samplers that call the model once a step, so that the noise levels tell how many calls come."""
INTERRUPT = "InterruptProcessingException"
_log = logging.getLogger("toma_fx.serving")


def accelerate(model: Any, toma: Any = True, *, compile: bool = False, **options: Any) -> Any:
    """A clone of a MODEL that samples with merged tokens or cached steps; the model stays as it is.

    Settings that an earlier call gave the model are replaced.

    Args:
        model: ComfyUI's `ModelPatcher`. toma, options: of `toma_fx.optimize`.
        compile: whether programs are compiled; the first step of every size then takes minutes.

    Returns:
        A `ModelPatcher`. Where weights come to the device as they are needed (dynamic VRAM), it
        has a copy of the model that is loaded whole, as ComfyUI's own node for torch.compile does.

    Raises:
        ConfigError: no MODEL, or one of a version without wrappers; a setting out of its domain
            (`RecipeError`: a recipe for another model). ModelTypeError: its diffusion model can't
            be optimized, since it is compiled already, say.
    """
    clone = _clone(model)

    def make(denoiser: nn.Module) -> OptimizedDenoiser:
        optimized: OptimizedDenoiser = optimize(denoiser, toma, **options)
        return optimized.compile() if compile else optimized

    acceleration = Acceleration(make)
    acceleration.optimized(clone.get_model_object("diffusion_model"))  # refuse here what is wrong
    clone.add_wrapper_with_key(DIFFUSION_MODEL, KEY, acceleration.call)
    clone.add_wrapper_with_key(SAMPLER_SAMPLE, KEY, acceleration.sample)
    return clone


def restore(model: Any) -> Any:
    """A clone of a MODEL that samples as it did before `accelerate`.

    Raises:
        ConfigError: no MODEL, or one of a version without wrappers.
    """
    return _clone(model, whole=False)


def _clone(model: Any, *, whole: bool = True) -> Any:
    """A clone without our wrappers.

    Args:
        whole: whether it has to be loaded whole.
    """
    if not all(hasattr(model, name) for name in ("clone", "get_model_object")):
        raise ConfigError(
            "this is no MODEL of ComfyUI", where="model", expected="a ModelPatcher",
            got=type(model).__name__,
        )  # fmt: skip
    if not hasattr(model, "add_wrapper_with_key"):
        raise ConfigError(
            "the models of this version have no wrappers", where="model",
            expected="a ModelPatcher with add_wrapper_with_key",
            got=f"{type(model).__module__}.{type(model).__name__}",
            hint="update ComfyUI (wrappers came in December 2024); Forge has none",
        )  # fmt: skip
    dynamic = whole and getattr(model, "is_dynamic", lambda: False)()
    if dynamic and getattr(model, "cached_patcher_init", None) is None:
        raise ConfigError(
            "the weights of this model come to the device as they are needed, and its loader does "
            "not say how to load it whole", where="model", expected="a model that is loaded whole",
            got="dynamic VRAM", hint="start ComfyUI with --disable-dynamic-vram",
        )  # fmt: skip
    clone = model.clone(disable_dynamic=True) if dynamic else model.clone()
    for kind in (DIFFUSION_MODEL, SAMPLER_SAMPLE):
        clone.remove_wrappers_with_key(kind, KEY)
    return clone


class ComfyDenoiser(nn.Module):
    """A diffusion model of ComfyUI as its innermost wrapper calls it, without options.

    Args:
        diffusion_model: it. method: the name of what it calls inside its wrappers.
    """

    def __init__(self, diffusion_model: nn.Module, method: str) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model
        self.method = method
        self.eval()

    def forward(self, **call: Any) -> Any:
        """One call, with lists and options of its own: models write to both."""
        own = {name: _with_own_containers(value) for name, value in call.items()}
        return getattr(self.diffusion_model, self.method)(**{**own, OPTIONS: {}})


class Acceleration:
    """The wrappers of one setting, and what was optimized for each diffusion model.

    Clones of a MODEL share it, as they share the diffusion model; copies for other devices have one
    of their own, which is optimized when it is first called.
    """

    def __init__(self, make: Callable[[nn.Module], OptimizedDenoiser]) -> None:
        self._make = make
        self._optimized: dict[nn.Module, OptimizedDenoiser] = {}
        self._refused: dict[Any, str] = {}
        self._said: set[str] = set()
        self._calls = 0
        # what was found out about the weights in this run of a sampler; None outside of one
        self._weights: dict[nn.Module, str] | None = None

    def optimized(self, diffusion_model: nn.Module) -> OptimizedDenoiser:
        """What runs in place of a diffusion model; made at first."""
        if diffusion_model not in self._optimized:
            # versions of early 2025 sample in training mode, which no part of their models heeds
            denoiser = ComfyDenoiser(diffusion_model.eval(), _method_of(diffusion_model))
            self._optimized[diffusion_model] = self._make(denoiser)
        return self._optimized[diffusion_model]

    def sample(self, executor: Any, guider: Any, sigmas: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A sampler's run: one generation, which also ends when it is interrupted.

        Args:
            executor: of ComfyUI's wrappers. guider: holds the model. sigmas: noise levels, one more
                than there are steps. args, kwargs: what else the sampler gets.
        """
        model = getattr(getattr(guider, "inner_model", None), "diffusion_model", None)
        calls, weights, self._weights = self._calls, self._weights, {}
        with ExitStack() as stack:
            stack.callback(setattr, self, "_weights", weights)
            if isinstance(model, nn.Module):
                function = getattr(executor.class_obj, "sampler_function", None)
                known = getattr(function, "__name__", "") in ONE_CALL and len(sigmas) > 1
                steps = len(sigmas) - 1 if known else None
                try:
                    stack.enter_context(self.optimized(model).generation(steps))
                except TomaError as error:  # the calls will say so, too, or belong to one outside
                    self._say(str(error))
            out = executor(guider, sigmas, *args, **kwargs)
        if self._calls == calls:
            self._say(
                f"{type(model).__name__} was sampled without a call of its wrappers: it is "
                "compiled, or this version of ComfyUI has no wrappers around it; update ComfyUI"
            )
        return out

    def call(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """One call of the diffusion model.

        Args:
            executor: of ComfyUI's wrappers. args, kwargs: of the call.

        Returns:
            What the diffusion model returns.
        """
        if torch.compiler.is_compiling():  # the node for torch.compile takes the original
            return executor(*args, **kwargs)
        self._calls += 1
        named = _named(executor.original, args, kwargs)
        options = named.pop(OPTIONS, None) or {}
        reason = _reason_against(executor, options) or self._reason_of_weights(executor, named)
        if not reason and self._refused:
            reason = self._refused.get(_shapes(named), "")
        if not reason:
            told = {name: options[name] for name in TOLD if name in options}
            try:
                return self.optimized(executor.class_obj)(**named, **{OPTIONS: told})
            except TomaError as error:
                _raise_interrupt(error)
                reason = str(error)
                if isinstance(error, (CaptureError, NoMergeSites)):  # dear to find out again
                    self._refused[_shapes(named)] = reason
        self._say(reason)
        return executor(*args, **kwargs)

    def _reason_of_weights(self, executor: Any, named: Mapping[str, Any]) -> str:
        """As `reason_of_weights`, which takes milliseconds: once in a run of a sampler.

        ComfyUI loads and patches weights before it. Should some be taken off the device during it,
        a step fails, and does not go wrong.
        """
        tensors = [value for value in named.values() if isinstance(value, Tensor)]
        if not tensors:
            return "no argument of the call is a tensor"
        model, known = executor.class_obj, {} if self._weights is None else self._weights
        if model not in known:
            known[model] = reason_of_weights(model, tensors[0].device)
        return known[model]

    def _say(self, reason: str) -> None:
        """Log a reason, once."""
        if reason not in self._said:
            self._said.add(reason)
            _log.warning("the original model runs: %s", reason)


def _method_of(diffusion_model: nn.Module) -> str:
    """The name of what a diffusion model calls inside its wrappers."""
    return "_forward" if hasattr(diffusion_model, "_forward") else "forward"


def _named(original: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    named: dict[str, Any] = {}
    signature = inspect.signature(original)
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return named


def _reason_against(executor: Any, options: Mapping[str, Any]) -> str:
    """Why the original has to run, of what acts around and inside the call; "" if it need not."""
    model = executor.class_obj
    if executor.original != getattr(model, _method_of(model), None):
        return f"{type(model).__name__} is called in a way that is not known"
    if executor.idx + 1 < len(executor.wrappers):
        return (
            "another node wraps the diffusion model inside this one; put this one behind it in the "
            "workflow"
        )
    if options.get(DYNAMIC):
        return "weights come to the device as they are needed; use --disable-dynamic-vram"
    for name, value in options.items():
        if name not in HARMLESS and name != DYNAMIC and _holds(value):
            parts = ", ".join(map(str, value)) if isinstance(value, Mapping) else ""
            return f"{OPTIONS}[{name!r}] acts inside it" + (f" ({parts})" if parts else "")
    return ""


def reason_of_weights(model: nn.Module, device: torch.device) -> str:
    """Why a graph can't use the weights as they lie there; "" if it can."""
    for name, module in model.named_modules():
        own = vars(module)
        if own.get("weight_function") or own.get("bias_function"):
            return f"the weights of {name} are patched at every use"
    for name, parameter in model.named_parameters():
        if parameter.device != device:
            return f"{name} lies on {parameter.device} and not on {device}, for want of memory"
    return ""


def _holds(value: Any) -> bool:
    """Whether an option says anything: empty tables and lists of patches say nothing."""
    if isinstance(value, Mapping):
        return any(map(_holds, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds, value))
    return value is not None and value is not False


def _with_own_containers(value: Any) -> Any:
    """The same tensors in dictionaries and lists of its own: ControlNet's lists are emptied."""
    if isinstance(value, dict):
        return {name: _with_own_containers(each) for name, each in value.items()}
    return [_with_own_containers(each) for each in value] if isinstance(value, list) else value


def _shapes(named: Mapping[str, Any]) -> Any:
    """The sizes of a call, to know it again."""
    return tuple(sorted((name, str(tuple(_sizes(value)))) for name, value in named.items()))


def _sizes(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            yield tuple(_sizes(each))
    elif isinstance(value, Tensor):
        yield (tuple(value.shape), value.dtype)
    else:
        yield value


def _raise_interrupt(error: BaseException) -> None:
    """Hand on the user's interrupt, if that is what an error came from: ComfyUI says it once."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ == INTERRUPT:
            raise cause
        cause = cause.__cause__ or cause.__context__

"""Example inputs of a denoiser: of any pipeline, from its own first call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toma_fx.api import denoiser_of
from toma_fx.errors import ConfigError
from toma_fx.methods.checks import check_count
from toma_fx.models import named
from toma_fx.models.hub import check_model_name
from toma_fx.models.tiny import NAMES
from toma_fx.run.calls import name_arguments

FAMILIES = ("UNet2DConditionModel", "FluxTransformer2DModel")
"""Denoisers whose inputs follow from their configuration."""


class _Caught(BaseException):
    """Ends a pipeline at the first call of its denoiser: no handler of a pipeline stops it."""


def example_inputs(
    model: Any,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    **call: Any,
) -> dict[str, Any]:
    """Keyword inputs of one denoising step, for `explain`, `optimize`, `export` and `warmup`.

    Of a pipeline they are those of its own first call: it runs with an empty prompt, or as `call`
    says, until the denoiser is called; text is encoded, nothing is denoised. Of a
    `UNet2DConditionModel` or `FluxTransformer2DModel` alone they are random.

    Args:
        model: a pipeline of diffusers, whose first denoiser is meant, or one of these two models.
        height, width: of the picture in pixels; by default the pipeline's own, of a model 1024.
        batch: pictures. A pipeline with guidance has two rows for each; of a model it is the rows.
        call: further arguments of the pipeline's call (`image=`, `prompt=`, `num_frames=`), or, of
            a model, `text=`, the number of text tokens.

    Raises:
        ConfigError: the pipeline does not run with these arguments, or has no such ones.
        ModelTypeError: another model alone; or no denoiser.
    """
    for name, number in (("height", height), ("width", width), ("batch", batch)):
        if number is not None:
            check_count(name, number, "example_inputs")
    if isinstance(model, nn.Module):
        height = height or 1024
        return named.example_inputs(model, height, width or height, batch, **call)
    denoiser, arguments = denoiser_of(model), _arguments(model, height, width, batch, call)
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _Caught

    handle = denoiser.register_forward_pre_hook(catch, prepend=True, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**arguments)
    except _Caught:
        pass
    except Exception as error:
        raise _no_call(model, arguments, f"{type(error).__name__}: {error}") from error
    finally:
        handle.remove()
        # what a pipeline does at its end, and does not after an exception: offloaded models go home
        getattr(model, "maybe_free_model_hooks", lambda: None)()
    if not caught:
        raise _no_call(model, arguments, "a run that did not call the denoiser")
    args, kwargs = caught[0]
    signature = inspect.signature(denoiser.forward)
    return dict(name_arguments(signature, args, kwargs, type(denoiser).__name__).kwargs)


def load_example(
    name: str, height: int | None, width: int | None, batch: int, **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """As `models.named.example`, of any pipeline in a folder or on the hub.

    Raises:
        ConfigError, ModelTypeError: as `models.named.example` and `example_inputs`.
    """
    model, (inputs,) = load_examples(name, [(height, width)], batch, **options)
    return model, inputs


def load_examples(
    name: str, sizes: Sequence[tuple[int | None, int | None]], batch: int, **options: Any
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """As `load_example`, for several pairs of height and width; the model is loaded once."""
    if name in NAMES:
        return named.examples(name, sizes, batch, **options)
    check_model_name(name, NAMES)
    if _family(name, options.get("subfolder")) in (None, *FAMILIES):
        return named.examples(name, sizes, batch, **options)
    if options.get("text") is not None:
        raise ConfigError(
            "a pipeline encodes its own text",
            where="text",
            expected="nothing, for other models than UNets and Flux transformers",
            got=repr(options["text"]),
        )
    dtype = str(options.get("dtype", torch.float32)).removeprefix("torch.")
    pipe = named.load_pipeline(name, dtype, options.get("device"))
    inputs = [example_inputs(pipe, height, width, batch) for height, width in sizes]
    return denoiser_of(pipe).eval(), inputs


def _family(name: str, subfolder: str | None) -> str | None:
    """Class of the denoiser of a whole pipeline; None for what is none."""
    from diffusers import DiffusionPipeline

    if subfolder is not None or (Path(name).is_dir() and not (Path(name) / INDEX).is_file()):
        return None
    try:
        parts: Mapping[str, Any] = DiffusionPipeline.load_config(name)
    except (OSError, ValueError):
        return None
    found = next((parts[part] for part in named.PARTS if parts.get(part)), (None, None))
    return str(found[1])


INDEX = "model_index.json"
"""The file that says what a pipeline is made of."""


def _arguments(
    pipe: Any, height: int | None, width: int | None, batch: int, call: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a pipeline's call: those given, and what it needs for one step."""
    known = inspect.signature(type(pipe).__call__).parameters
    sizes = {name: size for name, size in (("height", height), ("width", width)) if size}
    given: dict[str, Any] = {**sizes, **call}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(
            "the pipeline has no such argument",
            where=f"example_inputs({type(pipe).__name__})",
            expected=", ".join(name for name in known if name != "self"),
            got=", ".join(unknown),
        )
    usual: dict[str, Any] = {
        "prompt": [""] * batch,
        "class_labels": [0] * batch,
        "batch_size": batch,
        "num_inference_steps": 2,  # some schedulers have none of one step
        "output_type": "latent",
    }
    if "prompt_embeds" in given:
        del usual["prompt"]
    return {name: value for name, value in {**usual, **given}.items() if name in known}


def _no_call(pipe: Any, arguments: Mapping[str, Any], got: str) -> ConfigError:
    return ConfigError(
        "the pipeline does not run with these arguments",
        where=f"example_inputs({type(pipe).__name__})",
        expected="a call of its denoiser",
        got=f"{got} (called with {', '.join(arguments)})",
        hint="give what it needs besides: example_inputs(pipe, image=..., prompt=...)",
    )

"""Denoisers by name, and example inputs for the two families from their configuration alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toma_fx.compat.pytorch import tree_map
from toma_fx.devices import usable_device
from toma_fx.errors import ConfigError, ModelTypeError, UnknownNameError, nearest
from toma_fx.models import latent, tiny
from toma_fx.models.embedded import EmbeddedModel
from toma_fx.models.hub import check_model_name

PARTS = ("unet", "transformer")
"""Folders of a pipeline that hold its denoiser."""


def example(
    name: str,
    height: int | None = None,
    width: int | None = None,
    batch: int = 2,
    *,
    subfolder: str | None = None,
    text: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, dict[str, Any]]:
    """A denoiser in evaluation mode, and keyword inputs of one of its steps.

    Args:
        name: "tiny-sdxl", "tiny-flux", or a folder or hub id of a UNet or Flux transformer, or of a
            pipeline with one.
        height, width: pixels; by default 1024, of tiny models 64, and square. batch: rows.
        subfolder: of the pipeline; found if not given. text: text tokens, as of `example_inputs`.
        dtype, device: of the model and its inputs.

    Raises:
        ConfigError: a height or width that the model can't have.
        ModelTypeError: there is no such model, or no example inputs for it.
    """
    sizes = [(height, width)]
    model, (inputs,) = examples(
        name, sizes, batch, subfolder=subfolder, text=text, dtype=dtype, device=device
    )
    return model, inputs


def examples(
    name: str,
    sizes: Sequence[tuple[int | None, int | None]],
    batch: int = 2,
    *,
    subfolder: str | None = None,
    text: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """As `example`, for several pairs of height and width; the model is loaded once."""
    for height, width in sizes:
        _check_size(name, height, width)
    if name in tiny.NAMES:
        loaded = tiny.load(name)
        inputs = [_tiny_inputs(loaded, h, w, batch, dtype, device) for h, w in sizes]
        # diffusers warns of any cast of Flux, though nothing changes
        model = loaded.denoiser if dtype == torch.float32 else loaded.denoiser.to(dtype)
        return model.to(device), inputs
    model = _load(name, subfolder, dtype).eval().to(device)
    pairs = [(height or 1024, width or height or 1024) for height, width in sizes]
    return model, [example_inputs(model, *pair, batch, text=text) for pair in pairs]


def _check_size(name: str, height: int | None, width: int | None) -> None:
    least = 2 if name in tiny.NAMES else 16
    for where, number in (("height", height), ("width", width)):
        if number is not None and (number < 1 or number % least):
            raise ConfigError(
                "no picture has this size", where=where,
                expected=f"a multiple of {least} pixels", got=str(number),
            )  # fmt: skip


def _tiny_inputs(
    loaded: tiny.TinyModel,
    height: int | None,
    width: int | None,
    batch: int,
    dtype: torch.dtype,
    device: str | torch.device,
) -> dict[str, Any]:
    """Inputs of an embedded model."""
    size = height or tiny.SIZE
    tokens, pooled = (x.to(dtype) for x in loaded.conditioning(torch.zeros(batch).long()))
    images = torch.randn(batch, 3, size, width or size).to(dtype)
    inputs = tiny.FLOW.denoiser_inputs(loaded.name, images, torch.ones(batch), tokens, pooled)
    placed: dict[str, Any] = tree_map(
        lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, inputs
    )
    return placed


def from_config(name: str, path: Path) -> nn.Module:
    """A denoiser of diffusers from its configuration alone, without weights, on the meta device.

    Args:
        name: of the class. path: of its `config.json`, or the folder with it.

    Raises:
        UnknownNameError: diffusers has no such model. ModelTypeError: no such file, or it is not
            the configuration of one.
    """
    import diffusers

    models = {n for n in dir(diffusers) if n.endswith("Model")}
    if name not in models:
        raise UnknownNameError(
            f"diffusers has no model {name!r}", where="class", hint=nearest(name, models)
        )
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
        with torch.device("meta"):
            model: nn.Module = getattr(diffusers, name).from_config(config)
    except Exception as error:  # whatever a class makes of a file that is not its own
        raise ModelTypeError(
            "no model can be made of this configuration",
            where=str(file),
            expected=f"the config.json of a {name}",
            got=f"{type(error).__name__}: {error}",
        ) from error
    return model.eval()


EMBEDDED = (*tiny.NAMES, *latent.NAMES)
"""Names of the embedded models."""


def load_embedded(name: str, dtype: str | None = None, device: str | None = None) -> EmbeddedModel:
    """An embedded model by its name.

    Args:
        dtype, device: must not be given; see `load_pipeline`.

    Raises:
        UnknownNameError: there is none. ModelTypeError: its weights are not in this installation.
        ConfigError: a dtype or a device.
    """
    for option, value in (("dtype", dtype), ("device", device)):
        if value is not None:
            raise ConfigError(
                "embedded models run in float32 on the CPU",
                where=option,
                expected="the option with a pipeline",
                got=value,
            )
    makers: dict[str, Callable[[str], EmbeddedModel]] = dict.fromkeys(tiny.NAMES, tiny.load)
    makers |= dict.fromkeys(latent.NAMES, latent.load)
    if name not in makers:
        raise UnknownNameError(
            f"no embedded model {name!r}",
            where="model",
            expected=" or ".join(makers),
            hint=nearest(name, makers),
        )
    return makers[name](name)


def load_pipeline(name: str, dtype: str | None = None, device: str | None = None) -> Any:
    """A pipeline of diffusers.

    Args:
        name: folder or hub id. dtype: of its weights, float32 if not given. device: if not given,
            the GPU of this process by `LOCAL_RANK`, or the CPU.

    Raises:
        ModelTypeError: it can't be loaded. ConfigError: no such device.
    """
    from diffusers import DiffusionPipeline

    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    place = usable_device(device or own)
    check_model_name(name)
    try:
        pipe = DiffusionPipeline.from_pretrained(
            name, torch_dtype=getattr(torch, dtype or "float32")
        )
    except (OSError, ValueError) as error:
        raise ModelTypeError(
            "the pipeline can't be loaded",
            where="pipeline",
            expected="a folder or hub id of a pipeline of diffusers",
            got=f"{name}: {str(error).splitlines()[0]}",
        ) from error
    return pipe.to(place)


def _load(name: str, subfolder: str | None, dtype: torch.dtype) -> Any:
    from diffusers import AutoModel

    check_model_name(name, tiny.NAMES)
    errors = []
    for part in (None, *PARTS) if subfolder is None else (subfolder,):
        try:
            return AutoModel.from_pretrained(name, subfolder=part, torch_dtype=dtype)
        except (OSError, ValueError) as error:
            errors.append(str(error).splitlines()[0])
    raise ModelTypeError(
        "the model can't be loaded",
        where=name,
        expected="tiny-sdxl, tiny-flux, or a folder or hub id with a denoiser of diffusers",
        got=errors[0],
        hint="--subfolder names the denoiser's folder inside a pipeline",
    )


def license_of(name: str) -> str:
    """What is known of a model's license: its model card's word, "" without one."""
    if name in tiny.NAMES:
        return "Apache-2.0; for the training pictures see toma_fx/weights/LICENSES.md"
    from huggingface_hub import ModelCard

    card = Path(name) / "README.md"
    if Path(name).is_dir() and not card.is_file():
        return ""
    try:
        data = ModelCard.load(card if card.is_file() else name).data
    except Exception:  # a note is not worth a failed build, whatever the hub or its parser raise
        return ""
    return str(data.get("license_name") or data.get("license") or "")


def example_inputs(
    model: nn.Module,
    height: int = 1024,
    width: int = 1024,
    batch: int = 2,
    *,
    text: int | None = None,
) -> dict[str, Any]:
    """Random keyword inputs of one denoising step for a picture of `height` x `width` pixels.

    Supports `UNet2DConditionModel` (latents at an eighth of the size) and `FluxTransformer2DModel`
    (tokens of 2x2 latents). `text` is the number of text tokens (default 77, Flux 512). Tensors
    have the model's dtype and device; position ids are float32, and never on the meta device.

    Raises:
        ModelTypeError: another model; give `explain` and `optimize` your own inputs.
    """
    parameter = next(model.parameters())
    factory = {"dtype": parameter.dtype, "device": parameter.device}
    family = type(model).__name__
    if family == "UNet2DConditionModel":
        return _unet_inputs(model.config, height, width, batch, text or 77, factory)
    if family == "FluxTransformer2DModel":
        return _flux_inputs(model.config, height, width, batch, text or 512, factory)
    raise ModelTypeError(
        "no example inputs for this model",
        where=family,
        expected="UNet2DConditionModel or FluxTransformer2DModel",
        got=family,
        hint="toma_fx.example_inputs(pipe) takes them from its pipeline; or give your own",
    )


def _unet_inputs(
    config: Any, height: int, width: int, batch: int, text: int, factory: dict[str, Any]
) -> dict[str, Any]:
    """`factory` holds the dtype and device of the model."""
    inputs: dict[str, Any] = {
        "sample": torch.randn(batch, config.in_channels, height // 8, width // 8, **factory),
        "timestep": torch.tensor(500.0, device=factory["device"]),  # as Euler's scheduler gives it
        "encoder_hidden_states": torch.randn(batch, text, config.cross_attention_dim, **factory),
        "return_dict": False,
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        size = [height, width, 0, 0, height, width]
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, pooled, **factory),
            "time_ids": torch.tensor([size] * batch, **factory),
        }
    return inputs


def _flux_inputs(
    config: Any, height: int, width: int, batch: int, text: int, factory: dict[str, Any]
) -> dict[str, Any]:
    """`factory` holds the dtype and device of the model."""
    device = factory["device"]
    if torch.device(device).type == "meta":
        device = "cpu"  # of what enumerates positions the values are needed
    rows, columns = height // 16, width // 16
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(columns, device=device)[None, :]
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(batch, rows * columns, config.in_channels, **factory),
        "encoder_hidden_states": torch.randn(batch, text, config.joint_attention_dim, **factory),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim, **factory),
        "timestep": torch.full((batch,), 0.5, **factory),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(text, 3, device=device),
        "return_dict": False,
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 3.5, **factory)
    return inputs

"""Tiny diffusers pipelines, one `Case` for each, and LoRA adapters for their denoisers.

Every call is deterministic: prompts, pictures, noise and weights come from seeded generators. SDXL
draws latents of 32x32, so that attention has 16x16 tokens, and 8x8 in the one with 9 channels; Flux
has 8x12 tokens, Kontext another 4x12 of its reference picture. Six denoising steps, so that step 5
is a second refresh.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from torch import Tensor, nn

from tests import denoisers

STEPS = 6
IMAGE_EMBEDDING = 10


@dataclass(frozen=True)
class Case:
    """A pipeline and how to call it.

    Attributes:
        name: what the matrix calls it. component: attribute that holds the denoiser.
        make: builds the pipeline, always with the same weights.
        call: one generation to latents; `changes` replace arguments of the pipeline's call.
    """

    name: str
    component: str
    make: Callable[[], Any]
    call: Callable[..., Tensor]

    def denoiser(self, pipe: Any) -> nn.Module:
        return getattr(pipe, self.component)


def picture(height: int, width: int, seed: int = 7, channels: int = 3) -> Tensor:
    """A picture [1, channels, height, width] in [0, 1], smooth enough to survive resizing."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, channels, height // 8, width // 8, generator=g)
    return nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")


def mask(height: int, width: int) -> Tensor:
    """A mask [1, 1, height, width]: the left half is painted anew."""
    out = torch.zeros(1, 1, height, width)
    out[..., : width // 2] = 1
    return out


def vae(channels: int = 4) -> AutoencoderKL:
    """A VAE that halves the size of the picture."""
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
    ).eval()


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- SDXL -----------------------------------------------------------------------------------------


def _scheduler() -> EulerDiscreteScheduler:
    """Velocity prediction and late last steps, so that the latents show what every step did.

    With noise prediction an untrained model leaves the initial noise, 14 times as large as a
    picture, in the latents; a pattern refreshed in the wrong step would not be seen.
    """
    return EulerDiscreteScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", timestep_spacing="trailing"
    )


def unet() -> UNet2DConditionModel:
    """One level of attention, with the middle block that ControlNets and PAG need."""
    return denoisers.small_sdxl(mid_block_type="UNetMidBlock2DCrossAttn")


def sdxl(pipeline: type = StableDiffusionXLPipeline, **changes: Any) -> Any:
    """An SDXL pipeline without text encoders; `changes` are further components and options."""
    components = {
        "vae": vae(),
        "text_encoder": None,
        "text_encoder_2": None,
        "tokenizer": None,
        "tokenizer_2": None,
        "unet": unet(),
        "scheduler": _scheduler(),
        "force_zeros_for_empty_prompt": False,
        "add_watermarker": False,
    }
    return _quiet(pipeline(**{**components, **changes}))


def sdxl_call(pipe: Any, **changes: Any) -> Tensor:
    """Text to image with classifier-free guidance."""
    g = torch.Generator().manual_seed(3)
    arguments = {
        "prompt_embeds": torch.randn(1, 5, 24, generator=g),
        "pooled_prompt_embeds": torch.randn(1, 16, generator=g),
        "negative_prompt_embeds": torch.randn(1, 5, 24, generator=g),
        "negative_pooled_prompt_embeds": torch.randn(1, 16, generator=g),
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "generator": g,
    }
    if not isinstance(pipe, StableDiffusionXLImg2ImgPipeline):
        arguments.update(height=64, width=64)
    return pipe(**{**arguments, **changes}).images


def sdxl_img2img_call(pipe: Any, **changes: Any) -> Tensor:
    """The last six of eight steps."""
    arguments = {"image": picture(64, 64), "strength": 0.75, "num_inference_steps": 8}
    return sdxl_call(pipe, **{**arguments, **changes})


def sdxl_inpaint_call(pipe: Any, **changes: Any) -> Tensor:
    return sdxl_img2img_call(pipe, **{"mask_image": mask(64, 64), **changes})


def sdxl_controlnet() -> Any:
    own = unet()
    torch.manual_seed(1)
    controlnet = ControlNetModel.from_unet(own, conditioning_embedding_out_channels=(4, 8))
    return sdxl(
        StableDiffusionXLControlNetPipeline, unet=own, controlnet=_awakened(controlnet, seed=1)
    )


def sdxl_controlnet_call(pipe: Any, **changes: Any) -> Tensor:
    return sdxl_call(pipe, **{"image": picture(64, 64), **changes})


def sdxl_pag_call(pipe: Any, **changes: Any) -> Tensor:
    """Three batch elements; the last passes the middle block with attention to itself alone."""
    return sdxl_call(pipe, **{"pag_scale": 3.0, **changes})


def sdxl_ip_adapter() -> Any:
    pipe = sdxl()
    state = ip_adapter_state(pipe.unet)
    pipe.load_ip_adapter(state, subfolder=None, weight_name=None, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.8)
    return pipe


def sdxl_ip_adapter_call(pipe: Any, **changes: Any) -> Tensor:
    embeds = torch.randn(2, 1, IMAGE_EMBEDDING, generator=torch.Generator().manual_seed(5))
    return sdxl_call(pipe, **{"ip_adapter_image_embeds": [embeds], **changes})


def ip_adapter_state(denoiser: Any, seed: int = 4) -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter with four image tokens, in the format that IP-Adapters are published in.

    SDXL: keys and values for every cross-attention, numbered 1, 3, 5, ...; Flux: keys and values
    with biases for every double block, numbered 0, 1, 2, ...
    """
    g = torch.Generator().manual_seed(seed)
    if hasattr(denoiser, "transformer_blocks"):
        width = denoiser.config.joint_attention_dim
        hidden = dict(enumerate([denoiser.inner_dim] * len(denoiser.transformer_blocks)))
    else:
        width = denoiser.config.cross_attention_dim
        names = [n for n in denoiser.attn_processors if n.endswith("attn2.processor")]
        layers = [denoiser.get_submodule(n.removesuffix(".processor")) for n in names]
        hidden = {2 * i + 1: layer.to_k.out_features for i, layer in enumerate(layers)}
    projection = {
        "proj.weight": 0.3 * torch.randn(4 * width, IMAGE_EMBEDDING, generator=g),
        "proj.bias": 0.1 * torch.randn(4 * width, generator=g),
        "norm.weight": 1 + 0.1 * torch.randn(width, generator=g),
        "norm.bias": 0.1 * torch.randn(width, generator=g),
    }
    layers = {}
    for key, size in hidden.items():
        for part in ("to_k_ip", "to_v_ip"):
            layers[f"{key}.{part}.weight"] = torch.randn(size, width, generator=g) / width**0.5
            layers[f"{key}.{part}.bias"] = 0.1 * torch.randn(size, generator=g)
    return {"image_proj": projection, "ip_adapter": layers}


def _awakened(model: nn.Module, seed: int) -> nn.Module:
    """Random weights in place of the zeros that a fresh ControlNet ends in."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=g))
    return model.eval().requires_grad_(False)


# -- Flux -----------------------------------------------------------------------------------------


def flux(pipeline: type = FluxPipeline, transformer: Any = None, **changes: Any) -> Any:
    """A Flux pipeline without text encoders; `changes` are further components."""
    components = {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": vae(),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
        "transformer": denoisers.small_flux(in_channels=16) if transformer is None else transformer,
    }
    return _quiet(pipeline(**{**components, **changes}))


def flux_call(pipe: Any, **changes: Any) -> Tensor:
    """Text to image in one pass a step."""
    g = torch.Generator().manual_seed(3)
    arguments = {
        "prompt_embeds": torch.randn(1, 5, 24, generator=g),
        "pooled_prompt_embeds": torch.randn(1, 16, generator=g),
        "num_inference_steps": STEPS,
        "height": 32,
        "width": 48,
        "output_type": "latent",
        "generator": g,
    }
    return pipe(**{**arguments, **changes}).images


def true_cfg() -> dict[str, Any]:
    """Arguments that ask for a second, negative pass a step."""
    g = torch.Generator().manual_seed(5)
    return {
        "true_cfg_scale": 2.0,
        "negative_prompt_embeds": torch.randn(1, 5, 24, generator=g),
        "negative_pooled_prompt_embeds": torch.randn(1, 16, generator=g),
    }


def flux_true_cfg_call(pipe: Any, **changes: Any) -> Tensor:
    """Two passes a step, labeled "cond" and "uncond" by the pipeline."""
    return flux_call(pipe, **{**true_cfg(), **changes})


def flux_img2img_call(pipe: Any, **changes: Any) -> Tensor:
    """The last six of eight steps, two passes each, which this pipeline does not label."""
    arguments = {"image": picture(32, 48), "strength": 0.75, "num_inference_steps": 8}
    return flux_call(pipe, **{**true_cfg(), **arguments, **changes})


def flux_fill() -> Any:
    """Channels of latents, masked picture and mask; guidance as an input, as in Flux Fill."""
    channels = {"in_channels": 3 * 16, "out_channels": 16}
    return flux(FluxFillPipeline, denoisers.flux(guidance_embeds=True, **channels))


def flux_fill_call(pipe: Any, **changes: Any) -> Tensor:
    arguments = {"image": picture(32, 48), "mask_image": mask(32, 48)}
    return flux_call(pipe, **{**arguments, **changes})


def flux_controlnet() -> Any:
    """Residuals for both double blocks from two samples, for both single blocks from one."""
    config = dict(denoisers.flux(in_channels=16, num_single_layers=1).config)
    config.pop("out_channels")
    torch.manual_seed(1)
    controlnet = _awakened(FluxControlNetModel(**config), seed=1)
    transformer = denoisers.flux(in_channels=16)
    return flux(FluxControlNetPipeline, transformer, controlnet=controlnet)


def flux_controlnet_call(pipe: Any, **changes: Any) -> Tensor:
    return flux_call(pipe, **{"control_image": picture(32, 48), **changes})


def flux_kontext() -> Any:
    return flux(FluxKontextPipeline, denoisers.flux(in_channels=16, guidance_embeds=True))


def flux_kontext_call(pipe: Any, **changes: Any) -> Tensor:
    """The reference picture is as wide as the target and half as high."""
    arguments = {"image": picture(16, 48), "max_area": 32 * 48, "_auto_resize": False}
    return flux_call(pipe, **{**arguments, **changes})


def flux_ip_adapter() -> Any:
    pipe = flux()
    state = ip_adapter_state(pipe.transformer)
    encoder = {"image_encoder_pretrained_model_name_or_path": None}
    pipe.load_ip_adapter(state, weight_name=None, subfolder=None, **encoder)
    pipe.set_ip_adapter_scale(0.8)
    return pipe


def flux_ip_adapter_call(pipe: Any, **changes: Any) -> Tensor:
    """The pipeline wants a negative picture even where it makes no negative pass."""
    embeds = torch.randn(2, 1, 1, IMAGE_EMBEDDING, generator=torch.Generator().manual_seed(5))
    names = ("ip_adapter_image_embeds", "negative_ip_adapter_image_embeds")
    arguments = {name: [one] for name, one in zip(names, embeds, strict=True)}
    return flux_call(pipe, **{**arguments, **changes})


# -- LoRA -----------------------------------------------------------------------------------------

TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2"],
    "transformer": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "proj_mlp", "ff.net.2"],
}


def add_lora(denoiser: Any, component: str, name: str = "first", seed: int = 11) -> None:
    """Give a denoiser a LoRA adapter with random A and B through `add_adapter`, and activate it.

    It changes the weights by about half of their size.
    """
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[component])
    denoiser.add_adapter(config, adapter_name=name)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in sorted(denoiser.named_parameters()):
            if f".lora_A.{name}." in path or f".lora_B.{name}." in path:
                noise = torch.randn(parameter.shape, generator=g)
                parameter.copy_(0.4 * noise / parameter.shape[1] ** 0.5)
    denoiser.eval().requires_grad_(False)


def lora_state(case: Case, seed: int = 11) -> dict[str, Tensor]:
    """The adapter of `add_lora` as a state dict for `pipe.load_lora_weights`, in diffusers' format.

    The format has no alpha, which then is the rank: B carries the factor alpha / r = 2.
    """
    denoiser = case.denoiser(case.make())
    add_lora(denoiser, case.component, "saved", seed)
    factor = {"lora_A": 1.0, "lora_B": 2.0}
    return {
        f"{case.component}.{path.replace('.saved.', '.')}": factor[part] * parameter.clone()
        for path, parameter in denoiser.named_parameters()
        for part in factor
        if f".{part}.saved." in path
    }


CASES = {
    case.name: case
    for case in (
        Case("sdxl", "unet", sdxl, sdxl_call),
        Case(
            "sdxl_img2img",
            "unet",
            lambda: sdxl(StableDiffusionXLImg2ImgPipeline),
            sdxl_img2img_call,
        ),
        Case(
            "sdxl_inpaint",
            "unet",
            lambda: sdxl(StableDiffusionXLInpaintPipeline),
            sdxl_inpaint_call,
        ),
        Case(
            "sdxl_inpaint_9_channels",
            "unet",
            lambda: sdxl(StableDiffusionXLInpaintPipeline, unet=denoisers.sdxl(in_channels=9)),
            sdxl_inpaint_call,
        ),
        Case("sdxl_controlnet", "unet", sdxl_controlnet, sdxl_controlnet_call),
        Case("sdxl_pag", "unet", lambda: sdxl(StableDiffusionXLPAGPipeline), sdxl_pag_call),
        Case("sdxl_ip_adapter", "unet", sdxl_ip_adapter, sdxl_ip_adapter_call),
        Case("flux", "transformer", flux, flux_call),
        Case("flux_true_cfg", "transformer", flux, flux_true_cfg_call),
        Case("flux_img2img", "transformer", lambda: flux(FluxImg2ImgPipeline), flux_img2img_call),
        Case("flux_fill", "transformer", flux_fill, flux_fill_call),
        Case("flux_controlnet", "transformer", flux_controlnet, flux_controlnet_call),
        Case("flux_ip_adapter", "transformer", flux_ip_adapter, flux_ip_adapter_call),
        Case("flux_kontext", "transformer", flux_kontext, flux_kontext_call),
    )
}

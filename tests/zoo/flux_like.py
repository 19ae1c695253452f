"""Flux and the models built like it: packed image tokens, text and image in one attention.

Sizes are told apart by value: 3 heads of 16 (width 48), 60 image tokens of 6x10, 5 text tokens,
12 latent channels, text embeddings of 20.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    BriaFibo2Transformer2DModel,
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    ErnieImageTransformer2DModel,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    FluxControlNetModel,
    FluxTransformer2DModel,
    GlmImageTransformer2DModel,
    HunyuanImageTransformer2DModel,
    Ideogram4Transformer2DModel,
    JoyImageEditTransformer3DModel,
    Kandinsky5Transformer3DModel,
    Krea2Transformer2DModel,
    LongCatImageTransformer2DModel,
    NucleusMoEImageTransformer2DModel,
    OvisImageTransformer2DModel,
    PRXTransformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

from tests.zoo.base import Case, Crop, Inputs, randn, seeded

H, W = 6, 10
TOKENS = H * W
TEXT, LONG_TEXT = 5, 13
CHANNELS, TEXT_WIDTH, POOLED, WIDTH = 12, 20, 28, 48
CORNER = (4, 6)
"""Token grid of the corner that `Crop` keeps."""


def corner(x: Tensor, dim: int = 1, grid: tuple[int, int] = (H, W)) -> Tensor:
    """The top left `CORNER` of the tokens along `dim`."""
    rows = x.unflatten(dim, grid).narrow(dim, 0, CORNER[0]).narrow(dim + 1, 0, CORNER[1])
    return rows.flatten(dim, dim + 1)


def image_ids(height: int = H, width: int = W, image: int = 0) -> Tensor:
    """Flux position ids (image, row, column) of a picture, [height * width, 3] float32."""
    ids = torch.zeros(height, width, 3)
    ids[..., 0] = image
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None, :]
    return ids.flatten(0, 1)


def times(seed: int) -> Tensor:
    """One time in (0, 1) for both elements of the batch."""
    return torch.full((2,), 0.25 + 0.5 * (seed % 5) / 5)


# -- Flux -----------------------------------------------------------------------------------------

FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": CHANNELS,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": TEXT_WIDTH,
    "pooled_projection_dim": POOLED,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
FLUX_WHY = (
    "2 double blocks: joint attention and image MLP, one add each; 2 single blocks: attention and "
    "MLP side by side, one add."
)
FLUX_COUNTS: dict[str, Any] = {"sites": {"joint": 4}, "attention": 4, "mlp": 2}


def flux(**changes: Any) -> nn.Module:
    return FluxTransformer2DModel(**{**FLUX, **changes})


def flux_inputs(seed: int, *, text: int = TEXT, channels: int = CHANNELS) -> Inputs:
    """What FluxPipeline passes for FLUX.1-dev."""
    return {
        "hidden_states": randn(seed, 2, TOKENS, channels),
        "timestep": times(seed),
        "guidance": torch.full((2,), 3.5),
        "pooled_projections": randn(seed + 100, 2, POOLED),
        "encoder_hidden_states": randn(seed + 200, 2, text, TEXT_WIDTH),
        "txt_ids": torch.zeros(text, 3),
        "img_ids": image_ids(),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def crop_flux(inputs: Inputs) -> Inputs:
    """The corner of Flux inputs, ControlNet residuals included."""
    out = dict(inputs)
    out["hidden_states"] = corner(inputs["hidden_states"])
    out["img_ids"] = corner(inputs["img_ids"], inputs["img_ids"].dim() - 2)
    for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
        if inputs.get(name) is not None:
            out[name] = [corner(sample) for sample in inputs[name]]
    if "controlnet_cond" in inputs:
        out["controlnet_cond"] = corner(inputs["controlnet_cond"])
    return out


FLUX_CROP = Crop(CORNER, crop_flux, corner)


def kontext_inputs(seed: int, heights: tuple[int, int], widths: tuple[int, int]) -> Inputs:
    """FluxKontextPipeline: tokens of the reference after those of the image, ids with image=1."""
    inputs = flux_inputs(seed)
    tokens = sum(h * w for h, w in zip(heights, widths, strict=True))
    inputs["hidden_states"] = randn(seed, 2, tokens, CHANNELS)
    inputs["img_ids"] = torch.cat(
        [image_ids(heights[0], widths[0]), image_ids(heights[1], widths[1], image=1)]
    )
    return inputs


def controlled_inputs(seed: int) -> Inputs:
    """FluxControlNetPipeline: fewer residuals than blocks, so both double blocks share one."""
    residuals = [randn(seed + 300 + i, 2, TOKENS, WIDTH) for i in range(3)]
    return {
        **flux_inputs(seed),
        "controlnet_block_samples": residuals[:1],
        "controlnet_single_block_samples": residuals[1:],
        "controlnet_blocks_repeat": False,
    }


def controlnet() -> nn.Module:
    """A union ControlNet: the mode adds one token to the text."""
    return FluxControlNetModel(**FLUX, num_mode=4)


def controlnet_inputs(seed: int) -> Inputs:
    inputs = flux_inputs(seed)
    return {
        **inputs,
        "controlnet_cond": randn(seed + 300, 2, TOKENS, CHANNELS),
        "controlnet_mode": torch.full((2, 1), 2),
        "conditioning_scale": 0.7,
    }


IP_WIDTH = 22


def flux_with_ip_adapter() -> nn.Module:
    """Weights in the layout of the checkpoint, loaded the way `load_ip_adapter` does."""
    model = FluxTransformer2DModel(**FLUX)
    adapter = {
        f"{i}.{name}": torch.randn(WIDTH, TEXT_WIDTH) * 0.2 if "weight" in name else torch.zeros(48)
        for i in range(FLUX["num_layers"])
        for name in ("to_k_ip.weight", "to_k_ip.bias", "to_v_ip.weight", "to_v_ip.bias")
    }
    projection = {
        "proj.weight": torch.randn(4 * TEXT_WIDTH, IP_WIDTH) * 0.2,
        "proj.bias": torch.zeros(4 * TEXT_WIDTH),
        "norm.weight": torch.ones(TEXT_WIDTH),
        "norm.bias": torch.zeros(TEXT_WIDTH),
    }
    model._load_ip_adapter_weights(
        {"image_proj": projection, "ip_adapter": adapter}, low_cpu_mem_usage=False
    )
    return model


def ip_adapter_inputs(seed: int) -> Inputs:
    embeds = [randn(seed + 300, 2, 1, IP_WIDTH)]
    return {**flux_inputs(seed), "joint_attention_kwargs": {"ip_adapter_image_embeds": embeds}}


# -- Chroma, Flux.2 -------------------------------------------------------------------------------


def chroma() -> nn.Module:
    config = {
        k: v for k, v in FLUX.items() if k not in ("pooled_projection_dim", "guidance_embeds")
    }
    return ChromaTransformer2DModel(
        **config,
        approximator_num_channels=8,
        approximator_hidden_dim=24,
        approximator_layers=2,
    )


def chroma_inputs(seed: int) -> Inputs:
    """ChromaPipeline: a mask over text and image; padding of the second prompt is left out."""
    mask = torch.ones(2, TEXT + TOKENS, dtype=torch.bool)
    mask[1, 3:TEXT] = False
    inputs = flux_inputs(seed)
    del inputs["guidance"], inputs["pooled_projections"]
    return {**inputs, "attention_mask": mask}


def crop_chroma(inputs: Inputs) -> Inputs:
    mask = inputs["attention_mask"]
    text, image = mask.split([TEXT, TOKENS], dim=1)
    return {**crop_flux(inputs), "attention_mask": torch.cat([text, corner(image)], dim=1)}


def flux2() -> nn.Module:
    return Flux2Transformer2DModel(
        in_channels=CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=TEXT_WIDTH,
        timestep_guidance_channels=26,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=True,
    )


def flux2_ids(height: int, width: int, time: int = 0) -> Tensor:
    """Flux.2 position ids (time, row, column, layer), [height * width, 4] int64."""
    return torch.cartesian_prod(
        torch.tensor([time]), torch.arange(height), torch.arange(width), torch.arange(1)
    )


def flux2_inputs(seed: int, *, reference: int = 0) -> Inputs:
    """Flux2Pipeline; `reference` rows of a second image, whose ids start at time 10."""
    ids = [flux2_ids(H, W)]
    if reference:
        ids.append(flux2_ids(reference, W, time=10))
    img_ids = torch.cat(ids)
    txt_ids = torch.cartesian_prod(*[torch.arange(1)] * 3, torch.arange(TEXT))
    return {
        "hidden_states": randn(seed, 2, len(img_ids), CHANNELS),
        "timestep": times(seed),
        "guidance": torch.full((2,), 4.0),
        "encoder_hidden_states": randn(seed + 200, 2, TEXT, TEXT_WIDTH),
        "txt_ids": txt_ids[None].expand(2, -1, -1).clone(),
        "img_ids": img_ids[None].expand(2, -1, -1).clone(),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }


# -- close relatives ------------------------------------------------------------------------------


def text_ids(length: int) -> Tensor:
    """Ids of Ovis and LongCat: text runs along the diagonal."""
    along = torch.arange(length).float()
    return torch.stack([torch.zeros(length), along, along], -1)


def shared_inputs(seed: int, **changes: Any) -> Inputs:
    """What all models with packed tokens and ids are given."""
    names = ("hidden_states", "timestep", "encoder_hidden_states", "txt_ids", "img_ids")
    inputs = flux_inputs(seed)
    return {**{name: inputs[name] for name in names}, "return_dict": False, **changes}


PLAIN = {
    k: v
    for k, v in FLUX.items()
    if k not in ("patch_size", "pooled_projection_dim", "guidance_embeds")
}


def bria() -> nn.Module:
    return BriaTransformer2DModel(**{**PLAIN, "axes_dims_rope": [0, 8, 8]}, time_theta=50)


def bria_inputs(seed: int) -> Inputs:
    """BriaPipeline passes the scheduler's own times, up to 1000."""
    return shared_inputs(seed, timestep=times(seed) * 1000, attention_kwargs=None)


def fibo() -> nn.Module:
    return BriaFiboTransformer2DModel(
        **{**PLAIN, "axes_dims_rope": [0, 8, 8]}, time_theta=50, text_encoder_dim=14
    )


def fibo_inputs(seed: int) -> Inputs:
    """BriaFiboPipeline: every block gets its own layer of the text encoder; a mask over keys."""
    mask = torch.ones(2, 1, 1, TEXT + TOKENS, dtype=torch.bool)
    mask[0, ..., 4:TEXT] = False
    return shared_inputs(
        seed,
        timestep=times(seed) * 1000,
        text_encoder_layers=[randn(seed + 300 + i, 2, TEXT, 14) for i in range(4)],
        joint_attention_kwargs={"attention_mask": mask},
    )


def crop_fibo(inputs: Inputs) -> Inputs:
    mask = inputs["joint_attention_kwargs"]["attention_mask"]
    text, image = mask.split([TEXT, TOKENS], dim=-1)
    cropped = torch.cat([text, corner(image, 3)], dim=-1)
    return {**crop_flux(inputs), "joint_attention_kwargs": {"attention_mask": cropped}}


def ovis() -> nn.Module:
    return OvisImageTransformer2DModel(**PLAIN, out_channels=CHANNELS)


def ovis_inputs(seed: int) -> Inputs:
    return shared_inputs(seed, txt_ids=text_ids(TEXT), joint_attention_kwargs=None)


def longcat() -> nn.Module:
    return LongCatImageTransformer2DModel(**PLAIN, pooled_projection_dim=POOLED)


def longcat_inputs(seed: int, reference: int = 0) -> Inputs:
    """LongCatImagePipeline and its Edit: image ids start behind the text, kind 1 and then 2."""
    ids = [image_ids(image=1)]
    if reference:
        ids.append(image_ids(reference, W, image=2))
    img_ids = torch.cat(ids) + torch.tensor([0.0, 9.0, 9.0])
    latents = randn(seed, 2, len(img_ids), CHANNELS)
    return shared_inputs(
        seed, hidden_states=latents, img_ids=img_ids, txt_ids=text_ids(TEXT), guidance=None
    )


# -- Qwen-Image -----------------------------------------------------------------------------------

QWEN_WHY = "2 blocks: joint attention over [text | image] and an image MLP."
QWEN_COUNTS: dict[str, Any] = {"sites": {"joint": 2}, "attention": 2, "mlp": 2}


def qwen(**changes: Any) -> nn.Module:
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=3,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
        **changes,
    )


def qwen_inputs(seed: int, *shapes: tuple[int, int, int], masked: bool = True) -> Inputs:
    """QwenImagePipeline, Edit and Layered: the shapes of all pictures, as Python numbers."""
    tokens = sum(t * h * w for t, h, w in shapes)
    mask = torch.ones(2, TEXT, dtype=torch.int64)
    mask[0, 3:] = 0
    return {
        "hidden_states": randn(seed, 2, tokens, CHANNELS),
        "timestep": times(seed),
        "guidance": None,
        "encoder_hidden_states_mask": mask if masked else None,
        "encoder_hidden_states": randn(seed + 200, 2, TEXT, TEXT_WIDTH),
        "img_shapes": [list(shapes)] * 2,
        "attention_kwargs": {},
        "return_dict": False,
    }


# -- Z-Image --------------------------------------------------------------------------------------


def z_image() -> nn.Module:
    return ZImageTransformer2DModel(
        in_channels=3,
        dim=WIDTH,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 32, 32],
    )


def z_image_inputs(seed: int, height: int, width: int) -> Inputs:
    """ZImagePipeline: lists with one latent and one caption (any length) an element."""
    latents = [randn(seed + i, 3, 1, 2 * height, 2 * width) for i in range(2)]
    captions = [randn(seed + 200 + i, length, TEXT_WIDTH) for i, length in enumerate((5, 7))]
    return {
        "x": latents,
        "t": times(seed),
        "cap_feats": captions,
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def crop_z_image(inputs: Inputs) -> Inputs:
    return {**inputs, "x": [latent[..., :8, :16] for latent in inputs["x"]]}


# -- PRX ------------------------------------------------------------------------------------------


def prx() -> nn.Module:
    return PRXTransformer2DModel(
        in_channels=3,
        patch_size=2,
        context_in_dim=TEXT_WIDTH,
        hidden_size=WIDTH,
        num_heads=3,
        depth=2,
        axes_dim=[8, 8],
    )


def prx_inputs(seed: int) -> Inputs:
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    mask[0, 3:] = False
    return {
        "hidden_states": randn(seed, 2, 3, 2 * H, 2 * W),
        "timestep": times(seed),
        "encoder_hidden_states": randn(seed + 200, 2, TEXT, TEXT_WIDTH),
        "attention_mask": mask,
        "return_dict": False,
    }


def crop_latent(inputs: Inputs) -> Inputs:
    """The corner of latents [..., 2 * H, 2 * W]."""
    return {**inputs, "hidden_states": corner_of_latent(inputs["hidden_states"])}


def corner_of_latent(x: Tensor) -> Tensor:
    return x[..., : 2 * CORNER[0], : 2 * CORNER[1]]


# -- Kandinsky 5 ----------------------------------------------------------------------------------

FRAMES, VIDEO_H, VIDEO_W = 3, 6, 4
KANDINSKY_WHY = (
    "2 visual blocks: self-attention, cross-attention, MLP; 2 text blocks attend to text alone."
)
KANDINSKY_COUNTS: dict[str, Any] = {
    "sites": {"self": 2, "cross": 2, "text": 2},
    "attention": 4,
    "mlp": 2,
}


def kandinsky(**changes: Any) -> nn.Module:
    return Kandinsky5Transformer3DModel(
        in_visual_dim=5,
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=POOLED,
        time_dim=26,
        out_visual_dim=5,
        patch_size=(1, 2, 2),
        model_dim=WIDTH,
        ff_dim=120,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        **changes,
    )


def kandinsky_inputs(seed: int, frames: int, height: int, width: int, channels: int) -> Inputs:
    """Kandinsky5T2IPipeline and Kandinsky5T2VPipeline: channels come last."""
    return {
        "hidden_states": randn(seed, 2, frames, 2 * height, 2 * width, channels),
        "encoder_hidden_states": randn(seed + 200, 2, TEXT, TEXT_WIDTH),
        "pooled_projections": randn(seed + 100, 2, POOLED),
        "timestep": times(seed) * 1000,
        "visual_rope_pos": [torch.arange(frames), torch.arange(height), torch.arange(width)],
        "text_rope_pos": torch.arange(TEXT),
        "scale_factor": (1.0, 2.0, 2.0),
        "sparse_params": None,
        "return_dict": True,
    }


NABLA: dict[str, Any] = {"P": 0.9, "wT": 3, "wH": 3, "wW": 3, "add_sta": True, "method": "topcdf"}


def kandinsky_nabla() -> nn.Module:
    model = kandinsky(
        visual_cond=True,
        attention_type="nabla",
        **{f"attention_{name}": value for name, value in NABLA.items()},
    )
    for module in model.modules():  # set_attention_backend would change it for all other models
        if hasattr(module, "processor"):
            module.processor._attention_backend = "flex"
    return model


def nabla_inputs(seed: int) -> Inputs:
    """The 10 second models: tokens in 8x8 patches, blocks of 64 look at chosen blocks."""
    inputs = kandinsky_inputs(seed, 2, 16, 8, 11)
    near = torch.eye(4, dtype=torch.bool)
    sparse = {"sta_mask": near[None, None], "attention_type": "nabla", "to_fractal": True, **NABLA}
    return {**inputs, "sparse_params": {**sparse, "visual_shape": (2, 16, 8)}}


def crop_kandinsky(size: tuple[int, int, int], grid: tuple[int, ...] = ()) -> Crop:
    frames, height, width = size

    def inputs(whole: Inputs) -> Inputs:
        positions = whole["visual_rope_pos"]
        return {
            **whole,
            "hidden_states": output(whole["hidden_states"]),
            "visual_rope_pos": [p[:n] for p, n in zip(positions, size, strict=True)],
        }

    def output(x: Tensor) -> Tensor:
        return x[:, :frames, : 2 * height, : 2 * width]

    return Crop(grid or size, inputs, output)


# -- HunyuanImage ---------------------------------------------------------------------------------

HUNYUAN_WHY = FLUX_WHY + " 2 refiner blocks attend to text alone."
HUNYUAN_COUNTS: dict[str, Any] = {"sites": {"joint": 4, "text": 2}, "attention": 4, "mlp": 2}


def hunyuan_image(**changes: Any) -> nn.Module:
    config = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 2,
        "patch_size": (1, 1),
        "text_embed_dim": TEXT_WIDTH,
        "rope_axes_dim": (8, 8),
    }
    return HunyuanImageTransformer2DModel(**{**config, **changes})


def hunyuan_image_inputs(seed: int, *frames: int) -> Inputs:
    """HunyuanImagePipeline without, and its refiner with, a dimension of frames."""
    mask = torch.ones(2, TEXT, dtype=torch.int64)
    mask[0, 3:] = 0
    return {
        "hidden_states": randn(seed, 2, CHANNELS, *frames, H, W),
        "timestep": times(seed) * 1000,
        "timestep_r": None,
        "guidance": None,
        "attention_kwargs": None,
        "encoder_hidden_states": randn(seed + 200, 2, TEXT, TEXT_WIDTH),
        "encoder_attention_mask": mask,
        "return_dict": False,
    }


def glyph_inputs(seed: int) -> Inputs:
    """The second text encoder's tokens; only one of the prompts quotes a text to be drawn."""
    mask = torch.zeros(2, 7, dtype=torch.int64)
    mask[0, :4] = 1
    return {
        **hunyuan_image_inputs(seed),
        "encoder_hidden_states_2": randn(seed + 300, 2, 7, POOLED),
        "encoder_attention_mask_2": mask,
    }


def crop_plain(inputs: Inputs) -> Inputs:
    return {**inputs, "hidden_states": inputs["hidden_states"][..., : CORNER[0], : CORNER[1]]}


PLAIN_CROP = Crop(CORNER, crop_plain, lambda x: x[..., : CORNER[0], : CORNER[1]])


# -- newer models ---------------------------------------------------------------------------------


def flux3() -> nn.Module:
    return Flux3Transformer2DModel(
        in_channels=CHANNELS,
        cond_in_channels=CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=TEXT_WIDTH,
        timestep_channels=26,
        axes_dims_rope=(4, 4, 4, 4),
    )


def flux3_inputs(seed: int, *, reference: tuple[int, int] | None = None) -> Inputs:
    inputs = flux2_inputs(seed)
    inputs["img_ids"], inputs["txt_ids"] = inputs["img_ids"][0], inputs["txt_ids"][0]
    del inputs["guidance"], inputs["joint_attention_kwargs"]
    if reference:
        tokens = reference[0] * reference[1]
        inputs["image_cond_hidden_states"] = randn(seed + 300, 2, tokens, CHANNELS)
        inputs["image_cond_ids"] = flux2_ids(*reference, time=10)
    return {**inputs, "attention_kwargs": None}


def krea2() -> nn.Module:
    return Krea2Transformer2DModel(
        in_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        num_key_value_heads=1,
        intermediate_size=88,
        timestep_embed_dim=26,
        text_hidden_dim=TEXT_WIDTH,
        num_text_layers=4,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=36,
        axes_dims_rope=(4, 6, 6),
    )


def krea2_inputs(seed: int) -> Inputs:
    """Krea2Pipeline: one table of positions, text first; text features of four layers."""
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    mask[0, 3:] = False
    return {
        "hidden_states": randn(seed, 2, TOKENS, CHANNELS),
        "encoder_hidden_states": randn(seed + 200, 2, TEXT, 4, TEXT_WIDTH),
        "timestep": times(seed),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), image_ids()]),
        "encoder_attention_mask": mask,
        "attention_kwargs": None,
        "return_dict": False,
    }


def crop_krea2(inputs: Inputs) -> Inputs:
    text, image = inputs["position_ids"].split([TEXT, TOKENS])
    return {
        **inputs,
        "hidden_states": corner(inputs["hidden_states"]),
        "position_ids": torch.cat([text, corner(image, 0)]),
    }


def glm() -> nn.Module:
    return GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=26,
        condition_dim=10,
        prior_vq_quantizer_codebook_size=32,
    )


def glm_inputs(seed: int) -> Inputs:
    """GlmImagePipeline without condition images: one token of the prior for each patch."""
    draw = torch.Generator().manual_seed(seed + 300)
    return {
        "hidden_states": randn(seed, 2, 3, 2 * H, 2 * W),
        "encoder_hidden_states": randn(seed + 200, 2, TEXT, TEXT_WIDTH),
        "prior_token_id": torch.randint(0, 32, (2, TOKENS), generator=draw),
        "prior_token_drop": torch.zeros(2, TOKENS, dtype=torch.bool),
        "timestep": times(seed) * 1000,
        "target_size": torch.tensor([[192.0, 320.0]]).repeat(2, 1),
        "crop_coords": torch.zeros(2, 2),
        "attention_kwargs": None,
        "return_dict": False,
        "kv_caches": None,
    }


def crop_glm(inputs: Inputs) -> Inputs:
    cut = {name: corner(inputs[name]) for name in ("prior_token_id", "prior_token_drop")}
    return {**crop_latent(inputs), **cut}


def ernie() -> nn.Module:
    return ErnieImageTransformer2DModel(
        hidden_size=WIDTH,
        num_attention_heads=3,
        num_layers=2,
        ffn_hidden_size=88,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        patch_size=1,
        text_in_dim=TEXT_WIDTH,
        rope_axes_dim=(4, 6, 6),
    )


def ernie_inputs(seed: int) -> Inputs:
    return {
        "hidden_states": randn(seed, 2, CHANNELS, H, W),
        "timestep": times(seed) * 1000,
        "text_bth": randn(seed + 200, 2, TEXT, TEXT_WIDTH),
        "text_lens": torch.tensor([3, TEXT]),
        "return_dict": False,
    }


def crop_whole_tokens(inputs: Inputs) -> Inputs:
    """The corner of latents [..., H, W], a token each."""
    return {**inputs, "hidden_states": corner_of_tokens(inputs["hidden_states"])}


def corner_of_tokens(x: Tensor) -> Tensor:
    return x[..., : CORNER[0], : CORNER[1]]


def ideogram() -> nn.Module:
    return Ideogram4Transformer2DModel(
        in_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        intermediate_size=88,
        adaln_dim=26,
        llm_features_dim=TEXT_WIDTH,
        mrope_section=(4, 2, 2),
    )


def ideogram_inputs(seed: int) -> Inputs:
    """Ideogram4Pipeline: everything has the length of [text padded on the left | image]."""
    text = 7
    ids = torch.zeros(2, text + TOKENS, 3, dtype=torch.int64)
    roles, segments = torch.full((2, text + TOKENS), 2), torch.ones(2, text + TOKENS)
    for row, length in enumerate((5, 7)):
        ids[row, text - length : text] = torch.arange(length)[:, None]
        ids[row, text:] = image_ids() + 65536
        roles[row, text - length : text] = 3
        roles[row, : text - length] = 0
        segments[row, : text - length] = -1
    latents = randn(seed, 2, TOKENS, CHANNELS)
    features = randn(seed + 200, 2, text, TEXT_WIDTH)
    return {
        "hidden_states": torch.cat([torch.zeros(2, text, CHANNELS), latents], 1),
        "timestep": times(seed),
        "encoder_hidden_states": torch.cat([features, torch.zeros(2, TOKENS, TEXT_WIDTH)], 1),
        "position_ids": ids,
        "segment_ids": segments.long(),
        "indicator": roles,
        "attention_kwargs": None,
        "return_dict": False,
    }


def behind_text(x: Tensor) -> Tensor:
    """[text 7 | corner of the image] of [text 7 | image]."""
    text, image = x.split([7, TOKENS], dim=1)
    return torch.cat([text, corner(image)], dim=1)


def crop_ideogram(inputs: Inputs) -> Inputs:
    return {
        k: behind_text(v) if torch.is_tensor(v) and v.dim() > 1 else v for k, v in inputs.items()
    }


def joy() -> nn.Module:
    return JoyImageEditTransformer3DModel(
        patch_size=[1, 2, 2],
        in_channels=3,
        hidden_size=WIDTH,
        num_attention_heads=3,
        text_dim=TEXT_WIDTH,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )


def joy_inputs(seed: int) -> Inputs:
    """JoyImageEditPipeline: the picture to edit and the noise are two items of one frame."""
    return {
        "hidden_states": randn(seed, 2, 2, 3, 1, 2 * H, 2 * W),
        "timestep": times(seed) * 1000,
        "encoder_hidden_states": randn(seed + 200, 2, TEXT, TEXT_WIDTH),
        "return_dict": False,
    }


def nucleus() -> nn.Module:
    model = NucleusMoEImageTransformer2DModel(
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=3,
        num_layers=5,
        attention_head_dim=16,
        num_attention_heads=3,
        num_key_value_heads=1,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
        num_experts=4,
        moe_intermediate_dim=24,
        capacity_factors=2.0,
    )
    for name, weight in model.named_parameters():
        if ".experts." in name:  # created without values
            nn.init.normal_(weight, std=0.2)
    return model


def nucleus_inputs(seed: int) -> Inputs:
    inputs = qwen_inputs(seed, (1, H, W), masked=False)
    del inputs["guidance"]
    return inputs


def fibo2() -> nn.Module:
    return BriaFibo2Transformer2DModel(
        in_channels=3,
        dim=WIDTH,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=3,
        cap_feat_dim=TEXT_WIDTH,
        injection_layer_ids=(1,),
        min_num_gist_tokens=6,
        max_num_gist_tokens=10,
        gist_step=2,
        gist_min_text_len=2,
        gist_max_text_len=12,
        axes_dims=(4, 6, 6),
        axes_lens=(64, 32, 32),
    )


def fibo2_inputs(seed: int) -> Inputs:
    """BriaFibo2Pipeline: one bundle of text features for the gist, one for each injection."""
    return {
        "hidden_states": randn(seed, 2, 3, 2 * H, 2 * W),
        "timestep": times(seed),
        "encoder_hidden_states": randn(seed + 200, 2, 2, TEXT, TEXT_WIDTH),
        "encoder_attention_mask": None,
        "context_latents": None,
        "return_dict": False,
    }


def qwen21() -> nn.Module:
    return QwenImage21Transformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        context_in_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )


def qwen21_inputs(seed: int) -> Inputs:
    """QwenImage21Pipeline, first step: the slots of the image are marked by a tensor."""
    slots = torch.ones(2, TEXT + TOKENS // 4, dtype=torch.bool)
    slots[:, :TEXT] = False
    return {
        "hidden_states": randn(seed, 2, TOKENS, CHANNELS),
        "timestep": times(seed),
        "encoder_hidden_states": randn(seed + 200, 2, TEXT, TEXT_WIDTH),
        "encoder_hidden_states_mask": None,
        "img_shapes": [[(1, H, W)]] * 2,
        "img_mask": slots,
        "attention_kwargs": None,
        "kv_cache": None,
        "kv_cache_mode": None,
        "return_dict": False,
    }


CASES: tuple[Case, ...] = (
    Case(
        "flux_dev",
        "Flux.1-dev",
        seeded(flux),
        flux_inputs,
        grids=((H, W),),
        **FLUX_COUNTS,
        why=FLUX_WHY,
        crop=FLUX_CROP,
    ),
    Case(
        "flux_kontext",
        "Flux.1 Kontext, reference of the image's width",
        seeded(flux),
        lambda seed: kontext_inputs(seed, (H, 8), (W, W)),
        grids=((H + 8, W),),
        **FLUX_COUNTS,
        why=FLUX_WHY + " Both pictures are one raster of 6 + 8 rows.",
    ),
    Case(
        "flux_kontext_narrow",
        "Flux.1 Kontext, reference of another width",
        seeded(flux),
        lambda seed: kontext_inputs(seed, (H, 9), (W, 4)),
        grids=((H, W),),
        **FLUX_COUNTS,
        why=FLUX_WHY + " The reference does not fit the raster and stays whole.",
    ),
    Case(
        "flux_fill",
        "Flux.1 Fill with the longer text of Redux",
        seeded(lambda: flux(in_channels=44, out_channels=CHANNELS)),
        lambda seed: flux_inputs(seed, text=LONG_TEXT, channels=44),
        grids=((H, W),),
        **FLUX_COUNTS,
        why=FLUX_WHY,
        crop=FLUX_CROP,
    ),
    Case(
        "flux_controlled",
        "Flux.1 with ControlNet residuals",
        seeded(flux),
        controlled_inputs,
        grids=((H, W),),
        **FLUX_COUNTS,
        why=FLUX_WHY + " Residuals of a ControlNet are added between blocks.",
        crop=FLUX_CROP,
    ),
    Case(
        "flux_controlnet",
        "Flux.1 ControlNet (union)",
        seeded(controlnet),
        controlnet_inputs,
        grids=((H, W),),
        **FLUX_COUNTS,
        why=FLUX_WHY + " Every block's result is also an output, through a linear map.",
        crop=FLUX_CROP,
    ),
    Case(
        "flux_ip_adapter",
        "Flux.1 with an IP-Adapter",
        seeded(flux_with_ip_adapter),
        ip_adapter_inputs,
        grids=((H, W),),
        sites={"joint": 4, "cross": 2},
        attention=6,
        mlp=2,
        why=FLUX_WHY + " Each double block adds a third branch: the joint attention's image queries"
        " look at the adapter's tokens.",
        crop=FLUX_CROP,
    ),
    Case(
        "chroma",
        "Chroma",
        seeded(chroma),
        chroma_inputs,
        grids=((H, W),),
        **FLUX_COUNTS,
        why=FLUX_WHY + " The mask is the outer product of the tokens' mask.",
        crop=Crop(CORNER, crop_chroma, corner),
    ),
    Case(
        "flux2",
        "Flux.2",
        seeded(flux2),
        flux2_inputs,
        grids=((H, W),),
        **FLUX_COUNTS,
        why=FLUX_WHY + " Text and image stay joined over all single blocks.",
        crop=FLUX_CROP,
    ),
    Case(
        "flux2_edit",
        "Flux.2 with a reference image",
        seeded(flux2),
        lambda seed: flux2_inputs(seed, reference=8),
        grids=((H + 8, W),),
        **FLUX_COUNTS,
        why=FLUX_WHY + " Both pictures are one raster of 6 + 8 rows.",
    ),
    Case(
        "bria",
        "Bria 3",
        seeded(bria),
        bria_inputs,
        grids=((H, W),),
        **FLUX_COUNTS,
        why=FLUX_WHY,
        crop=FLUX_CROP,
    ),
    Case(
        "bria_fibo",
        "Bria Fibo",
        seeded(fibo),
        fibo_inputs,
        grids=((H, W),),
        **FLUX_COUNTS,
        why=FLUX_WHY + " Half of the text's channels is replaced before each block.",
        crop=Crop(CORNER, crop_fibo, corner),
    ),
    Case(
        "ovis_image",
        "Ovis-Image",
        seeded(ovis),
        ovis_inputs,
        grids=((H, W),),
        **FLUX_COUNTS,
        why=FLUX_WHY + " The MLPs are gated.",
        crop=FLUX_CROP,
    ),
    Case(
        "longcat_image",
        "LongCat-Image",
        seeded(longcat),
        longcat_inputs,
        grids=((H, W),),
        **FLUX_COUNTS,
        why=FLUX_WHY,
        crop=FLUX_CROP,
    ),
    Case(
        "longcat_image_edit",
        "LongCat-Image-Edit",
        seeded(longcat),
        lambda seed: longcat_inputs(seed, reference=H),
        grids=((2, H, W),),
        **FLUX_COUNTS,
        why=FLUX_WHY + " Both pictures are one raster of 6 + 6 rows.",
    ),
    Case(
        "qwen_image",
        "Qwen-Image",
        seeded(qwen),
        lambda seed: qwen_inputs(seed, (1, H, W)),
        grids=((H, W),),
        **QWEN_COUNTS,
        why=QWEN_WHY + " The grid is told by img_shapes.",
    ),
    Case(
        "qwen_image_edit",
        "Qwen-Image-Edit",
        seeded(qwen),
        lambda seed: qwen_inputs(seed, (1, H, W), (1, 8, W), masked=False),
        grids=((H + 8, W),),
        **QWEN_COUNTS,
        why=QWEN_WHY + " Both pictures are one raster of 6 + 8 rows.",
    ),
    Case(
        "qwen_image_edit_2511",
        "Qwen-Image-Edit-2511",
        seeded(lambda: qwen(zero_cond_t=True)),
        lambda seed: qwen_inputs(seed, (1, H, W), (1, 8, W)),
        grids=((H + 8, W),),
        **QWEN_COUNTS,
        why=QWEN_WHY + " Reference tokens are modulated for time 0, chosen by a mask over tokens.",
    ),
    Case(
        "qwen_image_layered",
        "Qwen-Image-Layered",
        seeded(lambda: qwen(use_layer3d_rope=True, use_additional_t_cond=True)),
        lambda seed: {
            **qwen_inputs(seed, *[(1, H, W)] * 3),
            "additional_t_cond": torch.zeros(2, dtype=torch.int64),
        },
        grids=((3, H, W),),
        **QWEN_COUNTS,
        why=QWEN_WHY + " Two layers and the picture they make up are one raster of 6 + 6 + 6 rows.",
    ),
    Case(
        "z_image",
        "Z-Image",
        seeded(z_image),
        lambda seed: z_image_inputs(seed, 8, 12),
        grids=((8, 12),),
        sites={"self": 2, "joint": 2, "text": 2},
        attention=4,
        mlp=4,
        why="2 noise refiners over the image, 2 blocks over [image | caption], each attention and"
        " MLP; 2 caption refiners. 96 tokens and captions padded to 32 need no mask.",
        crop=Crop((4, 8), crop_z_image, lambda x: x[..., :8, :16]),
    ),
    Case(
        "z_image_padded",
        "Z-Image at a size that needs padding",
        seeded(z_image),
        lambda seed: z_image_inputs(seed, H, W),
        grids=((H, W),),
        sites={"joint": 4, "text": 2},
        attention=4,
        mlp=4,
        why="As z_image, but 4 padding tokens behind the 60 of the image take part in attention.",
    ),
    Case(
        "prx",
        "PRX",
        seeded(prx),
        prx_inputs,
        grids=((H, W),),
        sites={"joint": 2},
        attention=2,
        mlp=2,
        why="2 blocks: image queries over keys of [text | image], a gated MLP.",
        crop=Crop(CORNER, crop_latent, corner_of_latent),
    ),
    Case(
        "kandinsky5_image",
        "Kandinsky 5 Image Lite",
        seeded(kandinsky),
        lambda seed: kandinsky_inputs(seed, 1, H, W, 5),
        grids=((H, W),),
        **KANDINSKY_COUNTS,
        why=KANDINSKY_WHY,
        crop=crop_kandinsky((1, *CORNER), CORNER),
    ),
    Case(
        "kandinsky5_video",
        "Kandinsky 5 Video Lite",
        seeded(lambda: kandinsky(visual_cond=True)),
        lambda seed: kandinsky_inputs(seed, FRAMES, VIDEO_H, VIDEO_W, 11),
        grids=((FRAMES, VIDEO_H, VIDEO_W),),
        **KANDINSKY_COUNTS,
        why=KANDINSKY_WHY,
        crop=crop_kandinsky((2, 4, 3)),
    ),
    Case(
        "kandinsky5_nabla",
        "Kandinsky 5 Video Lite 10s",
        seeded(kandinsky_nabla),
        nabla_inputs,
        refused=("CompanionError", "the attention backend 'flex'"),
        why="All attention is flex_attention; its block mask is found from means over 64 tokens.",
    ),
    Case(
        "hunyuan_image",
        "HunyuanImage 2.1 without glyph text",
        seeded(hunyuan_image),
        hunyuan_image_inputs,
        grids=((H, W),),
        **HUNYUAN_COUNTS,
        why=HUNYUAN_WHY,
        crop=PLAIN_CROP,
    ),
    Case(
        "hunyuan_image_refiner",
        "HunyuanImage 2.1 refiner",
        seeded(
            lambda: hunyuan_image(
                patch_size=(1, 1, 1), rope_axes_dim=(4, 6, 6), guidance_embeds=True
            )
        ),
        lambda seed: {**hunyuan_image_inputs(seed, 1), "guidance": torch.full((2,), 3250.0)},
        grids=((H, W),),
        **HUNYUAN_COUNTS,
        why=HUNYUAN_WHY,
        crop=PLAIN_CROP,
    ),
    Case(
        "hunyuan_image_glyphs",
        "HunyuanImage 2.1",
        seeded(lambda: hunyuan_image(text_embed_2_dim=POOLED)),
        glyph_inputs,
        refused=("CaptureError", "Could not guard on data-dependent expression"),
        why="Valid tokens of both texts are moved to the front: sizes that depend on the masks.",
    ),
    Case(
        "flux3",
        "Flux.3",
        seeded(flux3),
        flux3_inputs,
        grids=((H, W),),
        sites={"self": 2, "joint": 2, "text": 2},
        attention=4,
        why="2 image blocks of self-attention beside an MLP, 2 joint blocks alike, one add each;"
        " 2 blocks over text alone.",
        crop=FLUX_CROP,
    ),
    Case(
        "flux3_edit",
        "Flux.3 with a reference image",
        seeded(flux3),
        lambda seed: flux3_inputs(seed, reference=(8, 5)),
        grids=((H, W), (8, 5)),
        sites={"self": 4, "joint": 2, "text": 2},
        attention=6,
        why="As flux3, and 2 blocks over the reference alone; then one stream of both, whose widths"
        " differ.",
    ),
    Case(
        "krea2",
        "Krea 2",
        seeded(krea2),
        krea2_inputs,
        grids=((H, W),),
        sites={"joint": 2, "text": 4},
        attention=2,
        mlp=2,
        why="2 blocks over [text | image]: attention with one key head for three, gated MLP."
        " 2 text blocks over feature layers, 2 over text tokens.",
        crop=Crop(CORNER, crop_krea2, corner),
    ),
    Case(
        "glm_image",
        "GLM-Image",
        seeded(glm),
        glm_inputs,
        grids=((H, W),),
        sites={"joint": 2},
        attention=2,
        mlp=2,
        why="2 blocks: joint attention over [text | image], whose image part alone is rotated in"
        " place, and an MLP applied to image and text in turn.",
        crop=Crop(CORNER, crop_glm, corner_of_latent),
    ),
    Case(
        "ernie_image",
        "ERNIE-Image",
        seeded(ernie),
        ernie_inputs,
        grids=((H, W),),
        sites={"joint": 2},
        attention=2,
        mlp=2,
        why="2 blocks: joint attention over [image | text], and an MLP on both. The stream "
        "is laid out [tokens, batch, channels].",
        crop=Crop(CORNER, crop_whole_tokens, corner_of_tokens),
    ),
    Case(
        "ideogram4",
        "Ideogram 4",
        seeded(ideogram),
        ideogram_inputs,
        grids=((H, W),),
        sites={"joint": 2},
        attention=2,
        mlp=2,
        why="2 blocks over one packed sequence [text | image] with a mask of equal segment ids.",
        crop=Crop(CORNER, crop_ideogram, behind_text),
    ),
    Case(
        "joy_image_edit",
        "JoyImage-Edit",
        seeded(joy),
        joy_inputs,
        grids=((2, H, W),),
        **QWEN_COUNTS,
        why="2 blocks: joint attention over [image | text] and an image MLP; both pictures are"
        " frames of one convolution with patches of one frame.",
    ),
    Case(
        "nucleus_image",
        "Nucleus-Image",
        seeded(nucleus),
        nucleus_inputs,
        grids=((H, W),),
        sites={"joint": 5},
        attention=5,
        mlp=4,
        why="5 blocks: image queries over keys of [image | text]; 4 plain MLPs. The experts of the"
        " other choose their tokens among all (topk), which must stay whole.",
    ),
    Case(
        "bria_fibo2",
        "Bria Fibo 2",
        seeded(fibo2),
        fibo2_inputs,
        grids=((H, W),),
        sites={"self": 2, "joint": 3, "cross": 1, "text": 4},
        attention=6,
        mlp=5,
        why="2 noise refiners over the image, 3 blocks over [gist | image], one of them with"
        " cross-attention to text besides, an MLP each. 2 perceiver layers of two attentions"
        " make the gist.",
        crop=Crop(CORNER, crop_latent, corner_of_latent),
    ),
    Case(
        "qwen_image21",
        "Qwen-Image 2.1",
        seeded(qwen21),
        qwen21_inputs,
        refused=("CaptureError", "is_image_token = image_pad_mask.tolist()"),
        why="Where the image's tokens go is read from a mask (repeat_interleave by a tensor,"
        " tolist).",
    ),
)

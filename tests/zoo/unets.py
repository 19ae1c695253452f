"""UNets: Stable Diffusion 1.5, 2.x, SDXL and what is attached to them, video UNets, other UNets.

Latents are 16x24, 24x32 or larger so that every level with attention has a token grid of its own
(16x24, 12x16, 8x12, 6x8, 4x6). No case has a `Crop`: convolutions and group norms see all pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    DreamLiteUNetModel,
    I2VGenXLUNet,
    Kandinsky3UNet,
    PriorTransformer,
    StableCascadeUNet,
    T2IAdapter,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetControlNetXSModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
    UVit2DModel,
)
from torch import Tensor, nn

from tests.zoo.base import Case, Inputs, randn, seeded

TEXT = 28
"""Width of the text embeddings."""
POOLED = 26
"""Width of the pooled text embeddings."""
LARGE, SMALL = (12, 16), (6, 8)
"""Token grids of the two levels of an SDXL-like UNet with attention."""
FRAMES = 7


def text(seed: int, length: int = 7, width: int = TEXT) -> Tensor:
    """Text embeddings of two prompts."""
    return randn(seed + 100, 2, length, width)


def step(seed: int) -> Tensor:
    """One timestep for the whole batch, as schedulers give it."""
    return torch.tensor(500 + seed)


# -- Stable Diffusion 1.5 and 2.x -----------------------------------------------------------------

SD15: dict[str, Any] = {
    "sample_size": 24,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (20, 40, 60),
    "layers_per_block": 1,
    "attention_head_dim": 2,  # the number of heads: a misnomer that diffusers keeps
    "norm_num_groups": 5,
    "cross_attention_dim": TEXT,
}
SD_GRIDS = ((16, 24), (8, 12), (4, 6), (8, 12), (8, 12), (16, 24), (16, 24))
"""One transformer in each down block with attention and in the middle, two in each up block."""


def sd15(**changes: Any) -> Callable[[], nn.Module]:
    """SD 1.5: projections by 1x1 convolutions, attention from the first level on."""
    return seeded(lambda: UNet2DConditionModel(**{**SD15, **changes}))


def sd_inputs(seed: int) -> Inputs:
    """What StableDiffusionPipeline passes."""
    return {
        "sample": randn(seed, 2, 4, 16, 24),
        "timestep": step(seed),
        "encoder_hidden_states": text(seed),
        "timestep_cond": None,
        "cross_attention_kwargs": None,
        "added_cond_kwargs": None,
        "return_dict": False,
    }


def lcm_inputs(seed: int) -> Inputs:
    """A latent consistency model gets the guidance scale as an embedding."""
    return {**sd_inputs(seed), "timestep_cond": randn(seed + 1, 2, 18)}


def gligen_inputs(seed: int) -> Inputs:
    """GLIGEN: three boxes with phrases, the last one empty."""
    boxes = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(seed + 1))
    gligen = {
        "boxes": boxes,
        "positive_embeddings": randn(seed + 2, 2, 3, TEXT),
        "masks": torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
    }
    return {**sd_inputs(seed), "cross_attention_kwargs": {"gligen": gligen}}


# -- SDXL -----------------------------------------------------------------------------------------

SDXL: dict[str, Any] = {
    "sample_size": 32,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "block_out_channels": (20, 40, 60),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 3),
    "use_linear_projection": True,
    "norm_num_groups": 5,
    "cross_attention_dim": TEXT,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": POOLED + 6 * 6,
}
SDXL_UP = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
SDXL_GRIDS = (LARGE, SMALL, SMALL, SMALL, SMALL, LARGE, LARGE)
"""One layer per block: a transformer in each of two down blocks and the middle, two in each up."""
SDXL_WHY = (
    "7 transformers, of 1 layer at the large and 2 at the small level: 3 x 1 + 4 x 2 = 11 blocks, "
    "each 1 self- and 1 cross-attention and 1 MLP"
)


def make_sdxl(**changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(**{**SDXL, "up_block_types": SDXL_UP, **changes})


def conditions(seed: int, ids: int = 6) -> dict[str, Any]:
    """Pooled text and sizes, as SDXL pipelines pass them."""
    time_ids = torch.rand(2, ids, generator=torch.Generator().manual_seed(seed + 5))
    return {"text_embeds": randn(seed + 4, 2, POOLED), "time_ids": 32 * time_ids}


def sdxl_inputs(seed: int) -> Inputs:
    """What StableDiffusionXLPipeline passes."""
    return {
        "sample": randn(seed, 2, 4, 24, 32),
        "timestep": step(seed).float(),
        "encoder_hidden_states": text(seed),
        "timestep_cond": None,
        "cross_attention_kwargs": None,
        "added_cond_kwargs": conditions(seed),
        "return_dict": False,
    }


def make_refiner() -> UNet2DConditionModel:
    """Attention only in the two inner of four levels, four layers deep in the real one."""
    levels: dict[str, Any] = {
        "down_block_types": (
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (10, 20, 40, 40),
        "attention_head_dim": (1, 2, 4, 4),
        "transformer_layers_per_block": 2,
        "projection_class_embeddings_input_dim": POOLED + 5 * 6,
    }
    return make_sdxl(**levels)


def refiner_inputs(seed: int) -> Inputs:
    """The refiner gets five numbers: sizes, crop and an aesthetic score."""
    return {
        **sdxl_inputs(seed),
        "sample": randn(seed, 2, 4, 32, 48),
        "added_cond_kwargs": conditions(seed, 5),
    }


def controlled_inputs(seed: int) -> Inputs:
    """With the outputs of a ControlNet: one for each skip connection, and the middle."""
    shapes = ((20, 24, 32), (20, 24, 32), (20, *LARGE), (40, *LARGE), (40, *SMALL), (60, *SMALL))
    down = tuple(0.5 * randn(seed + 10 + i, 2, *shape) for i, shape in enumerate(shapes))
    return {
        **sdxl_inputs(seed),
        "down_block_additional_residuals": down,
        "mid_block_additional_residual": 0.5 * randn(seed + 20, 2, 60, *SMALL),
    }


def adapted_inputs(seed: int) -> Inputs:
    """With the four feature maps of a full SDXL T2I adapter."""
    shapes = ((20, *LARGE), (40, *LARGE), (60, *SMALL), (60, *SMALL))
    maps = [0.5 * randn(seed + 10 + i, 2, *shape) for i, shape in enumerate(shapes)]
    return {**sdxl_inputs(seed), "down_intrablock_additional_residuals": maps}


def make_ip_adapted(*, plus: bool = False) -> UNet2DConditionModel:
    """SDXL with an IP-Adapter, loaded the way that pipelines load it."""
    unet = make_sdxl()
    layers = {}
    paths = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for i, path in enumerate(paths):
        hidden = unet.get_submodule(path.removesuffix(".processor")).to_k.out_features
        for j, part in enumerate(("to_k_ip", "to_v_ip")):
            weight = randn(40 + 2 * i + j, hidden, TEXT) / TEXT**0.5
            layers[f"{2 * i + 1}.{part}.weight"] = weight
    projection = resampler() if plus else linear_projection()
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    return unet


IMAGE = 22
"""Width of the embeddings of an image encoder."""


def linear_projection() -> dict[str, Tensor]:
    """IP-Adapter: one image embedding becomes four tokens."""
    return {
        "proj.weight": 0.3 * randn(30, 4 * TEXT, IMAGE),
        "proj.bias": 0.1 * randn(31, 4 * TEXT),
        "norm.weight": 1 + 0.1 * randn(32, TEXT),
        "norm.bias": 0.1 * randn(33, TEXT),
    }


def resampler() -> dict[str, Tensor]:
    """IP-Adapter Plus: four learned queries look at the tokens of an image encoder."""
    width, inner = 64, 64  # heads are 64 wide
    sizes: dict[str, tuple[int, ...]] = {
        "latents": (1, 4, width),
        "proj_in.weight": (width, IMAGE),
        "proj_in.bias": (width,),
        "proj_out.weight": (TEXT, width),
        "proj_out.bias": (TEXT,),
        "norm_out.weight": (TEXT,),
        "norm_out.bias": (TEXT,),
    }
    for i in range(4):  # diffusers builds four layers
        for norm in ("0.norm1", "0.norm2", "1.0"):
            sizes[f"layers.{i}.{norm}.weight"] = (width,)
            sizes[f"layers.{i}.{norm}.bias"] = (width,)
        sizes[f"layers.{i}.0.to_q.weight"] = (inner, width)
        sizes[f"layers.{i}.0.to_kv.weight"] = (2 * inner, width)
        sizes[f"layers.{i}.0.to_out.weight"] = (width, inner)
        sizes[f"layers.{i}.1.1.weight"] = (4 * width, width)
        sizes[f"layers.{i}.1.3.weight"] = (width, 4 * width)
    return {name: 0.2 * randn(60 + i, *size) for i, (name, size) in enumerate(sizes.items())}


def ip_inputs(seed: int, *, plus: bool = False) -> Inputs:
    """One adapter, one picture: its embedding, or (plus) the tokens of the image encoder."""
    shape = (2, 1, 11, IMAGE) if plus else (2, 1, IMAGE)
    added = {**conditions(seed), "image_embeds": [randn(seed + 6, *shape)]}
    return {**sdxl_inputs(seed), "added_cond_kwargs": added}


def masked_inputs(seed: int) -> Inputs:
    """One adapter, two pictures, each with the part of the output that it acts on."""
    masks = torch.zeros(1, 2, 8 * 24, 8 * 32)
    masks[:, 0, :, :100] = 1
    masks[:, 1, 70:] = 1
    inputs = ip_inputs(seed)
    inputs["added_cond_kwargs"]["image_embeds"] = [randn(seed + 6, 2, 2, IMAGE)]
    return {**inputs, "cross_attention_kwargs": {"ip_adapter_masks": [masks]}}


def make_freeu() -> UNet2DConditionModel:
    unet = make_sdxl()
    unet.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)
    return unet


# -- ControlNets and adapters ---------------------------------------------------------------------


def make_controlnet() -> ControlNetModel:
    config = {**SDXL, "layers_per_block": 2}
    del config["sample_size"]
    return ControlNetModel(**config, conditioning_embedding_out_channels=(4, 8, 12, 16))


def controlnet_inputs(seed: int) -> Inputs:
    """What StableDiffusionXLControlNetPipeline passes to the ControlNet."""
    return {
        "sample": randn(seed, 2, 4, 24, 32),
        "timestep": step(seed).float(),
        "encoder_hidden_states": text(seed),
        "controlnet_cond": randn(seed + 7, 2, 3, 8 * 24, 8 * 32),
        "conditioning_scale": 0.8,
        "guess_mode": False,
        "added_cond_kwargs": conditions(seed),
        "return_dict": False,
    }


def make_union() -> ControlNetUnionModel:
    config = {key: value for key, value in SDXL.items() if key != "sample_size"}
    return ControlNetUnionModel(
        **config,
        conditioning_embedding_out_channels=(4, 8, 12, 16),
        num_trans_channel=20,
        num_trans_head=2,
        num_proj_channel=20,
    )


def union_inputs(seed: int) -> Inputs:
    """Two control images, of types 1 and 3."""
    images = [randn(seed + 7 + i, 2, 3, 8 * 24, 8 * 32) for i in range(2)]
    inputs = controlnet_inputs(seed)
    inputs["controlnet_cond"] = images
    inputs["control_type"] = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 0.0]] * 2)
    inputs["control_type_idx"] = [1, 3]
    return inputs


def make_xs() -> UNetControlNetXSModel:
    """SDXL with a small ControlNet-XS that runs beside it and exchanges features at every layer."""
    adapter = ControlNetXSAdapter(
        conditioning_embedding_out_channels=(4, 8, 12, 16),
        num_attention_heads=(1, 2, 3),
        block_out_channels=(8, 16, 24),
        base_block_out_channels=SDXL["block_out_channels"],
        cross_attention_dim=TEXT,
        down_block_types=SDXL["down_block_types"],
        transformer_layers_per_block=SDXL["transformer_layers_per_block"],
        max_norm_num_groups=4,
    )
    unet = make_sdxl(layers_per_block=2)
    return UNetControlNetXSModel.from_unet(unet, adapter)


def xs_inputs(seed: int) -> Inputs:
    """What StableDiffusionXLControlNetXSPipeline passes."""
    return {
        "sample": randn(seed, 2, 4, 24, 32),
        "timestep": step(seed).float(),
        "encoder_hidden_states": text(seed),
        "controlnet_cond": randn(seed + 7, 2, 3, 8 * 24, 8 * 32),
        "conditioning_scale": 0.8,
        "cross_attention_kwargs": None,
        "added_cond_kwargs": conditions(seed),
        "return_dict": False,
        "apply_control": True,
    }


def make_t2i_adapter() -> T2IAdapter:
    return T2IAdapter(
        in_channels=3,
        channels=[20, 40, 60, 60],
        num_res_blocks=2,
        downscale_factor=4,
        adapter_type="full_adapter_xl",
    )


# -- pixel-space and image-embedding UNets with added keys and values -----------------------------

SIMPLE: dict[str, Any] = {
    "sample_size": 32,
    "down_block_types": (
        "ResnetDownsampleBlock2D",
        "SimpleCrossAttnDownBlock2D",
        "SimpleCrossAttnDownBlock2D",
    ),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (
        "SimpleCrossAttnUpBlock2D",
        "SimpleCrossAttnUpBlock2D",
        "ResnetUpsampleBlock2D",
    ),
    "block_out_channels": (20, 40, 60),
    "layers_per_block": 1,
    "attention_head_dim": 10,
    "norm_num_groups": 5,
    "cross_attention_dim": TEXT,
    "resnet_time_scale_shift": "scale_shift",
}


def make_kandinsky22() -> UNet2DConditionModel:
    config: dict[str, Any] = {
        "out_channels": 8,
        "addition_embed_type": "image",
        "encoder_hid_dim": POOLED,
        "encoder_hid_dim_type": "image_proj",
    }
    return UNet2DConditionModel(**{**SIMPLE, **config})


def kandinsky22_inputs(seed: int) -> Inputs:
    """No text: the image embedding of the prior becomes the tokens to look at."""
    return {
        "sample": randn(seed, 2, 4, 24, 32),
        "timestep": step(seed),
        "encoder_hidden_states": None,
        "added_cond_kwargs": {"image_embeds": randn(seed + 1, 2, POOLED)},
        "return_dict": False,
    }


def make_deepfloyd() -> UNet2DConditionModel:
    config: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 6,
        "act_fn": "gelu",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "encoder_hid_dim": POOLED,
        "encoder_hid_dim_type": "text_proj",
        "cross_attention_norm": "group_norm",
        "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 1.41421356,
        "mid_block_scale_factor": 1.41421356,
    }
    return UNet2DConditionModel(**{**SIMPLE, "cross_attention_dim": 32, **config})


def deepfloyd_inputs(seed: int) -> Inputs:
    """What IFPipeline passes: pixels and T5 embeddings."""
    return {
        "sample": randn(seed, 2, 3, 24, 32),
        "timestep": step(seed),
        "encoder_hidden_states": text(seed, width=POOLED),
        "cross_attention_kwargs": None,
        "return_dict": False,
    }


# -- DreamLite ------------------------------------------------------------------------------------


def make_dreamlite() -> DreamLiteUNetModel:
    """DreamLite: no self-attention at the outer levels, one head of keys and values, QK norm."""
    return DreamLiteUNetModel(
        sample_size=24,
        block_out_channels=(20, 40, 60),
        layers_per_block=1,
        attention_head_dim=(2, 4, 6),
        norm_num_groups=5,
        cross_attention_dim=TEXT,
        encoder_hid_dim=POOLED,
        encoder_hid_dim_type="text_proj_rms",
        addition_embed_type="time",
        addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=36,
    )


def dreamlite_inputs(seed: int) -> Inputs:
    """The picture to edit stands to the right of the latents; the second prompt is shorter."""
    return {
        "sample": randn(seed, 2, 4, 16, 24),
        "timestep": torch.full((2,), 500.0 + seed),
        "encoder_hidden_states": text(seed, width=POOLED),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
        "added_cond_kwargs": {"time_ids": conditions(seed)["time_ids"]},
        "return_dict": False,
    }


# -- video ----------------------------------------------------------------------------------------


def make_animatediff() -> UNetMotionModel:
    """AnimateDiff: SD 1.5 with a motion module after every transformer and every plain resnet."""
    return UNetMotionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        block_out_channels=(20, 40),
        layers_per_block=1,
        norm_num_groups=5,
        cross_attention_dim=TEXT,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=9,
    )


def animatediff_inputs(seed: int) -> Inputs:
    """The pipeline repeats the text for every frame."""
    return {
        "sample": randn(seed, 2, 4, FRAMES, *LARGE),
        "timestep": step(seed),
        "encoder_hidden_states": text(seed, 5).repeat_interleave(FRAMES, dim=0),
        "cross_attention_kwargs": None,
        "added_cond_kwargs": None,
        "return_dict": False,
    }


def make_svd() -> UNetSpatioTemporalConditionModel:
    """Stable Video Diffusion; it normalizes in 32 groups."""
    return UNetSpatioTemporalConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=18,
        layers_per_block=1,
        cross_attention_dim=TEXT,
        num_attention_heads=(2, 4),
        num_frames=FRAMES,
    )


def svd_inputs(seed: int) -> Inputs:
    """Noise and the first frame in eight channels; the image embedding is one token."""
    ids = torch.rand(2, 3, generator=torch.Generator().manual_seed(seed + 2))
    return {
        "sample": randn(seed, 2, FRAMES, 8, 12, 20),
        "timestep": step(seed).float(),
        "encoder_hidden_states": text(seed, 1),
        "added_time_ids": 20 * ids,
        "return_dict": False,
    }


VIDEO: dict[str, Any] = {
    "sample_size": 16,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "block_out_channels": (20, 40),
    "layers_per_block": 1,
    "norm_num_groups": 5,
    "cross_attention_dim": TEXT,
    "attention_head_dim": 10,
}
VIDEO_GRIDS = (LARGE, SMALL, LARGE, LARGE)
"""A transformer in the down block with attention, one in the middle, two in the up block."""


def modelscope_inputs(seed: int) -> Inputs:
    """What TextToVideoSDPipeline passes."""
    return {
        "sample": randn(seed, 2, 4, FRAMES, *LARGE),
        "timestep": step(seed),
        "encoder_hidden_states": text(seed, 5),
        "cross_attention_kwargs": None,
        "return_dict": False,
    }


def i2vgen_inputs(seed: int) -> Inputs:
    """What I2VGenXLPipeline passes: also the first frame, twice encoded, and the frame rate."""
    return {
        **modelscope_inputs(seed),
        "fps": torch.tensor([16, 16]),
        "image_latents": randn(seed + 1, 2, 4, FRAMES, *LARGE),
        "image_embeddings": randn(seed + 2, 2, TEXT),
    }


# -- other UNets ----------------------------------------------------------------------------------


def make_ddpm() -> UNet2DModel:
    """The unconditional UNet of DDPM: attention without a feed-forward, on the picture itself."""
    return UNet2DModel(
        sample_size=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(20, 40),
        layers_per_block=2,
        attention_head_dim=10,
        norm_num_groups=5,
    )


def ddpm_inputs(seed: int) -> Inputs:
    """What DDPMPipeline passes."""
    return {"sample": randn(seed, 2, 3, 24, 32), "timestep": step(seed), "return_dict": False}


def make_amused() -> UVit2DModel:
    """aMUSEd at 512 pixels: tokens of a codebook in, their probabilities out."""
    return UVit2DModel(
        hidden_size=36,
        cond_embed_dim=POOLED,
        micro_cond_encode_dim=6,
        micro_cond_embed_dim=30,
        encoder_hidden_size=TEXT,
        vocab_size=50,
        codebook_size=44,
        in_channels=18,
        block_out_channels=20,
        num_res_blocks=2,
        downsample=True,
        upsample=True,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        sample_size=32,
    )


def amused_inputs(seed: int) -> Inputs:
    """What AmusedPipeline passes."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([[256.0, 192.0, 0.0, 0.0, 6.0], [256.0, 192.0, 8.0, 0.0, 5.0]])
    return {
        "input_ids": torch.randint(0, 50, (2, 24, 32), generator=g),
        "encoder_hidden_states": text(seed),
        "pooled_text_emb": randn(seed + 1, 2, POOLED),
        "micro_conds": sizes,
        "cross_attention_kwargs": None,
    }


def make_kandinsky3() -> Kandinsky3UNet:
    """Kandinsky 3: the first of four levels has no attention."""
    return Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=70,
        groups=5,
        attention_head_dim=10,
        layers_per_block=2,
        block_out_channels=(20, 40, 60, 80),
        cross_attention_dim=TEXT,
        encoder_hid_dim=POOLED,
    )


def kandinsky3_inputs(seed: int) -> Inputs:
    """What Kandinsky3Pipeline passes: the second prompt is shorter."""
    return {
        "sample": randn(seed, 2, 4, 32, 48),
        "timestep": step(seed),
        "encoder_hidden_states": text(seed, width=POOLED),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
        "return_dict": False,
    }


def make_cascade_prior() -> StableCascadeUNet:
    """Stage C of Stable Cascade: two levels of the same resolution."""
    return StableCascadeUNet(
        in_channels=16,
        out_channels=16,
        timestep_ratio_embedding_dim=14,
        patch_size=1,
        conditioning_dim=34,
        block_out_channels=(20, 20),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 2),
        up_num_layers_per_block=(2, 1),
        clip_text_in_channels=TEXT,
        clip_text_pooled_in_channels=POOLED,
        clip_image_in_channels=IMAGE,
        switch_level=(False,),
    )


def cascade_prior_inputs(seed: int) -> Inputs:
    """What StableCascadePriorPipeline passes."""
    return {
        "sample": randn(seed, 2, 16, *LARGE),
        "timestep_ratio": torch.full((2,), 0.5 + 0.01 * seed),
        "clip_text_pooled": randn(seed + 1, 2, 1, POOLED),
        "clip_text": text(seed),
        "clip_img": randn(seed + 2, 2, 1, IMAGE),
        "return_dict": False,
    }


def make_cascade_decoder() -> StableCascadeUNet:
    """Stage B: attention only at the inner level, whose blocks run twice with the same weights."""
    return StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=14,
        patch_size=2,
        conditioning_dim=34,
        block_out_channels=(10, 20),
        num_attention_heads=(-1, 2),
        down_num_layers_per_block=(1, 2),
        up_num_layers_per_block=(2, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(2, 1),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        clip_text_pooled_in_channels=POOLED,
        effnet_in_channels=16,
        pixel_mapper_in_channels=3,
        timestep_conditioning_type=("sca",),
    )


def cascade_decoder_inputs(seed: int) -> Inputs:
    """What StableCascadeDecoderPipeline passes: `effnet` is the picture of Stage C."""
    return {
        "sample": randn(seed, 2, 4, 48, 64),
        "timestep_ratio": torch.full((2,), 0.5 + 0.01 * seed),
        "clip_text_pooled": randn(seed + 1, 2, 1, POOLED),
        "effnet": randn(seed + 2, 2, 16, 9, 12),
        "return_dict": False,
    }


def make_prior() -> PriorTransformer:
    """The prior of Kandinsky 2: text tokens and a few embeddings, no picture."""
    return PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        embedding_dim=24,
        num_embeddings=7,
        additional_embeddings=4,
    )


def prior_inputs(seed: int) -> Inputs:
    """What KandinskyV22PriorPipeline passes."""
    return {
        "hidden_states": randn(seed, 2, 24),
        "timestep": step(seed),
        "proj_embedding": randn(seed + 1, 2, 24),
        "encoder_hidden_states": text(seed, width=24),
        "attention_mask": torch.tensor([[True] * 7, [True] * 5 + [False] * 2]),
        "return_dict": False,
    }


# -- the matrix -----------------------------------------------------------------------------------

CASES: tuple[Case, ...] = (
    Case(
        name="sd15",
        title="Stable Diffusion 1.5 (UNet2DConditionModel)",
        build=sd15(),
        inputs=sd_inputs,
        grids=SD_GRIDS,
        sites={"self": 7, "cross": 7},
        attention=14,
        mlp=7,
        why="7 transformers of 1 block, each 1 self- and 1 cross-attention and 1 MLP",
    ),
    Case(
        name="sd15_lcm",
        title="Latent consistency model of Stable Diffusion 1.5",
        build=sd15(time_cond_proj_dim=18),
        inputs=lcm_inputs,
        grids=SD_GRIDS,
        sites={"self": 7, "cross": 7},
        attention=14,
        mlp=7,
        why="as Stable Diffusion 1.5; the guidance scale goes into the time embedding",
    ),
    Case(
        name="sd15_gligen",
        title="GLIGEN (Stable Diffusion 1.4 with gated attention to boxes)",
        build=sd15(attention_type="gated"),
        inputs=gligen_inputs,
        grids=SD_GRIDS,
        sites={"self": 7, "cross": 7, "joint": 7},
        attention=21,
        mlp=14,
        why=(
            "7 blocks, each 1 self- and 1 cross-attention and 1 MLP, and between them a fuser: "
            "attention over image and box tokens, of which the image is kept, and a gated MLP"
        ),
    ),
    Case(
        name="sd21",
        title="Stable Diffusion 2.1 (UNet2DConditionModel)",
        build=sd15(attention_head_dim=(2, 4, 6), use_linear_projection=True, upcast_attention=True),
        inputs=sd_inputs,
        grids=SD_GRIDS,
        sites={"self": 7, "cross": 7},
        attention=14,
        mlp=7,
        why="7 transformers of 1 block, each 1 self- and 1 cross-attention and 1 MLP",
    ),
    Case(
        name="sdxl",
        title="SDXL base (UNet2DConditionModel)",
        build=seeded(lambda: make_sdxl(layers_per_block=2)),
        inputs=sdxl_inputs,
        grids=(LARGE,) * 2 + (SMALL,) * 6 + (LARGE,) * 3,
        sites={"self": 17, "cross": 17},
        attention=34,
        mlp=17,
        why=(
            "11 transformers: down 2 of 1 layer and 2 of 2, middle 1 of 2, up 3 of 2 and 3 of 1: "
            "17 blocks, each 1 self- and 1 cross-attention and 1 MLP"
        ),
    ),
    Case(
        name="sdxl_refiner",
        title="SDXL refiner (UNet2DConditionModel)",
        build=seeded(make_refiner),
        inputs=refiner_inputs,
        grids=SD_GRIDS,
        sites={"self": 14, "cross": 14},
        attention=28,
        mlp=14,
        why="7 transformers of 2 blocks, each 1 self- and 1 cross-attention and 1 MLP",
    ),
    Case(
        name="sdxl_controlnet",
        title="SDXL with the residuals of a ControlNet",
        build=seeded(make_sdxl),
        inputs=controlled_inputs,
        grids=SDXL_GRIDS,
        sites={"self": 11, "cross": 11},
        attention=22,
        mlp=11,
        why=f"{SDXL_WHY}; the residuals are added to skip connections and after the middle",
    ),
    Case(
        name="sdxl_t2i_adapter",
        title="SDXL with the feature maps of a T2I adapter",
        build=seeded(make_sdxl),
        inputs=adapted_inputs,
        grids=SDXL_GRIDS,
        sites={"self": 11, "cross": 11},
        attention=22,
        mlp=11,
        why=f"{SDXL_WHY}; the maps are added behind whole transformers, on the grid",
    ),
    Case(
        name="sdxl_ip_adapter",
        title="SDXL with an IP-Adapter",
        build=seeded(make_ip_adapted),
        inputs=ip_inputs,
        grids=SDXL_GRIDS,
        sites={"self": 11, "cross": 22},
        attention=22,
        mlp=11,
        why=f"{SDXL_WHY}; each cross-attention branch holds two attentions with the same queries",
    ),
    Case(
        name="sdxl_ip_adapter_plus",
        title="SDXL with an IP-Adapter Plus",
        build=seeded(lambda: make_ip_adapted(plus=True)),
        inputs=lambda seed: ip_inputs(seed, plus=True),
        grids=SDXL_GRIDS,
        sites={"self": 11, "cross": 22, "text": 4},
        attention=22,
        mlp=11,
        why=(
            f"{SDXL_WHY}; each cross-attention branch holds two attentions with the same queries; "
            "4 layers of the resampler have learned queries"
        ),
    ),
    Case(
        name="sdxl_ip_adapter_masks",
        title="SDXL with an IP-Adapter, two pictures and masks",
        build=seeded(make_ip_adapted),
        inputs=masked_inputs,
        grids=SDXL_GRIDS,
        sites={"self": 11, "cross": 33},
        attention=22,
        mlp=11,
        why=(
            f"{SDXL_WHY}; each cross-attention branch holds three attentions with the same "
            "queries, two of them times a mask over the image tokens"
        ),
    ),
    Case(
        name="sdxl_freeu",
        title="SDXL with FreeU",
        build=seeded(make_freeu),
        inputs=sdxl_inputs,
        grids=SDXL_GRIDS,
        sites={"self": 11, "cross": 11},
        attention=22,
        mlp=11,
        why=f"{SDXL_WHY}; FreeU filters skip connections on the grid by a Fourier transform",
    ),
    Case(
        name="controlnet",
        title="ControlNet for SDXL (ControlNetModel)",
        build=seeded(make_controlnet),
        inputs=controlnet_inputs,
        grids=(LARGE,) * 2 + (SMALL,) * 3,
        sites={"self": 8, "cross": 8},
        attention=16,
        mlp=8,
        why=(
            "5 transformers: down 2 of 1 layer and 2 of 2, middle 1 of 2: 8 blocks, each 1 self- "
            "and 1 cross-attention and 1 MLP"
        ),
    ),
    Case(
        name="controlnet_union",
        title="ControlNet Union for SDXL (ControlNetUnionModel)",
        build=seeded(make_union),
        inputs=union_inputs,
        grids=(LARGE, SMALL, SMALL),
        sites={"self": 5, "cross": 5, "text": 1},
        attention=10,
        mlp=5,
        why=(
            "3 transformers of 1, 2 and 2 blocks, each 1 self- and 1 cross-attention and 1 MLP; "
            "1 layer of attention between the means of the control images is left alone"
        ),
    ),
    Case(
        name="controlnet_xs",
        title="SDXL with ControlNet-XS (UNetControlNetXSModel)",
        build=seeded(make_xs),
        inputs=xs_inputs,
        grids=(LARGE,) * 4 + (SMALL,) * 9 + (LARGE,) * 3,
        sites={"self": 25, "cross": 25},
        attention=50,
        mlp=25,
        why=(
            "the 17 blocks of SDXL, and 8 of the control model beside its down (2 x 1 + 2 x 2) and "
            "middle (1 x 2) blocks, each 1 self- and 1 cross-attention and 1 MLP"
        ),
    ),
    Case(
        name="t2i_adapter",
        title="T2I adapter for SDXL (T2IAdapter)",
        build=seeded(make_t2i_adapter),
        inputs=lambda seed: {"x": randn(seed, 2, 3, 96, 128)},
        why="convolutions only",
        refused=("NoMergeSites", "no attention at all"),
    ),
    Case(
        name="kandinsky22",
        title="Kandinsky 2.2 decoder (UNet2DConditionModel)",
        build=seeded(make_kandinsky22),
        inputs=kandinsky22_inputs,
        grids=SDXL_GRIDS,
        sites={"joint": 7},
        attention=7,
        why=(
            "7 attentions: 1 in each down block but the first, 1 in the middle, 2 in each up block "
            "but the last; keys are the image and the tokens of an image embedding"
        ),
    ),
    Case(
        name="deepfloyd_if",
        title="DeepFloyd IF (UNet2DConditionModel)",
        build=seeded(make_deepfloyd),
        inputs=deepfloyd_inputs,
        grids=SDXL_GRIDS,
        sites={"joint": 7},
        attention=7,
        why=(
            "7 attentions: 1 in each down block but the first, 1 in the middle, 2 in each up block "
            "but the last; keys are the image and the text"
        ),
    ),
    Case(
        name="dreamlite",
        title="DreamLite (DreamLiteUNetModel)",
        build=seeded(make_dreamlite),
        inputs=dreamlite_inputs,
        grids=((16, 24), (8, 12), (4, 6), (4, 6), (4, 6), (4, 6), (8, 12), (8, 12)),
        sites={"self": 4, "cross": 8},
        attention=12,
        mlp=8,
        why=(
            "8 transformers of 1 block, each 1 cross-attention and 1 MLP; the 4 of the innermost "
            "level also 1 self-attention, the others a norm outside any residual"
        ),
    ),
    Case(
        name="animatediff",
        title="AnimateDiff (UNetMotionModel)",
        build=seeded(make_animatediff),
        inputs=animatediff_inputs,
        grids=VIDEO_GRIDS,
        sites={"self": 4, "cross": 4, "temporal": 14},
        attention=8,
        mlp=4,
        why=(
            "4 transformers of 1 block (self, cross, MLP) with the frames in the batch; 7 motion "
            "modules of 2 attentions over frames have the positions in the batch: not counted"
        ),
    ),
    Case(
        name="svd",
        title="Stable Video Diffusion (UNetSpatioTemporalConditionModel)",
        build=seeded(make_svd),
        inputs=svd_inputs,
        grids=((12, 20), (6, 10), (12, 20), (12, 20)),
        sites={"self": 4, "cross": 4, "temporal": 8},
        attention=8,
        mlp=4,
        why=(
            "4 transformers of 1 spatial block (self, cross, MLP) with the frames in the batch; "
            "their 4 temporal blocks (2 attentions, 2 MLPs) have the positions in the batch"
        ),
    ),
    Case(
        name="modelscope",
        title="ModelScope text-to-video (UNet3DConditionModel)",
        build=seeded(lambda: UNet3DConditionModel(**VIDEO)),
        inputs=modelscope_inputs,
        grids=VIDEO_GRIDS,
        sites={"self": 4, "cross": 4, "temporal": 10},
        attention=8,
        mlp=4,
        why=(
            "4 transformers of 1 block (self, cross, MLP) with the frames in the batch; 5 temporal "
            "ones of 2 attentions (one at the start, one behind each) have the positions there"
        ),
    ),
    Case(
        name="i2vgen_xl",
        title="I2VGen-XL (I2VGenXLUNet)",
        build=seeded(lambda: I2VGenXLUNet(**VIDEO)),
        inputs=i2vgen_inputs,
        grids=VIDEO_GRIDS,
        sites={"self": 4, "cross": 4, "temporal": 11},
        attention=8,
        mlp=4,
        why=(
            "4 transformers of 1 block (self, cross, MLP) with the frames in the batch; 5 temporal "
            "ones of 2 attentions and 1 in the encoder of the first frame have the positions there"
        ),
    ),
    Case(
        name="ddpm",
        title="DDPM (UNet2DModel)",
        build=seeded(make_ddpm),
        inputs=ddpm_inputs,
        grids=(LARGE,) * 6,
        sites={"self": 6},
        attention=6,
        why="self-attention 2 x in the second down block, 1 x in the middle, 3 x in the first up",
    ),
    Case(
        name="amused",
        title="aMUSEd 512 (UVit2DModel)",
        build=seeded(make_amused),
        inputs=amused_inputs,
        grids=(LARGE,) * 5,
        sites={"self": 2, "cross": 10},
        attention=12,
        mlp=2,
        why=(
            "2 blocks before and 2 after, each 2 cross-attentions and no MLP; 2 layers between "
            "them, each 1 self- and 1 cross-attention and 1 MLP"
        ),
    ),
    Case(
        name="kandinsky3",
        title="Kandinsky 3 (Kandinsky3UNet)",
        build=seeded(make_kandinsky3),
        inputs=kandinsky3_inputs,
        grids=((16, 24),) * 3 + ((8, 12),) * 3 + ((4, 6),) * 6 + ((8, 12),) * 3 + ((16, 24),) * 3,
        sites={"self": 6, "cross": 12, "text": 1},
        attention=18,
        why=(
            "3 levels, down and up, of 1 self- and 2 cross-attentions each; their feed-forwards "
            "are 1x1 convolutions on the grid: not counted; a pooler looks at the text"
        ),
    ),
    Case(
        name="stable_cascade_prior",
        title="Stable Cascade, Stage C (StableCascadeUNet)",
        build=seeded(make_cascade_prior),
        inputs=cascade_prior_inputs,
        grids=(LARGE,) * 6,
        sites={"joint": 6},
        attention=6,
        why=(
            "down 1 + 2 and up 2 + 1 attentions, queries from the image, keys from image and CLIP "
            "embeddings; the residual blocks convolve and normalize over all positions"
        ),
    ),
    Case(
        name="stable_cascade_decoder",
        title="Stable Cascade, Stage B (StableCascadeUNet)",
        build=seeded(make_cascade_decoder),
        inputs=cascade_decoder_inputs,
        grids=(LARGE,) * 6,
        sites={"joint": 6},
        attention=6,
        why="attention at the inner level alone: 2 in the down block, 2 in the up block, run twice",
    ),
    Case(
        name="prior",
        title="Prior of Kandinsky 2 (PriorTransformer)",
        build=seeded(make_prior),
        inputs=prior_inputs,
        sites={"text": 2},
        why="2 blocks of attention over text tokens and embeddings; there is no picture",
        refused=("NoMergeSites", "no image tokens"),
    ),
)

"""Image transformers that take a latent picture and cut it into patches themselves.

Sizes are told apart by value: 3 heads of 16 (width 48), 60 image tokens of 6x10 from a latent of
12x20, 5 latent channels, 7 text tokens of width 28.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    DiTTransformer2DModel,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DControlNetModel,
    HunyuanDiT2DModel,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    OmniGenTransformer2DModel,
    PixArtTransformer2DModel,
    SanaControlNetModel,
    SanaTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableAudioDiTModel,
    Transformer2DModel,
)
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import (
    IPAdapterTimeImageProjection,
    PatchEmbed,
    get_1d_rotary_pos_embed,
    get_2d_rotary_pos_embed,
    get_2d_rotary_pos_embed_lumina,
)
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from torch import Tensor, nn

from tests.zoo.base import Case, Crop, Inputs, randn, seeded

H, W = 6, 10
PATCH = 2
CHANNELS, TEXT, TEXT_WIDTH, POOLED = 5, 7, 28, 36
HEADS, HEAD, WIDTH = 3, 16, 48
CORNER = (4, 6)
"""Token grid of the corner that `Crop` keeps."""


def latents(seed: int, channels: int = CHANNELS, patch: int = PATCH) -> Tensor:
    """Latent pictures of two elements, H x W patches."""
    return randn(seed, 2, channels, H * patch, W * patch)


def text(seed: int, length: int = TEXT, width: int = TEXT_WIDTH) -> Tensor:
    """Text embeddings of two prompts."""
    return randn(seed + 200, 2, length, width)


def text_mask(length: int = TEXT) -> Tensor:
    """A tokenizer's mask (int64); the second prompt is shorter."""
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, length // 2 + 1 :] = 0
    return mask


def step(seed: int) -> Tensor:
    """One whole scheduler step in [0, 1000) for both elements of the batch."""
    return torch.full((2,), (37 * seed + 100) % 1000)


def times(seed: int) -> Tensor:
    """One flow-matching timestep in (0, 1000), a float, for both elements of the batch."""
    return torch.full((2,), 100.0 + 150.5 * (seed % 5))


def corner_of_latents(x: Tensor) -> Tensor:
    """The pixels under the top left `CORNER` of the patches."""
    return x[..., : CORNER[0] * PATCH, : CORNER[1] * PATCH]


def corner_of_tokens(x: Tensor, dim: int) -> Tensor:
    """The top left `CORNER` of H x W tokens along `dim`."""
    rows = x.unflatten(dim, (H, W)).narrow(dim, 0, CORNER[0]).narrow(dim + 1, 0, CORNER[1])
    return rows.flatten(dim, dim + 1)


def crop_latents(inputs: Inputs) -> Inputs:
    """For models whose positions start at 0 in the top left corner."""
    return {**inputs, "hidden_states": corner_of_latents(inputs["hidden_states"])}


CROP = Crop(CORNER, crop_latents, corner_of_latents)


# -- Stable Diffusion 3 ---------------------------------------------------------------------------

SD3: dict[str, Any] = {
    "sample_size": 24,
    "patch_size": PATCH,
    "in_channels": CHANNELS,
    "num_layers": 3,
    "attention_head_dim": HEAD,
    "num_attention_heads": HEADS,
    "joint_attention_dim": TEXT_WIDTH,
    "caption_projection_dim": WIDTH,
    "pooled_projection_dim": POOLED,
    "out_channels": CHANNELS,
    "pos_embed_max_size": 14,
}
SD3_WHY = (
    "3 joint blocks: joint attention and image MLP, one add each; the last updates the image alone."
)


def sd3(**changes: Any) -> nn.Module:
    return SD3Transformer2DModel(**{**SD3, **changes})


def sd3_medium35() -> nn.Module:
    """SD3.5-medium: the first blocks have a second attention over the image alone."""
    return sd3(num_layers=4, dual_attention_layers=(0, 1), qk_norm="rms_norm")


def sd3_inputs(seed: int) -> Inputs:
    """What StableDiffusion3Pipeline passes."""
    return {
        "hidden_states": latents(seed),
        "timestep": times(seed),
        "encoder_hidden_states": text(seed),
        "pooled_projections": randn(seed + 100, 2, POOLED),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def sd3_controlled_inputs(seed: int) -> Inputs:
    """StableDiffusion3ControlNetPipeline: one residual for two blocks, one for the third."""
    residuals = [randn(seed + 300 + i, 2, H * W, WIDTH) for i in range(2)]
    return {**sd3_inputs(seed), "block_controlnet_hidden_states": residuals}


def sd3_controlnet_inputs(seed: int, *, extra: int = 0, with_text: bool = True) -> Inputs:
    """The same pipeline calls its ControlNet; `extra` channels hold an inpainting mask."""
    inputs = sd3_inputs(seed)
    if not with_text:
        inputs["encoder_hidden_states"] = None
    control = latents(seed + 300, CHANNELS + extra)
    return {**inputs, "controlnet_cond": control, "conditioning_scale": 0.7}


def sd3_controlnet() -> nn.Module:
    return SD3ControlNetModel(**{**SD3, "num_layers": 2}, extra_conditioning_channels=1)


def sd3_controlnet_large() -> nn.Module:
    """SD3.5-large ControlNet: no text; the pipeline lends it the transformer's positions."""
    model = SD3ControlNetModel(
        **{**SD3, "num_layers": 2, "joint_attention_dim": None},
        pos_embed_type=None,
        use_pos_embed=False,
        force_zeros_for_pooled_projection=False,
    )
    model.pos_embed = PatchEmbed(
        height=24,
        width=24,
        patch_size=PATCH,
        in_channels=CHANNELS,
        embed_dim=WIDTH,
        pos_embed_max_size=14,
    )
    return model


IP_TOKENS, IP_WIDTH, RESAMPLED = 13, 26, 9


def sd35_large_with_ip_adapter() -> nn.Module:
    """Processors and image projection as `load_ip_adapter` sets them."""
    model = sd3(qk_norm="rms_norm")
    model.image_proj = IPAdapterTimeImageProjection(
        embed_dim=IP_WIDTH,
        output_dim=WIDTH,
        hidden_dim=24,
        depth=2,
        dim_head=8,
        heads=3,
        num_queries=RESAMPLED,
        timestep_in_dim=32,
    )
    processors = {
        name: SD3IPAdapterJointAttnProcessor2_0(
            hidden_size=WIDTH, ip_hidden_states_dim=WIDTH, head_dim=HEAD, timesteps_emb_dim=24
        )
        for name in model.attn_processors
    }
    model.set_attn_processor(processors)
    return model


def sd3_ip_adapter_inputs(seed: int) -> Inputs:
    embeds = randn(seed + 300, 2, IP_TOKENS, IP_WIDTH)
    return {**sd3_inputs(seed), "joint_attention_kwargs": {"ip_adapter_image_embeds": embeds}}


# -- AuraFlow -------------------------------------------------------------------------------------


def aura_flow() -> nn.Module:
    return AuraFlowTransformer2DModel(
        sample_size=24,
        patch_size=PATCH,
        in_channels=CHANNELS,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        out_channels=CHANNELS,
        pos_embed_max_size=14 * 14,
    )


def aura_flow_inputs(seed: int) -> Inputs:
    """What AuraFlowPipeline passes: time in (0, 1)."""
    return {
        "hidden_states": latents(seed),
        "encoder_hidden_states": text(seed),
        "timestep": times(seed) / 1000,
        "attention_kwargs": None,
        "return_dict": False,
    }


# -- PixArt, DiT ----------------------------------------------------------------------------------

PIXART: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD,
    "in_channels": CHANNELS,
    "out_channels": 2 * CHANNELS,
    "num_layers": 2,
    "cross_attention_dim": WIDTH,
    "sample_size": 128,
    "patch_size": PATCH,
    "caption_channels": TEXT_WIDTH,
}
BASIC_WHY = "2 blocks: self attention, cross attention and MLP, one add each."
BASIC_COUNTS: dict[str, Any] = {"sites": {"self": 2, "cross": 2}, "attention": 4, "mlp": 2}


def pixart_inputs(seed: int, *, resolution: bool) -> Inputs:
    """What PixArtAlphaPipeline passes; without `resolution`, PixArtSigmaPipeline."""
    sizes = torch.tensor([[192.0, 320.0]]).repeat(2, 1)
    conditions = (
        {"resolution": sizes, "aspect_ratio": torch.full((2, 1), 0.6)}
        if resolution
        else {"resolution": None, "aspect_ratio": None}
    )
    return {
        "hidden_states": latents(seed),
        "encoder_hidden_states": text(seed),
        "encoder_attention_mask": text_mask(),
        "timestep": step(seed),
        "added_cond_kwargs": conditions,
        "return_dict": False,
    }


SIDE = 8
"""DiT takes square pictures alone."""


def dit() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=2,
        sample_size=SIDE * PATCH,
        patch_size=PATCH,
        num_embeds_ada_norm=20,
    )


def dit_inputs(seed: int) -> Inputs:
    """What DiTPipeline passes: a class, and the null class of guidance."""
    return {
        "hidden_states": randn(seed, 2, CHANNELS, SIDE * PATCH, SIDE * PATCH),
        "timestep": step(seed),
        "class_labels": torch.tensor([seed % 20, 20]),
        "return_dict": False,
    }


# -- Hunyuan-DiT ----------------------------------------------------------------------------------

T5, T5_WIDTH = 11, 24
HUNYUAN: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD,
    "in_channels": CHANNELS,
    "patch_size": PATCH,
    "sample_size": 24,
    "hidden_size": WIDTH,
    "mlp_ratio": 4.3637,
    "cross_attention_dim": TEXT_WIDTH,
    "cross_attention_dim_t5": T5_WIDTH,
    "pooled_projection_dim": POOLED,
    "text_len": TEXT,
    "text_len_t5": T5,
}
HUNYUAN_WHY = (
    "Each block: self attention, cross attention and MLP, one add each. A pooler attends over text."
)


def hunyuan_dit(*, style: bool) -> nn.Module:
    """Six blocks: the last two take the outputs of the first two across."""
    return HunyuanDiT2DModel(**HUNYUAN, num_layers=6, use_style_cond_and_image_meta_size=style)


def hunyuan_inputs(seed: int) -> Inputs:
    """What HunyuanDiTPipeline passes: rotary tables come from outside."""
    tables = get_2d_rotary_pos_embed(HEAD, ((0, 0), (H, W)), (H, W), output_type="pt")
    return {
        "hidden_states": latents(seed),
        "timestep": step(seed).float(),
        "encoder_hidden_states": text(seed),
        "text_embedding_mask": text_mask(),
        "encoder_hidden_states_t5": text(seed + 50, T5, T5_WIDTH),
        "text_embedding_mask_t5": text_mask(T5),
        "image_meta_size": torch.tensor([[192.0, 320.0, 192.0, 320.0, 0.0, 0.0]]).repeat(2, 1),
        "style": torch.zeros(2, dtype=torch.int64),
        "image_rotary_emb": tables,
        "return_dict": False,
    }


def crop_hunyuan(inputs: Inputs) -> Inputs:
    """The corner of latents, rotary tables and ControlNet residuals."""
    out = crop_latents(inputs)
    out["image_rotary_emb"] = tuple(corner_of_tokens(x, 0) for x in inputs["image_rotary_emb"])
    if "controlnet_block_samples" in inputs:
        samples = inputs["controlnet_block_samples"]
        out["controlnet_block_samples"] = [corner_of_tokens(x, 1) for x in samples]
    return out


HUNYUAN_CROP = Crop(CORNER, crop_hunyuan, corner_of_latents)


def hunyuan_controlled_inputs(seed: int) -> Inputs:
    """HunyuanDiTControlNetPipeline: a residual for each of the two blocks with a skip."""
    residuals = [randn(seed + 300 + i, 2, H * W, WIDTH) for i in range(2)]
    return {**hunyuan_inputs(seed), "controlnet_block_samples": residuals}


def hunyuan_controlnet() -> nn.Module:
    """The ControlNet is the first half of the model."""
    return HunyuanDiT2DControlNetModel(
        **HUNYUAN, transformer_num_layers=6, use_style_cond_and_image_meta_size=False
    )


def hunyuan_controlnet_inputs(seed: int) -> Inputs:
    control = latents(seed + 300)
    return {**hunyuan_inputs(seed), "controlnet_cond": control, "conditioning_scale": 0.7}


# -- Lumina ---------------------------------------------------------------------------------------


def lumina_next() -> nn.Module:
    """Keys and values have half the heads of the queries."""
    model = LuminaNextDiT2DModel(
        sample_size=24,
        patch_size=PATCH,
        in_channels=CHANNELS,
        hidden_size=WIDTH,
        num_layers=2,
        num_attention_heads=6,
        num_kv_heads=3,
        multiple_of=16,
        cross_attention_dim=TEXT_WIDTH,
    )
    nn.init.zeros_(model.pad_token)  # left uninitialized, and unused
    return model


def lumina_next_inputs(seed: int) -> Inputs:
    """What LuminaPipeline passes: complex rotary tables larger than the picture."""
    return {
        "hidden_states": latents(seed),
        "timestep": times(seed) / 1000,
        "encoder_hidden_states": text(seed),
        "encoder_mask": text_mask(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(WIDTH // 6, 14, 14),
        "cross_attention_kwargs": {"base_sequence_length": H * W},
        "return_dict": False,
    }


def crop_lumina_next(inputs: Inputs) -> Inputs:
    """Scores are scaled by the number of tokens over that of the model's own resolution."""
    kwargs = {"base_sequence_length": CORNER[0] * CORNER[1]}
    return {**crop_latents(inputs), "cross_attention_kwargs": kwargs}


def lumina2() -> nn.Module:
    return Lumina2Transformer2DModel(
        sample_size=24,
        patch_size=PATCH,
        in_channels=CHANNELS,
        hidden_size=WIDTH,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=6,
        num_kv_heads=3,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(30, 14, 14),
        cap_feat_dim=TEXT_WIDTH,
    )


def lumina2_inputs(seed: int) -> Inputs:
    """What Lumina2Pipeline passes."""
    return {
        "hidden_states": latents(seed),
        "timestep": times(seed) / 1000,
        "encoder_hidden_states": text(seed),
        "encoder_attention_mask": text_mask(),
        "attention_kwargs": None,
        "return_dict": False,
    }


# -- CogView --------------------------------------------------------------------------------------

COGVIEW: dict[str, Any] = {
    "patch_size": PATCH,
    "in_channels": CHANNELS,
    "num_layers": 2,
    "attention_head_dim": HEAD,
    "num_attention_heads": HEADS,
    "out_channels": CHANNELS,
    "text_embed_dim": TEXT_WIDTH,
    "time_embed_dim": 44,
    "condition_dim": 18,
    "pos_embed_max_size": 14,
    "sample_size": 14,
}


def cogview_inputs(seed: int) -> Inputs:
    """What CogView3PlusPipeline passes."""
    size = torch.tensor([[192.0, 320.0]]).repeat(2, 1)
    return {
        "hidden_states": latents(seed),
        "encoder_hidden_states": text(seed),
        "timestep": step(seed),
        "original_size": size,
        "target_size": size.clone(),
        "crop_coords": torch.zeros(2, 2),
        "return_dict": False,
    }


def cogview4_inputs(seed: int) -> Inputs:
    """CogView4Pipeline."""
    return {**cogview_inputs(seed), "timestep": times(seed), "attention_kwargs": None}


# -- Sana -----------------------------------------------------------------------------------------

SANA: dict[str, Any] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD,
    "num_layers": 2,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": WIDTH,
    "caption_channels": TEXT_WIDTH,
    "mlp_ratio": 2.5,
    "attention_bias": False,
    "sample_size": 8,
    "patch_size": 1,
}
SANA_WHY = (
    "2 blocks, one add each for linear attention (a sum over tokens, no softmax), cross attention, "
    "and an MLP with a 3x3 convolution (stays)."
)
SANA_COUNTS: dict[str, Any] = {"sites": {"cross": 2, "linear": 2}, "attention": 4, "mlp": 0}


def sana(**changes: Any) -> nn.Module:
    return SanaTransformer2DModel(**{**SANA, **changes})


def sana_inputs(seed: int) -> Inputs:
    """What SanaPipeline passes."""
    return {
        "hidden_states": latents(seed, patch=1),
        "encoder_hidden_states": text(seed),
        "encoder_attention_mask": text_mask(),
        "timestep": times(seed),
        "attention_kwargs": None,
        "return_dict": False,
    }


def sana_sprint() -> nn.Module:
    return sana(guidance_embeds=True, qk_norm="rms_norm_across_heads")


def sana_sprint_inputs(seed: int) -> Inputs:
    """SanaSprintPipeline: time in (0, 1), and guidance times its scale."""
    time, guidance = times(seed) / 1000, torch.full((2,), 4.5 * 0.1)
    return {**sana_inputs(seed), "timestep": time, "guidance": guidance}


def sana_controlnet() -> nn.Module:
    return SanaControlNetModel(**{k: v for k, v in SANA.items() if k != "out_channels"})


def sana_controlnet_inputs(seed: int) -> Inputs:
    control = latents(seed + 300, patch=1)
    return {**sana_inputs(seed), "controlnet_cond": control, "conditioning_scale": 0.7}


# -- OmniGen, HiDream -----------------------------------------------------------------------------


def omnigen() -> nn.Module:
    factors = {"short_factor": [1.0] * (HEAD // 2), "long_factor": [2.0] * (HEAD // 2)}
    return OmniGenTransformer2DModel(
        in_channels=CHANNELS,
        patch_size=PATCH,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=72,
        num_layers=2,
        pad_token_id=0,
        vocab_size=50,
        rope_scaling={"type": "su", **factors},
        pos_embed_max_size=14,
        time_step_dim=32,
    )


def omnigen_inputs(seed: int) -> Inputs:
    """What OmniGenPipeline passes: text is causal, the picture sees everything."""
    before, total = TEXT + 1, TEXT + 1 + H * W
    mask = torch.ones(total, total)
    mask[:before] = torch.ones(total, total).tril()[:before]
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": latents(seed),
        "timestep": times(seed) / 1000,
        "input_ids": torch.randint(1, 50, (2, TEXT), generator=generator),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask.repeat(2, 1, 1),
        "position_ids": torch.arange(total).repeat(2, 1),
        "return_dict": False,
    }


def hidream() -> nn.Module:
    return HiDreamImageTransformer2DModel(
        patch_size=PATCH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        caption_channels=[T5_WIDTH, TEXT_WIDTH],
        text_emb_dim=POOLED,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(16, 16),
        llama_layers=[0, 1],
    )


def hidream_inputs(seed: int) -> Inputs:
    """What HiDreamImagePipeline passes; a square picture, which is not padded."""
    return {
        "hidden_states": randn(seed, 2, CHANNELS, SIDE * PATCH, SIDE * PATCH),
        "timesteps": times(seed),
        "encoder_hidden_states_t5": text(seed, T5, T5_WIDTH),
        "encoder_hidden_states_llama3": randn(seed + 300, 2, 2, TEXT, TEXT_WIDTH),
        "pooled_embeds": randn(seed + 100, 2, POOLED),
        "attention_kwargs": None,
        "return_dict": False,
    }


# -- Spatial transformers by themselves -----------------------------------------------------------

SPATIAL: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD,
    "in_channels": 40,
    "num_layers": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": TEXT_WIDTH,
}


def spatial_inputs(seed: int, length: int = TEXT) -> Inputs:
    """What a UNet block passes to its spatial transformer."""
    return {
        "hidden_states": latents(seed, SPATIAL["in_channels"], patch=1),
        "encoder_hidden_states": text(seed, length),
        "return_dict": False,
    }


def dual_transformer() -> nn.Module:
    """Versatile Diffusion's pair: one transformer for each of two conditions."""
    model = DualTransformer2DModel(**SPATIAL)
    model.condition_lengths = [TEXT, T5]
    return model


def vector_quantized() -> nn.Module:
    """VQ-Diffusion's transformer: the picture is a list of codes."""
    return Transformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD,
        num_layers=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_bias=True,
        sample_size=SIDE,
        num_vector_embeds=30,
        activation_fn="geglu-approximate",
        norm_type="ada_norm",
        num_embeds_ada_norm=100,
    )


def vector_quantized_inputs(seed: int) -> Inputs:
    """What VQDiffusionPipeline passed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randint(0, 30, (2, SIDE * SIDE), generator=generator),
        "encoder_hidden_states": text(seed),
        "timestep": torch.tensor((7 * seed) % 100),
        "return_dict": False,
    }


def stable_audio() -> nn.Module:
    return StableAudioDiTModel(
        sample_size=64,
        in_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=HEAD,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=CHANNELS,
        cross_attention_dim=24,
        time_proj_dim=32,
        global_states_input_dim=POOLED,
        cross_attention_input_dim=TEXT_WIDTH,
    )


def stable_audio_inputs(seed: int) -> Inputs:
    """What StableAudioPipeline passes: a latent sound, channels first."""
    tables = get_1d_rotary_pos_embed(HEAD // 2, 64 + 1, use_real=True, repeat_interleave_real=False)
    return {
        "hidden_states": randn(seed, 2, CHANNELS, 64),
        "timestep": times(seed)[:1] / 1000,
        "encoder_hidden_states": text(seed),
        "global_hidden_states": randn(seed + 100, 2, 1, POOLED),
        "rotary_embedding": tables,
        "return_dict": False,
    }


CASES: tuple[Case, ...] = (
    Case(
        "sd3",
        "Stable Diffusion 3 medium",
        seeded(sd3),
        sd3_inputs,
        grids=((H, W),),
        sites={"joint": 3},
        attention=3,
        mlp=3,
        why=SD3_WHY,
    ),
    Case(
        "sd35_medium",
        "Stable Diffusion 3.5 medium",
        seeded(sd3_medium35),
        sd3_inputs,
        grids=((H, W),),
        sites={"joint": 4, "self": 2},
        attention=6,
        mlp=4,
        why="4 joint blocks as in SD3; the first 2 add an attention over the image alone, which "
        "starts from the block's input.",
    ),
    Case(
        "sd3_controlled",
        "Stable Diffusion 3 with ControlNet residuals",
        seeded(sd3),
        sd3_controlled_inputs,
        grids=((H, W),),
        sites={"joint": 3},
        attention=3,
        mlp=3,
        why=SD3_WHY + " Residuals of a ControlNet are added after the first two.",
    ),
    Case(
        "sd35_large_ip_adapter",
        "Stable Diffusion 3.5 large with an IP-Adapter",
        seeded(sd35_large_with_ip_adapter),
        sd3_ip_adapter_inputs,
        grids=((H, W),),
        sites={"joint": 6},
        attention=3,
        mlp=3,
        why=SD3_WHY + " In the same add, the image queries look at image and adapter tokens once "
        "more. The adapter's own attention is no fused one.",
    ),
    Case(
        "sd3_controlnet",
        "Stable Diffusion 3 ControlNet (inpainting)",
        seeded(sd3_controlnet),
        lambda seed: sd3_controlnet_inputs(seed, extra=1),
        grids=((H, W),),
        sites={"joint": 2},
        attention=2,
        mlp=2,
        why="2 joint blocks: joint attention and image MLP, one add each. The patches of latent and"
        " control picture are added before; every block's result is also an output.",
    ),
    Case(
        "sd35_large_controlnet",
        "Stable Diffusion 3.5 large ControlNet",
        seeded(sd3_controlnet_large),
        lambda seed: sd3_controlnet_inputs(seed, with_text=False),
        grids=((H, W),),
        sites={"self": 2},
        attention=2,
        mlp=2,
        why="2 blocks without text: self attention and MLP, one add each.",
    ),
    Case(
        "aura_flow",
        "AuraFlow",
        seeded(aura_flow),
        aura_flow_inputs,
        grids=((H, W),),
        sites={"joint": 4},
        attention=4,
        mlp=0,
        why="2 joint and 2 single blocks x = x + mlp(norm(x + attention(norm(x)))): the block's one"
        " add onto the stream holds attention and MLP.",
    ),
    Case(
        "pixart_alpha",
        "PixArt-alpha 1024",
        seeded(lambda: PixArtTransformer2DModel(**PIXART)),
        lambda seed: pixart_inputs(seed, resolution=True),
        grids=((H, W),),
        **BASIC_COUNTS,
        why=BASIC_WHY,
    ),
    Case(
        "pixart_sigma",
        "PixArt-Sigma 1024",
        seeded(
            lambda: PixArtTransformer2DModel(
                **PIXART, interpolation_scale=2, use_additional_conditions=False
            )
        ),
        lambda seed: pixart_inputs(seed, resolution=False),
        grids=((H, W),),
        **BASIC_COUNTS,
        why=BASIC_WHY,
    ),
    Case(
        "dit",
        "DiT",
        seeded(dit),
        dit_inputs,
        grids=((SIDE, SIDE),),
        sites={"self": 2},
        attention=2,
        mlp=2,
        why="2 blocks: self attention and MLP, one add each.",
    ),
    Case(
        "hunyuan_dit",
        "Hunyuan-DiT 1.2",
        seeded(lambda: hunyuan_dit(style=False)),
        hunyuan_inputs,
        grids=((H, W),),
        sites={"self": 6, "cross": 6, "text": 1},
        attention=12,
        mlp=6,
        why="6 blocks. " + HUNYUAN_WHY + " Blocks 5 and 6 start from a linear map of the stream and"
        " an earlier block's output.",
        crop=HUNYUAN_CROP,
    ),
    Case(
        "hunyuan_dit_style",
        "Hunyuan-DiT 1.1",
        seeded(lambda: hunyuan_dit(style=True)),
        hunyuan_inputs,
        grids=((H, W),),
        sites={"self": 6, "cross": 6, "text": 1},
        attention=12,
        mlp=6,
        why="6 blocks. " + HUNYUAN_WHY,
        crop=HUNYUAN_CROP,
    ),
    Case(
        "hunyuan_dit_controlled",
        "Hunyuan-DiT 1.2 with ControlNet residuals",
        seeded(lambda: hunyuan_dit(style=False)),
        hunyuan_controlled_inputs,
        grids=((H, W),),
        sites={"self": 6, "cross": 6, "text": 1},
        attention=12,
        mlp=6,
        why="6 blocks. " + HUNYUAN_WHY + " Residuals are added to what the last two take across; "
        "the model pops them off the caller's list.",
        crop=HUNYUAN_CROP,
    ),
    Case(
        "hunyuan_dit_controlnet",
        "Hunyuan-DiT ControlNet",
        seeded(hunyuan_controlnet),
        hunyuan_controlnet_inputs,
        grids=((H, W),),
        sites={"self": 2, "cross": 2, "text": 1},
        attention=4,
        mlp=2,
        why="2 blocks. " + HUNYUAN_WHY + " Their results are also outputs.",
    ),
    Case(
        "lumina_next",
        "Lumina-Next",
        seeded(lumina_next),
        lumina_next_inputs,
        grids=((H, W),),
        sites={"self": 2, "cross": 2},
        attention=2,
        mlp=2,
        why="2 blocks: self and cross attention side by side in one add, MLP in another.",
        crop=Crop(CORNER, crop_lumina_next, corner_of_latents),
    ),
    Case(
        "lumina2",
        "Lumina Image 2",
        seeded(lumina2),
        lumina2_inputs,
        refused=("CaptureError", "set(seq_lengths)"),
        why="The length of each prompt is read from its mask (`tolist`) and sizes the sequence; a "
        "set of such lengths can't be made while tracing.",
    ),
    Case(
        "cogview3_plus",
        "CogView3-Plus",
        seeded(lambda: CogView3PlusTransformer2DModel(**COGVIEW)),
        cogview_inputs,
        grids=((H, W),),
        sites={"joint": 2},
        attention=2,
        mlp=2,
        why="2 blocks: joint attention, and one MLP over text and image joined; one add each.",
        crop=CROP,
    ),
    Case(
        "cogview4",
        "CogView4",
        seeded(lambda: CogView4Transformer2DModel(**COGVIEW, rope_axes_dim=(256, 256))),
        cogview4_inputs,
        grids=((H, W),),
        sites={"joint": 2},
        attention=2,
        mlp=2,
        why="2 blocks: joint attention and image MLP, one add each. Rotary tables turn the image "
        "part of queries and keys in place.",
    ),
    Case(
        "sana",
        "Sana",
        seeded(sana),
        sana_inputs,
        grids=((H, W),),
        **SANA_COUNTS,
        why=SANA_WHY,
    ),
    Case(
        "sana_sprint",
        "Sana-Sprint",
        seeded(sana_sprint),
        sana_sprint_inputs,
        grids=((H, W),),
        **SANA_COUNTS,
        why=SANA_WHY,
    ),
    Case(
        "sana_controlnet",
        "Sana ControlNet",
        seeded(sana_controlnet),
        sana_controlnet_inputs,
        grids=((H, W),),
        **SANA_COUNTS,
        why=SANA_WHY,
    ),
    Case(
        "omnigen",
        "OmniGen",
        seeded(omnigen),
        omnigen_inputs,
        refused=("CaptureError", "seq_len > self.original_max_position_embeddings"),
        why="Rotary factors are chosen in Python by the largest position id.",
    ),
    Case(
        "hidream",
        "HiDream-I1",
        seeded(hidream),
        hidream_inputs,
        refused=("CaptureError", "flat_expert_indices.bincount().cpu().numpy()"),
        why="Tokens are sorted to experts by numbers of tokens that go through numpy.",
    ),
    Case(
        "spatial_transformer",
        "Spatial transformer of Stable Diffusion",
        seeded(lambda: Transformer2DModel(**SPATIAL)),
        spatial_inputs,
        grids=((H, W),),
        **BASIC_COUNTS,
        why=BASIC_WHY,
    ),
    Case(
        "spatial_transformer_linear",
        "Spatial transformer of Stable Diffusion XL",
        seeded(lambda: Transformer2DModel(**SPATIAL, use_linear_projection=True)),
        spatial_inputs,
        grids=((H, W),),
        **BASIC_COUNTS,
        why=BASIC_WHY,
    ),
    Case(
        "dual_transformer",
        "Versatile Diffusion's dual transformer",
        seeded(dual_transformer),
        lambda seed: spatial_inputs(seed, TEXT + T5),
        grids=((H, W), (H, W)),
        sites={"self": 4, "cross": 4},
        attention=8,
        mlp=4,
        why="Two spatial transformers on the same picture, each with 2 blocks: self attention, "
        "cross attention and MLP, one add each.",
    ),
    Case(
        "vq_diffusion",
        "VQ-Diffusion's transformer",
        seeded(vector_quantized),
        vector_quantized_inputs,
        refused=("NoMergeSites", "carry no image tokens"),
        why="The picture is a list of codes: nothing tells its grid.",
    ),
    Case(
        "stable_audio",
        "Stable Audio",
        seeded(stable_audio),
        stable_audio_inputs,
        refused=("NoMergeSites", "no image tokens"),
        why="Tokens are moments of a sound: there is no image grid.",
    ),
)

"""Video transformers: token grids of (frames, rows, columns).

Sizes are told apart by value: 3x6x4 tokens (72), 5 latent channels, 7 text tokens of width 28,
2 heads of 20 (width 40), or of 16 where rotary tables ask for it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AllegroTransformer3DModel,
    ChronoEditTransformer3DModel,
    CogVideoXTransformer3DModel,
    ConsisIDTransformer3DModel,
    CosmosTransformer3DModel,
    EasyAnimateTransformer3DModel,
    HeliosTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LatteTransformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    MotifVideoTransformer3DModel,
    SanaVideoTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from diffusers.models.transformers import transformer_cosmos
from torch import Tensor
from torch.nn.functional import interpolate

from tests.zoo.base import Case, Crop, Inputs, randn, seeded

Grid = tuple[int, int, int]

GRID: Grid = (3, 6, 4)
TOKENS = 72
CORNER: Grid = (2, 3, 2)
"""Token grid of the corner that `Crop` keeps."""
CHANNELS, TEXT, TEXT_WIDTH = 5, 7, 28
HEADS, HEAD = 2, 20
WIDTH = HEADS * HEAD


def latents(seed: int, channels: int = CHANNELS, grid: Grid = GRID, patch_t: int = 1) -> Tensor:
    """[2, C, T, H, W] for patches of (patch_t, 2, 2)."""
    t, h, w = grid
    return randn(seed, 2, channels, t * patch_t, 2 * h, 2 * w)


def frames_first(seed: int, channels: int = CHANNELS, patch_t: int = 1) -> Tensor:
    """[2, T, C, H, W], the order of CogVideoX."""
    return latents(seed, channels, patch_t=patch_t).transpose(1, 2).contiguous()


def text(seed: int, length: int = TEXT, width: int = TEXT_WIDTH) -> Tensor:
    """Text embeddings."""
    return randn(seed + 100, 2, length, width)


def text_mask(seed: int, length: int = TEXT) -> Tensor:
    """[2, L] of 0 and 1: the second prompt is shorter by one to three tokens."""
    mask = torch.ones(2, length)
    mask[1, -1 - seed % 3 :] = 0
    return mask


def times(seed: int) -> Tensor:
    """One time in (0, 1000) for both elements of the batch."""
    return torch.full((2,), 100.0 + 150 * (seed % 5))


def cut(x: Tensor, size: tuple[int, ...], dims: tuple[int, ...] = (-3, -2, -1)) -> Tensor:
    """The first `size` entries of `dims`."""
    for dim, length in zip(dims, size, strict=True):
        x = x.narrow(dim, 0, length)
    return x.contiguous()


def packed_corner(x: Tensor, dim: int = 1) -> Tensor:
    """The corner of tokens packed along `dim`."""
    dims = (dim, dim + 1, dim + 2)
    return cut(x.unflatten(dim, GRID), CORNER, dims).flatten(dim, dim + 2)


def crop(
    change: Callable[[Inputs], Inputs] = lambda inputs: {},
    *,
    corner: Grid = CORNER,
    dims: tuple[int, ...] = (-3, -2, -1),
    patch: Grid = (1, 2, 2),
) -> Crop:
    """A corner of video latents; `change` gives what else differs in the call."""
    size = tuple(n * p for n, p in zip(corner, patch, strict=True))

    def inputs_of(inputs: Inputs) -> Inputs:
        smaller = {"hidden_states": cut(inputs["hidden_states"], size, dims)}
        return {**inputs, **smaller, **change(inputs)}

    return Crop(corner, inputs_of, lambda out: cut(out, size, dims))


# -- CogVideoX, ConsisID --------------------------------------------------------------------------

COGVIDEOX: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "time_embed_dim": 12,
    "text_embed_dim": TEXT_WIDTH,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 12,
    "sample_frames": 9,
    "max_text_seq_length": TEXT,
}
COGVIDEOX_COUNTS: dict[str, Any] = {
    "grids": (GRID,),
    "sites": {"joint": 2},
    "attention": 2,
    "mlp": 2,
    "why": (
        "2 blocks: text and video in one attention, then in one feed-forward; the video half of "
        "each is one add."
    ),
}
FRAMES_FIRST = (1, 3, 4)


def cogvideox(**changes: Any) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(**{**COGVIDEOX, **changes})


def rotary_table(grid_type: str = "linspace") -> tuple[Tensor, Tensor]:
    """(cos, sin) [tokens, head width] as the pipelines of CogVideoX 5b and 1.5 compute them."""
    t, h, w = GRID
    return get_3d_rotary_pos_embed(  # type: ignore[return-value]
        16,
        ((0, 0), (h, w)) if grid_type == "linspace" else None,
        (h, w),
        t,
        grid_type=grid_type,
        max_size=(h + 2, w + 3),
    )


def cogvideox_inputs(
    seed: int, *, rotary: str | None = None, channels: int = CHANNELS, patch_t: int = 1
) -> Inputs:
    """What CogVideoXPipeline passes; `rotary` is the kind of table, if there is one."""
    return {
        "hidden_states": frames_first(seed, channels, patch_t),
        "encoder_hidden_states": text(seed),
        "timestep": times(seed),
        "image_rotary_emb": rotary_table(rotary) if rotary else None,
        "attention_kwargs": None,
        "return_dict": False,
    }


def crop_rotary(inputs: Inputs) -> Inputs:
    """Rotary tables of the corner."""
    tables = inputs["image_rotary_emb"]
    return {"image_rotary_emb": tuple(packed_corner(table, 0) for table in tables)}


CONSISID: dict[str, Any] = {
    **COGVIDEOX,
    "num_attention_heads": 3,
    "in_channels": 2 * CHANNELS,
    "num_layers": 4,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": True,
    "is_train_face": True,
    "cross_attn_interval": 2,
    "cross_attn_dim_head": 8,
    "cross_attn_num_heads": 2,
    "LFE_id_dim": 36,
    "LFE_vit_dim": 26,
    "LFE_depth": 2,
    "LFE_dim_head": 8,
    "LFE_num_heads": 2,
    "LFE_num_id_token": 3,
    "LFE_num_querie": 4,
    "LFE_output_dim": 32,
    "LFE_ff_mult": 2,
    "LFE_num_scale": 2,
}


def consisid_inputs(seed: int) -> Inputs:
    """What ConsisIDPipeline passes: latents beside those of the image, and a face."""
    return {
        **cogvideox_inputs(seed, rotary="linspace", channels=2 * CHANNELS),
        "id_cond": randn(seed + 200, 2, 36),
        "id_vit_hidden": [randn(seed + 300 + i, 2, 11, 26) for i in range(2)],
    }


COGVIDEOX_CASES = (
    Case(
        name="cogvideox",
        title="CogVideoX 2b (sine and cosine position table)",
        build=seeded(cogvideox),
        inputs=cogvideox_inputs,
        crop=crop(dims=FRAMES_FIRST),
        **COGVIDEOX_COUNTS,
    ),
    Case(
        name="cogvideox_resized",
        title="CogVideoX 2b at another size than its own (the table is computed in the call)",
        build=seeded(lambda: cogvideox(sample_width=10, sample_height=16, sample_frames=13)),
        inputs=cogvideox_inputs,
        **COGVIDEOX_COUNTS,
    ),
    Case(
        name="cogvideox_5b",
        title="CogVideoX 5b (rotary tables)",
        build=seeded(lambda: cogvideox(use_rotary_positional_embeddings=True)),
        inputs=lambda seed: cogvideox_inputs(seed, rotary="linspace"),
        crop=crop(crop_rotary, dims=FRAMES_FIRST),
        **COGVIDEOX_COUNTS,
    ),
    Case(
        name="cogvideox_5b_i2v",
        title="CogVideoX 5b image-to-video (learned position table)",
        build=seeded(
            lambda: cogvideox(
                in_channels=2 * CHANNELS,
                use_rotary_positional_embeddings=True,
                use_learned_positional_embeddings=True,
            )
        ),
        inputs=lambda seed: cogvideox_inputs(seed, rotary="linspace", channels=2 * CHANNELS),
        **COGVIDEOX_COUNTS,
    ),
    Case(
        name="cogvideox_15",
        title="CogVideoX 1.5 5b (patches of two frames)",
        build=seeded(
            lambda: cogvideox(
                use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False
            )
        ),
        inputs=lambda seed: cogvideox_inputs(seed, rotary="slice", patch_t=2),
        crop=crop(crop_rotary, dims=FRAMES_FIRST, patch=(2, 2, 2)),
        **COGVIDEOX_COUNTS,
    ),
    Case(
        name="consisid",
        title="ConsisID",
        build=seeded(lambda: ConsisIDTransformer3DModel(**CONSISID)),
        inputs=consisid_inputs,
        grids=(GRID,),
        sites={"joint": 4, "cross": 2},
        attention=6,
        mlp=4,
        why=(
            "4 CogVideoX blocks (one joint attention, one feed-forward), and after blocks 0 and 2 "
            "a cross-attention to the face, written as matmul, softmax, matmul: an add each."
        ),
    ),
)

# -- LTX-Video ------------------------------------------------------------------------------------

LTX: dict[str, Any] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD,
    "cross_attention_dim": WIDTH,
    "num_layers": 2,
    "caption_channels": TEXT_WIDTH,
}
LTX_COUNTS: dict[str, Any] = {
    "grids": (GRID,),
    "sites": {"self": 2, "cross": 2},
    "attention": 4,
    "mlp": 2,
    "why": "2 blocks: self-attention, cross-attention, feed-forward, an add each.",
}


def ltx_inputs(seed: int) -> Inputs:
    """What LTXPipeline passes: packed latents, the grid as three integers."""
    return {
        "hidden_states": randn(seed, 2, TOKENS, CHANNELS),
        "encoder_hidden_states": text(seed),
        "timestep": times(seed),
        "encoder_attention_mask": text_mask(seed).bool(),
        "num_frames": GRID[0],
        "height": GRID[1],
        "width": GRID[2],
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "attention_kwargs": None,
        "return_dict": False,
    }


def pixel_starts() -> Tensor:
    """[3, tokens] of (seconds, pixel row, pixel column) where each token begins."""
    t, h, w = GRID
    axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
    starts = torch.stack(axes).flatten(1).float() * torch.tensor([8.0, 32.0, 32.0])[:, None]
    starts[0] = (starts[0] - 7).clamp(min=0) / 25
    return starts


def ltx_condition_inputs(seed: int) -> Inputs:
    """What LTXConditionPipeline passes: coordinates and a timestep for each token."""
    inputs = ltx_inputs(seed)
    for name in ("num_frames", "height", "width", "rope_interpolation_scale"):
        del inputs[name]
    timestep = times(seed)[:, None].repeat(1, TOKENS)
    timestep[:, : TOKENS // GRID[0]] = 0
    return {
        **inputs,
        "timestep": timestep,
        "video_coords": pixel_starts().expand(2, -1, -1).contiguous(),
    }


def crop_ltx(inputs: Inputs) -> Inputs:
    size = dict(zip(("num_frames", "height", "width"), CORNER, strict=True))
    return {**inputs, **size, "hidden_states": packed_corner(inputs["hidden_states"])}


def crop_ltx_condition(inputs: Inputs) -> Inputs:
    return {
        **inputs,
        "hidden_states": packed_corner(inputs["hidden_states"]),
        "timestep": packed_corner(inputs["timestep"]),
        "video_coords": packed_corner(inputs["video_coords"], 2),
    }


LTX2: dict[str, Any] = {
    **LTX,
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "audio_num_attention_heads": HEADS,
    "audio_attention_head_dim": 12,
    "audio_cross_attention_dim": 24,
    "rope_type": "split",
}
AUDIO = 11


def ltx2_inputs(seed: int) -> Inputs:
    """What LTX2Pipeline passes: video and audio latents, [start, end) of each token."""
    starts = pixel_starts()
    ends = starts + torch.tensor([8 / 25, 32.0, 32.0])[:, None]
    audio = torch.arange(AUDIO).float() / 25
    mask = text_mask(seed)
    return {
        "hidden_states": randn(seed, 2, TOKENS, CHANNELS),
        "audio_hidden_states": randn(seed + 200, 2, AUDIO, 6),
        "encoder_hidden_states": text(seed),
        "audio_encoder_hidden_states": text(seed + 300),
        "timestep": times(seed),
        "sigma": times(seed),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": GRID[0],
        "height": GRID[1],
        "width": GRID[2],
        "fps": 25.0,
        "audio_num_frames": AUDIO,
        "video_coords": torch.stack([starts, ends], dim=-1).repeat(2, 1, 1, 1),
        "audio_coords": torch.stack([audio, audio + 1 / 25], dim=-1).repeat(2, 1, 1, 1),
        "isolate_modalities": False,
        "spatio_temporal_guidance_blocks": None,
        "perturbation_mask": None,
        "use_cross_timestep": False,
        "attention_kwargs": None,
        "return_dict": False,
    }


LTX2_COUNTS: dict[str, Any] = {
    "grids": (GRID,),
    "sites": {"self": 2, "cross": 4, "text": 6},
    "attention": 6,
    "mlp": 2,
    "why": (
        "2 blocks: video self-attention, video to text, video to audio, video feed-forward, an "
        "add each. The queries of 3 more are audio: to itself, to text, to the video."
    ),
}

LTX_CASES = (
    Case(
        name="ltx",
        title="LTX-Video",
        build=seeded(lambda: LTXVideoTransformer3DModel(**LTX)),
        inputs=ltx_inputs,
        crop=Crop(CORNER, crop_ltx, packed_corner),
        **LTX_COUNTS,
    ),
    Case(
        name="ltx_condition",
        title="LTX-Video 0.9.5 and later, with conditions",
        build=seeded(lambda: LTXVideoTransformer3DModel(**LTX)),
        inputs=ltx_condition_inputs,
        crop=Crop(CORNER, crop_ltx_condition, packed_corner),
        **LTX_COUNTS,
    ),
    Case(
        name="ltx2",
        title="LTX-2",
        build=seeded(lambda: LTX2VideoTransformer3DModel(**LTX2)),
        inputs=ltx2_inputs,
        **LTX2_COUNTS,
    ),
    Case(
        name="ltx23",
        title="LTX-2.3 (gated attention, modulated text)",
        build=seeded(
            lambda: LTX2VideoTransformer3DModel(
                **LTX2,
                gated_attn=True,
                cross_attn_mod=True,
                audio_gated_attn=True,
                audio_cross_attn_mod=True,
                perturbed_attn=True,
                use_prompt_embeddings=False,
            )
        ),
        inputs=lambda seed: {
            **ltx2_inputs(seed),
            "encoder_hidden_states": text(seed, width=WIDTH),
            "audio_encoder_hidden_states": text(seed + 300, width=24),
            "use_cross_timestep": True,
        },
        **LTX2_COUNTS,
    ),
)

# -- Wan and models built on it -------------------------------------------------------------------

WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 16,
    "ffn_dim": 56,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
WAN_I2V: dict[str, Any] = {
    **WAN,
    "in_channels": 2 * CHANNELS + 1,
    "image_dim": 44,
    "added_kv_proj_dim": WIDTH,
}


def wan_inputs(seed: int, *, channels: int = CHANNELS, length: int = TEXT) -> Inputs:
    """What WanPipeline passes."""
    return {
        "hidden_states": latents(seed, channels),
        "timestep": times(seed),
        "encoder_hidden_states": text(seed, length),
        "attention_kwargs": None,
        "return_dict": False,
    }


def wan_i2v_inputs(seed: int) -> Inputs:
    """What WanImageToVideoPipeline passes; the attention code counts on 512 text tokens."""
    return {
        **wan_inputs(seed, channels=2 * CHANNELS + 1, length=512),
        "encoder_hidden_states_image": randn(seed + 200, 2, 9, 44),
    }


def wan_ti2v_inputs(seed: int) -> Inputs:
    """Wan 2.2 TI2V: a timestep for each token, 0 in the frame that is given."""
    timestep = times(seed)[:, None].repeat(1, TOKENS)
    timestep[:, : TOKENS // GRID[0]] = 0
    return {**wan_inputs(seed), "timestep": timestep}


def vace_inputs(seed: int) -> Inputs:
    """What WanVACEPipeline passes."""
    return {
        **wan_inputs(seed),
        "control_hidden_states": latents(seed + 200, 13),
        "control_hidden_states_scale": torch.tensor([1.0, 0.75]),
    }


def chronoedit_inputs(seed: int) -> Inputs:
    """What ChronoEditPipeline passes in its last steps: the first and the last frame alone."""
    return {**wan_i2v_inputs(seed), "hidden_states": latents(seed, 2 * CHANNELS + 1, (2, 6, 10))}


def skyreels(**changes: Any) -> SkyReelsV2Transformer3DModel:
    return SkyReelsV2Transformer3DModel(**{**WAN, **changes})


def forcing_inputs(seed: int) -> Inputs:
    """What SkyReelsV2DiffusionForcingPipeline passes: a timestep for each frame."""
    timestep = times(seed)[:, None] + 40 * torch.arange(GRID[0])
    return {
        **wan_inputs(seed),
        "timestep": timestep.float(),
        "enable_diffusion_forcing": True,
        "fps": [1, 1],
    }


WAN_COUNTS: dict[str, Any] = {
    "grids": (GRID,),
    "sites": {"self": 2, "cross": 2},
    "attention": 4,
    "mlp": 2,
    "why": "2 blocks: self-attention, cross-attention, feed-forward, an add each.",
}
WAN_I2V_COUNTS: dict[str, Any] = {
    **WAN_COUNTS,
    "sites": {"self": 2, "cross": 4},
    "why": (
        "2 blocks: self-attention, cross-attention to text and to the image (2 attentions, "
        "summed: one add), feed-forward."
    ),
}

WAN_CASES = (
    Case(
        name="wan",
        title="Wan 2.1 text-to-video",
        build=seeded(lambda: WanTransformer3DModel(**WAN)),
        inputs=wan_inputs,
        crop=crop(),
        **WAN_COUNTS,
    ),
    Case(
        name="wan_i2v",
        title="Wan 2.1 image-to-video",
        build=seeded(lambda: WanTransformer3DModel(**WAN_I2V)),
        inputs=wan_i2v_inputs,
        crop=crop(),
        **WAN_I2V_COUNTS,
    ),
    Case(
        name="wan_ti2v",
        title="Wan 2.2 TI2V (a timestep for each token)",
        build=seeded(lambda: WanTransformer3DModel(**WAN)),
        inputs=wan_ti2v_inputs,
        crop=crop(lambda inputs: {"timestep": packed_corner(inputs["timestep"])}),
        **WAN_COUNTS,
    ),
    Case(
        name="wan_vace",
        title="Wan 2.1 VACE",
        build=seeded(
            lambda: WanVACETransformer3DModel(
                **{**WAN, "num_layers": 3}, vace_layers=[0, 2], vace_in_channels=13
            )
        ),
        inputs=vace_inputs,
        grids=(GRID, GRID),
        sites={"self": 5, "cross": 5},
        attention=10,
        mlp=5,
        why=(
            "3 blocks of the video and 2 of the control stream, which begins as a projection of "
            "the control video plus the video tokens: self-attention, cross-attention, "
            "feed-forward in each. Control is added to the video behind blocks 0 and 2."
        ),
        crop=crop(
            lambda inputs: {
                "control_hidden_states": cut(inputs["control_hidden_states"], (2, 6, 4))
            }
        ),
    ),
    Case(
        name="chronoedit",
        title="ChronoEdit",
        build=seeded(lambda: ChronoEditTransformer3DModel(**WAN_I2V)),
        inputs=chronoedit_inputs,
        crop=crop(corner=(2, 3, 4)),
        **{**WAN_I2V_COUNTS, "grids": ((2, 6, 10),)},
    ),
    Case(
        name="skyreels",
        title="SkyReels-V2 text-to-video",
        build=seeded(skyreels),
        inputs=wan_inputs,
        crop=crop(),
        **WAN_COUNTS,
    ),
    Case(
        name="skyreels_forcing",
        title="SkyReels-V2 diffusion forcing (a timestep for each frame)",
        build=seeded(skyreels),
        inputs=forcing_inputs,
        crop=crop(lambda inputs: {"timestep": inputs["timestep"][:, : CORNER[0]]}),
        **WAN_COUNTS,
    ),
    Case(
        name="skyreels_causal",
        title="SkyReels-V2 diffusion forcing, causal blocks of frames",
        build=seeded(lambda: skyreels(num_frame_per_block=3)),
        inputs=forcing_inputs,
        **WAN_COUNTS,
    ),
)

# -- HunyuanVideo ---------------------------------------------------------------------------------

HUNYUAN: dict[str, Any] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "text_embed_dim": TEXT_WIDTH,
    "pooled_projection_dim": 36,
    "rope_axes_dim": (8, 6, 6),
}
HUNYUAN_COUNTS: dict[str, Any] = {
    "grids": (GRID,),
    "sites": {"joint": 4, "text": 2},
    "attention": 4,
    "mlp": 2,
    "why": (
        "2 double blocks: joint attention and video MLP, one add each; 2 single blocks: attention "
        "and MLP side by side, one add. 2 blocks refine the text."
    ),
}


def hunyuan(**changes: Any) -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(**{**HUNYUAN, **changes})


def hunyuan_inputs(seed: int, channels: int = CHANNELS) -> Inputs:
    """What HunyuanVideoPipeline passes."""
    return {
        "hidden_states": latents(seed, channels),
        "timestep": times(seed),
        "encoder_hidden_states": text(seed),
        "encoder_attention_mask": text_mask(seed),
        "pooled_projections": randn(seed + 200, 2, 36),
        "guidance": torch.full((2,), 6000.0),
        "attention_kwargs": None,
        "return_dict": False,
    }


VIDEO: Grid = (3, 10, 8)
NEAR: Grid = (2, 10, 8)
FAR: Grid = (16, 10, 8)
HISTORY: tuple[tuple[int, ...], ...] = (VIDEO, NEAR, (5, 4), (4, 3, 2))
"""Token grids of models that are told the past: the video, clean frames, frames patched by two
and by four in each direction (those padded to whole patches)."""


def framepack() -> HunyuanVideoFramepackTransformer3DModel:
    return HunyuanVideoFramepackTransformer3DModel(
        **HUNYUAN, has_image_proj=True, image_proj_dim=44, has_clean_x_embedder=True
    )


def framepack_inputs(seed: int) -> Inputs:
    """What HunyuanVideoFramepackPipeline passes: history at three scales, and frame numbers."""
    frames = torch.arange(1 + 16 + 2 + 1 + VIDEO[0])
    first, far, middle, near, video = frames.split([1, 16, 2, 1, VIDEO[0]])
    return {
        **hunyuan_inputs(seed),
        "hidden_states": latents(seed, grid=VIDEO),
        "image_embeds": randn(seed + 300, 2, 9, 44),
        "indices_latents": video,
        "latents_clean": latents(seed + 400, grid=NEAR),
        "indices_latents_clean": torch.cat([first, near]),
        "latents_history_2x": latents(seed + 500, grid=NEAR),
        "indices_latents_history_2x": middle,
        "latents_history_4x": latents(seed + 600, grid=FAR),
        "indices_latents_history_4x": far,
    }


def second_alone(inputs: Inputs) -> Inputs:
    """The call of the second element of the batch; frame numbers have no batch."""
    batched = {
        name: value[1:]
        for name, value in inputs.items()
        if isinstance(value, Tensor) and not name.startswith("indices")
    }
    return {**inputs, **batched}


HUNYUAN_15: dict[str, Any] = {
    "in_channels": 2 * CHANNELS + 1,
    "out_channels": CHANNELS,
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD,
    "num_layers": 2,
    "text_embed_dim": TEXT_WIDTH,
    "text_embed_2_dim": 30,
    "image_embed_dim": 44,
    "rope_axes_dim": (8, 6, 6),
}


def hunyuan_15_inputs(seed: int) -> Inputs:
    """What HunyuanVideo15Pipeline passes: no image is an image of zeros."""
    t, h, w = GRID
    return {
        "hidden_states": randn(seed, 2, 2 * CHANNELS + 1, t, h, w),
        "image_embeds": torch.zeros(2, 9, 44),
        "timestep": times(seed),
        "encoder_hidden_states": text(seed),
        "encoder_attention_mask": text_mask(seed),
        "encoder_hidden_states_2": text(seed + 200, 5, 30),
        "encoder_attention_mask_2": text_mask(seed, 5),
        "attention_kwargs": None,
        "return_dict": False,
    }


MOTIF: dict[str, Any] = {
    "in_channels": 2 * CHANNELS + 1,
    "out_channels": CHANNELS,
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD,
    "num_layers": 2,
    "num_single_layers": 2,
    "text_embed_dim": TEXT_WIDTH,
    "rope_axes_dim": (8, 6, 6),
    "enable_text_cross_attention_dual": True,
    "enable_text_cross_attention_single": True,
}


def motif_inputs(seed: int) -> Inputs:
    """What MotifVideoPipeline passes."""
    return {
        "hidden_states": latents(seed, 2 * CHANNELS + 1),
        "timestep": times(seed),
        "encoder_hidden_states": text(seed),
        "encoder_attention_mask": text_mask(seed).bool(),
        "attention_kwargs": None,
        "return_dict": False,
    }


HELIOS: dict[str, Any] = {**WAN, "rope_dim": (8, 6, 6)}
del HELIOS["rope_max_seq_len"]


def helios_inputs(seed: int) -> Inputs:
    """What HeliosPipeline passes: history at three scales, and frame numbers."""
    frames = torch.arange(1 + 16 + 2 + 1 + VIDEO[0])[None]
    first, far, middle, near, video = frames.split([1, 16, 2, 1, VIDEO[0]], dim=1)
    return {
        **wan_inputs(seed),
        "hidden_states": latents(seed, grid=VIDEO),
        "indices_hidden_states": video,
        "indices_latents_history_short": torch.cat([first, near], dim=1),
        "indices_latents_history_mid": middle,
        "indices_latents_history_long": far,
        "latents_history_short": latents(seed + 400, grid=NEAR),
        "latents_history_mid": latents(seed + 500, grid=NEAR),
        "latents_history_long": latents(seed + 600, grid=FAR),
    }


HUNYUAN_CASES = (
    Case(
        name="hunyuan_video",
        title="HunyuanVideo",
        build=seeded(hunyuan),
        inputs=hunyuan_inputs,
        crop=crop(),
        **HUNYUAN_COUNTS,
    ),
    Case(
        name="hunyuan_video_i2v",
        title="HunyuanVideo image-to-video (the first frame has a modulation of its own)",
        build=seeded(lambda: hunyuan(image_condition_type="token_replace", guidance_embeds=True)),
        inputs=hunyuan_inputs,
        crop=crop(),
        **HUNYUAN_COUNTS,
    ),
)

HISTORY_CASES = (
    Case(
        name="framepack",
        title="HunyuanVideo FramePack (one prompt: the text is cut to its length)",
        build=seeded(framepack),
        inputs=lambda seed: second_alone(framepack_inputs(seed)),
        grids=HISTORY[:1],
        sites={"joint": 4, "text": 2},
        mlp=2,
        why=(
            "As HunyuanVideo: 2 double blocks, 2 single blocks, 2 that refine the text. The video "
            "is the last of four images in the sequence, and the largest. Joint attention cuts the "
            "sequence at the length of the text, which depends on the data: export gives each such "
            "piece a size of its own, with assertions on the number of tokens, so it stays whole."
        ),
    ),
    Case(
        name="framepack_pair",
        title="HunyuanVideo FramePack (two prompts: a mask filled row by row)",
        build=seeded(framepack),
        inputs=framepack_inputs,
        grids=HISTORY[:1],
        sites={"joint": 4, "text": 2},
        attention=4,
        mlp=2,
        why=(
            "As HunyuanVideo: 2 double blocks, 2 single blocks, 2 that refine the text. The video "
            "is the last of four images in the sequence, and the largest."
        ),
    ),
    Case(
        name="hunyuan_video_15",
        title="HunyuanVideo 1.5",
        build=seeded(lambda: HunyuanVideo15Transformer3DModel(**HUNYUAN_15)),
        inputs=hunyuan_15_inputs,
        refused=("CaptureError", "if is_t2v:"),
        why="Python asks whether the picture's embeddings are all zeros.",
    ),
    Case(
        name="motif",
        title="Motif-Video without decoder blocks",
        build=seeded(lambda: MotifVideoTransformer3DModel(**MOTIF)),
        inputs=motif_inputs,
        grids=(GRID,),
        sites={"joint": 4, "cross": 4},
        attention=6,
        mlp=2,
        why=(
            "2 double blocks: joint attention, cross-attention whose queries are the output of "
            "the joint one, video MLP, an add each; 2 single blocks: both attentions and the MLP "
            "in one add."
        ),
        crop=crop(),
    ),
    Case(
        name="motif_decoder",
        title="Motif-Video with decoder blocks",
        build=seeded(
            lambda: MotifVideoTransformer3DModel(**{**MOTIF, "num_layers": 1}, num_decoder_layers=1)
        ),
        inputs=motif_inputs,
        grids=(GRID,),
        sites={"joint": 2, "cross": 2, "unknown": 1},
        attention=3,
        mlp=1,
        why=(
            "1 double block (joint attention, cross-attention, MLP), 1 single block with the "
            "text, 1 decoder block on the embedded video and the encoder's video end to end: the "
            "same tokens twice, which stays whole. A block's cross-attention reads what its joint "
            "attention made and is one branch with it."
        ),
    ),
    Case(
        name="helios",
        title="Helios",
        build=seeded(lambda: HeliosTransformer3DModel(**HELIOS)),
        inputs=helios_inputs,
        grids=HISTORY[:1],
        sites={"self": 2, "cross": 2},
        attention=4,
        mlp=2,
        why=(
            "2 blocks: self-attention and feed-forward on history and video end to end, "
            "cross-attention of the video alone, an add each. Of the four images in the sequence "
            "the largest merges."
        ),
    ),
)

# -- Mochi, Allegro, EasyAnimate ------------------------------------------------------------------

MOCHI: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD,
    "num_layers": 3,
    "pooled_projection_dim": 24,
    "in_channels": CHANNELS,
    "text_embed_dim": 32,
    "time_embed_dim": 12,
}


def mochi_inputs(seed: int) -> Inputs:
    """What MochiPipeline passes."""
    return {
        "hidden_states": latents(seed),
        "encoder_hidden_states": text(seed, width=32),
        "timestep": times(seed),
        "encoder_attention_mask": text_mask(seed).bool(),
        "attention_kwargs": None,
        "return_dict": False,
    }


ALLEGRO: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": 18,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 2,
    "cross_attention_dim": 36,
    "sample_height": 12,
    "sample_width": 8,
    "sample_frames": 3,
    "caption_channels": TEXT_WIDTH,
}


def allegro_inputs(seed: int) -> Inputs:
    """What AllegroPipeline passes: tables for each axis, and where each token looks them up."""
    t, h, w = GRID
    *tables, _, _, _ = get_3d_rotary_pos_embed_allegro(
        18, ((0, 0), (h, w)), (h, w), t, interpolation_scale=(2.2, 2.0, 2.0)
    )
    places = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w))
    return {
        "hidden_states": latents(seed),
        "encoder_hidden_states": text(seed)[:, None],
        "encoder_attention_mask": text_mask(seed),
        "timestep": times(seed),
        "image_rotary_emb": (tuple(tables), tuple(p[None].contiguous() for p in places.T)),
        "return_dict": False,
    }


def crop_allegro(inputs: Inputs) -> Inputs:
    tables, places = inputs["image_rotary_emb"]
    return {"image_rotary_emb": (tables, tuple(packed_corner(p) for p in places))}


EASYANIMATE: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "patch_size": 2,
    "num_layers": 3,
    "mmdit_layers": 2,
    "time_embed_dim": 12,
    "add_norm_text_encoder": True,
    "text_embed_dim": TEXT_WIDTH,
}


def easyanimate_inputs(seed: int) -> Inputs:
    """What EasyAnimatePipeline passes."""
    return {
        "hidden_states": latents(seed),
        "timestep": times(seed),
        "encoder_hidden_states": text(seed),
        "return_dict": False,
    }


OTHER_CASES = (
    Case(
        name="mochi",
        title="Mochi 1",
        build=seeded(lambda: MochiTransformer3DModel(**MOCHI)),
        inputs=mochi_inputs,
        grids=(GRID,),
        sites={"joint": 6, "text": 1},
        attention=3,
        mlp=3,
        why=(
            "3 blocks: joint attention (one call for each of the 2 prompts, padding left out) and "
            "video MLP, an add each. One attention pools the text."
        ),
    ),
    Case(
        name="allegro",
        title="Allegro",
        build=seeded(lambda: AllegroTransformer3DModel(**ALLEGRO)),
        inputs=allegro_inputs,
        grids=(GRID,),
        sites={"self": 2, "cross": 2},
        attention=4,
        mlp=2,
        why="2 blocks: self-attention, cross-attention, feed-forward, an add each.",
        crop=crop(crop_allegro),
    ),
    Case(
        name="easyanimate",
        title="EasyAnimate 5.1",
        build=seeded(lambda: EasyAnimateTransformer3DModel(**EASYANIMATE)),
        inputs=easyanimate_inputs,
        grids=(GRID,),
        sites={"joint": 3},
        attention=3,
        mlp=3,
        why=(
            "3 blocks, two with weights for the text and one without: joint attention and video "
            "feed-forward, an add each."
        ),
    ),
)

# -- Cosmos, Latte --------------------------------------------------------------------------------

COSMOS: dict[str, Any] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD,
    "num_layers": 2,
    "text_embed_dim": TEXT_WIDTH,
    "adaln_lora_dim": 12,
    "max_size": (8, 24, 26),
}
COSMOS_COUNTS: dict[str, Any] = {
    "grids": (GRID,),
    "sites": {"self": 2, "cross": 2},
    "attention": 4,
    "mlp": 2,
    "why": "2 blocks: self-attention, cross-attention, feed-forward, an add each.",
}


def cosmos(**changes: Any) -> CosmosTransformer3DModel:
    """Cosmos 1; without torchvision its resize is the interpolation that torchvision calls."""
    if not hasattr(transformer_cosmos, "transforms"):
        resize = SimpleNamespace(
            resize=lambda image, size, interpolation: interpolate(image, size, mode=interpolation)
        )
        modes = SimpleNamespace(NEAREST="nearest")
        stand_in = SimpleNamespace(functional=resize, InterpolationMode=modes)
        vars(transformer_cosmos)["transforms"] = stand_in
    return CosmosTransformer3DModel(**{**COSMOS, **changes})


def cosmos_inputs(seed: int) -> Inputs:
    """What CosmosTextToWorldPipeline passes; the mask has the size of the pixels."""
    return {
        "hidden_states": latents(seed),
        "timestep": times(seed),
        "encoder_hidden_states": text(seed),
        "fps": 30,
        "padding_mask": torch.zeros(1, 1, 16 * GRID[1], 16 * GRID[2]),
        "return_dict": False,
    }


def cosmos2_inputs(seed: int) -> Inputs:
    """What Cosmos2VideoToWorldPipeline passes: which frames are given, a time for each frame."""
    given = torch.zeros(2, 1, GRID[0], 2 * GRID[1], 2 * GRID[2])
    given[:, :, 0] = 1
    timestep = times(seed).view(2, 1, 1, 1, 1) / 1000 * (1 - given[..., :1, :1])
    return {
        **cosmos_inputs(seed),
        "fps": 16,
        "timestep": timestep + 0.0001,
        "condition_mask": given,
    }


def crop_cosmos2(inputs: Inputs) -> Inputs:
    return {
        **crop_mask(inputs),
        "condition_mask": cut(inputs["condition_mask"], (2, 6, 4)),
        "timestep": inputs["timestep"][:, :, : CORNER[0]],
    }


def crop_mask(inputs: Inputs) -> Inputs:
    return {"padding_mask": cut(inputs["padding_mask"], (16 * 3, 16 * 2), (-2, -1))}


LATTE: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": WIDTH,
    "attention_bias": True,
    "sample_size": 16,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": TEXT_WIDTH,
    "video_length": 5,
}


def latte_inputs(seed: int) -> Inputs:
    """What LattePipeline passes."""
    return {
        "hidden_states": latents(seed, 4, (5, 6, 8)),
        "encoder_hidden_states": text(seed),
        "timestep": times(seed),
        "enable_temporal_attentions": True,
        "return_dict": False,
    }


SANA: dict[str, Any] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD,
    "num_layers": 2,
    "num_cross_attention_heads": HEADS,
    "cross_attention_head_dim": HEAD,
    "cross_attention_dim": WIDTH,
    "caption_channels": TEXT_WIDTH,
    "rope_max_seq_len": 32,
}


def sana_inputs(seed: int) -> Inputs:
    """What SanaVideoPipeline passes."""
    return {
        "hidden_states": latents(seed),
        "encoder_hidden_states": text(seed),
        "encoder_attention_mask": text_mask(seed),
        "timestep": times(seed),
        "attention_kwargs": None,
        "return_dict": False,
    }


FRAME_CASES = (
    Case(
        name="cosmos",
        title="Cosmos 1 text-to-world",
        build=seeded(cosmos),
        inputs=cosmos_inputs,
        crop=crop(crop_mask),
        **COSMOS_COUNTS,
    ),
    Case(
        name="cosmos2",
        title="Cosmos 2 video-to-world (a timestep for each frame)",
        build=seeded(
            lambda: cosmos(
                in_channels=CHANNELS + 1, extra_pos_embed_type=None, rope_scale=(1.0, 3.0, 3.0)
            )
        ),
        inputs=cosmos2_inputs,
        crop=crop(crop_cosmos2),
        **COSMOS_COUNTS,
    ),
    Case(
        name="latte",
        title="Latte",
        build=seeded(lambda: LatteTransformer3DModel(**LATTE)),
        inputs=latte_inputs,
        grids=((6, 8),),
        sites={"self": 2, "cross": 2, "temporal": 2},
        attention=4,
        mlp=2,
        why=(
            "2 spatial blocks on frames as batch rows: self-attention, cross-attention, "
            "feed-forward. The 2 temporal blocks fold space into the batch: both of their "
            "branches stay."
        ),
    ),
    Case(
        name="sana_video",
        title="SANA-Video",
        build=seeded(lambda: SanaVideoTransformer3DModel(**SANA)),
        inputs=sana_inputs,
        grids=(GRID,),
        sites={"cross": 2, "linear": 2},
        attention=4,
        mlp=0,
        why=(
            "2 blocks: linear attention (sums over tokens, turned by rotary tables, which their "
            "normalization sees unturned) and cross-attention merge. The feed-forward has "
            "convolutions between tokens and frames: it stays."
        ),
    ),
)

CASES: tuple[Case, ...] = (
    *COGVIDEOX_CASES,
    *LTX_CASES,
    *WAN_CASES,
    *HUNYUAN_CASES,
    *HISTORY_CASES,
    *OTHER_CASES,
    *FRAME_CASES,
)

"""Vision models of other packages, small and with random weights.

Users run them beside a denoiser.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.zoo.base import lively, randn


@dataclass(frozen=True)
class Vision:
    """A vision model.

    Attributes:
        package: that it is from. build: makes it. side: of its pictures, in pixels.
        options: further arguments of a call.
    """

    package: str
    build: Callable[[], nn.Module]
    side: int = 32
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """Arguments of a call: two pictures of noise."""
        name = next(iter(inspect.signature(model.forward).parameters))
        return {name: randn(seed, 2, 3, self.side, self.side), **self.options}

    def model(self) -> nn.Module:
        """The model in evaluation mode, its weights large enough that every token matters."""
        torch.manual_seed(0)
        model, g = lively(self.build()), torch.Generator().manual_seed(5)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    noise = torch.randn(weight.shape, generator=g)
                    weight.copy_(noise * max(weight[0].numel(), 1) ** -0.5)
        return model


MODELS: dict[str, Vision] = {}


def _add(package: str, name: str, path: str, side: int = 32, **options: Any) -> None:
    """A class of a package, by module and name."""
    module, _, cls = path.rpartition(".")

    def build() -> nn.Module:
        model = getattr(importlib.import_module(f"{package}.{module}"), cls)(**options)
        assert isinstance(model, nn.Module)
        return model

    MODELS[name] = Vision(package, build, side)


# -- timm -----------------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {
    "img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0,
    "num_classes": 10,
}  # fmt: skip


def _timm(name: str, path: str, side: int = 32, **options: Any) -> None:
    _add("timm", f"timm-{name}", f"models.{path}", side, **options)


_timm("vit", "vision_transformer.VisionTransformer", **PLAIN)
_timm(
    "vit-average",
    "vision_transformer.VisionTransformer",
    **{**PLAIN, "class_token": False, "global_pool": "avg", "qk_norm": True},
)
_timm(
    "vit-registers",
    "vision_transformer.VisionTransformer",
    **{**PLAIN, "reg_tokens": 4, "init_values": 0.5, "no_embed_class": True},
)
_timm("vit-map", "vision_transformer.VisionTransformer", **{**PLAIN, "global_pool": "map"})
_timm("vit-dynamic", "vision_transformer.VisionTransformer", **{**PLAIN, "dynamic_img_size": True})
_timm("deit", "deit.VisionTransformerDistilled", **PLAIN)
_timm("vit-relpos", "vision_transformer_relpos.VisionTransformerRelPos", **PLAIN)
_timm(
    "vit-relpos-table",
    "vision_transformer_relpos.VisionTransformerRelPos",
    **{**PLAIN, "rel_pos_type": "bias", "class_token": True, "shared_rel_pos": True},
)
_timm("eva", "eva.Eva", **PLAIN)
_timm("eva02", "eva.Eva", **{**PLAIN, "use_rot_pos_emb": True, "swiglu_mlp": True})
_timm("beit", "beit.Beit", **{**PLAIN, "use_rel_pos_bias": True, "init_values": 0.1})
_timm("beit-shared", "beit.Beit", **{**PLAIN, "use_shared_rel_pos_bias": True})
_timm("cait", "cait.Cait", **PLAIN)
_timm("convit", "convit.ConVit", **{**PLAIN, "local_up_to_layer": 1})
_timm("mlp-mixer", "mlp_mixer.MlpMixer", img_size=32, patch_size=4, num_blocks=2, embed_dim=32)
_timm("xcit", "xcit.Xcit", 64, **{**PLAIN, "img_size": 64, "patch_size": 8})
_timm(
    "sam", "vision_transformer_sam.VisionTransformerSAM",
    **{**PLAIN, "window_size": 4, "global_attn_indexes": (1,), "use_rel_pos": True},
)  # fmt: skip
_timm("naflexvit", "naflexvit.NaFlexVit", 64, img_size=64)
STAGES: dict[str, Any] = {
    "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2),
    "num_heads": (2, 4), "num_classes": 10,
}  # fmt: skip
_timm("swin", "swin_transformer.SwinTransformer", **STAGES)
_timm("swin-v2", "swin_transformer_v2.SwinTransformerV2", **STAGES)
_timm("swin-v2-cr", "swin_transformer_v2_cr.SwinTransformerV2Cr", **STAGES)
_timm(
    "pvt", "pvt_v2.PyramidVisionTransformerV2", 64,
    depths=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32), num_heads=(1, 2, 2, 2),
)  # fmt: skip
_timm(
    "hiera", "hiera.Hiera", 64, img_size=(64, 64), embed_dim=16, stages=(1, 1, 1, 1),
    mask_unit_attn=(True, True, False, False), patch_kernel=(3, 3), patch_stride=(2, 2),
    patch_padding=(1, 1), mask_unit_size=(8, 8),
)  # fmt: skip
_timm(
    "sam2", "hieradet_sam2.HieraDet", 64, embed_dim=16, stages=(1, 1, 2, 1), global_att_blocks=(3,),
    patch_kernel=(3, 3), patch_stride=(2, 2), patch_padding=(1, 1), window_spec=(8, 4, 4, 2),
)  # fmt: skip
_timm(
    "davit", "davit.DaVit", 64, depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 2),
    window_size=4,
)  # fmt: skip
_timm(
    "coat", "coat.CoaT", 64, img_size=64, patch_size=4, embed_dims=(64, 64, 64, 64),
    serial_depths=(1, 1, 1, 1), num_heads=8,
)  # fmt: skip
_timm(
    "crossvit", "crossvit.CrossVit", 48, img_size=48, patch_size=(4, 8), embed_dim=(16, 32),
    depth=((1, 1, 0),), num_heads=(2, 2), mlp_ratio=(2, 2, 1),
)  # fmt: skip
_timm(
    "gcvit", "gcvit.GlobalContextVit", 64, img_size=64, window_ratio=(16, 16), embed_dim=16,
    depths=(2, 2), num_heads=(2, 2),
)  # fmt: skip
_timm(
    "nest", "nest.Nest", img_size=32, patch_size=2, num_levels=2, embed_dims=(16, 32),
    num_heads=(2, 2), depths=(1, 1),
)  # fmt: skip
_timm(
    "pit", "pit.PoolingVisionTransformer", 34, img_size=34, patch_size=4, stride=2,
    base_dims=(8, 8), depth=(1, 1), heads=(2, 4),
)  # fmt: skip
_timm(
    "tnt", "tnt.TNT", img_size=32, patch_size=8, embed_dim=32, inner_dim=8, depth=1,
    num_heads_inner=2, num_heads_outer=2,
)  # fmt: skip
_timm(
    "twins", "twins.Twins", 64, img_size=64, patch_size=4, embed_dims=(16, 16), num_heads=(2, 2),
    mlp_ratios=(2, 2), depths=(1, 1), sr_ratios=(4, 2),
)  # fmt: skip
_timm("twins-windows", "twins.Twins", 64, img_size=64, patch_size=4, embed_dims=(16, 16),
    num_heads=(2, 2), mlp_ratios=(2, 2), depths=(2, 2), sr_ratios=(4, 2), wss=(4, 4))  # fmt: skip
_timm(
    "volo", "volo.VOLO", 64, layers=(1, 1), img_size=64, patch_size=8, stem_hidden_dim=16,
    embed_dims=(16, 32), num_heads=(2, 2), downsamples=(True, False),
    outlook_attention=(True, False),
)  # fmt: skip
_timm("visformer", "visformer.Visformer", 64, img_size=64, patch_size=16, init_channels=8,
    embed_dim=32, depth=(1, 1, 1), num_heads=2, group=2)  # fmt: skip
_timm(
    "tiny-vit", "tiny_vit.TinyVit", 64, embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1),
    num_heads=(1, 2, 2, 2), window_sizes=(4, 4, 4, 2),
)  # fmt: skip
_timm(
    "efficientvit", "efficientvit_mit.EfficientVit", 64, widths=(8, 8, 16, 16),
    depths=(1, 1, 1, 1), head_dim=8, head_widths=(16, 16),
)  # fmt: skip
_timm("edgenext", "edgenext.EdgeNeXt", 64, dims=(8, 16, 16, 32), depths=(1, 1, 1, 1),
    global_block_counts=(0, 1, 1, 1), heads=(2, 2, 2, 2))  # fmt: skip
_timm("focalnet", "focalnet.FocalNet", 64, embed_dim=16, depths=(1, 1))
_timm("levit", "levit.Levit", 64, img_size=64, embed_dim=(16, 16), key_dim=8, depth=(1, 1),
    num_heads=(2, 2))  # fmt: skip


def _maxvit() -> nn.Module:
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg

    attention = MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4))
    config = MaxxVitCfg(
        embed_dim=(16, 16), depths=(1, 1), block_type=("M", "M"), stem_width=8,
        transformer_cfg=attention,
    )  # fmt: skip
    return MaxxVit(config, img_size=32, num_classes=10)


def _mvit() -> nn.Module:
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    config = MultiScaleVitCfg(depths=(1, 1), embed_dim=16, num_heads=1, use_cls_token=False)
    return MultiScaleVit(config, img_size=(32, 32), num_classes=10)


MODELS["timm-maxvit"] = Vision("timm", _maxvit)
MODELS["timm-mvit"] = Vision("timm", _mvit)


# -- torchvision ----------------------------------------------------------------------------------

_add(
    "torchvision", "torchvision-vit", "models.vision_transformer.VisionTransformer", image_size=32,
    patch_size=4, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10,
)  # fmt: skip
WINDOWS: dict[str, Any] = {
    "patch_size": [2, 2], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
    "window_size": [4, 4], "num_classes": 10,
}  # fmt: skip


def _swin(v2: bool) -> Vision:
    def build() -> nn.Module:
        from torchvision.models import swin_transformer as s

        more = {"block": s.SwinTransformerBlockV2, "downsample_layer": s.PatchMergingV2}
        return s.SwinTransformer(**WINDOWS, **(more if v2 else {}))

    return Vision("torchvision", build)


MODELS["torchvision-swin"] = _swin(False)
MODELS["torchvision-swin-v2"] = _swin(True)
_add(
    "torchvision", "torchvision-maxvit", "models.maxvit.MaxVit", input_size=(32, 32),
    stem_channels=8, partition_size=4, block_channels=[16, 16], block_layers=[1, 1], head_dim=8,
    stochastic_depth_prob=0.0, num_classes=10,
)  # fmt: skip


# -- transformers ---------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "image_size": 32, "patch_size": 4,
}  # fmt: skip


def _transformers(
    name: str, cls: str, side: int = 32, config: str = "", made: Any = None, **options: Any
) -> None:
    """A class of transformers with its configuration: `XModel(XConfig(**options), **made)`."""

    def build() -> nn.Module:
        import transformers

        stem = cls
        for end in ("ForDepthEstimation", "Backbone", "Model"):
            stem = stem.removesuffix(end)
        known = getattr(transformers, config or f"{stem}Config")(**options)
        model = getattr(transformers, cls)(known, **(made or {}))
        assert isinstance(model, nn.Module)
        return model

    MODELS[name] = Vision("transformers", build, side, {"return_dict": False})


_transformers("vit", "ViTModel", made={"add_pooling_layer": False}, **SMALL)
_transformers("dinov2", "Dinov2Model", **{**SMALL, "mlp_ratio": 2})
_transformers("dinov2-registers", "Dinov2WithRegistersModel", **{**SMALL, "mlp_ratio": 2})
_transformers("dinov3", "DINOv3ViTModel", **{**SMALL, "num_register_tokens": 2})
_transformers("siglip", "SiglipVisionModel", **SMALL)
_transformers("clip", "CLIPVisionModel", **SMALL)
_transformers("beit", "BeitModel", **{**SMALL, "use_relative_position_bias": True})
_transformers(
    "data2vec", "Data2VecVisionModel", **{**SMALL, "use_shared_relative_position_bias": True}
)
_transformers("deit", "DeiTModel", **SMALL)
_transformers("ijepa", "IJepaModel", **SMALL)
_transformers("vit-msn", "ViTMSNModel", **SMALL)
_transformers("yolos", "YolosModel", **{**SMALL, "image_size": [32, 32], "num_detection_tokens": 4})
_transformers("vitdet", "VitDetModel", **{**SMALL, "window_size": 4, "window_block_indices": [0],
    "mlp_ratio": 2})  # fmt: skip
_transformers(
    "dpt", "DPTForDepthEstimation",
    **{**SMALL, "backbone_out_indices": [0, 1, 2, 3], "num_hidden_layers": 4},
    neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
)  # fmt: skip
SAM: dict[str, Any] = {**SMALL, "mlp_dim": 48, "window_size": 4, "global_attn_indexes": [1]}
del SAM["intermediate_size"]
_transformers("sam", "SamVisionModel", **SAM, output_channels=16)
SWIN: dict[str, Any] = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
    "window_size": 4,
}  # fmt: skip
_transformers("swin", "SwinModel", **SWIN)
_transformers("swin-v2", "Swinv2Model", **SWIN)
_transformers(
    "pvt", "PvtModel", 64, image_size=64, depths=[1, 1, 1, 1], hidden_sizes=[16, 16, 32, 32],
    num_attention_heads=[1, 2, 2, 2],
)  # fmt: skip
_transformers(
    "segformer", "SegformerModel", 64, depths=[1, 1, 1, 1], hidden_sizes=[16, 16, 32, 32],
    num_attention_heads=[1, 2, 2, 2],
)  # fmt: skip
_transformers(
    "hiera", "HieraModel", 64, image_size=[64, 64], embed_dim=16, depths=[1, 1, 1, 1],
    patch_size=[3, 3], patch_stride=[2, 2], patch_padding=[1, 1], num_heads=[1, 2, 4, 8],
)  # fmt: skip
_transformers(
    "mobilevit", "MobileViTModel", 64, image_size=64, hidden_sizes=[16, 16, 16],
    neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
)  # fmt: skip
_transformers("cvt", "CvtModel", 64, embed_dim=[8, 16, 16], num_heads=[1, 2, 2], depth=[1, 2, 3])
_transformers("glpn", "GLPNModel", 64, depths=[1, 1, 1, 1], hidden_sizes=[16, 16, 32, 32],
    num_attention_heads=[1, 2, 2, 2])  # fmt: skip

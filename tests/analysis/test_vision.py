"""Vision models of transformers: what merges is right, the rest is refused with its reason.

Users run them beside a denoiser. Pictures become tokens by a convolution, a class token joins them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.zoo.base import Case, lively, randn
from tests.zoo.check import Traced, permuted, trace
from toma_fx.errors import NoMergeSites

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "image_size": 32, "patch_size": 4,
}  # fmt: skip


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**SMALL), add_pooling_layer=False)


def dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**SMALL, mlp_ratio=2))


def dinov2_with_registers() -> nn.Module:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2))


def siglip() -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**SMALL))


def clip() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**SMALL))


def sam() -> nn.Module:
    """Windows of 4x4 tokens, and one layer that sees all."""
    from transformers import SamVisionConfig, SamVisionModel

    sizes = {**SMALL, "mlp_dim": 48, "window_size": 4, "global_attn_indexes": [1]}
    del sizes["intermediate_size"]
    return SamVisionModel(SamVisionConfig(**sizes, output_channels=16))


def dpt() -> nn.Module:
    from transformers import DPTConfig, DPTForDepthEstimation

    sizes: dict[str, Any] = {**SMALL, "backbone_out_indices": [0, 1, 2, 3], "num_hidden_layers": 4}
    return DPTForDepthEstimation(
        DPTConfig(**sizes, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "vit": (vit, "joint", 2),
    "dinov2": (dinov2, "joint", 2),
    "dinov2_with_registers": (dinov2_with_registers, "joint", 2),
    "siglip": (siglip, "self", 2),
    "clip": (clip, "joint", 2),
    "dpt": (dpt, "joint", 4),
}
"""How to build it, the kind of its attentions, and how many blocks of attention and MLP it has."""


def pictures(seed: int) -> dict[str, Any]:
    return {"pixel_values": randn(seed, 2, 3, 32, 32), "return_dict": False}


def traced_model(build: Callable[[], nn.Module]) -> Traced:
    torch.manual_seed(0)
    model = lively(build())
    return trace(Case("vision", "", lambda: model, pictures), exact=False)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_block_merges(name: str) -> None:
    build, kind, blocks = MODELS[name]
    traced = traced_model(build)
    assert Counter(site.kind for site in traced.analysis.sites) == {kind: blocks}
    plan = traced.plan(scope="sublayer")
    assert Counter(k for s in plan.segments for k in s.kinds) == {
        "attention": blocks,
        "mlp": blocks,
    }
    assert {s.image.grid for s in plan.segments} == {(8, 8)}
    for scope in ("sublayer", "stack"):
        permuted(traced, scope)
    assert all(r.kind != "no_rule" for r in traced.analysis.refusals.values())


@torch.no_grad()
def test_streams_that_stay_pictures_are_refused() -> None:
    """SAM's are [batch, height, width, channels]: only inside its attention there are tokens."""
    traced = traced_model(sam)
    assert Counter(site.kind for site in traced.analysis.sites) == {"self": 2}
    with pytest.raises(NoMergeSites) as error:
        traced.plan(scope="sublayer")
    assert all("tokens are laid out as a spatial grid" in r for r in error.value.reasons)

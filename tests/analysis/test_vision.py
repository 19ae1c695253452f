"""Vision models of other packages: what merges is right, the rest is refused with its reason.

Users run them beside a denoiser. Pictures become tokens by a convolution, a class token joins them;
in others the picture is cut into windows, each of which is a row of a batch then.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
import torch

from tests.vision_models import MODELS
from tests.zoo.base import Case
from tests.zoo.check import Traced, difference, permuted, trace, twinned
from toma_fx.errors import NoMergeSites

SPATIAL = "tokens are laid out as a spatial grid"
FEW = "fewer than min_tokens=16"
NEITHER = "holds neither attention nor MLP"
ONE_TOKEN = "selection of one index of the token axis"
CLASS = "its queries carry no image tokens"


@dataclass(frozen=True)
class Expected:
    """What the model's code lets expect.

    Attributes:
        sites: attentions by kind. merged: segments in scope "sublayer" by what they hold.
        refused: why the rest does not merge, each part of a reason.
    """

    sites: dict[str, int] = field(default_factory=dict)
    merged: dict[str, int] = field(default_factory=dict)
    refused: tuple[str, ...] = ()


def every(kind: str, blocks: int, *refused: str, **more: int) -> Expected:
    """Every block merges."""
    return Expected({kind: blocks, **more}, {"attention": blocks, "mlp": blocks}, refused)


REDUCED = Expected({"cross": 3, "self": 1}, {"cross": 3}, (FEW,))
"""Keys are of a smaller picture; the last of four stages has four tokens."""
WINDOWS = every("self", 4)
EXPECTED: dict[str, Expected] = {
    "timm-vit": every("joint", 2),
    "timm-vit-average": every("self", 2),
    "timm-vit-registers": every("joint", 2),
    "timm-vit-map": every("joint", 2, CLASS, text=1),
    "timm-vit-dynamic": every("joint", 2),
    "timm-deit": every("joint", 2),
    "timm-vit-relpos": every("self", 2),
    "timm-vit-relpos-table": every("joint", 2),
    "timm-eva": every("joint", 2),
    "timm-eva02": every("joint", 2),
    "timm-beit": every("joint", 2),
    "timm-beit-shared": every("joint", 2),
    # heads exchange their shares of the keys, which are none then
    "timm-cait": Expected(
        {"self": 2, "unknown": 2}, {"mlp": 2}, ("a sum over tokens without softmax", ONE_TOKEN)
    ),
    # shares are mixed with those of positions and divided by their sum
    "timm-convit": Expected(
        {"joint": 1, "self": 1},
        {"attention": 1, "mlp": 2},
        ("a reduction over the token axis", "a sum over tokens without softmax"),
    ),
    "timm-mlp-mixer": Expected({}, {"mlp": 2}, ("a linear map over the token axis",)),
    # attention between channels, whose norms are over tokens
    "timm-xcit": Expected(
        {"linear": 2, "unknown": 2},
        {"mlp": 2},
        (
            "a reduction over the token axis (aten.linalg_vector_norm)",
            ONE_TOKEN,
            "the same tokens meet in another order",
        ),
    ),
    "timm-sam": Expected({"self": 2}, {"mlp": 2}, (SPATIAL,)),
    "timm-naflexvit": every("self", 12, CLASS, text=1),
    "timm-swin": WINDOWS,
    "timm-swin-v2": WINDOWS,
    "timm-swin-v2-cr": WINDOWS,
    "timm-pvt": REDUCED,
    # tokens are sorted by the window they are in, several sizes of windows at once
    "timm-hiera": Expected(
        {"temporal": 1, "unknown": 3},
        {},
        (
            "it mixes rows of the batch",
            "are batched over different tokens",
            "two token axes in one value",
        ),
    ),
    "timm-sam2": Expected({"cross": 3, "self": 2}, {"attention": 1, "cross": 1}, (SPATIAL, FEW)),
    "timm-davit": Expected({"linear": 2, "self": 2}, {"attention": 4, "mlp": 4}, (NEITHER,)),
    "timm-coat": Expected({}, {"mlp": 3}, (NEITHER, FEW, "the same tokens meet in another order")),
    "timm-crossvit": every("joint", 2, ONE_TOKEN, text=2),
    "timm-gcvit": Expected({"self": 2}, {"attention": 2}),
    "timm-nest": Expected({"self": 2}, {}, (SPATIAL,)),
    "timm-pit": every("joint", 2),
    "timm-tnt": Expected({"self": 1}, {}, (FEW,)),
    "timm-twins": Expected({"cross": 2}, {"cross": 2, "mlp": 2}),
    "timm-twins-windows": Expected({"cross": 2, "self": 2}, {"cross": 2, "mlp": 6}, (SPATIAL,)),
    "timm-volo": Expected(
        {"self": 1}, {"attention": 1}, ("a matrix product over token axes (aten.matmul)",)
    ),
    "timm-visformer": Expected({"self": 3}, {}, (SPATIAL,)),
    "timm-tiny-vit": Expected({"self": 3}, {"attention": 2, "mlp": 2}, (FEW,)),
    "timm-efficientvit": Expected({"linear": 1}, {}, (SPATIAL,)),
    "timm-edgenext": Expected({"linear": 3}, {}, ("a reduction over the token axis",)),
    "timm-focalnet": Expected(),
    "timm-levit": Expected(
        {"cross": 1, "self": 2},
        {"attention": 1, "mlp": 1},
        (FEW, "a reduction over the token axis (aten.mean)"),
    ),
    "timm-maxvit": Expected({"self": 4}, {"attention": 4}),
    "timm-mvit": Expected(
        {"cross": 2}, {"mlp": 2}, ("a matrix product over token axes (aten.matmul)",)
    ),
    "torchvision-vit": every("joint", 2),
    "torchvision-swin": Expected({"self": 4}, {"attention": 4}),
    "torchvision-swin-v2": Expected({"self": 4}, {"attention": 4}),
    "torchvision-maxvit": Expected({"self": 3}, {}, (SPATIAL,)),
    "vit": every("joint", 2),
    "dinov2": every("joint", 2),
    "dinov2-registers": every("joint", 2),
    "dinov3": every("joint", 2),
    "siglip": every("self", 2),
    "clip": every("joint", 2),
    "beit": every("joint", 2),
    "data2vec": every("joint", 2),
    "deit": every("joint", 2),
    "ijepa": every("self", 2),
    "vit-msn": every("joint", 2),
    "yolos": every("joint", 2),
    "vitdet": Expected({"self": 2}, {}, (SPATIAL,)),
    "dpt": every("joint", 4),
    "sam": Expected({"self": 2}, {}, (SPATIAL,)),
    "swin": WINDOWS,
    "swin-v2": WINDOWS,
    "pvt": Expected({"cross": 3, "joint": 1}, {"cross": 3, "mlp": 3}, (FEW,)),
    "segformer": REDUCED,
    "hiera": Expected(),
    "mobilevit": Expected(),
    # keys and values are convolved apart: they are tokens of two pictures
    "cvt": Expected({"cross": 6}, {"mlp": 6}, (NEITHER, "a sum over the token axis or its batch")),
    "glpn": REDUCED,
}


def traced_model(name: str) -> Traced:
    """A model, captured; its package may be missing."""
    vision = MODELS[name]
    pytest.importorskip(vision.package)
    model = vision.model()
    return trace(
        Case(name, "", lambda: model, lambda seed: vision.inputs(model, seed)), exact=False
    )


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_merges_or_says_why_not(name: str) -> None:
    expected, traced = EXPECTED[name], traced_model(name)
    assert Counter(site.kind for site in traced.analysis.sites) == expected.sites
    try:
        plan = traced.plan(scope="sublayer")
        merged = Counter("+".join(s.kinds) for s in plan.segments)
        refused = [str(r.reason) for r in plan.rejections]
    except NoMergeSites as error:
        merged, refused = Counter(), list(error.reasons)
    assert merged == expected.merged
    for text in refused:
        assert any(reason in text for reason in expected.refused), text
    for reason in expected.refused:
        assert any(reason in text for text in refused), refused
    for scope in ("sublayer", "stack") if merged else ():
        permuted(traced, scope)
        with suppress(NoMergeSites):  # keys of attention that is written out have no sizes
            twinned(traced, scope)
        changed = difference(traced.run(traced.plan(scope=scope), "refresh"), traced.expected)
        assert 1e-3 < changed < float("inf"), f"merging changes the output by {changed:.1e}"


def test_all_are_expected() -> None:
    assert EXPECTED.keys() == MODELS.keys()

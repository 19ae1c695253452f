"""The plug-in of ComfyUI in ComfyUI: its patcher, samplers, UNet and Flux, tiny and on a CPU.

    COMFYUI=/path/to/ComfyUI python -m pytest -m "" -n 0 tests/serving/test_comfyui_itself.py

It needs what ComfyUI needs besides (its requirements.txt).
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from toma_fx.serving import comfyui

MERGE: dict[str, Any] = {"min_tokens": 1, "destinations_every": 3}
UNET = {
    "image_size": 32, "in_channels": 4, "model_channels": 32, "out_channels": 4,
    "num_res_blocks": [1, 1], "channel_mult": (1, 2), "num_classes": "sequential",
    "adm_in_channels": 2816, "num_head_channels": 16, "use_spatial_transformer": True,
    "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1, "context_dim": 12, "use_linear_in_transformer": True,
    "legacy": False, "dtype": torch.float32,
}  # fmt: skip
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 8,
    "context_in_dim": 12, "hidden_size": 48, "mlp_ratio": 4.0, "num_heads": 3, "depth": 2,
    "depth_single_blocks": 2, "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2,
    "qkv_bias": True, "guidance_embed": True, "dtype": torch.float32,
}  # fmt: skip


@cache
def comfy() -> Any:
    """ComfyUI's package, on the CPU; skips where it is not."""
    folder = os.environ.get("COMFYUI")
    if not folder:
        pytest.skip("the variable COMFYUI names no folder of ComfyUI, which is no package of PyPI")
    sys.path.insert(0, folder)
    arguments, sys.argv = sys.argv, sys.argv[:1]  # it reads them while it is imported
    try:
        from comfy.cli_args import args  # type: ignore[import-not-found]

        args.cpu = True
        import comfy.model_base  # type: ignore[import-not-found]
        import comfy.model_patcher  # type: ignore[import-not-found]
        import comfy.ops  # type: ignore[import-not-found]
        import comfy.patcher_extension  # type: ignore[import-not-found]
        import comfy.samplers  # type: ignore[import-not-found]
        import comfy.supported_models  # type: ignore[import-not-found]
    finally:
        sys.argv = arguments
    return comfy


def with_wrappers(flux: nn.Module) -> nn.Module:
    """Flux with wrappers around its call, as later versions have them."""
    extension, kind = comfy().patcher_extension, type(flux)
    if hasattr(kind, "_forward"):
        return flux

    def forward(
        self: Any, x: Tensor, timestep: Tensor, context: Any, y: Any = None, guidance: Any = None,
        control: Any = None, transformer_options: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        wrappers = extension.get_all_wrappers("diffusion_model", transformer_options)
        return extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers).execute(
            x, timestep, context, y, guidance, control, transformer_options, **kwargs
        )

    flux.__class__ = type("Flux", (kind,), {"forward": forward, "_forward": kind.forward})
    return flux


@cache
def model_of(name: str, dtype: torch.dtype = torch.float32, cast: Any = None) -> tuple[Any, Any]:
    """A MODEL with random weights, and conditions of both sides.

    Args:
        dtype: of the weights. cast: the dtype in which they compute, if it is another one.
    """
    own = comfy()
    torch.manual_seed(0)
    config = getattr(own.supported_models, name)(dict(UNET if name == "SDXL" else FLUX))
    config.set_inference_dtype(dtype, cast)
    config.custom_operations = own.ops.manual_cast if cast else own.ops.disable_weight_init
    with torch.inference_mode():
        base = getattr(own.model_base, name)(config)
        for parameter in base.diffusion_model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.08 if name == "SDXL" else 0.15))
        if name == "Flux":
            with_wrappers(base.diffusion_model)
        width = 1280 if name == "SDXL" else 8
        sides = tuple(
            [[torch.randn(1, 7, 12), {"pooled_output": torch.randn(1, width), "guidance": 3.5}]]
            for _ in range(2)
        )
    cpu = torch.device("cpu")
    return own.model_patcher.ModelPatcher(base, cpu, cpu), sides


@torch.inference_mode()
def picture(
    model: Any, sides: Any, *, sampler: str = "euler", seed: int = 1, **more: Any
) -> Tensor:
    own = comfy()
    guider = own.samplers.CFGGuider(model)
    guider.set_conds(*sides)
    guider.set_cfg(4.0)
    sigmas = own.samplers.calculate_sigmas(model.model.model_sampling, "simple", 6)
    channels = model.model.diffusion_model.in_channels
    channels = 16 if channels == 64 else channels  # of Flux, the channels of a patch
    noise = torch.randn(1, channels, 32, 32, generator=torch.Generator().manual_seed(seed))
    out: Tensor = guider.sample(
        noise, torch.zeros_like(noise), own.samplers.sampler_object(sampler), sigmas,
        disable_pbar=True, seed=seed, **more,
    )  # fmt: skip
    return out


def totals(model: Any) -> dict[str, int]:
    (wrapper,) = model.wrappers["diffusion_model"][comfyui.KEY]
    steps: dict[str, int] = wrapper.__self__.optimized(model.model.diffusion_model).totals
    return steps


@pytest.mark.parametrize("name", ["SDXL", "Flux"])
def test_a_picture(name: str) -> None:
    model, sides = model_of(name)
    original = picture(model, sides)
    assert torch.equal(picture(comfyui.accelerate(model, ratio=0.0), sides), original)
    on = comfyui.accelerate(model, **MERGE)
    merged = picture(on, sides)
    assert totals(on)["refresh"] == 2
    assert sum(totals(on).values()) == 6
    assert not torch.equal(merged, original)
    assert not torch.equal(picture(on, sides, seed=2), merged)
    assert torch.equal(picture(on, sides), merged)
    assert torch.equal(picture(model, sides), original)


@pytest.mark.parametrize(
    ("dtype", "cast"),
    [
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
    ],
)
def test_dtypes(dtype: torch.dtype, cast: torch.dtype | None) -> None:
    """Weights that are cast at every use are so in the graph."""
    model, sides = model_of("SDXL", dtype, cast)
    assert {p.dtype for p in model.model.diffusion_model.parameters()} == {dtype}
    original = picture(model, sides)
    assert torch.equal(picture(comfyui.accelerate(model, ratio=0.0), sides), original)
    on = comfyui.accelerate(model, **MERGE)
    assert not torch.equal(picture(on, sides), original)
    assert sum(totals(on).values()) == 6


def test_regions() -> None:
    """Conditions of parts of a picture: passes of their own, of another size."""
    model, sides = model_of("SDXL")
    left = [sides[0][0][0], {**sides[0][0][1], "area": (32, 16, 0, 0), "strength": 1.0}]
    on = comfyui.accelerate(model, **MERGE)
    regions = ([*sides[0], left], sides[1])
    assert not torch.equal(picture(on, regions), picture(model, regions))
    assert totals(on)["refresh"] == 4
    assert sum(totals(on).values()) == 12


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "uni_pc"])
def test_samplers(sampler: str) -> None:
    model, sides = model_of("SDXL")
    on = comfyui.accelerate(model, **MERGE)
    assert not torch.equal(
        picture(on, sides, sampler=sampler), picture(model, sides, sampler=sampler)
    )
    assert sum(totals(on).values()) == (11 if sampler == "heun" else 6)


def test_sides_of_different_length() -> None:
    """They can't share a batch: each is a pass with tokens of its own."""
    model, sides = model_of("SDXL")
    longer = [[torch.randn(1, 11, 12), sides[1][0][1]]]
    on = comfyui.accelerate(model, **MERGE)
    picture(on, (sides[0], longer))
    assert totals(on)["refresh"] == 4
    assert sum(totals(on).values()) == 12


def test_lora_patches_and_an_interrupt() -> None:
    model, sides = model_of("SDXL")
    on = comfyui.accelerate(model, **MERGE)
    plain = picture(on, sides)
    key = next(k for k in model.model.state_dict() if k.endswith("attn1.to_q.weight"))
    change = {key: ("diff", (torch.randn_like(model.model.state_dict()[key]),))}
    adapted, by_hand = on.clone(), model.clone()
    for each in (adapted, by_hand):
        assert each.add_patches(change, 1.0) == [key]
    got = picture(adapted, sides)
    assert torch.equal(got, picture(comfyui.accelerate(by_hand, **MERGE), sides))
    assert not torch.equal(got, plain)
    assert torch.equal(picture(on, sides), plain)

    def stop(step: int, *_: Any) -> None:
        if step == 2:
            raise comfy().model_management.InterruptProcessingException

    with pytest.raises(comfy().model_management.InterruptProcessingException):
        picture(on, sides, callback=stop)
    assert torch.equal(picture(on, sides), plain)


def test_a_patch_of_attention_runs_the_original() -> None:
    model, sides = model_of("SDXL")
    on, plain = comfyui.accelerate(model, **MERGE), model.clone()
    for each in (on, plain):
        each.set_model_attn1_patch(lambda n, context, value, extra: (n * 0.5, context, value))
    assert torch.equal(picture(on, sides), picture(plain, sides))
    assert totals(on) == {}

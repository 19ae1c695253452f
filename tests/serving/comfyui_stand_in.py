"""What the plug-in uses of ComfyUI, written anew from its interface: none of its code is here.

    KSampler -> CFGGuider -> sampler -> BaseModel.apply_model -> UNetModel.forward -> wrappers

Batches of conditional and unconditional rows, or one after the other; options made anew at every
call; a model that writes to its options and empties the lists of a ControlNet.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Interrupted(Exception):
    """Stands in for ComfyUI's exception, which is known by its name."""


Interrupted.__name__ = "InterruptProcessingException"


class WrapperExecutor:
    """Calls wrappers one inside the other, and the function at last."""

    def __init__(self, original: Any, class_obj: Any, wrappers: list[Any], idx: int = 0) -> None:
        self.original, self.class_obj, self.wrappers, self.idx = original, class_obj, wrappers, idx

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner = WrapperExecutor(self.original, self.class_obj, self.wrappers, self.idx + 1)
        return inner.execute(*args, **kwargs)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if self.idx == len(self.wrappers):
            return self.original(*args, **kwargs)
        return self.wrappers[self.idx](self, *args, **kwargs)


def wrappers_of(kind: str, options: dict[str, Any]) -> list[Any]:
    return [w for own in options.get("wrappers", {}).get(kind, {}).values() for w in own]


class ModelPatcher:
    """A MODEL: the model is shared by its clones, what is set on it is not."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        self.dynamic = False
        self.cached_patcher_init: Any = (copy.deepcopy, (model,))

    def is_dynamic(self) -> bool:
        return self.dynamic

    def clone(self, disable_dynamic: bool = False) -> ModelPatcher:
        whole = self.dynamic and disable_dynamic
        clone = ModelPatcher(copy.deepcopy(self.model) if whole else self.model)
        clone.dynamic = self.dynamic and not whole
        clone.model_options = copy.deepcopy(self.model_options)
        clone.wrappers = {
            kind: {key: list(w) for key, w in own.items()} for kind, own in self.wrappers.items()
        }
        return clone

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def set_model_attn1_patch(self, patch: Any) -> None:
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches["attn1_patch"] = [*patches.get("attn1_patch", ()), patch]


# -- a UNet of the same structure -----------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, _, c = x.shape
        q, k, v = (
            t.view(b, -1, self.heads, c // self.heads).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).reshape(b, -1, c))


class Transformer(nn.Module):
    """Self-attention, cross-attention and a gated MLP on the pixels of a picture."""

    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.proj_in = nn.Linear(channels, channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1 = Attention(channels, channels, heads)
        self.attn2 = Attention(channels, context, heads)
        self.up, self.down = nn.Linear(channels, 8 * channels), nn.Linear(4 * channels, channels)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.proj_in(self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c))
        n = self.norm1(tokens)
        for patch in transformer_options.get("patches", {}).get("attn1_patch", ()):
            n = patch(n)
        tokens = tokens + self.attn1(n, n)
        tokens = tokens + self.attn2(self.norm2(tokens), context)
        value, gate = self.up(self.norm3(tokens)).chunk(2, dim=-1)
        tokens = tokens + self.down(value * F.gelu(gate))
        return x + self.proj_out(tokens).reshape(b, h, w, c).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    def __init__(self, channels: int, out: int, emb: int) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.GroupNorm(4, channels), nn.GroupNorm(4, out)
        self.conv_in = nn.Conv2d(channels, out, 3, padding=1)
        self.conv_out = nn.Conv2d(out, out, 3, padding=1)
        self.emb = nn.Linear(emb, out)
        self.skip = nn.Conv2d(channels, out, 1) if out != channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv_in(F.silu(self.norm_in(x)))
        h = h + self.emb(F.silu(emb))[:, :, None, None]
        return self.skip(x) + self.conv_out(F.silu(self.norm_out(h)))


class UNetModel(nn.Module):
    """Two levels; attention at the finer one, and there on the way down."""

    def __init__(self, channels: int = 16, context: int = 12) -> None:
        super().__init__()
        self.channels = channels
        emb = 2 * channels
        self.time_embed = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_emb = nn.Linear(6, emb)
        self.conv_in = nn.Conv2d(4, channels, 3, padding=1)
        self.input_res = ResBlock(channels, channels, emb)
        self.input_attn = Transformer(channels, context, 2)
        self.downsample = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.middle_res = ResBlock(channels, channels, emb)
        self.output_res = ResBlock(2 * channels, channels, emb)
        self.out = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Any = None, y: Any = None,
        control: Any = None, transformer_options: dict[str, Any] = {}, **kwargs: Any,  # noqa: B006
    ) -> Any:  # fmt: skip
        wrappers = wrappers_of("diffusion_model", transformer_options)
        executor = WrapperExecutor(self._forward, self, wrappers)
        return executor.execute(x, timesteps, context, y, control, transformer_options, **kwargs)

    def _forward(
        self, x: Tensor, timesteps: Tensor, context: Any = None, y: Any = None,
        control: Any = None, transformer_options: dict[str, Any] = {}, **kwargs: Any,  # noqa: B006
    ) -> Tensor:  # fmt: skip
        transformer_options["original_shape"] = list(x.shape)
        half = self.channels // 2
        waves = torch.exp(-4 * torch.arange(half, device=x.device) / half)
        angles = timesteps[:, None].float() * waves
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype))
        emb = emb + self.label_emb(y)
        h = self.input_res(self.conv_in(x), emb)
        h = skip = self.input_attn(h, context, transformer_options)
        h = self.middle_res(self.downsample(h), emb)
        if control is not None and control.get("middle"):
            h += control["middle"].pop()
        h = F.interpolate(h, size=skip.shape[-2:], mode="nearest")
        out: Tensor = self.out(self.output_res(torch.cat([h, skip], dim=1), emb))
        return out


class BaseModel(nn.Module):
    """Noise levels become timesteps, and the model is called by keyword."""

    def __init__(self, diffusion_model: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model

    def apply_model(
        self, x: Tensor, t: Tensor, c_crossattn: Tensor, transformer_options: dict[str, Any],
        control: Any = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        scaled = x / (t.view(-1, 1, 1, 1) ** 2 + 1) ** 0.5
        noise = self.diffusion_model(
            scaled, t * 100, context=c_crossattn, control=control,
            transformer_options=dict(transformer_options), **kwargs,
        )  # fmt: skip
        return x - noise * t.view(-1, 1, 1, 1)


def sample_euler(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    for i in range(len(sigmas) - 1):
        derivative = (x - model(x, sigmas[i])) / sigmas[i]
        x = x + derivative * (sigmas[i + 1] - sigmas[i])
    return x


def sample_heun(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """Two calls a step, but for the last."""
    for i in range(len(sigmas) - 1):
        derivative = (x - model(x, sigmas[i])) / sigmas[i]
        step = sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] > 0:
            ahead = x + derivative * step
            derivative = (derivative + (ahead - model(ahead, sigmas[i + 1])) / sigmas[i + 1]) / 2
        x = x + derivative * step
    return x


class KSAMPLER:
    """A sampler as an object that holds its function."""

    def __init__(self, function: Any) -> None:
        self.sampler_function = function

    def sample(self, guider: Any, sigmas: Tensor, extra: dict[str, Any], noise: Tensor) -> Tensor:
        out: Tensor = self.sampler_function(
            lambda x, sigma: guider.predict(x, sigma, extra["model_options"]), noise, sigmas
        )
        return out


def sample(
    patcher: ModelPatcher,
    conds: tuple[dict[str, Tensor], dict[str, Tensor]],
    noise: Tensor,
    *,
    batched: bool,
    steps: int = 6,
    sampler: Any = sample_euler,
    control: Callable[[int], Any] = lambda rows: None,
    scale: float = 4.0,
    before: Callable[[Any], None] = lambda sigma: None,
) -> Tensor:
    """A picture with classifier-free guidance, as `CFGGuider` samples it.

    Args:
        conds: "c_crossattn" and "y" of the conditional and unconditional side, of one row.
        batched: whether both sides share a batch. control: made anew for a batch of so many rows.
        before: called with the noise level before the model is.
    """
    options = copy.deepcopy(patcher.model_options)
    inner = patcher.model
    options["transformer_options"]["wrappers"] = {
        kind: {key: list(w) for key, w in own.items()} for kind, own in patcher.wrappers.items()
    }
    sigmas = torch.cat([torch.linspace(8, 0.5, steps), torch.zeros(1)])
    options["transformer_options"]["sample_sigmas"] = sigmas
    names = [uuid.uuid4(), uuid.uuid4()]

    def predict(x: Tensor, sigma: Tensor, model_options: dict[str, Any]) -> Tensor:
        before(sigma)
        noise_of = {}
        for sides in ([1, 0],) if batched else ([1], [0]):
            own = copy.copy(model_options["transformer_options"])
            own |= {"cond_or_uncond": sides, "uuids": [names[i] for i in sides], "sigmas": sigma}
            rows = len(sides) * len(x)
            out = inner.apply_model(
                torch.cat([x] * len(sides)), sigma.repeat(rows), transformer_options=own,
                control=control(rows),
                **{k: torch.cat([conds[i][k].repeat(len(x), *[1] * (conds[i][k].ndim - 1))
                                 for i in sides]) for k in conds[0]},
            )  # fmt: skip
            noise_of |= dict(zip(sides, out.chunk(len(sides)), strict=True))
        return noise_of[1] + scale * (noise_of[0] - noise_of[1])

    guider = SimpleNamespace(inner_model=inner, predict=predict)
    wrapped = KSAMPLER(sampler)
    executor = WrapperExecutor(
        wrapped.sample, wrapped, wrappers_of("sampler_sample", options["transformer_options"])
    )
    with torch.inference_mode():
        out: Tensor = executor.execute(guider, sigmas, {"model_options": options}, noise)
    return out

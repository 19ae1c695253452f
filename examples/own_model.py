"""Token merging in a model of your own: a plain vision transformer that denoises.

    python examples/own_model.py
    python examples/own_model.py --grid 31 37 --ratio 0.75

Three models of plain PyTorch with random weights. The first is given pictures: the token grid is
seen where its patch convolution is flattened. The second is given packed tokens, whose grid only
the caller knows: grid=(H, W). The third computes linear maps with an operator that only its author
knows: toma_fx.tokenwise. docs/own-models.md explains each step.

Random weights say how far the outputs lie apart, and nothing about pictures.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toma_fx

Model = Callable[..., Tensor]
OPERATOR = "own_model::linear"
BATCH = 2
STEPS = 5
"""Steps of a generation: by default one that selects destinations, and four that reuse them."""
WINDOW = 4
"""Side of a window in tokens, or the nearest that divides the grid."""


@torch.library.custom_op(OPERATOR, mutates_args=())
def fused_linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """A linear map of [..., C], perhaps with GELU, in one operator: stands for your own kernel."""
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


@fused_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    """A linear map, perhaps with GELU, with PyTorch's operators or with the one above."""

    def __init__(self, inner: int, outer: int, *, gelu: bool = False, fused: bool = False) -> None:
        super().__init__(inner, outer)
        self.gelu, self.fused = gelu, fused

    def forward(self, x: Tensor) -> Tensor:
        """[..., inner] -> [..., outer]."""
        if self.fused:
            return fused_linear(x, self.weight, self.bias, self.gelu)
        y = super().forward(x)
        return F.gelu(y) if self.gelu else y


class Attention(nn.Module):
    """Multi-head self-attention with one linear map for queries, keys and values."""

    def __init__(self, width: int, heads: int, *, fused: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, fused=fused)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        heads = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, 2))
        return self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), x + mlp(norm(x)); the time shifts and scales both norms."""

    def __init__(self, width: int, heads: int, *, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attention = Attention(width, heads, fused=fused)
        self.mlp = nn.Sequential(
            Linear(width, 4 * width, gelu=True, fused=fused), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor, moment: Tensor) -> Tensor:
        """Tokens [B, N, C] and the time [B, C] -> tokens."""
        scale1, shift1, scale2, shift2 = self.modulation(F.silu(moment))[:, None].chunk(4, -1)
        x = x + self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PackedDenoiser(nn.Module):
    """A denoiser of packed tokens [B, H*W, channels]: it never sees that they are a picture.

    A token of the time goes in front of the others; positions are learned.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        *,
        channels: int = 16,
        width: int = 128,
        heads: int = 4,
        depth: int = 2,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Linear(channels, width)
        self.position = nn.Parameter(0.5 * torch.randn(1, 1 + math.prod(grid), width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads, fused=fused) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, channels)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """Tokens [B, H*W, channels] and timestep [B] -> tokens [B, H*W, channels]."""
        return self.trunk(self.embed(hidden_states), timestep)

    def trunk(self, tokens: Tensor, timestep: Tensor) -> Tensor:
        """Tokens [B, H*W, C] through all blocks and the head."""
        rates = torch.arange(self.width // 2, device=tokens.device) / (self.width // 2)
        angles = timestep[:, None].float() * 1e-4**rates
        moment = self.time(torch.cat([angles.cos(), angles.sin()], -1).to(tokens.dtype))
        x = torch.cat([moment[:, None], tokens], 1) + self.position
        for block in self.blocks:
            x = block(x, moment)
        return self.head(self.norm(x[:, 1:]))


class PictureDenoiser(PackedDenoiser):
    """The same model for pictures [B, 4, 2H, 2W]: a convolution makes a token of 2x2 pixels."""

    def __init__(self, grid: tuple[int, int], **sizes: Any) -> None:
        super().__init__(grid, channels=16, **sizes)
        self.embed = nn.Conv2d(4, self.width, kernel_size=2, stride=2)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """A picture [B, 4, 2H, 2W] and timestep [B] -> a picture."""
        patches = self.embed(sample)
        tokens = self.trunk(patches.flatten(2).transpose(1, 2), timestep)
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, patches.shape[2:]), 2)


def generation(model: Model, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Outputs of a generation's steps: the timestep falls from 1000 and the rest stays."""
    timesteps = torch.linspace(1000, 0, STEPS + 1)[:-1]
    return [model(**inputs, timestep=t.expand(BATCH)) for t in timesteps]


@torch.no_grad()
def compare(original: Model, merged: Model, inputs: dict[str, Tensor], rounds: int) -> None:
    """Print how far the outputs lie apart, and the time per step of both, measured in turn."""
    expected, got = (torch.stack(generation(model, inputs)) for model in (original, merged))
    apart = (got - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    times: dict[Model, list[float]] = {original: [], merged: []}
    for _ in range(rounds):
        for model, taken in times.items():
            start = time.perf_counter()
            generation(model, inputs)
            taken.append((time.perf_counter() - start) / STEPS)
    before, after = (1e3 * statistics.median(taken) for taken in times.values())
    print(f"outputs differ by {apart:.1%} (root mean square, relative)")
    print(f"a step takes {before:.1f} ms, merged {after:.1f} ms: {before / after:.2f}x")
    print(f"(medians of {rounds} generations of {STEPS} steps each, in turn)")


def show(
    title: str,
    model: nn.Module,
    inputs: dict[str, Tensor],
    options: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """Print what merges in a model, and what comes of it."""
    print(f"\n== {title} ==\n")
    print(toma_fx.explain(model, {**inputs, "timestep": torch.full((BATCH,), 1000.0)}, **options))
    merged = toma_fx.optimize(model, **options)
    if args.compile:
        compare(torch.compile(model), torch.compile(merged), inputs, args.rounds)
    else:
        compare(model, merged, inputs, args.rounds)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--grid", type=int, nargs=2, default=(21, 35), metavar=("H", "W"), help="in tokens"
    )
    parser.add_argument("--depth", type=int, default=2, help="number of blocks")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of tokens merged away")
    parser.add_argument("--rounds", type=int, default=5, help="generations to measure")
    parser.add_argument("--compile", action="store_true", help="compile both sides")
    args = parser.parse_args()
    torch.manual_seed(0)
    (height, width), depth = args.grid, args.depth
    tokens = {"hidden_states": torch.randn(BATCH, height * width, 16)}
    pictures = {"sample": torch.randn(BATCH, 4, 2 * height, 2 * width)}
    options: dict[str, Any] = {"ratio": args.ratio, "tile": WINDOW}

    model = PictureDenoiser((height, width), depth=depth).eval()
    show("pictures: the grid is seen", model, pictures, options, args)

    packed = PackedDenoiser((height, width), depth=depth).eval()
    options["grid"] = (height, width)
    show("packed tokens: grid= tells it", packed, tokens, options, args)

    fused = PackedDenoiser((height, width), depth=depth, fused=True).eval()
    print("\n== an operator of one's own, not declared ==\n")
    try:
        toma_fx.explain(fused, {**tokens, "timestep": torch.full((BATCH,), 1000.0)}, **options)
    except toma_fx.NoMergeSites as error:
        print("NoMergeSites:", error)
    toma_fx.tokenwise(OPERATOR)
    show("the same, declared: tokenwise", fused, tokens, options, args)


if __name__ == "__main__":
    main()

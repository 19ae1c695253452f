"""The methods as published, or as their descriptions say, eagerly on copies of whole models.

Nothing here calls the package under test. Three sources:
    tomesd, ca-tome     the published packages' own patches on a diffusers UNet
    `merging_attn1`     hooks that merge between the norm and the self-attention of every block
    `Groups`            who merges with whom, as plain lists, made by loops over tokens
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference import Grid, Pattern

Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""(merge, unmerge)."""


# -- the published packages -----------------------------------------------------------------------


def by_place(model: nn.Module) -> Callable[[dict[str, Any]], Tensor]:
    """A model as a function of a call, sample by position: the packages read its size there."""

    def run(inputs: dict[str, Any]) -> Tensor:
        rest = dict(inputs)
        output: Tensor = model(rest.pop("sample"), **rest)[0]
        return output

    return run


def tomesd(model: nn.Module, **options: Any) -> nn.Module:
    """A copy of a UNet, patched by the package tomesd, without its random destinations."""
    package = pytest.importorskip("tomesd")
    patched: nn.Module = package.apply_patch(copy.deepcopy(model), use_rand=False, **options)
    return patched


def tomesd_pair(x: Tensor, grid: Grid, ratio: float) -> Pair:
    """The package's matching of tokens [B, N, C] in cells of 2x2."""
    match = pytest.importorskip("tomesd.merge").bipartite_soft_matching_random2d
    pair: Pair = match(x, grid[1], grid[0], 2, 2, int(x.shape[1] * ratio), no_rand=True)
    return pair


def ca_tome(model: nn.Module, compute_on: list[int], **options: Any) -> nn.Module:
    """A copy of a UNet, patched by the package ca-tome, without its random destinations."""
    package = pytest.importorskip("ca_tome.patch")
    patched: nn.Module = package.apply_patch(
        copy.deepcopy(model), compute_on, use_rand=False, **options
    )
    return patched


def at_step(patched: nn.Module, step: int) -> nn.Module:
    """Tell the blocks of a model that ca-tome patched which step comes, from 0."""
    for module in patched.modules():
        if hasattr(module, "_cache_info"):
            module.inference_step = step
    return patched


# -- who merges with whom -------------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """Tokens of one batch element in groups; each group becomes one merged token.

    Attributes:
        heads: the token that stands for each group. owner: the group of each token.
    """

    heads: list[int]
    owner: list[int]

    @property
    def members(self) -> list[list[int]]:
        """Tokens of every group."""
        found: list[list[int]] = [[] for _ in self.heads]
        for token, group in enumerate(self.owner):
            found[group].append(token)
        return found

    @classmethod
    def of(cls, head: list[int]) -> Groups:
        """Groups of tokens with one head, by the head of every token."""
        heads = sorted(set(head))
        return cls(heads, [heads.index(h) for h in head])


def cell_groups(
    x: Tensor,
    grid: Grid,
    ratio: float = 1.0,
    threshold: float | None = None,
    heads: list[int] | None = None,
) -> Groups:
    """ToMeSD in 2x2 cells: tokens [N, C], of which the share `ratio` joins a top left one.

    With a `threshold` those join that are as similar; with `heads` they join these.
    """
    height, width = grid
    rows, columns = height // 2 * 2, width // 2 * 2
    raster = [(i // width, i % width) for i in range(height * width)]
    inside = [i for i, (r, c) in enumerate(raster) if r < rows and c < columns]
    heads = heads or [i for i in inside if raster[i][0] % 2 == raster[i][1] % 2 == 0]
    others = sorted(set(range(height * width)) - set(heads))
    unit = x / x.norm(dim=-1, keepdim=True)
    best, where = (unit[others] @ unit[heads].T).max(-1)
    order = sorted(range(len(others)), key=lambda i: -float(best[i]))
    count = min(int(height * width * ratio), len(others))
    if threshold is not None:
        count = int((best >= threshold).sum())
    assert count == len(others) or best[order[count - 1]] > best[order[count]], "a tie"
    head = list(range(height * width))
    for i in order[:count]:
        head[others[i]] = heads[int(where[i])]
    return Groups.of(head)


def window_groups(x: Tensor, grid: Grid, side: int, ratio: float | None) -> Groups:
    """ReToM: tokens [N, C], of which windows join the one most like the others of the window.

    All do without a `ratio`; else that share of all tokens, the most similar ones first. Sums of
    similarities are compared in steps of 2^-14, ties go to the lowest index.
    """
    (height, width), unit = grid, x / x.norm(dim=-1, keepdim=True)
    head, likeness = list(range(height * width)), [-2.0] * (height * width)
    for top in range(0, height, side):
        for left in range(0, width, side):
            window = [(top + r) * width + left + c for r in range(side) for c in range(side)]
            sums = [sum(float(unit[i] @ unit[j]) for j in window if j != i) for i in window]
            steps = [round(s * 2**14) for s in sums]
            chosen = window[steps.index(max(steps))]
            for i in window:
                head[i] = chosen
                likeness[i] = float(unit[i] @ unit[chosen])
    if ratio is not None:
        others = sorted((i for i in range(len(head)) if head[i] != i), key=lambda i: -likeness[i])
        for i in others[int(len(head) * ratio) :]:
            head[i] = i
    return Groups.of(head)


def mean(x: Tensor, head: int, members: list[int]) -> Tensor:
    return x[members].mean(0)


def taken(x: Tensor, head: int, members: list[int]) -> Tensor:
    return x[head]


def longest_mean(x: Tensor, head: int, members: list[int]) -> Tensor:
    """The direction of the mean, in the length of the longest (MLERP)."""
    average = x[members].mean(0)
    length = max(float(x[i].norm()) for i in members)
    return x[head] if len(members) == 1 else average / average.norm() * length


def pair(groups: list[Groups], become: Callable[[Tensor, int, list[int]], Tensor]) -> Pair:
    """Merge and unmerge of a batch, by the groups of each element and what a group becomes."""

    def merge(x: Tensor) -> Tensor:
        rows = [
            torch.stack([become(x[b], h, m) for h, m in zip(g.heads, g.members, strict=True)])
            for b, g in enumerate(groups)
        ]
        return torch.stack(rows)

    def unmerge(y: Tensor) -> Tensor:
        return torch.stack([y[b, g.owner] for b, g in enumerate(groups)])

    return merge, unmerge


def dense(groups: Groups) -> Pattern:
    """Means and copies as matrices [1, M, N] and [1, N, M]."""
    unmerge = F.one_hot(torch.tensor(groups.owner), len(groups.heads)).float()
    merge = unmerge.T / unmerge.sum(0)[:, None]
    return Pattern(merge[None], unmerge[None], torch.tensor([groups.heads]))


# -- where they merge -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A transformer block of a UNet in the order in which blocks run: `index` of `count`."""

    path: str
    module: nn.Module
    stage: nn.Module
    index: int
    count: int
    first: bool
    last: bool


def blocks_of(model: nn.Module) -> list[Block]:
    """The transformer blocks of a UNet in the order in which they run."""
    stages = [m for m in model.named_modules() if type(m[1]).__name__ == "Transformer2DModel"]
    order = ("down", "mid", "up")
    stages.sort(key=lambda stage: order.index(stage[0].split("_")[0]))
    found = [(name, s, i) for name, s in stages for i in range(len(s.transformer_blocks))]
    return [
        Block(
            f"{name}.transformer_blocks.{i}", s.transformer_blocks[i], s, n, len(found),
            i == 0, i == len(s.transformer_blocks) - 1,
        )
        for n, (name, s, i) in enumerate(found)
    ]  # fmt: skip


def with_grids(model: nn.Module) -> tuple[nn.Module, Callable[[Block], Grid]]:
    """A copy of a UNet, and the grid that a block of it works on while the copy runs."""
    model = copy.deepcopy(model)
    grids: dict[int, Grid] = {}

    def record(stage: nn.Module, args: tuple[Any, ...]) -> None:
        grids[id(stage)] = tuple(args[0].shape[-2:])

    for block in blocks_of(model):
        if block.first:
            block.stage.register_forward_pre_hook(record)
    return model, lambda block: grids[id(block.stage)]


def merging_attn1(
    model: nn.Module, make: Callable[[Tensor, Grid, Block], Pair | None]
) -> nn.Module:
    """A copy of a UNet whose self-attention merges: norm1 -> merge -> attn1 -> unmerge.

    `make` gives merge and unmerge for the tokens [B, N, C] with which a block begins, or None.
    """
    model, grid_of = with_grids(model)
    now: dict[str, Pair | None] = {}

    def hook(block: Block) -> None:
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            now[block.path] = make(x, grid_of(block), block)

        def enter(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            found = now[block.path]
            return output if found is None else found[0](output)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            found = now[block.path]
            return output if found is None else found[1](output)

        block.module.register_forward_pre_hook(begin, with_kwargs=True)
        block.module.norm1.register_forward_hook(enter)
        block.module.attn1.register_forward_hook(leave)

    for block in blocks_of(model):
        hook(block)
    return model


def merging_blocks(
    model: nn.Module, make: Callable[[Tensor, Grid, Block], Pair | None], *, stacks: bool
) -> nn.Module:
    """A copy of a UNet whose blocks, or stacks of blocks, run on merged tokens as they are.

    x_b = x_a + unmerge(x_b' - merge(x_a)); x_b' is what becomes of merge(x_a).
    """
    model, grid_of = with_grids(model)
    held: dict[str, Any] = {}

    def wrap(block: Block) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            x = hidden_states
            if block.first or not stacks:
                held["pair"], held["whole"] = make(x, grid_of(block), block), x
                if held["pair"] is not None:
                    x = held["entered"] = held["pair"][0](x)
            x = type(block.module).forward(block.module, x, **kwargs)
            if held["pair"] is not None and (block.last or not stacks):
                x = held["whole"] + held["pair"][1](x - held["entered"])
            return x

        return forward

    for block in blocks_of(model):
        block.module.forward = wrap(block)
    return model


# -- keys and values of a coarser image -----------------------------------------------------------


def coarser(x: Tensor, grid: Grid, factor: int, how: str) -> Tensor:
    """Tokens [B, N, C] of an image as PyTorch's own functions make it smaller."""
    image = x.transpose(1, 2).unflatten(2, grid)
    if how == "average":
        small = F.avg_pool2d(image, factor, ceil_mode=True, count_include_pad=False)
    else:
        small = F.interpolate(image, size=tuple(side // factor for side in grid), mode=how)
    return small.flatten(2).transpose(1, 2)


def coarser_keys(model: nn.Module, factors: tuple[int, ...], how: str) -> nn.Module:
    """A copy of a UNet whose self-attention projects keys and values from a coarser image.

    `factors` by level: the grids that attention works on, from the finest.
    """
    model, grid_of = with_grids(model)
    finest: list[int] = []

    def hook(block: Block) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor]]:
        def shrink(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
            finest.append(math.prod(grid_of(block)))
            level = round(math.log(max(finest) / finest[-1], 4))
            factor = factors[level] if level < len(factors) else 1
            return (coarser(args[0], grid_of(block), factor, how) if factor > 1 else args[0],)

        return shrink

    for block in blocks_of(model):
        for projection in (block.module.attn1.to_k, block.module.attn1.to_v):
            projection.register_forward_pre_hook(hook(block))
    return model


class CoarserFluxKeys:
    """An attention processor of Flux: image keys and values come from a coarser image.

    "nearest": after they are made and turned, keys and values are taken at every factor-th token.
    Else the image is averaged first, and keys are turned as the middle token of each window.
    """

    def __init__(self, grid: Grid, factor: int, how: str, text: int) -> None:
        self.grid, self.factor, self.how, self.text = grid, factor, how, text

    def places(self) -> list[int]:
        """The token whose position each key has."""
        f, width = self.factor, self.grid[1]
        if self.how == "nearest":
            rows, columns = ([i * n // (n // f) for i in range(n // f)] for n in self.grid)
        else:
            rows, columns = (
                [(i + min(i + f, n) - 1) // 2 for i in range(0, n, f)] for n in self.grid
            )
        return [r * width + c for r in rows for c in columns]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        x, text = hidden_states, encoder_hidden_states
        single = text is None
        head, image = (x[:, : self.text], x[:, self.text :]) if single else (text, x)
        context = (
            (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
            if single
            else (
                attn.add_q_proj,
                attn.add_k_proj,
                attn.add_v_proj,
                attn.norm_added_q,
                attn.norm_added_k,
            )
        )

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        cos, sin = image_rotary_emb

        def turned(y: Tensor, at: list[int]) -> Tensor:
            real, imaginary = y.unflatten(-1, (-1, 2)).unbind(-1)
            other = torch.stack([-imaginary, real], -1).flatten(-2)
            return y * cos[at] + other * sin[at]

        everywhere = list(range(self.text + math.prod(self.grid)))
        kept = [*range(self.text), *(self.text + i for i in self.places())]
        q = torch.cat(
            [context[3](heads(context[0](head))), attn.norm_q(heads(attn.to_q(image)))], 2
        )
        source = (
            image if self.how == "nearest" else coarser(image, self.grid, self.factor, self.how)
        )
        k = torch.cat(
            [context[4](heads(context[1](head))), attn.norm_k(heads(attn.to_k(source)))], 2
        )
        v = torch.cat([heads(context[2](head)), heads(attn.to_v(source))], 2)
        if self.how == "nearest":
            k, v = turned(k, everywhere)[:, :, kept], v[:, :, kept]
        else:
            k = turned(k, kept)
        weights = (turned(q, everywhere) @ k.transpose(-1, -2) / attn.head_dim**0.5).softmax(-1)
        out = (weights @ v).transpose(1, 2).flatten(2)
        if single:
            return out
        return attn.to_out[1](attn.to_out[0](out[:, self.text :])), attn.to_add_out(
            out[:, : self.text]
        )


def coarser_flux_keys(model: nn.Module, grid: Grid, factor: int, how: str, text: int) -> nn.Module:
    """A copy of Flux whose attention looks at a coarser image."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module).__name__ == "FluxAttention":
            module.processor = CoarserFluxKeys(grid, factor, how, text)
    return model

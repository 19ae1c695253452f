"""Independent eager implementation of token merging in SDXL and Flux blocks.

Written from the mathematics with explicit loops over batch elements and windows and dense [M, N]
matrices; it shares no code with the package. Patterns are computed at the first merged sublayer of
each stream in a refresh step and kept for reuse steps.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Pattern:
    """Dense merge [B, M, N] and unmerge [B, N, M] matrices, destinations [B, M]."""

    merge: Tensor
    unmerge: Tensor
    destinations: Tensor


@dataclass
class Settings:
    """How to merge: tile (h, w), destinations a window, softmax scale, scope, sharing (Flux)."""

    tile: tuple[int, int]
    keep: int
    scale: float = 1000.0
    scope: str = "sublayer"
    share: str = "stream"
    refresh: bool = True
    patterns: dict[Any, Pattern] = field(default_factory=dict)


def greedy(similarity: Tensor, keep: int) -> list[int]:
    """Facility location by plain loops; gains compared in steps of 2^-14, ties to the lowest."""
    n = len(similarity)
    chosen: list[int] = []
    covered = None
    for _ in range(keep):
        best, best_gain = -1, -1.0
        if covered is None:
            gains = similarity.sum(1)
        else:
            gains = torch.clamp(similarity - covered[None], min=0).sum(1)
        gains = torch.round(gains * 2**14)
        for j in range(n):
            if j not in chosen and (best < 0 or gains[j] > best_gain):
                best, best_gain = j, float(gains[j])
        chosen.append(best)
        row = similarity[best]
        covered = row if covered is None else torch.maximum(covered, row)
    return chosen


def make_pattern(x: Tensor, grid: tuple[int, int], s: Settings) -> Pattern:
    """Pattern of tokens [B, N, C] on a grid."""
    (height, width), (h, w) = grid, s.tile
    batch, tokens, _ = x.shape
    windows = [
        [(top + r) * width + left + c for r in range(h) for c in range(w)]
        for top in range(0, height, h)
        for left in range(0, width, w)
    ]
    merged = len(windows) * s.keep
    merge, unmerge = torch.zeros(batch, merged, tokens), torch.zeros(batch, tokens, merged)
    destinations = torch.zeros(batch, merged, dtype=torch.long)
    for b in range(batch):
        for t, members in enumerate(windows):
            inside = x[b, members]
            unit = inside / inside.norm(dim=1, keepdim=True).clamp(min=1e-12)
            similarity = unit @ unit.T
            chosen = greedy(similarity, s.keep)
            share = torch.softmax(s.scale * similarity[chosen], dim=0)
            rows = range(t * s.keep, (t + 1) * s.keep)
            for i, row in enumerate(rows):
                merge[b, row, members] = share[i] / share[i].sum()
                unmerge[b, members, row] = share[i]
                destinations[b, row] = members[chosen[i]]
    return Pattern(merge, unmerge, destinations)


# -- SDXL and SD 1.5 ------------------------------------------------------------------------------


def reference_unet(model: nn.Module, settings: dict[int, Settings]) -> nn.Module:
    """A copy of a UNet whose transformer blocks merge; `settings` by number of tokens."""
    model = copy.deepcopy(model)
    for name, stage in model.named_modules():
        if type(stage).__name__ != "Transformer2DModel":
            continue
        context: dict[str, Any] = {}
        stage.register_forward_pre_hook(_grid_recorder(context))
        blocks = stage.transformer_blocks
        for i, block in enumerate(blocks):
            block.forward = _UNetBlock(block, name, i, len(blocks), context, settings)
    return model


def _grid_recorder(context: dict[str, Any]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        context["grid"] = tuple(args[0].shape[-2:])

    return hook


@dataclass
class _UNetBlock:
    block: nn.Module
    stage: str
    index: int
    count: int
    context: dict[str, Any]
    settings: dict[int, Settings]

    def pattern(self, x: Tensor, s: Settings) -> Pattern:
        if self.index == 0 and s.refresh and "fresh" not in self.context:
            s.patterns[self.stage] = make_pattern(x, self.context["grid"], s)
            self.context["fresh"] = True
        return s.patterns[self.stage]

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        grid = self.context["grid"]
        if self.index == 0:
            self.context.pop("fresh", None)
        s = self.settings.get(grid[0] * grid[1])
        text = kwargs.get("encoder_hidden_states")
        if s is None:
            return type(self.block).forward(self.block, hidden_states, **kwargs)
        if s.scope == "sublayer":
            return self.sublayers(hidden_states, text, s)
        if s.scope == "block" or self.index == 0:
            p = self.pattern(hidden_states, s)
            self.context["x"] = hidden_states
            hidden_states = p.merge @ hidden_states
            self.context["entered"] = hidden_states
        y = self.plain(hidden_states, text)
        if s.scope == "block" or self.index == self.count - 1:
            p = s.patterns[self.stage]
            y = self.context["x"] + p.unmerge @ (y - self.context["entered"])
        return y

    def plain(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.block.attn1(self.block.norm1(x))
        x = x + self.block.attn2(self.block.norm2(x), encoder_hidden_states=text)
        return x + self.block.ff(self.block.norm3(x))

    def sublayers(self, x: Tensor, text: Tensor, s: Settings) -> Tensor:
        normed = self.block.norm1(x)
        p = self.pattern(normed, s)
        x = x + p.unmerge @ self.block.attn1(p.merge @ normed)
        normed = p.merge @ self.block.norm2(x)
        x = x + p.unmerge @ self.block.attn2(normed, encoder_hidden_states=text)
        return x + p.unmerge @ self.block.ff(p.merge @ self.block.norm3(x))


# -- Flux -----------------------------------------------------------------------------------------


def reference_flux(
    model: nn.Module, grid: tuple[int, int], s: Settings, inputs: dict[str, Any]
) -> Tensor:
    """Run Flux with merging, one batch element at a time, so that each has its own rotary table."""
    outputs = []
    for b in range(len(inputs["hidden_states"])):
        one = {
            k: v[b : b + 1] if isinstance(v, Tensor) and not k.endswith("_ids") else v
            for k, v in inputs.items()
        }
        outputs.append(_flux_one(model, grid, s, one, b))
    return torch.cat(outputs)


def _flux_one(m: Any, grid: tuple[int, int], s: Settings, i: dict[str, Any], b: int) -> Tensor:
    x, text = m.x_embedder(i["hidden_states"]), m.context_embedder(i["encoder_hidden_states"])
    temb = m.time_text_embed(i["timestep"] * 1000, i["pooled_projections"])
    whole = m.pos_embed(torch.cat([i["txt_ids"], i["img_ids"]]))
    count = text.shape[1]

    fresh: set[Any] = set()
    now = [0]

    def pattern(tokens: Tensor) -> Pattern:
        key = (b, now[0] if s.share == "block" else 0)
        if s.refresh and key not in fresh:
            s.patterns[key] = make_pattern(tokens, grid, s)
            fresh.add(key)
        return s.patterns[key]

    def rotary(p: Pattern) -> tuple[Tensor, ...]:
        kept = count + p.destinations[0]
        return tuple(torch.cat([table[:count], table[kept]]) for table in whole)

    def double(block: Any, x: Tensor, text: Tensor, p: Pattern | None, rope: Any) -> Any:
        """One double block; with a pattern its sublayers merge."""
        n, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1(x, emb=temb)
        nt, tgate, tshift, tscale, tgate_mlp = block.norm1_context(text, emb=temb)
        if s.scope == "sublayer":
            p = pattern(n)
            n, rope = p.merge @ n, rotary(p)
        a, at = block.attn(hidden_states=n, encoder_hidden_states=nt, image_rotary_emb=rope)
        a = gate[:, None] * a
        x = x + (p.unmerge @ a if p is not None else a)
        n = block.norm2(x) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        f = gate_mlp[:, None] * block.ff(p.merge @ n if p is not None else n)
        x = x + (p.unmerge @ f if p is not None else f)
        text = text + tgate[:, None] * at
        nt = block.norm2_context(text) * (1 + tscale[:, None]) + tshift[:, None]
        return x, text + tgate_mlp[:, None] * block.ff_context(nt)

    def single(block: Any, x: Tensor, text: Tensor, p: Pattern | None, rope: Any) -> Any:
        joint = torch.cat([text, x], 1)
        n, gate = block.norm(joint, emb=temb)
        if s.scope == "sublayer":
            p = pattern(n[:, count:])
            n, rope = torch.cat([n[:, :count], p.merge @ n[:, count:]], 1), rotary(p)
        mlp = block.act_mlp(block.proj_mlp(n))
        a = block.attn(hidden_states=n, image_rotary_emb=rope)
        u = gate[:, None] * block.proj_out(torch.cat([a, mlp], 2))
        image = p.unmerge @ u[:, count:] if p is not None else u[:, count:]
        return x + image, text + u[:, :count]

    steps = [(double, block) for block in m.transformer_blocks]
    steps += [(single, block) for block in m.single_transformer_blocks]
    start = x
    for k, (run, block) in enumerate(steps):
        now[0] = k
        if s.scope == "sublayer":
            x, text = run(block, x, text, None, whole)
            continue
        if s.scope == "block" or k == 0:
            p, start = pattern(x), x
            x = entered = p.merge @ x
        x, text = run(block, x, text, None, rotary(p))
        if s.scope == "block" or k == len(steps) - 1:
            x = start + p.unmerge @ (x - entered)
    return m.proj_out(m.norm_out(x, temb))

"""Independent eager implementation of token merging in SDXL and Flux blocks.

Written from the mathematics with explicit loops over batch elements and windows and dense [M, N]
matrices; it shares no code with the package. With M merging and U unmerging:

    sublayer      x + U f(M norm(x))
    block, stack  x_b = x_a + U (x_b' - M x_a),   x_b' what the blocks make of M x_a

Patterns are computed at the first merged sublayer of each stream (scope sublayer: from its normed
input; block, stack: from the segment's entry) in a refresh step and kept for reuse steps.

`reference_unet` and `reference_flux` run one step, refreshing as `Settings.refresh` says;
`stand_in` makes a denoiser that follows the schedule by itself inside a diffusers pipeline.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor, nn

Grid = tuple[int, int]


@dataclass
class Pattern:
    """Dense merge [B, M, N] and unmerge [B, N, M] matrices, destinations [B, M]."""

    merge: Tensor
    unmerge: Tensor
    destinations: Tensor


@dataclass
class Settings:
    """How to merge: tile (h, w), destinations a window, softmax scale, scope, sharing (Flux).

    `whole_controls`: what a ControlNet adds between Flux's blocks leaves a stack with the detail of
    every token, x_b = x_a + c + U (x_b' - M (x_a + c)), instead of as U M c.

    `refresh` and `now` (the pass that a call belongs to) hold for the current call. A stand-in sets
    both: it refreshes every `destinations_every` calls and leaves fewer than `min_tokens` alone.
    """

    tile: tuple[int, int]
    keep: int
    scale: float = 1000.0
    scope: str = "sublayer"
    share: str = "stream"
    whole_controls: bool = False
    refresh: bool = True
    patterns: dict[Any, Pattern] = field(default_factory=dict)
    destinations_every: int = 5
    min_tokens: int = 60
    now: Hashable = ""


def greedy(similarity: Tensor, keep: int) -> list[int]:
    """Facility location by plain loops on similarities in steps of 2^-16, ties to the lowest."""
    n = len(similarity)
    similarity = torch.round(similarity.double() * 2**16)
    chosen: list[int] = []
    covered = None
    for _ in range(keep):
        best, best_gain = -1, -1.0
        if covered is None:
            gains = similarity.sum(1)
        else:
            gains = torch.clamp(similarity - covered[None], min=0).sum(1)
        steps = gains.tolist()
        for j in range(n):
            if j not in chosen and (best < 0 or steps[j] > best_gain):
                best, best_gain = j, steps[j]
        chosen.append(best)
        row = similarity[best]
        covered = row if covered is None else torch.maximum(covered, row)
    return chosen


def windows_of(grids: Sequence[Grid], tile: tuple[int, int]) -> list[list[int]]:
    """Token indices of every window, image by image; no window crosses from one to the next.

    Images of equal width one below the other are one grid, whose windows in raster order these are.
    """
    (h, w), windows, start = tile, [], 0
    for height, width in grids:
        assert (height % h, width % w) == (0, 0), f"tile {tile} does not divide {height}x{width}"
        for top in range(0, height, h):
            for left in range(0, width, w):
                corner = start + top * width + left
                windows.append([corner + r * width + c for r in range(h) for c in range(w)])
        start += height * width
    return windows


def make_pattern(x: Tensor, grids: Sequence[Grid], s: Settings) -> Pattern:
    """Pattern of tokens [B, N, C] on the grids of one image or several."""
    windows = windows_of(grids, s.tile)
    batch, tokens, _ = x.shape
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


# -- in a pipeline --------------------------------------------------------------------------------


def stand_in(model: nn.Module, settings: Settings, *, itself: bool = False) -> nn.Module:
    """A copy of a UNet or Flux transformer that merges; type, attributes and modules stay.

    With `itself` the model is changed, and not copied.

    It follows the schedule: every pass of a step (a label of `cache_context`, or the second and
    later calls at one timestep) counts its own steps and keeps its own patterns.
    """
    model = model if itself else copy.deepcopy(model)
    s = replace(settings, patterns={})
    schedule = Schedule(s.destinations_every)
    if type(model).__name__ == "FluxTransformer2DModel":
        model.forward = ReferenceFlux(model, s, schedule)
    else:
        _merge_blocks(model, lambda tokens: s if tokens >= s.min_tokens else None)
        model.forward = ReferenceUNet(model, s, schedule)
    model.cache_context = schedule.labeled
    model._reset_stateful_cache = schedule.reset
    return model


@dataclass
class Schedule:
    """Tells which pass a call is and whether it refreshes.

    A pass is a label and the number of earlier calls under it at the same timestep. A timestep that
    rises begins a new generation.
    """

    every: int
    label: str = ""
    timestep: float | None = None
    calls: Counter[str] = field(default_factory=Counter)
    steps: Counter[tuple[str, int]] = field(default_factory=Counter)

    def begin(self, timestep: float) -> tuple[Hashable, bool]:
        """(pass, refresh) of the call that begins at this timestep."""
        if self.timestep is None or timestep > self.timestep:
            self.reset()
        if timestep != self.timestep:
            self.calls.clear()
        self.timestep = timestep
        now = (self.label, self.calls[self.label])
        self.calls[self.label] += 1
        step = self.steps[now]
        self.steps[now] += 1
        return now, step % self.every == 0

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """The next call is the first of a generation."""
        self.timestep = None
        self.calls.clear()
        self.steps.clear()

    @contextmanager
    def labeled(self, label: str) -> Iterator[None]:
        previous, self.label = self.label, label
        try:
            yield
        finally:
            self.label = previous


# -- SDXL and SD 1.5 ------------------------------------------------------------------------------


def reference_unet(model: nn.Module, settings: dict[int, Settings]) -> nn.Module:
    """A copy of a UNet whose transformer blocks merge; `settings` by number of tokens."""
    model = copy.deepcopy(model)
    _merge_blocks(model, settings.get)
    return model


@dataclass
class ReferenceUNet:
    """The forward of a UNet whose blocks merge: tells them the pass and the kind of step."""

    model: nn.Module
    settings: Settings
    schedule: Schedule

    def __call__(self, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        first = timestep.reshape(-1)[0] if isinstance(timestep, Tensor) else timestep
        self.settings.now, self.settings.refresh = self.schedule.begin(float(first))
        return type(self.model).forward(self.model, sample, timestep, *args, **kwargs)


def _merge_blocks(model: nn.Module, settings: Callable[[int], Settings | None]) -> None:
    """Make every transformer block of a UNet merge; `settings` by number of tokens."""
    for name, stage in model.named_modules():
        if type(stage).__name__ != "Transformer2DModel":
            continue
        context: dict[str, Any] = {}
        stage.register_forward_pre_hook(_grid_recorder(context))
        blocks = stage.transformer_blocks
        for i, block in enumerate(blocks):
            block.forward = _UNetBlock(block, name, i, len(blocks), context, settings)


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
    settings: Callable[[int], Settings | None]

    def pattern(self, x: Tensor, s: Settings) -> Pattern:
        if self.index == 0 and s.refresh and "fresh" not in self.context:
            s.patterns[s.now, self.stage] = make_pattern(x, [self.context["grid"]], s)
            self.context["fresh"] = True
        return s.patterns[s.now, self.stage]

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        grid = self.context["grid"]
        if self.index == 0:
            self.context.pop("fresh", None)
        s = self.settings(grid[0] * grid[1])
        if s is None:
            return type(self.block).forward(self.block, hidden_states, **kwargs)
        sublayers = self.sublayers(**kwargs)
        if s.scope == "sublayer":
            for norm, layer in sublayers:
                normed = norm(hidden_states)
                p = self.pattern(normed, s)
                hidden_states = hidden_states + p.unmerge @ layer(p.merge @ normed)
            return hidden_states
        if s.scope == "block" or self.index == 0:
            p = self.pattern(hidden_states, s)
            self.context["x"] = hidden_states
            hidden_states = p.merge @ hidden_states
            self.context["entered"] = hidden_states
        for norm, layer in sublayers:
            hidden_states = hidden_states + layer(norm(hidden_states))
        if s.scope == "block" or self.index == self.count - 1:
            p = s.patterns[s.now, self.stage]
            change = hidden_states - self.context["entered"]
            hidden_states = self.context["x"] + p.unmerge @ change
        return hidden_states

    def sublayers(
        self,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        **unused: Any,
    ) -> list[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """(norm, layer) of the self-attention, the cross-attention and the MLP."""
        assert attention_mask is None, "a mask over image tokens would have to merge too"
        block, extra = self.block, cross_attention_kwargs or {}

        def cross(x: Tensor) -> Tensor:
            text, mask = encoder_hidden_states, encoder_attention_mask
            return block.attn2(x, encoder_hidden_states=text, attention_mask=mask, **extra)

        return [
            (block.norm1, lambda x: block.attn1(x, **extra)),
            (block.norm2, cross),
            (block.norm3, block.ff),
        ]


# -- Flux -----------------------------------------------------------------------------------------


def reference_flux(model: nn.Module, grid: Grid, s: Settings, inputs: dict[str, Any]) -> Tensor:
    """Run one step of Flux with merging on a picture of `grid` tokens."""
    return _flux_step(model, [grid], s, inputs)


@dataclass
class ReferenceFlux:
    """The forward of a Flux transformer that merges, following the schedule."""

    model: nn.Module
    settings: Settings
    schedule: Schedule

    def __call__(
        self, *args: Any, return_dict: bool = True, **inputs: Any
    ) -> tuple[Tensor] | Transformer2DModelOutput:
        assert not args, "pipelines call Flux by keyword"
        s = self.settings
        s.now, s.refresh = self.schedule.begin(float(inputs["timestep"].reshape(-1)[0]))
        if inputs["hidden_states"].shape[1] < s.min_tokens:
            return type(self.model).forward(self.model, return_dict=return_dict, **inputs)
        for name in ("img_ids", "txt_ids"):
            inputs[name] = inputs[name].reshape(-1, inputs[name].shape[-1])
        extra = dict(inputs.pop("joint_attention_kwargs", None) or {})
        lora_scale = extra.pop("scale", 1.0)
        scale_lora_layers(self.model, lora_scale)
        try:
            if "ip_adapter_image_embeds" in extra:
                embeds = extra.pop("ip_adapter_image_embeds")
                extra["ip_hidden_states"] = self.model.encoder_hid_proj(embeds)
            grids = grids_of(inputs["img_ids"])
            output = _flux_step(self.model, grids, s, {**inputs, "joint_attention_kwargs": extra})
        finally:
            unscale_lora_layers(self.model, lora_scale)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def grids_of(ids: Tensor) -> list[Grid]:
    """Grids of the images packed one after the other; column 0 of the ids tells them apart."""
    grids = []
    for image in ids[:, 0].unique_consecutive():
        rows, columns = (ids[ids[:, 0] == image, axis].unique() for axis in (1, 2))
        grids.append((len(rows), len(columns)))
    assert sum(h * w for h, w in grids) == len(ids), "the ids are not those of whole images"
    return grids


def _flux_step(model: Any, grids: list[Grid], s: Settings, inputs: dict[str, Any]) -> Tensor:
    """One batch element at a time, so that each has its own rotary table."""
    outputs = []
    for b in range(len(inputs["hidden_states"])):
        one = {k: v if k.endswith("_ids") else _element(v, b) for k, v in inputs.items()}
        outputs.append(_FluxElement.make(model, grids, s, one, b).run(one))
    return torch.cat(outputs)


def _element(value: Any, b: int) -> Any:
    """The batch element b of every tensor inside `value`, as a batch of one."""
    if isinstance(value, Tensor):
        return value[b : b + 1]
    if isinstance(value, dict):
        return {k: _element(v, b) for k, v in value.items()}
    return [_element(v, b) for v in value] if isinstance(value, (list, tuple)) else value


def _controls(samples: Any, blocks: int, repeat: bool) -> list[Tensor | None]:
    """What a ControlNet adds after each of `blocks` blocks; it gives fewer samples than blocks."""
    if samples is None:
        return [None] * blocks
    interval = math.ceil(blocks / len(samples))
    return [samples[i % len(samples) if repeat else i // interval] for i in range(blocks)]


@dataclass
class _FluxElement:
    """One batch element `b` on its way through Flux: embeddings, rotary table, patterns."""

    model: Any
    grids: list[Grid]
    s: Settings
    b: int
    temb: Tensor
    rope: tuple[Tensor, ...]
    text_tokens: int
    extra: dict[str, Any]
    block: int = 0
    fresh: set[Any] = field(default_factory=set)

    @classmethod
    def make(
        cls, m: Any, grids: list[Grid], s: Settings, i: dict[str, Any], b: int
    ) -> _FluxElement:
        conditions = [i["timestep"] * 1000]
        if i.get("guidance") is not None:
            conditions.append(i["guidance"] * 1000)
        temb = m.time_text_embed(*conditions, i["pooled_projections"])
        rope = m.pos_embed(torch.cat([i["txt_ids"], i["img_ids"]]))
        extra = i.get("joint_attention_kwargs") or {}
        return cls(m, grids, s, b, temb, rope, len(i["txt_ids"]), extra)

    def pattern(self, tokens: Tensor) -> Pattern:
        s = self.s
        key = (s.now, self.b, self.block if s.share == "block" else 0)
        if s.refresh and key not in self.fresh:
            s.patterns[key] = make_pattern(tokens, self.grids, s)
            self.fresh.add(key)
        return s.patterns[key]

    def rotary(self, p: Pattern) -> tuple[Tensor, ...]:
        """Rotary tables of the text and of the destinations."""
        count = self.text_tokens
        kept = count + p.destinations[0]
        return tuple(torch.cat([table[:count], table[kept]]) for table in self.rope)

    def run(self, i: dict[str, Any]) -> Tensor:
        """The element from its inputs to the output tokens [1, N, C]."""
        m, s = self.model, self.s
        x, text = m.x_embedder(i["hidden_states"]), m.context_embedder(i["encoder_hidden_states"])
        blocks = [(self.double, block) for block in m.transformer_blocks]
        blocks += [(self.single, block) for block in m.single_transformer_blocks]
        repeat = i.get("controlnet_blocks_repeat", False)
        doubles, singles = len(m.transformer_blocks), len(m.single_transformer_blocks)
        controls = _controls(i.get("controlnet_block_samples"), doubles, repeat)
        controls += _controls(i.get("controlnet_single_block_samples"), singles, False)
        start = x
        for k, ((apply, block), control) in enumerate(zip(blocks, controls, strict=True)):
            self.block = k
            if s.scope == "sublayer":
                x, text = apply(block, x, text, self.rope)
            else:
                if s.scope == "block" or k == 0:
                    p, start = self.pattern(x), x
                    x = entered = p.merge @ x
                x, text = apply(block, x, text, self.rotary(p))
                if s.scope == "block":
                    x = start + p.unmerge @ (x - entered)
            if control is not None and s.scope == "stack":
                x = x + p.merge @ control
                if s.whole_controls:
                    start, entered = start + control, entered + p.merge @ control
            elif control is not None:
                x = x + control
        if s.scope == "stack":
            x = start + p.unmerge @ (x - entered)
        return m.proj_out(m.norm_out(x, self.temb))

    def double(self, block: Any, x: Tensor, text: Tensor, rope: Any) -> tuple[Tensor, Tensor]:
        """One double block; in scope sublayer its sublayers merge."""
        n, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1(x, emb=self.temb)
        nt, tgate, tshift, tscale, tgate_mlp = block.norm1_context(text, emb=self.temb)
        p = self.pattern(n) if self.s.scope == "sublayer" else None
        if p is not None:
            n, rope = p.merge @ n, self.rotary(p)
        a, at, *adapter = block.attn(
            hidden_states=n, encoder_hidden_states=nt, image_rotary_emb=rope, **self.extra
        )
        x = x + _unmerged(p, gate[:, None] * a)
        n = block.norm2(x) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        x = x + _unmerged(p, gate_mlp[:, None] * block.ff(p.merge @ n if p is not None else n))
        for image in adapter:
            x = x + _unmerged(p, image)
        text = text + tgate[:, None] * at
        nt = block.norm2_context(text) * (1 + tscale[:, None]) + tshift[:, None]
        return x, text + tgate_mlp[:, None] * block.ff_context(nt)

    def single(self, block: Any, x: Tensor, text: Tensor, rope: Any) -> tuple[Tensor, Tensor]:
        """One single block; in scope sublayer its attention and MLP merge together."""
        count = self.text_tokens
        n, gate = block.norm(torch.cat([text, x], 1), emb=self.temb)
        p = self.pattern(n[:, count:]) if self.s.scope == "sublayer" else None
        if p is not None:
            n, rope = torch.cat([n[:, :count], p.merge @ n[:, count:]], 1), self.rotary(p)
        mlp = block.act_mlp(block.proj_mlp(n))
        a = block.attn(hidden_states=n, image_rotary_emb=rope, **self.extra)
        u = gate[:, None] * block.proj_out(torch.cat([a, mlp], 2))
        return x + _unmerged(p, u[:, count:]), text + u[:, :count]


def _unmerged(p: Pattern | None, x: Tensor) -> Tensor:
    return x if p is None else p.unmerge @ x

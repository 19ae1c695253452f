"""Independent eager references of token merging in denoisers with linear attention.

Without softmax nothing averages over the tokens: keys and values are summed over them, so a merged
token of size s, the sum of the shares that tokens have in it, counts s times in each sum:

    out_i = q_i (sum_j s_j k_j v_j^T) / (q_i sum_j s_j k_j)

The attention of diffusers gets a processor that computes this, and its blocks run attention, linear
and cross, on merged tokens. Their feed-forward has convolutions and sees all tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference import Pattern, Settings
from tests.zoo import images, videos
from tests.zoo.base import Inputs
from tests.zoo.references import Blocks, Places, element

Rotate = Callable[[Tensor], Tensor]


def no_rotation(x: Tensor) -> Tensor:
    """There are no rotary tables."""
    return x


def rotation(tables: tuple[Tensor, Tensor]) -> Rotate:
    """Turns pairs of features of [B, N, heads, C] by cosines and sines, each written twice."""
    cosines, sines = (table[..., ::2] for table in tables)

    def rotate(x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(turned * torch.complex(cosines, sines)).flatten(-2)

    return rotate


@dataclass
class WeighedSum:
    """Processor of linear attention whose tokens count as often as `sizes` [B, N] says."""

    sizes: Tensor
    rotate: Rotate = no_rotation

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        projections = attn.to_q, attn.to_k, attn.to_v
        query, key, value = (projection(hidden_states) for projection in projections)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        query, key = query.clamp(min=0), key.clamp(min=0)
        total = torch.einsum("bnhc,bn->bhc", key, self.sizes)
        normalizer = torch.einsum("bnhc,bhc->bnh", query, total) + 1e-15
        query, key = self.rotate(query), self.rotate(key)
        sums = torch.einsum("bnhc,bnhd,bn->bhcd", key, value, self.sizes)
        out = torch.einsum("bnhc,bhcd->bnhd", query, sums) / normalizer[..., None]
        return attn.to_out[0](out.flatten(2))


@dataclass(frozen=True)
class Summing:
    """Reference of a model whose blocks have linear attention, cross-attention and a feed-forward.

    Attributes:
        grid: (rows, columns) or (frames, rows, columns) of the tokens.
    """

    grid: tuple[int, ...]

    def __call__(self, model: nn.Module, inputs: Inputs, settings: Settings) -> list[Tensor]:
        model = copy.deepcopy(model)
        blocks = list(model.get_submodule("transformer_blocks").children())
        outputs = []
        for b in range(len(inputs["hidden_states"])):
            walk = _Walk(self.grid, settings, b)
            for number, block in enumerate(blocks):
                block.forward = partial(walk.run, number, block)
            own = {name: element(name, value, b) for name, value in inputs.items()}
            results = model(**own)
            flat = results[0] if isinstance(results[0], Sequence) else results
            outputs.append([x for x in flat if isinstance(x, Tensor)])
        return [torch.cat(parts) for parts in zip(*outputs, strict=True)]


@dataclass
class _Walk:
    """A picture or video on its way through the blocks; its pattern goes by the name `key`."""

    grid: tuple[int, ...]
    settings: Settings
    key: Hashable
    fresh: bool = field(default=False)

    def pattern(self, x: Tensor) -> Pattern:
        """One pattern for all blocks, of the first tokens that merge."""
        if self.settings.refresh and not self.fresh:
            self.settings.patterns[self.key] = Blocks(self.grid).pattern(x, self.settings)
            self.fresh = True
        return self.settings.patterns[self.key]

    def run(
        self,
        number: int,
        block: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        text: Tensor,
        text_mask: Tensor,
        timestep: Tensor,
        *sides_and_tables: Any,
    ) -> Tensor:
        """What stands for the `forward` of a block."""
        *sides, tables = sides_and_tables if len(self.grid) == 3 else (*sides_and_tables, None)
        assert attention_mask is None
        assert tuple(sides) == self.grid
        x, modulation = hidden_states, block.scale_shift_table + timestep.view(6, -1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation

        def attend(x: Tensor, p: Pattern) -> Tensor:
            """Linear attention to merged tokens."""
            at = Places(p.destinations[0], p.unmerge.shape[1])
            rotate = no_rotation if tables is None else rotation(at(tables, 1))
            block.attn1.processor = WeighedSum(p.unmerge.sum(1), rotate)
            return block.attn1(x)

        def look(x: Tensor) -> Tensor:
            """Cross-attention; each token looks by itself."""
            return block.attn2(x, encoder_hidden_states=text, attention_mask=text_mask)

        def modulate(x: Tensor) -> Tensor:
            return block.norm1(x) * (1 + scale) + shift

        if self.settings.scope == "sublayer":
            normed = modulate(x)
            p = self.pattern(normed)
            x = x + gate * (p.unmerge @ attend(p.merge @ normed, p))
            x = x + p.unmerge @ look(p.merge @ x)
        else:
            p = self.pattern(x)
            start, entered = x, p.merge @ x
            x = entered + gate * attend(modulate(entered), p)
            x = x + look(x)
            x = start + p.unmerge @ (x - entered)
        normed = block.norm2(x) * (1 + scale_mlp) + shift_mlp
        picture = normed.unflatten(1, self.grid)
        if len(self.grid) == 2:
            update = block.ff(picture.permute(0, 3, 1, 2)).flatten(2).mT
        else:
            update = block.ff(picture).flatten(1, 3)
        return x + gate_mlp * update


LINEAR = {
    "sana": Summing((images.H, images.W)),
    "sana_sprint": Summing((images.H, images.W)),
    "sana_controlnet": Summing((images.H, images.W)),
    "sana_video": Summing(videos.GRID),
}
"""By the name of the case."""

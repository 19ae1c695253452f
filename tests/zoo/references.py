"""Independent eager references of token merging for denoisers other than UNets and Flux.

Each runs the real model of diffusers with the `forward` of its transformer blocks wrapped, one
element of the batch at a time, and shares no code with the package. Patterns and the formula of
scopes "block" and "stack" are those of `tests.reference`:

    x_b = x_a + U (x_b' - M x_a),   x_b' what the blocks make of M x_a

Text passes unchanged; tables along the tokens (rotary tables, masks, modulation of each token) are
taken at the destinations. What the model adds to every token on the way (c) stays whole:

    x_b = x_a + c + U (x_b' - M (x_a + c))
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tests.reference import Pattern, Settings, make_pattern
from tests.zoo import images, unets, videos
from tests.zoo.base import Inputs

Arguments = dict[str, Any]
"""What a block is called with, by name."""


class Reference(Protocol):
    """Runs a model on inputs with merging; gives its output tensors.

    `settings` keeps the patterns of a call that refreshes for calls that don't.
    """

    def __call__(self, model: nn.Module, inputs: Inputs, settings: Settings) -> list[Tensor]: ...


@dataclass(frozen=True)
class Places:
    """Takes the entries at the destinations `index` out of a table along `tokens` tokens."""

    index: Tensor
    tokens: int

    def __call__(self, table: Any, dim: int, *, last: bool = False) -> Any:
        """The table of the merged tokens.

        What is left of `dim` belongs to text, which stays: behind the image, or before it if the
        image comes `last`.
        """
        if isinstance(table, (tuple, list)):
            return tuple(self(part, dim, last=last) for part in table)
        rest = table.shape[dim] - self.tokens
        sizes = [rest, self.tokens, 0] if last else [0, self.tokens, rest]
        before, image, behind = table.split(sizes, dim)
        return torch.cat([before, image.index_select(dim, self.index), behind], dim)


Tables = Callable[[Arguments, Places], Arguments]
"""The arguments of a block that change when only the tokens at some places are left."""


def no_tables(arguments: Arguments, at: Places) -> Arguments:
    """Positions are part of the embeddings; nothing else runs along the tokens."""
    return {}


@dataclass(frozen=True)
class Blocks:
    """Reference of a model that is a list of transformer blocks.

    Attributes:
        grid: (rows, columns) or (frames, rows, columns) of the tokens.
        tables: see `Tables`.
        lists: where the model keeps its blocks, in order.
        image: which of several results of a block is the image.
        added: (inputs of the call, number of a block, its arguments) -> what is added to every
            token before that block, taken out of its arguments.
        withheld: inputs that `added` stands for.
    """

    grid: tuple[int, ...]
    tables: Tables = no_tables
    lists: tuple[str, ...] = ("transformer_blocks",)
    image: int = 0
    added: Callable[[Inputs, int, Arguments], Tensor | None] = lambda inputs, block, arguments: None
    withheld: tuple[str, ...] = ()

    def __call__(self, model: nn.Module, inputs: Inputs, settings: Settings) -> list[Tensor]:
        model = copy.deepcopy(model)
        blocks = [block for name in self.lists for block in model.get_submodule(name).children()]
        outputs = []
        for b in range(len(inputs["hidden_states"])):
            own = {name: element(name, value, b) for name, value in inputs.items()}
            Walk(self, settings, own, b, len(blocks)).wrap(blocks)
            given = {k: None if k in self.withheld else v for k, v in own.items()}
            outputs.append([x for x in model(**given) if isinstance(x, Tensor)])
        return [torch.cat(parts) for parts in zip(*outputs, strict=True)]

    def pattern(self, x: Tensor, settings: Settings) -> Pattern:
        """The pattern of tokens [B, N, C]; windows lie in one frame."""
        *frames, height, width = self.grid
        return make_pattern(x, [(height, width)] * math.prod(frames), settings)


def element(name: str, value: Any, b: int) -> Any:
    """The batch element b, as a batch of one, of what has a batch of two."""
    if name.startswith("indices"):  # of frames, the same for all
        return value
    if isinstance(value, Tensor):
        return value[b : b + 1] if len(value.shape) and len(value) == 2 else value
    if name == "img_shapes":
        return value[b : b + 1]
    return [element(name, v, b) for v in value] if isinstance(value, list) else value


@dataclass
class Walk:
    """A batch on its way through some blocks; its pattern goes by the name `key`."""

    family: Blocks
    settings: Settings
    inputs: Inputs
    key: Hashable
    count: int

    def wrap(self, blocks: Sequence[nn.Module]) -> None:
        """Make the blocks merge."""
        for number, block in enumerate(blocks):
            block.forward = partial(self.run, number, block)

    def run(self, number: int, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What stands for the `forward` of the block of this number."""
        call = inspect.signature(type(block).forward).bind(block, *args, **kwargs)
        arguments, scope = call.arguments, self.settings.scope
        addition = self.family.added(self.inputs, number, arguments)
        x = arguments["hidden_states"]
        if scope == "block" or number == 0:
            x = self.enter(x, addition, refresh=self.settings.refresh and number == 0)
        elif addition is not None:
            x = self.add(x, addition)
        arguments["hidden_states"] = x
        places = Places(self.kept.destinations[0], math.prod(self.family.grid))
        arguments.update(self.family.tables(arguments, places))
        result = type(block).forward(*call.args, **call.kwargs)
        if scope == "stack" and number < self.count - 1:
            return result
        if isinstance(result, Tensor):
            return self.leave(result)
        parts = list(result)
        parts[self.family.image] = self.leave(parts[self.family.image])
        return tuple(parts)

    @property
    def kept(self) -> Pattern:
        return self.settings.patterns[self.key]

    def enter(self, x: Tensor, addition: Tensor | None, *, refresh: bool) -> Tensor:
        """Merge the image tokens, which are the last of [text | image]."""
        text = x.shape[1] - math.prod(self.family.grid)
        self.start = x[:, text:] if addition is None else x[:, text:] + addition
        if refresh:
            self.settings.patterns[self.key] = self.family.pattern(self.start, self.settings)
        self.entered = self.kept.merge @ self.start
        return torch.cat([x[:, :text], self.entered], 1)

    def add(self, x: Tensor, addition: Tensor) -> Tensor:
        """Add to all tokens on the way: the whole to what the update is added to."""
        merged = self.kept.merge @ addition
        self.start, self.entered = self.start + addition, self.entered + merged
        return x + merged

    def leave(self, x: Tensor) -> Tensor:
        """Add the unmerged update to what entered."""
        text = x.shape[1] - self.entered.shape[1]
        update = self.kept.unmerge @ (x[:, text:] - self.entered)
        return torch.cat([x[:, :text], self.start + update], 1)


# -- tables of the families -----------------------------------------------------------------------


def rotary(name: str = "image_rotary_emb", dim: int = 0, *, last: bool = False) -> Tables:
    """A rotary table, or cosines and sines, with tokens along `dim`."""

    def tables(arguments: Arguments, at: Places) -> Arguments:
        return {name: at(arguments[name], dim, last=last)}

    return tables


def chroma_tables(arguments: Arguments, at: Places) -> Arguments:
    """Table and mask [B, text + image] are along text and image."""
    return {
        "image_rotary_emb": at(arguments["image_rotary_emb"], 0, last=True),
        "attention_mask": at(arguments["attention_mask"], 1, last=True),
    }


def qwen_tables(arguments: Arguments, at: Places) -> Arguments:
    """Image and text have a table each."""
    image, text = arguments["image_rotary_emb"]
    return {"image_rotary_emb": (at(image, 0), text)}


def modulated_qwen_tables(arguments: Arguments, at: Places) -> Arguments:
    """Which of two modulations each image token gets, [B, N]."""
    return {**qwen_tables(arguments, at), "modulate_index": at(arguments["modulate_index"], 1)}


def lumina_tables(arguments: Arguments, at: Places) -> Arguments:
    """A table and a mask over the image.

    Scores are scaled by sqrt(log(tokens) / log(base)), which says how large the picture is: merging
    leaves it as large, so the base makes up for the tokens that are gone.
    """
    extra = dict(arguments["cross_attention_kwargs"])
    left, base = len(at.index), extra["base_sequence_length"]
    extra["base_sequence_length"] = left ** (math.log(base) / math.log(at.tokens))
    return {
        "image_rotary_emb": at(arguments["image_rotary_emb"], 1),
        "attention_mask": at(arguments["attention_mask"], 1),
        "cross_attention_kwargs": extra,
    }


def modulated_wan_tables(arguments: Arguments, at: Places) -> Arguments:
    """A modulation [B, N, 6, C] of each token, and rotary tables [1, N, 1, C]."""
    return {"temb": at(arguments["temb"], 1), "rotary_emb": at(arguments["rotary_emb"], 1)}


def modulated_ltx_tables(arguments: Arguments, at: Places) -> Arguments:
    """A modulation [B, N, 6 C] of each token, and rotary tables [B, N, C]."""
    names = ("temb", "image_rotary_emb")
    return {name: at(arguments[name], 1) for name in names}


def hunyuan_tables(arguments: Arguments, at: Places) -> Arguments:
    """A rotary table over the video and a mask [B, 1, 1, video + text]."""
    name = "freqs_cis" if "freqs_cis" in arguments else "image_rotary_emb"
    return {
        name: at(arguments[name], 0),
        "attention_mask": at(arguments["attention_mask"], 3),
    }


def history_tables(arguments: Arguments, at: Places) -> Arguments:
    """A rotary table over the history and the video; one prompt alone is cut, and has no mask."""
    assert arguments["attention_mask"] is None
    name = "freqs_cis" if "freqs_cis" in arguments else "image_rotary_emb"
    return {name: at(arguments[name], 0, last=True)}


def first_frame_tables(arguments: Arguments, at: Places) -> Arguments:
    """As `hunyuan_tables`; the first tokens that are left are those of the first frame.

    No window reaches from it into the next, and the windows are in order.
    """
    left = int((at.index < arguments["num_tokens"]).sum())
    assert (at.index[:left] < arguments["num_tokens"]).all()
    return {**hunyuan_tables(arguments, at), "num_tokens": left}


def allegro_tables(arguments: Arguments, at: Places) -> Arguments:
    """Where each token looks up time, row and column in tables of these."""
    axes, places = arguments["image_rotary_emb"]
    return {"image_rotary_emb": (axes, at(places, 1))}


def cosmos2_tables(arguments: Arguments, at: Places) -> Arguments:
    """Rotary tables, and a modulation [B, N, C] of each token."""
    modulation = {name: at(arguments[name], 1) for name in ("embedded_timestep", "temb")}
    return {**modulation, "image_rotary_emb": at(arguments["image_rotary_emb"], 0)}


def cosmos_positions(inputs: Inputs, block: int, arguments: Arguments) -> Tensor | None:
    """Every block adds the learned positions [B, N, C] first."""
    positions: Tensor = arguments["extra_pos_emb"]
    arguments["extra_pos_emb"] = None
    return positions


def sd3_controls(inputs: Inputs, block: int, arguments: Arguments) -> Tensor | None:
    """Two residuals for three blocks: the first for blocks 0 and 1, none after the last."""
    return inputs["block_controlnet_hidden_states"][0] if block else None


def animatediff(model: nn.Module, inputs: Inputs, settings: Settings) -> list[Tensor]:
    """Spatial transformers between motion modules, which see all tokens."""
    model = copy.deepcopy(model)
    for name, stage in model.named_modules():
        if type(stage).__name__ == "Transformer2DModel":
            blocks = list(stage.get_submodule("transformer_blocks").children())
            grid = unets.SMALL if name.startswith("mid_block") else unets.LARGE
            merge_frames(blocks, grid, settings, name)
    return [model(**inputs)[0]]


def latte(model: nn.Module, inputs: Inputs, settings: Settings) -> list[Tensor]:
    """A block over frames, which sees all tokens, follows every block over the picture."""
    model = copy.deepcopy(model)
    for number, block in enumerate(model.get_submodule("transformer_blocks").children()):
        merge_frames([block], (6, 8), settings, number)
    return [model(**inputs)[0]]


def merge_frames(
    blocks: Sequence[nn.Module], grid: tuple[int, int], settings: Settings, key: Hashable
) -> None:
    """Make blocks merge whose batch holds frames, each with its own pattern."""
    Walk(Blocks(grid), settings, {}, key, len(blocks)).wrap(blocks)


def ernie(model: nn.Module, inputs: Inputs, settings: Settings) -> list[Tensor]:
    """Blocks on [image | text] with the tokens before the batch."""
    model = copy.deepcopy(model)
    blocks, count = list(model.get_submodule("layers").children()), math.prod(PICTURE)

    def run(
        walk: Walk, number: int, x: Tensor, rotary: Tensor, temb: list[Tensor], mask: Tensor
    ) -> Tensor:
        if settings.scope == "block" or number == 0:
            text = x[count:]
            x = walk.enter(x[:count].transpose(0, 1), None, refresh=number == 0)
            x = torch.cat([x.transpose(0, 1), text])
        at = Places(walk.kept.destinations[0], count)
        block = blocks[number]
        tables = at(rotary, 1), at(temb, 0), at(mask, 3)
        y = type(block).forward(block, x, *tables)
        if settings.scope == "stack" and number < len(blocks) - 1:
            return y
        left = walk.entered.shape[1]
        image = walk.leave(y[:left].transpose(0, 1))
        return torch.cat([image.transpose(0, 1), y[left:]])

    outputs = []
    for b in range(len(inputs["hidden_states"])):
        walk = Walk(Blocks(PICTURE), settings, {}, b, len(blocks))
        for number, block in enumerate(blocks):
            block.forward = partial(run, walk, number)
        own = {name: element(name, value, b) for name, value in inputs.items()}
        outputs.append(model(**own)[0])
    return [torch.cat(outputs)]


PICTURE, VIDEO = (images.H, images.W), videos.GRID
PAIR = (images.H + 8, images.W)
"""A picture and another of 8 rows below it: no window crosses, as windows have 2 rows at most."""
DOUBLE_SINGLE = ("transformer_blocks", "single_transformer_blocks")

REFERENCES: Mapping[str, Reference] = {
    "sd3": Blocks(PICTURE, image=1),
    "sd35_medium": Blocks(PICTURE, image=1),
    "sd3_controlled": Blocks(
        PICTURE, image=1, added=sd3_controls, withheld=("block_controlnet_hidden_states",)
    ),
    "aura_flow": Blocks(
        PICTURE, lists=("joint_transformer_blocks", "single_transformer_blocks"), image=1
    ),
    "pixart_sigma": Blocks(PICTURE),
    "dit": Blocks((images.SIDE, images.SIDE)),
    "lumina_next": Blocks(PICTURE, lumina_tables, lists=("layers",)),
    "cogview3_plus": Blocks(PICTURE),
    "cogview4": Blocks(PICTURE, rotary()),
    "chroma": Blocks(PICTURE, chroma_tables, DOUBLE_SINGLE, image=1),
    "flux2": Blocks(PICTURE, rotary(last=True), DOUBLE_SINGLE, image=1),
    "flux2_edit": Blocks(PAIR, rotary(last=True), DOUBLE_SINGLE, image=1),
    "qwen_image": Blocks(PICTURE, qwen_tables, image=1),
    "qwen_image_edit_2511": Blocks(PAIR, modulated_qwen_tables, image=1),
    "wan": Blocks(VIDEO, rotary("rotary_emb", 1), ("blocks",)),
    "wan_ti2v": Blocks(VIDEO, modulated_wan_tables, ("blocks",)),
    "cogvideox_resized": Blocks(VIDEO),
    "cogvideox_5b": Blocks(VIDEO, rotary()),
    "consisid": Blocks(VIDEO, rotary()),
    "ltx": Blocks(VIDEO, rotary(dim=1)),
    "ltx_condition": Blocks(VIDEO, modulated_ltx_tables),
    "hunyuan_video": Blocks(VIDEO, hunyuan_tables, DOUBLE_SINGLE),
    "hunyuan_video_i2v": Blocks(VIDEO, first_frame_tables, DOUBLE_SINGLE),
    "framepack_pair": Blocks(videos.VIDEO, history_tables, DOUBLE_SINGLE),
    "motif": Blocks(VIDEO, hunyuan_tables, DOUBLE_SINGLE),
    "allegro": Blocks(VIDEO, allegro_tables),
    "easyanimate": Blocks(VIDEO, rotary()),
    "cosmos": Blocks(VIDEO, rotary(), added=cosmos_positions),
    "cosmos2": Blocks(VIDEO, cosmos2_tables),
    "ernie_image": ernie,
    "animatediff": animatediff,
    "latte": latte,
}
"""By the name of the case."""
FAMILIES: tuple[str, ...] = tuple(REFERENCES)

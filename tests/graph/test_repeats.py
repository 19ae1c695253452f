"""Blocks that repeat: found by what they compute, called instead of repeated, compiled once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor import config, metrics

import toma_fx
from tests import denoisers
from toma_fx.capture.model import capture
from toma_fx.compat.compilers import compile_graph
from toma_fx.errors import ConfigError
from toma_fx.graph.outline import outline
from toma_fx.graph.repeats import find_repeats, operands_of
from toma_fx.graph.rewriter import copy_graph
from toma_fx.graph.verify import output_values, verify
from toma_fx.run.backend import Options


class Block(nn.Module):
    """Attention and an MLP on a residual stream; `way` makes it another computation."""

    def __init__(self, width: int = 16, way: str = "") -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out, self.up = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.down, self.way = nn.Linear(2 * width, width), way

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x) + shift).chunk(3, -1)
        q, k = (k, q) if self.way == "swapped" else (q, k)
        split = [y.unflatten(-1, (4, -1)).transpose(1, 2) for y in (q, k, v)]
        y = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        x = x + self.out(y) * (0.5 if self.way == "literal" else 1.0)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return x.flip(1) if self.way == "longer" else x


class Stack(nn.Module):
    """Blocks one after the other, with something that differs before, between and behind."""

    def __init__(self, blocks: list[Block], *, skips: bool = False) -> None:
        super().__init__()
        self.blocks, self.skips = nn.ModuleList(blocks), skips
        self.enter, self.leave = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        shift, kept = x.mean(1, keepdim=True), []
        for block in self.blocks:
            kept.append(x)
            x = block(x, shift)
        if self.skips:  # inner values of all blocks are read at the end
            x = x + torch.cat(kept, -1).unflatten(-1, (-1, 16)).sum(-2)
        return self.leave(x)


def captured(model: nn.Module, *inputs: Any) -> fx.GraphModule:
    return capture(model.eval(), inputs, {}).graph_module


def shape(graph_module: fx.GraphModule) -> list[tuple[int, int]]:
    """(stretches, values they give) of every repeat."""
    return [(len(r.stretches), len(r.outputs)) for r in find_repeats(graph_module.graph)]


def same(graph_module: fx.GraphModule, *inputs: Any) -> fx.GraphModule:
    """The outlined graph, which computes the same bit by bit."""
    outlined = copy_graph(graph_module)
    outline(outlined)
    with torch.no_grad():
        pairs = zip(outlined(*inputs), graph_module(*inputs), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    names = [n.name for n in graph_module.graph.nodes if n.op == "placeholder"]
    verify(outlined, names, output_values(graph_module.graph), "outline")
    assert {id(p) for p in outlined.parameters()} == {id(p) for p in graph_module.parameters()}
    return outlined


X = torch.rand(2, 8, 4)


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("depth", [2, 3, 7])
def test_a_stack(depth: int, skips: bool) -> None:
    graph_module = captured(Stack([Block() for _ in range(depth)], skips=skips), X)
    assert shape(graph_module) == [(depth, 1)]
    (repeat,) = find_repeats(graph_module.graph)
    computed = [x for x in operands_of(repeat.stretches[0]) if x.op == "call_function"]
    assert len(computed) == 2, "the stream and what all blocks read"
    outlined = same(graph_module, X)
    assert len(outlined.graph.nodes) < len(graph_module.graph.nodes) or depth == 2


@pytest.mark.parametrize("way", ["swapped", "literal"])
def test_blocks_that_differ_are_apart(way: str) -> None:
    """Three of one kind and two of another, in turn."""
    blocks = [Block(way=way if i % 2 else "") for i in range(5)]
    graph_module = captured(Stack(blocks), X)
    same(graph_module, X)
    for repeat in find_repeats(graph_module.graph):
        kinds = [
            {str(n.meta["nn_module_stack"]).split("blocks.")[1][0] for n in nodes if "blocks." in
             str(n.meta.get("nn_module_stack"))} for nodes in repeat.stretches
        ]  # fmt: skip
        parities = {tuple(sorted(int(i) % 2 for i in each)) for each in kinds}
        assert len(parities) == 1, "a stretch stands for blocks of the same kinds alone"


def test_a_part_of_a_block_that_ends_otherwise() -> None:
    graph_module = captured(Stack([Block(), Block(way="longer"), Block()]), X)
    assert max(n for n, _ in shape(graph_module)) == 3, "what they have in common"
    same(graph_module, X)


def test_nothing_that_repeats() -> None:
    graph_module = captured(Stack([Block()]), X)
    before = str(graph_module.graph)
    outline(graph_module)
    assert str(graph_module.graph) == before


def test_blocks_of_one_weight() -> None:
    block = Block()
    same(captured(Stack([block, block, block]), X), X)


class Views(nn.Module):
    """Blocks that hand on views of what they were given, and of what they made."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

    def forward(self, x: Tensor) -> list[Tensor]:
        seen = []
        for a, b in zip(self.layers[::2], self.layers[1::2], strict=True):
            given = x.transpose(1, 2).unsqueeze(0)
            x = a(F.gelu(b(torch.relu(x) + 1) * 2) - 1).unflatten(1, (2, -1)).sin().flatten(1, 2)
            seen += [given, x.transpose(1, 2), x[:, 1:]]
        return [x, *seen]


def test_views_are_made_outside() -> None:
    graph_module = captured(Views(), X)
    assert shape(graph_module)
    same(graph_module, X)


PROGRAMS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "flux": lambda: (
        denoisers.flux(num_layers=3, num_single_layers=4),
        denoisers.flux_inputs(8, 8),
    ),
    "sdxl": lambda: (denoisers.sdxl(), denoisers.sdxl_inputs()),
}


@pytest.mark.parametrize("scope", ["sublayer", "stack"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str, scope: str) -> None:
    """Every kind of program of a denoiser, on the values that a generation gives it."""
    model, inputs = PROGRAMS[name]()
    options = {"scope": scope, "min_tokens": 1, "cache": "balanced", "weights_every": 2}
    optimized: Any = toma_fx.optimize(model, **options)
    with optimized.generation(steps=4) as run, torch.no_grad():
        for i in range(4):
            run.step(i)
            optimized(**inputs)
    (specialization,) = optimized.specializations
    assert len(specialization.programs) > 1
    for program in specialization.programs.values():
        nodes = program.graph_module.graph.find_nodes(op="placeholder")
        values = [_real(n.meta["val"]) for n in nodes]
        same(program.graph_module, *values)
        assert find_repeats(program.graph_module.graph), "there was something to outline"


def _real(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dtype.is_floating_point:
        return torch.rand(value.shape, dtype=value.dtype)
    return torch.zeros(value.shape, dtype=value.dtype)


def kernels(depth: int, *, outlined: bool) -> int:
    """Kernels that Inductor writes for a stack."""
    model = Stack([Block() for _ in range(depth)]).eval()
    graph_module = captured(model, X)
    if outlined:
        outline(graph_module)
    (entry,) = graph_module.graph.find_nodes(op="placeholder")
    metrics.reset()
    with torch.no_grad():
        compiled = compile_graph(graph_module, [entry.meta["val"]], {})
        assert torch.allclose(compiled(X)[0], model(X), atol=1e-5)
    return metrics.generated_kernel_count


def test_inductor_compiles_a_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "force_disable_caches", True)
    flat, once = ([kernels(n, outlined=o) for n in (3, 6)] for o in (False, True))
    assert flat[1] > flat[0]
    assert once[1] == once[0]


def test_the_option() -> None:
    with pytest.raises(ConfigError, match="outline"):
        Options.make(None, {"outline": "no"})
    assert [Options.make(None, o).outline for o in ({}, {"outline": False})] == [True, False]

"""Programs compiled by Inductor without a second capture: `.compile()` and `torch.compile(...)`.

    program -> copy, blocks outlined, parameters as inputs -> Inductor -> call

Dynamo would read every program again, guard every parameter of it at every step, and break the
graph at each block that repeats. What it guards is known here: shapes, dtypes and the model by the
signature, torch's global switches by torch's own guard. What only Inductor cares for, the strides
of inputs, is made what the program was compiled for.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from toma_fx.compat.compilers import (
    begin_invocation,
    compile_graph,
    disable_dynamo,
    dynamo_callback,
    global_state,
    inductor_of,
    inductor_patches,
    makes_cuda_graphs,
    note_inputs,
    noted_input,
    skip_frame,
)
from toma_fx.compat.pytorch import fake_values
from toma_fx.errors import ConfigError, UnknownNameError, nearest
from toma_fx.events import emit
from toma_fx.graph.lifting import has_subgraphs, lift_constants
from toma_fx.graph.outline import outline, replace_subgraphs
from toma_fx.graph.rewriter import copy_graph
from toma_fx.methods.checks import check_switch
from toma_fx.passes.pipeline import Program
from toma_fx.run.tracing import tracing

_log = logging.getLogger("toma_fx.run")


@dataclass(frozen=True)
class Compilation:
    """How programs are compiled.

    Attributes:
        options: of `torch.compile`. patches: the changes to Inductor's configuration that these
            are; None: they ask for something else than Inductor, and Dynamo has to hand it over.
        outline: whether blocks that repeat are compiled once.
        blocks_only: whether nothing else is compiled.
    """

    options: Mapping[str, Any]
    patches: Mapping[str, Any] | None
    outline: bool
    blocks_only: bool = False

    @classmethod
    def make(
        cls,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        outline: bool = True,
        blocks_only: bool = False,
    ) -> Compilation:
        """From the arguments of `torch.compile` that follow the model.

        Raises:
            ConfigError: options that Inductor doesn't have.
        """
        check_switch("outline", outline, "compile")
        parameters = inspect.signature(torch.compile).parameters
        names = list(parameters)[1:]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for name in kwargs:
            if name not in names and not takes_any:
                raise UnknownNameError(
                    f"torch.compile has no option {name!r}",
                    where="compile",
                    hint=nearest(name, names),
                )
        options = {"dynamic": False, **dict(zip(names, args, strict=False)), **kwargs}
        asked = {"backend": "inductor", **options}
        if asked["backend"] != "inductor" or asked.get("disable"):
            if blocks_only:
                _log.warning("only Inductor takes blocks: another back end gets whole programs")
            return cls(options, None, outline, blocks_only)
        if asked.get("dynamic"):
            _log.warning("dynamic=True has no effect: every signature has programs of its own")
        patches = patches_of(asked.get("mode"), asked.get("options"))
        if blocks_only and makes_cuda_graphs(patches):
            raise ConfigError(
                "a CUDA graph of each block would copy its parameters at each call",
                where="compile_repeated_blocks",
                expected="a mode without CUDA graphs",
                got=str(asked.get("mode") or asked.get("options")),
                hint="compile(...) makes CUDA graphs of whole programs",
            )
        return cls(options, None if patches.get("freezing") else patches, outline, blocks_only)


def patches_of(mode: str | None, options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The changes to Inductor's configuration that a mode and options of `torch.compile` are.

    Raises:
        ConfigError: there is no such mode or option, or both are given.
    """
    if mode is not None and options:
        raise ConfigError(
            "torch.compile takes a mode or options",
            where="compile",
            expected="mode= or options=",
            got="both",
            hint="a mode is options: torch._inductor.list_mode_options(mode)",
        )
    try:
        return inductor_patches(mode, options)
    except RuntimeError as error:  # torch's own, of both
        raise ConfigError(
            "Inductor can't be told this",
            where="mode" if options is None else "options",
            expected="a mode of torch.compile, or fields of torch._inductor.config",
            got=str(error),
        ) from error


@dataclass
class _Variant:
    """What Inductor made of a program, under some of torch's global switches.

    Attributes:
        run: what it made. holds: whether the switches are what they were.
        tensors: parameters and buffers, its first arguments. strides: by place among the inputs of
            the program, of those that follow.
    """

    run: Callable[..., Sequence[Any]]
    holds: Callable[[], bool]
    tensors: list[Tensor]
    strides: Sequence[tuple[int, tuple[int, ...]]]

    def __call__(self, inputs: Sequence[Any]) -> Sequence[Any]:
        rest = [_with_strides(inputs[place], strides) for place, strides in self.strides]
        begin_invocation()
        return self.run(*self.tensors, *rest)


def _with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor, copied if it lies in memory in another way."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(
        tensor.shape, strides, dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)


def _separate(values: Sequence[Any]) -> list[Any]:
    """Values of which each element has memory of its own: rows that are one row in this call, a
    timestep expanded, may differ in the next."""
    expanded = [any(size > 1 and not step for size, step in zip(v.shape, v.stride(), strict=True))
                for v in values]  # fmt: skip
    return [v.contiguous() if x else v for v, x in zip(values, expanded, strict=True)]


class _Block(nn.Module):
    """A subgraph that Inductor compiled; whoever calls it is not compiled."""

    def __init__(self, patches: Mapping[str, Any], subgraph: fx.GraphModule) -> None:
        super().__init__()
        nodes = subgraph.graph.find_nodes(op="placeholder")
        values = _separate(fake_values([node.meta["val"] for node in nodes]))
        self._strides = [value.stride() for value in values]
        self._run = compile_graph(subgraph, values, patches)

    def forward(self, *operands: Tensor) -> Sequence[Tensor]:
        """Run it."""
        results: Sequence[Tensor] = self._run(*map(_with_strides, operands, self._strides))
        return results


class CompiledProgram:
    """A program to call, which is compiled when it is called first.

    Attributes:
        overwrites_outputs: whether it may write again to the memory of what it returned: then it is
            a CUDA graph, or what another back end made.

    Args:
        program: as it was rewritten.
        compilation: how; None: it runs as it is, or as the `torch.compile` says that compiled the
            caller.
    """

    def __init__(self, program: Program, compilation: Compilation | None) -> None:
        skip_frame(CompiledProgram.__call__)
        self.program, self.compilation = program, compilation
        self._patches = None if compilation is None else compilation.patches
        self._outlines = compilation is None or compilation.outline
        self._blocks_only = compilation is not None and compilation.blocks_only
        self._variants: list[tuple[Mapping[str, Any], _Variant]] = []
        self._names: tuple[str, ...] = ()
        self._callback = dynamo_callback()
        self.overwrites_outputs = compilation is not None and compilation.patches is None
        self._forward: Callable[..., Sequence[Any]] = program.graph_module.forward
        if compilation is not None and compilation.patches is None:
            self._forward = torch.compile(program.graph_module, **compilation.options)

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        """Run it."""
        patches, callback = self._patches, self._callback()
        if patches is None and callback:
            patches = self._patches_of(callback)
            self.overwrites_outputs |= patches is None
        return self._forward(*inputs) if patches is None else self._run(patches, inputs)

    def rebind(self) -> None:
        """Follow parameters and buffers that were made anew in the program."""
        for _, variant in self._variants:
            variant.tensors[:] = self._tensors()

    def _tensors(self) -> list[Tensor]:
        return [attrgetter(name)(self.program.graph_module) for name in self._names]

    @disable_dynamo
    def _patches_of(self, callback: Any) -> Mapping[str, Any] | None:
        """The changes to Inductor's configuration of the `torch.compile` that compiles the caller;
        None: it compiles for something else."""
        patches = None if self.compilation is not None else inductor_of(callback)
        return None if patches is None or patches.get("freezing") else patches

    @disable_dynamo
    def _run(self, patches: Mapping[str, Any], inputs: Sequence[Any]) -> Sequence[Any]:
        return self._variant(patches)(inputs)

    def _variant(self, patches: Mapping[str, Any]) -> _Variant:
        variant = self._known(patches)
        if variant is None:
            with tracing(), torch.no_grad():
                variant = self._known(patches)
                if variant is None:
                    variant = self._compile(patches)
                    self._variants.append((patches, variant))
        return variant

    def _known(self, patches: Mapping[str, Any]) -> _Variant | None:
        return next((v for p, v in self._variants if p == patches and v.holds()), None)

    def _compile(self, patches: Mapping[str, Any]) -> _Variant:
        start = time.perf_counter()
        program = copy_graph(self.program.graph_module)
        if self._outlines and not patches.get("cpp_wrapper"):  # C++ can't call subgraphs
            outline(program)
        lifted = lift_constants(program)
        nodes = lifted.graph_module.graph.find_nodes(op="placeholder")
        takes, constants = set(self.program.takes), len(lifted.constants)
        values = fake_values([node.meta["val"] for node in nodes])
        values[constants:] = _separate(values[constants:])
        static = [True] * constants + [n.name in takes for n in nodes[constants:]]
        pairs = zip(nodes, static, strict=True)
        note_inputs(lifted.graph_module, [noted_input(n.name, static=fixed) for n, fixed in pairs])
        self._names = lifted.constants
        run: Callable[..., Sequence[Any]] | None = None
        if self._blocks_only and replace_subgraphs(lifted.graph_module, partial(_Block, patches)):
            run = lifted.graph_module.forward
        run = run or compile_graph(lifted.graph_module, values, patches)
        self.overwrites_outputs |= makes_cuda_graphs(patches)
        strides = [value.stride() for value in values[constants:]]
        known = any(p == patches for p, _ in self._variants)
        again = " again: torch's global switches changed" if known else ""
        seconds = time.perf_counter() - start
        emit(
            _log,
            logging.INFO,
            "compile",
            "compiled a program (%s) in %.1f s%s",
            self.program.use.name,
            seconds,
            again,
            seconds=seconds,
            kind=self.program.use.name,
            again=known,
        )
        kept = list(zip(lifted.kept, strides, strict=True))
        return _Variant(run, global_state(), self._tensors(), kept)


def make_program(
    program: Program, compilation: Compilation | None, *, dynamic: bool = False
) -> Callable[..., Sequence[Any]]:
    """A program to call, compiled as it is said.

    One that holds graphs in its graph (a region with autocast on) goes through Dynamo, which reads
    them. One whose sizes depend on the data (dynamic) always runs as it is: compiled, it would keep
    those that it was traced with.
    """
    if dynamic:
        eager: Callable[..., Sequence[Any]] = torch.compiler.disable(program.graph_module.forward)
        return eager
    if not has_subgraphs(program.graph_module):
        return CompiledProgram(program, compilation)
    if compilation is None:
        return program.graph_module.forward
    compiled: Callable[..., Sequence[Any]]
    compiled = torch.compile(program.graph_module, **compilation.options)
    return compiled

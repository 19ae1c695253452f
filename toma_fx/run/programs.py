"""Specializations: everything made for one call signature of one state of the model, and their
bounded cache."""

from __future__ import annotations

import linecache
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import convert_frame

from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.facts import Analysis
from toma_fx.analysis.propagate import analyse
from toma_fx.capture.model import Captured, capture, check_model
from toma_fx.capture.parity import Expected
from toma_fx.graph.rewriter import Templates
from toma_fx.graph.verify import output_values, verify
from toma_fx.methods.base import MethodConfig
from toma_fx.passes.pipeline import Program, rewrite
from toma_fx.plan.plan import MergePlan
from toma_fx.plan.planner import make_plan
from toma_fx.run.schedule import Call

TRACING: threading.RLock = convert_frame.compile_lock
"""Held while a graph is made: tracing swaps the parameters of the model that is traced. It is
Dynamo's own lock, for Dynamo's compilations fail beside a trace."""


_ACTIVE: list[int] = []
"""Threads that are tracing; torch's own flags for it hold for the whole process."""


@torch._dynamo.disable
def beside_tracing() -> AbstractContextManager[Any]:
    """For running a program while another thread may be tracing.

    torch refuses to enter a compiled function then; inside, it runs uncompiled for that once.
    """
    if not _ACTIVE:
        return nullcontext()
    changed: AbstractContextManager[Any] = torch._dynamo.config.patch(
        error_on_nested_fx_trace=False
    )
    return changed


@contextmanager
def tracing() -> Iterator[None]:
    """Make graphs, one thread at a time, and leave no source text behind.

    torch.fx keeps the Python source of every graph module for good, for tracebacks; a capture makes
    some twenty of them, so that switching adapters a thousand times would fill the memory.
    """
    with TRACING:
        _ACTIVE.append(threading.get_ident())
        sources = getattr(getattr(fx.graph_module, "_loader", None), "eval_cache", {})
        before = set(sources)
        try:
            yield
        finally:
            _ACTIVE.pop()
            for key in [k for k in list(sources) if k not in before]:
                del sources[key]
                linecache.cache.pop(key, None)


@dataclass
class Specialization:
    """Everything made for one call signature; programs are rewritten when first used.

    Attributes:
        captured, analysis, flow, plan: from the stages of that name.
        programs: rewritten so far. runners: what is called for each, compiled or not.
        counts: steps run per kind.
    """

    captured: Captured
    analysis: Analysis
    flow: Flow
    plan: MergePlan
    templates: Templates = field(default_factory=dict)
    programs: dict[Call, Program] = field(default_factory=dict)
    runners: dict[Call, Callable[..., Any]] = field(default_factory=dict)
    counts: dict[Call, int] = field(default_factory=dict)

    @classmethod
    def make(
        cls, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], config: MethodConfig
    ) -> Specialization:
        """Capture, check, analyse and plan one call.

        Raises:
            CaptureError: the model can't be captured. ParityError: it was captured wrong.
            NoMergeSites, TileError: see `make_plan`.
        """
        check_model(model)
        expected = Expected.of(model, args, kwargs)
        captured = capture(model, args, kwargs)
        if expected is not None:
            expected.check(captured)
        return cls.of(captured, config)

    @classmethod
    def of(cls, captured: Captured, config: MethodConfig) -> Specialization:
        """Analyse and plan a captured graph."""
        outputs = output_values(captured.graph_module.graph)
        verify(captured.graph_module, [i.name for i in captured.inputs], outputs, "capture")
        analysis, flow = analyse(captured, config.grid)
        return cls(captured, analysis, flow, make_plan(analysis, flow, config))

    @property
    def dynamic(self) -> bool:
        """Whether the number of merged tokens depends on the data."""
        return any(g.setting.dynamic for g in self.plan.groups)

    @property
    def settings(self) -> Hashable:
        """What a pattern must agree on to fit: groups and their settings."""
        return tuple((g.name, g.setting) for g in self.plan.groups)

    def program(self, call: Call) -> Program | None:
        """The rewritten program of a call; None for the unmerged one."""
        if call == "plain":
            return None
        if call not in self.programs:
            with tracing():
                if call not in self.programs:
                    self.programs[call] = rewrite(
                        self.captured, self.analysis, self.flow, self.plan, call, self.templates
                    )
        return self.programs[call]

    def graph_module(self, call: Call) -> fx.GraphModule:
        """The graph that runs for a call."""
        program = self.program(call)
        return self.captured.graph_module if program is None else program.graph_module

    def runner(self, call: Call, options: Mapping[str, Any] | None) -> Callable[..., Any]:
        """The callable for a call, compiled with `options` unless they are None."""
        if call not in self.runners:
            graph_module = self.graph_module(call)
            run: Callable[..., Any] = graph_module.forward
            if self.dynamic:
                # under torch.compile too: compiled, it would keep the shapes it was traced with
                run = torch._dynamo.disable(run)
            elif options is not None:
                run = torch.compile(graph_module, **options)
            self.runners[call] = run
        return self.runners[call]

    def count(self, call: Call) -> None:
        """Count a step."""
        self.counts[call] = self.counts.get(call, 0) + 1

    def _graph_modules(self) -> Iterator[fx.GraphModule]:
        yield self.captured.graph_module
        for program in self.programs.values():
            yield program.graph_module

    def fits(self, parameters: set[int]) -> bool:
        """Whether every parameter of the graph is among these ids, or shares such memory."""
        own = self.captured.graph_module.parameters()
        return all(id(p) in parameters or p.data_ptr() in parameters for p in own)

    def rebind(self, buffers: Mapping[str, Tensor]) -> None:
        """Take over the model's buffers, which a move between devices makes anew."""
        for graph_module in self._graph_modules():
            for name, old in list(graph_module.named_buffers()):
                new = buffers.get(name)
                if new is None or new is old:
                    continue
                if (new.shape, new.dtype, new.device) == (old.shape, old.dtype, old.device):
                    path, _, leaf = name.rpartition(".")
                    graph_module.get_submodule(path)._buffers[leaf] = new


def _inside(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors that a quantised weight is made of, which a graph may hold apart."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            inner = getattr(tensor, name)
            yield inner
            yield from _inside(inner)


class SpecializationCache:
    """The specializations used last, at most `capacity`; safe to share between threads."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.made = 0
        self._entries: OrderedDict[Hashable, Specialization] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def values(self) -> tuple[Specialization, ...]:
        """Those alive, the one used last at the end."""
        with self._lock:
            return tuple(self._entries.values())

    def get(self, key: Hashable, make: Callable[[], Specialization]) -> Specialization:
        """The specialization of a key, made if need be; drops the one unused longest."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        with tracing():
            if key not in self._entries:
                found = make()
                with self._lock:
                    self._entries[key] = found
                    self.made += 1
                    while len(self._entries) > self.capacity:
                        self._entries.popitem(last=False)
            return self._entries[key]

    def refresh(self, model: nn.Module) -> None:
        """Follow a changed model: drop graphs over parameters that are gone, rebind buffers."""
        parameters = {id(p) for p in model.parameters()}
        parameters.update(t.data_ptr() for p in model.parameters() for t in _inside(p))
        buffers = dict(model.named_buffers())
        with self._lock:
            for key, found in list(self._entries.items()):
                if found.fits(parameters):
                    found.rebind(buffers)
                else:
                    del self._entries[key]

"""Parity: a captured graph must compute what the model computes, on inputs it was not traced with.

Export can go wrong silently: a lost write into a buffer, a value that was baked in, another path
taken while tracing. The model runs first: tracing leaves its stand-ins in tables that a model makes
lazily, unless they are there already. It runs twice, so that one that keeps state is found before
anything is traced (see `stateful`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from toma_fx.capture.dynamo import Argument
from toma_fx.capture.grids import find_raster
from toma_fx.capture.model import Captured, flatten_call, unwrap
from toma_fx.capture.stateful import PythonState, stateful_error
from toma_fx.compat.pytorch import is_fake, tree_leaves, tree_map
from toma_fx.errors import CaptureError, ParityError
from toma_fx.events import emit
from toma_fx.graph.nodes import module_path

_log = logging.getLogger("toma_fx.capture")
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference relative to the largest value, by dtype of the output; else `EXACT`."""
EXACT = 1e-4


@dataclass(frozen=True)
class Expected:
    """Outputs of a model for inputs that differ from those it will be captured with.

    Attributes:
        model: the model that ran. args, kwargs: the inputs. outputs: the leaves of its output.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Any]

    @classmethod
    def compute(
        cls, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Expected | None:
        """Run the model on fresh inputs; None where nothing can run (meta or fake tensors).

        Raises:
            CaptureError: the model does not run on such inputs.
            StatefulModelError: it keeps state in Python from call to call.
        """
        leaves = [*tree_leaves((args, kwargs)), *model.parameters()]
        if any(is_fake(x) or getattr(x, "is_meta", False) for x in leaves):
            return None
        fresh_args, fresh_kwargs = tree_map(perturb, (tuple(args), dict(kwargs)))
        plain = unwrap(model)
        try:
            _run_model(plain, tuple(args), dict(kwargs))  # makes the tables that are made lazily
            before = PythonState(plain)
            outputs = _run_model(plain, fresh_args, fresh_kwargs)
        except Exception as error:
            raise CaptureError(
                "the model does not run on these inputs",
                where=type(model).__name__,
                got=f"{type(error).__name__}: {error}",
                hint="call the original model with them first",
            ) from error
        changed = before.changes(PythonState(plain))
        if changed:
            raise stateful_error(model, changed)
        return cls(plain, fresh_args, fresh_kwargs, outputs)

    def check(self, captured: Captured) -> None:
        """Compare a captured graph with the model.

        Raises:
            ParityError: they differ; names the first module that does.
            StatefulModelError: the model differs from itself, whatever the random numbers.
        """
        start, leaves = time.perf_counter(), flatten_call(self.args, self.kwargs)[0]
        with torch.no_grad(), _seeded((leaves, list(self.model.parameters()))):
            outputs = list(captured.graph_module(*leaves))
        difference = _difference(outputs, self.outputs)
        if difference is None:
            self._report(outputs, time.perf_counter() - start)
            return
        again = _difference(_run_model(self.model, self.args, self.kwargs), self.outputs)
        if again is not None:
            raise stateful_error(self.model, difference=again)
        if _difference(_run_model(self.model, self.args, self.kwargs, seed=1), self.outputs):
            return  # the model uses random numbers, and the graph draws them in another order
        raise ParityError(
            "the captured graph does not compute what the model computes",
            where=self._first_module(captured, leaves) or type(self.model).__name__,
            expected="the outputs of the model on inputs that it was not captured with",
            got=difference,
            hint="the forward pass depends on more than its inputs, or acts otherwise while it is "
            "traced; rewrite that line without Python state, torch.compiler flags and .data",
        )

    def _report(self, outputs: list[Any], seconds: float) -> None:
        """Say how near a graph comes to the model."""
        pairs = [p for p in zip(outputs, self.outputs, strict=True) if isinstance(p[0], Tensor)]
        error = max((relative_difference(*pair) for pair in pairs if pair[0].numel()), default=0.0)
        emit(
            _log,
            logging.INFO,
            "parity",
            "the graph of %s differs from the model by %.2g of the largest value, in %.1f s",
            type(self.model).__name__,
            error,
            seconds,
            seconds=seconds,
            model=type(self.model).__name__,
            difference=error,
        )

    def _first_module(self, captured: Captured, leaves: Sequence[Any]) -> str:
        """The first module, in order of execution, whose output differs."""
        eager: dict[str, Any] = {}
        names = {module: name for name, module in self.model.named_modules() if name}

        def note(module: nn.Module, _: Any, output: Any) -> None:
            eager.setdefault(names[module], output)

        hooks = [m.register_forward_hook(note) for m in names if not any(m.children())]
        try:
            _run_model(self.model, self.args, self.kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        traced = _Recorder(captured.graph_module, set(eager))
        with torch.no_grad():
            traced.run(*leaves)
        for name, output in eager.items():
            values = traced.values.get(name, [])
            same = any(_difference([value], [output]) is None for value in values)
            if values and isinstance(output, Tensor) and not same:
                return name
        return ""


def check_replay(
    gm: fx.GraphModule, arguments: Sequence[Argument], values: Sequence[Any], captured: Captured
) -> None:
    """Compare what was captured of a Dynamo graph with that graph, on fresh inputs.

    Args:
        gm: the graph. arguments: its inputs. values: of the call that it was captured for; where
            they are fake or on the meta device nothing can run, and nothing is checked.

    Raises:
        ParityError: they differ.
    """
    if any(is_fake(x) or getattr(x, "is_meta", False) for x in values):
        return
    pairs = list(zip(arguments, values, strict=True))
    inputs = [perturb(v) if a.kind == "tensor" else v for a, v in pairs]

    def run() -> list[Any]:
        with torch.no_grad():
            return [x.detach() if isinstance(x, Tensor) else x for x in gm(*inputs)]

    expected = run()
    leaves = [a.to_input(v) for (a, _), v in zip(pairs, inputs, strict=True) if a.is_captured]
    with torch.no_grad():
        outputs = captured.graph_module(*leaves)
    difference = _difference(list(outputs), expected)
    if difference is not None and _difference(run(), expected) is None:
        raise ParityError(
            "the captured graph does not compute what Dynamo's graph computes",
            where="a graph of torch.compile(backend='toma_fx')",
            expected="its outputs on inputs that it was not captured with",
            got=difference,
            hint="toma_fx.optimize(model).compile() captures the model itself; please report this",
        )


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what every leaf module computed."""

    def __init__(self, graph_module: fx.GraphModule, names: set[str]) -> None:
        super().__init__(graph_module)
        self.names, self.values = names, dict[str, list[Any]]()

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node."""
        value = super().run_node(n)
        path = module_path(n)
        if path in self.names and n.op == "call_function":
            self.values.setdefault(path, []).append(value)
        return value


@contextmanager
def _seeded(tensors: Any, seed: int = 0) -> Iterator[None]:
    """Random numbers of one seed; those of the caller go on afterwards as if nothing had run."""
    places = {x.device for x in tree_leaves(tensors) if isinstance(x, Tensor) and x.is_cuda}
    with torch.random.fork_rng(devices=list(places)):
        torch.default_generator.manual_seed(seed)
        for place in places:
            with torch.cuda.device(place):
                torch.cuda.manual_seed(seed)
        yield


def _run_model(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int = 0
) -> list[Any]:
    """Leaves of the model's output; its arguments are copied, for some models pop from lists."""
    args, kwargs = tree_map(lambda x: x, (args, kwargs))
    with torch.no_grad(), _seeded((args, kwargs, list(model.parameters())), seed):
        return list(tree_leaves(model(*args, **kwargs)))


def perturb(value: Any, seed: int = 0) -> Any:
    """Other values of the same kind: numbers a little smaller; position ids and indices stay."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    if find_raster(value) is not None:
        return value
    g = torch.Generator(device=value.device).manual_seed(value.numel() + seed)
    share = torch.rand(value.shape, generator=g, device=value.device, dtype=torch.float32)
    return (value * (1 - 0.1 * share)).to(value.dtype)


def tolerance(dtype: torch.dtype) -> float:
    """What `relative_difference` of outputs of a dtype may be."""
    return TOLERANCE.get(dtype, EXACT)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest difference between two tensors, relative to the largest value of `b`."""
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return float((a - b).abs().max()) / (float(b.abs().max()) or 1.0)


def _difference(got: Sequence[Any], expected: Sequence[Any]) -> str | None:
    """How two lists of outputs differ, in words; None if they don't."""
    if len(got) != len(expected):
        return f"{len(got)} outputs instead of {len(expected)}"
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {i} is {tuple(a.shape)} {a.dtype}, not {tuple(b.shape)} {b.dtype}"
        if torch.equal(a, b) or not a.numel():
            continue
        error, limit = relative_difference(a, b), tolerance(b.dtype)
        if not error <= limit:
            return f"output {i} differs by {error:.2g} of its largest value ({limit:.0e} allowed)"
    return None

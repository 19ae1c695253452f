"""What `benchmarks/gpu.py` runs: a model at a picture size, as it is, compiled and optimized."""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from common import CONFIGS, NARROW, random_model, resident
from torch._inductor.utils import fresh_cache

import toma_fx
from toma_fx.methods.cached_steps import Length
from toma_fx.models.named import example_inputs
from toma_fx.run.denoiser import OptimizedDenoiser
from toma_fx.run.report import make_report
from toma_fx.run.schedule import kinds_of

SHALLOW: dict[str, dict[str, Any]] = {
    "sdxl": {"layers_per_block": 1, "transformer_layers_per_block": (1, 1, 2)},
    "flux": {"num_layers": 1, "num_single_layers": 2},
}
"""What makes the models small, beside `NARROW`."""
TOY_TEXT = 16
FIRST_TIMESTEP = {"sdxl": 1000.0, "flux": 1.0}
WARMUP = 3
"""Rounds before the first that counts."""
LEAST, MOST_S = 5, 15.0
"""Rounds that are made in any case, and seconds after which no more are."""
Step = Callable[[str, Callable[[], Any]], Any]
"""Runs a call of a kind of step, and does something about it."""


@dataclass(frozen=True)
class Options:
    """What figures depend on, beside the machine and the versions.

    Attributes:
        toy: narrow and shallow models. ratio: of token merging. preset: of step caching.
        steps: of a generation. inference_mode: else no_grad, as pipelines of diffusers run.
    """

    device: str = "cuda"
    dtype: str = "bfloat16"
    batch: int = 1
    ratio: float = 0.5
    preset: str = "balanced"
    steps: int = 28
    rounds: int = 15
    toy: bool = False
    inference_mode: bool = False

    def config(self, name: str) -> dict[str, Any]:
        """Of a model."""
        return {**CONFIGS[name], **({**NARROW[name], **SHALLOW[name]} if self.toy else {})}

    def inputs(self, model: torch.nn.Module, size: int) -> dict[str, Any]:
        """A call for a picture of `size` pixels a side."""
        torch.manual_seed(1)
        text = TOY_TEXT if self.toy else None
        return example_inputs(model, size, size, self.batch, text=text)


# -- timing ---------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Times calls by kind: on a GPU by events, so that nothing waits between them."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._marks: list[tuple[str, Any, Any]] = []

    def __call__(self, kind: str, call: Callable[[], Any]) -> None:
        """Run and time a call."""
        start = self._mark()
        call()
        self._marks.append((kind, start, self._mark()))

    def _mark(self) -> Any:
        if self._device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> list[tuple[str, float]]:
        """(kind, milliseconds) of the calls since it was last read."""
        synchronize(self._device)
        marks, self._marks = self._marks, []
        if self._device == "cuda":
            return [(kind, start.elapsed_time(end)) for kind, start, end in marks]
        return [(kind, 1e3 * (end - start)) for kind, start, end in marks]


def time_in_turn(
    runs: dict[str, Callable[[Step], Any]], options: Options, lead: Callable[[], Any]
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of every call, by run and kind; all run once a round.

    `lead` comes first in every round: while it keeps a GPU busy, the host goes ahead, so that
    calls follow each other on the GPU as they do in a generation.
    """
    clocks = {name: Clock(options.device) for name in runs}
    times: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    for i in rounds_of(options, WARMUP):
        lead()
        for name in sorted(runs, reverse=bool(i % 2)):  # none is always first
            runs[name](clocks[name])
        for name, clock in clocks.items():
            for kind, milliseconds in clock.read():
                if i >= 0:
                    times[name].setdefault(kind, []).append(milliseconds)
    return times


def rounds_of(options: Options, warmup: int) -> Iterator[int]:
    """Numbers of rounds, those before 0 to warm up; fewer than asked for where they take long."""
    start = time.monotonic()
    for i in range(-warmup, options.rounds):
        if i >= LEAST and time.monotonic() - start > MOST_S:
            break
        yield i


def summarize(values: list[float], scale: float = 1.0) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    found = {"median": median, "low": low, "high": high}
    return {"rounds": len(values), **{name: scale * value for name, value in found.items()}}


def call_only(kind: str, call: Callable[[], Any]) -> Any:
    """A `Step` that does no more than that."""
    return call()


# -- variants -------------------------------------------------------------------------------------


@dataclass
class Variant:
    """Something that stands for the denoiser.

    Attributes:
        run: the first steps of a generation, to where each kind of step ran. counts: steps of a
            generation by kind.
        compile_s: seconds of the first calls by kind, from empty caches.
        facts: what else is known.
    """

    run: Callable[[Step], Any]
    counts: dict[str, int]
    compile_s: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def mean(self, by_kind: dict[str, float]) -> float:
        """Over the steps of a generation, of a value by kind."""
        total = sum(count * by_kind[kind] for kind, count in self.counts.items())
        return total / sum(self.counts.values())


@dataclass
class Cell:
    """A model at one picture size.

    Attributes:
        inputs: of each step of a generation. variants: by name, made when first asked for; where
            that failed, what was raised, as text.
    """

    options: Options
    name: str
    size: int
    model: torch.nn.Module
    inputs: list[dict[str, Any]] = field(default_factory=list)
    variants: dict[str, Variant | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        inputs, steps = self.options.inputs(self.model, self.size), self.options.steps
        first = FIRST_TIMESTEP[self.name]
        for i in range(steps):
            timestep = torch.full_like(inputs["timestep"], first * (1 - i / steps))
            self.inputs.append({**inputs, "timestep": timestep})

    def variant(self, name: str) -> Variant:
        """Made, compiled and called once."""
        if name not in self.variants:
            make = {"eager": self._eager, "compiled": self._compiled}.get(name)
            try:
                self.variants[name] = make() if make else self._optimized(name)
            except Exception as error:  # of any kind: not tried again by the parts to come
                self.variants[name] = f"{type(error).__name__}: {error}"
                raise
        found = self.variants[name]
        if isinstance(found, str):
            raise RuntimeError(f"{name} failed before: {found}")
        return found

    def _eager(self) -> Variant:
        return Variant(
            lambda step: step("step", partial(self.model, **self.inputs[0])),
            {"step": self.options.steps},
        )

    def _compiled(self) -> Variant:
        compiled = torch.compile(self.model, dynamic=False)
        with fresh_cache():
            seconds, output = self._first_call(partial(compiled, **self.inputs[0]))
        return Variant(
            lambda step: step("step", partial(compiled, **self.inputs[0])),
            {"step": self.options.steps},
            {"step": seconds},
            {"finite": is_finite(output)},
        )

    def _optimize(self, name: str) -> Any:
        ratio = {} if name == "cached" else {"ratio": self.options.ratio}
        optimized: Any = toma_fx.optimize(
            self.model,
            self.options.preset if name in ("cached", "both") else True,
            example_inputs=self.inputs[0],
            **ratio,
        )
        return optimized.compile(**({"outline": False} if name == "flat" else {}))

    def _optimized(self, name: str) -> Variant:
        """Token merging, step caching, or both: every program compiled; "flat": token merging, each
        block compiled by itself."""
        options = self.options
        seconds, optimized = self._first_call(lambda: self._optimize(name))
        programs = optimized.specializations[-1]
        kinds = kinds_of(programs, programs.schedule, Length(options.steps), options.steps)
        # all up to where each kind ran: after steps that are left out, others would be due
        ran = kinds[: 1 + max(map(kinds.index, kinds))]

        def run(step: Step) -> Any:
            with optimized.generation(steps=options.steps) as generation:
                for i, kind in enumerate(ran):
                    generation.step(i)
                    output = step(kind, partial(optimized, **self.inputs[i]))
            return output

        compile_s = {"capture": seconds}

        def compile_step(kind: str, call: Callable[[], Any]) -> Any:
            seconds, output = self._first_call(call)
            compile_s.setdefault(kind, seconds)
            return output

        with fresh_cache():
            output = run(compile_step)
        if optimized.totals != Counter(ran):
            raise RuntimeError(f"steps {ran} expected, {optimized.totals} ran")
        report = make_report(programs)
        facts = {
            "finite": is_finite(output),
            "ideal": report.ideal_speedup,
            "tokens": sorted({(row.tokens, row.merged) for row in report.rows}, reverse=True),
        }
        return Variant(run, dict(Counter(kinds)), compile_s, facts)

    def _first_call(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of a call, and what it returned."""
        synchronize(self.options.device)
        start = time.perf_counter()
        output = call()
        synchronize(self.options.device)
        return time.perf_counter() - start, output

    def peak_mib(self, run: Callable[[Step], Any]) -> float:
        """Peak memory of its steps, of the weights and what one generation keeps included.

        Other models and variants may lie on the GPU: counted is what the steps allocate. On the
        CPU it is the resident memory of this process, of all that it holds.
        """
        if self.options.device != "cuda":
            run(call_only)
            return resident()
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(call_only)
        torch.cuda.synchronize()
        return (weights + torch.cuda.max_memory_allocated() - before) / 2**20


def can_compile_flat() -> bool:
    """Whether blocks that repeat are compiled once unless `compile(outline=False)` says no."""
    return "outline" in inspect.signature(OptimizedDenoiser.compile).parameters


def is_finite(output: Any) -> bool:
    """Whether a denoiser's output holds numbers only."""
    return bool(torch.isfinite(output[0]).all())


class Bench:
    """The models of a run, each made when first asked for and kept: its programs serve all parts.

    Attributes:
        options: of the run.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self._models: dict[str, Any] = {}
        self._cells: dict[tuple[str, int], Cell] = {}

    def cell(self, name: str, size: int) -> Cell:
        """A model at a size."""
        if name not in self._models:
            dtype = getattr(torch, self.options.dtype)
            with torch.inference_mode(False), torch.no_grad():  # loaded outside of it, as pipelines
                model = random_model(name, self.options.config(name), dtype, self.options.device)
            self._models[name] = model.eval().requires_grad_(False)
        if (name, size) not in self._cells:
            self._cells[name, size] = Cell(self.options, name, size, self._models[name])
        return self._cells[name, size]

    def clear(self) -> None:
        """Forget all models, so that memory is free again."""
        self._cells.clear()
        self._models.clear()
        torch._dynamo.reset()
        gc.collect()
        if self.options.device == "cuda":
            torch.cuda.empty_cache()

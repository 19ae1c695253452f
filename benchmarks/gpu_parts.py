"""The parts of `benchmarks/gpu.py`: each measures one model at one picture size."""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import CLASSES
from gpu_models import (
    Bench,
    Cell,
    Options,
    Step,
    call_only,
    rounds_of,
    summarize,
    synchronize,
    time_in_turn,
)
from profiles import format_profile, list_kernels, longest_kernel, record
from profiles import summarize as summarize_profile
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import toma_fx
from toma_fx.methods.facility import facility_location
from toma_fx.methods.setting import Place

PIXELS = {"sdxl": (16, 32), "flux": (16,)}
"""Pixels that a token has on a side, at each level of a model with attention."""
CALLS, LAUNCHES = 10, 3
"""Calls of an operator that are timed together; of one that may launch 200 kernels, of which a GPU
takes a thousand in advance."""
KERNELS = 25
"""Of a profile that are listed."""
NO_COUNT = "counted by torch.cuda.set_sync_debug_mode, which the CPU does not have"

# -- whole steps ----------------------------------------------------------------------------------


def measure_steps(bench: Bench, cell: Cell, name: str) -> dict[str, Any]:
    """A variant and the compiled original in turn, in milliseconds."""
    original, variant = cell.variant("compiled"), cell.variant(name)
    runs = {"original": original.run, name: variant.run}
    times = time_in_turn(runs, bench.options, partial(original.run, call_only))
    kinds = {kind: summarize(values) for kind, values in times[name].items()}
    base = summarize(times["original"]["step"])
    mean = variant.mean({kind: found["median"] for kind, found in kinds.items()})
    return {
        "original_ms": base,
        "kinds_ms": kinds,
        "counts": variant.counts,
        "mean_ms": mean,
        "speedup": base["median"] / mean,
        "peak_mib": cell.peak_mib(variant.run),
        "original_peak_mib": cell.peak_mib(original.run),
        "compile_s": variant.compile_s,
        "original_compile_s": original.compile_s["step"],
        **variant.facts,
    }


# -- the host -------------------------------------------------------------------------------------


def measure_host(bench: Bench, cell: Cell, name: str) -> dict[str, Any]:
    """Milliseconds until a call returns, and until the device is done with it, in turn.

    A GPU takes about a thousand launches in advance: where a step has more, the host waits for it,
    and `host_ms` comes near `done_ms`. On the CPU the two are the same.
    """
    original, variant = cell.variant("compiled"), cell.variant(name)
    runs = {"original": original.run, name: variant.run}
    times: dict[str, dict[str, list[tuple[float, float]]]] = {run: {} for run in runs}
    for i in rounds_of(bench.options, 1):
        for run, call_all in runs.items():
            call_all(partial(_time_host, bench.options.device, times[run] if i >= 0 else {}))
    found: dict[str, Any] = {}
    for run, by_kind in times.items():
        found[run] = {
            kind: {
                "host_ms": summarize([host for host, _ in values]),
                "done_ms": summarize([done for _, done in values]),
            }
            for kind, values in by_kind.items()
        }
    medians = {kind: values["host_ms"]["median"] for kind, values in found[name].items()}
    over = variant.mean(medians) - found["original"]["step"]["host_ms"]["median"]
    return {
        **found,
        "over_original_ms": over,
        "synchronizations": {
            run: count_synchronizations(call_all, bench.options.device)
            for run, call_all in runs.items()
        },
    }


def _time_host(
    device: str,
    times: dict[str, list[tuple[float, float]]],
    kind: str,
    call: Callable[[], Any],
) -> None:
    synchronize(device)
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    synchronize(device)
    done = time.perf_counter() - start
    times.setdefault(kind, []).append((1e3 * host, 1e3 * done))


def count_synchronizations(run: Callable[[Step], Any], device: str) -> dict[str, Any] | str:
    """Where the host waits for the GPU, by kind of step: {place: how often}."""
    if device != "cuda":
        return NO_COUNT
    places: dict[str, dict[str, int]] = {}

    def count(kind: str, call: Callable[[], Any]) -> None:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [w for w in found if "synchronizing CUDA operation" in str(w.message)]
        places[kind] = dict(Counter(f"{short_path(w.filename)}:{w.lineno}" for w in waits))

    run(count)
    return places


def short_path(path: str) -> str:
    """A file by its package: neither the place of the installation nor a temporary name."""
    inside = re.search(r"(?:site-packages/|(?=toma_fx/(?!.*toma_fx/)))(.*)", path)
    return inside[1] if inside else path.rpartition("/")[2]


# -- where the time goes --------------------------------------------------------------------------


def measure_profile(bench: Bench, cell: Cell, name: str) -> tuple[dict[str, Any], str]:
    """Shares of operators by group, for the original and every kind of step; and all as text."""
    found: dict[str, Any] = {}
    texts = []
    device, batch = bench.options.device, bench.options.batch

    def add(variant: str, kind: str, call: Callable[[], Any]) -> None:
        recorded = record(call, device)
        summary = summarize_profile(recorded, device, batch, KERNELS)
        kernels = list_kernels(recorded, device, batch)
        if not kernels:
            raise RuntimeError("torch.profiler recorded no kernel: may it not see this GPU?")
        title = f"{cell.name} {cell.size}, {variant}, {kind}"
        texts.append(format_profile(title, summary, kernels[:KERNELS]))
        found[f"{variant} {kind}"] = {
            "total_ms": sum(row["self_ms"] for row in kernels),
            "kernels": sum(row["count"] for row in kernels),
            "groups_ms": summary["groups_ms"],
        }

    for variant in ("compiled", name):
        run = cell.variant(variant).run
        run(call_only)
        run(partial(add, variant))
    return found, "\n".join(texts)


# -- operators alone ------------------------------------------------------------------------------


def keep_busy(device: str) -> Callable[[], Any]:
    """Work that lasts longer than the host needs to launch what is timed next."""
    if device != "cuda":
        return lambda: None
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)

    def work() -> None:
        for _ in range(8):
            a @ a

    return work


def time_calls(calls: dict[str, Callable[[], Any]], count: int, options: Options) -> dict[str, Any]:
    """Microseconds of each call, in turn, of `count` calls in a row."""

    def repeat(name: str, step: Step) -> None:
        step(name, lambda: [calls[name]() for _ in range(count)])

    runs = {name: partial(repeat, name) for name in calls}
    times = time_in_turn(runs, options, keep_busy(options.device))
    return {name: summarize(values[name], 1e3 / count) for name, values in times.items()}


class AttentionCalls(TorchFunctionMode):
    """Counts calls of scaled dot product attention.

    Attributes:
        shapes: (of the queries, of the keys) -> calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            key = args[1] if len(args) > 1 else kwargs["key"]
            self.shapes[tuple(query.shape), tuple(key.shape)] += 1
        return func(*args, **kwargs)


def attention_calls(
    options: Options, name: str, size: int
) -> tuple[Counter[tuple[tuple[int, ...], tuple[int, ...]]], int]:
    """The attention of one step, of a model without memory, as `shapes`; and its text tokens."""
    with torch.device("meta"):
        model = CLASSES[name](**options.config(name)).eval()
    inputs = options.inputs(model, size)
    with AttentionCalls() as calls:
        model(**inputs)
    return calls.shapes, inputs["encoder_hidden_states"].shape[1]


def merged_tokens(tokens: int, images: list[int], text: int, ratio: float) -> int:
    """Tokens of a sequence of which those of a picture merge; there may be text beside them."""
    for image in images:
        if tokens in (image, image + text):
            return tokens - int(image * ratio)
    return tokens


def measure_attention(options: Options, name: str, size: int) -> dict[str, Any]:
    """Attention alone, on all and on merged tokens, as `torch.compile` has it computed."""
    images = [(size // pixels) ** 2 for pixels in PIXELS[name]]
    shapes, text = attention_calls(options, name, size)
    rows = []
    for (query, key), count in shapes.items():
        merged = [
            (*shape[:-2], merged_tokens(shape[-2], images, text, options.ratio), shape[-1])
            for shape in (query, key)
        ]
        full, less = _attention(options, query, key), _attention(options, *merged)
        times = time_calls({"all": full, "merged": less}, CALLS, options)
        rows.append(
            {
                "calls_a_step": count,
                "query": query, "key": key, "merged_query": merged[0], "merged_key": merged[1],
                "us": times,
                "kernel": longest_kernel(full, options.device),
            }
        )  # fmt: skip
    steps = {
        which: sum(row["calls_a_step"] * row["us"][which]["median"] for row in rows) / 1e3
        for which in ("all", "merged")
    }
    return {"rows": rows, "step_ms": steps}


def _attention(
    options: Options, query: tuple[int, ...], key: tuple[int, ...]
) -> Callable[[], Tensor]:
    """Compiled attention of these shapes, called once."""
    factory: Any = {"dtype": getattr(torch, options.dtype), "device": options.device}
    q, k, v = (torch.randn(shape, **factory) for shape in (query, key, key))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    with torch._dynamo.config.patch(recompile_limit=64):  # there is an entry for each shape
        compiled = torch.compile(attend, dynamic=False, fullgraph=True)
        compiled(q, k, v)
    return partial(compiled, q, k, v)


def measure_selection(options: Options, name: str, size: int) -> dict[str, Any]:
    """Facility location on the windows of a model: the operator, and its reference in eager mode.

    One call selects for one pattern; a refresh step has as many as there are patterns.
    """
    configs = {
        "default": toma_fx.ToMAConfig(ratio=options.ratio),
        f"paper-{name}": toma_fx.PRESETS[f"paper-{name}"],
    }
    rows = []
    for label, config in configs.items():
        for pixels in PIXELS[name]:
            grid = (size // pixels, size // pixels)
            setting = config.setting(Place(grid=grid, unit=grid))
            if isinstance(setting, str):
                rows.append({"config": label, "grid": grid, "left_alone": setting})
                continue
            tokens = grid[0] * grid[1] // setting.windows
            torch.manual_seed(0)
            features = torch.randn(options.batch, setting.windows, tokens, 64)
            unit = F.normalize(features, dim=-1).to(options.device)
            similarity = unit @ unit.mT
            calls = {
                "operator": partial(
                    torch.ops.toma_fx.facility_location, similarity, setting.keep
                ),
                "reference": partial(facility_location, similarity, setting.keep),
            }  # fmt: skip
            equal = torch.equal(calls["operator"](), calls["reference"]())
            rows.append(
                {
                    "config": label,
                    "grid": grid,
                    "windows": setting.windows,
                    "tokens_a_window": tokens, "keep": setting.keep, "equal": equal,
                    "kernel": longest_kernel(calls["operator"], options.device),
                    "us": time_calls(calls, LAUNCHES, options),
                }
            )  # fmt: skip
    return {"rows": rows}


WHOLE: dict[str, Callable[[Bench, Cell, str], Any]] = {
    "steps": measure_steps,
    "host": measure_host,
}
"""Parts that run a variant of a model."""
ALONE = {"attention": measure_attention, "selection": measure_selection}
"""Parts that need no model."""

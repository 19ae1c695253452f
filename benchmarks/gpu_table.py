"""Tables of `benchmarks/gpu.py`'s results, for `benchmarks/table.py`; what is missing says so."""

from __future__ import annotations

from typing import Any

NAMES = {"sdxl": "SDXL", "flux": "Flux"}
WANTED = [(model, size) for model in NAMES for size in (1024, 2048)]
STANDARD = {
    "dtype": "bfloat16", "batch": 1, "ratio": 0.5, "preset": "balanced", "steps": 28,
    "inference_mode": False,
}  # fmt: skip
"""Options of the summary."""
MISSING = "not measured"
Row = list[str]


def is_shown(run: dict[str, Any]) -> bool:
    """Whether a file holds figures of real models on a GPU."""
    return run["device_kind"] == "cuda" and not run["toy"]


def result(run: dict[str, Any], *key: Any) -> dict[str, Any] | None:
    """What was measured under a name; None if nothing was."""
    entry: dict[str, Any] = run["measurements"].get(" ".join(map(str, key)), {})
    found: dict[str, Any] | None = entry.get("result")
    return found


def ms(value: float) -> str:
    """Milliseconds, without digits that mean nothing."""
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms"


def summary_rows(runs: list[dict[str, Any]]) -> list[Row]:
    """A row for each model and size of every GPU; without any, rows that say so."""
    shown = [run for run in runs if is_shown(run) and run["options"] == STANDARD]
    if not shown:
        return [[f"{NAMES[m]} {size}", "GPU", MISSING, *[""] * 4] for m, size in WANTED]
    return [_summary_row(run, model, size) for run in shown for model, size in WANTED]


def _summary_row(run: dict[str, Any], model: str, size: int) -> Row:
    steps = {v: result(run, "steps", model, size, v) for v in ("eager", "merged", "cached", "both")}
    measured = [found for found in (steps["merged"], *steps.values()) if found]
    cells = [ms(measured[0]["original_ms"]["median"]) if measured else MISSING]
    for variant, found in steps.items():
        speedup = f", {found['speedup']:.2f}x" if found and variant != "eager" else ""
        cells.append(ms(found["mean_ms"]) + speedup if found else MISSING)
    compiled, eager, *optimized = cells
    device = run["device"].removeprefix("NVIDIA ")
    return [f"{NAMES[model]} {size}", device, eager, compiled, *optimized]


HEAD = ["model", "device", "eager", "compiled", "merged", "cached", "both"]


def steps_rows(run: dict[str, Any], models: list[tuple[str, int]]) -> list[Row]:
    """Every variant by kind of step."""
    rows = []
    for model, size in models:
        for name in ("eager", "merged", "flat", "cached", "both"):
            found = result(run, "steps", model, size, name)
            if found is None:
                continue
            kinds = (
                f"{kind} {ms(found['kinds_ms'][kind]['median'])} x {count}"
                for kind, count in found["counts"].items()
            )
            seconds = found["compile_s"]
            rows.append(
                [
                    f"{NAMES[model]} {size}",
                    name,
                    ms(found["original_ms"]["median"]),
                    ", ".join(kinds),
                    f"{found['speedup']:.2f}x",
                    f"{found['ideal']:.2f}x" if "ideal" in found else "",
                    f"{found['original_compile_s']:.0f} s",
                    ", ".join(f"{kind} {value:.0f} s" for kind, value in seconds.items()),
                    f"{found['original_peak_mib']:,.0f}",
                    f"{found['peak_mib']:,.0f}",
                ]
            )
    return rows


def attention_rows(run: dict[str, Any], models: list[tuple[str, int]]) -> list[Row]:
    """Attention of one step, on all and on merged tokens."""
    rows = []
    for model, size in models:
        found = result(run, "attention", model, size)
        for row in found["rows"] if found else ():
            whole, merged = row["us"]["all"]["median"], row["us"]["merged"]["median"]
            shapes = (f"{row[k][-2]:,}" for k in ("query", "key", "merged_query", "merged_key"))
            rows.append(
                [
                    f"{NAMES[model]} {size}",
                    "{} x {} -> {} x {}".format(*shapes),
                    str(row["calls_a_step"]),
                    f"{whole:,.0f} us",
                    f"{merged:,.0f} us",
                    f"{whole / merged:.2f}x",
                    f"`{(row['kernel'] or 'unknown')[:60]}`",
                ]
            )
    return rows


def selection_rows(run: dict[str, Any], models: list[tuple[str, int]]) -> list[Row]:
    """Facility location: the operator and its reference."""
    rows = []
    for model, size in models:
        found = result(run, "selection", model, size)
        for row in found["rows"] if found else ():
            if "us" not in row:
                continue
            times = {name: row["us"][name]["median"] for name in ("reference", "operator")}
            rows.append(
                [
                    f"{NAMES[model]} {size}, {row['config']}",
                    f"{row['windows']} x {row['tokens_a_window']} -> {row['keep']}",
                    *(f"{value:,.0f} us" for value in times.values()),
                    f"{times['reference'] / times['operator']:.1f}x",
                    "equal" if row["equal"] else "DIFFERENT",
                    f"`{(row['kernel'] or 'unknown')[:60]}`",
                ]
            )
    return rows


def host_rows(run: dict[str, Any], models: list[tuple[str, int]]) -> list[Row]:
    """Time until a call returns, and how often the host waited."""
    rows = []
    for model, size in models:
        found = result(run, "host", model, size, "merged")
        if found is None:
            continue
        for variant in ("original", "merged"):
            for kind, times in found[variant].items():
                waits = found["synchronizations"][variant][kind]
                rows.append(
                    [
                        f"{NAMES[model]} {size}",
                        variant if kind == "step" else kind,
                        ms(times["host_ms"]["median"]),
                        ms(times["done_ms"]["median"]),
                        str(sum(waits.values())),
                    ]
                )
    return rows


TABLES = (
    (
        "Steps",
        ["model", "variant", "compiled", "kinds x steps", "speed-up", "ideal",
         "compile, original", "compile", "peak MiB, original", "peak MiB"],
        steps_rows,
    ),
    (
        "Attention alone, queries x keys, on all and on merged tokens",
        ["model", "tokens", "calls a step", "all", "merged", "speed-up", "kernel"],
        attention_rows,
    ),
    (
        "Selection of one pattern, windows x tokens -> kept",
        ["model, windows", "sizes", "reference", "operator", "speed-up", "choices", "kernel"],
        selection_rows,
    ),
    (
        "Host: until a call returns, until the GPU is done, waits for it",
        ["model", "step", "host", "done", "waits"],
        host_rows,
    ),
)  # fmt: skip

"""Tables of the results of `benchmarks/denoiser.py` and `gpu.py`: in README.md, and docs/speed.md.

    python benchmarks/table.py            # write both
    python benchmarks/table.py --check    # exit 1 if either is out of date

README.md shows scope `stack`, docs/speed.md everything. What no file of `gpu.py` holds is listed
as not measured. Where a CPU ran one thread, times are processor time, else of the clock.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from textwrap import wrap
from typing import Any

import gpu_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
DETAILS = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- denoiser:begin -->", "<!-- denoiser:end -->"
GPU_BEGIN, GPU_END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
NAMES = {"sdxl": "SDXL", "flux": "Flux"}
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
SCOPES = ("sublayer", "block", "stack")
Runs = list[tuple[str, dict[str, Any]]]


# -- pieces ---------------------------------------------------------------------------------------


def read() -> Runs:
    """(file name, contents) of every result: SDXL first, the full model first, by size."""
    runs = [(p.name, json.loads(p.read_text())) for p in sorted(RESULTS.glob("denoiser-*.json"))]

    def order(run: tuple[str, dict[str, Any]]) -> tuple[Any, ...]:
        found = run[1]
        sizes = sorted(map(int, found["sizes"]))
        return (
            found["device_kind"] != "cuda",
            list(NAMES).index(found["model"]),
            not found["full_depth"],
            sizes,
            run[0].removesuffix(".json"),
        )

    return sorted(runs, key=order)


def read_gpu() -> list[dict[str, Any]]:
    """Every result of `gpu.py`."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu-*.json"))]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def show(text: str, page: Path | None, begin: str, end: str) -> None:
    """Print a text, or put it between the marks of a page."""
    if page is None:
        print(text)
        return
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{rest.split(end)[1]}")


def by_processor(run: dict[str, Any]) -> bool:
    """Whether the times shown are processor time: the clock would count other programs too."""
    return run["device_kind"] == "cpu" and run["threads"] == 1


def ms(value: float) -> str:
    """Milliseconds, without digits that mean nothing."""
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms"


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.2f}x"


def title(run: dict[str, Any], size: str) -> str:
    """Model and size, and where it is not the full model or not batch 1."""
    text = f"{NAMES[run['model']]} {size}"
    if not run["full_depth"]:
        text += ", fewer layers"
    if run["weights"] != "random":
        text += f", {run['weights']}"
    if run["batch"] != 1:
        text += f", batch {run['batch']}"
    return text


def device(run: dict[str, Any]) -> str:
    """Short name of what computed."""
    if run["device_kind"] == "cuda":
        return run["device"].removeprefix("NVIDIA ")
    return f"CPU, {run['threads']} thread" + ("s" if run["threads"] > 1 else "")


def shown(run: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    """Times and quotients to show: original_ms, merged_ms, speedup, and quotient if there is one.

    `merged_ms` is the mean over the schedule.
    """
    if not by_processor(run):
        names = {"speedup": "speedup", "quotient": "quotient"}
        found = {"original_ms": row["original"]["median_ms"], "merged_ms": row["merged_ms"]}
    else:
        names = {"speedup": "speedup_processor", "quotient": "quotient_processor"}
        original = row["original"]["processor_median_ms"]
        merged = original / row["speedup_processor"]
        found = {"original_ms": original, "merged_ms": merged}
    return found | {short: row[name] for short, name in names.items() if name in row}


def measured(run: dict[str, Any], size: str, method: str) -> list[dict[str, Any]]:
    """Rows of one method that have times, ordered by scope and ratio."""
    rows = [r for r in run["sizes"][size]["rows"] if r["method"] == method and "speedup" in r]
    return sorted(rows, key=lambda r: (SCOPES.index(r.get("scope", "stack")), r["ratio"]))


# -- README ---------------------------------------------------------------------------------------


def summary_rows(runs: Runs) -> list[list[str]]:
    """Scope `stack`."""
    rows: list[list[str]] = []
    for (_, run), size in by_size(runs):
        for row in measured(run, size, "toma_fx"):
            if row["scope"] == "stack":
                values = shown(run, row)
                rows.append(
                    [
                        title(run, size),
                        device(run),
                        DTYPES[run["dtype"]],
                        f"{row['ratio']:g}",
                        ms(values["original_ms"]),
                        ms(values["merged_ms"]),
                        times(values["speedup"]),
                        times(row["ideal"]),
                        f"{values['quotient']:.2f}",
                    ]
                )
    # rows of one title stand together: their ratios may come from several files
    titles = list(dict.fromkeys((row[0], row[1]) for row in rows))
    rows.sort(key=lambda row: (titles.index((row[0], row[1])), float(row[3])))
    return rows


def by_size(runs: Runs) -> list[tuple[tuple[str, dict[str, Any]], str]]:
    """Every run with each of its sizes, small ones first where model and device agree."""
    pairs = [(run, size) for run in runs for size in run[1]["sizes"]]
    groups = [(r["device_kind"], r["model"], r["full_depth"]) for _, r in runs]

    def order(pair: tuple[tuple[str, dict[str, Any]], str]) -> tuple[int, int]:
        (_, run), size = pair
        return groups.index((run["device_kind"], run["model"], run["full_depth"])), int(size)

    return sorted(pairs, key=order)


def block(runs: Runs) -> str:
    """The block of README.md, markers included."""
    head = ["model", "device", "", "ratio", "original", "merged", "speed-up", "ideal", "quotient"]
    notes = (
        "A whole denoising step at a picture size in pixels, both compiled, random weights, batch 1"
        " unless said otherwise, scope `stack`; merged is the mean over the default schedule, a"
        " refresh and four reuse steps (`python benchmarks/denoiser.py`; every scope, `tomesd` and"
        " all details: [docs/speed.md](docs/speed.md))."
    )
    if any(by_processor(run) for _, run in runs):
        notes += " With one thread the times are of the processor, on a machine that others used."
    text = [
        BEGIN,
        *wrap(notes, 100, break_on_hyphens=False),
        "",
        *table(head, summary_rows(runs)),
        END,
    ]
    return "\n".join(text)


def gpu_block(runs: list[dict[str, Any]]) -> str:
    """The block of README.md about GPUs, markers included."""
    notes = (
        "On a GPU (`make bench-gpu`: nine minutes, [benchmarks/gpu.py](benchmarks/gpu.py)): whole"
        " models, random weights, bfloat16, batch 1; means over a generation of 28 steps, and"
        " speed-ups over the compiled original, measured in turn. *merged* is ratio 0.5, *cached*"
        " the preset `balanced`, *both* both."
    )
    text = [
        GPU_BEGIN,
        *wrap(notes, 100, break_on_hyphens=False),
        "",
        *table(gpu_table.HEAD, gpu_table.summary_rows(runs)),
        GPU_END,
    ]
    return "\n".join(text)


def replaced(readme: str, new: str) -> str:
    """README with the block replaced that has the marks of the new one."""
    begin, *_, end = new.splitlines()
    before, found, rest = readme.partition(begin)
    if not found or end not in rest:
        raise SystemExit(f"{README.name} has no block between {begin} and {end}")
    return before + new + rest.partition(end)[2]


# -- docs/speed.md --------------------------------------------------------------------------------

INTRODUCTION = """\
# Speed of whole denoisers

Written by `python benchmarks/table.py` from [benchmarks/results](../benchmarks/results); edit
neither. What runs on a GPU is measured by `make bench-gpu` (`benchmarks/gpu.py`).

`benchmarks/denoiser.py`: original and merged, both through `torch.compile`, in one process, in
turn; medians and quartiles. *merged* is the mean over the default schedule (a refresh and four
reuse steps), *reuse* a step with known patterns. *ideal* is the ratio of counted FLOPs, original
over reuse step; *quotient* is speed-up over ideal. *compile* is what the first calls of both
programs took, capture and rewriting included. Weights are random unless said otherwise: what
merging costs in error is in [default.md](default.md).
"""
TOMESD_NOTES = """\
tomesd merges around self-attention only. With its defaults (`max_downsample=1`) it reaches no
attention of SDXL; `max_downsample=2` reaches those of 640 channels. It was called once in eager
mode before compiling, which makes its random generator: otherwise the graph breaks there. With an
even batch it draws random numbers, and the graph breaks as well. Original and patched are of the
same mode.
"""


def details(runs: Runs, gpu_runs: list[dict[str, Any]]) -> str:
    """All of docs/speed.md."""
    lines = [INTRODUCTION]
    for run in filter(gpu_table.is_shown, gpu_runs):
        lines += gpu_section(run)
    for name, run in runs:
        for size in run["sizes"]:
            lines += section(name, run, size)
    return "\n".join(lines).rstrip() + "\n"


def gpu_section(run: dict[str, Any]) -> list[str]:
    """One file of `gpu.py`."""
    versions, options = run["versions"], run["options"]
    facts = (
        f"{options['dtype']}, batch {options['batch']}, ratio {options['ratio']:g}, preset"
        f" `{options['preset']}`, {options['steps']} steps; torch {versions['torch']}, diffusers"
        f" {versions['diffusers']}, code {versions['code']}, {run['date']}."
    )
    without = {"skipped": "Skipped", "error": "Failed"}
    missing = {
        word: [name for name, entry in run["measurements"].items() if key in entry]
        for key, word in without.items()
    }
    facts += "".join(f" {word}: {', '.join(names)}." for word, names in missing.items() if names)
    lines = [f"## {run['device']}", "", *wrap(facts, 100, break_on_hyphens=False), ""]
    lines += ["```", run["command"], "```", ""]
    for title, head, make_rows in gpu_table.TABLES:
        rows = make_rows(run, gpu_table.WANTED)
        lines += [f"{title}:", "", *table(head, rows), ""] if rows else []
    return lines


def section(name: str, run: dict[str, Any], size: str) -> list[str]:
    """One file at one size."""
    versions, facts = run["versions"], [run["device"]]
    if run["device_kind"] == "cpu":
        facts[0] += f", {run['threads']} of {run['cores']} cores"
    facts[0] += f"; {run['layers']}, {run['parameters'] / 1e9:.2f}e9 parameters;"
    facts.append(f"weights {run['weights']}, batch {run['batch']};")
    facts.append(f"torch {versions['torch']}, diffusers {versions['diffusers']}, {run['date']}.")
    facts.append(f"{run['rounds']} rounds, in turn: {run['in_turn']}.")
    if by_processor(run):
        facts.append("Times are of the processor: other programs used the machine as well.")
    if run["compile_caches"] == "empty":
        seconds = run["sizes"][size]["original"]["compile_s"]
        facts.append(f"With empty caches the original compiled in {seconds:.0f} s (of the clock).")
    if not run["complete"]:
        facts.append("The run was stopped before its end.")
    facts.append(f"Raw: `{name}`.")
    lines = [
        f"## {title(run, size)}, {DTYPES[run['dtype']]}, {device(run)}",
        "",
        *wrap(" ".join(facts), 100, break_on_hyphens=False),
        "",
        "```",
        run["command"],
        "```",
        "",
    ]
    if measured(run, size, "toma_fx"):
        lines += [*merged_table(run, size), ""]
    others = [r for r in run["sizes"][size]["rows"] if r["method"] == "tomesd"]
    if others:
        lines += [TOMESD_NOTES, *tomesd_table(run, size), ""]
    profiles = [r for r in run["sizes"][size]["rows"] if "profile" in r]
    if profiles:
        lines += [*profile_table(run, size), ""]
    return lines


def spread(entry: dict[str, float], prefix: str) -> str:
    """Median and quartiles."""
    low, high = entry[prefix + "low_ms"], entry[prefix + "high_ms"]
    return f"{ms(entry[prefix + 'median_ms'])} ({low:,.0f} to {high:,.0f})"


def merged_table(run: dict[str, Any], size: str) -> list[str]:
    """Every scope and ratio."""
    busy, cold = by_processor(run), run["compile_caches"] == "empty"
    prefix = "processor_" if busy else ""
    head = ["scope", "ratio", "original", "refresh", "reuse", "merged", "speed-up", "ideal"]
    found = measured(run, size, "toma_fx")
    peaks = [row.get("peak_mib") or row.get("peak_mib_eager") or 0.0 for row in found]
    head += ["quotient", *["by the clock"] * busy, *["compile"] * cold]
    head += ["peak MiB"] * any(peaks)
    rows = []
    for row, peak in zip(found, peaks, strict=True):
        values = shown(run, row)
        rows.append(
            [
                f"`{row['scope']}`",
                f"{row['ratio']:g}",
                *(spread(row[kind], prefix) for kind in ("original", "refresh", "reuse")),
                ms(values["merged_ms"]),
                times(values["speedup"]),
                times(row["ideal"]),
                f"{values['quotient']:.2f}",
                *[times(row["speedup"])] * busy,
                *[f"{row['compile_s']['total']:.0f} s"] * cold,
                *[f"{peak:,.0f}"] * any(peaks),
            ]
        )
    return table(head, rows)


def tomesd_table(run: dict[str, Any], size: str) -> list[str]:
    """tomesd in both modes, and its defaults."""
    head = ["tomesd", "ratio", "original", "patched", "speed-up", "output", "graphs, breaks"]
    rows = []
    for row in run["sizes"][size]["rows"]:
        if row["method"] != "tomesd":
            continue
        output = {True: "unchanged", False: "changed", None: ""}[row.get("output_unchanged")]
        name = row["mode"] + (", defaults" if row["max_downsample"] == 1 else "")
        cells = [name, f"{row['ratio']:g}"]
        if "speedup" in row:
            values = shown(run, row)
            cells += [
                ms(values["original_ms"]),
                ms(values["merged_ms"]),
                times(values["speedup"]),
            ]
        else:
            cells += ["", row.get("error", "not timed"), ""]
        broken = f"{row['graphs']}, {row['graph_breaks']}" if "graphs" in row else ""
        rows.append([*cells, output, broken])
    return table(head, rows)


def profile_table(run: dict[str, Any], size: str) -> list[str]:
    """Shares of the self time of one profiled step by group, original and merged."""
    entry = run["sizes"][size]
    columns = {"original": entry["original"]["profile"]["step"]}
    for row in entry["rows"]:
        if row["method"] == "toma_fx" and "profile" in row:
            for kind in ("refresh", "reuse"):
                columns[f"`{row['scope']}` {row['ratio']:g} {kind}"] = row["profile"][kind]
    shares = [
        {g: value / column["total_ms"] for g, value in column["groups_ms"].items()}
        for column in columns.values()
    ]
    groups = sorted({g for s in shares for g in s}, key=lambda g: (-shares[0].get(g, 0.0), g))
    rows = [[g, *(f"{s[g]:.2%}" if g in s else "" for s in shares)] for g in groups]
    return ["Where the time of one profiled step goes:", "", *table(["group", *columns], rows)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if outdated")
    args = parser.parse_args()
    runs = read()
    gpu_runs = read_gpu()
    readme = replaced(replaced(README.read_text(), block(runs)), gpu_block(gpu_runs))
    new = {README: readme, DETAILS: details(runs, gpu_runs)}
    stale = [p for p, text in new.items() if not p.exists() or p.read_text() != text]
    if args.check:
        if stale:
            names = ", ".join(str(p.relative_to(ROOT)) for p in stale)
            sys.exit(f"out of date: {names}; run: python benchmarks/table.py")
        return
    for path in stale:
        path.write_text(new[path])
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

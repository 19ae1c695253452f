"""Time and memory of capture, analysis and rewrite against the depth of the model.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --out benchmarks/results/scaling-cpu.json

SDXL's UNet and Flux's transformer at 1024x1024 with their real configurations and a part or a
multiple of their real depth, on fake tensors: no weight is ever allocated. Every point runs in
`--rounds` fresh processes; reported are medians. A point counts the nodes of the captured graph,
times each stage (by the clock, and as processor time of the process: where others use the machine
as well, that is the steadier one), and reads the most memory the process ever held, imports and
capture included.

`exponent` is the slope of log(processor time) over log(nodes), by least squares over all depths
and between the two largest (`last`): 1 is linear growth. Beside the JSON file, an SVG of the same
name shows the curves.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import CLASSES, CONFIGS, command_line, device_name, resident, save, versions
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from toma_fx.analysis.propagate import analyze
from toma_fx.capture.model import capture
from toma_fx.graph.verify import output_values, verify
from toma_fx.methods.toma import ToMAConfig
from toma_fx.models.named import example_inputs
from toma_fx.plan.planner import make_plan
from toma_fx.run.programs import Specialization

DEPTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
SCOPES = ("sublayer", "block", "stack")
PIXELS = 1024
BATCH = {"sdxl": 2, "flux": 1}
"""SDXL's pipeline stacks the two passes of guidance; Flux is distilled."""
STAGES = ("capture", "verify", "analyze", "plan", "refresh", "reuse")
"""As in `Specialization`; `verify` is of the captured graph, the last two are rewrites."""
TOTALS = {"after capture": STAGES[1:], "total": STAGES}
LIMIT_S, LIMIT_MIB = 20.0, 4096.0
"""What the full models may take."""


# -- one point, in a process of its own -----------------------------------------------------------


def scaled(name: str, depth: float) -> dict[str, Any]:
    """The real configuration with a part or a multiple of its layers."""

    def times(layers: int) -> int:
        return max(1, round(layers * depth))

    config = dict(CONFIGS[name])
    if name == "sdxl":
        # its first stage has no transformer
        first, *rest = config["transformer_layers_per_block"]
        config["transformer_layers_per_block"] = (first, *map(times, rest))
    else:
        for key in ("num_layers", "num_single_layers"):
            config[key] = times(config[key])
    return config


def denoiser(name: str, depth: float) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model of fake parameters, and inputs: fake ones, but real position ids."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = CLASSES[name](**scaled(name, depth)).eval().requires_grad_(False)
        inputs = example_inputs(model, PIXELS, PIXELS, BATCH[name])
    if name == "flux":
        # the grid is read from their values; a small model's inputs have the same
        side = PIXELS // 16
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], -1)
        inputs["img_ids"] = ids.flatten(0, 1).float()
        inputs["txt_ids"] = torch.zeros(inputs["txt_ids"].shape)
    return model, inputs


class Stopwatch:
    """Seconds of each stage, of the clock and of processor time."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.processor: dict[str, float] = {}

    def __call__(self, stage: str, run: Callable[[], Any]) -> Any:
        """What `run` returns."""
        start, busy = time.perf_counter(), time.process_time()
        result = run()
        self.wall[stage] = time.perf_counter() - start
        self.processor[stage] = time.process_time() - busy
        return result


def blocks(model: torch.nn.Module) -> int:
    """Transformer layers of a UNet, double and single blocks of Flux."""
    return sum(type(m).__name__.endswith("TransformerBlock") for m in model.modules())


def point(name: str, depth: float, scope: str) -> dict[str, Any]:
    """Run every stage once in this process."""
    config = ToMAConfig(scope=scope)
    model, inputs = denoiser(name, depth)
    watch, before = Stopwatch(), resident()
    captured = watch("capture", lambda: capture(model, (), inputs))
    graph_module = captured.graph_module
    names = [i.name for i in captured.inputs]
    outputs = output_values(graph_module.graph)
    watch("verify", lambda: verify(graph_module, names, outputs, "capture"))
    analysis, flow = watch("analyze", lambda: analyze(captured, config.grid))
    plan = watch("plan", lambda: make_plan(analysis, flow, config))
    made = Specialization(captured, analysis, flow, plan)
    programs = {use: watch(use, lambda use=use: made.program(use)) for use in ("refresh", "reuse")}
    return {
        "blocks": blocks(model),
        "nodes": len(graph_module.graph.nodes),
        "segments": len(plan.segments),
        "nodes_rewritten": {u: len(p.graph_module.graph.nodes) for u, p in programs.items()},
        "wall_s": watch.wall,
        "processor_s": watch.processor,
        "mib_before": before,
        "peak_mib": resident(peak=True),
    }


# -- all points -----------------------------------------------------------------------------------


def fresh(name: str, depth: float, scope: str) -> dict[str, Any]:
    """`point` in a fresh process."""
    command = [sys.executable, __file__, "--point", name, str(depth), scope]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return found


def joined(depth: float, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the rounds of one point."""
    row = {"depth": depth, **rounds[0]}
    for key in ("wall_s", "processor_s"):
        row[key] = {s: statistics.median(r[key][s] for r in rounds) for s in STAGES}
        for total, parts in TOTALS.items():
            row[key][total] = statistics.median(sum(r[key][s] for s in parts) for r in rounds)
    for key in ("mib_before", "peak_mib"):
        row[key] = statistics.median(r[key] for r in rounds)
    row["rounds"] = [{k: r[k] for k in ("wall_s", "processor_s", "peak_mib")} for r in rounds]
    return row


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent p of y ~ x^p, by least squares of the logarithms."""
    fit = statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y])
    return fit.slope


def exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Growth of every stage over the node count."""
    found: dict[str, dict[str, float]] = {}
    nodes = [r["nodes"] for r in rows]
    for stage in (*STAGES, *TOTALS):
        seconds = [r["processor_s"][stage] for r in rows]
        found[stage] = {"all": slope(nodes, seconds), "last": slope(nodes[-2:], seconds[-2:])}
    return found


def table(title: str, curve: dict[str, Any]) -> Table:
    """Processor seconds of a curve, a row each depth."""
    shown = Table(title=title, title_justify="left")
    for name in ("depth", "blocks", "nodes", *STAGES, *TOTALS, "clock", "peak MiB"):
        shown.add_column(name, justify="right")
    for row in curve["points"]:
        seconds = [f"{row['processor_s'][s]:.2f}" for s in (*STAGES, *TOTALS)]
        facts = [f"{row['depth']:g}", f"{row['blocks']}", f"{row['nodes']:,}"]
        shown.add_row(*facts, *seconds, f"{row['wall_s']['total']:.2f}", f"{row['peak_mib']:.0f}")
    for which in ("all", "last"):
        found = [f"{e[which]:.2f}" for e in curve.get("exponents", {}).values()]
        if found:
            shown.add_row(f"exponent, {which}", "", "", *found, style="bold")
    return shown


# -- picture --------------------------------------------------------------------------------------

COLORS = {
    "capture": "#7f7f7f", "analyze": "#1f77b4", "plan": "#9467bd", "refresh": "#2ca02c",
    "reuse": "#98c379", "after capture": "#ff7f0e", "total": "#d62728", "peak MiB": "#d62728",
}  # fmt: skip
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 420, 300, 60, 40, 110, 45


def ticks(most: float) -> list[float]:
    """Four to eight round values from 0 to `most`."""
    raw = most / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    return [step * i for i in range(int(most / step) + 1)]


def panel(
    title: str, x: list[int], curves: dict[str, list[float]], limit: float, full: int
) -> list[str]:
    """SVG elements of one diagram: curves over nodes, the limit, a mark at the full model."""
    most_x, most_y = 1.05 * max(x), 1.05 * max(limit, *(max(c) for c in curves.values()))
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(a: float, b: float) -> tuple[float, float]:
        return round(LEFT + a / most_x * wide, 1), round(TOP + high - b / most_y * high, 1)

    def line(a: tuple[float, float], b: tuple[float, float], style: str) -> str:
        return f'<line x1="{a[0]}" y1="{a[1]}" x2="{b[0]}" y2="{b[1]}" {style}/>'

    def text(a: float, b: float, words: str, style: str = "") -> str:
        return f'<text x="{a}" y="{b}" {style}>{words}</text>'

    out = [text(LEFT, TOP - 16, title, 'font-weight="bold"')]
    for value in ticks(most_y):
        left = at(0, value)
        out += [line(left, at(most_x, value), 'stroke="#ddd"')]
        out += [text(left[0] - 6, left[1] + 4, f"{value:,.0f}", 'text-anchor="end"')]
    for value in ticks(most_x):
        foot = at(value, 0)
        out += [text(foot[0], foot[1] + 16, f"{value:,.0f}", 'text-anchor="middle"')]
    out += [
        text(LEFT + wide / 2, HEIGHT - 8, "nodes of the captured graph", 'text-anchor="middle"')
    ]
    out += [line(at(0, limit), at(most_x, limit), 'stroke="#000" stroke-dasharray="6 3"')]
    out += [text(LEFT + 4, at(0, limit)[1] - 4, f"limit {limit:,.0f}, for the full model")]
    out += [line(at(full, 0), at(full, most_y), 'stroke="#000" stroke-dasharray="2 3"')]
    names_at = math.inf
    for name, y in sorted(curves.items(), key=lambda item: item[1][-1]):
        spots = [at(a, b) for a, b in zip(x, y, strict=True)]
        color, end = COLORS[name], spots[-1]
        path = " ".join(f"{a},{b}" for a, b in spots)
        out += [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>']
        out += [f'<circle cx="{a}" cy="{b}" r="2.5" fill="{color}"/>' for a, b in spots]
        names_at = min(names_at - 13, end[1])
        out += [text(end[0] + 16, names_at + 4, name, f'fill="{color}"')]
    return out


def picture(curves: dict[str, dict[str, Any]]) -> str:
    """An SVG: a row for each curve, time at the left and memory at the right."""
    body: list[str] = []
    for i, (title, curve) in enumerate(curves.items()):
        rows = curve["points"]
        nodes = [r["nodes"] for r in rows]
        full = next((r["nodes"] for r in rows if r["depth"] == 1), nodes[-1])
        seconds = {s: [r["processor_s"][s] for r in rows] for s in COLORS if s != "peak MiB"}
        memory = {"peak MiB": [r["peak_mib"] for r in rows]}
        for j, (unit, values, limit) in enumerate(
            (("processor seconds", seconds, LIMIT_S), ("memory", memory, LIMIT_MIB))
        ):
            drawn = panel(f"{title}: {unit}", nodes, values, limit, full)
            body += [f'<g transform="translate({j * WIDTH},{i * HEIGHT})">', *drawn, "</g>"]
    size = f'width="{2 * WIDTH}" height="{HEIGHT * len(curves)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" '
    return "\n".join([head + 'font-size="11">', '<rect width="100%" height="100%" fill="white"/>',
                      *body, "</svg>", ""])  # fmt: skip


# -- a run ----------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, name: str, scope: str) -> dict[str, Any]:
    """One curve."""
    curve: dict[str, Any] = {"model": name, "scope": scope, "points": []}
    for depth in sorted(args.depths):
        rounds = [fresh(name, depth, scope) for _ in range(args.rounds)]
        row = joined(depth, rounds)
        curve["points"].append(row)
        seconds = row["processor_s"]["total"]
        print(f"{name} {scope} {depth:g}: {row['nodes']} nodes, {seconds:.1f} s", flush=True)
    return derive(curve)


def derive(curve: dict[str, Any]) -> dict[str, Any]:
    """The curve with what follows from its points: exponents, and whether the limits are kept."""
    if len(curve["points"]) > 1:
        curve["exponents"] = exponents(curve["points"])
    full = [r for r in curve["points"] if r["depth"] == 1]
    if full:
        curve["within_limits"] = {
            "clock": full[0]["wall_s"]["total"] < LIMIT_S,
            "processor": full[0]["processor_s"]["total"] < LIMIT_S,
            "peak_mib": full[0]["peak_mib"] < LIMIT_MIB,
        }
    return curve


def show(results: dict[str, Any], path: Path | None) -> None:
    """Print every curve, and draw them beside the result file."""
    for title, curve in results["curves"].items():
        Console(width=150).print(table(f"{title}: processor seconds", curve))
    if path is not None:
        path.with_suffix(".svg").write_text(picture(results["curves"]))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=CLASSES, default=list(CLASSES))
    add("--scopes", nargs="+", choices=SCOPES, default=["stack", "sublayer"])
    add("--depths", nargs="+", type=float, default=list(DEPTHS), help="1 is the real depth")
    add("--rounds", type=int, default=3, help="fresh processes a point")
    add("--out", type=Path)
    add("--draw", type=Path, metavar="FILE", help="show a result file again; measure nothing")
    add("--point", nargs=3, metavar=("MODEL", "DEPTH", "SCOPE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print, write and draw."""
    args = parse()
    torch.set_grad_enabled(False)
    if args.point:
        name, depth, scope = args.point
        print(json.dumps(point(name, float(depth), scope)))
        return
    if args.draw:
        results = json.loads(args.draw.read_text())
        results["curves"] = {title: derive(c) for title, c in results["curves"].items()}
        save(results, args.draw)
        show(results, args.draw)
        return
    results = {
        "command": command_line(),
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "pixels": PIXELS,
        "batch": BATCH,
        "limits": {"total_s": LIMIT_S, "peak_mib": LIMIT_MIB},
        "curves": {},
    }
    for name in args.models:
        for scope in args.scopes:
            title = f"{name}, scope {scope}"
            results["curves"][title] = measure(args, name, scope)
            save(results, args.out)
    show(results, args.out)


if __name__ == "__main__":
    main()

"""`toma-fx info` and `verify`: what an artifact says of itself, and whether it is unchanged.

Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from toma_fx.cli.text import bytes_text, print_json
from toma_fx.export.manifest import CallSpec, Manifest, TensorSpec, describe_calls
from toma_fx.export.reading import open_artifact, read_manifest
from toma_fx.export.signatures import check_signature, sign
from toma_fx.methods.kinds import merges
from toma_fx.run.schedule import Schedule


def show_manifest(args: argparse.Namespace, options: dict[str, Any], console: Console) -> None:
    """Print the manifest, as a table or as it is."""
    manifest = read_manifest(args.path)
    if args.json:
        sys.stdout.write(manifest.to_json())
        return
    table = Table(box=SIMPLE, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(manifest):
        table.add_row(name, text)
    console.print(table, highlight=False)


def _rows(manifest: Manifest) -> list[tuple[str, str]]:
    """What to show of a manifest: (name, text)."""
    target, device, calls = manifest.target, manifest.device, manifest.calls
    rows = [
        ("target", ", ".join([target.name, *(f"{k} {v}" for k, v in target.options.items())])),
        ("built for", " ".join(w for w in (device.type, device.name, device.arch) if w)),
        ("model", f"{manifest.model}, {manifest.dtype}"),
        ("license", manifest.license or "not stated"),
    ]
    if len(calls) > 1:
        rows += [(f"size {name}", text) for name, text in describe_calls(calls).items()]
    rows += _alike([_call_rows(call) for call in calls])
    rows += [(f"file {name}", bytes_text(spec.size)) for name, spec in manifest.files.items()]
    rows += [(f"made with {name}", text) for name, text in manifest.versions.items()]
    parity = (p for call in calls for p in call.parity)
    worst = {p.kind: p for p in sorted(parity, key=lambda p: p.relative)}
    rows += [
        (f"difference, {kind}", f"{p.relative:.1e} (at most {p.tolerance:.0e})")
        for kind, p in worst.items()
    ]
    return rows


def _call_rows(call: CallSpec) -> dict[str, str]:
    """What to show of a call, by name."""
    patterns = sum(map(_bytes, call.kept))
    rows = {
        "method": _method(call.plan),
        "merges": _merged_steps(call.schedule),
        "computes": _computed_steps(call.schedule),
        "patterns": f"{len(call.kept)} tensors, {bytes_text(patterns)}",
    }
    for kind, program in call.programs.items():
        rows[f"program {kind}"] = program.file + (f": {program.entry}" if program.entry else "")
    tensors = [("input", spec.tensor) for spec in call.inputs]
    tensors += [("output", spec) for spec in call.outputs]
    rows |= {f"{kind} {s.name}": f"{list(s.shape)} {s.dtype}" for kind, s in tensors}
    return rows | {f"constant {'_'.join(c.path)}": repr(c.value) for c in call.constants}


def _alike(calls: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """The rows of several calls: one for what is alike, what differs beside each other."""
    names = dict.fromkeys(name for rows in calls for name in rows)
    texts = {name: dict.fromkeys(rows.get(name, "none") for rows in calls) for name in names}
    return [(name, "; ".join(each)) for name, each in texts.items()]


def _merged_steps(schedule: Schedule) -> str:
    """Which steps merge, and which programs they run."""
    first, last = schedule.first_step, schedule.last_step
    if not any(merges(kind) for phase in schedule.phases for kind in phase.kinds):
        return "nothing"
    orders = []
    for phase in schedule.phases:
        order = " ".join((*phase.first, f"({' '.join(phase.cycle)}) ..."))
        share = f"{phase.begin:.0%} of the steps"
        begin = share if isinstance(phase.begin, float) else f"step {phase.begin}"
        orders.append(f"from {begin}: {order}" if phase.begin else order)
    steps = f"steps {first} to {'the last' if last is None else last}"
    return f"{steps}: {'; '.join(orders)}"


def _computed_steps(schedule: Schedule) -> str:
    """Which steps compute, and which use kept updates."""
    caching = schedule.caching
    if caching is None:
        return "every step"
    if caching.mask is not None:
        return " ".join(map(str, caching.mask))
    steps = f"the mask {caching.policy}" if caching.policy else f"1 step in {caching.every}"
    if caching.share is not None:
        return f"{caching.share:.0%} of the steps, most of them early"
    rest = [f"the first {caching.warmup_steps}", f"the last {caching.last_steps}"]
    return f"{steps}, {' and '.join(rest if caching.last_steps else rest[:1])}"


def _method(plan: Mapping[str, Any]) -> str:
    """The configuration of a plan in words."""
    config = plan.get("config")
    if not isinstance(config, dict):
        return "none"
    return ", ".join(f"{k} {v}" for k, v in config.items() if v not in (None, [], {}))


def _bytes(spec: TensorSpec) -> int:
    """Size of a tensor; a dtype's name has its bits, except "bool"."""
    bits = re.search(r"\d+", spec.dtype)
    return math.prod(spec.shape) * (int(bits[0]) // 8 if bits else 1)


def verify_files(args: argparse.Namespace, options: dict[str, Any], console: Console) -> None:
    """Check the files of an artifact against its manifest."""
    with open_artifact(args.path) as files:
        manifest = files.manifest
        if args.trust is not None:
            check_signature(files, args.trust)
    size = sum(f.size for f in manifest.files.values())
    if args.json:
        signer = None if args.trust is None else str(args.trust)
        found = {"path": str(args.path), "files": [*manifest.files], "bytes": size}
        print_json({**found, "signed_by": signer})
        return
    text = f"{args.path}: {len(manifest.files)} files, {bytes_text(size)}, unchanged"
    if args.trust is not None:
        text += f", signed by {args.trust}"
    console.print(text, highlight=False, soft_wrap=True)


def sign_files(args: argparse.Namespace, options: dict[str, Any], console: Console) -> None:
    """Sign an artifact."""
    sign(args.path, args.key)
    console.print(f"{args.path}: signed by {args.key}", highlight=False, soft_wrap=True)

"""Where the time of one step goes, by `torch.profiler`: operators and kernels, by group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("selection", ("facility_location",)),
    ("attention", ("scaled_dot_product", "flash", "fmha", "sdpa", "efficient_attention")),
    ("convolution", ("conv", "fprop")),
    ("gemm", ("mm", "gemm", "linear", "nvjet", "cutlass")),
)
"""Group of an operator or kernel by parts of its name."""
FUSED_MERGE = ("gather", "scatter", "index", "argmax", "topk", "sort")
CUDA = torch.autograd.DeviceType.CUDA


def group_of(name: str, shapes: Any, batch: int) -> str:
    """Where an operator or a kernel of Inductor belongs.

    Merging is a product of one matrix a window, so that of batched products those with more
    matrices than pictures are merging (in a refresh step, similarity as well).
    """
    lowered = name.lower().replace("_unsafe_index", "")  # upsampling
    if "fused" in lowered or lowered.startswith("triton_"):
        merging = any(part in lowered for part in FUSED_MERGE)
        return "merge+unmerge+selection, fused" if merging else "norm+pointwise"
    if "bmm" in lowered and shapes and shapes[0] and shapes[0][0] > batch:
        return "merge+unmerge"
    for group, parts in GROUPS:
        if any(part in lowered for part in parts):
            return group
    return "other"


def record(run: Callable[[], Any], device: str) -> Any:
    """A profile of one call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as recorded:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    return recorded


def profile(run: Callable[[], Any], device: str, batch: int, top: int = 25) -> dict[str, Any]:
    """Self time of operators in one call, in milliseconds: the longest ones, and by group."""
    return summarize(record(run, device), device, batch, top)


def summarize(recorded: Any, device: str, batch: int, top: int = 25) -> dict[str, Any]:
    """Self time of operators, in milliseconds: the longest ones, and by group.

    On CUDA it is kernel time by the operator or fused kernel that launched it.
    """
    cuda = device == "cuda"
    groups: dict[str, float] = {}
    rows: dict[tuple[str, str], tuple[int, float]] = {}
    kernels = 0.0
    for event in recorded.key_averages(group_by_input_shape=True):
        milliseconds = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3
        if cuda and event.device_type == CUDA:
            kernels += 0.0 if event.is_user_annotation else milliseconds
            continue
        group = group_of(event.key, event.input_shapes, batch)
        groups[group] = groups.get(group, 0.0) + milliseconds
        count, total = rows.get((event.key, group), (0, 0.0))
        rows[event.key, group] = (count + event.count, total + milliseconds)
    if cuda:
        groups["(no operator known)"] = max(0.0, kernels - sum(groups.values()))
    longest = sorted(rows.items(), key=lambda item: -item[1][1])[:top]
    return {
        "total_ms": sum(groups.values()),
        "groups_ms": {k: v for k, v in sorted(groups.items(), key=lambda item: -item[1]) if v},
        "top": [
            {"name": name, "group": group, "count": count, "self_ms": milliseconds}
            for (name, group), (count, milliseconds) in longest
        ],
    }


def list_kernels(recorded: Any, device: str, batch: int) -> list[dict[str, Any]]:
    """Kernels by name (on the CPU: operators), the longest first, as rows of `summarize`.

    None where the profiler can't see into the GPU.
    """
    cuda = device == "cuda"
    events = [
        e for e in recorded.key_averages()
        if not cuda or (e.device_type == CUDA and not e.is_user_annotation)
    ]  # fmt: skip
    rows = [
        {
            "name": event.key,
            "group": group_of(event.key, None, batch),
            "count": event.count,
            "self_ms": (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3,
        }
        for event in events
    ]
    return sorted(rows, key=lambda row: -row["self_ms"])


def longest_kernel(run: Callable[[], Any], device: str) -> str | None:
    """The kernel that takes most of a call; None where the profiler sees none."""
    kernels = list_kernels(record(run, device), device, 1)
    return str(kernels[0]["name"]) if kernels else None


def format_profile(title: str, summary: dict[str, Any], kernels: list[dict[str, Any]]) -> str:
    """One profile as text: the groups of `summarize`, then the rows of `list_kernels`."""
    total = sum(row["self_ms"] for row in kernels) or 1.0
    lines = [title, f"{'ms':>10} {'share':>7}  group"]
    for group, ms in summary["groups_ms"].items():
        lines.append(f"{ms:10.3f} {ms / summary['total_ms']:7.1%}  {group}")
    lines += ["", f"{'ms':>10} {'share':>7} {'calls':>6}  {'group':<18} kernel"]
    for row in kernels:
        share, group = row["self_ms"] / total, row["group"].split("+")[0]
        lines.append(
            f"{row['self_ms']:10.3f} {share:7.1%} {row['count']:6}  {group:<18} {row['name'][:120]}"
        )
    return "\n".join(lines) + "\n"

"""`torch.export` programs of an optimized denoiser: what every deployment target is made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram

from toma_fx.api import call_of, optimized_of
from toma_fx.errors import ModelTypeError
from toma_fx.passes.pipeline import rewrite
from toma_fx.plan import MergePlan
from toma_fx.specialize import tracing
from toma_fx.state import Call, call_at

LONGEST = 1000
"""Steps of a generation that are looked at for the kinds of programs that it runs."""


@dataclass(frozen=True)
class Exported:
    """One exported program.

    Attributes:
        program: (model inputs, pattern inputs) -> (model outputs, pattern outputs), flat, of static
            shapes and operators of torch alone.
        example: inputs that it was exported with, in order.
        pattern_inputs, pattern_outputs: names of the patterns, which follow the model's own inputs
            and outputs in this order.
    """

    program: ExportedProgram
    example: tuple[Any, ...]
    pattern_inputs: tuple[str, ...]
    pattern_outputs: tuple[str, ...]


def export_programs(optimized: Any, example_inputs: Any) -> dict[Call, Exported]:
    """The programs that the schedule of an optimized denoiser runs, for one call's shapes.

    Args:
        optimized: what `toma_fx.optimize` returned for a model.
        example_inputs: a call: a dict of keyword arguments, a tuple, or a pair (args, kwargs).

    Returns:
        "refresh", "reweigh", "reuse" and "plain", those of them that some step runs.

    Raises:
        DynamicError: the method's number of merged tokens depends on the data; names the form that
            can be exported. ModelTypeError: not an optimized denoiser. CaptureError, NoMergeSites,
            TileError: as at a call.
    """
    denoiser = optimized_of(optimized)
    if denoiser is None:
        raise ModelTypeError(
            "the model is not optimized",
            where="export_programs",
            expected="what toma_fx.optimize(model) returned",
            got=type(optimized).__name__,
        )
    denoiser.config_toma.check_static("export")
    specialization, leaves = denoiser.specialized(*call_of(example_inputs))
    plan, captured = specialization.plan.portable(), specialization.captured
    out: dict[Call, Exported] = {}
    patterns: dict[str, Any] = {}
    for call in _calls(plan):
        graph_module = captured.graph_module
        taken: tuple[str, ...] = ()
        given: tuple[str, ...] = ()
        if call != "plain":
            with tracing():
                program = rewrite(
                    captured, specialization.analysis, specialization.flow, plan, call
                )
            graph_module = program.graph_module
            taken, given = program.pattern_inputs, program.pattern_outputs
        example = (*leaves, *(patterns[name] for name in taken))
        with torch.no_grad():
            if given:
                results = graph_module(*example)
                patterns.update(zip(given, results[len(results) - len(given) :], strict=True))
            exported = torch.export.export(graph_module, example, strict=False)
        out[call] = Exported(exported, example, taken, given)
    return out


def _calls(plan: MergePlan) -> list[Call]:
    """The kinds of steps in a generation, those that give patterns first."""
    config = plan.config
    if not plan.segments:
        return ["plain"]
    first = call_at(config, config.first_step, False)
    later = (call_at(config, step, True) for step in range(LONGEST))
    order: tuple[Call, ...] = ("refresh", "reweigh", "reuse", "plain")
    ran = {first, *later, *(["plain"] if config.last_step is not None else [])}
    return [call for call in order if call in ran]

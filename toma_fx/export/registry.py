"""The targets by name: the one place that lists them. This imports neither them nor torch."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from toma_fx.errors import ConfigError, UnknownNameError, nearest
from toma_fx.export.targets import Target, check_options

TARGETS: Mapping[str, str] = {
    "aoti": "toma_fx.export.to_aoti.target:AOTITarget",
    "onnx": "toma_fx.export.to_onnx.target:ONNXTarget",
    "tensorrt": "toma_fx.export.to_tensorrt.target:TensorRTTarget",
    "triton": "toma_fx.export.to_triton.target:TritonTarget",
}
"""Module and class of every target. What a target needs is imported when it is used."""


def target_class(name: str) -> type[Target]:
    """The class of a target.

    Raises:
        UnknownNameError: there is no such target.
    """
    if name not in TARGETS:
        raise UnknownNameError(
            "unknown target",
            where="target",
            expected=", ".join(TARGETS),
            got=repr(name),
            hint=nearest(str(name), TARGETS),
        )
    module, _, attribute = TARGETS[name].partition(":")
    loaded: type[Target] = getattr(importlib.import_module(module), attribute)
    return loaded


def make_target(target: str | Target, options: Mapping[str, Any]) -> Target:
    """A target with options, which are fields of its class.

    Raises:
        UnknownNameError: there is no such target, or it has no such option. ConfigError: a value
            that an option can't have, or options beside a target that has its own.
    """
    if isinstance(target, Target):
        if options:
            raise ConfigError(
                "the target has its options already",
                where="target",
                expected=f"options of {type(target).__name__}, or the name of a target",
                got=", ".join(options),
            )
        return target
    kind = target_class(target)
    check_options(f"the target {target}", options, [f.name for f in dataclasses.fields(kind)])
    return kind(**options)

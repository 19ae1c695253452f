"""Which method merges, and how: configurations by name, and the presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toma_fx.errors import ConfigError, UnknownNameError, nearest
from toma_fx.methods import baselines, ca_tome, retom, todo, tofu, tomesd  # noqa: F401 - register
from toma_fx.methods.base import MethodConfig, methods
from toma_fx.methods.toma import ToMAConfig

PRESETS: dict[str, ToMAConfig] = {
    "default": ToMAConfig(),
    # arXiv 2509.10918; the published code's merge_helper defaults to 64 tiles
    "paper-sdxl": ToMAConfig(
        scope="sublayer", share="block", tiles=64, destinations_every=10, weights_every=5
    ),
    # the published code's config.yaml: 256 tiles; one pattern for all blocks
    "paper-flux": ToMAConfig(scope="sublayer", tiles=256, destinations_every=10, weights_every=5),
}
"""Named configurations of ToMA. `default` is chosen by measurement: see docs/default.md."""


def make_config(
    toma: Any = True, method: Any = None, options: Mapping[str, Any] | None = None
) -> MethodConfig:
    """The configuration that `toma_fx.optimize(model, toma, method=method, **options)` means.

    Args:
        toma: True, a preset's name, a configuration, a mapping of fields, or False for no merging.
        method: a method's name or configuration; None for the method of `toma`, or ToMA.
        options: fields that replace those.

    Raises:
        UnknownNameError: an unknown preset, method or field, with the nearest known names.
        ConfigError: a field out of its domain, or `toma` and `method` that contradict each other.
    """
    fields = dict(options or {})
    if toma is False:
        return ToMAConfig(ratio=0.0)
    if isinstance(toma, Mapping):
        fields, toma = {**toma, **fields}, True
    if method is None and isinstance(toma, MethodConfig):
        return toma.replaced(fields)
    if isinstance(toma, str) and method in (None, "toma"):
        return _preset(toma).replaced(fields)
    if toma is not True:
        raise _not_a_configuration(toma, method)
    if isinstance(method, MethodConfig):
        return method.replaced(fields)
    if method is None or method == "toma":
        return PRESETS["default"].replaced(fields)
    if not isinstance(method, str):
        raise ConfigError(
            "method= is no method",
            where="method",
            expected="a method's name, or a configuration of one",
            got=type(method).__name__,
        )
    known = methods()
    if method not in known:
        raise UnknownNameError(
            f"unknown method {method!r}", where="method", hint=nearest(method, known)
        )
    return known[method]().replaced(fields)


def _preset(name: str) -> ToMAConfig:
    if name not in PRESETS:
        hint = f"toma_fx.optimize(model, method={name!r})" if name in methods() else ""
        raise UnknownNameError(
            f"unknown preset {name!r}", where="toma", hint=hint or nearest(name, PRESETS)
        )
    return PRESETS[name]


def _not_a_configuration(toma: Any, method: Any) -> ConfigError:
    if isinstance(toma, (str, MethodConfig)):
        return ConfigError(
            "toma= and method= contradict each other",
            where="toma",
            expected="one of the two; presets are ToMA's",
            got=f"toma={toma!r}, method={method!r}",
        )
    return ConfigError(
        "toma= is not a configuration",
        where="toma",
        expected="True, False, a preset name, a configuration or a mapping of its fields",
        got=type(toma).__name__,
    )

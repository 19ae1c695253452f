"""Which method merges, and how: the built-in methods by name, and the presets of ToMA."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from toma_fx.errors import ConfigError, UnknownNameError, nearest
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.baselines import GridConfig, RandomConfig
from toma_fx.methods.bigain import BiGainConfig
from toma_fx.methods.ca_tome import CAToMeConfig
from toma_fx.methods.cached_steps import SHARES
from toma_fx.methods.coredit import CoReDiTConfig
from toma_fx.methods.dito import DiToConfig
from toma_fx.methods.ibtm import IBTMConfig
from toma_fx.methods.retom import ReToMConfig
from toma_fx.methods.todo import ToDoConfig
from toma_fx.methods.tofu import ToFuConfig
from toma_fx.methods.toma import ToMAConfig
from toma_fx.methods.tomesd import ToMeSDConfig
from toma_fx.methods.topi import ToPiConfig

Config = TypeVar("Config", bound=MethodConfig)
METHODS: tuple[type[MethodConfig], ...] = (
    ToMAConfig,
    ToMeSDConfig,
    ToFuConfig,
    ToDoConfig,
    CAToMeConfig,
    ReToMConfig,
    BiGainConfig,
    CoReDiTConfig,
    DiToConfig,
    IBTMConfig,
    ToPiConfig,
    RandomConfig,
    GridConfig,
)
"""The built-in methods, the default first. They alone go by their `name`; a method of a user's own
is given as its class or as a configuration."""
PRESETS: dict[str, ToMAConfig] = {
    "default": ToMAConfig(),
    # arXiv 2509.10918; the published code's merge_helper defaults to 64 tiles
    "paper-sdxl": ToMAConfig(
        scope="sublayer", share="block", tiles=64, destinations_every=10, weights_every=5
    ),
    # the published code's config.yaml: 256 tiles; one pattern for all blocks
    "paper-flux": ToMAConfig(scope="sublayer", tiles=256, destinations_every=10, weights_every=5),
    # the published code's defaults, ratio 0.3 and deviation 0.2, along a half cosine from 0.5 to
    # 0.1: its mean over each quarter (arXiv 2505.11707)
    "sdtm-stages": ToMAConfig(
        ratio=0.48,
        phases=((0.25, {"ratio": 0.375}), (0.5, {"ratio": 0.225}), (0.75, {"ratio": 0.12})),
    ),
    # by the error of pictures of held-out seeds, see docs/caching.md
    **{name: ToMAConfig(ratio=0.0, cache=name) for name in SHARES},
}
"""Named configurations. `default` merges tokens, as docs/default.md chose it; `sdtm-stages` merges
more of them early than late, as SDTM does, but neither reweighs prompts nor protects steps;
"lossless", "balanced" and "fast" keep updates over steps and merge nothing, unless `ratio=` is
given, too."""
AMOUNTS = frozenset({"ratio", "ratios", "factor", "threshold"})
"""Fields that say how much the built-in methods merge."""


def method_names() -> tuple[str, ...]:
    """Names of the built-in methods, the default first."""
    return tuple(cls.name for cls in METHODS)


def make_config(
    toma: Any = True, method: Any = None, options: Mapping[str, Any] | None = None
) -> MethodConfig:
    """The configuration that `toma_fx.optimize(model, toma, method=method, **options)` means.

    Args:
        toma: True, a preset's name, a configuration, a mapping of fields, or False for no merging.
        method: a built-in method's name, a configuration, or the class of one; None for the method
            of `toma`, or ToMA.
        options: fields that replace those.

    Raises:
        UnknownNameError: an unknown preset, method or field, with the nearest known names.
        ConfigError: a field out of its domain, or `toma`, `method` and options that contradict each
            other.
    """
    fields = dict(options or {})
    if toma is False:
        return without_merging(_check_off(method, fields))
    if isinstance(toma, Mapping):
        fields, toma = {**toma, **fields}, True
    if method is None and isinstance(toma, MethodConfig):
        return with_options(toma, fields)
    if isinstance(toma, str) and method in (None, "toma"):
        return with_options(_preset(toma), fields)
    if toma is not True:
        raise _not_a_configuration(toma, method)
    if isinstance(method, MethodConfig):
        return with_options(method, fields)
    cls = _method_class(method)
    check_field_names(cls, fields)
    return cls(**fields)


def with_options(config: Config, options: Mapping[str, Any]) -> Config:
    """The configuration with some of its fields replaced.

    Raises:
        UnknownNameError: no such field, with the nearest, or the built-in methods that have it.
        ConfigError: a field out of its domain.
    """
    check_field_names(type(config), options)
    return dataclasses.replace(config, **options)


def without_merging(config: MethodConfig) -> MethodConfig:
    """The configuration that caches what `config` does, and merges nothing."""
    return ToMAConfig(ratio=0.0, cache=config.cache, grid=config.grid) if config.merges else config


def _check_off(method: Any, options: Mapping[str, Any]) -> MethodConfig:
    """Check what was given beside `toma=False`: an amount to merge contradicts it.

    Returns:
        The configuration that it would be with merging.

    Raises:
        ConfigError, UnknownNameError: as `make_config`.
    """
    config = make_config(True, method, options)
    overrides = dict(config.to_dict()["overrides"])
    names = {*options, *(name for values in overrides.values() for name in values)}
    amounts = sorted(names & AMOUNTS)
    if config.merges and (amounts or isinstance(method, MethodConfig)):
        raise ConfigError(
            "toma=False turns merging off, and what is given with it turns it on",
            where="toma",
            expected="toma=False without an amount to merge",
            got=", ".join(amounts) or f"method={method!r}",
            hint="leave out toma=False to merge, or leave out the rest",
        )
    return config


def _method_class(method: Any) -> type[MethodConfig]:
    """The class that `method=` means, if it is no configuration."""
    if method is None:
        return ToMAConfig
    if isinstance(method, str):
        for cls in METHODS:
            if cls.name == method:
                return cls
        raise UnknownNameError(
            f"unknown method {method!r}",
            where="method",
            expected="a built-in method; one of your own is given as its class, method=MyConfig",
            hint=nearest(method, method_names()),
        )
    is_config = isinstance(method, type) and issubclass(method, MethodConfig)
    if is_config and not inspect.isabstract(method):
        return method  # type: ignore[no-any-return]
    raise ConfigError(
        "method= is no method",
        where="method",
        expected="a built-in method's name, a configuration of a method, or the class of one",
        got=method.__name__ if isinstance(method, type) else type(method).__name__,
    )


def check_field_names(cls: type[MethodConfig], options: Iterable[str]) -> None:
    """Raise unless every option is a field of the class.

    Raises:
        UnknownNameError: one is not; says whose it is, or what is nearest.
    """
    known = _fields(cls)
    for name in options:
        if name not in known:
            owners = ", ".join(sorted(other.name for other in METHODS if name in _fields(other)))
            raise UnknownNameError(
                f"unknown option {name!r}",
                where=f"method {cls.name!r}",
                hint=f"it is an option of {owners}" if owners else nearest(name, known),
            )


def _fields(cls: type[MethodConfig]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _preset(name: str) -> ToMAConfig:
    if name not in PRESETS:
        is_method = name in method_names()
        hint = f"toma_fx.optimize(model, method={name!r})" if is_method else nearest(name, PRESETS)
        raise UnknownNameError(f"unknown preset {name!r}", where="toma", hint=hint)
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

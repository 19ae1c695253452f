"""Configurations by name, as the command line and Python give them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toma_fx.errors import ConfigError, UnknownNameError, nearest
from toma_fx.measure.fields import parse_field, split_fields
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.config import PRESETS, make_config, method_names
from toma_fx.methods.recipe import Recipe

ORIGINAL = "original"
"""Name of the unaccelerated model among configurations."""


def parse_config(text: str, where: str = "--config") -> Any:
    """What a word of the command line means: something that `toma_fx.optimize(model, X)` takes.

        balanced                       a preset
        tomesd                         a method with its defaults
        toma:ratio=0.5,scope=stack     a method, or a preset, and fields of its configuration
        recipe.json                    a file of `toma_fx.Recipe` (.json, .yaml)

    Raises:
        UnknownNameError: no such preset, method or field. ConfigError: a value out of its domain.
        RecipeError: a file that can't be read.
    """
    if Path(text).suffix in (".json", ".yaml", ".yml"):
        return Recipe.load(text)
    name, _, rest = text.partition(":")
    options = dict(parse_field(part, f"{where} {text}") for part in split_fields(rest))
    if name in PRESETS:
        return make_config(name, None, options)
    if name in method_names():
        return make_config(True, name, options)
    raise UnknownNameError(
        f"unknown configuration {name!r}",
        where=where,
        expected="a preset, a method, METHOD:FIELD=VALUE,..., or a file",
        hint=nearest(name, [*PRESETS, *method_names()]),
    )


def name_configs(configs: Any) -> dict[str, Any]:
    """Configurations by name.

    Args:
        configs: {name: X}, a list of X, or one X; X is what `toma_fx.optimize(model, X)` takes. Of
            a text as `parse_config` takes it, the name is the text.

    Raises:
        ConfigError: none, one named twice, or one named as the original is. As `make_config`.
    """
    if isinstance(configs, Mapping) and all(map(_is_config, configs.values())):
        pairs = [(str(name), value) for name, value in configs.items()]
    else:
        several = isinstance(configs, Sequence) and not isinstance(configs, str)
        pairs = [(_name(value), value) for value in (configs if several else [configs])]
    named: dict[str, Any] = {}
    for name, value in pairs:
        if name in named or name == ORIGINAL:
            raise ConfigError(
                "a name stands for two configurations",
                where="configs",
                expected=f"different names, and none {ORIGINAL!r}",
                got=f"{name!r} twice" if name in named else repr(name),
                hint="give {name: configuration, ...}",
            )
        named[name] = resolve_config(value)
    if not named:
        raise ConfigError(
            "nothing to compare", where="configs", expected="at least one", got="none"
        )
    return named


def _is_config(value: Any) -> bool:
    """Whether a value of a mapping is a configuration, so that its keys are names, not fields."""
    return isinstance(value, (str, bool, Mapping)) or hasattr(value, "to_dict")


def resolve_config(value: Any, where: str = "--config") -> Any:
    """What `toma_fx.optimize(model, X)` takes, of that or of a text as `parse_config` takes it."""
    if isinstance(value, str):
        return parse_config(value, where)
    return make_config(value) if isinstance(value, (bool, Mapping)) else value


def _name(value: Any) -> str:
    """A name for a configuration that was given without."""
    if isinstance(value, str):
        return value
    if isinstance(value, Recipe):
        return "recipe"
    if not isinstance(value, (MethodConfig, bool, Mapping)):
        return str(getattr(value, "name", "") or type(value).__name__)
    config = make_config(value)
    plain, fields = type(config)().to_dict(), config.to_dict()
    cache = fields.pop("cache", None)
    words = [f"{k}={v}" for k, v in fields.items() if v != plain[k] and k != "method"]
    if cache:
        words.append("cache=" + json.dumps({k: v for k, v in cache.items() if v is not None}))
    return ":".join([config.name, ",".join(words)]) if words else config.name


def config_json(config: Any) -> Any:
    """A configuration as JSON-able values, for records."""
    fields = config.to_dict() if hasattr(config, "to_dict") else config
    return json.loads(json.dumps(fields, default=repr))

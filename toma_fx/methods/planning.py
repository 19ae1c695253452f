"""What is asked of whole configurations: which plan alike, and whether they merge at a place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

from toma_fx.methods.base import MethodConfig
from toma_fx.methods.cache import CacheConfig

CACHE_SCHEDULE = frozenset({
    "every", "steps_mask", "warmup_steps", "warmup_interval", "last_steps",
    "max_continuous_cached_steps", "steps", "threshold",
})  # fmt: skip
"""Fields of a cache that say when, and change no program."""


def plan_key(config: MethodConfig) -> Hashable:
    """What programs depend on: equal for configurations that differ only in when which one runs."""
    cache = CacheConfig.of(config.cache)
    kept = None if cache is None else _fields(cache, CACHE_SCHEDULE)
    own = config.scheduling | {"cache", "phases"}
    return type(config), kept, tuple(_fields(stage, own) for stage in config.stages)


def _fields(config: Any, without: frozenset[str]) -> Hashable:
    names = (f.name for f in dataclasses.fields(config))
    return tuple((name, getattr(config, name)) for name in names if name not in without)


def merging(config: MethodConfig) -> Callable[[str], bool]:
    """Whether a configuration merges attention at a module path; of "", whether it merges."""
    return lambda path: config.merges_attention(path) if path else config.merges

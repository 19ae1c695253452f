"""What to merge and how: `ToMAConfig`, the presets, and their validation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from toma_fx.errors import ConfigError, TileError, UnknownNameError, nearest

Window = Literal["tile", "stripe", "global"]
Scope = Literal["sublayer", "block", "stack"]
Share = Literal["stream", "block", "branch"]

BRANCHES = ("attention", "cross", "mlp")
_CHOICES: dict[str, tuple[str, ...]] = {
    "window": ("tile", "stripe", "global"),
    "unmerge": ("transpose", "pinv"),
    "scope": ("sublayer", "block", "stack"),
    "share": ("stream", "block", "branch"),
}
OVERRIDABLE = ("ratio", "window", "tile", "tiles", "scale", "unmerge", "min_tokens")
_COUNTS = ("tiles", "destinations_every", "weights_every", "min_tokens")


@dataclass(frozen=True, kw_only=True)
class ToMAConfig:
    """Configuration of ToMA. Every field may also be given to `toma_fx.optimize` by name.

    Attributes:
        ratio: share of the tokens that is merged away, in [0, 1); 0 turns merging off.
        window: where similarity is searched: square "tile", "stripe" of whole rows, or "global".
        tile: window size in tokens: side, (height, width) or, in a video, (frames, height, width)
            of a tile, rows of a stripe. None chooses about 16 tokens a window, and windows of a
            video lie in one frame. A size that does not divide the grid is replaced by
            the nearest that does; the report shows which.
        tiles: number of windows instead of their size.
        scale: sharpness of the merge weights (softmax of scale * cosine similarity).
        unmerge: "transpose" of the weights, or "pinv", the pseudo-inverse of the merge matrix.
        destinations_every: steps between selections of destinations.
        weights_every: steps between recomputations of the weights for the current destinations.
        first_step: first step (from 0) that merges.
        last_step: last step that merges; None for the last of the generation.
        scope: residual adds a merged segment spans: one "sublayer", one "block", the whole "stack".
        share: branches that share one pattern: all of a residual "stream", of a "block", or none
            ("branch").
        branches: what to merge: "attention" (self and joint), "cross" (cross-attention), "mlp".
        min_tokens: image tokens below which a stream is left alone.
        include: module path patterns (shell wildcards) to consider; empty for all.
        exclude: module path patterns to leave alone.
        overrides: {module path pattern: {field: value}} for the fields in `OVERRIDABLE`; of several
            patterns that match, the later wins.
        grid: token grid (H, W) or (T, H, W) of a packed input that nothing else tells: neither
            position ids nor sizes among the arguments.

    Raises:
        ConfigError: a value outside its domain. UnknownNameError: an unknown choice or field.
    """

    ratio: float = 0.5
    window: Window = "tile"
    tile: int | tuple[int, ...] | None = None
    tiles: int | None = None
    scale: float = 1000.0
    unmerge: Literal["transpose", "pinv"] = "transpose"
    destinations_every: int = 5
    weights_every: int = 5
    first_step: int = 0
    last_step: int | None = None
    scope: Scope = "stack"
    share: Share = "stream"
    branches: tuple[str, ...] = BRANCHES
    min_tokens: int = 256
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: (
        Mapping[str, Mapping[str, Any]] | tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
    ) = ()
    grid: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("branches", "include", "exclude"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for name in ("tile", "grid"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        for branch in self.branches:
            _check_choice("branches", branch, BRANCHES)
        if not self.branches:
            raise ConfigError(
                "no branch to merge", where="branches", expected=f"some of {BRANCHES}"
            )
        _check_numbers(self)
        object.__setattr__(self, "overrides", _frozen_overrides(self))

    @classmethod
    def make(cls, base: str | ToMAConfig | Mapping[str, Any], **fields: Any) -> ToMAConfig:
        """A configuration from a preset name, mapping or configuration, with `fields` replaced.

        Raises:
            UnknownNameError: an unknown preset or field, with the nearest known names.
        """
        if isinstance(base, str):
            if base not in PRESETS:
                raise UnknownNameError(
                    f"unknown preset {base!r}", where="toma", hint=nearest(base, PRESETS)
                )
            base = PRESETS[base]
        elif isinstance(base, Mapping):
            fields = {**base, **fields}
            base = PRESETS["default"]
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise UnknownNameError(
                    f"unknown option {name!r}", where="optimize", hint=nearest(name, known)
                )
        return dataclasses.replace(base, **fields)

    def at(self, path: str) -> ToMAConfig:
        """The configuration that holds for the module `path`, overrides applied."""
        fields: dict[str, Any] = {}
        overrides: Any = self.overrides
        for pattern, values in overrides:
            if fnmatchcase(path, pattern):
                fields.update(values)
        return dataclasses.replace(self, overrides=(), **fields) if fields else self

    def selects(self, path: str) -> bool:
        """Whether `include` and `exclude` admit the module `path`."""
        included = not self.include or any(fnmatchcase(path, p) for p in self.include)
        return included and not any(fnmatchcase(path, p) for p in self.exclude)

    def path_patterns(self) -> tuple[str, ...]:
        """Every module path pattern that the configuration mentions."""
        overrides: Any = self.overrides
        return (*self.include, *self.exclude, *(pattern for pattern, _ in overrides))

    def to_json(self) -> dict[str, Any]:
        """Fields as JSON-able values."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        overrides: Any = self.overrides
        out["overrides"] = {pattern: dict(values) for pattern, values in overrides}
        return out


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UnknownNameError(
            f"unknown value {value!r} of {name}",
            where=name,
            expected=" or ".join(choices),
            got=repr(value),
            hint=nearest(str(value), choices),
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_numbers(config: ToMAConfig) -> None:
    """Domains of the numeric fields."""

    def require(ok: bool, name: str, expected: str, error: type[ConfigError] = ConfigError) -> None:
        if not ok:
            got = repr(getattr(config, name))
            raise error(f"{name} is out of range", where=name, expected=expected, got=got)

    require(
        _is_number(config.ratio) and 0 <= config.ratio < 1,
        "ratio",
        "a number in [0, 1), the share of tokens merged away",
    )
    require(_is_number(config.scale) and config.scale > 0, "scale", "a positive number")
    for name in _COUNTS:
        value = getattr(config, name)
        if not (name == "tiles" and value is None):
            require(type(value) is int and value >= 1, name, "a whole number of at least 1")
    for name in ("first_step", "last_step"):
        value = getattr(config, name)
        if not (name == "last_step" and value is None):
            require(type(value) is int and value >= 0, name, "a whole number of at least 0")
    require(
        config.last_step is None or config.last_step >= config.first_step,
        "last_step",
        f"at least first_step ({config.first_step})",
    )
    for name in ("tile", "grid"):
        value = getattr(config, name)
        sides = (value,) if isinstance(value, int) else value
        sizes = "(height, width) or (frames, height, width)"
        sizes = sizes if name == "grid" else f"a side, {sizes}"
        ok = value is None or (
            isinstance(sides, tuple)
            and all(type(side) is int and side >= 1 for side in sides)
            and (len(sides) in (2, 3) or (isinstance(value, int) and name == "tile"))
        )
        require(ok, name, f"{sizes}, whole numbers of at least 1", TileError)


def _frozen_overrides(config: ToMAConfig) -> tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]:
    """Overrides as nested tuples, each validated by building the configuration it leads to."""
    given = config.overrides
    items = given.items() if isinstance(given, Mapping) else [(p, dict(v)) for p, v in given]
    frozen = []
    for pattern, values in items:
        for name in values:
            if name not in OVERRIDABLE:
                raise UnknownNameError(
                    f"{name!r} cannot be overridden per path",
                    where=f"overrides[{pattern!r}]",
                    expected=", ".join(OVERRIDABLE),
                    hint=nearest(name, OVERRIDABLE),
                )
        dataclasses.replace(config, overrides=(), **values)
        frozen.append((pattern, tuple(sorted(values.items()))))
    return tuple(frozen)


PRESETS: dict[str, ToMAConfig] = {
    "default": ToMAConfig(),
    # arXiv 2509.10918; the published code's merge_helper defaults to 64 tiles
    "paper-sdxl": ToMAConfig(
        scope="sublayer", share="block", tiles=64, destinations_every=10, weights_every=5
    ),
    # the published code's config.yaml: 256 tiles; one pattern for all blocks
    "paper-flux": ToMAConfig(scope="sublayer", tiles=256, destinations_every=10, weights_every=5),
}
"""Named configurations. `default` is chosen by measurement: see docs/default.md."""

"""CA-ToMe: cached adaptive token merging (Saghatchian et al., arXiv 2501.00946).

ToMeSD with two changes. How many tokens merge follows from the data: those whose similarity to
their destination reaches a threshold. And tokens are matched only at listed steps (checkpoints),
and the pattern is kept in between. A graph of static shapes can't follow the first, so there are
two forms: *dynamic* obeys the threshold in an eager graph, *calibrated* merges a fixed share at
each block, found beforehand, and compiles and exports as any other method.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor

from toma_fx.compat.pytorch import is_fake
from toma_fx.methods.cells import CellConfig
from toma_fx.methods.checks import check_choice, is_number
from toma_fx.methods.setting import Pattern, Place
from toma_fx.methods.tomesd import ToMeSD
from toma_fx.methods.windows import size_text

PUBLISHED_STEPS = 50
"""Steps of a generation that the published checkpoints are made for."""
CHECKPOINTS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "config-1": (0, 1, 2, 3, 5, 10, 15, 25, 35),
        "config-2": (0, 10, 11, 12, 15, 20, 25, 30, 35, 45),
        "config-3": (0, 8, 11, 13, 20, 25, 30, 35, 45, 46, 47, 48, 49),
        "config-4": (0, 9, 13, 14, 15, 28, 29, 32, 36, 45),
        "adaptive": (0, 1, 5, 7, 10, 12, 15, 35, 40, 45, 46, 47, 48, 49, 50, 51),
        "config-5": (0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50),
    }
)
"""Steps of 50 that match anew, in the six published configurations (table II of the paper)."""


@dataclass(frozen=True)
class CAToMe(ToMeSD):
    """CA-ToMe's dynamic form at one grid.

    Selects, merges and unmerges as `ToMeSD`, except that r follows from the data: the number of
    sources whose best similarity is at least `threshold`, the largest number in the batch; every
    batch element merges its r most similar. Cost: that of ToMeSD, and a wait for the device to
    count. Source: arXiv 2501.00946.

    Attributes:
        r: 0, what fake tensors get.
        threshold: cosine similarity; at 1 or more nothing merges.
    """

    r: int = 0
    threshold: float = 0.7

    dynamic: ClassVar[bool] = True

    def describe(self) -> str:
        """The cell and the threshold."""
        return f"{super().describe()}, similarity {self.threshold:g}"

    def count_merged(self, pattern: Pattern) -> int:
        """M of a pattern."""
        return pattern["places"].shape[1]

    def select(self, x: Tensor) -> tuple[Tensor, ...]:
        """`places` [B, M] and `joins` [B, N] int64; M depends on the data."""
        best, match = self.match(x)
        return self.arrange(best, match, self._count_similar(best))

    def _count_similar(self, best: Tensor) -> int:
        """How many sources of each batch element merge."""
        if self.threshold >= 1 or is_fake(best):
            return 0
        return int((best.flatten(1) >= self.threshold).sum(-1).max())


@dataclass(frozen=True, kw_only=True)
class CAToMeConfig(CellConfig):
    """CA-ToMe: cached adaptive token merging (Saghatchian et al., arXiv 2501.00946).

    Selects one token of every sy x sx cell as a destination, at the checkpoints only. Merges
    the tokens that are similar enough to a destination into it, as a mean. Unmerges by copying.
    Cost: as ToMeSD. The dynamic form counts the similar tokens in every call, so that shapes follow
    the data: it runs eagerly. The calibrated form has `ratios` instead and is as static as ToMeSD.

    Attributes:
        threshold: cosine similarity, in [-1, 1], from which a token merges; 1 turns merging off.
        checkpoints: which steps match anew: a name in `CHECKPOINTS`, or None for
            `destinations_every`; `select_at` overrules both.
        steps: steps of a generation, to which the checkpoints are scaled.
        ratios: calibrated form: share of tokens merged away, in [0, 1), by the module path of a
            block's first branch; blocks not listed are left alone. Empty for the dynamic form.

    The other fields are those of `CellConfig` and `MethodConfig`.
    """

    threshold: float = 0.7
    checkpoints: str | None = "config-3"
    steps: int = PUBLISHED_STEPS
    ratios: Mapping[str, float] | tuple[tuple[str, float], ...] = ()

    name: ClassVar[str] = "ca-tome"
    overridable: ClassVar[tuple[str, ...]] = (
        "threshold", "sx", "sy", "max_downsample", "min_tokens"
    )  # fmt: skip
    scheduling: ClassVar[frozenset[str]] = CellConfig.scheduling | {"checkpoints", "steps"}

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", _sorted_pairs(self.ratios))
        super().__post_init__()

    def check(self) -> None:
        """Check every field."""
        super().check()
        similarity = is_number(self.threshold) and -1 <= self.threshold <= 1
        self.require(similarity, "threshold", "a number in [-1, 1], a cosine similarity")
        if self.checkpoints is not None:
            check_choice("checkpoints", self.checkpoints, tuple(CHECKPOINTS))
        self.check_count("steps")
        pairs = isinstance(self.ratios, tuple) and all(_is_ratio(pair) for pair in self.ratios)
        self.require(pairs, "ratios", "{module path: share of tokens merged away, in [0, 1)}")

    @property
    def form(self) -> Literal["dynamic", "calibrated"]:
        """Whether the threshold decides or the calibrated ratios do."""
        return "calibrated" if self.ratios else "dynamic"

    @property
    def is_off(self) -> bool:
        """Whether no similarity reaches the threshold, or every ratio is 0."""
        if self.form == "calibrated":
            return not any(self._ratios().values())
        return self.threshold >= 1

    @property
    def static_form(self) -> str:
        """How to get the calibrated form, if this is the dynamic one."""
        if self.form == "calibrated":
            return ""
        return (
            "toma_fx.calibrate(model, inputs, threshold=...) gives the calibrated form, "
            "which compiles and exports"
        )

    @property
    def refresh_steps(self) -> tuple[int, ...] | None:
        """The checkpoints in steps of this generation; None without checkpoints."""
        if self.checkpoints is None:
            return None
        listed = CHECKPOINTS[self.checkpoints]
        scaled = {round(step * self.steps / PUBLISHED_STEPS) for step in listed}
        return tuple(sorted({0} | {step for step in scaled if step < self.steps}))

    def renewal(self, since: int) -> str:
        """Checkpoints match anew."""
        due = self.refresh_steps
        if self.select_at is not None or due is None:
            return super().renewal(since)
        return "refresh" if since in due else "reuse"

    def setting(self, place: Place) -> ToMeSD | str:
        """The cells of a grid, with the threshold, or with the ratio that was calibrated."""
        if self.form == "dynamic" and self.is_off:
            return f"no similarity reaches a threshold of {self.threshold:g}"
        if why := self.refusal(place):
            return why
        cells = self.cells(place)
        if self.form == "dynamic":
            return CAToMe(place.grid, cells, threshold=float(self.threshold))
        ratios = self._ratios()
        if place.group not in ratios:
            return f"no ratio was calibrated for {place.group!r}"
        ratio = ratios[place.group]
        r = min(round(math.prod(place.grid) * ratio), cells.pictures * cells.sources)
        if r == 0:
            return f"ratio {ratio:g} merges no token of a {size_text(place.grid)} grid"
        return ToMeSD(place.grid, cells, r)

    def _ratios(self) -> dict[str, float]:
        return dict(self.ratios)


def _sorted_pairs(ratios: Any) -> Any:
    """Ratios as sorted pairs; what is no mapping and no list of pairs is left for the check."""
    if isinstance(ratios, Mapping):
        ratios = tuple(ratios.items())
    if not isinstance(ratios, Iterable) or isinstance(ratios, str):
        return ratios
    pairs = [tuple(pair) if isinstance(pair, list) else pair for pair in ratios]
    sortable = all(isinstance(pair, tuple) and pair and isinstance(pair[0], str) for pair in pairs)
    return tuple(sorted(pairs, key=lambda pair: pair[0]) if sortable else pairs)


def _is_ratio(pair: Any) -> bool:
    """Whether a value is (module path, share of tokens)."""
    named = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)
    return named and is_number(pair[1]) and 0 <= pair[1] < 1

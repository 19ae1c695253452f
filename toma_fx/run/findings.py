"""What `explain` finds: values, without how they are shown."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from toma_fx.methods.windows import Size
from toma_fx.plan.plan import Rejection


@dataclass(frozen=True)
class Row:
    """One merged branch.

    Attributes:
        phase: of the generation, from 0.
        site: attention node, or the branch's output node. module: module path. kind: what it is.
        scope: residual adds its segment spans. tokens, merged: image tokens before and after.
        grid: in tokens. window: the method's window, cell or factor. group: pattern group.
        flops_before, flops_after: of its nodes.
    """

    phase: int
    site: str
    module: str
    kind: str
    scope: str
    tokens: int
    merged: int
    grid: Size
    window: str
    group: str
    flops_before: int
    flops_after: int


@dataclass(frozen=True)
class CachedRow:
    """One stretch of blocks that a cached step does not compute.

    Attributes:
        first, last: module paths of its first and last part. value: "update" that is added to what
            enters the stretch, or "value" that is kept itself. shape: of that. order: of the
            extrapolation. bytes: of all tensors that are kept for it.
    """

    first: str
    last: str
    value: str
    shape: tuple[int, ...]
    order: int
    bytes: int


@dataclass(frozen=True, repr=False)
class Findings:
    """What was found.

    Attributes:
        rows: merged branches. rejections: attention and branches left alone, with reasons.
        flops_before, flops_after: of the whole model, merging included, in the step after the
            first: one that reuses the pattern, unless the method selects at every step; of several
            phases the mean over the steps that compute.
        flops_refresh: of a step that selects destinations anew (comparisons not counted).
        cached: what a cached step does not compute. flops_cached: of a cached step, or their mean;
            None without a cache. steps: of a generation that is looked at. computed: of these,
            those that compute. phases: the first step of each, of these.
        uncounted: operators that multiply matrices but whose FLOPs aren't known.
        processes: that share the tokens. All of the above but `flops_before` is of one of them.
        exchanges: in the step after the first, of which each sends what one process has to all.
        sent_bytes: by one process to each other one in that step.
    """

    rows: tuple[Row, ...]
    rejections: tuple[Rejection, ...]
    flops_before: int
    flops_after: int
    flops_refresh: int
    cached: tuple[CachedRow, ...] = ()
    flops_cached: int | None = None
    steps: int = 0
    computed: int = 0
    phases: tuple[int, ...] = (0,)
    uncounted: tuple[str, ...] = ()
    processes: int = 1
    exchanges: int = 0
    sent_bytes: int = 0

    @property
    def ideal_speedup(self) -> float:
        """FLOPs of the model over FLOPs of the step after the first that merges, or, where steps
        are cached, over the mean of all steps."""
        if self.flops_cached is None:
            return self.flops_before / self.flops_after
        left = self.steps - self.computed
        spent = self.computed * self.flops_after + left * self.flops_cached
        return self.steps * self.flops_before / spent

    @property
    def kept_bytes(self) -> int:
        """Memory of the kept updates of one pass."""
        return sum(row.bytes for row in self.cached)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps({**asdict(self), "ideal_speedup": self.ideal_speedup}, indent=2)

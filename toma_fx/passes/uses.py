"""Kinds of programs, one row each.

A program is one rewrite of a captured graph. Besides the model's own inputs and outputs it takes
and gives *kept tensors*, which live from step to step; patterns are one sort of them. A schedule
names the kind that is due at a step. A program whose kept tensors are not there yet (the first
step, a changed model) gives way to the kind that it names as `instead`.

To add a kind: a row here (or in `MethodConfig.uses`), a pass if none makes its graph, and a
schedule that names it. Whatever runs, exports, batches and reports programs reads the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from toma_fx.errors import ConfigError
from toma_fx.graph.passes import EraseDead, Pass
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.setting import Setting
from toma_fx.passes.job import Job
from toma_fx.passes.merge_segments import MergeSegments
from toma_fx.passes.provide_patterns import MASKS, ProvidePatterns
from toma_fx.plan.plan import MergePlan

Names = Callable[[MergePlan], tuple[str, ...]]
"""Names of kept tensors, in order, of a plan."""
PASSES: tuple[Callable[[Job], Pass], ...] = (
    ProvidePatterns.of,
    MergeSegments.of,
    lambda job: EraseDead(),
)
"""What makes a program that merges, in this order: each pass for a job."""


def _no_tensor(plan: MergePlan) -> tuple[str, ...]:
    return ()


def parts(select: Callable[[Setting], Collection[str]]) -> Names:
    """The tensors of every group of a plan for the parts that `select` gives of its setting."""
    return lambda plan: tuple(g.tensor(part) for g in plan.groups for part in select(g.setting))


_every_part = parts(lambda setting: setting.parts)


@dataclass(frozen=True)
class Use:
    """One kind of program.

    Attributes:
        name: as schedules, artifacts and reports call it.
        takes, gives: the kept tensors that are inputs and outputs, by the plan. A tensor that is
            both is chosen by row: the program serves requests of different kinds in one batch.
        instead: the kind that runs while a tensor that it takes is not kept.
        passes: what makes the program of a captured graph; none leave it as it is.
        serves: kinds that requests of one batch may be due while this one runs.
    """

    name: str
    takes: Names = _no_tensor
    gives: Names = _no_tensor
    instead: str = "refresh"
    passes: tuple[Callable[[Job], Pass], ...] = PASSES
    serves: tuple[str, ...] = ()

    def masks(self, plan: MergePlan) -> tuple[str, ...]:
        """Names of the masks that are inputs before the kept tensors."""
        return tuple(MASKS) if set(self.takes(plan)) & set(self.gives(plan)) else ()


REFRESH = Use("refresh", gives=_every_part)
"""Selects destinations and weighs; the first step that merges, and every n-th after it."""
REWEIGH = Use(
    "reweigh",
    takes=parts(lambda setting: setting.chosen),
    gives=parts(lambda setting: setting.weighed),
)
"""Weighs for kept destinations."""
REUSE = Use("reuse", takes=_every_part)
"""Merges with kept patterns."""
PLAIN = Use("plain", passes=())
"""Merges nothing: steps before `first_step` and after `last_step`."""
MIXED = Use(
    "mixed",
    takes=_every_part,
    gives=_every_part,
    serves=(REFRESH.name, REWEIGH.name, REUSE.name),
)
"""Serves a batch of requests that are due different kinds, each its own rows."""
USES = (REFRESH, REWEIGH, REUSE, PLAIN, MIXED)
"""In the order in which programs are built, checked and reported."""


def uses_of(config: MethodConfig) -> Mapping[str, Use]:
    """Every kind of program that a configuration's schedule may name, by name.

    Raises:
        ConfigError: a kind of the method's own has the name of another.
    """
    rows = (*USES, *config.uses)
    by_name = {use.name: use for use in rows}
    if len(by_name) < len(rows):
        raise ConfigError(
            "two kinds of programs have one name",
            where=f"{type(config).__name__}.uses",
            expected="names other than " + ", ".join(use.name for use in USES),
            got=", ".join(use.name for use in config.uses),
        )
    return by_name

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
from dataclasses import dataclass, replace

from toma_fx.errors import ConfigError
from toma_fx.graph.passes import EraseDead, Pass
from toma_fx.methods import kinds
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.kinds import kind_in, merges, role_of
from toma_fx.methods.setting import Setting
from toma_fx.passes.cache_updates import USED_ROWS, KeepUpdates, UseUpdates
from toma_fx.passes.give_signals import GiveSignals
from toma_fx.passes.job import Job
from toma_fx.passes.merge_segments import MergeSegments
from toma_fx.passes.provide_patterns import PATTERN_MASKS, ProvidePatterns
from toma_fx.passes.share_text import ShareText
from toma_fx.plan.plan import MergePlan

Names = Callable[[MergePlan], tuple[str, ...]]
"""Names of kept tensors, in order, of a plan."""
MakePass = Callable[[Job], Pass | None]
"""A pass for a job; None where there is nothing to do."""


def _erase_dead(job: Job) -> Pass:
    return EraseDead()


PASSES: tuple[MakePass, ...] = (
    ShareText.of,
    ProvidePatterns.of,
    MergeSegments.of,
    GiveSignals.of,
    KeepUpdates.of,
    _erase_dead,
)
"""What makes a program that merges, in this order: each pass for a job."""


def _no_tensor(plan: MergePlan) -> tuple[str, ...]:
    return ()


def parts(select: Callable[[Setting], Collection[str]]) -> Names:
    """The tensors of every group of a plan for the parts that `select` gives of its setting."""
    return lambda plan: tuple(g.tensor(part) for g in plan.groups for part in select(g.setting))


_every_part = parts(lambda setting: setting.parts)


def keeping(names: Names = _no_tensor) -> Names:
    """Those names and what every step which computes gives: signals and updates."""
    return lambda plan: (*names(plan), *plan.signals, *plan.new_updates)


def _recalled(plan: MergePlan) -> tuple[str, ...]:
    """Signals, and the parts of the former pattern that a selection on them sees."""
    groups = (g for g in plan.groups if g.output)
    return tuple(n for g in groups for n in (g.signal, *map(g.tensor, g.setting.recalled)))


def using(names: Names = _no_tensor) -> Names:
    """Those names and all updates that are kept."""
    return lambda plan: (*names(plan), *plan.all_updates)


@dataclass(frozen=True)
class Use:
    """One kind of program.

    Attributes:
        name: as schedules, artifacts and reports call it.
        takes, gives: the kept tensors that are inputs and outputs, by the plan. Where the kind
            `serves` others, a tensor that is both is chosen by row.
        instead: the kind that runs while a tensor that it takes is not kept.
        passes: what makes the program of a captured graph; none leave it as it is.
        serves: kinds that requests of one batch may be due while this one runs.
        phase: of the configuration, whose plan holds for it.
        cached: whether it uses kept updates for all rows, and merges only what it still computes.
    """

    name: str
    takes: Names = _no_tensor
    gives: Names = _no_tensor
    instead: str = kinds.REFRESH
    passes: tuple[MakePass, ...] = PASSES
    serves: tuple[str, ...] = ()
    cached: bool = False
    phase: int = 0

    def in_phase(self, phase: int) -> Use:
        """The kind that does the same in another phase."""
        return replace(
            self,
            name=kind_in(self.name, phase),
            instead=kind_in(self.instead, phase),
            serves=tuple(kind_in(kind, phase) for kind in self.serves),
            phase=phase,
        )

    def inputs(self, plan: MergePlan) -> tuple[str, ...]:
        """Names of the inputs behind the model's own: patterns, then updates, masks before each."""
        taken, given, kept = self.takes(plan), set(self.gives(plan)), set(plan.all_updates)
        patterns = [name for name in taken if name not in kept]
        updates = [name for name in taken if name in kept]
        by_row = list(PATTERN_MASKS) if self.serves and not given.isdisjoint(patterns) else []
        used = [] if given.isdisjoint(updates) else [USED_ROWS]
        return (*by_row, *patterns, *used, *updates)


REFRESH = Use(kinds.REFRESH, gives=keeping(_every_part))
"""Selects destinations and weighs; the first step that merges, and every n-th after it."""
MATCH = Use(kinds.MATCH, takes=_recalled, gives=keeping(_every_part))
"""Selects destinations and weighs on what segments gave in the step before."""
REWEIGH = Use(
    kinds.REWEIGH,
    takes=parts(lambda setting: setting.chosen),
    gives=keeping(parts(lambda setting: setting.weighed)),
)
"""Weighs for kept destinations."""
REUSE = Use(kinds.REUSE, takes=_every_part, gives=keeping())
"""Merges with kept patterns."""
PLAIN = Use(kinds.PLAIN, gives=keeping(), passes=(GiveSignals.of, KeepUpdates.of))
"""Merges nothing: steps before `first_step` and after `last_step`."""
CACHED = Use(
    kinds.CACHED,
    takes=using(lambda plan: _every_part(plan.computed)),
    instead=REUSE.name,
    passes=(ShareText.of, ProvidePatterns.of, UseUpdates.of, MergeSegments.of, _erase_dead),
    cached=True,
)
"""Uses kept updates instead of computing them; what is left merges with kept patterns."""
CACHED_PLAIN = Use(
    kinds.CACHED_PLAIN,
    takes=using(),
    instead=PLAIN.name,
    passes=(UseUpdates.of, _erase_dead),
    cached=True,
)
"""Uses kept updates, and merges nothing in what is left."""
MIXED = Use(
    kinds.MIXED,
    takes=using(_every_part),
    gives=keeping(_every_part),
    serves=(REFRESH.name, REWEIGH.name, REUSE.name, CACHED.name),
)
"""Serves a batch of requests that are due different kinds, each its own rows."""
MIXED_PLAIN = Use(
    kinds.MIXED_PLAIN,
    takes=using(),
    gives=keeping(),
    passes=(GiveSignals.of, KeepUpdates.of, _erase_dead),
    serves=(PLAIN.name, CACHED_PLAIN.name),
)
"""The same, where nothing merges."""
USES = (REFRESH, MATCH, REWEIGH, REUSE, PLAIN, CACHED, CACHED_PLAIN, MIXED, MIXED_PLAIN)
"""In the order in which programs are built, checked and reported."""
MASKS = {**PATTERN_MASKS, USED_ROWS: (kinds.CACHED, kinds.CACHED_PLAIN)}
"""Inputs of a program that chooses by row: what the rows that they hold true for are due, whatever
their phase."""


def uses_of(config: MethodConfig) -> Mapping[str, Use]:
    """Every kind of program that a configuration's schedule may name, by name.

    Raises:
        ConfigError: a kind of the method's own has the name of another.
    """
    own = [_also_keeping(use) if KeepUpdates.of in use.passes else use for use in config.uses]
    for use in own:
        if role_of(use.name) != use.name:
            raise ConfigError(
                "the name of a kind of program looks like that of a later phase",
                where=f"{type(config).__name__}.uses",
                expected="a name that does not end in _ and digits",
                got=use.name,
            )
    rows = [*USES, *own]
    for phase in range(1, len(config.stages)):
        rows += [use.in_phase(phase) for use in (*USES, *own) if merges(use.name)]
    by_name = {use.name: use for use in rows}
    if len(by_name) < len(rows):
        raise ConfigError(
            "two kinds of programs have one name",
            where=f"{type(config).__name__}.uses",
            expected="names other than " + ", ".join(use.name for use in USES),
            got=", ".join(use.name for use in config.uses),
        )
    return by_name


def _also_keeping(use: Use) -> Use:
    """A kind of a method's own, which gives updates as every step does that computes."""
    return replace(use, gives=keeping(use.gives))

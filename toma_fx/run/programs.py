"""Specializations: everything made for one call signature of one state of the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn

from toma_fx.analysis.dataflow import Flow
from toma_fx.analysis.facts import Analysis
from toma_fx.analysis.propagate import analyze
from toma_fx.analysis.roles import Roles, find_roles
from toma_fx.capture.fingerprint import digest_weights
from toma_fx.capture.model import Captured, capture, check_model
from toma_fx.capture.parity import Expected
from toma_fx.capture.quantized import Parts
from toma_fx.capture.replaced import with_origin
from toma_fx.compat.compilers import compile_lock
from toma_fx.compat.pytorch import tree_leaves
from toma_fx.errors import CaptureError, UnknownNameError, nearest
from toma_fx.graph.flops import graph_flops
from toma_fx.graph.templates import Templates
from toma_fx.graph.verify import output_values, verify
from toma_fx.methods.base import MethodConfig
from toma_fx.methods.kinds import CACHED, CACHED_PLAIN
from toma_fx.methods.sharded import Rank
from toma_fx.passes.pipeline import Program, rewrite
from toma_fx.passes.uses import Use, uses_of
from toma_fx.plan.plan import MergePlan
from toma_fx.plan.planner import make_plan
from toma_fx.plan.sharding import shard_plan
from toma_fx.run.compiled import CompiledProgram
from toma_fx.run.ranks import Ranks, hash_of, hash_of_inputs
from toma_fx.run.schedule import Schedule
from toma_fx.run.tracing import tracing

Runner = Callable[..., Sequence[Any]]
"""A program to call: (inputs, masks, kept tensors) -> (outputs, kept tensors), flat."""


def run_eagerly(specialization: Specialization, kind: str) -> Runner:
    """The program of a kind as it is."""
    return specialization.program(kind).graph_module.forward


@dataclass
class Specialization:
    """Everything made for one call signature; programs are rewritten when first used.

    Attributes:
        captured, analysis, flow, plan: from the stages of that name.
        make_runner: makes a program of this callable.
        programs: rewritten so far. runners: what is called for each, compiled or not.
        counts: steps run per kind. parts: what the graph holds of quantized weights.
        names: of what each kind takes and gives.
        derived: whether its graph was captured for another configuration.
        ranks: the processes that share its tokens. digest: of graph and plan, the same in all.
    """

    captured: Captured
    analysis: Analysis
    flow: Flow
    plan: MergePlan
    make_runner: Callable[[Specialization, str], Runner] = run_eagerly
    templates: Templates = field(default_factory=dict)
    programs: dict[str, Program] = field(default_factory=dict)
    runners: dict[str, Runner] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    parts: Parts = field(default_factory=Parts)
    names: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    ranks: Ranks | None = None
    digest: str = ""
    derived: bool = False

    @classmethod
    def make(
        cls,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        config: MethodConfig,
        make_runner: Callable[[Specialization, str], Runner] = run_eagerly,
        ranks: Ranks | Rank | None = None,
    ) -> Specialization:
        """Capture, check, analyze and plan one call.

        Args:
            ranks: processes that share its tokens; a `Rank` for graphs that are looked at, not run.

        Raises:
            CaptureError: the model can't be captured. ParityError: it was captured wrong.
            NoMergeSites, TileError: see `make_plan`. ParallelError: see `shard_plan`.
        """
        check_model(model)
        try:
            expected = Expected.compute(model, args, kwargs)
            captured = capture(model, args, kwargs)
            if expected is not None:
                expected.check(captured)
        except CaptureError as error:
            raise with_origin(error, model) from error.__cause__
        specialization = cls.of(captured, config, make_runner, ranks)
        specialization.parts = Parts(captured.graph_module, model)
        return specialization

    @classmethod
    def of(
        cls,
        captured: Captured,
        config: MethodConfig,
        make_runner: Callable[[Specialization, str], Runner] = run_eagerly,
        ranks: Ranks | Rank | None = None,
    ) -> Specialization:
        """Analyze and plan a captured graph."""
        outputs = output_values(captured.graph_module.graph)
        verify(captured.graph_module, [i.name for i in captured.inputs], outputs, "capture")
        analysis, flow = analyze(captured, config.grid)
        place = find_roles(captured).timestep
        clock = None if place is None else captured.inputs[place]
        timestep = "" if clock is None or clock.tensor is None else clock.name
        plan, digest = make_plan(analysis, flow, config, timestep), ""
        if ranks is not None:
            numbers = [_numbers_of(node) for node in captured.graph_module.graph.nodes]
            graph = [(name, flow.ops[name], flow.shapes.get(name)) for name in flow.order]
            digest = hash_of([graph, numbers, plan.to_dict()])
            rank = ranks.rank if isinstance(ranks, Ranks) else ranks
            plan = shard_plan(plan, analysis, flow, rank)
        live = ranks if isinstance(ranks, Ranks) else None
        return cls(captured, analysis, flow, plan, make_runner, ranks=live, digest=digest)

    def agree(self, leaves: Sequence[Any], model: nn.Module) -> Specialization:
        """Itself, if all processes that share its tokens have the same, for the same first call.

        Args:
            leaves: inputs of the call. model: what was captured, whose weights are read once.

        Raises:
            RankMismatchError, RankLostError: see `Ranks.agree`.
        """
        if self.ranks is not None:
            hashes = {
                "graph and plan": self.digest,
                "configuration": hash_of(self.plan.config.to_dict()),
                "weights": digest_weights(model),
                "inputs": hash_of_inputs(leaves),
            }
            self.ranks.agree_on("captures", hashes)
        return self

    def under(self, config: MethodConfig) -> Specialization:
        """The same programs under a configuration that plans alike, on another schedule."""
        plan = replace(self.plan, config=config)
        return replace(self, plan=plan, counts={}, derived=True)

    def replan(
        self,
        config: MethodConfig,
        make_runner: Callable[[Specialization, str], Runner],
        ranks: Ranks | None,
    ) -> Specialization:
        """The same graph under another configuration.

        Raises:
            NoMergeSites, TileError, ParallelError: as `make`.
        """
        planned = self.of(self.captured, config, make_runner, ranks)
        return replace(planned, parts=self.parts, derived=True)

    @cached_property
    def flops(self) -> int:
        """FLOPs of one step of the model as it was captured."""
        return graph_flops(self.captured.graph_module.graph)

    @property
    def dynamic(self) -> bool:
        """Whether the number of merged tokens depends on the data."""
        return any(g.setting.dynamic for g in self.plan.all_groups)

    @property
    def settings(self) -> Hashable:
        """What kept tensors must agree on to fit: groups and their settings, updates."""
        groups = tuple((g.name, g.setting) for g in self.plan.all_groups)
        updates = self.plan.cache.updates if self.plan.cache else ()
        return (*groups, *((u.tensors, u.shape[1:]) for u in updates))

    @property
    def batch_sizes(self) -> frozenset[int]:
        """Rows of the batch, as the kept tensors see them."""
        updates = self.plan.cache.updates if self.plan.cache else ()
        return frozenset((*(g.batch for g in self.plan.all_groups), *(u.shape[0] for u in updates)))

    @cached_property
    def uses(self) -> Mapping[str, Use]:
        """Kinds of programs, by name."""
        return uses_of(self.plan.config)

    @cached_property
    def schedule(self) -> Schedule:
        """Which kind is due when."""
        return Schedule.of(self.plan.config).replacing(self.same_program)

    def same_program(self, kind: str) -> str:
        """The kind whose program does the same: where nothing merges, phases don't differ."""
        use = self.use(kind)
        if use.phase == 0 or not use.cached or self.plan.phases[use.phase].computed.segments:
            return kind
        return CACHED if self.plan.segments and not self.plan.computed.segments else CACHED_PLAIN

    @cached_property
    def older(self) -> Mapping[str, str]:
        """By kept tensor, where its value goes when it is given anew."""
        return self.plan.older

    @cached_property
    def watched(self) -> str:
        """The kept tensor whose change decides whether a step computes; "" if none does."""
        caching, cache = self.plan.config.caching, self.plan.cache
        if cache is None or caching is None or caching.threshold is None:
            return ""
        return cache.updates[0].tensors[0]

    @cached_property
    def roles(self) -> Roles:
        """What the inputs mean."""
        return find_roles(self.captured)

    def takes(self, kind: str) -> tuple[str, ...]:
        """Names of the masks and kept tensors that follow the model's own inputs."""
        return self._names(kind)[0]

    def gives(self, kind: str) -> tuple[str, ...]:
        """Names of the kept tensors that follow the model's own outputs."""
        return self._names(kind)[1]

    def _names(self, kind: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What a kind takes and gives, worked out once: every step asks."""
        if kind not in self.names:
            use = self.use(kind)
            plan = self.plan.phases[use.phase]
            self.names[kind] = use.inputs(plan), tuple(use.gives(plan))
        return self.names[kind]

    def instead(self, kind: str) -> str:
        """The kind that runs while something that `kind` takes is not kept."""
        return self.use(kind).instead

    def use(self, kind: str) -> Use:
        """The row of a kind.

        Raises:
            UnknownNameError: the schedule names a kind that there is not.
        """
        if kind not in self.uses:
            raise UnknownNameError(
                f"unknown kind of program {kind!r}",
                where=f"schedule of method {self.plan.config.name!r}",
                hint=nearest(kind, self.uses),
            )
        return self.uses[kind]

    def mixed(self, kinds: Collection[str]) -> str | None:
        """The kind that serves a batch of requests that are due these kinds, if there is one.

        Raises:
            DynamicError: it would need static shapes.
        """
        serving = next((u for u in self.uses.values() if set(kinds) <= set(u.serves)), None)
        if serving is None:
            return None
        self.plan.config.check_static("step(inputs, states) with states at different steps")
        return serving.name

    def program(self, kind: str) -> Program:
        """The program of a kind."""
        if kind not in self.programs:
            with tracing():
                if kind not in self.programs:
                    self.programs[kind] = rewrite(
                        self.captured,
                        self.analysis,
                        self.flow,
                        self.plan,
                        self.use(kind),
                        self.templates,
                    )
        return self.programs[kind]

    def runner(self, kind: str) -> Runner:
        """The callable of a kind; asked for before each step, on which processes agree here."""
        if self.ranks is not None:
            self.ranks.agree_step(f"runs {kind} of graph and plan {self.digest[:10]}")
        if kind not in self.runners:
            with compile_lock():
                if kind not in self.runners:
                    self.runners[kind] = self.make_runner(self, kind)
        return self.runners[kind]

    def count(self, kind: str) -> None:
        """Count a step."""
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def _graph_modules(self) -> Iterator[fx.GraphModule]:
        yield self.captured.graph_module
        own = self.captured.graph_module
        yield from (p.graph_module for p in self.programs.values() if p.graph_module is not own)

    def fits(self, model: nn.Module) -> bool:
        """Whether every parameter of the graph is the model's, or a part of one."""
        known = set(map(id, model.parameters()))
        known |= self.parts.of(known)
        return all(id(p) in known for p in self.captured.graph_module.parameters())

    def rebind(self, buffers: Mapping[str, Tensor]) -> None:
        """Take over the model's buffers, which a move between devices makes anew."""
        for graph_module in self._graph_modules():
            for name, old in list(graph_module.named_buffers()):
                new = buffers.get(name)
                if new is None or new is old:
                    continue
                if (new.shape, new.dtype, new.device) == (old.shape, old.dtype, old.device):
                    path, _, leaf = name.rpartition(".")
                    setattr(graph_module.get_submodule(path), leaf, new)
        for runner in self.runners.values():
            if isinstance(runner, CompiledProgram):
                runner.rebind()


def _numbers_of(node: fx.Node) -> list[Any]:
    """Numbers among the arguments of a node: sizes, and scales of adapters."""
    return [x for x in tree_leaves((node.args, node.kwargs)) if isinstance(x, (int, float))]

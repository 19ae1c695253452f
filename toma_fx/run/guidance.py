"""Guidance in two processes: each has the whole denoiser and computes one side of every step.

    one call of both sides (SDXL):   rows | rows      -> its half -> gathered
    one call for each side (Flux):   "cond", "uncond" -> its own  -> sent to the other

Each keeps the patterns and updates of its side alone. Both get what one process would.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from toma_fx.capture.fingerprint import digest_weights
from toma_fx.compat.collectives import broadcast, finish
from toma_fx.compat.compilers import disable_dynamo
from toma_fx.compat.pytorch import tree_flatten, tree_unflatten
from toma_fx.errors import ParallelError
from toma_fx.run.ranks import Ranks, hash_of
from toma_fx.run.rows import Splitter, join
from toma_fx.run.switches import Switches

SIDES = 2
_log = logging.getLogger("toma_fx.run")
Run = Callable[..., Any]


class GuidanceRanks:
    """This process as one of the two that compute a side of guidance each.

    Args:
        group: a process group of two, a DeviceMesh of one dimension, or the `Ranks` of one.
        first: name of the argument whose first dimension is the rows of a call.

    Raises:
        ParallelError: there are not two processes.
    """

    def __init__(self, group: Any, first: str) -> None:
        self.ranks = group if isinstance(group, Ranks) else Ranks(group)
        if self.ranks.rank.count != SIDES:
            raise ParallelError(
                "guidance has two sides",
                where="enable_guidance_parallel",
                expected=f"{SIDES} processes",
                got=str(self.ranks.rank.count),
                hint="share the tokens among more: toma_fx.optimize(model, parallel=mesh)",
            )
        self._splitter = Splitter(first)
        self._sides: list[str] = []
        self._shapes: dict[Hashable, Any] = {}
        self._pending: list[Tensor] = []
        self._warned = False

    @disable_dynamo
    def call(self, run: Run, context: str, args: Sequence[Any], call: Mapping[str, Any]) -> Any:
        """A call, of which each process computes a part.

        Args:
            run: computes one. context: the name that `cache_context` set.
            args: arguments that have no name. call: all others, by name.

        Raises:
            RankMismatchError: the other process makes another call. RankLostError: it is gone.
            ParallelError: arguments without names.
        """
        if args:
            raise ParallelError(
                "a call of this model can't be split",
                where="forward",
                expected="arguments that have names",
                got=f"{len(args)} of *args",
                hint="disable_guidance_parallel() computes all here",
            )
        try:
            return self._side(run, context, call) if context else self._half(run, call)
        except RuntimeError as error:
            lost = self.ranks.loss_of(error)
            if lost is None:
                raise
            raise lost from error

    def _half(self, run: Run, call: Mapping[str, Any]) -> Any:
        """Both sides are in the batch: its half of the rows."""
        rows = self._splitter.split(call)
        if rows.count % SIDES:
            if not self._warned:
                _log.warning("%d rows can't be halved: both processes compute all", rows.count)
                self._warned = True
            return run(**call)
        self.ranks.agree_step(f"a call of {rows.count} rows")
        half = rows.count // SIDES
        begin = half * self.ranks.rank.index
        leaves, structure = tree_flatten(run(**join([rows.part(begin, begin + half)])))
        return tree_unflatten([self._gather(x, half) for x in leaves], structure)

    def _gather(self, leaf: Any, half: int) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or len(leaf) != half:
            return leaf
        parts = [torch.empty_like(leaf.contiguous()) for _ in range(SIDES)]
        distributed.all_gather(parts, leaf.contiguous(), group=self.ranks.group)
        return torch.cat(parts)

    def _side(self, run: Run, context: str, call: Mapping[str, Any]) -> Any:
        """The sides are calls of their own: it computes one, and gets the other when it is ready.

        The first call of each side is computed by both, who learn what it gives.
        """
        if context not in self._sides:
            self._sides.append(context)
        place = self._sides.index(context)
        if place == 0:  # at a later side, one would wait here for what the other computes now
            self.ranks.agree_step(f"a step of {len(self._sides)} sides")
        key = (context, self._splitter.split(call).key)
        owner = place % SIDES
        if key not in self._shapes:
            outputs = run(**call)
            leaves, structure = tree_flatten(outputs)
            like = [torch.empty_like(x, device="meta") if _is_sent(x) else x for x in leaves]
            self._shapes[key] = like, structure
            return outputs
        if self.ranks.rank.index == owner:
            leaves, structure = tree_flatten(run(**call))
        else:
            like, structure = self._shapes[key]
            device = next(x.device for x in call.values() if isinstance(x, Tensor))
            leaves = [torch.empty_like(x, device=device) if _is_sent(x) else x for x in like]
        source = distributed.get_global_rank(self.ranks.group, owner)
        sent = [broadcast(x, source, self.ranks.group) if _is_sent(x) else x for x in leaves]
        self._pending += [x for x in sent if isinstance(x, Tensor)]
        if place == len(self._sides) - 1:  # all sides are known now: say here if one is lost
            for tensor in self._pending:
                finish(tensor)
            self._pending.clear()
        return tree_unflatten(sent, structure)


def _is_sent(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


class SplitsGuidance(Switches):
    """Guidance in two processes; for subclasses that are called as a denoiser."""

    _guidance: GuidanceRanks | None

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the arguments of a call, in order."""
        raise NotImplementedError

    def enable_guidance_parallel(self, group: Any) -> None:
        """Compute one side of guidance here, and the other in another process.

        Both processes have the whole model and run the same pipeline with the same inputs; what
        each call returns is the same in both, and what one process alone would get. A call of both
        sides (SDXL) is halved by rows; calls of one side each (Flux, Qwen-Image, Wan) are told
        apart by `cache_context`. `step(inputs, state)` computes all.

        Both processes call this, and compare weights and settings here. A copy of the model goes
        on with the same two processes; pickled it can't be (`ParallelError`).

        Args:
            group: a process group of two, or a DeviceMesh of one dimension (docs/parallel.md).

        Raises:
            ParallelError: there are not two processes. Later calls raise RankMismatchError where
                these differ, RankLostError where one does not answer.
        """
        guidance = GuidanceRanks(group, self.parameter_names[0])
        hashes = {
            "configuration": hash_of(self.config_toma.to_dict()),
            "weights": digest_weights(self.denoiser),
        }
        guidance.ranks.agree_on(f"guidance of {type(self.denoiser).__name__}", hashes)
        self.__dict__["_guidance"] = guidance

    def disable_guidance_parallel(self) -> None:
        """Compute all sides here again."""
        self.__dict__["_guidance"] = None

    @property
    def is_guidance_parallel_enabled(self) -> bool:
        """Whether another process computes one side of guidance."""
        return self._guidance is not None

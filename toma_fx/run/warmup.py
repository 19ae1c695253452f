"""Warm-up: graphs made and programs compiled before the first request."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from toma_fx.errors import ConfigError
from toma_fx.events import emit
from toma_fx.models.named import example_inputs
from toma_fx.passes.pipeline import Program
from toma_fx.run.program_set import run_program
from toma_fx.run.programs import Specialization
from toma_fx.run.ranks import watched
from toma_fx.run.schedule import kinds_that_run
from toma_fx.run.specializations import SpecializationCache

_log = logging.getLogger("toma_fx.run")


class WarmsUp:
    """Made ready ahead of traffic; for subclasses with specializations."""

    denoiser: nn.Module
    cache: SpecializationCache

    def specialized(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """What is made for a call, and the call in canonical form."""
        raise NotImplementedError

    def warmup(
        self,
        sizes: Sequence[tuple[int, int]] = (),
        *,
        batch: int | Sequence[int] = 1,
        text: int | None = None,
        calls: Sequence[Mapping[str, Any]] = (),
        mixed: bool = False,
    ) -> None:
        """Capture the graphs of these calls, compile every program of a generation, run each once.

        After it, a request of one of these signatures waits for nothing. Inductor finds what it
        compiled for the same model, recipe and machine in its caches, in another process too: there
        a warm-up takes the time of the captures.

        Args:
            sizes: (height, width) of pictures in pixels, for UNets of Stable Diffusion and Flux.
            batch: rows of a call, guidance included; several are tried with every size.
            text: text tokens (default 77, Flux 512).
            calls: keyword arguments of further calls, for any model.
            mixed: with the programs for batches of requests at different steps.

        Raises:
            ConfigError: more calls than graphs are kept (`max_signatures`), or none; no sizes.
            ModelTypeError: `sizes` for another model; give `calls`.
            CaptureError, NoMergeSites, TileError: as the first call of a signature.
        """
        named = self._named_calls(sizes, batch, text, calls)
        for i, (name, call) in enumerate(named, start=1):
            start = time.perf_counter()
            with self.cache.expecting():
                kinds = warm(*self.specialized((), call), mixed=mixed)
            seconds, ran = time.perf_counter() - start, ", ".join(kinds)
            emit(
                _log,
                logging.INFO,
                "warmup",
                "warm-up %d of %d: %s in %.1f s (%s)",
                i,
                len(named),
                name,
                seconds,
                ran,
                seconds=seconds,
                call=name,
                kinds=tuple(kinds),
            )

    def _named_calls(
        self,
        sizes: Sequence[tuple[int, int]],
        batch: int | Sequence[int],
        text: int | None,
        calls: Sequence[Mapping[str, Any]],
    ) -> list[tuple[str, dict[str, Any]]]:
        """The calls of a warm-up, and what they are called in the log."""
        if not all(isinstance(size, Sequence) and len(size) == 2 for size in sizes):
            raise ConfigError(
                "sizes= is no list of sizes",
                where="warmup",
                expected="[(height, width), ...] in pixels",
                got=repr(sizes)[:80],
                hint="warmup([(512, 512)])",
            )
        rows = [batch] if isinstance(batch, int) else list(batch)
        named = [
            (f"{height}x{width}, batch {count}",
             example_inputs(self.denoiser, height, width, count, text=text))
            for height, width in sizes
            for count in rows
        ]  # fmt: skip
        named += [(f"call {i}", dict(call)) for i, call in enumerate(calls)]
        if not 0 < len(named) <= self.cache.capacity:
            raise ConfigError(
                "a warm-up for too many signatures" if named else "a warm-up for nothing",
                where="warmup",
                expected=f"1 to {self.cache.capacity} calls, as many as graphs are kept",
                got=str(len(named)),
                hint="toma_fx.optimize(..., max_signatures=...)"
                if named
                else "warmup([(512, 512)])",
            )
        return named


def warm(specialization: Specialization, arguments: Any, *, mixed: bool) -> Sequence[str]:
    """Run every kind of program of a generation once; returns their names."""
    kinds = kinds_that_run(specialization, specialization.schedule)
    if mixed:
        several = (u for u in specialization.uses.values() if len(kinds.intersection(u.serves)) > 1)
        kinds = kinds | {use.name for use in several}
    for kind in sorted(kinds):
        program = specialization.program(kind)
        inputs = [*arguments.leaves, *_blank(program)]
        kernel = watched(arguments.guard.companions.kernel, specialization.ranks)
        run_program(specialization.runner(kind), inputs, kernel)
    return sorted(kinds)


def _blank(program: Program) -> Iterator[torch.Tensor]:
    """Masks and kept tensors of nothing but zeros: of indices, they are valid ones."""
    nodes = program.graph_module.graph.find_nodes(op="placeholder")
    for node in nodes[len(nodes) - len(program.takes) :]:
        like = node.meta["val"]
        blank = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        yield blank.zero_()

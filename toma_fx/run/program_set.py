"""What a step needs of its programs, and running one of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from toma_fx.analysis.roles import Roles
from toma_fx.capture.grids import Raster
from toma_fx.run.schedule import Schedule
from toma_fx.run.tracing import beside_tracing


class ProgramSet(Protocol):
    """The programs of one signature, by kind."""

    @property
    def schedule(self) -> Schedule:
        """Which kind is due when."""

    @property
    def roles(self) -> Roles:
        """What the inputs mean."""

    @property
    def settings(self) -> Hashable:
        """What kept tensors must agree on to fit."""

    @property
    def batch_sizes(self) -> frozenset[int]:
        """Rows of the batch, as the kept tensors see them."""

    def takes(self, kind: str) -> tuple[str, ...]:
        """Names of the masks and kept tensors that follow the model's own inputs."""

    def gives(self, kind: str) -> tuple[str, ...]:
        """Names of the kept tensors that follow the model's own outputs."""

    def instead(self, kind: str) -> str:
        """The kind that runs while something that `kind` takes is not kept."""

    @property
    def older(self) -> Mapping[str, str]:
        """By kept tensor, where its value goes when it is given anew."""

    @property
    def watched(self) -> str:
        """The kept tensor whose change decides whether a step computes; "" if none does."""

    def mixed(self, kinds: Collection[str]) -> str | None:
        """The kind that serves a batch of requests that are due these kinds, if there is one."""

    def runner(self, kind: str) -> Callable[..., Sequence[Any]]:
        """The program: (inputs, kept tensors) -> (outputs, kept tensors), flat."""

    def count(self, kind: str) -> None:
        """Count a step."""


@dataclass(frozen=True)
class StepCall:
    """One call in canonical form.

    Attributes:
        signature: what the programs depend on, but for the values of position ids.
        leaves: inputs of the programs, in order. ids: those that may be position ids, at the same
            places. context: whose generation it is. label: of its pass, beside `cache_context`.
        token: a tensor that all calls of one generation have, and no other.
        kernel: makes the context that the program runs under.
    """

    signature: Hashable
    leaves: Sequence[Any]
    ids: Sequence[Any]
    context: Hashable = None
    label: Hashable = None
    token: Tensor | None = None
    kernel: Callable[[], AbstractContextManager[Any]] = nullcontext


Find = Callable[[tuple[Raster | None, ...]], tuple[Hashable, ProgramSet]]
"""(what kept tensors depend on, programs) for what the position ids of a call enumerate."""


def run_program(
    run: Callable[..., Sequence[Any]],
    inputs: Sequence[Any],
    kernel: Callable[[], AbstractContextManager[Any]],
) -> Sequence[Any]:
    """Run a program, which may be compiled, without gradients."""
    with torch.no_grad(), beside_tracing(), kernel():
        return run(*inputs)


def split_outputs(results: Sequence[Any], gives: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """What a program gives: the model's own outputs, and the kept tensors after them by name."""
    own = len(results) - len(gives)
    return list(results[:own]), dict(zip(gives, results[own:], strict=True))


OVERWRITES = "overwrites_outputs"
"""Attribute of a program: False says that what it returns is new memory at each call."""


def own_outputs(run: Callable[..., Sequence[Any]], results: Sequence[Any]) -> list[Any]:
    """Results of a program that stay as they are: a CUDA graph writes to the same place again."""
    if not getattr(run, OVERWRITES, True):
        return list(results)
    return [r.clone() if isinstance(r, Tensor) and r.is_cuda else r for r in results]

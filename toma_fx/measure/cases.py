"""Cases: what pictures are drawn of, and which of them share a call of the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from toma_fx.errors import ConfigError, TomaError


@dataclass(frozen=True)
class Case:
    """One picture to draw.

    Attributes:
        prompt: text; of an embedded model the name of a class. seed: of its noise, which no other
            picture of a batch depends on.
        options: further arguments of the pipeline's call for this picture, as `negative_prompt`.
        where: it was read, for errors: a file and a line.
    """

    prompt: str
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)

    @property
    def key(self) -> str:
        """What distinguishes it from other cases, as text."""
        options = {name: _fingerprint(value) for name, value in self.options.items()}
        return json.dumps([self.prompt, self.seed, options], sort_keys=True, default=repr)


def _fingerprint(value: Any) -> Any:
    """A value as JSON; tensors by their elements."""
    if isinstance(value, Tensor):
        return [str(value.dtype), value.float().cpu().tolist()]
    return value


@contextmanager
def naming(*cases: Case) -> Iterator[None]:
    """Let errors inside say where the cases were read."""
    try:
        yield
    except TomaError as error:
        places = [case.where for case in cases if case.where]
        if places:
            error.add_note("  prompts: " + "; ".join(places[:4]) + "; ..." * (len(places) > 4))
        raise


def batches_of(cases: Sequence[Case], size: int) -> list[list[int]]:
    """Indices of the pictures that one call draws, at most `size`, for all calls.

    Pictures of one call agree in all options but texts and tensors, so a list of prompts may mix
    sizes. Nothing but the cases and `size` decides which pictures share a call.
    """
    alike: dict[str, list[int]] = {}
    for index, case in enumerate(cases):
        kinds = {name: _kind(value) for name, value in case.options.items()}
        alike.setdefault(json.dumps(kinds, sort_keys=True, default=repr), []).append(index)
    return sorted(
        own[start : start + size] for own in alike.values() for start in range(0, len(own), size)
    )


def _kind(value: Any) -> Any:
    """What the values of an option must share to go into one call."""
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape)]
    return "text" if isinstance(value, str) else value


def batch_option(name: str, values: Sequence[Any]) -> Any:
    """One argument of a call for the values of its pictures: a list of texts, rows of a tensor.

    Raises:
        ConfigError: other values that differ.
    """
    if all(isinstance(value, str) for value in values):
        return list(values)
    if all(isinstance(value, Tensor) for value in values):
        return torch.cat(list(values))
    if any(value is not values[0] and value != values[0] for value in values):
        raise ConfigError(
            "pictures of one batch differ in an option",
            where=name,
            expected="texts, tensors with a row each, or one value",
            got=", ".join(map(repr, values))[:200],
            hint="batch=1 draws them one by one",
        )
    return values[0]

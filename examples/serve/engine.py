"""Pictures of many requests at once, step by step: what the worker of a server runs.

    engine = Engine("tiny-sdxl", buckets=(1, 2, 4))
    engine.add("a", "cat", seed=1)            # at any time, also while others are drawn
    while engine.busy:
        for event in engine.step():           # one step of up to four pictures
            ...

An embedded model draws, by Euler steps of rectified flow. `StepBatcher` does the rest.
"""

from __future__ import annotations

import io
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

import toma_fx
from toma_fx.models import flow, tiny
from toma_fx.serving import StepBatcher

PREVIEW = 32
"""Pixels a side of a preview."""


@dataclass(frozen=True)
class Event:
    """What a step gave a picture.

    Attributes:
        picture: its name. kind: "preview", "done" or "failed"; the last two are its end. step:
            steps done. image: [3, H, W] in [-1, 1]. error: of a failed one.
    """

    picture: Hashable
    kind: Literal["preview", "done", "failed"]
    step: int
    image: Tensor | None = None
    error: Exception | None = None


@dataclass
class _Drawing:
    """A picture that is being drawn: values with noise [1, 3, H, W], and its prompt."""

    prompt: str
    steps: int
    preview_every: int
    x: Tensor
    tokens: Tensor
    pooled: Tensor
    step: int = 0

    @property
    def times(self) -> Tensor:
        """Before this step and after it; 1 is pure noise."""
        return torch.linspace(1, 0, self.steps + 1, device=self.x.device)[self.step :][:2]


class Engine:
    """Draws pictures; at most `buckets[-1]` at a time, the others wait in their order.

    Args:
        model: a name of `toma_fx.models.tiny`. buckets: as of `StepBatcher`. device: to draw on.
        compiled: whether Inductor compiles the steps. options: of `toma_fx.optimize`.
    """

    def __init__(
        self, model: str, buckets: Sequence[int] = (1, 2, 4), device: str = "cpu",
        *, compiled: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        self.model, self.device = tiny.load(model), torch.device(device)
        self.model.conditioning.to(self.device)
        self.denoiser: Any = toma_fx.optimize(self.model.denoiser.to(self.device), **options)
        if compiled:
            self.denoiser.compile()
        self.batcher = StepBatcher(self.denoiser, buckets)
        self._waiting: dict[Hashable, _Drawing] = {}
        self._drawing: dict[Hashable, _Drawing] = {}

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._waiting or self._drawing)

    @property
    def pictures(self) -> tuple[Hashable, ...]:
        """Those that are drawn or wait."""
        return (*self._drawing, *self._waiting)

    @torch.no_grad()
    def warmup(self) -> None:
        """Capture what batches of each size need, before the first request waits for it."""
        one = self._begin(tiny.CLASSES[0])
        calls = [
            tiny.FLOW.denoiser_inputs(
                self.model.name,
                one.x.expand(rows, -1, -1, -1),
                one.times[0].expand(rows),
                one.tokens.expand(rows, -1, -1),
                one.pooled.expand(rows, -1),
            )
            for rows in self.batcher.buckets
        ]
        self.denoiser.warmup(calls=calls, mixed=True)

    def add(
        self, picture: Hashable, prompt: str, *, seed: int = 0, steps: int = 20,
        preview_every: int = 0,
    ) -> None:  # fmt: skip
        """Ask for a picture.

        Args:
            picture: a new name. prompt: one of `tiny.CLASSES`. seed: of its noise. steps: to draw
                it in. preview_every: steps between two previews; 0 for none.
        """
        if picture in self.pictures:
            raise ValueError(f"{picture!r} is being drawn already")
        self._waiting[picture] = self._begin(prompt, seed, steps, preview_every)

    @torch.no_grad()
    def _begin(
        self, prompt: str, seed: int = 0, steps: int = 20, preview_every: int = 0
    ) -> _Drawing:
        label = torch.tensor([tiny.CLASSES.index(prompt)], device=self.device)
        noise = tiny.FLOW.noise(1, [seed]).to(self.device)
        return _Drawing(prompt, steps, preview_every, noise, *self.model.conditioning(label))

    def drop(self, picture: Hashable) -> None:
        """Draw a picture no further, whatever it is at."""
        if self._drawing.pop(picture, None) is not None:
            self.batcher.leave(picture)
        self._waiting.pop(picture, None)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """One step of the pictures that are drawn; waiting ones join first, where there is room."""
        while self._waiting and len(self._drawing) < self.batcher.buckets[-1]:
            picture = next(iter(self._waiting))
            self._drawing[picture] = self._waiting.pop(picture)
            self.batcher.join(picture, steps=self._drawing[picture].steps)
        calls = {
            picture: tiny.FLOW.denoiser_inputs(
                self.model.name, d.x, d.times[0].expand(1), d.tokens, d.pooled
            )
            for picture, d in self._drawing.items()
        }
        events = []
        for picture, result in self.batcher.step(calls).items():
            drawing = self._drawing[picture]
            if result.error is not None:
                events.append(Event(picture, "failed", drawing.step, error=result.error))
                self.drop(picture)
            else:
                events += self._advance(picture, drawing, result.outputs[0])
        return events

    def _advance(self, picture: Hashable, drawing: _Drawing, output: Tensor) -> Iterator[Event]:
        """Move a picture by what the model says of it, [1, ...]."""
        packed = output.dim() == 3
        velocity = flow.unpack(output, tiny.SIZE, tiny.SIZE) if packed else output
        before, after = drawing.times
        clean = drawing.x - before * velocity
        drawing.x = drawing.x + (after - before) * velocity
        drawing.step += 1
        if drawing.step == drawing.steps:
            self.drop(picture)
            yield Event(picture, "done", drawing.step, drawing.x[0].clamp(-1, 1))
        elif drawing.preview_every and drawing.step % drawing.preview_every == 0:
            small = torch.nn.functional.interpolate(clean, PREVIEW, mode="area")
            yield Event(picture, "preview", drawing.step, small[0].clamp(-1, 1))


def png(image: Tensor) -> bytes:
    """A picture [3, H, W] in [-1, 1] as a file."""
    values = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()

"""Private names of torch: the lines of Python that the nodes of a traced graph are from.

torch notes a whole stack at every node, reads the source of each of its hundred frames, and takes a
fifth of the time of a capture for it. What is of use are the frames of the model.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from toma_fx.compat.lookup import attribute

TORCH = str(Path(torch.__file__).parent)
NAME = "CapturedTraceback"
"""What `torch.fx.proxy` takes stacks with."""
Frame = tuple[str, int, str]
"""(file, line, function)."""


class OwnFrames:
    """Stands in for torch's `CapturedTraceback`: frames outside of torch, the innermost last."""

    def __init__(self, frames: list[Frame]) -> None:
        self.frames = frames

    @classmethod
    def extract(cls, **_: object) -> OwnFrames:
        """The stack as it is now."""
        frames, frame = list[Frame](), sys._getframe(1)
        while (caller := frame.f_back) is not None:
            code = frame.f_code
            if not code.co_filename.startswith(TORCH):
                frames.append((code.co_filename, frame.f_lineno, code.co_name))
            frame = caller
        return cls(frames[::-1])

    def summary(self) -> traceback.StackSummary:
        """The frames; their source is read when it is asked for."""
        return traceback.StackSummary.from_list(
            [traceback.FrameSummary(*frame, lookup_line=False) for frame in self.frames]
        )


class _Swap:
    """`OwnFrames` in the place of torch's class while some thread asks for it."""

    def __init__(self) -> None:
        self.lock, self.users = threading.Lock(), 0
        self.original: Any = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        module = import_module("torch.fx.proxy")
        with self.lock:
            if not self.users:
                self.original = attribute("torch", module, NAME)
                setattr(module, NAME, OwnFrames)
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if not self.users:
                    setattr(module, NAME, self.original)


own_frames = _Swap()
"""A context in which nodes note the frames outside of torch alone, in all threads.

Raises:
    CompatError: this torch notes stacks in another way.
"""

"""Traces that leave no weak references to a model's tensors.

torch finds the fake tensor of a real one by a weak reference, and keeps it as long as its tables,
which graphs and exceptions hold. A tensor with a weak reference can't be swapped for another one,
which is how quantized weights move between devices.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx

from toma_fx.compat.pytorch import forget_tensors


@contextmanager
def without_weak_references() -> Iterator[list[fx.Graph]]:
    """Trace inside, append the graphs to the list: the tensors they were made for are forgotten.

    Also where tracing fails: tables are then found by the frames of the traceback.
    """
    graphs: list[fx.Graph] = []
    try:
        yield graphs
    except BaseException as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        forget_tensors(value for frame in frames for value in list(frame.f_locals.values()))
        raise
    finally:
        forget_tensors(node.meta.get("val") for graph in graphs for node in graph.nodes)

"""Making graphs while other threads run compiled programs."""

from __future__ import annotations

import linecache
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from toma_fx.compat.compilers import allow_calls_while_tracing, compile_lock, disable_dynamo
from toma_fx.compat.pytorch import graph_sources

_ACTIVE: list[int] = []
"""Threads that are tracing; torch's own flags for it hold for the whole process."""


@disable_dynamo
def beside_tracing() -> AbstractContextManager[Any]:
    """For running a program while another thread may be tracing.

    torch refuses to enter a compiled function then; inside, it runs uncompiled for that once.
    """
    return allow_calls_while_tracing() if _ACTIVE else nullcontext()


@contextmanager
def tracing() -> Iterator[None]:
    """Make graphs, one thread at a time, and leave no source text behind.

    Tracing swaps the parameters of the model that is traced. The lock is Dynamo's own, because its
    compilations fail beside a trace.

    torch.fx keeps the Python source of every graph module for good, for tracebacks; a capture makes
    some twenty of them, so that switching adapters a thousand times would fill the memory.
    """
    with compile_lock():
        _ACTIVE.append(threading.get_ident())
        sources = graph_sources()
        before = set(sources)
        try:
            yield
        finally:
            _ACTIVE.pop()
            for key in [k for k in list(sources) if k not in before]:
                del sources[key]
                linecache.cache.pop(key, None)

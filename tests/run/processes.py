"""Starting processes that share the tokens of a model, and never waiting for them too long."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed

PATIENCE = 60.0
"""Seconds that a process waits for the others."""
STARTING = 120.0
"""Seconds that all of them may take to start and work, besides."""


def run_ranks(
    count: int, work: Callable[..., Any], *args: Any, patience: float = PATIENCE
) -> list[Any]:
    """What `work(rank, *args)` returns in each of `count` processes of one gloo group.

    None for a process that ended without a result. An error in one of them is raised here.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(count)]
        processes = [
            context.Process(target=_run, args=(i, count, folder, patience, pipe, work, args))
            for i, (_, pipe) in enumerate(pipes)
        ]
        try:
            for process in processes:
                process.start()
            for _, pipe in pipes:
                pipe.close()  # so that a process that dies ends its pipe
            end = time.monotonic() + STARTING + 8 * patience
            return [_result(reader, end) for reader, _ in pipes]
        finally:
            for process in processes:
                process.join(1)
                process.kill()
                process.join(10)


def _result(reader: Connection, end: float) -> Any:
    if not reader.poll(max(0.0, end - time.monotonic())):
        raise TimeoutError("a process takes too long")
    try:
        result, failure = reader.recv()
    except EOFError:
        return None
    if failure:
        raise AssertionError(failure)
    return result


def _run(
    rank: int,
    count: int,
    folder: str,
    patience: float,
    pipe: Connection,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = distributed.FileStore(str(Path(folder) / "store"), count)
    timeout = timedelta(seconds=patience)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=count, timeout=timeout
    )
    try:
        with torch.no_grad():
            pipe.send((work(rank, *args), ""))
    except BaseException:
        pipe.send((None, f"process {rank}: {traceback.format_exc()}"))
    os._exit(0)  # a group that lost a process can't be left in order

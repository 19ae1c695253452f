"""Pictures over HTTP from several replicas: `StepBatcher` in a loop of its own in each, behind
Ray Serve.

    pip install toma-fx[ray]
    unshare -rn bash -c 'ip link set lo up && python examples/serve/ray_serve.py --replicas 2'

Ray replaces 127.0.0.1 by the machine's own address, so that whoever reaches the machine reaches
Ray, which runs whatever it is sent. So this runs in a network namespace that has nothing but `lo`,
as above, or, with --network, where you have seen to it. docs/serving.md describes it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from toma_fx.errors import ConfigError, MissingPackageError
from toma_fx.models import tiny

try:
    import ray
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
except ImportError as error:
    raise MissingPackageError(
        "the example needs Ray Serve", where="ray", hint="pip install toma-fx[ray]"
    ) from error

sys.path.append(str(Path(__file__).parent))  # also where Ray has only pickled this file

from answers import METHODS, PATH, Refused, body_of, event_text, message_of, read_request
from engine import Engine, Event
from orders import Order

APP = "pictures"
log = logging.getLogger("toma_fx.examples.ray_serve")


class Replica:
    """Draws the pictures of its requests, step by step, all in one batch.

    Args:
        model: a name of `toma_fx.models.tiny`. method: of `METHODS`. buckets: as of `StepBatcher`.
        device: to draw on. compiled: whether Inductor compiles the steps. timeout: seconds of a
            request. caches: folder of the folders in which replicas keep what they compile.
    """

    def __init__(
        self, model: str, method: str, buckets: Sequence[int], device: str, compiled: bool,
        timeout: float, caches: str,
    ) -> None:  # fmt: skip
        self.lock, folder = own_folder(Path(caches))
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
        self.model, self.timeout = model, timeout
        self.engine = Engine(model, buckets, device, compiled=compiled, **METHODS[method])
        self.engine.warmup()
        self.thread = ThreadPoolExecutor(1)  # runs all steps, in which the engine is left alone
        self.inbox: deque[Callable[[], None]] = deque()  # what is done between two steps
        self.events: dict[int, asyncio.Queue[Event]] = {}  # by request
        self.wake, self.loop, self.number = asyncio.Event(), None, 0
        self.failed = ""

    def check_health(self) -> None:
        """Asked by Ray Serve, which replaces a replica that raises."""
        if self.failed:
            raise RuntimeError(self.failed)

    async def __call__(self, request: Request) -> Response:
        """Answer a request of HTTP; cancelled by Ray Serve when its client leaves."""
        try:
            if request.method != "POST":
                raise Refused(405, "pictures are asked for by POST")
            order = await read_request(request, self.model)
            messages = self._messages(order)
            if order.stream:
                return StreamingResponse(self._lines(messages), media_type="text/event-stream")
            async with aclosing(messages):
                done = {m["index"]: m["b64_json"] async for m in messages}
            return JSONResponse(body_of(done))
        except Refused as refused:
            return refused.response()

    async def _lines(self, messages: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
        async with aclosing(messages):
            try:
                async for message in messages:
                    yield event_text(message["type"], message)
            except Refused as refused:
                yield event_text("error", refused.body())

    async def _messages(self, order: Order) -> AsyncIterator[dict[str, Any]]:
        """What comes of a request; however it ends, nothing of it is drawn any more then.

        Raises:
            Refused: a step of it failed, it took too long, or the replica has failed.
        """
        if self.failed:
            raise Refused(503, "the replica has failed and is replaced; ask again")
        self.loop = self.loop or asyncio.create_task(self._draw())
        self.number += 1
        name, left, end = self.number, order.n, time.monotonic() + self.timeout
        events = self.events[name] = asyncio.Queue()
        self._between_steps(lambda: self._add(name, order))
        try:
            while left:
                event = await asyncio.wait_for(events.get(), end - time.monotonic())
                if event.error is not None:
                    raise Refused(500, str(event.error))
                left -= event.kind == "done"
                yield message_of(event, event.picture[1])
        except TimeoutError as error:
            raise Refused(504, f"not done after {self.timeout:g} s") from error
        finally:
            del self.events[name]
            self._between_steps(lambda: self._drop(name))

    # -- the loop -----------------------------------------------------------------------------

    def _between_steps(self, action: Callable[[], None]) -> None:
        self.inbox.append(action)
        self.wake.set()

    def _add(self, name: int, order: Order) -> None:
        for i in range(order.n):
            self.engine.add(
                (name, i), order.prompt, seed=order.seed + i, steps=order.steps,
                preview_every=order.preview_every,
            )  # fmt: skip

    def _drop(self, name: int) -> None:
        for picture in self.engine.pictures:
            if picture[0] == name:
                self.engine.drop(picture)

    async def _draw(self) -> None:
        """Steps while there is something to draw. What ends it fails all requests, and the replica,
        of which nobody knows then what it holds."""
        try:
            while True:
                while self.inbox:
                    self.inbox.popleft()()
                if not self.engine.busy:
                    self.wake.clear()
                    await self.wake.wait()
                    continue
                steps = asyncio.get_running_loop().run_in_executor(self.thread, self.engine.step)
                for event in await steps:
                    if event.picture[0] in self.events:
                        self.events[event.picture[0]].put_nowait(event)
        except Exception as error:  # of any kind: whoever waits has to hear of it
            log.exception("a step failed")
            self.failed = f"{type(error).__name__}: {error}"
            for name, events in self.events.items():
                events.put_nowait(Event((name, 0), "failed", 0, error=RuntimeError(self.failed)))


def own_folder(caches: Path) -> tuple[FileLock, Path]:
    """The first folder below `caches` that no process holds, and the lock that holds it.

    Inductor's files of two processes in one folder were seen to break a compile. A replica that is
    replaced leaves its folder to the next one, which then has less to compile.
    """
    caches.mkdir(parents=True, exist_ok=True)
    for i in range(1000):
        lock = FileLock(caches / f"{i}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            continue
        (caches / str(i)).mkdir(exist_ok=True)
        return lock, caches / str(i)
    raise ConfigError("all folders are held", where=str(caches), expected="fewer replicas")


# -- the process that starts them -----------------------------------------------------------------


def check_network(accepted: bool) -> None:
    """Passes if nobody else can reach what Ray opens, or it was said to be fine.

    Raises:
        ConfigError: there are networks other than this machine's own.
    """
    others = [name for _, name in socket.if_nameindex() if name != "lo"]
    if others and not accepted:
        raise ConfigError(
            "Ray would listen on this machine's networks", where="network", expected="lo alone",
            got=", ".join(others),
            hint="unshare -rn bash -c 'ip link set lo up && ...', or --network to accept it",
        )  # fmt: skip


def start(arguments: argparse.Namespace, folder: str) -> None:
    """Start Ray and the replicas; returns when they can draw."""
    ray.init(
        num_cpus=arguments.replicas, include_dashboard=False, object_store_memory=100 * 2**20,
        _temp_dir=folder, _node_ip_address="127.0.0.1", logging_level=logging.WARNING,
    )  # fmt: skip
    longest = 2 * arguments.timeout + 5  # those that wait for a replica, too
    options = {"host": "127.0.0.1", "port": arguments.port, "request_timeout_s": longest}
    serve.start(http_options=options)
    replica = serve.deployment(
        Replica,
        num_replicas=arguments.replicas,
        max_ongoing_requests=arguments.limit,
        max_queued_requests=arguments.limit,  # others get 503
        graceful_shutdown_timeout_s=arguments.timeout + 5,
        graceful_shutdown_wait_loop_s=1,
        health_check_period_s=1,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(arguments.device == "cuda")},
    )
    buckets = sorted({int(size) for size in arguments.buckets.split(",")})
    app = replica.bind(
        arguments.model, arguments.method, buckets, arguments.device, arguments.compile,
        arguments.timeout, str(arguments.caches or Path(folder, "inductor")),
    )  # fmt: skip
    serve.run(app, name=APP, route_prefix=PATH)


def main() -> None:
    """Serve until Ctrl-C or SIGTERM; then no request is taken, and those that run are answered."""
    parser = argparse.ArgumentParser(description="Pictures over HTTP, from several replicas.")
    parser.add_argument("--model", choices=tiny.NAMES, default=tiny.NAMES[0])
    parser.add_argument("--method", choices=METHODS, default="merged")
    parser.add_argument("--replicas", type=int, default=2, help="processes that draw (2)")
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--buckets", default="1,2,4", help="pictures of a batch (1,2,4)")
    parser.add_argument("--limit", type=int, default=8, help="requests of a replica (8)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds of a request (60)")
    parser.add_argument("--compile", action="store_true", help="compile the steps with Inductor")
    parser.add_argument("--caches", type=Path, help="folder for what is compiled, kept for later")
    parser.add_argument("--network", action="store_true", help="serve on networks that there are")
    arguments = parser.parse_args()
    check_network(arguments.network)
    stopped = threading.Event()
    folder = tempfile.mkdtemp(prefix="ray-")  # names of sockets may have some hundred characters
    try:
        start(arguments, folder)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda *_: stopped.set())
        print(f"serving on http://127.0.0.1:{arguments.port}{PATH}", flush=True)
        while not stopped.wait(1):
            pass
        with suppress(TimeoutError):  # after a minute
            serve.delete(APP)  # waits for what runs: `shutdown` alone ends the process that answers
        serve.shutdown()
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

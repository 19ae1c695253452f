"""Pictures over HTTP, batched step by step: `StepBatcher` in the step loop of LitServe.

    pip install toma-fx[serve]
    python examples/serve/server.py --model tiny-sdxl
    curl http://127.0.0.1:8000/v1/images/generations -H "Content-Type: application/json" \
        -d '{"prompt": "cat", "seed": 3, "stream": true, "preview_every": 5}'

Two processes: one speaks HTTP and holds the queue's bound (`Images`), one draws (`Pictures`). A
request that ends early, by a client that left or by its time, is told to the other by a message.
docs/serving.md describes it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress
from typing import Any

from toma_fx.errors import MissingPackageError
from toma_fx.models import tiny

try:
    from fastapi import Request, Response
    from fastapi.responses import JSONResponse, StreamingResponse
    from litserve import LitAPI, LitServer
    from litserve.loops.continuous_batching_loop import ContinuousBatchingLoop, Output
    from litserve.specs.base import LitSpec
    from litserve.utils import LitAPIStatus, ResponseBufferItem
except ImportError as error:
    raise MissingPackageError(
        "the example server needs LitServe", where="litserve", hint="pip install toma-fx[serve]"
    ) from error

from answers import METHODS, PATH, Refused, body_of, event_text, message_of, read_request
from engine import Engine, Event
from orders import Order

POLL = 0.25
"""Seconds between two looks at the client and the worker of a request that waits."""
log = logging.getLogger("toma_fx.examples.serve")


# -- the process that speaks HTTP -----------------------------------------------------------------


class Images(LitSpec):
    """`POST /v1/images/generations`.

    Args:
        model: that is served. limit: pictures that are drawn or wait; a request beyond it is
            refused with 429. timeout: seconds that a request may take.
    """

    def __init__(self, model: str, limit: int, timeout: float) -> None:
        super().__init__()
        self.api_path = PATH
        self.model, self.limit, self.timeout = model, limit, timeout
        self.pictures = 0
        self.add_endpoint(PATH, self.answer, ["POST"])

    @property
    def stream(self) -> bool:
        """Whether answers come in parts, as the step loop asks for."""
        return True

    async def answer(self, request: Request) -> Response:
        """Answer a request of HTTP."""
        try:
            order = await self._read(request)
            messages = self._messages(order, request)
            await anext(messages)  # the worker has it
            if order.stream:
                return StreamingResponse(self._events(messages), media_type="text/event-stream")
            return JSONResponse(await self._pictures(messages))
        except Refused as refused:
            return refused.response()

    async def _read(self, request: Request) -> Order:
        order = await read_request(request, self.model)
        if self.pictures + order.n > self.limit:
            full = f"{self.pictures} pictures of at most {self.limit} are drawn or wait"
            raise Refused(429, f"{full}; {order.n} more do not fit now")
        return order

    async def _pictures(self, messages: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
        """The body of an answer in one piece."""
        data: dict[int, str] = {}
        async for message in messages:
            data[message["index"]] = message["b64_json"]
        return body_of(data)

    async def _events(self, messages: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
        """The body of an answer in server-sent events."""
        async with aclosing(messages):
            try:
                async for message in messages:
                    yield event_text(message["type"], message)
            except Refused as refused:
                yield event_text("error", refused.body())

    async def _messages(self, order: Order, request: Request) -> AsyncIterator[dict[str, Any]]:
        """What the worker says of a request.

        Raises:
            Refused: the request failed or took too long, the client left, or the worker died.
        """
        name, item = str(uuid.uuid4()), ResponseBufferItem(asyncio.Event(), deque())
        self.response_buffer[name] = item
        self.pictures += order.n
        deadline, worker, ended = time.monotonic() + self.timeout, None, False
        try:
            self._send(name, vars(order))
            while True:
                item.event.clear()
                while item.response_queue:
                    message, status = item.response_queue.popleft()
                    ended = status != LitAPIStatus.OK
                    if status == LitAPIStatus.ERROR:
                        raise Refused(500, "the worker failed; its log says why")
                    if ended:
                        return
                    message = json.loads(message)
                    worker = message.get("worker", worker)
                    if "failed" in message:
                        raise Refused(500, message["failed"])
                    yield message
                if await request.is_disconnected():
                    raise Refused(499, "the client has left")
                if time.monotonic() > deadline:
                    raise Refused(504, f"not done after {self.timeout:g} s")
                if worker is not None and not _is_alive(worker):
                    ended = True
                    raise Refused(503, "the worker died; ask again")
                with suppress(TimeoutError):
                    await asyncio.wait_for(item.event.wait(), POLL)
        finally:
            self.pictures -= order.n
            del self.response_buffer[name]
            if not ended:
                with suppress(Refused):
                    self._send(str(uuid.uuid4()), {"drop": name})

    def _send(self, name: str, message: dict[str, Any]) -> None:
        try:
            self.request_queue.put((self.response_queue_id, name, time.monotonic(), message))
        except (OSError, EOFError) as error:
            raise Refused(503, "the server shuts down") from error


def _is_alive(process: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


# -- the process that draws -----------------------------------------------------------------------


class Pictures(LitAPI):
    """Draws what `Images` sends. Its bound is there, so that messages never wait for room."""

    def __init__(self, spec: Images, buckets: Sequence[int], options: dict[str, Any]) -> None:
        super().__init__(spec=spec, loop=StepLoop(), max_batch_size=buckets[-1])
        self.name, self.buckets, self.options = spec.model, tuple(buckets), options
        self.inbox: deque[tuple[str, dict[str, Any]]] = deque()  # another thread fills it
        self.left: dict[str, int] = {}  # pictures to come, by request

    def setup(self, device: str) -> None:
        """Get ready, in the worker."""
        # Ctrl-C goes to all processes: this one goes on until the requests are answered
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.engine = Engine(self.name, self.buckets, device, **self.options)
        self.engine.warmup()

    def has_capacity(self) -> bool:
        """Whether the loop may bring a message."""
        return True

    def has_active_requests(self) -> bool:
        """Whether a step would do something."""
        return bool(self.inbox) or self.engine.busy

    def add_request(self, name: str, message: dict[str, Any]) -> None:
        """Take a message; the next step reads it."""
        self.inbox.append((name, message))

    def step(self, _previous: Any) -> list[Output]:
        """Read what came, and draw one step."""
        outputs = []
        while self.inbox:
            outputs += self._receive(*self.inbox.popleft())
        for event in self.engine.step():
            outputs += self._tell(event)
        return outputs

    def _receive(self, name: str, message: dict[str, Any]) -> list[Output]:
        if "drop" in message:
            dropped = message["drop"]
            for picture in self.engine.pictures:
                if picture[0] == dropped:
                    self.engine.drop(picture)
            ended = [name, dropped] if self.left.pop(dropped, 0) else [name]
            log.info("%s has ended early", dropped)
            return [Output(each, "", LitAPIStatus.FINISH_STREAMING) for each in ended]
        order = Order(**message)
        self.left[name] = order.n
        for i in range(order.n):
            self.engine.add(
                (name, i), order.prompt, seed=order.seed + i, steps=order.steps,
                preview_every=order.preview_every,
            )  # fmt: skip
        return [Output(name, {"worker": os.getpid()}, LitAPIStatus.OK)]

    def _tell(self, event: Event) -> list[Output]:
        name, index = event.picture
        if event.image is None:
            message: dict[str, Any] = {"failed": str(event.error)}
        else:
            message = message_of(event, index)
        outputs = [Output(name, message, LitAPIStatus.OK)]
        if event.kind != "preview":
            self.left[name] -= 1
            if not self.left[name]:
                del self.left[name]
                outputs.append(Output(name, "", LitAPIStatus.FINISH_STREAMING))
        return outputs

    def encode_response(self, output: Any, **_: Any) -> Any:
        """As it is: LitServe makes JSON of it."""
        return output


class StepLoop(ContinuousBatchingLoop):
    """LitServe's loop, without its waits: 10 ms after a step that says nothing, none when idle."""

    IDLE = 0.005

    async def step(self, previous: Any, api: Pictures, spec: Images) -> list[Output]:
        """Steps until one says something; a step that fails ends the worker, which is replaced."""
        try:
            outputs: list[Output] = []
            while not outputs and api.has_active_requests():
                outputs = await super().step(previous, api, spec)
            return outputs
        except Exception:  # whatever it is: LitServe would log it and go on without a step
            log.exception("a step failed")
            os._exit(1)

    async def run(self, api: Pictures, *rest: Any) -> None:
        """Steps while there is something to do."""
        await super().run(api, *rest)
        if os.getppid() != self._server_pid:
            os._exit(1)  # the server is gone
        await asyncio.sleep(self.IDLE)


# -- both -----------------------------------------------------------------------------------------


def main() -> None:
    """Serve until Ctrl-C or SIGTERM; then no request is taken, and those that run are answered."""
    parser = argparse.ArgumentParser(description="Pictures over HTTP, batched step by step.")
    parser.add_argument("--model", choices=tiny.NAMES, default=tiny.NAMES[0])
    parser.add_argument("--method", choices=METHODS, default="merged")
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--buckets", default="1,2,4", help="pictures of a batch (1,2,4)")
    parser.add_argument("--limit", type=int, default=32, help="pictures drawn or waiting (32)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds of a request (60)")
    arguments = parser.parse_args()
    spec = Images(arguments.model, arguments.limit, arguments.timeout)
    buckets = sorted({int(size) for size in arguments.buckets.split(",")})
    api = Pictures(spec, buckets, METHODS[arguments.method])
    server = LitServer(
        api, accelerator=arguments.device, devices=1, timeout=False, restart_workers=True
    )
    process = os.getpid()

    def stop(*_: Any) -> None:
        if os.getpid() == process:  # copies of this process have their own way to end
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    server.run(
        host="127.0.0.1", port=arguments.port, num_api_servers=1, generate_client_file=False,
        log_level="warning",
    )  # fmt: skip


if __name__ == "__main__":
    main()

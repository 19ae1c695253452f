"""The example server under faults. It ends by itself, even where a test hangs."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.examples import ROOT, load_example

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("litserve") is None, reason="needs the extra [serve]"
)
PATH = "/v1/images/generations"
LIFE, START, ANSWER = 150, 60, 40
"""Seconds that a server lives, may take to start, and may take for an answer."""
LIMIT, TIMEOUT = 4, 6
"""Pictures that the server holds, and seconds of a request."""
ENDLESS = {"prompt": "coins", "n": LIMIT, "steps": 100}
"""A request that takes longer than it may."""


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    port: int

    def send(self, body: Any) -> tuple[HTTPConnection, HTTPResponse]:
        """The connection stays open until it is closed or forgotten."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=ANSWER)
        text = body if isinstance(body, str) else json.dumps(body)
        connection.request("POST", PATH, text, {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def ask(self, **body: Any) -> tuple[int, Any]:
        """Status, and body in JSON."""
        connection, answer = self.send(body)
        with connection_closed(connection):
            return answer.status, json.loads(answer.read())

    def is_ready(self, wait: float = ANSWER) -> bool:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=wait)
        with suppress(OSError), connection_closed(connection):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False

    def wait(self) -> None:
        wait_until(self.is_ready, START)

    def worker(self) -> int:
        """Process that draws: a child that began with an interpreter of its own."""
        own = int(children(self.process.pid)[0])  # below `timeout`
        for child in children(own):
            line = Path(f"/proc/{child}/cmdline").read_bytes()
            if b"spawn_main" in line:
                return int(child)
        raise AssertionError("no worker")


@contextmanager
def connection_closed(connection: HTTPConnection) -> Iterator[HTTPConnection]:
    try:
        yield connection
    finally:
        connection.close()


def children(process: int) -> list[str]:
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


def wait_until(holds: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.1)


@contextmanager
def running(timeout: int = TIMEOUT) -> Iterator[Server]:
    """A server on a free port, in a group of processes of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        "timeout", "-k", "5", str(LIFE), sys.executable, str(ROOT / "examples/serve/server.py"),
        "--port", str(port), "--buckets", "2", "--limit", str(LIMIT), "--timeout", str(timeout),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        server = Server(process, port)
        server.wait()
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as server:
        yield server


@cache
def engine() -> Any:
    return load_example("engine", "examples/serve").Engine("tiny-sdxl", (2,))


@cache
def drawn(prompt: str, seed: int, steps: int) -> np.ndarray[Any, Any]:
    """What the model's own sampler draws."""
    own = engine()
    with own.denoiser.generation(steps=steps):
        images = own.model.generate(
            [prompt] * 2, seed=[seed] * 2, steps=steps, denoiser=own.denoiser
        )
    return pixels(base64.b64encode(load_example("engine", "examples/serve").png(images[0])))


def pixels(text: str | bytes) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return np.asarray(image).astype(int)


def is_right(text: str, prompt: str, seed: int, steps: int) -> bool:
    return bool(abs(pixels(text) - drawn(prompt, seed, steps)).max() <= 1)


def assert_serves(server: Server) -> None:
    """It has room for all again, and draws what it should."""
    started = time.monotonic()
    status, body = server.ask(prompt="cat", seed=3, steps=2, n=LIMIT)
    assert time.monotonic() - started < TIMEOUT / 2, "nothing else is drawn"
    assert status == 200, body
    assert all(is_right(d["b64_json"], "cat", 3 + i, 2) for i, d in enumerate(body["data"]))
    assert not is_right(body["data"][0]["b64_json"], "cat", 4, 2), "the comparison can fail"


def test_pictures(server: Server) -> None:
    assert_serves(server)


def test_previews(server: Server) -> None:
    connection, answer = server.send(
        {"prompt": "rocket", "steps": 5, "stream": True, "preview_every": 2}
    )
    with connection_closed(connection):
        assert answer.getheader("content-type", "").startswith("text/event-stream")
        blocks = answer.read().decode().strip().split("\n\n")
    events = [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks]
    data = [json.loads(e["data"]) for e in events]
    partial, completed = "image_generation.partial_image", "image_generation.completed"
    assert [e["event"] for e in events] == [partial, partial, completed]
    assert [d["step"] for d in data] == [2, 4, 5]
    assert [len(pixels(d["b64_json"])) for d in data] == [32, 32, 64]
    assert is_right(data[-1]["b64_json"], "rocket", 0, 5)


def test_bad_requests(server: Server) -> None:
    for body, reason in (("{", "not JSON"), ([1], "not a JSON object")):
        connection, answer = server.send(body)
        with connection_closed(connection):
            assert answer.status == 400
            assert reason in json.loads(answer.read())["error"]["message"]
    status, body = server.ask(prompt="dog")
    assert (status, body["error"]["param"]) == (400, "prompt")
    assert "rocket" in body["error"]["message"], "it says what there is"


def test_only_this_machine_is_served(server: Server) -> None:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [row[1] for row in rows if row[3] == "0A"]
    assert f"0100007F:{server.port:04X}" in listening
    assert f"00000000:{server.port:04X}" not in listening


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(server: Server, stream: bool) -> None:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=ANSWER)
    connection.request("POST", PATH, json.dumps({**ENDLESS, "stream": stream}))
    wait_until(lambda: server.ask(prompt="cat", steps=1)[0] == 429, 5)
    connection.close()
    wait_until(lambda: server.ask(prompt="cat", steps=1)[0] == 200, 3)
    assert_serves(server)


def test_a_full_queue(server: Server) -> None:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=ANSWER)
    with connection_closed(connection):
        connection.request("POST", PATH, json.dumps(ENDLESS))
        wait_until(lambda: server.ask(prompt="cat", steps=1)[0] == 429, 5)
        other, answer = server.send({"prompt": "cat"})
        with connection_closed(other):
            assert answer.getheader("retry-after") == "1"
            assert "at most 4" in json.loads(answer.read())["error"]["message"]
    wait_until(lambda: server.ask(prompt="cat", steps=1)[0] == 200, 3)


def test_a_request_that_takes_too_long(server: Server) -> None:
    status, body = server.ask(**ENDLESS)
    assert (status, body["error"]["message"]) == (504, "not done after 6 s")
    assert_serves(server)


def test_a_worker_that_is_killed_under_load(server: Server) -> None:
    """An error or the right picture, never a wrong one; the next worker goes on."""
    requests = [{"prompt": "cat", "seed": seed, "steps": 25} for seed in range(LIMIT)]
    with ThreadPoolExecutor(LIMIT) as pool:
        answers = [pool.submit(server.ask, **request) for request in requests]
        time.sleep(1)
        os.kill(server.worker(), signal.SIGKILL)
        results = [answer.result(ANSWER) for answer in answers]
    statuses = [status for status, _ in results]
    assert 503 in statuses
    assert set(statuses) <= {200, 503, 504}
    for request, (status, body) in zip(requests, results, strict=True):
        if status == 200:
            assert is_right(body["data"][0]["b64_json"], **request)
    wait_until(lambda: server.ask(prompt="cat", steps=1)[0] == 200, START)
    assert_serves(server)


def test_what_runs_is_answered_at_shutdown() -> None:
    with running(timeout=ANSWER) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.ask, prompt="cat", seed=3, steps=100)
        time.sleep(0.5)
        os.kill(int(children(server.process.pid)[0]), signal.SIGTERM)
        time.sleep(1)
        assert not server.is_ready(wait=0.5), "nobody is let in"
        assert not answer.done(), "the one above was late"
        status, body = answer.result(ANSWER)
        assert status == 200
        assert is_right(body["data"][0]["b64_json"], "cat", 3, 100)
        assert server.process.wait(ANSWER) == 0

"""What `test_ray_serve.py` runs, in a network and a list of processes of their own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.examples import ROOT, load_example
from tests.serving.test_server import (
    ANSWER,
    PATH,
    Server,
    connection_closed,
    is_right,
    wait_until,
)
from toma_fx.errors import ConfigError

PORT, START = 8123, 120
LIMIT, TIMEOUT = 4, 16
"""Requests that a replica has, and as many wait; seconds of a request."""
ENDLESS = {"prompt": "coins", "n": 4, "steps": 100}
"""A request that takes longer than it may."""


@contextmanager
def running(caches: Path, replicas: int, timeout: int) -> Iterator[Server]:
    command = [
        sys.executable, str(ROOT / "examples/serve/ray_serve.py"), "--port", str(PORT),
        "--replicas", str(replicas), "--buckets", "2", "--limit", str(LIMIT),
        "--timeout", str(timeout), "--caches", str(caches),
    ]  # fmt: skip
    with (caches.with_suffix(".log")).open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    server = Server(process, PORT)
    try:
        wait_until(lambda: "serving on" in caches.with_suffix(".log").read_text(), START)
        yield server
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray") / "caches"


@pytest.fixture(scope="module")
def server(caches: Path) -> Iterator[Server]:
    with running(caches, 2, TIMEOUT) as server:
        yield server


def replicas() -> list[int]:
    """Processes that draw."""
    lines = {p: p.with_name("cmdline") for p in Path("/proc").glob("[0-9]*/stat")}
    own = (p for p, line in lines.items() if b"ray::ServeReplica" in line.read_bytes())
    return [int(p.parent.name) for p in own]


def ask_all(server: Server, requests: list[dict[str, Any]]) -> list[tuple[int, Any]]:
    """Answers to requests at the same time; Ray words some of its errors as plain text."""

    def ask(request: dict[str, Any]) -> tuple[int, Any]:
        connection, answer = server.send(request)
        with connection_closed(connection):
            text = answer.read()
            return answer.status, json.loads(text) if answer.status == 200 else text.decode()

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(ask, requests))


def assert_right(requests: list[dict[str, Any]], results: list[tuple[int, Any]]) -> None:
    """Every picture that came is the one that was asked for."""
    for request, (status, body) in zip(requests, results, strict=True):
        if status == 200:
            assert is_right(body["data"][0]["b64_json"], **request)


def assert_serves(server: Server) -> None:
    """Replicas are free, and draw what they should."""
    requests = [{"prompt": "cat", "seed": seed, "steps": 3} for seed in range(4)]
    began = time.monotonic()
    results = ask_all(server, requests)
    assert [status for status, _ in results] == [200] * 4, results
    assert time.monotonic() - began < TIMEOUT / 2, "nothing else is drawn"
    assert_right(requests, results)
    wrong = results[0][1]["data"][0]["b64_json"]
    assert not is_right(wrong, "cat", 1, 3), "the comparison can fail"


def test_pictures_of_two_replicas(server: Server, caches: Path) -> None:
    assert_serves(server)
    assert len(replicas()) == 2
    assert sorted(p.name for p in caches.iterdir()) == ["0", "0.lock", "1", "1.lock"]


def test_previews_and_bad_requests(server: Server) -> None:
    connection, answer = server.send(
        {"prompt": "rocket", "steps": 5, "stream": True, "preview_every": 2}
    )
    with connection_closed(connection):
        blocks = answer.read().decode().strip().split("\n\n")
    events = [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks]
    partial, completed = "image_generation.partial_image", "image_generation.completed"
    assert [e["event"] for e in events] == [partial, partial, completed]
    assert is_right(json.loads(events[-1]["data"])["b64_json"], "rocket", 0, 5)
    for body, reason in (("{", "not JSON"), ({"prompt": "dog"}, "own prompts")):
        connection, answer = server.send(body)
        with connection_closed(connection):
            assert answer.status == 400
            assert reason in json.loads(answer.read())["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_free_their_places(server: Server, stream: bool) -> None:
    connections = [HTTPConnection("127.0.0.1", PORT, timeout=ANSWER) for _ in range(2 * LIMIT)]
    for connection in connections:
        connection.request("POST", PATH, json.dumps({**ENDLESS, "stream": stream}))
    time.sleep(1.5)
    for connection in connections:
        connection.close()
    time.sleep(0.5)
    assert_serves(server)


def test_a_full_queue_and_requests_that_take_too_long(server: Server) -> None:
    results = ask_all(server, [ENDLESS] * 16)
    statuses = [status for status, _ in results]
    assert set(statuses) == {503, 504}, results
    assert statuses.count(504) >= LIMIT, "Ray lets at least as many in as may wait"
    assert_serves(server)


def test_a_replica_that_is_killed_under_load(server: Server, caches: Path) -> None:
    """An error or the right picture, never a wrong one; another takes its place and its folder."""
    before = replicas()
    requests = [{"prompt": "cat", "seed": seed, "steps": 12} for seed in range(4)]
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(ask_all, server, requests)
        time.sleep(0.7)
        os.kill(before[0], signal.SIGKILL)
        results = answers.result(ANSWER)
    statuses = [status for status, _ in results]
    assert {200, 500} <= set(statuses) <= {200, 500, 504}, results
    assert_right(requests, results)
    wait_until(lambda: len(set(replicas()) - {before[0]}) == 2, START)
    wait_until(lambda: all(s == 200 for s, _ in ask_all(server, requests)), START)
    assert_serves(server)
    assert sorted(p.name for p in caches.iterdir()) == ["0", "0.lock", "1", "1.lock"]


def test_folders_are_held_and_networks_are_refused(tmp_path: Path) -> None:
    serve = load_example("ray_serve", "examples/serve")
    serve.check_network(accepted=False)  # nothing but lo is here
    locks = [serve.own_folder(tmp_path) for _ in range(2)]
    assert [folder.name for _, folder in locks] == ["0", "1"]
    locks[0][0].release()
    assert serve.own_folder(tmp_path)[1].name == "0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
        serve.check_network(accepted=True)
        with pytest.raises(ConfigError, match="eth0"):
            serve.check_network(accepted=False)


def test_a_step_that_nobody_foresaw_to_fail_ends_the_replica(tmp_path: Path) -> None:
    serve = load_example("ray_serve", "examples/serve")
    replica = serve.Replica("tiny-flux", "neither", (1,), "cpu", False, TIMEOUT, str(tmp_path))
    replica.check_health()

    def fail() -> Any:
        raise RuntimeError("out of memory")

    replica.engine.step = fail

    async def ask() -> list[Any]:
        return [message async for message in replica._messages(serve.Order("cat"))]

    for status, words in ((500, "RuntimeError: out of memory"), (503, "ask again")):
        with pytest.raises(serve.Refused, match=words) as caught:
            asyncio.run(ask())
        assert caught.value.status == status
    with pytest.raises(RuntimeError, match="out of memory"):
        replica.check_health()


def test_what_runs_is_answered_at_shutdown(server: Server) -> None:
    """The last one: it ends the server."""
    request = {"prompt": "cat", "seed": 3, "steps": 20}
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(ask_all, server, [request])
        time.sleep(0.5)
        server.process.terminate()
        time.sleep(0.5)
        assert not answers.done(), "the one above was late"
        results = answers.result(ANSWER)
    assert [status for status, _ in results] == [200]
    assert_right([request], results)
    assert server.process.wait(60) == 0

"""Random calls against the plain truth: `step()` with one state for each pass of each picture.

Pictures are made in any order and mixture: by this thread, by threads, coroutines and generators,
with guidance that comes and goes, tiles, other sizes and texts, and some are broken off. Where
everything is told, every output is the truth. Where nothing is, an output may also be that of a
fresh selection, but never one by the patterns of another pass.
"""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import toma_fx
from tests.run.loops import call, optimized, text_of

CONFIG: dict[str, Any] = {"destinations_every": 3, "weights_every": 3}
TEXTS = 6
QUICK, SLOW = 15, 2000


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass
class Picture:
    """One picture to make.

    Attributes:
        text: number of its text. begin: step it begins at. rows: of its batch.
        plan: names of the passes of each step. label: whether the caller names them.
        states: what `step()` keeps for each pass. outputs: of how many calls were fresh.
    """

    number: int
    text: int
    begin: int
    rows: int
    plan: list[list[str]]
    label: bool
    anew: bool
    states: dict[str, toma_fx.State] = field(default_factory=dict)

    def calls(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """(step, name of the pass, arguments) of every call."""
        for i, names in enumerate(self.plan):
            for place, name in enumerate(names):
                # the other side of guidance has a text of its own, tiles share one
                text = text_of(self.text + (100 if name == "uncond" else 0))
                step = self.begin + i
                made = call(10 * self.number + place, step, text, batch=self.rows)
                if self.anew:
                    made["encoder_hidden_states"] = text.clone()
                yield step, name, made


def draw_picture(draw: random.Random, number: int, text: int, begin: int, steps: int) -> Picture:
    """A picture with passes of some kind."""
    kind = draw.choice(["one", "two", "late", "early", "tiles"])
    tiles = [f"tile {i}" for i in range(draw.randint(2, 7))]
    turn = draw.randint(1, 2)
    plan = []
    for i in range(steps):
        both = kind == "two" or (kind == "late" and i >= turn) or (kind == "early" and i < turn)
        plan.append(tiles if kind == "tiles" else ["cond", "uncond"] if both else ["cond"])
    anew = draw.random() < 0.2
    return Picture(number, text, begin, draw.choice([1, 1, 2]), plan, draw.random() < 0.3, anew)


class Truth:
    """Compares outputs with those of `step()`."""

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser
        self.fresh = self.calls = 0

    def check(self, picture: Picture, name: str, made: Any, output: Tensor, *, told: bool) -> None:
        """Raise unless an output is that of the pass's own state, or of a fresh one if untold."""
        own = picture.states.get(name, toma_fx.State())
        want, following = self.denoiser.step(made, own)
        self.calls += 1
        if not torch.equal(output, want):
            assert not told, f"{picture}, {name}: not the truth"
            want, following = self.denoiser.step(made, toma_fx.State())
            assert torch.equal(output, want), f"{picture}, {name}: neither its own nor fresh"
            self.fresh += 1
        picture.states[name] = following


Step = Callable[[], None]


class World:
    """A denoiser, and those who make pictures with it."""

    def __init__(self, seed: int, denoisers: tuple[Any, Any], *, told: bool) -> None:
        self.draw, self.told = random.Random(seed), told
        self.denoiser, self.truth = denoisers[0], Truth(denoisers[1])
        self.texts = range(1000 * seed, 1000 * seed + TEXTS)  # no other world has them
        self.numbers = iter(range(1000))
        self.used: set[int] = set()
        self.closing: list[Callable[[], Any]] = []

    def work(self, pictures: list[Picture]) -> Generator[None, None, None]:
        """Make pictures one after the other; a step of the generator is a call."""
        for picture in pictures:
            with self.denoiser.generation() if self.told else nullcontext() as run:
                for step, name, made in picture.calls():
                    self.one(picture, step, name, made, run)
                    yield

    def one(self, picture: Picture, step: int, name: str, made: Any, run: Any) -> None:
        """A call, compared with the truth."""
        label = nullcontext()
        if run is not None:
            run.step(step, pass_=name)
        elif picture.label and name in ("cond", "uncond"):
            label = self.denoiser.cache_context(name)
        with label:
            output = self.denoiser(**made).clone()
        self.truth.check(picture, name, made, output, told=self.told)

    def pictures(self, texts: range) -> list[Picture]:
        """Pictures of one worker. Untold, those that nothing tells apart are left out: a later
        begin, or one after a picture of a single step, with the very same text. So of all workers:
        the frame of a coroutine that ended may come again as that of another."""
        pictures: list[Picture] = []
        for _ in range(self.draw.randint(1, 3)):
            text, begin = self.draw.choice(texts), self.draw.choice([0, 0, 0, 1, 2])
            steps = self.draw.randint(1, 5)
            if not self.told and text in self.used:
                begin = 0
            self.used.add(text)
            if not self.told:
                steps = max(steps, 2)
            pictures.append(draw_picture(self.draw, next(self.numbers), text, begin, steps))
        return pictures

    def workers(self) -> list[Step]:
        """Functions that make a call each, until they raise StopIteration."""
        kinds = [self.plainly, self.as_generator, self.as_coroutine, self.in_thread]
        workers = []
        plain = False
        for _ in range(self.draw.randint(1, 4)):
            kind = self.draw.choice(kinds)
            if kind == self.plainly and plain and not self.told:
                kind = self.as_generator  # two in one flow are told by their texts alone
            plain |= kind == self.plainly
            # elsewhere, texts may be those of others
            workers.append(kind(self.pictures(self.texts)))
        return workers

    def plainly(self, pictures: list[Picture]) -> Step:
        """In the frame of whoever steps, where that matters: without a `with` around the call."""
        if self.told:
            return self.as_generator(pictures)
        calls = ((p, *each) for p in pictures for each in p.calls())

        def step() -> None:
            picture, at, name, made = next(calls)
            self.one(picture, at, name, made, None)

        return step

    def as_generator(self, pictures: list[Picture]) -> Step:
        """In a generator of its own."""
        work = self.work(pictures)
        return lambda: next(work)

    def as_coroutine(self, pictures: list[Picture]) -> Step:
        """In a coroutine of its own."""

        class Pause:
            def __await__(self) -> Iterator[None]:
                yield

        async def make() -> None:
            for picture in pictures:
                with self.denoiser.generation() if self.told else nullcontext() as run:
                    for step, name, made in picture.calls():
                        self.one(picture, step, name, made, run)
                        await Pause()

        coroutine = make()
        self.closing.append(coroutine.close)
        return lambda: coroutine.send(None)

    def in_thread(self, pictures: list[Picture]) -> Step:
        """In a thread of its own, a call at a time."""
        go: queue.Queue[bool] = queue.Queue()
        results: queue.Queue[BaseException | None] = queue.Queue()

        def body() -> None:
            with torch.no_grad():
                work = self.work(pictures) if self.told else None
                plain = None if self.told else self.plainly(pictures)
                while go.get(timeout=60):
                    try:
                        next(work) if work is not None else plain()  # type: ignore[misc]
                        results.put(None)
                    except BaseException as error:
                        results.put(error)
                        return

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        self.closing += [lambda: go.put(False), thread.join]

        def step() -> None:
            go.put(True)
            error = results.get(timeout=60)
            if error is not None:
                raise error

        return step

    def run(self) -> None:
        """Let the workers take turns; some stop in the middle."""
        workers = self.workers()
        while workers:
            worker = self.draw.choice(workers)
            for _ in range(self.draw.randint(1, 6)):
                try:
                    worker()
                except StopIteration:
                    workers.remove(worker)
                    break
            if worker in workers and self.draw.random() < 0.03:
                workers.remove(worker)
        for close in self.closing:
            close()


def run_worlds(seeds: range, *, told: bool) -> None:
    calls = fresh = 0
    denoisers = optimized(**CONFIG), optimized(**CONFIG)  # captured once
    for seed in seeds:
        world = World(seed, denoisers, told=told)
        try:
            world.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        calls, fresh = calls + world.truth.calls, fresh + world.truth.fresh
    assert calls > 5 * len(seeds)
    assert fresh == 0 if told else fresh < calls / 4, f"{fresh} of {calls} selected anew"


@pytest.mark.parametrize("told", [True, False])
def test_random_sequences(told: bool) -> None:
    run_worlds(range(QUICK), told=told)


@pytest.mark.parametrize("told", [True, False])
def test_many_random_sequences(told: bool) -> None:
    run_worlds(range(QUICK, QUICK + SLOW // 2), told=told)

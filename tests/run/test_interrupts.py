"""An interrupt or error at any line of the turn: no lock stays held, the next picture is right."""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import toma_fx
from tests.export.in_process import InProcess, opened
from tests.run.loops import call, optimized, same, truth
from toma_fx.errors import SignatureError
from toma_fx.export.builder import export

# an error while a generator is closed by Python itself goes nowhere
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
FOLDER = str(Path(toma_fx.__file__).parent)
STEPS = (0, 1, 2)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Injector:
    """Raises an error at one line of the package, the `at`th that runs."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.at, self.error = at, error
        self.lines = 0

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        if event in ("line", "return"):
            self.lines += 1
            if self.lines == self.at:
                raise self.error("injected")
        return self.trace

    @contextmanager
    def active(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            yield
        finally:
            sys.settrace(before)


def picture(stand: Any, seed: int, steps: Any = STEPS) -> list[Tensor]:
    return [stand(**call(seed, step)).clone() for step in steps]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Any:
    target, folder = InProcess(), tmp_path_factory.mktemp("artifact") / "a"
    export(optimized(), call(1, 0), folder, target)
    return lambda: opened(target, folder)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("kind", ["denoiser", "artifact"])
def test_at_every_line_of_a_step(kind: str, error: type[BaseException], artifact: Any) -> None:
    """The step in the middle of a picture is broken off; another picture begins later than it."""
    stand = optimized() if kind == "denoiser" else artifact()
    want = picture(stand, 1, (3, 4))
    picture(stand, 2)
    counter = Injector(0, error)
    with counter.active():
        stand(**call(2, 3))
    assert counter.lines > 100
    outside = 0
    for at in range(
        1, counter.lines + 1, 1 if kind == "denoiser" and error is KeyboardInterrupt else 7
    ):
        stand.reset()
        picture(stand, 1, (0, 1))
        injector = Injector(at, error)
        try:
            with injector.active():
                stand(**call(1, 2))
        except error:
            stepper = stand._stepper
            if stepper.generations() and not stepper._calling:
                outside += 1  # before the call was noted, or after it was done
                continue
            got = picture(stand, 1, (3, 4))
            assert same(got, want), f"line {at}: the picture after it uses what is not its own"
        except BaseException as other:
            pytest.fail(f"line {at}: {type(other).__name__} instead of {error.__name__}")
    assert outside < 60


@pytest.mark.parametrize("at_once", [True, False])
def test_at_every_line_of_a_told_step(at_once: bool) -> None:
    """The generation goes on: the step may be repeated, or the next one comes, and is right."""
    denoiser = optimized(destinations_every=1)
    want = truth(denoiser, [("", call(1, step)) for step in STEPS])
    counter = Injector(0, KeyboardInterrupt)
    with denoiser.generation() as run:
        run.step(0)
        with counter.active():
            denoiser(**call(1, 0))
    for at in range(1, counter.lines + 1, 3):
        injector = Injector(at, KeyboardInterrupt)
        with denoiser.generation() as run:
            run.step(0)
            denoiser(**call(1, 0))
            run.step(1)
            try:
                with injector.active():
                    denoiser(**call(1, 1))
            except KeyboardInterrupt:
                if at_once:
                    assert torch.equal(denoiser(**call(1, 1)), want[1]), f"line {at}"
            run.step(2)
            assert torch.equal(denoiser(**call(1, 2)), want[2]), f"line {at}"


def test_at_every_line_that_opens_and_closes_a_generation() -> None:
    denoiser = optimized()
    want = picture(denoiser, 1)
    for at in range(1, 120):
        denoiser.reset()
        injector = Injector(at, KeyboardInterrupt)
        try:
            with injector.active(), denoiser.generation() as run:
                run.step(0)
        except KeyboardInterrupt:
            pass
        assert same(picture(denoiser, 1), want), f"line {at}"
        with denoiser.own_state(), denoiser.generation():
            pass


def test_signals_at_random_moments() -> None:
    """As Ctrl-C comes: nothing is locked afterwards, and the next picture is right.

    Where the interrupt comes between two steps, the next picture may begin like another pass of the
    one that was broken off; then a step of it selects anew, which is counted.
    """
    denoiser, draw = optimized(), random.Random(0)
    want = picture(denoiser, 2)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    hits = unsure = 0
    try:
        for _ in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + draw.random() * 5e-3)
                picture(denoiser, 1)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                hits += 1
            count = denoiser.unsure
            right = same(picture(denoiser, 2), want)
            assert right or denoiser.unsure > count
            unsure += not right
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits > 10
    assert unsure < 6


def test_a_call_that_does_not_fit_changes_nothing() -> None:
    denoiser = optimized()
    want = picture(denoiser, 1)
    picture(denoiser, 1, (0, 1))
    with pytest.raises(SignatureError):
        denoiser(nonsense=1)
    assert torch.equal(denoiser(**call(1, 2)), want[2])

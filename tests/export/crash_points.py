"""Builds that end, or find the disk full, at any call that changes a file; two builds at once.

Run in a process of its own, with `crash.c` preloaded: `crash_points WHAT TEMPLATE FOLDER [NUMBER]`.
`WHAT`: "pairs", "copy" (of the template) or the name of a target; `NUMBER` of pairs or of points.
Prints how many trials of each kind it made; ends with an assertion at the first that goes wrong.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import toma_fx
from toma_fx.errors import BuildError
from toma_fx.export.building import building
from toma_fx.export.reading import read_manifest, verify_artifact

COUNT, KILL, FULL = range(3)
"""What happens at the chosen call: nothing, the end of the process, or an error from then on."""
BUILT, REFUSED, WRONG, KILLED = 0, 10, 11, -9
Make = Callable[[Path, str], Any]
"""Builds an artifact at a folder, instead of what is there, with a license."""


def copier(template: Path, pause: float = 0.0) -> Make:
    """Makes copies of an artifact, a stage for each file."""
    files, manifest = read_manifest(template).files, read_manifest(template)

    def make(out: Path, license: str) -> None:
        time.sleep(random.random() * 10 * pause)
        with building(out, license, overwrite=True) as build:
            for name in files:

                def copy(folder: Path, name: str = name) -> None:
                    shutil.copy2(template / name, folder / name)
                    time.sleep(random.random() * pause)

                build.stage(name, copy, name)
            build.finish(replace(manifest, license=license))

    return make


def exporter(target: str) -> Make:
    """Exports the smallest model for a target."""
    from tests.methods.test_methods import inputs, model

    optimized = toma_fx.optimize(model(), method="toma", min_tokens=1)

    def make(out: Path, license: str) -> None:
        toma_fx.export.export(optimized, inputs(), out, target, overwrite=True, license=license)

    return make


def start(make: Make, out: Path, license: str, mode: int = COUNT, at: int = -1) -> tuple[int, int]:
    """A build in a process of its own: (its number, a pipe that will say the calls it made)."""
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(writer)
        return pid, reader
    hooks, code, wrong = ctypes.CDLL(None), WRONG, BaseException()
    random.seed(os.getpid())  # two builds don't pause alike
    try:
        hooks.crash_arm(mode, at)
        make(out, license)
        code = BUILT
    except BuildError:
        code = REFUSED
    except BaseException as error:  # of any kind: it is told, and counts as wrong
        wrong = error
    calls = hooks.crash_calls()
    hooks.crash_arm(COUNT, -1)
    if code == WRONG:
        print(f"{type(wrong).__name__}: {wrong}", file=sys.stderr, flush=True)
    os.write(writer, str(calls).encode())
    os._exit(code)


def end(build: tuple[int, int]) -> tuple[int, int]:
    """Wait for a build: (how it ended, calls it made)."""
    pid, reader = build
    with os.fdopen(reader) as pipe:
        calls = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(calls or 0)


def found(out: Path) -> str:
    """The license of the artifact at a place, "nothing" if nothing is there.

    Raises:
        ArtifactError: something else is there.
    """
    return verify_artifact(out).license if os.path.lexists(out) else "nothing"


def try_points(make: Make, place: Path, old: bool, mode: int, points: Iterable[int]) -> int:
    """Builds that are stopped at each of the points, and go on; returns how many."""
    done = 0
    for at in points:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        out, before = place / "a", "old" if old else "nothing"
        if old:
            make(out, "old")
        code, _ = end(start(make, out, "new", mode, at))
        where = f"{'KILL' if mode == KILL else 'FULL'} at call {at}: ended with {code}"
        after = found(out)
        if mode == KILL:
            assert code in (KILLED, BUILT), where
            assert after in ((before, "new") if code == KILLED else ("new",)), where
        else:
            assert code in (REFUSED, BUILT), where
            assert after == (before if code == REFUSED else "new"), where
        assert end(start(make, out, "new"))[0] == BUILT, f"{where}, and does not go on"
        assert found(out) == "new", where
        assert [p.name for p in place.iterdir()] == ["a"], where
        done += 1
    return done


def calls_of(make: Make, place: Path, old: bool) -> int:
    """How many calls change a file in a build."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if old:
        make(place / "a", "old")
    code, calls = end(start(make, place / "a", "new", COUNT, -1))
    assert code == BUILT
    return calls


def try_pairs(make: Make, place: Path, number: int) -> Counter[str]:
    """Two builds at once: one is made, or both one after the other, and what is there is whole."""
    kinds = Counter[str]()
    for i in range(number):
        if i % 20 == 0:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
        out, names = place / "a", ("one", "one" if i % 2 else "two")
        builds = [start(make, out, name) for name in names]
        codes = [end(build)[0] for build in builds]
        assert set(codes) <= {BUILT, REFUSED}, codes
        assert BUILT in codes, "both were refused"
        assert found(out) in {n for n, code in zip(names, codes, strict=True) if code == BUILT}
        assert [p.name for p in place.iterdir()] == ["a"]
        kinds["both built" if codes == [BUILT, BUILT] else "one refused"] += 1
    return kinds


def main() -> None:
    what, template, place = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    number = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    torch.set_num_threads(1)
    random.seed(0)
    counts = dict[str, Any]()
    if what == "pairs":
        counts = dict(try_pairs(copier(template, 0.004), place, number))
    else:
        make = copier(template) if what == "copy" else exporter(what)
        for old in (True, False):
            calls = calls_of(make, place, old)
            for mode, name in ((KILL, "killed"), (FULL, "full disk")):
                points = range(calls) if not number else random.sample(range(calls), number)
                key = f"{name}, {'replacing' if old else 'first'}"
                counts[key] = try_points(make, place, old, mode, points)
            counts["calls, replacing" if old else "calls, first"] = calls
    print(json.dumps(counts))


if __name__ == "__main__":
    main()

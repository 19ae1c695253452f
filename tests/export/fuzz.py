"""Damage at random: of manifests, of folders. What reads them must refuse it or read the same."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.export.edited import list_anew, put
from toma_fx.errors import TomaError
from toma_fx.export.reading import DIGEST, MANIFEST, file_spec

SECONDS = 60.0
"""After which a case counts as one that hangs."""
OPENED = list[tuple[str, int]]()
"""Paths, and flags, that were opened while `watched` was on."""
_WATCHING = [False]


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _WATCHING[0] and event == "open" and not isinstance(arguments[0], int):
        OPENED.append((os.fsdecode(arguments[0]), arguments[2]))


sys.addaudithook(_note)


@contextmanager
def watched(folder: Path, *more: str) -> Iterator[None]:
    """Nothing is opened but the folder, names in it without a way out, and descriptors.

    Args:
        folder: by its path. more: beginnings of other paths that may be opened.

    Raises:
        AssertionError: something else was, or a descriptor was left open, or it took too long.
    """
    OPENED.clear()
    before = len(os.listdir("/proc/self/fd"))
    signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    _WATCHING[0] = True
    try:
        yield
    finally:
        _WATCHING[0] = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    allowed = ("/proc/self/fd/", *more)
    for path, _ in OPENED:
        inside = "/" not in path and path not in (".", "..")
        assert inside or path == str(folder) or path.startswith(allowed), f"{path} was opened"
    assert len(os.listdir("/proc/self/fd")) == before, "a descriptor was left open"


def _too_long(number: int, frame: Any) -> None:
    raise AssertionError(f"a case took more than {SECONDS} seconds")


# -- manifests ------------------------------------------------------------------------------------

NUMBERS = (0, 1, -1, 2, 3, 0.5, -0.0, 1e300, 10**6, 2**31, 2**63, 2**64, 10**30, True)
TEXTS = (
    "", "x", "0", "\0", "\x1b[2J", "../x", "/etc/passwd", "é", "a" * 10_000, "reuse", "refresh",
    "plain", "float64", "load", "nn", "cuda", "cpu:3", "meta", "tuple", "output_0", "timestep",
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, [], {}, [[]], {"": None}, [0] * 1000, {"a": {"a": {"a": 1}}})


def places(data: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in JSON data."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(data, dict):
        pairs += [(data, key) for key in data]
    elif isinstance(data, list):
        pairs += [(data, i) for i in range(len(data))]
    return pairs + [pair for container, key in list(pairs) for pair in places(container[key])]


def edited_data(text: str, chance: random.Random) -> bytes:
    """A manifest with one to three other values, written as toma_fx writes it."""
    data = json.loads(text)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        container, key = chance.choice(places(data))
        kind = chance.randrange(7)
        if kind == 0:
            del container[key]
        elif kind == 1:
            container[key] = chance.choice(NUMBERS)
        elif kind == 2:
            container[key] = chance.choice(TEXTS)
        elif kind == 3:
            container[key] = deepcopy(chance.choice(OTHERS))
        elif kind == 4:
            other, name = chance.choice(places(data))
            container[key] = deepcopy(other[name])
        elif isinstance(container, list):
            container.insert(key, deepcopy(container[key]))
        else:
            container[chance.choice(TEXTS)] = deepcopy(container[key])
    return (json.dumps(data, indent=2) + "\n").encode()


def damaged_bytes(good: bytes, chance: random.Random) -> bytes:
    """Bytes that were flipped, cut, doubled, lost or made up."""
    at, size = chance.randrange(len(good)), chance.choice((1, 1, 2, 10, 100))
    made_up = chance.choice((
        chance.randbytes(size), b"[" * 10**5, b"9" * 5000, b"NaN", b"1e999", b'"', b"\\ud800",
        b'"a": 1, ', b"//", b"\xef\xbb\xbf", b"-",
    ))  # fmt: skip
    return (
        good[:at] + bytes([good[at] ^ 1 << chance.randrange(8)]) + good[at + 1 :],
        good[:at],
        good[:at] + good[at : at + size] + good[at:],
        good[:at] + good[at + size :],
        good[:at] + made_up + good[at:],
        good[:at] + made_up + good[at + len(made_up) :],
    )[chance.randrange(6)]


def fuzz_manifests(
    folder: Path, count: int, seed: int, read: Callable[[Path], Any], use: Callable[[Any], None]
) -> Counter[str]:
    """Damage the manifest of an artifact that many times, with and without a fitting digest.

    Args:
        folder: of the artifact. read: refuses it, or says what it holds. use: what holds.

    Returns:
        How it went, by a word for it.
    """
    chance, results = random.Random(seed), Counter[str]()
    good, digest = (folder / MANIFEST).read_bytes(), (folder / DIGEST).read_bytes()
    whole = read(folder)
    for case in range(count):
        how = ("bytes", "bytes, fitting digest", "values, fitting digest")[case % 3]
        values = how.startswith("values")
        damaged = edited_data(good.decode(), chance) if values else damaged_bytes(good, chance)
        put(folder, damaged)
        if how == "bytes":
            (folder / DIGEST).write_bytes(digest)
        try:
            with watched(folder):
                found = read(folder)
        except TomaError as error:
            results[f"{how}: {type(error).__name__}"] += 1
            continue
        if found == whole:
            results[f"{how}: the same"] += 1
        else:
            assert how.endswith("fitting digest"), "damage was not noticed"
            use(found)
            results[f"{how}: consistent"] += 1
    put(folder, good)
    return results


# -- folders --------------------------------------------------------------------------------------


def damage_folder(folder: Path, outside: Path, chance: random.Random) -> str:
    """Do one thing to a copy of an artifact that nobody should do; says which."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    if not files:
        return "nothing left"
    path, other = chance.choice(files), chance.choice(files)
    plain = len(files) == len(list(folder.iterdir()))  # nothing that this process would wait for
    name = chance.choice(sorted(DAMAGES if plain else {*DAMAGES} - {*EDITS}))
    DAMAGES[name](path, other, outside, chance)
    return name


def _instead(make: Callable[[Path, Path, Path], Any]) -> Callable[..., None]:
    def damage(path: Path, other: Path, outside: Path, chance: random.Random) -> None:
        path.unlink()
        make(path, other, outside)

    return damage


def _bytes(path: Path, other: Path, outside: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(damaged_bytes(content, chance) if content else b"x")


def _sparse(path: Path, other: Path, outside: Path, chance: random.Random) -> None:
    with path.open("r+b") as file:
        file.truncate(chance.choice((0, 1, 10**6)))


def _exchange(path: Path, other: Path, outside: Path, chance: random.Random) -> None:
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def _linked_folder(path: Path, other: Path, outside: Path, chance: random.Random) -> None:
    """A listed file below a folder that is a link."""
    folder = path.parent
    if not (folder / MANIFEST).is_file() or (folder / "sub").is_symlink():
        return
    (folder / "sub").symlink_to(outside)
    try:
        data = json.loads((folder / MANIFEST).read_text())
        data["files"]["sub/secret"] = asdict(file_spec(outside / "secret"))
    except (ValueError, KeyError, TypeError):
        return
    put(folder, (json.dumps(data, indent=2) + "\n").encode())


def _listed_anew(path: Path, other: Path, outside: Path, chance: random.Random) -> None:
    """Weights that are damaged, with a size and checksum that fit."""
    folder = path.parent
    try:
        _bytes(folder / "weights.safetensors", other, outside, chance)
        list_anew(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return


EDITS = ("a linked folder", "other weights, listed")
DAMAGES: dict[str, Callable[[Path, Path, Path, random.Random], None]] = {
    "bytes": _bytes,
    "sizes": _sparse,
    "exchanged": _exchange,
    "a linked folder": _linked_folder,
    "other weights, listed": _listed_anew,
    "gone": lambda path, other, outside, chance: path.unlink(),
    "renamed": lambda path, other, outside, chance: path.rename(path.with_name("renamed")),
    "more files": lambda path, *rest: path.with_name("more").write_text("x"),
    "a link to another": _instead(lambda path, other, outside: path.symlink_to(other.name)),
    "a link outside": _instead(lambda path, other, outside: path.symlink_to(outside / "secret")),
    "a link to nothing": _instead(lambda path, other, outside: path.symlink_to("nothing")),
    "a link to itself": _instead(lambda path, other, outside: path.symlink_to(path.name)),
    "a link to a device": _instead(lambda path, other, outside: path.symlink_to("/dev/zero")),
    "a pipe": _instead(lambda path, other, outside: os.mkfifo(path)),
    "a folder": _instead(lambda path, other, outside: path.mkdir()),
}


def fuzz_folders(
    artifact: Path, place: Path, count: int, seed: int, load: Callable[[Path], Any]
) -> Counter[str]:
    """Damage copies of an artifact, each in one to three ways.

    Args:
        artifact: what is copied. place: an empty folder. load: refuses it, or says what it holds.

    Returns:
        How it went, by a word for it.
    """
    chance, results = random.Random(seed), Counter[str]()
    outside = place / "outside"
    outside.mkdir()
    (outside / "secret").write_text("a secret")
    whole = load(artifact)
    for _ in range(count):
        copy = Path(shutil.copytree(artifact, place / "copy"))
        done = [damage_folder(copy, outside, chance) for _ in range(chance.choice((1, 1, 2, 3)))]
        temporary = (os.path.realpath(os.environ.get("TMPDIR", "/tmp")) + "/tmp", "/dev/", "/sys/")
        try:
            with watched(copy, *temporary):
                found = load(copy)
        except TomaError as error:
            results[f"{type(error).__name__}"] += 1
        else:
            same = found == whole
            assert same or "other weights, listed" in done, f"damage was not noticed: {done}"
            results["the same" if same else "other weights, listed"] += 1
        shutil.rmtree(copy)
    return results


def told(results: Counter[str]) -> str:
    """How many cases went how."""
    return "; ".join(f"{name}: {n:,}" for name, n in sorted(results.items()))
